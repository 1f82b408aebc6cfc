"""Configurations of each format that the tests of the conversion share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

MAMBA_130M: dict[str, Any] = {  # the config.json of state-spaces/mamba-130m
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


MAMBA2_130M: dict[str, Any] = {  # the config.json of state-spaces/mamba2-130m
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


MAMBA_LENS: dict[str, Any] = {  # every attribute of a MambaCfg
    "d_model": 24,
    "n_layers": 2,
    "vocab_size": 56,
    "d_state": 4,
    "expand": 2,
    "dt_rank": 3,
    "d_conv": 4,
    "pad_vocab_size_multiple": 8,
    "conv_bias": True,
    "bias": False,
    "default_prepend_bos": False,
    "tokenizer_prepends_bos": False,
    "n_ctx": 100,
    "device": "cpu",
    "initializer_cfg": {
        "initializer_range": 0.03,
        "rescale_prenorm_residual": True,
        "n_residuals_per_layer": 2,
        "dt_init": "constant",
        "dt_scale": 0.5,
        "dt_min": 0.01,
        "dt_max": 0.2,
        "dt_init_floor": 0.002,
    },
    "d_inner": 48,
}


@dataclass
class InitializerLike:
    """As MambaLens 0.0.4's MambaInitCfg is by default: tuples, by trailing commas."""

    initializer_range: Any = (0.02,)
    rescale_prenorm_residual: Any = (True,)
    n_residuals_per_layer: Any = (1,)
    dt_init: Any = ("random",)
    dt_scale: Any = (1.0,)
    dt_min: Any = (0.001,)
    dt_max: Any = (0.1,)
    dt_init_floor: Any = 1e-4


@dataclass
class ConfigLike:
    """An object with the attributes of MambaLens's MambaCfg."""

    d_model: int = 24
    n_layers: int = 2
    vocab_size: int = 56
    d_state: int = 4
    dt_rank: int = 2
    device: Any = field(default_factory=lambda: torch.device("cpu"))
    initializer_cfg: Any = field(default_factory=InitializerLike)


def plain(config: Any) -> Any:
    """What can be compared: a dict, without the folder that a configuration was read from."""
    if not isinstance(config, PreTrainedConfig):
        return config
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
