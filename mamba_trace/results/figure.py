"""Heatmaps as an interactive plotly figure, one above the other.

plotly lays the figure out: it thins and turns the labels of the axes, and makes the margins as large as the
labels and the title need. Only between stacked pictures it reserves no space, so that space is computed here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .files import optional
from .heatmap import LONGEST, LONGEST_TEXT, Heatmap, Size, as_stack, spelt, wrapped

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plotly_figure"]

#: What shows through where a cell has no number.
BLANK = "rgb(190,190,190)"
FONT = {"size": 11}


def plotly_figure(heatmaps: Heatmap | Sequence[Heatmap]) -> Figure:
    """The heatmaps as one interactive plotly figure.

    Args:
        heatmaps: one or several; several are stacked, each with its own title and colour scale.

    Raises:
        MissingExtraError: if plotly is not installed.
        ValueError: if there are no heatmaps.

    Example::

        plotly_figure(grid.heatmaps()).write_html("h.html")
    """
    go: Any = optional("plotly.graph_objects", "an interactive figure")
    subplots: Any = optional("plotly.subplots", "an interactive figure")
    stack = as_stack(heatmaps)
    sizes = [heatmap.size for heatmap in stack]
    heights = [size.height for size in sizes]
    between = max((upper.below + lower.above for upper, lower in pairwise(sizes)), default=0)
    inside = sum(heights) + between * (len(stack) - 1)
    figure = subplots.make_subplots(len(stack), 1, row_heights=heights, vertical_spacing=between / inside)
    for row, (heatmap, size) in enumerate(zip(stack, sizes, strict=True), start=1):
        place = {"row": row, "col": 1}
        figure.add_trace(cells(go, heatmap, size), **place)
        figure.update_xaxes(axis(heatmap.column_title, heatmap.column_labels), **place)
        figure.update_yaxes(axis(heatmap.row_title, heatmap.row_labels), autorange="reversed", **place)
        if heatmap.square:
            figure.update_yaxes(scaleanchor=figure.data[-1].xaxis, constrain="domain", **place)
            figure.update_xaxes(constrain="domain", **place)
        lines = [literal(line) for line in wrapped(heatmap.title, size.width + size.right)]
        add_title(figure, lines, alone=len(stack) == 1)
    width = max(size.left + size.width + size.right for size in sizes)
    height = inside + sizes[0].above + sizes[-1].below
    margin = {"t": 10 if len(stack) == 1 else sizes[0].above, "l": 10, "r": 10, "b": 10}
    figure.update_layout(width=width, height=height, margin=margin, plot_bgcolor=BLANK)
    return figure


def add_title(figure: Figure, lines: list[str], alone: bool) -> None:
    """Write a title above the picture that was added last: as the figure's own if it is the only picture."""
    place = {"x": 0, "xref": "paper", "font": {"size": 15}}
    if alone:  # plotly would move a text of several lines out of its container, but not a subtitle
        text: dict[str, Any] = {"text": lines[0], "subtitle": {"text": "<br>".join(lines[1:])}}
        figure.update_layout(title={**text, **place, "automargin": True, "yref": "container"})
        return
    drawn: Any = figure.data[-1]
    low, high = figure.layout[drawn.yaxis.replace("y", "yaxis")].domain
    drawn.colorbar.update(y=(low + high) / 2, len=high - low)
    text = {"text": "<br>".join(lines), "align": "left", "showarrow": False}
    above = {"xanchor": "left", "y": high, "yref": "paper", "yanchor": "bottom", "yshift": 6}
    figure.add_annotation({**text, **place, **above})


def cells(go: Any, heatmap: Heatmap, size: Size) -> Any:
    """The cells and their colour bar."""
    (rows, columns), scale = heatmap.values.shape, heatmap.scale
    hover = [["<br>".join(map(literal, text.split("\n"))) for text in row] for row in heatmap.hover_texts()]
    words: dict[str, Any] = {"text": hover}
    if heatmap.texts is not None:
        inside = [[literal(spelt(text, LONGEST_TEXT)) for text in row] for row in heatmap.texts]
        words = {"text": inside, "hovertext": hover, "texttemplate": "%{text}"}
    colours: dict[str, Any] = {"colorscale": "Blues", "zmin": 0, "zmax": scale}
    if heatmap.signed:
        colours = {"colorscale": "RdBu", "zmin": -scale, "zmid": 0, "zmax": scale}
    gap = int(size.width >= 8 * columns and size.height >= 8 * rows)
    bar = {"title": {"text": literal(heatmap.value_title), "side": "right"}, "tickfont": FONT}
    look = {"xgap": gap, "ygap": gap, "colorbar": {**bar, "exponentformat": "e"}}
    places = {"x": list(range(columns)), "y": list(range(rows)), "z": heatmap.shades.tolist()}
    return go.Heatmap(hoverinfo="text", hoverongaps=True, **places, **colours, **look, **words)


def axis(title: str, labels: list[str]) -> dict[str, Any]:
    """Settings of the axis of rows or columns: a category for each, of which plotly labels as many as fit."""
    shown = {str(at): literal(spelt(label, LONGEST)) for at, label in enumerate(labels)}
    heading = {"text": literal(title[:1].upper() + title[1:]), "standoff": 8}
    look = {"tickfont": FONT, "ticks": "outside", "showgrid": False, "automargin": True}
    return {"type": "category", "labelalias": shown, "title": heading, **look}


def literal(text: str) -> str:
    """Text that plotly shows as it is: ``<|endoftext|>`` is no markup, and ``$`` begins no formula."""
    return html.escape(text, quote=False).replace("$", "&#36;")
