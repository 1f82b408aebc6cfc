"""Heatmaps as an interactive plotly figure, one above the other.

plotly thins the labels of the axes, and enlarges a margin that is too small for them. It reserves no space for
titles, between pictures, and for the buttons at the top, so that space is computed here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .files import optional
from .heatmap import COLOUR_BAR, LINE, LONGEST, LONGEST_TEXT, Heatmap, Size, as_stack, spelt, wrapped

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plotly_figure"]

#: What shows through where a cell has no number.
BLANK = "rgb(190,190,190)"
FONT = {"size": 11}
#: Pixels for plotly's buttons, which lie above the title and not on it.
MODE_BAR = 26
#: From where to where, as shares of the figure without its margins.
Share = tuple[float, float]


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
    wide = max(size.width for size in sizes)
    high = sum(size.above + size.height + size.below for size in sizes) - sizes[0].above - sizes[-1].below
    figure = subplots.make_subplots(len(stack), 1)
    top = -sizes[0].above  # pixels from the first picture's cells down to the next picture's title
    for row, (heatmap, size) in enumerate(zip(stack, sizes, strict=True), start=1):
        place, top = {"row": row, "col": 1}, top + size.above
        across, down = (0, size.width / wide), (1 - (top + size.height) / high, 1 - top / high)
        figure.add_trace(cells(go, heatmap, size, across, down), **place)
        columns = axis(heatmap.column_title, heatmap.column_labels)
        figure.update_xaxes(columns, domain=across, tickangle=size.angle, **place)
        rows = axis(heatmap.row_title, heatmap.row_labels)
        figure.update_yaxes(rows, domain=down, autorange="reversed", **place)
        if heatmap.square:
            figure.update_yaxes(scaleanchor=figure.data[-1].xaxis, constrain="domain", constraintoward="top", **place)
            figure.update_xaxes(constrain="domain", constraintoward="left", **place)
        top += size.height + size.below
    margin = {"l": max(size.left for size in sizes), "r": COLOUR_BAR}
    margin |= {"t": sizes[0].above + MODE_BAR, "b": sizes[-1].below}
    width, height = wide + margin["l"] + margin["r"], high + margin["t"] + margin["b"]
    figure.update_layout(width=width, height=height, margin=margin, plot_bgcolor=BLANK)
    for heatmap, size, drawn in zip(stack, sizes, figure.data, strict=True):
        lines = [literal(line) for line in wrapped(heatmap.title, size.width + size.right)]
        add_title(figure, drawn, lines, alone=len(stack) == 1)
    return figure


def add_title(figure: Figure, drawn: Any, lines: list[str], alone: bool) -> None:
    """Write a title above a picture: as the figure's own if it is the only picture."""
    text: dict[str, Any] = {"text": "<br>".join(lines), "x": 0, "xref": "paper", "font": {"size": 14}}
    if alone:
        # The base of the first line; plotly calls it the top.
        first = 1 - (MODE_BAR + LINE) / figure.layout.height
        figure.update_layout(title={**text, "y": first, "yref": "container", "yanchor": "top"})
        return
    _, high = figure.layout[drawn.yaxis.replace("y", "yaxis")].domain
    above = {"xanchor": "left", "y": high, "yref": "paper", "yanchor": "bottom", "yshift": 6}
    figure.add_annotation({**text, **above, "align": "left", "showarrow": False})


def cells(go: Any, heatmap: Heatmap, size: Size, across: Share, down: Share) -> Any:
    """The cells, and their colour bar to the right of the shares of the figure that they take up."""
    (rows, columns), scale = heatmap.values.shape, heatmap.limit
    hover = [["<br>".join(map(literal, text.split("\n"))) for text in row] for row in heatmap.hover_texts()]
    words: dict[str, Any] = {"text": hover}
    if heatmap.texts is not None:
        inside = [[literal(spelt(text, LONGEST_TEXT)) for text in row] for row in heatmap.texts]
        words = {"text": inside, "hovertext": hover, "texttemplate": "%{text}"}
    colours: dict[str, Any] = {"colorscale": "Blues", "zmin": 0, "zmax": scale}
    if heatmap.signed:
        colours = {"colorscale": "RdBu", "zmin": -scale, "zmid": 0, "zmax": scale}
    gap = int(size.width >= 8 * columns and size.height >= 8 * rows)
    bar = {"title": {"text": literal(heatmap.value_title), "side": "right"}, "tickfont": FONT, "thickness": 16}
    bar |= {"x": across[1], "xanchor": "left", "y": sum(down) / 2, "len": down[1] - down[0], "ypad": 0}
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
