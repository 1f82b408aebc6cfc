"""Heatmaps as an interactive plotly figure, one above the other.

The sizes come from layout.py: plotly would give every picture the same height, and reserves no room between
stacked pictures for the labels and titles of their axes.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .files import optional
from .heatmap import Heatmap, spelt
from .layout import BAR, BAR_GAP, BETWEEN, COLORBAR, Panel, Ticks, stacked

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: What shows through where a cell has no number.
BLANK = "rgb(190,190,190)"


def plotly_figure(heatmaps: Heatmap | Sequence[Heatmap]) -> Figure:
    """The heatmaps as one interactive plotly figure.

    Args:
        heatmaps: one or several, which are stacked, each with its own title and colour scale.

    Raises:
        MissingExtraError: if plotly is not installed.
        ValueError: if there are none.

    Example::

        plotly_figure(grid.heatmaps()).write_html("h.html")
    """
    go: Any = optional("plotly.graph_objects", "an interactive figure")
    stack = stacked(heatmaps)
    figure, first = go.Figure(), stack.tops[0]
    across = stack.width - stack.left - COLORBAR  # the widest picture's cells, which plotly calls 1
    down = stack.height - first - BETWEEN
    for number, (heatmap, panel, top) in enumerate(
        zip(stack.heatmaps, stack.panels, stack.tops, strict=True)
    ):
        suffix = "" if number == 0 else str(number + 1)
        place = Place(
            suffix,
            across=(0.0, panel.width / across),
            down=(1 - (top - first + panel.height) / down, 1 - (top - first) / down),
        )
        figure.add_trace(trace(go, heatmap, panel, place))
        figure.update_layout({f"xaxis{suffix}": column_axis(heatmap, panel, place)})
        figure.update_layout({f"yaxis{suffix}": row_axis(heatmap, panel, place)})
        if len(stack.panels) > 1:
            figure.add_annotation(**heading(panel, place.down[1]), yshift=6, align="left", showarrow=False)
    if len(stack.panels) == 1:
        figure.update_layout(title={**heading(stack.panels[0], 1.0), "pad": {"b": 6}})
    figure.update_layout(
        width=stack.width,
        height=stack.height,
        margin={"l": stack.left, "r": COLORBAR, "t": first, "b": BETWEEN, "pad": 0, "autoexpand": False},
        plot_bgcolor=BLANK,
    )
    return figure


@dataclass(frozen=True)
class Place:
    """Where a picture is: what its axes' names end in, and its domains, as shares of the whole."""

    suffix: str
    across: tuple[float, float]
    down: tuple[float, float]


def heading(panel: Panel, y: float) -> dict[str, Any]:
    """A picture's title, above ``y``."""
    text = "<br>".join(literal(line) for line in panel.title)
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "yref": "paper", "yanchor": "bottom"}
    return {"text": text, **place, "font": {"size": 14}}


def trace(go: Any, heatmap: Heatmap, panel: Panel, place: Place) -> Any:
    """The cells and their colour bar."""
    scale = heatmap.scale
    hover = [[lines(text) for text in row] for row in heatmap.hover_texts()]
    words: dict[str, Any] = {"text": hover}
    if heatmap.texts is not None and panel.room:
        inside = [[literal(spelt(text, panel.room)) for text in row] for row in heatmap.texts]
        words = {"text": inside, "hovertext": hover, "texttemplate": "%{text}", "textfont": {"size": 11}}
    return go.Heatmap(
        z=heatmap.shades.tolist(),
        xaxis=f"x{place.suffix}",
        yaxis=f"y{place.suffix}",
        colorscale="RdBu",
        zmin=-scale,
        zmid=0,
        zmax=scale,
        hoverinfo="text",
        hoverongaps=True,
        xgap=int(panel.gap),
        ygap=int(panel.gap),
        colorbar={
            **{"x": place.across[1], "xanchor": "left", "xpad": BAR_GAP, "thickness": BAR, "ypad": 0},
            **{"y": sum(place.down) / 2, "yanchor": "middle", "len": panel.height, "lenmode": "pixels"},
            "title": {"text": literal(heatmap.value_title), "side": "right"},
            "tickfont": {"size": 11},
            "exponentformat": "e",
        },
        **words,
    )


def column_axis(heatmap: Heatmap, panel: Panel, place: Place) -> dict[str, Any]:
    """Settings of the axis below the cells."""
    settings = axis(heatmap.column_title, panel.columns)
    return {**settings, "tickangle": -45, "domain": place.across, "anchor": f"y{place.suffix}"}


def row_axis(heatmap: Heatmap, panel: Panel, place: Place) -> dict[str, Any]:
    """Settings of the axis beside the cells: the first row on top."""
    settings = axis(heatmap.row_title, panel.rows)
    settings |= {"autorange": "reversed", "domain": place.down, "anchor": f"x{place.suffix}"}
    if heatmap.square:
        settings |= {"scaleanchor": f"x{place.suffix}", "constrain": "domain"}
    return settings


def axis(title: str, ticks: Ticks) -> dict[str, Any]:
    """What both axes have in common."""
    return {
        "title": {"text": literal(title[:1].upper() + title[1:]), "standoff": 8},
        "tickmode": "array",
        "tickvals": ticks.places,
        "ticktext": [literal(label) for label in ticks.labels],
        "tickfont": {"size": 11},
        "automargin": False,
        "showgrid": False,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
    }


def lines(text: str) -> str:
    """Plain text whose newlines break lines."""
    return "<br>".join(literal(line) for line in text.split("\n"))


def literal(text: str) -> str:
    """Text that plotly shows as it is: ``<|endoftext|>`` is no markup, and ``$`` begins no formula."""
    return html.escape(text, quote=False).replace("$", "&#36;")
