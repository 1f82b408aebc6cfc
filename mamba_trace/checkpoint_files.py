"""A checkpoint's files are in a folder or on the hub, in one file or in shards; any may be absent or broken.

Contract: these functions find, fetch and read files, and know nothing of what is in them. Whatever goes
wrong is a `CheckpointError` that says which file and why; where the hub is not reached it names
`MambaTrace.demo()`, which needs none. Fetching is huggingface_hub's, with its cache; pickles are loaded under
weights_only.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .errors import CheckpointError

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
BOTH_FORMATS = (
    "A Hugging Face checkpoint has a config.json with model_type 'mamba'; an original state-spaces one has a "
    f"config.json with d_model, n_layer and vocab_size and no model_type. Weights are in "
    f"{SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}."
)
OFFLINE = "MambaTrace.demo() needs no network: it loads the small trained model that ships with the package."


def weight_files(name: str, folder: Path | None, **options: Any) -> list[Path]:
    """The files with the weights of a folder, or else of a hub id: one, or every shard of its index."""
    file = _local_weights(folder) if folder else _hub_weights(name, **options)
    if file.name not in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        return [file]
    shards = sorted(set(read_json(file).get("weight_map", {}).values()))
    if folder is None:
        return [from_hub(name, shard, **options) for shard in shards]
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(f"{file} names {len(shards)} files, of which {', '.join(absent)} is not there")
    return [folder / shard for shard in shards]


def _local_weights(folder: Path) -> Path:
    """The file of weights, or the index of their shards, in a folder."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no weights; it has {listing(folder)}. {BOTH_FORMATS}")


def _hub_weights(name: str, **options: Any) -> Path:
    """The same for a hub id; what is cached already is taken without asking the hub."""
    where = {key: options.get(key) for key in ("cache_dir", "revision")}
    for file in WEIGHT_FILES:
        cached = try_to_load_from_cache(name, file, **where)
        if isinstance(cached, str):
            return Path(cached)
    for file in WEIGHT_FILES:
        try:
            return from_hub(name, file, **options)
        except CheckpointError as error:
            unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
            if unreachable or not isinstance(error.__cause__, EntryNotFoundError):
                raise
    raise CheckpointError(f"{name} has no weights on the hub. {BOTH_FORMATS}")


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in one file."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} is a pickle that holds more than tensors, and loading it could run code, so it is "
            f"refused. If you trust it, load it yourself and save its tensors alone. {reason}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read; it may be incomplete: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} must hold a dict of tensors, found a {type(loaded).__name__}")
    return loaded


def from_hub(name: str, file: str, **options: Any) -> Path:
    """Fetch a file of a hub id; the `CheckpointError` for a missing file has the cause EntryNotFoundError."""
    revision = options.get("revision")
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(hf_hub_download(name, file, **options))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder that exists nor a hub id: {error}") from error
    except GatedRepoError as error:
        message = f"{name} is gated: ask for access on its hub page, then log in or pass token="
        raise CheckpointError(message) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is neither a folder that exists nor a model on the hub (a private one needs token=)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        why = "local_files_only or HF_HUB_OFFLINE is set" if offline(options) else "no connection"
        raise CheckpointError(
            f"{name!r} is no local folder, its {file}{at} is not in the local cache, and the hub was not "
            f"reached ({why}). {OFFLINE}"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{name} has no {file} on the hub{at}. {BOTH_FORMATS}") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{file} of {name}{at} could not be fetched from the hub: {error}. {OFFLINE}"
        ) from error


def offline(options: dict[str, Any]) -> bool:
    """Whether fetching from the hub is switched off."""
    return bool(options.get("local_files_only")) or is_offline_mode()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(content).__name__}")
    return content


def listing(folder: Path) -> str:
    """The names of the first files in a folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "no files") + more
