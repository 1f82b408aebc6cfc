"""A heatmap as a table of coloured text, for a shell without a screen. It can be read without the colours."""

from __future__ import annotations

import math

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from .heatmap import Heatmap, spelt
from .layout import LONGEST

#: The ends of the colour scale, those of the RdBu scale of plotly and matplotlib.
RED, WHITE, BLUE = (178, 24, 43), (247, 247, 247), (33, 102, 172)
NARROWEST, WIDEST = 6, 9  # columns of a cell, the gap included
#: The share of the scale under which a cell is not painted.
FAINT = 0.005


def terminal_table(heatmap: Heatmap, width: int = 120) -> Text:
    """The heatmap as coloured text, in as many blocks of columns as ``width`` makes necessary.

    Args:
        heatmap: what to print; the texts of its cells, or its numbers where it has none.
        width: columns of the terminal.

    Returns:
        A `rich.text.Text`. A dot is a value that rounds to zero, a question mark one that was never computed;
        numbers that are all small or large are in the unit that the corner names.

    Example::

        rich.print(terminal_table(heatmap, width=80))
    """
    length = heatmap.values.shape[1]
    names = [f"{heatmap.row_title} {spelt(label, LONGEST)}" for label in heatmap.row_labels]
    heads = headings(heatmap)
    margin = max(cell_len(name) for name in [*names, *heads]) + 1
    cell = min(max((width - margin) // max(length, 1), NARROWEST), WIDEST)
    columns = max((width - margin) // cell, 1)
    cells = table_cells(heatmap)
    lines: list[Text] = []
    for start in range(0, length, columns):
        if start:
            lines.append(Text())
        block = slice(start, start + columns)
        for name, row in [*heads.items(), *zip(names, cells, strict=True)]:
            if name != "source" or any(content for content, _ in row[block]):
                lines.append(table_line(set_cell_size(name, margin), row[block], cell))
    return Text("\n").join(lines)


def headings(heatmap: Heatmap) -> dict[str, list[tuple[str, str]]]:
    """The lines above the values: (content, style) of each cell, by the name in the margin."""
    numbers = [str(column) for column in range(len(heatmap.column_labels))]
    unit = printed_unit(heatmap)
    rows = {"" if unit == 1 else f"x {unit:.0e}": [(number, "dim") for number in numbers]}
    ours, theirs = heatmap.prompt_tokens, heatmap.source_tokens
    if ours is not None:
        rows["prompt"] = [(visible(token), "bold") for token in ours]
        if theirs is not None:
            pairs = zip(ours, theirs, strict=True)
            rows["source"] = [(visible(their) if their != our else "", "bold") for our, their in pairs]
    elif heatmap.column_labels != numbers:
        rows[heatmap.column_title.lower()] = [(visible(label), "bold") for label in heatmap.column_labels]
    return rows


def table_cells(heatmap: Heatmap) -> list[list[tuple[str, str]]]:
    """(content, style) of each cell of each row."""
    unit, scale, resolution = printed_unit(heatmap), heatmap.scale, heatmap.resolution
    rows = []
    for row, values in enumerate(heatmap.numbers):
        if heatmap.texts is None:
            contents = [number_text(value / unit, resolution / unit) for value in values]
        else:
            contents = [visible(text) if text else "" for text in heatmap.texts[row]]
        styles = [cell_style(0.0 if abs(value) < resolution else value / scale) for value in values]
        rows.append(list(zip(contents, styles, strict=True)))
    return rows


def printed_unit(heatmap: Heatmap) -> float:
    """The power of ten that numbers are printed in: 1 unless all are too small or too large for that."""
    if heatmap.texts is not None or 0.1 <= heatmap.scale < 1000 or heatmap.resolution:
        return 1.0
    return 10.0 ** math.floor(math.log10(heatmap.scale))


def table_line(name: str, cells: list[tuple[str, str]], width: int) -> Text:
    """One line: cells of ``width`` columns, of which the first is a gap, content to the right."""
    line = Text(name)
    for content, style in cells:
        fitted = set_cell_size(content, min(cell_len(content), width - 1))
        line.append(" " * (width - cell_len(fitted)) + fitted, style=style)
    return line


def visible(token: str) -> str:
    """A token's text without its leading space, or spelt out where nothing would be seen."""
    text = token.strip()
    return text if text and text.isprintable() else repr(token)[1:-1] if token.strip(" ") else repr(token)


def number_text(value: float, resolution: float = 0.0) -> str:
    """``value`` with its sign in at most 5 characters; a dot where it rounds to zero, ``?`` for no number."""
    if math.isnan(value):
        return "?"
    if abs(value) < max(resolution, 0.005):
        return "·"
    forms = (f"{value:+.2f}", f"{value:+.1f}", f"{value:+.0f}", f"{value:+.0e}")
    return next((form for form in forms if len(form) <= 5), forms[-1])


def cell_style(share: float) -> str:
    """The style of a cell whose value is ``share`` (-1 to 1) of the scale."""
    if not abs(share) >= FAINT:  # nan, too
        return "dim"
    share = max(-1.0, min(1.0, share))
    end = BLUE if share > 0 else RED
    mix = zip(WHITE, end, strict=True)
    red, green, blue = (round(light + (full - light) * abs(share)) for light, full in mix)
    return f"{'white' if abs(share) > 0.6 else 'black'} on rgb({red},{green},{blue})"
