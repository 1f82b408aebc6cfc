"""Falcon-H1: Mamba-2 and attention side by side in each layer, and then an MLP, with factors all along the way."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import FalconH1Config
from transformers.models.falcon_h1.modeling_falcon_h1 import (
    FalconH1Attention,
    FalconH1DecoderLayer,
    FalconH1ForCausalLM,
    FalconH1Mixer,
    FalconH1MLP,
    FalconH1Model,
    FalconH1RMSNorm,
    FalconH1RMSNormGated,
    apply_rotary_pos_emb,
)

from ..attention import HookableAttention
from ..block import HookableRMSNorm, ParallelBlock, times
from ..dual import DualMixer, HookableGatedRMSNorm
from ..language_model import HookableBase, HookableCausalLM, with_signature
from ..mixer import HookableMixer
from ..mlp import HookableMLP
from ..offers import Offers
from .architecture import Architecture


class HookableFalconH1DecoderLayer(ParallelBlock, FalconH1DecoderLayer):
    """A `FalconH1DecoderLayer` with its sites."""

    returned = 1


class HookableFalconH1Mixer(DualMixer, FalconH1Mixer):
    """A `FalconH1Mixer` with its sites. It has no norm of its own, or one before its gate or after it."""

    mup_vector: Tensor

    def made_hookable(self) -> None:
        if not isinstance(self.norm, FalconH1RMSNormGated):
            self.lacks = ("inner_norm",)
        else:
            self.norm_first = self.norm.norm_before_gate

    def entered(self, hidden_states: Tensor) -> Tensor:
        return times(hidden_states, self.ssm_in_multiplier)

    def divided(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().divided(rows * self.mup_vector.to(rows.dtype))

    def finished(self, offer: Offers, output: Tensor, skip: Tensor) -> Tensor:
        if self.norm_first:
            return offer("after_skip", offer.through("norm", output) * F.silu(skip))
        if self.lacks:
            return HookableMixer.finished(self, offer, output, skip)
        return super().finished(offer, output, skip)


class HookableFalconH1Attention(HookableAttention, FalconH1Attention):
    """A `FalconH1Attention` with its sites."""

    rotate = staticmethod(apply_rotary_pos_emb)


class HookableFalconH1MLP(HookableMLP, FalconH1MLP):
    """A `FalconH1MLP`."""


class HookableFalconH1RMSNorm(HookableRMSNorm, FalconH1RMSNorm):
    """A `FalconH1RMSNorm` that keeps float64."""


class HookableFalconH1RMSNormGated(HookableGatedRMSNorm, FalconH1RMSNormGated):
    """The `FalconH1RMSNormGated` of a mixer, which keeps float64."""

    wide_weight = True

    @property
    def group_size(self) -> int:  # type: ignore[override]
        return self.weight.numel() // self.n_groups


class HookableFalconH1Model(HookableBase, FalconH1Model):
    """A `FalconH1Model`."""


class HookableFalconH1ForCausalLM(HookableCausalLM, FalconH1ForCausalLM):
    """A `FalconH1ForCausalLM`, whose logits are lm_head's output times ``lm_head_multiplier``."""

    forward = with_signature(FalconH1ForCausalLM)


FALCON_H1 = Architecture(
    name="Falcon-H1",
    family="dual",
    model_class=FalconH1ForCausalLM,
    config_class=FalconH1Config,
    base="model",
    hookable={
        FalconH1DecoderLayer: HookableFalconH1DecoderLayer,
        FalconH1Mixer: HookableFalconH1Mixer,
        FalconH1Attention: HookableFalconH1Attention,
        FalconH1MLP: HookableFalconH1MLP,
        FalconH1RMSNorm: HookableFalconH1RMSNorm,
        FalconH1RMSNormGated: HookableFalconH1RMSNormGated,
        FalconH1Model: HookableFalconH1Model,
        FalconH1ForCausalLM: HookableFalconH1ForCausalLM,
    },
)
