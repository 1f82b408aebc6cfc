"""Mamba-2: Hugging Face's ``Mamba2ForCausalLM``."""

from __future__ import annotations

from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from ..block import HookableBlock, HookableRMSNorm
from ..dual import DualMixer, HookableGatedRMSNorm
from .architecture import Architecture


class HookableMamba2Block(HookableBlock, Mamba2Block):
    """A `Mamba2Block` with its sites."""


class HookableMamba2Mixer(DualMixer, Mamba2Mixer):
    """A `Mamba2Mixer` with its sites."""


class HookableMamba2RMSNorm(HookableRMSNorm, Mamba2RMSNorm):
    """A `Mamba2RMSNorm` that keeps float64."""


class HookableMamba2RMSNormGated(HookableGatedRMSNorm, MambaRMSNormGated):
    """The `MambaRMSNormGated` of a mixer, which keeps float64."""


MAMBA2 = Architecture(
    name="Mamba-2",
    family="dual",
    model_class=Mamba2ForCausalLM,
    config_class=Mamba2Config,
    hookable={
        Mamba2Block: (HookableMamba2Block, "block"),
        Mamba2Mixer: (HookableMamba2Mixer, "mixer"),
        Mamba2RMSNorm: (HookableMamba2RMSNorm, None),
        MambaRMSNormGated: (HookableMamba2RMSNormGated, None),
    },
)
