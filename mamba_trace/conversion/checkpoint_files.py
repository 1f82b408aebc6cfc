"""A checkpoint's files are in a folder or on the hub, in one file or in shards; any may be absent.

Contract: these functions find and fetch files, and know nothing of what is in them. They look for weights
where transformers looks, and in its order. Whatever goes wrong is a `CheckpointError` that says which file
and why; where the hub is not reached it names `MambaTrace.demo()`, which needs none. Fetching is
huggingface_hub's, with its cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import CheckpointError
from .checkpoint_index import inside, shards_of

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
BOTH_FORMATS = (
    "A Hugging Face checkpoint has a config.json with model_type 'mamba'; an original state-spaces one has a "
    f"config.json with d_model, n_layer and vocab_size and no model_type. Weights are in "
    f"{SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}."
)
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
OFFLINE = "MambaTrace.demo() needs no network: it loads the small trained model that ships with the package."


@dataclass(frozen=True)
class Wanted:
    """Which of a checkpoint's files of weights are asked for.

    Attributes:
        variant: ``"fp16"`` for ``model.fp16.safetensors``.
        subfolder: where in the checkpoint they are.
        use_safetensors: ``True`` for safetensors alone, ``False`` for pickles alone, ``None`` for either.
        named: the file or the index that the config names as transformers_weights, alone.
        transformers: whether transformers reads them, which asks for more.
    """

    variant: str | None = None
    subfolder: str = ""
    use_safetensors: bool | None = None
    named: str | None = None
    transformers: bool = False

    @property
    def names(self) -> list[str]:
        """The files to look for, best first."""
        if self.named is not None:
            return [self._below(self.named)]
        safe, pickled = WEIGHT_FILES[:2], WEIGHT_FILES[2:]
        names = [] if self.use_safetensors is False else [*safe]
        names += [] if self.use_safetensors else pickled
        return [self._below(self._of_variant(name)) for name in names]

    def _of_variant(self, name: str) -> str:
        # As transformers does it: pytorch_model.bin.fp16.index.json is the index of pytorch_model.fp16.bin.
        if self.variant is None:
            return name
        stem, _, ending = name.rpartition(".")
        return f"{stem}.{self.variant}.{ending}"

    def _below(self, name: str) -> str:
        return (PurePath(self.subfolder) / name).as_posix()


ANY = Wanted()


def weight_files(name: str, folder: Path | None, wanted: Wanted = ANY, **options: Any) -> list[Path]:
    """The files with the weights of a folder, or else of a hub id, which fetches them.

    Returns:
        One file, or every shard of an index.

    Raises:
        CheckpointError: where there are none, or they are not the checkpoint's own.
    """
    if folder is not None:
        return _local_files(folder, wanted)
    index = _hub_weights(name, wanted.names, **options)
    if not _is_index(index):
        return [index]
    below = PurePath(wanted.subfolder)
    shards = [(below / shard).as_posix() for shard in shards_of(index, metadata=wanted.transformers)]
    return [from_hub(name, shard, **options) for shard in shards]


def weight_files_here(name: str, folder: Path | None, wanted: Wanted, **options: Any) -> list[Path] | None:
    """`weight_files` as far as they are on this machine; ``None`` where none are or some must be fetched.

    Raises:
        CheckpointError: where files are there, and are not the checkpoint's own.
    """
    if folder is not None:
        there = wanted.named is not None or any(
            (folder / file).exists() or (folder / file).is_symlink() for file in wanted.names
        )
        return _local_files(folder, wanted) if there or _distributed(folder, wanted) else None
    index = _cached(name, wanted.names, **options)
    if index is None or not _is_index(index):
        return None if index is None else [index]
    found = []
    for shard in shards_of(index, metadata=wanted.transformers):
        file = _cached(name, [(PurePath(wanted.subfolder) / shard).as_posix()], **options)
        if file is None:
            return None
        found.append(file)
    return found


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def _local_files(folder: Path, wanted: Wanted) -> list[Path]:
    """The files with the weights of a folder."""
    if parts := _distributed(folder, wanted):
        return parts
    for name in wanted.names:
        file = inside(folder, name)
        if file.is_file():
            break
        if file.exists():
            raise CheckpointError(
                f"{file} is no file; it is a folder or a device. Put the weights in its place"
            )
        if file.is_symlink():
            raise CheckpointError(f"{file} is a link to a file that is not there: {file.readlink()}")
    else:
        if wanted.named is not None:
            raise CheckpointError(
                f"{folder} has no {wanted.names[0]}, which its config names as transformers_weights; it has "
                f"{listing(folder)}"
            )
        raise CheckpointError(f"{folder} has no weights; it has {listing(folder)}. {BOTH_FORMATS}")
    if not _is_index(file):
        return [file]
    shards = shards_of(file, metadata=wanted.transformers)
    files = [inside(folder, (PurePath(wanted.subfolder) / shard).as_posix()) for shard in shards]
    absent = [shard for shard, path in zip(shards, files, strict=True) if not path.is_file()]
    if absent:
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise CheckpointError(
            f"{file} names {len(shards)} files, of which {', '.join(absent[:4])}{more} is not there. "
            f"Download the checkpoint again"
        )
    return files


def _distributed(folder: Path, wanted: Wanted) -> list[Path]:
    """The files of a checkpoint that several processes wrote, which transformers alone reads, and first."""
    below = folder / wanted.subfolder
    if not wanted.transformers or not below.is_dir():
        return []
    names = sorted(entry.name for entry in below.iterdir() if entry.suffix == ".safetensors")
    if not any(DISTRIBUTED.match(name) for name in names):
        return []
    return [inside(folder, (PurePath(wanted.subfolder) / name).as_posix()) for name in names]


def _hub_weights(name: str, files: list[str], **options: Any) -> Path:
    """The file of weights, or the index of their shards, of a hub id; the cache first, then the hub."""
    cached = _cached(name, files, **options)
    if cached is not None:
        return cached
    for file in files:
        try:
            return from_hub(name, file, **options)
        except CheckpointError as error:
            unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
            if unreachable or not isinstance(error.__cause__, EntryNotFoundError):
                raise
    raise CheckpointError(f"{name} has no weights on the hub. {BOTH_FORMATS}")


def _cached(name: str, files: list[str], **options: Any) -> Path | None:
    """The first of a hub id's files that the cache has; the hub is not asked."""
    where = {key: options.get(key) for key in ("cache_dir", "revision")}
    for file in files:
        cached = try_to_load_from_cache(name, file, **where)
        if isinstance(cached, str):
            return Path(cached)
    return None


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


def listing(folder: Path) -> str:
    """The names of the first files in a folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "no files") + more
