"""The results of analyses: data that draws itself and survives a trip through a file.

An analysis takes minutes to hours, and its numbers are looked at, compared and published long after the model
has left the memory. So a result holds no model. It is a frozen dataclass of plain data that derives from
`Result` and says what its pictures are (`Result.heatmaps`); drawing, saving and loading are inherited.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import FileError
from .figure import plotly_figure
from .files import check_writable, path_of, replacing
from .heatmap import Heatmap
from .notebook import in_text, mimebundle
from .png import write_png
from .stored import SUFFIXES, read_data, write_data

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: The key of a file's content that names the class. No field can be called so.
CLASS = "class"
#: The modules of this package that define results, imported when a file names a class that is not known yet.
#: What a file says is never imported.
ANALYSES = ("mamba_trace.patching", "mamba_trace.hidden_attention", "mamba_trace.lenses")


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """What every analysis returns: a base class of frozen dataclasses.

    Fields are tensors, str, int, float, bool, None, and lists and dicts (with str keys) of these.

    Example::

        @dataclass(frozen=True, eq=False)
        class Norms(Result):
            values: Tensor  # [n_layers, L]
            tokens: list[str]

            def heatmaps(self):
                rows = [str(layer) for layer in range(len(self.values))]
                return [Heatmap(values=self.values, title="Norms", row_title="layer", row_labels=rows,
                                column_labels=self.tokens, signed=False)]
    """

    _classes: ClassVar[dict[str, type[Result]]] = {}
    #: By which versions of what and of which model it was made (`made.made_by`); empty where nobody has said.
    made: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Remember the class by its name, for `load`."""
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

    def __str__(self) -> str:
        """The numbers of the pictures as tables, with their titles and the caption."""
        return in_text(self.heatmaps, self.caption())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # What a notebook shows and stores.
        return mimebundle(self.heatmaps, str(self))

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

        ``.safetensors`` holds the data without loss; ``.json`` is for other programs. `load` reads both back
        to the last bit. An existing file is replaced at once, when the new one is complete.

        Args:
            path: where to write; its suffix says what. It is returned.

        Raises:
            FileError: for another suffix, or if the file cannot be written.
            MissingExtraError: if the library that draws the picture is not installed.

        Example::

            grid.save("h.safetensors")
        """
        path = check_writable(path)
        if path.suffix == ".png":
            write_png(self.heatmaps(), path)
        elif path.suffix == ".html":
            figure = self.figure()
            with replacing(path) as file:
                figure.write_html(file, include_plotlyjs=True)
        else:
            fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            write_data(path, {CLASS: type(self).__name__} | fields)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The result that `save` wrote as ``.json`` or ``.safetensors``, equal to the last bit, on the CPU.

        Args:
            path: the file. ``Result.load`` reads a result of any class, a class's own ``load`` only its own.

        Raises:
            FileError: if there is no such file, it holds no result, or a result of another class.

        Example::

            grid.save("h.safetensors")
            grid = PatchGrid.load("h.safetensors")
        """
        path = path_of(path)
        if path.suffix not in SUFFIXES:
            raise FileError(f"{path}: a result is loaded from {' or '.join(SUFFIXES)}; pictures hold no data")
        fields = read_data(path)
        if CLASS not in fields:
            raise FileError(f"{path} is no result that Result.save wrote: it names no class")
        kind = class_named(str(fields.pop(CLASS)), path)
        if not issubclass(kind, cls):
            raise FileError(
                f"{path} holds a {kind.__name__}, not a {cls.__name__}: load it with {kind.__name__}.load or "
                f"Result.load"
            )
        try:
            return kind(**fields)
        except TypeError as error:  # a field too many or too few
            raise FileError(f"{path} was written by another version of {kind.__name__}: {error}") from error


def class_named(name: str, path: Path) -> type[Result]:
    """The class that a file names, in older files by its module, too. Raises `FileError` if none is known."""
    short = name.rpartition(".")[2]
    for module in ANALYSES:
        if short not in Result._classes:
            importlib.import_module(module)
    if short not in Result._classes:
        raise FileError(
            f"{path} holds a {name}, which is no class of results known here. Import the module that defines "
            f"it first; known are {', '.join(sorted(Result._classes))}"
        )
    return Result._classes[short]
