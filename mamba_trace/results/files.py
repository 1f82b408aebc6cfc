"""Writing a result without losing one: what is asked before the work, and a file that is never half written.

A sweep takes hours, so whether its file can be written is asked before it begins (`check_writable`). It
overwrites that file while it runs, and may be stopped at any moment, so a file is made beside the old one and
takes its place when it is complete (`replacing`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ..errors import FileError, MissingExtraError

#: The file endings a result can be saved under.
SUFFIXES = (".html", ".png", ".json", ".safetensors")


def check_writable(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """``path``, if a result can be saved there: to be asked before the hours that lead to the result.

    Args:
        path: where to.
        suffixes: the endings that are possible.

    Raises:
        FileError: if the suffix is none of ``suffixes``, the folder does not exist, or the file cannot be
            written. A file that is there is left as it is; none is made.
        MissingExtraError: if the library that writes this kind of file is not installed.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        ending = path.suffix or "without a suffix"
        raise FileError(f"{path}: a result is saved as {', '.join(suffixes)}, not {ending}")
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}; create it first")
    try_opening(path)
    if path.suffix == ".html":
        optional("plotly.graph_objects", "an interactive figure")
    if path.suffix == ".png":
        optional("matplotlib.figure", "a PNG")
    return path


def try_opening(path: Path) -> None:
    """Open a file for appending, make another beside it, and leave everything as it was.

    Permissions alone do not tell: the file system may be read-only, the name too long or a folder's.

    Raises:
        FileError: if it cannot be opened, with the system's reason.
    """
    with system_errors(path):
        file = destination(path)  # it is not the link that is to be removed
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
        beside = neighbour(file)
        beside.touch()
        beside.unlink()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file's path to write to, which takes the place of ``path`` at once when the block ends.

    Whoever reads ``path`` meanwhile finds the old content or the new, whole. After an exception the old is
    left as it was. A symbolic link stays one: what it leads to is replaced.

    Raises:
        FileError: if the system refuses, with its reason.
    """
    with system_errors(path):
        file = destination(path)
        new = neighbour(file)
        try:
            yield new
            if file.exists():
                shutil.copymode(file, new)
            os.replace(new, file)
        finally:
            new.unlink(missing_ok=True)


def neighbour(file: Path) -> Path:
    """A path in the same folder, and so on the same file system, that nothing has."""
    return file.with_name(f".{secrets.token_hex(8)}{file.suffix}")


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a `FileError` with its reason."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{path} cannot be written: {error.strerror or error}. Choose another place"
        ) from error


def destination(path: Path) -> Path:
    """Where a symbolic link leads; ``path`` itself if it is none."""
    try:
        return path.resolve()
    except RuntimeError as error:  # how Python up to 3.12 reports a loop of links
        raise OSError(str(error)) from error


def optional(name: str, purpose: str) -> ModuleType:
    """Import a module of the ``plot`` extra.

    Raises:
        MissingExtraError: if it is not installed, with the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'mamba_trace[plot]'") from error
