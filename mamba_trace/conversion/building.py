"""A module is made from a configuration alone, or from a configuration and a state dict: no files are read.

Contract: `from_scratch` gives new weights, `from_weights` the given ones, bit for bit. Neither
builds anything that does not fit this machine. What is in no state dict is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from ..modeling.architectures import BY_TYPE
from .config_names import check_names
from .formats import convert_config, unnamed_settings
from .hybrid_weights import model_of
from .initialization import initialize
from .weight_formats import (
    check_mapping,
    check_state_dict,
    check_values,
    convert_state_dict,
    detect_state_dict_format,
)
from .weight_sizes import check_buildable


def from_scratch(config: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A module of a configuration in any format, initialised as the Mamba authors do, a hybrid as transformers does.

    Raises:
        CheckpointError: for a value that does not fit, or a model too large for this machine's memory.
    """
    hf_config = convert_config(config, "huggingface")
    if BY_TYPE[hf_config.model_type].hybrid:
        return _hybrid_from_scratch(hf_config, dtype, seed)
    module = _empty(hf_config, dtype)
    initialize(module, seed=seed, **unnamed_settings(config))
    return module


def from_weights(config: Any, state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """A module of a configuration and a state dict, each in any format.

    Raises:
        CheckpointError: as `from_scratch` and `check_names`, and if keys, shapes or the format of the state dict do
            not fit.
    """
    check_names(config)
    hf_config = convert_config(config, "huggingface", trained=True)
    architecture = BY_TYPE[hf_config.model_type]
    if architecture.hybrid:
        check_mapping(state_dict)
        check_state_dict(state_dict, hf_config)
        check_values(state_dict)
        values = {name: value.detach().clone() for name, value in state_dict.items()}
        return model_of(hf_config, values, next(iter(values.values())).dtype)
    format = detect_state_dict_format(state_dict)
    if format not in architecture.formats:
        raise CheckpointError(
            f"the configuration is that of a {architecture.name}, which has no {format} format, and this state dict "
            "has it. Give the configuration that belongs to the weights"
        )
    weights = convert_state_dict(state_dict, "huggingface")
    check_state_dict(weights, hf_config)
    check_values(weights)
    module = _empty(hf_config, next(iter(weights.values())).dtype)
    module.load_state_dict(weights, strict=False)  # keys were checked above, but for a tied lm_head
    return module


def _hybrid_from_scratch(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """As `from_scratch`: drawn by transformers in float32, and cast but for what `from_pretrained` keeps in float32."""
    check_buildable("the configuration", config, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = BY_TYPE[config.model_type].model_class._from_config(config, dtype=torch.float32)
    return module if dtype == torch.float32 else model_of(config, module.state_dict(), dtype)


def _empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A module with uninitialised parameters. No random numbers are drawn."""
    check_buildable("the configuration", config, dtype)
    with torch.device("meta"):
        module: Any = BY_TYPE[config.model_type].model_class(config)
    module.to(dtype).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        for part in module.modules():
            # Such buffers are in no state dict. transformers makes them anew by this method when it loads.
            if part._non_persistent_buffers_set:
                module._init_weights(part)
    module.tie_weights()
    return module
