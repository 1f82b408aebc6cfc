"""How large the parts of a picture are, so that nothing overlaps or is cut, from 1 row to 500 columns.

Neither plotly nor matplotlib sizes a heatmap by what it holds: by default 64 layers share the height of 8,
and the labels of one picture run into the title of the next. So the parts are measured here for both, in
pixels (100 to the inch), and labels are thinned to those that fit.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from .heatmap import Heatmap, spelt

#: Pixels: a line and an average character of labels; those of titles; the room for a colour bar and its
#: labels, the gap before the bar and its thickness; between a picture and the title of the next.
LINE, CHARACTER = 14, 6.6
TITLE_LINE, TITLE_CHARACTER = 19, 8
COLORBAR, BAR_GAP, BAR = 120, 12, 14
BETWEEN = 16
#: Pixels between labels at an angle of 45 degrees that do not touch.
SLANTED = 20
#: Characters of a label, and of a text inside a cell, beyond which it is cut.
LONGEST, LONGEST_TEXT = 24, 12


@dataclass(frozen=True)
class Ticks:
    """Which rows or columns are labelled, and how; every k-th where there is no room for all."""

    places: list[int]
    labels: list[str]

    @property
    def pixels(self) -> float:
        """The length of the longest label."""
        return max((cell_len(label) for label in self.labels), default=0) * CHARACTER


@dataclass(frozen=True)
class Panel:
    """One heatmap's parts, in pixels.

    Attributes:
        title: its lines.
        width, height: of all cells together.
        left, bottom: what labels and axis titles take beside and below the cells.
        columns, rows: the labels.
        room: how many characters of a text there is room for inside a cell; 0 if there are no texts.
        gap: whether cells are large enough for lines between them.
    """

    title: list[str]
    width: int
    height: int
    left: int
    bottom: int
    columns: Ticks
    rows: Ticks
    room: int
    gap: bool

    @property
    def top(self) -> int:
        """What the title takes above the cells."""
        return TITLE_LINE * len(self.title) + 12


@dataclass(frozen=True)
class Stack:
    """Pictures one above the other, in pixels from the top and left of them all.

    Attributes:
        heatmaps: from top to bottom.
        panels: their sizes.
        tops: where the cells of each begin.
        left: where the cells of all begin.
        width, height: of everything, labels, titles and colour bars included.
    """

    heatmaps: list[Heatmap]
    panels: list[Panel]
    tops: list[int]
    left: int
    width: int
    height: int


def stacked(heatmaps: Heatmap | Sequence[Heatmap]) -> Stack:
    """Where one or several heatmaps go. Raises `ValueError` if there are none."""
    stack = [heatmaps] if isinstance(heatmaps, Heatmap) else list(heatmaps)
    if not stack:
        raise ValueError("there is no heatmap to draw; give at least one")
    panels = [measured(heatmap) for heatmap in stack]
    tops, end = [], 0
    for panel in panels:
        tops.append(end + panel.top)
        end = tops[-1] + panel.height + panel.bottom + BETWEEN
    left = max(panel.left for panel in panels)
    width = left + max(panel.width for panel in panels) + COLORBAR
    return Stack(stack, panels, tops, left, width, height=end)


def measured(heatmap: Heatmap) -> Panel:
    """The sizes of a heatmap's picture."""
    rows, columns = heatmap.values.shape
    width, height = cells_size(heatmap)
    along, down = (
        thinned(heatmap.column_labels, width / SLANTED),
        thinned(heatmap.row_labels, height / LINE),
    )
    # A label at 45 degrees reaches as far to the left as down; that of the first column begins at its middle.
    overhang = 0.71 * cell_len(along.labels[0]) * CHARACTER - width / columns / 2 if columns else 0.0
    left = max(down.pixels + 2 * LINE + 10, overhang)
    return Panel(
        title=wrapped(heatmap.title, width + COLORBAR),
        width=width,
        height=height,
        left=math.ceil(left),
        bottom=math.ceil(0.71 * (along.pixels + LINE)) + 2 * LINE + 10,
        columns=along,
        rows=down,
        room=room_for_texts(width / max(columns, 1), height / max(rows, 1)) if heatmap.texts else 0,
        gap=width >= 8 * columns and height >= 8 * rows,
    )


def cells_size(heatmap: Heatmap) -> tuple[int, int]:
    """Width and height of all cells together: comfortable cells, as far as a screen holds them."""
    rows, columns = heatmap.values.shape
    widest = max(
        (cell_len(spelt(text, LONGEST_TEXT)) for row in heatmap.texts or [] for text in row), default=0
    )
    cell = max(40 if not heatmap.square else 26, math.ceil(widest * CHARACTER) + 8)
    widest_picture = 1300 if heatmap.texts is None else 4000
    width = min(max(columns * cell, 420), widest_picture)
    if heatmap.square:
        width = width if heatmap.texts else min(width, 900)
        return width, width
    bar_title = min(len(heatmap.value_title) * TITLE_CHARACTER + 10, 200)
    return width, min(max(rows * 24, 90, bar_title), 900)


def room_for_texts(width: float, height: float) -> int:
    """How many characters fit into a cell of ``width`` and ``height`` pixels; 0 for less than three."""
    room = int((width - 4) / CHARACTER) if height >= LINE else 0
    return room if room >= 3 else 0


def thinned(labels: list[str], room: float) -> Ticks:
    """``labels`` at 0, 1, 2, ...; every k-th of them where there is only ``room`` for so many."""
    step = max(1, -int(-len(labels) // max(room, 1)))
    places = list(range(0, len(labels), step))
    return Ticks(places, [spelt(labels[place], LONGEST) for place in places])


def wrapped(title: str, width: float) -> list[str]:
    """The lines of a title, broken where they would be longer than ``width`` pixels."""
    room = max(int(width / TITLE_CHARACTER), 20)
    return [part for line in title.split("\n") for part in textwrap.wrap(line, room) or [""]]
