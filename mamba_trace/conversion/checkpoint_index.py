"""A checkpoint says itself which files its weights are in, and so may name files that are none of its own.

An index of shards is a list of paths. `../secrets.safetensors`, `/etc/passwd` or a symbolic link that leads
out of the folder would all be read, by this package and by transformers, as if they belonged to the
checkpoint.

Contract: `shards_of` gives the names in an index, checked to be names of files below its folder; `inside`
gives the path of such a name, checked to lead to a file in the folder. The snapshots of the hub's cache
consist of links to `blobs` beside them, and those are followed. Everything else is a `CheckpointError` that
names the index or the link, what is wrong with it, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CheckpointError
from .checkpoint_json import read_json

BLOBS, SNAPSHOTS = "blobs", "snapshots"
SHARED_BLOBS = ".huggingface-shared-blobs"  # marks the blobs that all repositories of a cache share
REWRITE = "Download the checkpoint again, or write its index anew: save_pretrained does"


def shards_of(index: Path, *, metadata: bool = False) -> list[str]:
    """The files that an index names, each once, sorted.

    Args:
        index: a ``*.index.json``.
        metadata: whether it must have ``metadata``, which transformers asks for.

    Raises:
        CheckpointError: if it is no index, or names a file that is not below its folder.

    >>> shards_of(Path("model.safetensors.index.json"))    # doctest: +SKIP
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        found = f"the keys {', '.join(content) or 'nothing'}" if names is None else f"{names!r:.60}"
        raise CheckpointError(
            f"{index} has no weight_map, an object that names the file of each weight; found {found}. "
            f"{REWRITE}"
        )
    for weight, name in names.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{index} must name the file of {weight} with a string, found {name!r:.60}. {REWRITE}"
            )
        if _leaves(name):
            raise CheckpointError(
                f"{index} says that {weight} is in {name!r}, which is not in the folder of the checkpoint, "
                "and so is not read. If the file belongs to it, move it there and name it without a path"
            )
    if metadata and not isinstance(content.get("metadata"), dict):
        raise CheckpointError(
            f"{index} has no metadata, an object that transformers asks for. Add it, "
            f'"metadata": {{}} is enough'
        )
    return sorted(set(names.values()))


def _leaves(name: str) -> bool:
    """Whether a name, as a path of any system, is absolute or has a step upwards."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, if it is the folder's own once every link is followed.

    Args:
        folder: of the checkpoint; may itself be a link, and a snapshot in the hub's cache.
        name: relative to it; a file need not be there.

    Raises:
        CheckpointError: if the name or a link leads out of the folder, or links lead round in a circle.
    """
    file = folder / name
    try:
        leads_to, root = file.resolve(), folder.resolve()
        file.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError is how Python up to 3.12 reports a loop of links, ValueError a zero byte in a name.
        raise CheckpointError(f"{str(file)!r:.200} leads to no file: {error!s:.60}. {REWRITE}") from error
    own = [root, *_blobs_of(root)]
    if _leaves(name) or not any(leads_to.is_relative_to(place) for place in own):
        raise CheckpointError(
            f"{file} leads to {leads_to}, which is not in the folder of the checkpoint, and so is not read. "
            "If the file belongs to it, copy it there in place of the link"
        )
    return file


def _blobs_of(folder: Path) -> Iterator[Path]:
    """Where the files are of a snapshot in the hub's cache, ``<repository>/snapshots/<revision>``."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == SNAPSHOTS and "--" in repository.name:
            yield repository / BLOBS
            if (repository.parent / BLOBS / SHARED_BLOBS).is_file():
                yield repository.parent / BLOBS
