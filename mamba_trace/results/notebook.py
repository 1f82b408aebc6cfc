"""What a notebook shows where a result is the last expression of a cell, and what `print` shows of it.

A notebook stores every form of an output, and each program that opens it shows the best that it can: JupyterLab
and VS Code the interactive figure, GitHub, nbviewer and an export to HTML the picture, a terminal the text. The
figure is stored as data, without the megabytes of the library that draws it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from ..errors import MambaTraceError, MissingExtraError
from .figure import plotly_figure
from .heatmap import Heatmap
from .png import png_bytes
from .terminal import terminal_table

__all__ = ["in_text", "mimebundle"]

#: The name under which notebooks know a plotly figure.
PLOTLY = "application/vnd.plotly.v1+json"
#: Cells of a matrix whose numbers are printed, and columns of the text. A larger one is described.
MOST_CELLS, WIDTH = 1500, 120


def mimebundle(draw: Callable[[], Sequence[Heatmap]], text: str) -> dict[str, Any]:
    """Every form of a notebook's output, by its MIME type: the figure, the picture and the text.

    A form whose library is not installed is left out, and so are figure and picture where there is nothing to
    draw, such as a grid without a scale.

    Args:
        draw: returns the heatmaps.
        text: the plain text.

    Example::

        mimebundle(grid.heatmaps, str(grid))["image/png"]
    """
    bundle: dict[str, Any] = {"text/plain": text}
    with contextlib.suppress(MambaTraceError):
        if not (heatmaps := draw()):
            return bundle
        with contextlib.suppress(MissingExtraError):
            bundle["image/png"] = base64.b64encode(png_bytes(heatmaps)).decode("ascii")
        with contextlib.suppress(MissingExtraError):
            bundle[PLOTLY] = json.loads(plotly_figure(heatmaps).to_json())
    return bundle


def in_text(draw: Callable[[], Sequence[Heatmap]], caption: str) -> str:
    """Title, numbers and caption, in lines of at most `WIDTH` columns; without colours.

    Args:
        draw: returns the heatmaps. Where it cannot, the text says why.
        caption: the last line.
    """
    try:
        heatmaps = draw()
    except MambaTraceError as error:
        return "\n".join([str(error), *filter(None, [caption])])
    return "\n\n".join([*map(heatmap_in_text, heatmaps), *filter(None, [caption])])


def heatmap_in_text(heatmap: Heatmap) -> str:
    """The title and the table of a heatmap, or the extremes of one that is too large for a table."""
    if heatmap.values.numel() > MOST_CELLS:
        return f"{heatmap.title}\n{extremes(heatmap)}"
    lines = io.StringIO()
    Console(file=lines, width=WIDTH, color_system=None, force_jupyter=False, force_terminal=False).print(
        terminal_table(heatmap, WIDTH), soft_wrap=True
    )
    return f"{heatmap.title}\n" + "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def extremes(heatmap: Heatmap) -> str:
    """The size of a heatmap, and what its smallest and its largest cell say when they are pointed at."""
    rows, columns = heatmap.values.shape
    size = f"{rows} rows ({heatmap.row_title}) by {columns} columns ({heatmap.column_title.lower()})"
    known = ~heatmap.numbers.isnan()
    if not known.any():
        return f"{size}, none computed"
    said = heatmap.hover_texts()
    found = []
    for name, flat in (
        ("smallest", heatmap.numbers.nan_to_num(nan=float("inf")).argmin()),
        ("largest", heatmap.numbers.nan_to_num(nan=float("-inf")).argmax()),
    ):
        row, column = divmod(int(flat), columns)
        found.append(f"{name}: {', '.join(said[row][column].splitlines())}")
    return "\n".join([size, *found])
