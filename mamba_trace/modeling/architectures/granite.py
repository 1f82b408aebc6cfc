"""Granite 4: Mamba-2 or attention, and then an MLP with or without experts, with factors all along the way."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridAttention,
    GraniteMoeHybridDecoderLayer,
    GraniteMoeHybridForCausalLM,
    GraniteMoeHybridMambaLayer,
    GraniteMoeHybridMLP,
    GraniteMoeHybridModel,
    GraniteMoeHybridMoE,
    GraniteMoeHybridRMSNorm,
    GraniteMoeHybridRMSNormGated,
    GraniteMoeHybridTopKRouter,
    apply_rotary_pos_emb,
)

from ...scan.reference import accumulation_dtype
from ..attention import HookableAttention
from ..block import HookableRMSNorm, MlpBlock, TwoStepBlock
from ..dual import DualMixer, HookableGatedRMSNorm
from ..language_model import HookableBase, HookableCausalLM, with_signature
from ..mlp import HookableExperts, HookableMLP, HookableRouter
from ..offers import Offers
from .architecture import Architecture


class HookableGraniteMoeHybridDecoderLayer(TwoStepBlock, GraniteMoeHybridDecoderLayer):
    """A `GraniteMoeHybridDecoderLayer` with its sites. Where it has experts it has an MLP for all tokens as well."""

    parts_named: ClassVar[dict[str, str]] = MlpBlock.parts_named | {
        "norm_2": "post_attention_layernorm",
        "mlp": "shared_mlp",
        "moe": "block_sparse_moe",
    }

    def fed(self, offer: Offers, normalized: Tensor) -> Tensor:
        if self.part("moe") is None:
            return super().fed(offer, normalized)
        return self.run(offer, "moe", normalized) + self.run(offer, "mlp", normalized)


class HookableGraniteMoeHybridMambaLayer(DualMixer, GraniteMoeHybridMambaLayer):
    """A `GraniteMoeHybridMambaLayer` with its sites."""


class HookableGraniteMoeHybridAttention(HookableAttention, GraniteMoeHybridAttention):
    """A `GraniteMoeHybridAttention` with its sites."""

    rotate = staticmethod(apply_rotary_pos_emb)


class HookableGraniteMoeHybridMLP(HookableMLP, GraniteMoeHybridMLP):
    """A `GraniteMoeHybridMLP`."""


class HookableGraniteMoeHybridMoE(HookableExperts, GraniteMoeHybridMoE):
    """A `GraniteMoeHybridMoE` with its sites."""


class HookableGraniteMoeHybridTopKRouter(HookableRouter, GraniteMoeHybridTopKRouter):
    """A `GraniteMoeHybridTopKRouter`, whose weights are those of a softmax over the chosen experts."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        logits = super().logits(hidden_states)
        return logits.to(accumulation_dtype(logits))

    def chosen(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        chosen, numbers = logits.topk(self.top_k, dim=-1)
        return chosen.softmax(-1).to(dtype), numbers


class HookableGraniteMoeHybridRMSNorm(HookableRMSNorm, GraniteMoeHybridRMSNorm):
    """A `GraniteMoeHybridRMSNorm` that keeps float64."""


class HookableGraniteMoeHybridRMSNormGated(HookableGatedRMSNorm, GraniteMoeHybridRMSNormGated):
    """The `GraniteMoeHybridRMSNormGated` of a mixer, which keeps float64."""


class HookableGraniteMoeHybridModel(HookableBase, GraniteMoeHybridModel):
    """A `GraniteMoeHybridModel`."""


class HookableGraniteMoeHybridForCausalLM(HookableCausalLM, GraniteMoeHybridForCausalLM):
    """A `GraniteMoeHybridForCausalLM`, whose logits are lm_head's output divided by ``logits_scaling``."""

    forward = with_signature(GraniteMoeHybridForCausalLM)


GRANITE = Architecture(
    name="Granite 4",
    family="dual",
    model_class=GraniteMoeHybridForCausalLM,
    config_class=GraniteMoeHybridConfig,
    base="model",
    hookable={
        GraniteMoeHybridDecoderLayer: HookableGraniteMoeHybridDecoderLayer,
        GraniteMoeHybridMambaLayer: HookableGraniteMoeHybridMambaLayer,
        GraniteMoeHybridAttention: HookableGraniteMoeHybridAttention,
        GraniteMoeHybridMLP: HookableGraniteMoeHybridMLP,
        GraniteMoeHybridMoE: HookableGraniteMoeHybridMoE,
        GraniteMoeHybridTopKRouter: HookableGraniteMoeHybridTopKRouter,
        GraniteMoeHybridRMSNorm: HookableGraniteMoeHybridRMSNorm,
        GraniteMoeHybridRMSNormGated: HookableGraniteMoeHybridRMSNormGated,
        GraniteMoeHybridModel: HookableGraniteMoeHybridModel,
        GraniteMoeHybridForCausalLM: HookableGraniteMoeHybridForCausalLM,
    },
)
