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

#: The file endings under which a result can be saved.
SUFFIXES = (".html", ".png", ".json", ".safetensors")


def check_writable(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """Check that a result can be saved, before the hours of work that lead to it, and return the path.

    The check opens the file for appending and makes another beside it, since permissions alone do not tell:
    the file system may be read-only, the name too long or a folder's. It leaves everything as it was.

    Args:
        path: where the result will be saved.
        suffixes: the endings that are possible.

    Raises:
        FileError: if the suffix is not in ``suffixes``, the folder does not exist, or the file cannot be
            written, with the system's reason.
        MissingExtraError: if the library that writes this kind of file is not installed.
    """
    path = path_of(path)
    if path.suffix not in suffixes:
        ending = path.suffix or "without a suffix"
        raise FileError(f"{path}: a result is saved as {', '.join(suffixes)}, not {ending}")
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}; create it first")
    with system_errors(path):
        file = destination(path)  # of a link, what it leads to may be removed, and not the link
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
        beside = neighbour(file)
        beside.touch()
        beside.unlink()
    if path.suffix == ".html":
        optional("plotly.graph_objects", "an interactive figure")
    if path.suffix == ".png":
        optional("matplotlib.figure", "a PNG")
    return path


def path_of(path: str | Path) -> Path:
    """``path`` as a `Path`. Raises `FileError` for anything else."""
    if not isinstance(path, (str, os.PathLike)):
        raise FileError(f"a file is named by a string or a Path, not by {path!r} (a {type(path).__name__})")
    return Path(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a new file to, which takes the place of ``path`` at once when the block ends.

    A program that reads ``path`` meanwhile finds the whole old content or the whole new content. After an
    exception the old file is left as it was. A symbolic link stays a link: the file it leads to is replaced.

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
    """An unused path in the same folder, and so on the same file system."""
    return file.with_name(f".{secrets.token_hex(8)}{file.suffix}")


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a `FileError` with its reason."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}. Choose another place") from error


def destination(path: Path) -> Path:
    """The file that a symbolic link leads to; of another path, the path itself."""
    try:
        return path.resolve()
    except RuntimeError as error:  # how Python up to 3.12 reports a loop of links
        raise OSError(str(error)) from error


def optional(name: str, purpose: str) -> ModuleType:
    """Import a module of the ``plot`` extra.

    Raises:
        MissingExtraError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'mamba_trace[plot]'") from error
