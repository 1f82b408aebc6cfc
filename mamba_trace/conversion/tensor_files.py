"""A file of weights says what it holds in its first bytes: it need not be loaded to know that it fits.

Contract: `shapes_in` gives the names and shapes of the tensors in a file without reading their numbers, and
`load_tensors` gives the tensors. Pickles are loaded under weights_only, so no code is run. A file that is not
what its name says, holds more than tensors, or ends too early is a `CheckpointError` that names it, the fault
and what to do.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]

SAFETENSORS = ".safetensors"
LARGE = (
    2**28
)  # bytes; an old pickle has its shapes between its numbers, and only a small one is read for them
POINTER = b"version https://git-lfs"
PICKLE = b"\x80"  # the first byte of a pickle since protocol 2, which torch.save has always written
AGAIN = "Download it again"


def shapes_in(file: Path) -> Shapes | None:
    """The shape of every tensor in a file, by its name.

    Returns:
        ``None`` for a large pickle that torch before 1.6 wrote, which only reading it whole would tell.

    Raises:
        CheckpointError: as `load_tensors`.
    """
    if file.suffix == SAFETENSORS:
        _refuse_pointer(file)
        try:
            with safe_open(file, "pt") as content:
                names = content.keys()
                return {name: tuple(content.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    if not zipfile.is_zipfile(file) and file.stat().st_size > LARGE:
        return None
    return {name: tuple(tensor.shape) for name, tensor in _unpickled(file, "meta").items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in one file, on the CPU, memory-mapped where the file allows it.

    Raises:
        CheckpointError: if it cannot be read, is no file of weights, or holds more than tensors.
    """
    if file.suffix != SAFETENSORS:
        return _unpickled(file, "cpu")
    _refuse_pointer(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; on the meta device without reading their numbers."""
    _refuse_pointer(file)
    zipped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded = torch.load(file, map_location=device, weights_only=True, mmap=zipped)
    except OSError as error:
        raise _unreadable(file, error) from error
    except Exception as error:  # broken bytes break the unpickler in any way: KeyError, IndexError, EOFError
        raise _refused_pickle(file, error) from error
    return _checked(file, loaded)


def _refused_pickle(file: Path, error: Exception) -> CheckpointError:
    """What to say of a file that torch.load refuses."""
    with file.open("rb") as content:
        start = content.read(2)
    zipped = zipfile.is_zipfile(file)
    # Of zip files, torch's own reader refuses what is no archive of torch's; the rest is up to the unpickler.
    if isinstance(error, RuntimeError | EOFError) or not (zipped or start[:1] == PICKLE):
        if not zipped and start not in (b"PK", b"") and start[:1] != PICKLE:
            return CheckpointError(
                f"{file} cannot be read: it is no file of weights that torch.save wrote, it begins with "
                f"{start!r}. {AGAIN}"
            )
        return _unreadable(file, error)
    reason = re.search(r"WeightsUnpickler error: ([^\n]+?)(?: was not an allowed global|\n|$)", str(error))
    return CheckpointError(
        f"{file} is a pickle that holds more than tensors, and loading it could run code, so it is refused"
        f"{f' ({reason[1].strip()})' if reason else ''}. If you trust it, load it yourself and save its "
        "tensors alone, as safetensors"
    )


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0].partition(". This")[0] or "it ends too early"
    size = file.stat().st_size if file.exists() else 0
    return CheckpointError(
        f"{file} cannot be read; it may be incomplete, it has {size} bytes: {reason.rstrip('.')}. {AGAIN}"
    )


def _refuse_pointer(file: Path) -> None:
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


def _checked(file: Path, loaded: Any) -> dict[str, Tensor]:
    """What a pickle holds, if that is a state dict."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{file} must hold a dict of tensors, found a {type(loaded).__name__}. Save the model's "
            f"state_dict()"
        )
    other = {name: value for name, value in loaded.items() if not isinstance(value, Tensor)}
    if other or not all(isinstance(name, str) for name in loaded):
        name, value = next(iter((other or loaded).items()))
        raise CheckpointError(
            f"{file} must hold a dict of tensors by their names, found a {type(value).__name__} under "
            f"{name!r}. Save the model's state_dict() alone"
        )
    return dict(loaded)
