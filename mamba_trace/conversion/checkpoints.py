"""A checkpoint's name does not say where it is or what wrote it, and the wrong loader fails in riddles.

The name is a local folder or a hub id. Either holds Hugging Face's format, in which a Falcon-Mamba looks like a
Mamba-1 but for its config.json, or the original format of state-spaces/mamba, on which transformers alone fails
with a size mismatch.

Contract: `find_checkpoint` says which it is, from config.json alone; `save_original` writes a model in the
original format. Whatever does not fit is a `CheckpointError` that says what was found, what was expected and
what to do.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..errors import CheckpointError
from ..modeling.architectures import BY_TYPE
from .checkpoint_files import BOTH_FORMATS, Location, check_file, listing, weight_files, weight_names
from .checkpoint_index import read_json
from .config_fields import MOST_LAYERS
from .config_formats import declared_layers, detect
from .formats import convert_config
from .tensor_files import shapes_of
from .weight_formats import check_state_dict, convert_state_dict
from .weight_sizes import EMBEDDING, Shapes, layers_in

NO_HUB_ID = re.compile(r"^[./~]|[\\\s]")  # names that can only be a folder's


@dataclass(frozen=True)
class Checkpoint(Location):
    """A checkpoint that was found, on disk or on the hub.

    Attributes:
        format: "huggingface" or "original".
        config: Hugging Face's configuration, for either format.
        given: whether the config is the caller's instead of the checkpoint's own.
    """

    format: str
    config: Any
    given: bool


def find_checkpoint(name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **hub: Any) -> Checkpoint:
    """Find a checkpoint and recognise its format by its config.json; nothing else is read or fetched.

    Args:
        name_or_path: a local folder, or else a hub id.
        config: takes the place of the checkpoint's own, which then may be missing or broken: the format is
            recognised by the names of the weights too, if these are on this machine.
        hub: revision, cache_dir, token and local_files_only, as for
            `transformers.AutoConfig.from_pretrained`.

    Raises:
        CheckpointError: if the name is no name, there is no such folder or hub id, the hub is not reached, or
            the checkpoint has neither format or is not a Mamba, or the config is one of another architecture.

    >>> find_checkpoint("state-spaces/mamba-130m").format    # doctest: +SKIP
    'original'
    """
    if not isinstance(name_or_path, (str, Path)):
        raise CheckpointError(
            f"MambaTrace takes a hub id, a folder or a loaded model such as a MambaForCausalLM; for a configuration "
            f"use MambaTrace.from_config. This is a {type(name_or_path).__name__}"
        )
    name = str(name_or_path)
    if not name.strip():
        raise CheckpointError("the name of the checkpoint is empty; give a hub id or a folder")
    place = Location(name, _local_folder(name), hub)
    try:
        format, own = _recognised(place)
    except CheckpointError:
        shapes = None if config is None else _shapes_here(place)
        if config is None or shapes is None:
            raise
        format, own = ("original" if EMBEDDING["original"] in shapes else "huggingface"), config
        if format not in BY_TYPE[config.model_type].formats:
            raise CheckpointError(
                f"the weights of {name} are in state-spaces' original format, in which there is no "
                f"{BY_TYPE[config.model_type].name}, and config= has model_type {config.model_type!r}"
            ) from None
    if config is not None:
        _check_types(
            place, declared=own.model_type if own is not config else _declared_type(place), given=config.model_type
        )
    return Checkpoint(name, place.path, hub, format, config or own, given=config is not None)


def _local_folder(name: str) -> Path | None:
    """The folder of that name; None if the name may be a hub id."""
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError):  # a name too long for a file, or ~ of an unknown user
        folder, is_folder, exists = Path(name), False, False
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(f"{name} is a file; give the folder that it is in")
    if NO_HUB_ID.search(name):
        raise CheckpointError(f"no such folder: {name}. It is looked for at {folder.absolute()}")
    return None


def _recognised(place: Location) -> tuple[str, Any]:
    """The format of a config.json, "huggingface" or "original", and Hugging Face's form of it."""
    name, folder = place.name, place.path
    file = place.download(CONFIG_NAME) if folder is None else folder / CONFIG_NAME
    check_file(file)
    if folder is not None and not file.exists():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; it has {listing(folder)}. {BOTH_FORMATS}")
    raw = read_json(file)
    try:
        format = detect(raw)
    except CheckpointError as error:
        files = f" The folder has {listing(folder)}." if folder else ""
        raise CheckpointError(f"cannot load {name}: {str(error).rstrip('.')}.{files} {BOTH_FORMATS}") from error
    if format == "mamba_lens":
        raise CheckpointError(
            f"{name} has the config of a MambaLens model; convert it with convert_config and its weights "
            f"with convert_state_dict of mamba_trace.conversion. {BOTH_FORMATS}"
        )
    if declared_layers(raw) > MOST_LAYERS:
        shapes = _shapes_here(place)
        there = "no weights here" if shapes is None else f"{layers_in(shapes)} layers in its weights"
        raise CheckpointError(
            f"the {CONFIG_NAME} of {name} declares {declared_layers(raw)} layers, and it has {there}. "
            f"At most {MOST_LAYERS} layers are built"
        )
    try:
        return format, convert_config(raw, "huggingface", trained=format != "huggingface")
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {name}: in its {CONFIG_NAME}, {error}") from error


def _declared_type(place: Location) -> Any:
    """The model_type in a config.json whose other values may be broken; None if nothing tells it."""
    with contextlib.suppress(CheckpointError):
        file = place.find(CONFIG_NAME, fetch=False)
        return None if file is None else read_json(file).get("model_type")
    return None


def _check_types(place: Location, declared: Any, given: str) -> None:
    """Refuse the configuration of one architecture for a checkpoint of another."""
    if declared in BY_TYPE and declared != given:
        raise CheckpointError(
            f"the {CONFIG_NAME} of {place.name} is that of a {BY_TYPE[declared].name}, and config= that of a "
            f"{BY_TYPE[given].name} (model_type {given!r}). The weights of one, loaded as the other, compute "
            f"something else: give a config of model_type {declared!r}"
        )


def _shapes_here(place: Location) -> Shapes | None:
    """The shapes of the weights that are on this machine; None if there are none."""
    files = weight_files(place, weight_names({}), fetch=False)
    return None if files is None else shapes_of(files) or {}


def save_original(
    model: PreTrainedModel, folder: str | Path, *, safe_serialization: bool = False, lm_head: bool = True
) -> None:
    """Write a Mamba-1 or Mamba-2 of Hugging Face's as a checkpoint in the original format, for state-spaces' mamba_ssm.

    Args:
        model: any MambaForCausalLM or Mamba2ForCausalLM; the dtypes of its parameters are kept.
        folder: made if it is not there; gets config.json and the weights.
        safe_serialization: model.safetensors; mamba_ssm itself reads pytorch_model.bin only.
        lm_head: write a tied lm_head too, which mamba_ssm's from_pretrained requires.

    Raises:
        CheckpointError: a model that the format cannot express, or whose parameters are on the meta device.

    >>> save_original(model, "mamba-original")    # doctest: +SKIP
    """
    config = convert_config(model.config, "original", keep_source=False)
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_state_dict(state_dict, model.config)
    absent = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{len(absent)} parameters are on the meta device, {absent[0]} first, which holds no numbers. A MambaTrace "
            f"loads its weights at the first run: load them before, with model.dispatch() or MambaTrace(..., "
            f"dispatch=True), and give model._module then"
        )
    if model.config.tie_word_embeddings and not lm_head:
        del state_dict["lm_head.weight"]
    weights = convert_state_dict(state_dict, "original", source="huggingface")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    if safe_serialization:  # a safetensors file cannot have two names share memory
        separate = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(separate, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        torch.save(weights, folder / WEIGHTS_NAME)
