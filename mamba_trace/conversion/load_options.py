"""What is asked for at loading is checked when it is asked, not where transformers stumbles over it later.

`MambaTrace(name, **kwargs)` builds a model without weights at once and loads it at the first run, so an
argument that nobody looks at fails far from where it was written.

Contract: `take_config` gives the configuration that a model is to have: the checkpoint's, or ``config=``,
either with fields replaced by keyword, as transformers and nnsight take them. `dtype_of` and `check_place`
refuse a dtype and a device that do not exist, or that this machine does not have.
`examine` compares the configuration with the files of weights, before either is built or read.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, is_peft_available

from ..errors import CheckpointError
from ..names import nearest
from .checkpoint_files import Wanted, weight_files, weight_files_here
from .checkpoint_json import read_json
from .checkpoints import Checkpoint, find_checkpoint
from .config_names import check_names
from .formats import convert_config, detect_config_format
from .tensor_files import Shapes, shapes_in
from .weight_formats import EMBEDDING, LM_HEAD, expected_shapes, first_layers
from .weight_sizes import check_buildable, check_weights

DTYPES = ("dtype", "torch_dtype")
PLACED_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")
#: Arguments of from_pretrained that its signature does not name, to suggest.
MORE = ("device", "device_map", "max_memory", "offload_folder", "quantization_config", "variant", "subfolder")
REASON = 300  # characters of it that are worth repeating
#: Fields of a configuration that are arguments of from_pretrained, and nothing to replace.
NOT_REPLACED = {*DTYPES, "architectures", "transformers_version", "output_loading_info"}
FIELDS = {field.name for field in fields(MambaConfig)} - NOT_REPLACED


def given_config(config: Any, **hub_options: Any) -> MambaConfig | None:
    """What is given as ``config=``, as Hugging Face's; ``None`` where nothing is.

    Args:
        config: a ``MambaConfig``, a configuration in any other format, or the name of a folder, a config.json
            or a hub id to take it from.
        hub_options: as for `find_checkpoint`.

    Raises:
        CheckpointError: if it is no configuration of a Mamba.
    """
    if config is None:
        return None
    if isinstance(config, str | Path):
        if Path(config).name == CONFIG_NAME and os.path.isfile(config):  # a Path may raise
            config = read_json(Path(config))
        else:
            return find_checkpoint(config, **hub_options).config
    check_names(config)
    return convert_config(config, "huggingface", trained=detect_config_format(config) != "huggingface")


def take_config(own: MambaConfig, kwargs: dict[str, Any]) -> MambaConfig:
    """A copy of a configuration, with the fields replaced that ``kwargs`` names; takes those out of it.

    Raises:
        CheckpointError: for a value that the field does not take.
    """
    config = copy.deepcopy(own)
    replaced = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
    try:
        for name, value in replaced.items():
            setattr(config, name, value)
        config.intermediate_size = int(config.expand * config.hidden_size)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}={value!r} cannot be set: {' '.join(str(error).split())}") from error
    return convert_config(config, "huggingface") if replaced else config


def dtype_of(kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that is asked for; ``None`` where it is the checkpoint's own.

    Raises:
        CheckpointError: for what is no floating dtype.
    """
    given = next((kwargs[name] for name in DTYPES if kwargs.get(name) is not None), None)
    if given is None or given == "auto" or isinstance(given, Mapping):
        return None
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    known = ["float32", "float64", "float16", "bfloat16", "auto"]
    raise CheckpointError(
        f"dtype={given!r} is no dtype of weights; it is one of "
        f"{', '.join(known)}{nearest(str(given), known)}. Fewer bits than these have are asked for with "
        "quantization_config="
    )


def check_place(kwargs: Mapping[str, Any], *, here: bool = False) -> None:
    """Refuse ``device=`` and ``device_map=`` where they name a device that there is none of.

    Args:
        kwargs: the arguments of from_pretrained.
        here: whether this machine must have it, or any may.

    Raises:
        CheckpointError: as `check_device`.
    """
    for argument in ("device", "device_map"):
        place = kwargs.get(argument)
        if place is not None and not isinstance(place, Mapping):
            spread = PLACED_BY_ACCELERATE if argument == "device_map" else ()
            check_device(f"{argument}=", "cpu" if place == -1 else place, spread, here=here)


def check_device(argument: str, device: Any, spread: tuple[str, ...] = (), *, here: bool = True) -> None:
    """Refuse a device that no machine has, or that this one has not.

    Args:
        argument: what gives the device, for messages.
        device: a ``torch.device``, the name of one, or the number of a GPU.
        spread: words that stand for several devices.
        here: whether this machine must have it.

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


def why_not(name: str, error: Exception) -> str:
    """What transformers says of a checkpoint that it does not load, in one sentence."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and isinstance(error, TypeError):
        known = [*DTYPES, *inspect.signature(MambaForCausalLM.from_pretrained).parameters, *MORE, *FIELDS]
        hint = nearest(unknown[1], sorted(known))
        return f"MambaTrace and from_pretrained take no argument {unknown[1]}{hint}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"cannot load the weights of {name}: {reason[:REASON]}"


def examine(checkpoint: Checkpoint, kwargs: Mapping[str, Any], *, fetch: bool = False) -> None:
    """Refuse a checkpoint whose files are broken, are not its own, or do not fit the configuration.

    Args:
        checkpoint: with the configuration that is to be built.
        kwargs: the arguments of from_pretrained.
        fetch: fetch what the cache of the hub does not have; otherwise only what is on this machine is read.

    Raises:
        CheckpointError: as `weight_files`, `shapes_in` and `check_weights`; for a folder or a hub id without
            weights here, as `check_buildable`.
    """
    _check_beside(checkpoint)
    config, name = checkpoint.config, checkpoint.name
    what = "config=" if checkpoint.given else "its config.json"
    quantised = getattr(config, "quantization_config", None) is not None
    if kwargs.get("gguf_file") is not None:
        return check_buildable(f"{name}: {what}", config)
    files = _files(checkpoint, kwargs, fetch)
    # Quantised weights have shapes of their own, and key_mapping gives other names: only their files are
    # checked.
    shapes = None if files is None or quantised else _shapes(files)
    if shapes is None or kwargs.get("key_mapping") is not None:
        there = "has no weights here" if files is None else "has weights that do not tell their sizes"
        return check_buildable(f"{name} {there}, and {what}", config)
    if kwargs.get("ignore_mismatched_sizes"):
        return check_buildable(f"{name} need not fit, and {what}", config)
    check_weights(name, config, shapes, what, fewer_layers=checkpoint.given)
    _check_keys(checkpoint, shapes)


def _check_keys(checkpoint: Checkpoint, shapes: Shapes) -> None:
    """Refuse files that do not hold each parameter of the model, once their sizes are known to fit."""
    if not any(name.startswith("backbone.") for name in shapes):
        return  # the weights of a model without its lm_head, whose names transformers completes
    expected = expected_shapes(checkpoint.config)
    if checkpoint.format == "original":
        ours, theirs = EMBEDDING["huggingface"], EMBEDDING["original"]
        expected = {theirs if name == ours else name: shape for name, shape in expected.items()}
    optional = {LM_HEAD} if checkpoint.config.tie_word_embeddings else set()
    found = {
        "missing_keys": expected.keys() - shapes.keys() - optional,
        "unexpected_keys": shapes.keys() - expected.keys(),
        "mismatched_keys": [
            (name, shapes[name], shape)
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    check_loaded(checkpoint, found)


def check_loaded(checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that transformers would fill up with random weights, or take only in part.

    Args:
        checkpoint: with the configuration that is built.
        found: the keys that are missing, not the model's, or of another shape, as from_pretrained reports
            them.

    Raises:
        CheckpointError: naming those keys.
    """
    extra = found.get("unexpected_keys") or ()
    if checkpoint.given:  # and so may leave out the last layers
        extra = first_layers(dict.fromkeys(extra), checkpoint.config.num_hidden_layers)
    keys = {
        "lack": found.get("missing_keys") or (),
        "have besides": extra,
        "have other shapes than it for": [
            f"{key} ({tuple(there)} and not {tuple(here)})"
            for key, there, here in found.get("mismatched_keys") or ()
        ],
    }
    problems = [
        f"{what} {', '.join(sorted(names)[:8])} ({len(names)} in all)"
        for what, names in keys.items()
        if names
    ]
    if problems:
        what = "config=" if checkpoint.given else "its config.json"
        raise CheckpointError(
            f"the weights of {checkpoint.name} do not fit {what}: they {' and '.join(problems)}"
        )


def _files(checkpoint: Checkpoint, kwargs: Mapping[str, Any], fetch: bool) -> list[Path] | None:
    """The files that the weights are loaded from; ``None`` where they must be fetched first."""
    transformers = checkpoint.format == "huggingface"
    named = getattr(checkpoint.config, "transformers_weights", None) if transformers else None
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"transformers_weights in the config of {checkpoint.name} must name a file, found {named!r}"
        )
    given = {key: kwargs[key] for key in ("variant", "subfolder", "use_safetensors") if key in kwargs}
    wanted = Wanted(named=named, transformers=transformers, **(given if transformers else {}))
    find = weight_files if fetch else weight_files_here
    return find(checkpoint.name, checkpoint.path, wanted, **checkpoint.hub_options)


def _shapes(files: list[Path]) -> Shapes | None:
    """The shape of every tensor in the files; ``None`` where one does not tell."""
    found: Shapes = {}
    for file in files:
        shapes = shapes_in(file)
        if shapes is None:
            return None
        found |= shapes
    return found


def _check_beside(checkpoint: Checkpoint) -> None:
    """Refuse broken files beside the weights, on which transformers stumbles after loading those."""
    if checkpoint.path is None:
        return
    if is_peft_available() and (checkpoint.path / ADAPTER_CONFIG_NAME).exists():
        read_json(checkpoint.path / ADAPTER_CONFIG_NAME)
    file = checkpoint.path / GENERATION_CONFIG_NAME
    if not file.exists():
        return
    content = read_json(file)
    try:
        GenerationConfig.from_dict(content).validate()
    except Exception as error:  # its values are used before they are checked
        raise CheckpointError(
            f"{file} holds no settings of generation: {' '.join(str(error).split())[:200]}. Correct it, or "
            "delete it"
        ) from error
