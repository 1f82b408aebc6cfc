"""A checkpoint's name does not say where it is or what wrote it, and the wrong loader fails in riddles.

A name is a local folder or a hub id, and either holds Hugging Face's format, which transformers loads, or the
original format of state-spaces/mamba, which transformers fails on with a size mismatch and which is read
here.

Contract: `find_checkpoint` says which it is, from config.json alone; `read_state_dict` reads the weights of
an original one (safetensors or bin, in shards or not; pickles under weights_only, so that no code is run) as
Hugging Face's, bit for bit, checked against the config; `load_tokenizer` gives the tokenizer that belongs to
it; `save_original` writes a model in the original format. Whatever does not fit is a `CheckpointError` that
says what was found, what was expected and what to do. Files are fetched by huggingface_hub.
"""

import contextlib
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..errors import CheckpointError
from .checkpoint_files import (
    BOTH_FORMATS,
    Wanted,
    from_hub,
    listing,
    offline,
    weight_files,
    weight_files_here,
)
from .checkpoint_json import read_json
from .config_fields import MOST_LAYERS
from .config_formats import declared_layers, detect
from .formats import check_state_dict, convert_config, convert_state_dict
from .tensor_files import Shapes, load_tensors, shapes_in
from .weight_formats import EMBEDDING, first_layers
from .weight_sizes import layers_in

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # what the state-spaces checkpoints were trained with
DEFAULT_TOKENIZER_SIZE = 50277
NO_HUB_ID = re.compile(r"^[./~]|[\\\s]")  # names that can be a folder's alone
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, on disk or on the hub.

    `name` is the folder or hub id; `path` the folder, None on the hub; `format` "huggingface" or "original";
    `config` Hugging Face's in either case, and `given` whether it is the caller's instead of the
    checkpoint's. The rest is how to fetch further files from the hub.
    """

    name: str
    path: Path | None
    format: str
    config: MambaConfig
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    given: bool = False

    @property
    def hub_options(self) -> dict[str, Any]:
        """The arguments that huggingface_hub and transformers fetch this checkpoint's files with."""
        names = ("revision", "cache_dir", "token", "local_files_only")
        return {name: getattr(self, name) for name in names}


def find_checkpoint(
    name_or_path: str | Path,
    *,
    config: MambaConfig | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Find a checkpoint and recognise its format by its config.json; nothing else is read or fetched.

    Args:
        name_or_path: a local folder, or else a hub id.
        config: in place of its own, which then may be missing or broken: the names of the weights, where they
            are on this machine, tell the format too.
        revision, cache_dir, token, local_files_only: as for `transformers.AutoConfig.from_pretrained`.

    Raises:
        CheckpointError: no name at all, no such folder or hub id, hub not reachable, neither format, not
            a Mamba-1.

    >>> find_checkpoint("state-spaces/mamba-130m").format    # doctest: +SKIP
    'original'
    """
    if not isinstance(name_or_path, (str, Path)):
        raise CheckpointError(
            f"MambaTrace takes a hub id, a folder or a loaded MambaForCausalLM; for a configuration use "
            f"MambaTrace.from_config. This is a {type(name_or_path).__name__}"
        )
    name = str(name_or_path)
    if not name.strip():
        raise CheckpointError("the name of the checkpoint is empty; give a hub id or a folder")
    path = _local_folder(name)
    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    try:
        config_file = _config_of(path) if path is not None else from_hub(name, CONFIG_NAME, **options)
        format, own = _recognised(name, path, config_file, **options)
    except CheckpointError:
        named = None if config is None else _format_of_weights(name, path, **options)
        if config is None or named is None:
            raise
        format, own = named, config
    return Checkpoint(name, path, format, config or own, **options, given=config is not None)


def _local_folder(name: str) -> Path | None:
    """The folder of that name; None where the name may be a hub id."""
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError):  # a name too long for a file; ~ of nobody
        folder, is_folder, exists = Path(name), False, False
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(f"{name} is a file; give the folder that it is in")
    if NO_HUB_ID.search(name):
        raise CheckpointError(f"no such folder: {name}. It is looked for at {folder.absolute()}")
    return None


def _config_of(folder: Path) -> Path:
    """The config.json of a folder."""
    file = folder / CONFIG_NAME
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; put the file of that name in its place. {BOTH_FORMATS}")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; it has {listing(folder)}. {BOTH_FORMATS}")
    return file


def _recognised(name: str, path: Path | None, config_file: Path, **options: Any) -> tuple[str, MambaConfig]:
    """The format of a config.json, "huggingface" or "original", and Hugging Face's configuration of it."""
    raw = read_json(config_file)
    try:
        format = detect(raw)
    except CheckpointError as error:
        files = f" The folder has {listing(path)}." if path else ""
        raise CheckpointError(
            f"cannot load {name}: {str(error).rstrip('.')}.{files} {BOTH_FORMATS}"
        ) from error
    if format == "mamba_lens":
        raise CheckpointError(
            f"{name} has the config of a MambaLens model; convert it with convert_config and its weights "
            f"with convert_state_dict of mamba_trace.conversion. {BOTH_FORMATS}"
        )
    if declared_layers(raw) > MOST_LAYERS:
        shapes = _shapes_here(name, path, **options)
        there = "no weights here" if shapes is None else f"{layers_in(shapes)} layers in its weights"
        raise CheckpointError(
            f"the {CONFIG_NAME} of {name} declares {declared_layers(raw)} layers, and it has {there}. "
            f"At most {MOST_LAYERS} layers are built"
        )
    try:
        return format, convert_config(raw, "huggingface", trained=format != "huggingface")
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {name}: in its {CONFIG_NAME}, {error}") from error


def _format_of_weights(name: str, path: Path | None, **options: Any) -> str | None:
    """The format that the names in the files of weights are of; None where no files are on this machine."""
    shapes = _shapes_here(name, path, **options)
    if shapes is None:
        return None
    return "original" if EMBEDDING["original"] in shapes else "huggingface"


def _shapes_here(name: str, path: Path | None, **options: Any) -> Shapes | None:
    """What is told by the files of weights that are on this machine; None where there are none."""
    files = weight_files_here(name, path, Wanted(), **options)
    if files is None:
        return None
    return {key: shape for file in files for key, shape in (shapes_in(file) or {}).items()}


def read_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint in the original format, as a Hugging Face state dict.

    Returns:
        Parameters on the CPU in the dtype of the file, with exactly the file's values, memory-mapped where
        the file allows it. A tied lm_head is there if the file has it.

    Raises:
        CheckpointError: no weights, a pickle that needs more than weights_only, keys or shapes that the
            config does not call for.

    >>> state_dict = read_state_dict(find_checkpoint("state-spaces/mamba-130m"))    # doctest: +SKIP
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(checkpoint.name, checkpoint.path, **checkpoint.hub_options):
        weights |= load_tensors(file)
    try:
        converted = convert_state_dict(weights, "huggingface")
        if checkpoint.given:  # and so may leave out the last layers
            converted = first_layers(converted, checkpoint.config.num_hidden_layers)
        check_state_dict(converted, checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load the weights of {checkpoint.name}: {error}") from error
    return converted


def load_tokenizer(checkpoint: Checkpoint, **options: Any) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own tokenizer, else gpt-neox-20b's, which the state-spaces models were trained with.

    A missing padding token becomes the end-of-sequence token. Where neither tokenizer can be had, or the
    default one has more tokens than the model, the result is None, with a warning that says what to do.

    Args:
        options: for `AutoTokenizer.from_pretrained`.

    >>> load_tokenizer(find_checkpoint("state-spaces/mamba-130m")).decode([510])    # doctest: +SKIP
    'The'
    """
    options = checkpoint.hub_options | options
    tokenizer, problem = _own_tokenizer(checkpoint, options), ""
    if tokenizer is None:
        tokenizer, problem = _default_tokenizer(checkpoint.config.vocab_size, options)
    if tokenizer is None:
        warnings.warn(
            f"no tokenizer: {checkpoint.name} has none, and {problem}. Strings cannot be used until "
            f"tokenizer= is given; token tensors work.",
            stacklevel=2,
        )
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_original(
    model: MambaForCausalLM, folder: str | Path, *, safe_serialization: bool = False, lm_head: bool = True
) -> None:
    """Write a Hugging Face Mamba as a checkpoint in the original format, for state-spaces' mamba_ssm.

    Args:
        model: any MambaForCausalLM; the dtypes of its parameters are kept.
        folder: made if it is not there; gets config.json and the weights.
        safe_serialization: model.safetensors; mamba_ssm itself reads pytorch_model.bin only.
        lm_head: write a tied lm_head too, which mamba_ssm's from_pretrained requires.

    Raises:
        CheckpointError: a model that the format cannot express, or whose parameters are on the meta device.

    >>> save_original(model, "mamba-original")    # doctest: +SKIP
    """
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_state_dict(state_dict, model.config)
    absent = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{len(absent)} parameters are on the meta device, {absent[0]} first: load them first"
        )
    if model.config.tie_word_embeddings and not lm_head:
        del state_dict["lm_head.weight"]
    config = convert_config(model.config, "original", keep_source=False)
    weights = convert_state_dict(state_dict, "original", source="huggingface")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    if safe_serialization:  # where two names may not share memory
        separate = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(separate, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        torch.save(weights, folder / WEIGHTS_NAME)


def _own_tokenizer(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own tokenizer; None where it has none."""
    folder = checkpoint.path
    if folder is not None and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    if folder is not None and (no_file := [n for n in TOKENIZER_FILES if (folder / n).is_dir()]):
        raise CheckpointError(f"{folder / no_file[0]} is a folder; put the tokenizer's file in its place")
    try:
        # Without trust_remote_code, a tokenizer of code asks at the terminal whether it may be run.
        return AutoTokenizer.from_pretrained(
            str(folder or checkpoint.name), **{"trust_remote_code": False, **options}
        )
    except (
        Exception
    ) as error:  # broken files break tokenizers in any way: KeyError, AttributeError, Exception
        if folder is not None:
            raise CheckpointError(_no_tokenizer(folder, error)) from error
        if checkpoint.format == "huggingface":
            reason = str(error).partition("\n")[0]
            message = (
                f"the tokenizer of {checkpoint.name} cannot be loaded ({reason}); trying {DEFAULT_TOKENIZER}"
            )
            warnings.warn(message, stacklevel=3)
    return None


def _no_tokenizer(folder: Path, error: Exception) -> str:
    """What is wrong with the tokenizer in a folder: the file that is no JSON, or what transformers says."""
    for name in (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json"):
        if name.endswith(".json") and (folder / name).exists():
            try:
                read_json(folder / name)
            except CheckpointError as broken:
                return f"the tokenizer in {folder} cannot be loaded: {broken}, or give tokenizer="
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"the tokenizer in {folder} cannot be loaded: {reason}. Mend its files, or give tokenizer="


def _default_tokenizer(
    vocab_size: int, options: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """DEFAULT_TOKENIZER, or None and why not; cache first, as an unreachable hub takes a minute."""
    if vocab_size < DEFAULT_TOKENIZER_SIZE:
        return None, f"{DEFAULT_TOKENIZER} has {DEFAULT_TOKENIZER_SIZE} tokens, the model {vocab_size}"
    options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    tokenizer = None
    for local_only in (True, False):
        if tokenizer is None and (local_only or not offline(options)):
            with contextlib.suppress(OSError, ValueError):
                tokenizer = AutoTokenizer.from_pretrained(
                    DEFAULT_TOKENIZER, **options | {"local_files_only": local_only}
                )
    if tokenizer is None:
        return None, f"{DEFAULT_TOKENIZER} is neither cached nor within reach"
    return tokenizer, ""
