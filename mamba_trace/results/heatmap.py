"""What there is to draw: one matrix of numbers with everything that its picture says.

The drawings differ in what they can show, and must not differ in what they mean, so the colour scale, the
words of a cell and the spelling of labels are decided here, once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass

import torch
from rich.cells import cell_len, set_cell_size
from torch import Tensor

#: What a cell without a number says.
NOT_COMPUTED = "not computed"


@dataclass(frozen=True, eq=False, kw_only=True)
class Heatmap:
    """A matrix to draw, its labels and its words.

    Attributes:
        values: [rows, columns], any real dtype. nan is a cell that was never computed.
        title: of the figure; lines are separated by newlines.
        row_title: what the rows are, e.g. ``"layer"``.
        row_labels: one for each row.
        column_title: what the columns are.
        column_labels: one for each column.
        texts: what is written inside each cell, e.g. the top token of a lens.
        hover: what each cell says when pointed at, in plain text whose lines are separated by newlines. By
            default the row, the column and the value.
        prompt_tokens, source_tokens: the strings of the tokens that the columns stand for, in one run or two.
            They head the terminal's table and are in the default ``hover``.
        value_title: what the numbers are.
        resolution: values this close to 0 print as nothing, and the scale never gets finer: for numbers whose
            size is known, so that what is left is rounding.

    Raises:
        ValueError: if the labels, texts or tokens are not as many as the rows and columns.

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

    def __post_init__(self) -> None:
        """Raise a `ValueError` that names what does not fit."""
        if self.values.dim() != 2:
            raise ValueError(
                f"a heatmap's values are [rows, columns], not a tensor of shape {[*self.values.shape]}"
            )
        rows, columns = self.values.shape
        for name, expected in (
            ("row_labels", rows),
            ("column_labels", columns),
            ("prompt_tokens", columns),
            ("source_tokens", columns),
        ):
            given = getattr(self, name)
            if given is not None and len(given) != expected:
                raise ValueError(f"{len(given)} {name} for values of shape [{rows}, {columns}]")
        for name in ("texts", "hover"):
            given = getattr(self, name)
            if given is not None and [len(row) for row in given] != [columns] * rows:
                raise ValueError(f"{name} must hold one string for each of the [{rows}, {columns}] values")

    @property
    def numbers(self) -> list[list[float]]:
        """The values as plain numbers."""
        return self.values.detach().to("cpu", torch.float64).tolist()

    @property
    def shades(self) -> Tensor:
        """The values as they are coloured, float64 on the CPU: an infinity is at the end of the scale."""
        values = self.values.detach().to("cpu", torch.float64)
        return values.nan_to_num(nan=math.nan, posinf=self.scale, neginf=-self.scale)

    @property
    def scale(self) -> float:
        """The value at which colours saturate, in either direction."""
        finite = self.values.detach()[self.values.isfinite()].double()
        largest = finite.abs().max().item() if finite.numel() else 0.0
        return max(largest, self.resolution) or 1.0

    @property
    def square(self) -> bool:
        """Whether there are as many rows as columns, token by token, say, so that cells should be squares."""
        return len(self.row_labels) == len(self.column_labels) > 1

    def hover_texts(self) -> list[list[str]]:
        """What each cell says when pointed at, in plain text."""
        if self.hover is not None:
            return self.hover
        rows = [f"{self.row_title} {spelt(label)}" for label in self.row_labels]
        columns = [self.place(column) for column in range(len(self.column_labels))]
        scale = self.scale
        return [
            [
                f"{row}\n{column}\n{self.value_title} {in_words(value, scale)}"
                for column, value in zip(columns, values, strict=True)
            ]
            for row, values in zip(rows, self.numbers, strict=True)
        ]

    def place(self, column: int) -> str:
        """A column in words, e.g. ``"position 10: prompt ' Shelby', source ' Emma'"``."""
        title = self.column_title.lower()
        if self.prompt_tokens is None:
            return f"{title} {spelt(self.column_labels[column])}"
        ours = self.prompt_tokens[column]
        theirs = ours if self.source_tokens is None else self.source_tokens[column]
        tokens = f"token {ours!r}" if ours == theirs else f"prompt {ours!r}, source {theirs!r}"
        return f"{title} {column}: {tokens}"


def in_words(value: float, scale: float) -> str:
    """A cell's value with its sign, to about the 10000th part of ``scale``."""
    if math.isnan(value):
        return NOT_COMPUTED
    if math.isinf(value) or not 1e-4 <= scale < 1e6:
        return f"{value:+.4g}"
    digits = max(0, 4 - math.floor(math.log10(scale)))
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: never -0.0000


def spelt(text: str, longest: int | None = None, known: Container[int] | None = None) -> str:
    """A label as it is shown, in one line.

    Args:
        text: the label.
        longest: how wide it may be, in characters (those of Chinese, say, count as two). A longer one is cut,
            but for the position that it ends in.
        known: the code points of the characters that can be shown; all that are printable by default. Others
            are spelt out: a newline is ``\\n``.
    """
    shown = "".join(
        one
        if one == " " or (one.isprintable() and (known is None or ord(one) in known))
        else one.encode("unicode_escape").decode()
        for one in text
    )
    if longest is None or cell_len(shown) <= longest:
        return shown
    token, position = re.fullmatch(r"(.*?)((?:_\d+)?)", shown).groups()  # type: ignore[union-attr]
    return f"{set_cell_size(token, longest - 1 - len(position)).rstrip()}…{position}"
