"""Mamba-1: Hugging Face's ``MambaForCausalLM``."""

from __future__ import annotations

from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaForCausalLM, MambaMixer, MambaRMSNorm

from ..block import HookableBlock, HookableRMSNorm
from ..selective import SelectiveMixer
from .architecture import Architecture


class HookableMambaBlock(HookableBlock, MambaBlock):
    """A `MambaBlock` with its sites."""


class HookableMambaMixer(SelectiveMixer, MambaMixer):
    """A `MambaMixer` with its sites."""


class HookableMambaRMSNorm(HookableRMSNorm, MambaRMSNorm):
    """A `MambaRMSNorm` that keeps float64."""


MAMBA = Architecture(
    name="Mamba-1",
    family="selective",
    model_class=MambaForCausalLM,
    config_class=MambaConfig,
    hookable={
        MambaBlock: (HookableMambaBlock, "block"),
        MambaMixer: (HookableMambaMixer, "mixer"),
        MambaRMSNorm: (HookableMambaRMSNorm, None),
    },
)
