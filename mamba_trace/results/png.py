"""Heatmaps as a PNG file, one above the other, without a display, a browser or matplotlib's global state.

matplotlib lays the figure out, but draws every label that it is given, so of a long axis it gets every k-th.
It reads a dollar sign as the beginning of a formula and draws an empty box for a character that its font
lacks, so labels are spelt in what it can show.
"""

from __future__ import annotations

import io
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import optional, replacing
from .heatmap import CHARACTER, LINE, LONGEST, SLANTED, Heatmap, Size, as_stack, spelt, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["png_bytes", "write_png"]

#: Points: 11 and 14 pixels of 100 to the inch.
SMALL, LARGE = 8, 10
#: The colour of a cell without a number.
BLANK = (0.75, 0.75, 0.75)
#: The share of the scale above which a cell is so dark that its text is white.
DARK = 0.6


def write_png(heatmaps: Heatmap | Sequence[Heatmap], path: str | Path) -> None:
    """Draw the heatmaps into a PNG file.

    Args:
        heatmaps: one or several; several are stacked, each with its own title and colour scale.
        path: where to write. An existing file is replaced at once, when the new one is complete.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ValueError: if there are no heatmaps.
        FileError: if the file cannot be written.

    Example::

        write_png(grid.heatmaps(), "h.png")
    """
    figure = static_figure(heatmaps)
    with replacing(Path(path)) as file:
        figure.savefig(file, dpi=150, format="png")


def png_bytes(heatmaps: Heatmap | Sequence[Heatmap]) -> bytes:
    """The same picture as `write_png` draws, in fewer pixels, as the content of a PNG file.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ValueError: if there are no heatmaps.

    Example::

        png_bytes(grid.heatmaps())[:4]  # b"\\x89PNG"
    """
    content = io.BytesIO()
    static_figure(heatmaps).savefig(content, format="png")
    return content.getvalue()


def static_figure(heatmaps: Heatmap | Sequence[Heatmap]) -> Figure:
    """The heatmaps as a matplotlib figure."""
    stack = as_stack(heatmaps)
    sizes = [heatmap.size for heatmap in stack]
    width = max(size.left + size.width + size.right for size in sizes)
    height = sum(size.above + size.height + size.below for size in sizes)
    drawing: Any = optional("matplotlib.figure", "a PNG")
    figure = drawing.Figure(figsize=(width / 100, height / 100), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)  # inches
    rows = figure.subplots(len(stack), squeeze=False, height_ratios=[size.height for size in sizes])[:, 0]
    known = characters_of_font()
    for cells, heatmap, size in zip(rows, stack, sizes, strict=True):
        draw(cells, heatmap, size, known)
    return figure


def draw(cells: Any, heatmap: Heatmap, size: Size, known: Container[int]) -> None:
    """Draw one heatmap and its colour bar."""
    scale, plain = heatmap.limit, partial(literal, known=known)
    name, least = ("RdBu", -scale) if heatmap.signed else ("Blues", 0)
    colours = optional("matplotlib", "a PNG").colormaps[name].with_extremes(bad=BLANK)
    aspect = "equal" if heatmap.square else "auto"
    shades = heatmap.shades.numpy()
    image = cells.imshow(shades, cmap=colours, vmin=least, vmax=scale, aspect=aspect, interpolation="nearest")
    cells.set_anchor("W")  # squares stand at the left, under their title and those of other pictures
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if size.angle else {}
    for labels, set_ticks, most in (
        (heatmap.column_labels, partial(cells.set_xticks, **turned), size.width / SLANTED),
        (heatmap.row_labels, cells.set_yticks, size.height / LINE),
    ):
        some = range(0, len(labels), max(1, -int(-len(labels) // most)))
        set_ticks(some, [plain(labels[at], LONGEST) for at in some])
    cells.tick_params(labelsize=SMALL)
    cells.set_xlabel(plain(heatmap.column_title[:1].upper() + heatmap.column_title[1:]), fontsize=LARGE)
    cells.set_ylabel(plain(heatmap.row_title[:1].upper() + heatmap.row_title[1:]), fontsize=LARGE)
    title = "\n".join(plain(line) for line in wrapped(heatmap.title, size.width + size.right))
    cells.set_title(title, fontsize=LARGE, loc="left")
    room = int(size.width / max(shades.shape[1], 1) / CHARACTER)
    if heatmap.texts is not None and room >= 3:
        for row, (texts, shares) in enumerate(zip(heatmap.texts, (shades / scale).tolist(), strict=True)):
            for column, (text, share) in enumerate(zip(texts, shares, strict=True)):
                colour = "white" if abs(share) > DARK else "black"
                place = {"ha": "center", "va": "center", "color": colour, "fontsize": SMALL}
                cells.text(column, row, plain(text, room), **place)
    beside = cells.inset_axes((1 + 12 / size.width, 0, 14 / size.width, 1))
    bar = cells.figure.colorbar(image, cax=beside, label=plain(heatmap.value_title))
    beside.tick_params(labelsize=SMALL)
    bar.formatter.set_powerlimits((-2, 4))


def characters_of_font() -> Container[int]:
    """The code points that matplotlib's font has. For others it draws an empty box, with a warning."""
    fonts: Any = optional("matplotlib.font_manager", "a PNG")
    return fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap()


def literal(text: str, longest: int | None = None, *, known: Container[int]) -> str:
    """Text that matplotlib shows as it is: a dollar sign begins no formula."""
    return spelt(text, longest, known).replace("$", r"\$")
