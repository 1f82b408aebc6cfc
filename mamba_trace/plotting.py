"""Pictures of a layers x positions grid: an interactive figure, a PNG, and a table for the terminal.

A patching sweep is read at a glance or not at all, so all three show the same thing: one row per layer, layer
0 on top, one column per position labelled with its token, and colours from red (negative) through white (0)
to blue (positive) on one scale that is symmetric about 0.

plotly draws the figure and matplotlib the PNG (plotly's own PNG export needs a Chrome); both are optional
and imported when first used. The table needs rich alone, and can be read without colours.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from torch import Tensor

from .errors import FileError, MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: The file endings a grid can be saved under.
SUFFIXES = (".html", ".png", ".json")
#: Values this close to 0 print as nothing, and scales never get finer: what is left is rounding.
NOISE = 0.005
#: The ends of the terminal's colour scale, those of the RdBu scale of plotly and matplotlib.
RED, WHITE, BLUE = (178, 24, 43), (247, 247, 247), (33, 102, 172)
NARROWEST, WIDEST = 6, 9  # columns of a cell in the terminal, the gap included


@dataclass(frozen=True)
class Heatmap:
    """What there is to draw.

    Attributes:
        values: [rows, L], in one of torch's floating dtypes.
        title: of the figure; its lines are separated by newlines.
        row_title: what the rows are, e.g. ``"layer"``.
        row_labels: one for each row.
        labels: one for each position, all different.
        prompt_tokens, source_tokens: the token strings at each position in the two runs.
    """

    values: Tensor
    title: str
    row_title: str
    row_labels: list[str]
    labels: list[str]
    prompt_tokens: list[str]
    source_tokens: list[str]

    @property
    def scale(self) -> float:
        """The value at which colours saturate, in either direction."""
        largest = self.values.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if self.values.numel() else 0.0
        return max(largest, NOISE)


def check_writable(path: str | Path) -> Path:
    """``path``, if a grid can be saved there: to be asked before the hours that lead to the grid.

    Raises:
        FileError: if the suffix is none of `SUFFIXES`, the folder does not exist, or the file cannot be
            opened for writing. A file that is there is left as it is; none is made.
        MissingExtraError: if the library that writes this kind of file is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise FileError(
            f"{path}: a grid is saved as {', '.join(SUFFIXES)}, not {path.suffix or 'without a suffix'}"
        )
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}; create it first")
    try_opening(path)
    if path.suffix == ".html":
        optional("plotly.graph_objects", "an interactive figure")
    if path.suffix == ".png":
        optional("matplotlib.figure", "a PNG")
    return path


def try_opening(path: Path) -> None:
    """Open a file for appending and leave everything as it was.

    Permissions alone do not tell: the file system may be read-only, the name too long or a folder's.

    Raises:
        FileError: if it cannot be opened, with the system's reason.
    """
    try:
        file = path.resolve()  # where a symbolic link leads, so that it is not the link that is removed
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be written: {reason}. Choose another place") from error


def optional(name: str, purpose: str) -> ModuleType:
    """Import a module of the ``plot`` extra.

    Raises:
        MissingExtraError: if it is not installed, with the line that installs it.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'mamba_trace[plot]'") from error


# -- plotly ------------------------------------------------------------------------------------------------


def plotly_figure(heatmap: Heatmap) -> Figure:
    """The grid as an interactive plotly figure.

    Raises:
        MissingExtraError: if plotly is not installed.
    """
    go: Any = optional("plotly.graph_objects", "an interactive figure")
    trace = go.Heatmap(
        z=heatmap.values.tolist(),
        colorscale="RdBu",
        zmin=-heatmap.scale,
        zmid=0,
        zmax=heatmap.scale,
        text=hover_texts(heatmap),
        hoverinfo="text",
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(trace)
    figure.update_layout(title=literal(heatmap.title).replace("\n", "<br>"))
    figure.update_xaxes(
        title="Position", tickangle=-45, **ticks([literal(label) for label in heatmap.labels])
    )
    rows = heatmap.row_title.capitalize()
    figure.update_yaxes(title=rows, autorange="reversed", **ticks(heatmap.row_labels))
    return figure


def ticks(labels: list[str]) -> dict[str, Any]:
    """Axis settings that put ``labels`` at 0, 1, 2, ..., thinned out where there are more than fit."""
    step = -(-len(labels) // 64)
    return {"tickmode": "array", "tickvals": list(range(0, len(labels), step)), "ticktext": labels[::step]}


def hover_texts(heatmap: Heatmap) -> list[list[str]]:
    """What each cell says when pointed at."""
    rows = [f"{heatmap.row_title} {label}" for label in heatmap.row_labels]
    places = []
    for position, (ours, theirs) in enumerate(zip(heatmap.prompt_tokens, heatmap.source_tokens, strict=True)):
        tokens = f"token {ours!r}" if ours == theirs else f"prompt {ours!r}, source {theirs!r}"
        places.append(f"position {position}: {literal(tokens)}")
    return [
        [
            f"{row}<br>{place}<br>value {round(value, 4) + 0.0:+.4f}"
            for place, value in zip(places, values, strict=True)
        ]
        for row, values in zip(rows, heatmap.values.tolist(), strict=True)
    ]


def literal(text: str) -> str:
    """Text that plotly shows as it is: ``<|endoftext|>`` is no markup."""
    return html.escape(text, quote=False)


# -- matplotlib --------------------------------------------------------------------------------------------


def write_png(heatmap: Heatmap, path: Path) -> None:
    """Draw the grid into a PNG file. No display, browser or global state of matplotlib's is involved.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    rows, length = heatmap.values.shape
    size = (min(3 + 0.55 * length, 60), min(2.8 + 0.35 * rows, 60))
    figure = optional("matplotlib.figure", "a PNG").Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        heatmap.values.numpy(),
        cmap="RdBu",
        vmin=-heatmap.scale,
        vmax=heatmap.scale,
        aspect="auto",
        interpolation="nearest",
    )
    along, down = ticks(heatmap.labels), ticks(heatmap.row_labels)
    # A dollar sign would begin a formula.
    plain = [label.replace("$", r"\$").replace("\n", r"\n") for label in along["ticktext"]]
    axes.set_xticks(along["tickvals"], plain, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(down["tickvals"], down["ticktext"])
    axes.set_xlabel("Position")
    axes.set_ylabel(heatmap.row_title.capitalize())
    axes.set_title(heatmap.title.replace("$", r"\$"), fontsize="medium")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)


# -- the terminal ------------------------------------------------------------------------------------------


def terminal_table(heatmap: Heatmap, width: int = 120) -> Text:
    """The grid as coloured text, in as many blocks of columns as ``width`` makes necessary.

    Args:
        heatmap: the grid.
        width: columns of the terminal.

    Returns:
        A `rich.text.Text`. A dot is a value that rounds to zero.

    Example::

        rich.print(terminal_table(heatmap, width=80))
    """
    length = heatmap.values.shape[1]
    names = [f"{heatmap.row_title} {label}" for label in heatmap.row_labels]
    margin = max(len(name) for name in [*names, "prompt", "source"]) + 1
    cell = min(max((width - margin) // max(length, 1), NARROWEST), WIDEST)
    columns = max((width - margin) // cell, 1)
    lines: list[Text] = []
    for start in range(0, length, columns):
        if start:
            lines.append(Text())
        block = range(start, min(start + columns, length))
        rows = table_rows(heatmap, names, block)
        lines += [table_line(name.ljust(margin), cells, cell) for name, cells in rows]
    return Text("\n").join(lines)


def table_rows(heatmap: Heatmap, names: list[str], block: range) -> list[tuple[str, list[tuple[str, str]]]]:
    """One block of columns: (name, [(content, style) of each cell]) of each line."""
    ours, theirs = heatmap.prompt_tokens, heatmap.source_tokens
    rows = [
        ("", [(str(position), "dim") for position in block]),
        ("prompt", [(visible(ours[position]), "bold") for position in block]),
    ]
    different = [visible(theirs[p]) if theirs[p] != ours[p] else "" for p in block]
    if any(different):
        rows.append(("source", [(token, "bold") for token in different]))
    for name, values in zip(names, heatmap.values.tolist(), strict=True):
        shown = (values[position] for position in block)
        rows.append((name, [(number_text(value), cell_style(value / heatmap.scale)) for value in shown]))
    return rows


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


def number_text(value: float) -> str:
    """``value`` with its sign in at most 5 characters; a dot where it rounds to zero."""
    if abs(value) < NOISE:
        return "·"
    forms = (f"{value:+.2f}", f"{value:+.1f}", f"{value:+.0f}", f"{value:+.0e}")
    return next((form for form in forms if len(form) <= 5), forms[-1])


def cell_style(share: float) -> str:
    """The style of a cell whose value is ``share`` (-1 to 1) of the scale."""
    if not abs(share) >= NOISE:  # nan, too
        return "dim"
    share = max(-1.0, min(1.0, share))
    end = BLUE if share > 0 else RED
    mix = zip(WHITE, end, strict=True)
    red, green, blue = (round(light + (full - light) * abs(share)) for light, full in mix)
    return f"{'white' if abs(share) > 0.6 else 'black'} on rgb({red},{green},{blue})"
