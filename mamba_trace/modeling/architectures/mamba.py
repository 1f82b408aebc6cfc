"""Mamba-1: Hugging Face's ``MambaForCausalLM``."""

from __future__ import annotations

from torch import nn
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaForCausalLM, MambaMixer, MambaRMSNorm

from ...sites import Scope
from ..mixer import HookableBlock, HookableMixer, HookableRMSNorm


class HookableMambaBlock(HookableBlock, MambaBlock):
    """A `MambaBlock` with its sites."""


class HookableMambaMixer(HookableMixer, MambaMixer):
    """A `MambaMixer` with its sites."""


class HookableMambaRMSNorm(HookableRMSNorm, MambaRMSNorm):
    """A `MambaRMSNorm` that keeps float64."""


MODEL = MambaForCausalLM
HOOKABLE: dict[type[nn.Module], tuple[type[nn.Module], Scope | None]] = {
    MambaBlock: (HookableMambaBlock, "block"),
    MambaMixer: (HookableMambaMixer, "mixer"),
    MambaRMSNorm: (HookableMambaRMSNorm, None),
}
