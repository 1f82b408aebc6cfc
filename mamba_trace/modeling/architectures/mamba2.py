"""Mamba-2: Hugging Face's ``Mamba2ForCausalLM``."""

from __future__ import annotations

from typing import Any

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
from .architecture import Architecture, Shown, parameter

PARAMETERS = {
    "mixer.dt_bias": parameter("H", "", "W_delta_2.bias"),
    "mixer.A_log": parameter("H", "", "A_log"),
    "mixer.D": parameter("H", "", "W_D"),
    "mixer.conv1d.weight": parameter("E GN GN", "1 K", "conv1d.weight B_conv1d.weight C_conv1d.weight"),
    "mixer.conv1d.bias": parameter("E GN GN", "", "conv1d.bias B_conv1d.bias C_conv1d.bias", "use_conv_bias"),
    "mixer.in_proj.weight": parameter(
        "E E GN GN H", "D", "skip_proj.weight in_proj.weight W_B.weight W_C.weight W_delta_1.weight"
    ),
    "mixer.in_proj.bias": parameter(
        "E E GN GN H", "", "skip_proj.bias in_proj.bias W_B.bias W_C.bias W_delta_1.bias", "use_bias"
    ),
    "mixer.norm.weight": parameter("E", "", "inner_norm.weight"),
    "mixer.out_proj.weight": parameter("D", "E", "out_proj.weight"),
    "mixer.out_proj.bias": parameter("D", "", "out_proj.bias", "use_bias"),
    "norm.weight": parameter("D", "", "norm.weight"),
}


def sizes_of(config: Any) -> dict[str, int]:
    """The size of each axis of the parameters of a Mamba-2."""
    sizes = {"V": config.vocab_size, "D": config.hidden_size, "E": int(config.expand * config.hidden_size), "1": 1}
    sizes |= {"H": config.num_heads, "P": config.head_dim, "G": config.n_groups}
    return sizes | {"N": config.state_size, "K": config.conv_kernel}


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
        Mamba2Block: HookableMamba2Block,
        Mamba2Mixer: HookableMamba2Mixer,
        Mamba2RMSNorm: HookableMamba2RMSNorm,
        MambaRMSNormGated: HookableMamba2RMSNormGated,
    },
    formats=("original", "huggingface"),
    parameters=PARAMETERS,
    sizes=sizes_of,
    shown=(
        Shown("E", "expand * hidden_size", "mixer.out_proj.weight", 1),
        Shown("H", "num_heads", "mixer.A_log", 0),
        Shown("GN", "n_groups * state_size", "mixer.conv1d.weight", 0),
        Shown("K", "conv_kernel", "mixer.conv1d.weight", 2),
    ),
)
