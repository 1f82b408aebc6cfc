"""Bamba: Mamba-2 or attention with a rotary embedding, and then an MLP.

Where this package differs from Hugging Face 5 on purpose: tokens on a cache go on counting their positions. Hugging
Face begins again from 0 where it is given no ``position_ids``.
"""

from __future__ import annotations

from transformers import BambaConfig
from transformers.models.bamba.modeling_bamba import (
    BambaAttention,
    BambaDecoderLayer,
    BambaForCausalLM,
    BambaMixer,
    BambaMLP,
    BambaModel,
    BambaRMSNorm,
    BambaRMSNormGated,
    apply_rotary_pos_emb,
)

from ..attention import HookableAttention
from ..block import HookableRMSNorm, TwoStepBlock
from ..dual import DualMixer, HookableGatedRMSNorm
from ..language_model import HookableBase
from ..mlp import HookableMLP
from .architecture import Architecture


class HookableBambaDecoderLayer(TwoStepBlock, BambaDecoderLayer):
    """A `BambaDecoderLayer` with its sites."""

    returned = 2


class HookableBambaMixer(DualMixer, BambaMixer):
    """A `BambaMixer` with its sites."""


class HookableBambaAttention(HookableAttention, BambaAttention):
    """A `BambaAttention` with its sites."""

    rotate = staticmethod(apply_rotary_pos_emb)


class HookableBambaMLP(HookableMLP, BambaMLP):
    """A `BambaMLP`."""


class HookableBambaRMSNorm(HookableRMSNorm, BambaRMSNorm):
    """A `BambaRMSNorm` that keeps float64."""


class HookableBambaRMSNormGated(HookableGatedRMSNorm, BambaRMSNormGated):
    """The `BambaRMSNormGated` of a mixer, which keeps float64."""


class HookableBambaModel(HookableBase, BambaModel):
    """A `BambaModel`."""


BAMBA = Architecture(
    name="Bamba",
    family="dual",
    model_class=BambaForCausalLM,
    config_class=BambaConfig,
    base="model",
    hookable={
        BambaDecoderLayer: HookableBambaDecoderLayer,
        BambaMixer: HookableBambaMixer,
        BambaAttention: HookableBambaAttention,
        BambaMLP: HookableBambaMLP,
        BambaRMSNorm: HookableBambaRMSNorm,
        BambaRMSNormGated: HookableBambaRMSNormGated,
        BambaModel: HookableBambaModel,
    },
)
