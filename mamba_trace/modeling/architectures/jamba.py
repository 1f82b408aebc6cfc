"""Jamba: Mamba-1 with RMS norms on dt, B and C, or attention, and then an MLP or a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import (
    JambaAttention,
    JambaAttentionDecoderLayer,
    JambaForCausalLM,
    JambaMambaDecoderLayer,
    JambaMambaMixer,
    JambaMLP,
    JambaModel,
    JambaRMSNorm,
    JambaSparseMoeBlock,
    JambaTopKRouter,
)

from ...scan.reference import accumulation_dtype
from ..attention import HookableAttention
from ..block import HookableRMSNorm, TwoStepBlock
from ..language_model import HookableBase
from ..mlp import HookableExperts, HookableMLP, HookableRouter
from ..selective import NormedSelectiveMixer
from .architecture import Architecture


class HookableJambaMambaDecoderLayer(TwoStepBlock, JambaMambaDecoderLayer):
    """A `JambaMambaDecoderLayer` with its sites."""


class HookableJambaAttentionDecoderLayer(TwoStepBlock, JambaAttentionDecoderLayer):
    """A `JambaAttentionDecoderLayer` with its sites."""


class HookableJambaMambaMixer(NormedSelectiveMixer, JambaMambaMixer):
    """A `JambaMambaMixer` with its sites."""


class HookableJambaAttention(HookableAttention, JambaAttention):
    """A `JambaAttention` with its sites."""


class HookableJambaMLP(HookableMLP, JambaMLP):
    """A `JambaMLP`."""


class HookableJambaSparseMoeBlock(HookableExperts, JambaSparseMoeBlock):
    """A `JambaSparseMoeBlock` with its sites."""


class HookableJambaTopKRouter(HookableRouter, JambaTopKRouter):
    """A `JambaTopKRouter`, whose weights are those of a softmax over all experts."""

    def chosen(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights, numbers = logits.softmax(-1, dtype=accumulation_dtype(logits)).topk(self.top_k, dim=-1)
        return weights.to(dtype), numbers


class HookableJambaRMSNorm(HookableRMSNorm, JambaRMSNorm):
    """A `JambaRMSNorm` that keeps float64."""


class HookableJambaModel(HookableBase, JambaModel):
    """A `JambaModel`."""


JAMBA = Architecture(
    name="Jamba",
    family="selective",
    model_class=JambaForCausalLM,
    config_class=JambaConfig,
    base="model",
    hookable={
        JambaMambaDecoderLayer: HookableJambaMambaDecoderLayer,
        JambaAttentionDecoderLayer: HookableJambaAttentionDecoderLayer,
        JambaMambaMixer: HookableJambaMambaMixer,
        JambaAttention: HookableJambaAttention,
        JambaMLP: HookableJambaMLP,
        JambaSparseMoeBlock: HookableJambaSparseMoeBlock,
        JambaTopKRouter: HookableJambaTopKRouter,
        JambaRMSNorm: HookableJambaRMSNorm,
        JambaModel: HookableJambaModel,
    },
)
