"""Mamba-1: Hugging Face's ``MambaForCausalLM``."""

from __future__ import annotations

from typing import Any

from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaForCausalLM, MambaMixer, MambaRMSNorm

from ..block import HookableBlock, HookableRMSNorm
from ..selective import SelectiveMixer
from .architecture import Architecture, Shown, parameter

PARAMETERS = {
    "mixer.A_log": parameter("E", "N", "A_log"),
    "mixer.D": parameter("E", "", "W_D"),
    "mixer.conv1d.weight": parameter("E", "1 K", "conv1d.weight"),
    "mixer.conv1d.bias": parameter("E", "", "conv1d.bias", "use_conv_bias"),
    "mixer.in_proj.weight": parameter("E E", "D", "in_proj.weight skip_proj.weight"),
    "mixer.in_proj.bias": parameter("E E", "", "in_proj.bias skip_proj.bias", "use_bias"),
    "mixer.x_proj.weight": parameter("R N N", "E", "W_delta_1.weight W_B.weight W_C.weight"),
    "mixer.dt_proj.weight": parameter("E", "R", "W_delta_2.weight"),
    "mixer.dt_proj.bias": parameter("E", "", "W_delta_2.bias"),
    "mixer.out_proj.weight": parameter("D", "E", "out_proj.weight"),
    "mixer.out_proj.bias": parameter("D", "", "out_proj.bias", "use_bias"),
    "norm.weight": parameter("D", "", "norm.weight"),
}
SHOWN = (
    Shown("E", "intermediate_size", "mixer.A_log", 0),
    Shown("N", "state_size", "mixer.A_log", 1),
    Shown("K", "conv_kernel", "mixer.conv1d.weight", 2),
    Shown("R", "time_step_rank", "mixer.dt_proj.weight", 1),
)


def sizes_of(config: Any) -> dict[str, int]:
    """The size of each axis of the parameters of a Mamba-1 or a Falcon-Mamba."""
    sizes = {"V": config.vocab_size, "D": config.hidden_size, "E": config.intermediate_size, "1": 1}
    return sizes | {"N": config.state_size, "R": int(config.time_step_rank), "K": config.conv_kernel}


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
        MambaBlock: HookableMambaBlock,
        MambaMixer: HookableMambaMixer,
        MambaRMSNorm: HookableMambaRMSNorm,
    },
    formats=("original", "huggingface", "mamba_lens"),
    parameters=PARAMETERS,
    sizes=sizes_of,
    shown=SHOWN,
)
