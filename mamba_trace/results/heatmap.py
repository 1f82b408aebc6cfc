"""What there is to draw: one matrix of numbers with everything that its picture says.

The interactive figure, the PNG and the terminal's table differ in what they can show but must not differ in
what they mean. So the colour scale, the words of a cell, the spelling of labels and the size of the picture
are decided here, once.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.cells import cell_len, set_cell_size
from torch import Tensor

__all__ = ["Heatmap"]

#: Width in terminal columns beyond which a label, or a text inside a cell, is cut.
LONGEST, LONGEST_TEXT = 24, 12
#: Pixels (100 to the inch): the average character, a line of labels, a line of a title, the room for the
#: colour bar and its labels.
CHARACTER, LINE, TITLE_LINE, COLOUR_BAR = 7, 14, 20, 120
#: Pixels between labels at an angle of 45 degrees that do not touch.
SLANTED = 20


class Size(NamedTuple):
    """Pixels for the cells of a picture, and on each side for its title, labels and colour bar.

    ``angle`` is that of the columns' labels: 0 degrees where each is as narrow as its column, else 45 or 90.
    An estimate: plotly and matplotlib lay out the parts, and shrink the cells where a part needs more.
    """

    width: int
    height: int
    left: int
    right: int
    above: int
    below: int
    angle: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Heatmap:
    """A matrix to draw, with its labels and its words.

    Attributes:
        values: [rows, columns], any real dtype. nan marks a cell that was never computed.
        title: the title of the picture; lines are separated by newlines.
        row_title: what the rows are, e.g. ``"layer"``.
        row_labels: one label for each row.
        column_title: what the columns are.
        column_labels: one label for each column.
        texts: what is written inside each cell, e.g. the top token of a lens.
        hover: what each cell says when the mouse points at it, in plain text with newlines. By default the
            row, the column and the value.
        prompt_tokens, source_tokens: the strings of the tokens that the columns stand for, in one run or two.
            They head the terminal's table and appear in the default ``hover``.
        value_title: what the numbers are.
        resolution: values this close to 0 are printed as nothing, and the colour scale never gets finer. For
            numbers of a known size, where anything smaller is rounding.
        saturation: the colours saturate here, or at the largest value if that is larger: for numbers that have a scale
            of their own, so that two pictures of them can be compared.
        signed: whether values may be negative. Colours then diverge from white at 0 to red and blue; for
            norms and probabilities they run from white at 0 to blue.

    Raises:
        ValueError: if there are not as many labels, texts or tokens as rows and columns.

    Example::

        Heatmap(values=torch.eye(2), title="The identity", row_title="row", row_labels=["0", "1"],
                column_title="Column", column_labels=["0", "1"])
    """

    values: Tensor
    title: str
    row_title: str
    row_labels: list[str]
    column_title: str = "Position"
    column_labels: list[str]
    texts: list[list[str]] | None = None
    hover: list[list[str]] | None = None
    prompt_tokens: list[str] | None = None
    source_tokens: list[str] | None = None
    value_title: str = "value"
    resolution: float = 0.0
    saturation: float = 0.0
    signed: bool = True

    def __post_init__(self) -> None:
        """Raise a `ValueError` that names what does not fit."""
        if self.values.dim() != 2:
            raise ValueError(f"a heatmap's values are [rows, columns], not a tensor of shape {[*self.values.shape]}")
        rows, columns = self.values.shape
        for name in ("row_labels", "column_labels", "prompt_tokens", "source_tokens"):
            given = getattr(self, name)
            if given is not None and len(given) != (rows if name == "row_labels" else columns):
                raise ValueError(f"{len(given)} {name} for values of shape [{rows}, {columns}]")
        for name in ("texts", "hover"):
            given = getattr(self, name)
            if given is not None and [len(row) for row in given] != [columns] * rows:
                raise ValueError(f"{name} must hold one string for each of the [{rows}, {columns}] values")

    @property
    def numbers(self) -> Tensor:
        """The values in float64 on the CPU."""
        return self.values.detach().to("cpu", torch.float64)

    @property
    def shades(self) -> Tensor:
        """The values as they are coloured: an infinite value has the colour at the end of the scale."""
        return self.numbers.nan_to_num(nan=math.nan, posinf=self.limit, neginf=-self.limit)

    @property
    def scale(self) -> float:
        """The largest absolute value, of which words and numbers give so many digits."""
        finite = self.numbers[self.numbers.isfinite()].abs()
        return max(finite.max().item() if finite.numel() else 0.0, self.resolution) or 1.0

    @property
    def limit(self) -> float:
        """The absolute value at which colours saturate."""
        return max(self.scale, self.saturation)

    @property
    def sign(self) -> str:
        """What stands before a positive number: nothing where none is negative."""
        return "+" if self.signed else ""

    @property
    def square(self) -> bool:
        """Whether there are as many rows as columns, as for pairs of tokens: cells should then be squares."""
        return len(self.row_labels) == len(self.column_labels) > 1

    @property
    def size(self) -> Size:
        """The size of the picture: comfortable cells, as far as a screen holds them."""
        rows, columns = self.values.shape
        texts = [spelt(text, LONGEST_TEXT) for row in self.texts or [] for text in row]
        cell = max(26 if self.square else 40, CHARACTER * longest(texts) + 8)
        width = min(max(columns * cell, 420), 1300 if self.texts is None else 4000)
        height = min(max(rows * 24, 90, min(8 * len(self.value_title), 200)), 900)
        if self.square:
            width = height = width if self.texts else min(width, 900)
        left = CHARACTER * longest(self.row_labels) + 3 * LINE
        above = TITLE_LINE * len(wrapped(self.title, width + COLOUR_BAR)) + LINE
        label, column = CHARACTER * longest(self.column_labels), width / max(columns, 1)
        angle = 0 if label + LINE <= column else 45 if column >= SLANTED else 90
        below = round(label * math.sin(math.radians(angle))) + 4 * LINE
        return Size(width, height, left, COLOUR_BAR, above, below, angle)

    def hover_texts(self) -> list[list[str]]:
        """What each cell says when the mouse points at it, in plain text."""
        if self.hover is not None:
            return self.hover
        rows = [f"{self.row_title} {spelt(label)}" for label in self.row_labels]
        title, scale, sign = self.column_title.lower(), self.scale, self.sign
        columns = [f"{title} {spelt(label)}\n{self.value_title}" for label in self.column_labels]
        if self.prompt_tokens is not None:
            pairs = zip(self.prompt_tokens, self.source_tokens or self.prompt_tokens, strict=True)
            tokens = [f"token {p!r}" if p == s else f"prompt {p!r}, source {s!r}" for p, s in pairs]
            columns = [f"{title} {at}: {words}\n{self.value_title}" for at, words in enumerate(tokens)]
        return [
            [f"{row}\n{column} {in_words(value, scale, sign)}" for column, value in zip(columns, values, strict=True)]
            for row, values in zip(rows, self.numbers.tolist(), strict=True)
        ]


def in_words(value: float, scale: float, sign: str) -> str:
    """A cell's value, behind ``sign`` if it is positive, to about the 10000th part of ``scale``."""
    if math.isnan(value):
        return "not computed"
    if math.isinf(value) or not 1e-4 <= scale < 1e6:
        return f"{value:{sign}.4g}"
    digits = max(0, 4 - math.floor(math.log10(scale)))
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: never -0.0000


def spelt(text: str, longest: int | None = None, known: Container[int] | None = None) -> str:
    """A label as it is shown, in one line.

    Args:
        text: the label.
        longest: the largest width in terminal columns (a Chinese character takes two). A wider label is cut,
            but keeps the position that it ends in.
        known: the code points of the characters that can be shown; by default all that are printable. Other
            characters are spelt out: a newline is shown as ``\\n``.
    """
    shown = "".join(
        char
        if char == " " or (char.isprintable() and (known is None or ord(char) in known))
        else char.encode("unicode_escape").decode()
        for char in text
    )
    if longest is None or cell_len(shown) <= longest:
        return shown
    token, position = re.fullmatch(r"(.*?)((?:_\d+)?)", shown).groups()  # type: ignore[union-attr]
    return f"{set_cell_size(token, longest - 1 - len(position)).rstrip()}…{position}"


def longest(labels: Sequence[str]) -> int:
    """The width of the widest label as it is shown, in terminal columns."""
    return max((cell_len(spelt(label, LONGEST)) for label in labels), default=0)


def wrapped(title: str, width: int) -> list[str]:
    """The lines of a title, broken where one would be longer than ``width`` pixels. Never empty."""
    room = max(width // 8, 20)
    return [part for line in title.split("\n") for part in textwrap.wrap(line, room) or [""]]


def as_stack(heatmaps: Heatmap | Sequence[Heatmap]) -> list[Heatmap]:
    """One or several heatmaps as a list. Raises `ValueError` if there are none."""
    stack = [heatmaps] if isinstance(heatmaps, Heatmap) else list(heatmaps)
    if not stack:
        raise ValueError("there is no heatmap to draw; give at least one")
    return stack
