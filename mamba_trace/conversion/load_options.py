"""An argument for loading is checked when it is given, not when transformers stumbles over it later.

`MambaTrace(name, **kwargs)` builds a model without weights at once and loads them at the first run, so a
wrong argument would otherwise fail far from the line that gave it.

Contract: `given_config` and `take_config` give the configuration that a model is to have: the checkpoint's,
or ``config=``, either with fields replaced by keyword, as transformers and nnsight take them. `dtype_of` and
`check_place` refuse a dtype or a device that does not exist, or that this machine does not have.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import ArgumentError, CheckpointError
from ..modeling.architectures import ARCHITECTURES, BY_TYPE
from ..names import nearest
from .checkpoint_index import read_json
from .checkpoints import find_checkpoint
from .config_names import check_names
from .formats import convert_config, detect_config_format

DTYPES = ("dtype", "torch_dtype")
#: The fields in which a hybrid's configuration may list what stands in each layer.
LISTS_OF_LAYERS = ("layer_types", "layers_block_type")
PLACED_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")
#: Fields of a configuration that from_pretrained takes as arguments of its own, so that they replace nothing.
NOT_REPLACED = {*DTYPES, "architectures", "transformers_version", "output_loading_info"}


def replaceable(config: PreTrainedConfig | type[PreTrainedConfig]) -> set[str]:
    """The fields of a configuration, or of its class, that a keyword argument of their name replaces."""
    return ({field.name for field in fields(config)} | config.attribute_map.keys()) - NOT_REPLACED


def given_config(config: Any, **hub: Any) -> PreTrainedConfig | None:
    """The configuration given as ``config=``, in Hugging Face's format; None if none is given.

    It may be one of transformers' configurations, a configuration in any other format, or the name of a folder, of a
    config.json or of a hub id that has one; ``hub`` is as for `find_checkpoint`.

    Raises:
        CheckpointError: if it is not the configuration of a Mamba.
    """
    if config is None:
        return None
    if isinstance(config, str | Path):
        if Path(config).name == CONFIG_NAME and os.path.isfile(config):  # a Path may raise
            config = read_json(Path(config))
        else:
            return find_checkpoint(config, **hub).config
    check_names(config)
    return convert_config(config, "huggingface", trained=detect_config_format(config) != "huggingface")


def take_config(own: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a configuration, in which fields that ``kwargs`` names are replaced and taken from it.

    Raises:
        CheckpointError: for a value that the field does not take, and for a field of another architecture.
    """
    config = copy.deepcopy(own)
    if BY_TYPE[config.model_type].hybrid:
        take_layers(config, kwargs)
    known = replaceable(config)
    for other in ARCHITECTURES:
        for name in (replaceable(other.config_class) - known) & kwargs.keys():
            raise CheckpointError(
                f"{name}={kwargs[name]!r} cannot be set: {name} is a field of {other.config_class.__name__}, and this "
                f"checkpoint has a {type(config).__name__}, which has no such field"
            )
    replaced = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
    try:
        for name, value in replaced.items():
            setattr(config, name, value)
        if (
            not BY_TYPE[config.model_type].hybrid and "intermediate_size" in type(config)().to_dict()
        ):  # which transformers computes when one is made
            config.intermediate_size = int(config.expand * config.hidden_size)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}={value!r} cannot be set: {' '.join(str(error).split())}") from error
    return convert_config(config, "huggingface") if replaced else config


def take_layers(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Leave out the last layers of a hybrid, of which the configuration may list each, if ``kwargs`` say so.

    Raises:
        CheckpointError: if there are fewer layers than are asked for.
    """
    wanted, there = kwargs.get("num_hidden_layers"), config.num_hidden_layers
    lists = [name for name in LISTS_OF_LAYERS if name in {field.name for field in fields(config)}]
    if not lists or not isinstance(wanted, int) or isinstance(wanted, bool) or kwargs.keys() & LISTS_OF_LAYERS:
        return
    if not 1 <= wanted <= there:
        raise CheckpointError(
            f"num_hidden_layers={wanted} cannot be set: the configuration lists what stands in each of its {there} "
            f"layers, and only the last of them can be left out. Give {lists[0]}= for other layers"
        )
    for name in lists:
        setattr(config, name, list(getattr(config, name))[:wanted])
    if "num_hidden_layers" not in {field.name for field in fields(config)}:
        del kwargs["num_hidden_layers"]


def dtype_of(kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that is asked for; None to keep the checkpoint's own.

    Raises:
        CheckpointError: for anything but a floating dtype.
    """
    given = next((kwargs[name] for name in DTYPES if kwargs.get(name) is not None), None)
    if given is None or given == "auto" or isinstance(given, Mapping):
        return None
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    known = ["float32", "float64", "float16", "bfloat16", "auto"]
    raise CheckpointError(
        f"dtype={given!r} is no dtype of weights; it is one of {', '.join(known)}"
        f"{nearest(str(given), known)}. To load weights with fewer bits than these, give quantization_config="
    )


def check_place(kwargs: Mapping[str, Any], *, here: bool = False) -> None:
    """Refuse a device in from_pretrained's arguments ``device=`` and ``device_map=``, as `check_device`."""
    for argument in ("device", "device_map"):
        place = kwargs.get(argument)
        if place is not None and not isinstance(place, Mapping):
            spread = PLACED_BY_ACCELERATE if argument == "device_map" else ()
            check_device(f"{argument}=", "cpu" if place == -1 else place, spread, here=here)


def check_device(argument: str, device: Any, spread: tuple[str, ...] = (), *, here: bool = True) -> None:
    """Refuse a device that no machine has or, with ``here``, that this machine does not have.

    Args:
        argument: what gives the device, for messages.
        device: a ``torch.device``, its name, or the number of a GPU.
        spread: words that stand for several devices.

    Raises:
        CheckpointError: naming the argument and the devices of this machine.

    >>> check_device("device=", "cpu")
    """
    if device in spread:
        return
    problem = "is no device"
    try:
        torch.device(device)
        problem = "cannot be used on this machine"
        if here:
            torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # the last: PyTorch without CUDA
        there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        either = f", or it is {', '.join(spread)}" if spread else ""
        raise CheckpointError(
            f"{argument}{device!r} {problem}. There are {', '.join([*there, 'cpu'])}{either}"
        ) from error


#: Arguments that decide how weights are loaded, and change nothing about a module that has its weights.
OF_LOADING = (*DTYPES, "quantization_config", "config")


def check_module_arguments(kwargs: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an argument for a loaded module that nothing would read.

    Args:
        kwargs: the arguments.
        known: the names of the arguments that the model's class has.

    Raises:
        CheckpointError: naming the argument.
    """
    known = known | set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    for name, value in kwargs.items():
        if name in OF_LOADING and value is not None:
            raise CheckpointError(
                f"{name}= decides how weights are loaded, and this module has its weights: leave it out, and change "
                f"the module itself, as module.to(torch.float16) does"
            )
        if name not in known | {*OF_LOADING, "device", "device_map"}:
            raise CheckpointError(
                f"MambaTrace takes no argument {name} for a loaded module{nearest(name, sorted(known))}"
            )


def parameters_of(function: Any) -> Iterable[str]:
    """The names of a function's parameters; none where its signature cannot be read."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


def check_tokenizer(tokenizer: Any, settings: Any) -> None:
    """Refuse what is no tokenizer, or no attributes by name. Raises `ArgumentError`."""
    if tokenizer is not None and not hasattr(tokenizer, "pad_token_id"):
        name = f"{tokenizer!r} (a {type(tokenizer).__name__})"
        raise ArgumentError(
            f"tokenizer= takes a tokenizer of transformers, not {name}: AutoTokenizer.from_pretrained(...) loads one"
        )
    if settings is not None and not isinstance(settings, Mapping):
        raise ArgumentError(f"tokenizer_kwargs= takes a dict of the tokenizer's attributes, not {settings!r}")


def check_seed(seed: Any) -> int:
    """``seed`` if a generator takes it. Raises `ArgumentError`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed={seed!r}: the seed of a generator is an integer of 64 bits")
    return seed
