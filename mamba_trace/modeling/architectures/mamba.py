"""Mamba-1: Hugging Face's ``MambaForCausalLM``."""

from __future__ import annotations

from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaForCausalLM, MambaMixer, MambaRMSNorm

from ..block import HookableBlock, HookableRMSNorm
from ..mixer import HookableMixer
from .architecture import Architecture


class HookableMambaBlock(HookableBlock, MambaBlock):
    """A `MambaBlock` with its sites."""


class HookableMambaMixer(HookableMixer, MambaMixer):
    """A `MambaMixer` with its sites."""


class HookableMambaRMSNorm(HookableRMSNorm, MambaRMSNorm):
    """A `MambaRMSNorm` that keeps float64."""


def axis_sizes(config: MambaConfig) -> dict[str, int]:
    """The size of each axis that the configuration fixes."""
    return {
        "D": config.hidden_size,
        "E": config.intermediate_size,
        "N": config.state_size,
        "R": int(config.time_step_rank),
        "V": config.vocab_size,
    }


MAMBA = Architecture(
    model_class=MambaForCausalLM,
    config_class=MambaConfig,
    hookable={
        MambaBlock: (HookableMambaBlock, "block"),
        MambaMixer: (HookableMambaMixer, "mixer"),
        MambaRMSNorm: (HookableMambaRMSNorm, None),
    },
    axis_sizes=axis_sizes,
)
