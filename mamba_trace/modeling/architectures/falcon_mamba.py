"""Falcon-Mamba: Mamba-1 with RMS norms, which have no weights, on dt, B and C."""

from __future__ import annotations

from torch import Tensor
from transformers import FalconMambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaForCausalLM,
    FalconMambaMixer,
    FalconMambaRMSNorm,
    FalconMambaWeightlessRMSNorm,
)

from ...scan.norm import rms_norm
from ..block import HookableBlock, HookableRMSNorm
from ..selective import NormedSelectiveMixer
from .architecture import Architecture
from .mamba import PARAMETERS, SHOWN, sizes_of


class HookableFalconMambaBlock(HookableBlock, FalconMambaBlock):
    """A `FalconMambaBlock` with its sites."""


class HookableFalconMambaMixer(NormedSelectiveMixer, FalconMambaMixer):
    """A `FalconMambaMixer` with its sites: delta_1, B and C are what the norms return."""


class HookableFalconMambaRMSNorm(HookableRMSNorm, FalconMambaRMSNorm):
    """A `FalconMambaRMSNorm` that keeps float64."""


class HookableFalconMambaWeightlessRMSNorm(FalconMambaWeightlessRMSNorm):
    """A `FalconMambaWeightlessRMSNorm` that keeps float64."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


FALCON_MAMBA = Architecture(
    name="Falcon-Mamba",
    family="selective",
    model_class=FalconMambaForCausalLM,
    config_class=FalconMambaConfig,
    hookable={
        FalconMambaBlock: HookableFalconMambaBlock,
        FalconMambaMixer: HookableFalconMambaMixer,
        FalconMambaRMSNorm: HookableFalconMambaRMSNorm,
        FalconMambaWeightlessRMSNorm: HookableFalconMambaWeightlessRMSNorm,
    },
    formats=("huggingface",),
    parameters=PARAMETERS,  # the inner norms have none, so that the weights of a Mamba-1 look the same
    sizes=sizes_of,
    shown=SHOWN,
)
