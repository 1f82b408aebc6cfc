"""The results of analyses: data that draws itself and survives a trip through a file.

An analysis takes minutes to hours, and its numbers are looked at, compared and published long after the model
has left the memory. So a result holds no model. It is a frozen dataclass of plain data that derives from
`Result`, says what its pictures are (`Result.heatmaps`), and is drawn, saved and loaded by what it inherits.

Two formats hold the data: ``.json``, which any program reads, and ``.safetensors``, which is small and fast.
Both give back every field equal to the last bit, its dtype included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileError
from .files import check_writable, replacing
from .heatmap import Heatmap
from .interactive import plotly_figure
from .png import write_png
from .stored import decoded, encoded, tensor_from_json, tensor_to_json

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: The key of a file's JSON that names the class. No field can be called so.
CLASS = "class"


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """What every analysis returns: a base class of frozen dataclasses.

    Fields are tensors, ``str``, ``int``, ``float``, ``bool``, ``None``, and lists and dicts (with ``str``
    keys) of these.

    Example::

        @dataclass(frozen=True, eq=False)
        class Norms(Result):
            values: Tensor  # [n_layers, L]
            tokens: list[str]

            def heatmaps(self):
                rows = [str(layer) for layer in range(len(self.values))]
                return [Heatmap(values=self.values, title="Norms", row_title="layer", row_labels=rows,
                                column_labels=self.tokens)]
    """

    _classes: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Remember the class under its name, by which `load` finds it."""
        super().__init_subclass__(**kwargs)
        Result._classes[cls.__name__] = cls

    @abstractmethod
    def heatmaps(self) -> list[Heatmap]:
        """The pictures of this result, from top to bottom.

        Example::

            [heatmap.title for heatmap in grid.heatmaps()]
        """

    def caption(self) -> str:
        """One line of what the picture does not show: the fields that are single values.

        Example::

            print(grid.caption())
        """
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "; ".join(
            f"{name.replace('_', ' ')}: {f'{value:.6g}' if isinstance(value, float) else value}"
            for name, value in shown.items()
            if isinstance(value, (str, int, float))
        )

    def figure(self) -> Figure:
        """The pictures as one interactive plotly figure, one above the other.

        Raises:
            MissingExtraError: if plotly is not installed.

        Example::

            grid.figure().write_html("h.html")
        """
        return plotly_figure(self.heatmaps())

    def save(self, path: str | Path) -> Path:
        """Write a picture (``.html``, interactive and self-contained, or ``.png``) or the data.

        The data are written as ``.json`` or ``.safetensors``, which `load` reads back. A file that is there
        is replaced at once, when the new one is complete.

        Args:
            path: where to; its suffix says as what.

        Returns:
            The path.

        Raises:
            FileError: for another suffix, or where the file cannot be written.
            MissingExtraError: if the library that draws it is not installed.

        Example::

            grid.save("h.json")
        """
        path = check_writable(path)
        WRITERS[path.suffix](self, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The result that `save` wrote as ``.json`` or ``.safetensors``, equal to the last bit, on the CPU.

        Args:
            path: the file. ``Result.load`` takes one of any class, a class's own ``load`` only its own.

        Raises:
            FileError: if there is no such file, it holds no result, or one of another class.

        Example::

            grid.save("h.safetensors")
            grid = PatchGrid.load("h.safetensors")
        """
        path = Path(path)
        if path.suffix not in READERS:
            raise FileError(f"{path}: a result is loaded from {' or '.join(READERS)}; pictures hold no data")
        try:
            content, tensor = READERS[path.suffix](path)
            named = content.pop(CLASS)
            fields = {name: decoded(value, tensor) for name, value in content.items()}
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise FileError(f"{path} is no result that Result.save wrote: {error}") from error
        found = class_named(named, path)
        if not issubclass(found, cls):
            raise FileError(
                f"{path} holds a {found.__name__}, not a {cls.__name__}: load it with {found.__name__}.load "
                f"or Result.load"
            )
        try:
            return found(**fields)
        except TypeError as error:  # a field too many or too few
            raise FileError(f"{path} was written by another version of {found.__name__}: {error}") from error

    def _content(self, tensor: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        """The class and the fields, as JSON; ``tensor`` says what stands for a tensor."""
        cls = type(self)
        content: dict[str, Any] = {CLASS: f"{cls.__module__}.{cls.__name__}"}
        for field in dataclasses.fields(self):
            content[field.name] = encoded(getattr(self, field.name), field.name, tensor)
        return content


def class_named(name: Any, path: Path) -> type[Result]:
    """The class that a file names; modules of this package, and no others, are imported to find it.

    Raises:
        FileError: if none is known.
    """
    module, _, short = str(name).rpartition(".")
    if short not in Result._classes and module.partition(".")[0] == __name__.partition(".")[0]:
        with contextlib.suppress(ImportError):  # said below
            importlib.import_module(module)
    if short not in Result._classes:
        raise FileError(
            f"{path} holds a {name}, which is no class of results known here. Import the module that defines "
            f"it first; known are {', '.join(sorted(Result._classes))}"
        )
    return Result._classes[short]


# -- the formats -------------------------------------------------------------------------------------------


def write_page(result: Result, path: Path) -> None:
    """The figure as a page that needs no network."""
    figure = result.figure()
    with replacing(path) as file:
        figure.write_html(file, include_plotlyjs=True)


def write_picture(result: Result, path: Path) -> None:
    """The figure as a PNG."""
    write_png(result.heatmaps(), path)


def write_json(result: Result, path: Path) -> None:
    """Tensors as nested lists of numbers beside their dtype and shape."""
    text = json.dumps(result._content(lambda name, tensor: tensor_to_json(tensor)), allow_nan=False)
    with replacing(path) as file:
        file.write_text(text + "\n", encoding="utf-8")


def write_safetensors(result: Result, path: Path) -> None:
    """Tensors as tensors, everything else as JSON in the metadata."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> str:
        tensors[name] = tensor.detach().cpu().clone().contiguous()  # the format allows no shared memory
        return name

    metadata = {"result": json.dumps(result._content(keep), allow_nan=False)}
    with replacing(path) as file:
        try:
            save_file(tensors, file, metadata)
        except (SafetensorError, KeyError) as error:
            raise FileError(f"{path} cannot be written: {error}. Save the result as .json") from error


def read_json(path: Path) -> tuple[dict[str, Any], Callable[[Any], Tensor]]:
    """A file's content, and what makes a tensor of an entry."""
    return json.loads(path.read_text(encoding="utf-8")), tensor_from_json


def read_safetensors(path: Path) -> tuple[dict[str, Any], Callable[[Any], Tensor]]:
    """Likewise. The tensors are copies: the file may be replaced or removed."""
    with path.open("rb"):  # the system's own reason, if it cannot be read
        pass
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return json.loads(metadata["result"]), tensors.__getitem__


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".html": write_page,
    ".png": write_picture,
    ".json": write_json,
    ".safetensors": write_safetensors,
}
READERS = {".json": read_json, ".safetensors": read_safetensors}
