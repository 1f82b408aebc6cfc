"""A checkpoint says itself which files its weights are in, and so may name files that do not belong to it.

An index of shards is a list of paths. This package and transformers would read `../secrets.safetensors`,
`/etc/passwd`, or a symbolic link that leads out of the folder, as if they belonged to the checkpoint.

Contract: `read_json` gives the object in a JSON file; `shards_of` gives the names in an index, checked to be
names of files below its folder; `inside` gives the path of such a name, checked to lead to a file in the
folder. The snapshots in the hub's cache consist of links to `blobs` beside them, and those links are
followed. Everything else is a `CheckpointError` that names the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import CheckpointError

BLOBS, SNAPSHOTS = "blobs", "snapshots"
FLOAT, ENDLESS = "__float__", ("Infinity", "-Infinity", "NaN")
SHARED_BLOBS = ".huggingface-shared-blobs"  # marks the blobs that all repositories of a cache share
REWRITE = "Download the checkpoint again, or write its index anew: save_pretrained does"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a `CheckpointError` if the file cannot be read or holds anything else."""
    again = "Download the file again, or write it anew"
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # ValueError also for UTF-8 and for endless whole numbers
        empty = not isinstance(error, UnicodeDecodeError) and not text.strip()
        raise CheckpointError(f"{file} is not JSON: {'it is empty' if empty else error}. {again}") from error
    content = decoded(content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(content).__name__}. {again}")
    return content


def decoded(content: Any) -> Any:
    """A copy of what a JSON file holds, with numbers where transformers 5 writes ``{"__float__": "Infinity"}``.

    >>> decoded({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    {'time_step_limit': [0.0, inf]}
    """
    if isinstance(content, Mapping):
        if content.keys() == {FLOAT} and content[FLOAT] in ENDLESS:
            return float(content[FLOAT])
        return {key: decoded(value) for key, value in content.items()}
    return list(map(decoded, content)) if isinstance(content, list) else content


def shards_of(index: Path) -> list[str]:
    """The files that a ``*.index.json`` names, each once, sorted.

    Raises:
        CheckpointError: if it is no index, or names a file that is not below its folder.

    >>> shards_of(Path("model.safetensors.index.json"))    # doctest: +SKIP
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        there = f"the keys {', '.join(content) or 'nothing'}" if names is None else f"{names!r:.60}"
        raise CheckpointError(
            f"{index} has no weight_map, an object that names the file of each weight; found {there}. {REWRITE}"
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
    if not isinstance(content.get("metadata"), dict):
        raise CheckpointError(
            f'{index} has no metadata, an object that transformers asks for. Add "metadata": {{}} to it'
        )
    return sorted(set(names.values()))


def _leaves(name: str) -> bool:
    """Whether a name, as a path of any system, is absolute or has a step upwards."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, if it still is in that folder once every link is followed.

    The folder may itself be a link, and a snapshot in the hub's cache. The file need not be there.

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
    if _leaves(name) or not any(leads_to.is_relative_to(place) for place in (root, *_blobs_of(root))):
        raise CheckpointError(
            f"{file} leads to {leads_to}, which is not in the folder of the checkpoint, and so is not read. "
            "If the file belongs to it, copy it there in place of the link"
        )
    return file


def _blobs_of(folder: Path) -> Iterator[Path]:
    """Where the links in a snapshot of the hub's cache lead, ``<repository>/snapshots/<revision>``."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == SNAPSHOTS and "--" in repository.name:
            yield repository / BLOBS
            if (repository.parent / BLOBS / SHARED_BLOBS).is_file():
                yield repository.parent / BLOBS
