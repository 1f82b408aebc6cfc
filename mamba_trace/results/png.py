"""Heatmaps as a PNG file, one above the other, without a display, a browser or matplotlib's global state.

matplotlib reads a dollar sign as the beginning of a formula and draws an empty box for a character that its
font lacks, so labels are spelt in what it can show.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .files import optional, replacing
from .heatmap import Heatmap, spelt
from .layout import BAR, BAR_GAP, LONGEST, Panel, stacked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points: 11 and 14 pixels of 100 to the inch.
SMALL, LARGE = 8, 10
BLANK = (0.75, 0.75, 0.75)
#: The share of the scale from which a cell is so dark that its text is white.
DARK = 0.6


def write_png(heatmaps: Heatmap | Sequence[Heatmap], path: str | Path) -> None:
    """Draw the heatmaps into a PNG file.

    Args:
        heatmaps: one or several, which are stacked, each with its own title and colour scale.
        path: where to. A file that is there is replaced at once, when the new one is complete.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        ValueError: if there are none.
        FileError: if the file cannot be written.

    Example::

        write_png(grid.heatmaps(), "h.png")
    """
    figure = static_figure(heatmaps)
    with replacing(Path(path)) as file:
        figure.savefig(file, dpi=150, format="png", bbox_inches="tight", pad_inches=0.1)


def static_figure(heatmaps: Heatmap | Sequence[Heatmap]) -> Figure:
    """The heatmaps as a matplotlib figure."""
    drawing, stack = optional("matplotlib.figure", "a PNG"), stacked(heatmaps)
    figure = drawing.Figure(figsize=(stack.width / 100, stack.height / 100), dpi=100)
    known = characters_of_font()

    def axes(left: float, top: float, width: float, height: float) -> Any:
        bottom = stack.height - top - height
        return figure.add_axes(
            (left / stack.width, bottom / stack.height, width / stack.width, height / stack.height)
        )

    for heatmap, panel, top in zip(stack.heatmaps, stack.panels, stack.tops, strict=True):
        cells = axes(stack.left, top, panel.width, panel.height)
        bar = axes(stack.left + panel.width + BAR_GAP, top, BAR, panel.height)
        draw(cells, bar, heatmap, panel, known)
    return figure


def draw(cells: Any, bar: Any, heatmap: Heatmap, panel: Panel, known: Container[int]) -> None:
    """Draw one heatmap into its axes, and its colour bar into others."""
    scale, plain = heatmap.scale, partial(literal, known=known)
    colours = optional("matplotlib", "a PNG").colormaps["RdBu"].with_extremes(bad=BLANK)
    image = cells.imshow(
        heatmap.shades.numpy(), cmap=colours, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest"
    )
    labels = [plain(label, LONGEST) for label in panel.columns.labels]
    cells.set_xticks(panel.columns.places, labels, rotation=45, ha="right", rotation_mode="anchor")
    cells.set_yticks(panel.rows.places, [plain(label, LONGEST) for label in panel.rows.labels])
    cells.tick_params(labelsize=SMALL)
    cells.set_xlabel(plain(heatmap.column_title[:1].upper() + heatmap.column_title[1:]), fontsize=LARGE)
    cells.set_ylabel(plain(heatmap.row_title[:1].upper() + heatmap.row_title[1:]), fontsize=LARGE)
    cells.set_title("\n".join(plain(line) for line in panel.title), fontsize=LARGE, loc="left")
    if heatmap.texts is not None and panel.room:
        texts = [[plain(text, panel.room) for text in row] for row in heatmap.texts]
        write_texts(cells, texts, heatmap.shades / scale)
    values = cells.figure.colorbar(image, cax=bar)
    values.set_label(plain(heatmap.value_title), fontsize=LARGE)
    values.formatter.set_powerlimits((-2, 4))
    bar.tick_params(labelsize=SMALL)
    bar.yaxis.get_offset_text().set(size=SMALL, horizontalalignment="left")


def write_texts(cells: Any, texts: list[list[str]], shares: Tensor) -> None:
    """Write texts into cells whose values are ``shares`` (-1 to 1) of the scale."""
    for row, (line, values) in enumerate(zip(texts, shares.tolist(), strict=True)):
        for column, (text, share) in enumerate(zip(line, values, strict=True)):
            colour = "white" if abs(share) > DARK else "black"
            cells.text(column, row, text, ha="center", va="center", color=colour, fontsize=SMALL)


def characters_of_font() -> Container[int]:
    """The code points that matplotlib's font has. For others it draws an empty box, with a warning."""
    fonts: Any = optional("matplotlib.font_manager", "a PNG")
    return fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap()


def literal(text: str, longest: int | None = None, *, known: Container[int]) -> str:
    """Text that matplotlib shows as it is: a dollar sign begins no formula."""
    return spelt(text, longest, known).replace("$", r"\$")
