"""A checkpoint's files are in a folder or on the hub, in one file or in shards; any may be absent.

Contract: a `Location` finds and fetches files by their names, and `weight_files` finds the weights where
transformers looks for them and in its order; neither knows what is in a file, except for an index of shards.
Whatever goes wrong is a `CheckpointError` that says which file and why; if the hub is not reached it names
`MambaTrace.demo()`, which needs no network. Fetching and its cache are huggingface_hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ..modeling.architectures import BY_TYPE
from .checkpoint_index import inside, shards_of
from .weight_sizes import some

WEIGHT_FILES = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
BOTH_FORMATS = (
    f"A Hugging Face checkpoint has a config.json with model_type {', '.join(map(repr, BY_TYPE))}; an original "
    "state-spaces one has a "
    f"config.json with d_model, n_layer and vocab_size and no model_type. Weights are in "
    f"{SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}."
)
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")  # as several processes write them
OFFLINE = "MambaTrace.demo() needs no network: it loads a small trained model that ships, as demo('mamba2') does."

# What each failure of huggingface_hub means; subclasses come before their bases.
HUB_FAULTS: dict[type[Exception], str] = {
    HFValidationError: "{name!r} is neither a folder that exists nor a hub id: {error}",
    GatedRepoError: "{name} is gated: ask for access on its hub page, then log in or pass token=",
    RepositoryNotFoundError: (
        "{name!r} is neither a folder that exists nor a model on the hub (a private one needs token=)"
    ),
    RevisionNotFoundError: "{name} has no revision {revision!r} on the hub",
    LocalEntryNotFoundError: (
        "{name!r} is no local folder, its {file}{at} is not in the local cache, and the hub was not reached "
        "({why}). " + OFFLINE
    ),
    EntryNotFoundError: "{name} has no {file} on the hub{at}. " + BOTH_FORMATS,
    Exception: "{file} of {name}{at} could not be fetched from the hub: {error}. " + OFFLINE,
}


@dataclass(frozen=True)
class Location:
    """Where the files of a checkpoint are.

    Attributes:
        name: the folder, or the hub id.
        path: the folder; None for a checkpoint on the hub.
        hub: revision, cache_dir, token and local_files_only, as huggingface_hub and transformers take them.
    """

    name: str
    path: Path | None
    hub: dict[str, Any] = field(repr=False)

    def find(self, file: str, *, fetch: bool) -> Path | None:
        """A file of the checkpoint by its relative name, or None if there is no such file.

        With ``fetch`` the hub is asked for what its cache on this machine does not have.

        Raises:
            CheckpointError: if the file is not the checkpoint's own or is no file, or if it cannot be
                fetched.
        """
        if self.path is not None:
            path = inside(self.path, file)
            check_file(path)
            if path.is_symlink() and not path.exists():
                raise CheckpointError(f"{path} is a link to a file that is not there: {path.readlink()}")
            return path if path.is_file() else None
        where = {key: self.hub.get(key) for key in ("cache_dir", "revision")}
        cached = try_to_load_from_cache(self.name, file, **where)
        if isinstance(cached, str):
            return Path(cached)
        try:
            return self.download(file) if fetch else None
        except CheckpointError as error:
            absent = isinstance(error.__cause__, EntryNotFoundError)
            if absent and not isinstance(error.__cause__, LocalEntryNotFoundError):
                return None
            raise

    def download(self, file: str) -> Path:
        """Fetch a file from the hub.

        Raises:
            CheckpointError: for any failure; for a missing file its cause is an EntryNotFoundError.
        """
        try:
            return Path(hf_hub_download(self.name, file, **self.hub))
        except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
            words = next(words for kind, words in HUB_FAULTS.items() if isinstance(error, kind))
            revision = self.hub.get("revision")
            at = f" at revision {revision!r}" if revision else ""
            why = "local_files_only or HF_HUB_OFFLINE is set" if offline(self.hub) else "no connection"
            said = {"name": self.name, "file": file, "revision": revision, "at": at}
            message = words.format(**said, why=why, error=error)
            error.__cause__ = error.__context__ = None  # pages of frames that say no more than the message
            raise CheckpointError(message) from error.with_traceback(None)


def weight_names(kwargs: Mapping[str, Any], named: str | None = None) -> list[str]:
    """The names of the files that weights may be in, best first, as transformers looks for them.

    Of the arguments of from_pretrained, variant, subfolder and use_safetensors matter. ``named`` is the only
    file or index to look for, which a config names as transformers_weights.
    """
    safe, variant = kwargs.get("use_safetensors"), kwargs.get("variant")
    names = WEIGHT_FILES if safe is None else WEIGHT_FILES[:2] if safe else WEIGHT_FILES[2:]
    if variant is not None:  # as transformers does: pytorch_model.bin.fp16.index.json, pytorch_model.fp16.bin
        names = [f"{stem}.{variant}.{ending}" for stem, _, ending in (name.rpartition(".") for name in names)]
    below = PurePath(kwargs.get("subfolder") or "")
    return [(below / name).as_posix() for name in ([named] if named else names)]


def weight_files(place: Location, names: list[str], below: str = "", *, fetch: bool) -> list[Path] | None:
    """The files with the weights of a checkpoint: one file, or every shard of an index.

    Args:
        names: the files or indexes that the weights may be in, best first.
        below: the subfolder that the names in an index are relative to.
        fetch: whether to ask the hub for files that are not on this machine.

    Returns:
        None if there are no weights, or if some of them must be fetched first and ``fetch`` is False.

    Raises:
        CheckpointError: if a file is not the checkpoint's own, or if some shards of an index are missing.
    """
    if parts := _distributed(place, below):
        return parts
    file = first_file(place, names, fetch=fetch)
    if file is None or not file.name.endswith(".index.json"):
        return [file] if file else None
    shards = {name: place.find((PurePath(below) / name).as_posix(), fetch=fetch) for name in shards_of(file)}
    absent = [shard for shard, path in shards.items() if path is None]
    if absent and (fetch or place.path is not None):
        raise CheckpointError(
            f"{file} names {len(shards)} files, of which {some(absent, 4, ', ')} is not there. Download the "
            "checkpoint again"
        )
    return None if absent else [path for path in shards.values() if path is not None]


def first_file(place: Location, names: list[str], *, fetch: bool) -> Path | None:
    """The first of these files that is there: on this machine, else on the hub, whose timeouts are long."""
    for allowed in (False, True) if fetch else (False,):
        for name in names:
            if (file := place.find(name, fetch=allowed)) is not None:
                return file
    return None


def _distributed(place: Location, below: str) -> list[Path]:
    """The files of a checkpoint that several processes wrote, which transformers prefers to any other."""
    folder = place.path and place.path / below
    if folder is None or not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors")
    if not any(DISTRIBUTED.match(name) for name in names):
        return []
    return [inside(place.path, (PurePath(below) / name).as_posix()) for name in names]  # type: ignore[arg-type]


def check_file(path: Path) -> None:
    """Raise `CheckpointError` for a folder or a device in the place of a file; a file need not be there."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device; put the file of that name in its place")


def offline(hub: dict[str, Any]) -> bool:
    """Whether fetching from the hub is switched off."""
    return bool(hub.get("local_files_only")) or is_offline_mode()


def listing(folder: Path) -> str:
    """The names of the first files in a folder."""
    return some(sorted(entry.name for entry in folder.iterdir()), between=", ")
