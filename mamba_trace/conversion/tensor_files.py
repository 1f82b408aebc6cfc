"""A file of weights tells the names and shapes of its tensors without being loaded whole.

Contract: `shapes_of` gives them for a list of files. Reading is transformers' own, pickles under
weights_only, so no code is run. A file that is not what its name says, holds more than tensors, or ends too
early is a `CheckpointError` that names the file, the fault and what to do.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.modeling_utils import load_state_dict

from ..errors import CheckpointError
from .weight_sizes import Shapes

SAFETENSORS = ".safetensors"
LARGE = 2**28  # bytes; the shapes in a pickle of torch before 1.6 stand between its numbers, so it is read whole
POINTER = b"version https://git-lfs"
PICKLE = b"\x80"  # the first byte of a pickle since protocol 2, which torch.save has always written


def shapes_of(files: Iterable[Path]) -> Shapes | None:
    """The shape of every tensor in the files, by its name.

    The result is None if a file is a large pickle of a torch before 1.6: only reading it whole would tell.

    Raises:
        CheckpointError: if a file cannot be read, is no file of weights, or holds more than tensors.
    """
    shapes: Shapes = {}
    for file in files:
        start = _start(file)
        pickled = file.suffix != SAFETENSORS
        if pickled and not zipfile.is_zipfile(file) and file.stat().st_size > LARGE:
            return None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                tensors = load_state_dict(file, map_location="meta")
        except Exception as error:  # broken bytes break the unpickler in any way: KeyError, IndexError, EOFError
            raise _refusal(file, start, error) from error
        _check_state_dict(file, tensors)
        shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes


def _start(file: Path) -> bytes:
    """The first bytes of a file, which must not be those of a pointer that Git LFS left in its place."""
    try:
        with file.open("rb") as content:
            start = content.read(len(POINTER))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    if start == POINTER:
        raise CheckpointError(
            f"{file} cannot be read: it is a pointer of Git LFS, which stands for the weights. Run `git lfs "
            "pull` in its folder"
        )
    return start


def _refusal(file: Path, start: bytes, error: Exception) -> CheckpointError:
    """The words for a file that transformers cannot read."""
    reason = str(error).partition("\n")[0].partition(". This")[0].rstrip(".") or "it ends too early"
    if file.suffix != SAFETENSORS and not isinstance(error, RuntimeError | EOFError | OSError):
        if zipfile.is_zipfile(file) or start[:1] == PICKLE:
            what = re.search(r"WeightsUnpickler error: ([^\n]+?)(?: was not an allowed global|\n|$)", str(error))
            return CheckpointError(
                f"{file} is a pickle that holds more than tensors, and loading it could run code, so it is "
                f"refused{f' ({what[1].strip()})' if what else ''}. If you trust it, load it yourself and "
                "save its tensors alone, as safetensors"
            )
        reason = f"it is no file of weights that torch.save wrote, it begins with {start[:2]!r}"
    return CheckpointError(
        f"{file} cannot be read; it may be incomplete, it has {file.stat().st_size} bytes: {reason}. Download it again"
    )


def _check_state_dict(file: Path, loaded: Any) -> None:
    """Raise unless what a file holds is a dict of tensors by their names."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{file} must hold a dict of tensors, found a {type(loaded).__name__}. Save the model's state_dict()"
        )
    for name, value in loaded.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{file} must hold a dict of tensors by their names, found a {type(value).__name__} under "
                f"{name!r}. Save the model's state_dict() alone"
            )
