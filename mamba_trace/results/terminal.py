"""A heatmap as a table for a shell without a screen. Its numbers can be read without the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .heatmap import LONGEST, Heatmap, spelt

__all__ = ["terminal_table"]

#: The ends and the middle of the colour scale RdBu, as in the figure and the PNG.
RED, WHITE, BLUE = (178, 24, 43), (247, 247, 247), (33, 102, 172)
#: Terminal columns of a cell, the gap included.
NARROWEST, WIDEST = 6, 9
#: The share of the scale below which a cell is not painted.
FAINT = 0.005


def terminal_table(heatmap: Heatmap, width: int = 120) -> Group:
    """The heatmap as coloured tables, in as many blocks of columns as ``width`` makes necessary.

    Args:
        heatmap: what to print; the texts of its cells, or its numbers if it has none.
        width: columns of the terminal.

    Returns:
        A `rich.console.Group` of tables. A dot is a value that rounds to zero, a question mark one that was
        never computed. Numbers that are all small or large are in the unit that the corner names.

    Example::

        rich.print(terminal_table(heatmap, width=80))
    """
    unit = printed_unit(heatmap)
    rows = headings(heatmap)
    names = [spelt(label, LONGEST) for label in heatmap.row_labels]
    if not heatmap.square:  # where rows are tokens, too, these alone are clear
        names = [f"{heatmap.row_title} {name}" for name in names]
    rows += list(zip(names, table_cells(heatmap, unit), strict=True))
    corner = "" if unit == 1 else f"x {unit:.0e}"
    margin = max(cell_len(name) for name in (corner, *(name for name, _ in rows)))
    length = heatmap.values.shape[1]
    cell = min(max((width - margin) // max(length, 1), NARROWEST), WIDEST)
    columns = max((width - margin) // cell, 1)
    blocks: list[Table | str] = []
    for start in range(0, length, columns):
        block = range(start, min(start + columns, length))
        wide = margin + cell * len(block)
        table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim", width=wide)
        table.add_column(corner, width=margin, no_wrap=True)
        for column in block:
            table.add_column(str(column), width=cell - 1, justify="right", no_wrap=True)
        for name, cells in rows:
            if name != "source" or any(cells[column].plain for column in block):
                table.add_row(Text(name), *(cells[column] for column in block))
        blocks += ["", table] if start else [table]
    return Group(*blocks)


def headings(heatmap: Heatmap) -> list[tuple[str, list[Text]]]:
    """The lines between the numbers of the columns and the values: a name and what stands in each column."""
    prompt, source, labels = heatmap.prompt_tokens, heatmap.source_tokens, heatmap.column_labels
    lines: list[tuple[str, Sequence[str | None]]]
    if prompt is None:
        numbered = labels == [str(column) for column in range(len(labels))]
        lines = [] if numbered else [(heatmap.column_title.lower(), labels)]
    elif source is None:
        lines = [("prompt", prompt)]
    else:
        other = [None if ours == theirs else theirs for ours, theirs in zip(prompt, source, strict=True)]
        lines = [("prompt", prompt), ("source", other)]
    return [(name, [Text("" if text is None else visible(text), "bold") for text in line]) for name, line in lines]


def table_cells(heatmap: Heatmap, unit: float) -> list[list[Text]]:
    """The content of each cell of each row, in its colour."""
    scale, resolution = heatmap.limit, heatmap.resolution
    numbers = heatmap.numbers.tolist()
    if heatmap.texts is None:
        texts = [[number_text(one / unit, resolution / unit, heatmap.sign) for one in row] for row in numbers]
    else:
        texts = [[visible(text) if text else "" for text in row] for row in heatmap.texts]
    return [
        [
            Text(text, cell_style(0.0 if abs(number) < resolution else number / scale))
            for text, number in zip(*row, strict=True)
        ]
        for row in zip(texts, numbers, strict=True)
    ]


def printed_unit(heatmap: Heatmap) -> float:
    """The power of ten that numbers are printed in: 1 unless all are too small or too large for that."""
    if heatmap.texts is not None or 0.1 <= heatmap.scale < 1000 or heatmap.resolution:
        return 1.0
    return 10.0 ** math.floor(math.log10(heatmap.scale))


def visible(token: str) -> str:
    """A token's text without its leading space, or spelt out where nothing would be seen."""
    text = token.strip()
    return text if text and text.isprintable() else repr(token)[1:-1] if token.strip(" ") else repr(token)


def number_text(value: float, resolution: float = 0.0, sign: str = "+") -> str:
    """``value`` in at most 5 characters, behind ``sign`` if it is positive.

    A dot stands for a value that rounds to zero, ``?`` for no number.
    """
    if math.isnan(value):
        return "?"
    if abs(value) < max(resolution, 0.005):
        return "·"
    forms = [f"{value:{sign}{form}}" for form in (".2f", ".1f", ".0f", ".0e")]
    return next((form for form in forms if len(form) <= 5), forms[-1])


def cell_style(share: float) -> str:
    """The style of a cell whose value is ``share`` (-1 to 1) of the scale."""
    if not abs(share) >= FAINT:  # nan, too
        return "dim"
    share = max(-1.0, min(1.0, share))
    mix = zip(WHITE, BLUE if share > 0 else RED, strict=True)
    red, green, blue = (round(light + (full - light) * abs(share)) for light, full in mix)
    return f"{'white' if abs(share) > 0.6 else 'black'} on rgb({red},{green},{blue})"
