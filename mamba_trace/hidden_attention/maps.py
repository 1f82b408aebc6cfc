"""What the functions of hidden attention return: numbers for pairs of tokens, which draw themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..results.heatmap import Heatmap
from ..results.result import Result

#: What the numbers are, in words, by how the attention matrices of several channels are reduced.
MEASURES = {"mean": "mean of alpha", "abs_mean": "mean of |alpha|", None: "alpha"}
NORM = "norm of alpha x"
PATTERN = "mean of the pattern"
#: Those of them that are never negative.
UNSIGNED = (MEASURES["abs_mean"], NORM, PATTERN)


@dataclass(frozen=True, eq=False)
class TokenPairs(Result):
    """A number for every pair of a token that reads and a token that is read.

    Attributes:
        values: [rows, columns], or [rows, columns, channels or heads]; 0 where the column is after the row.
        layer: the layer.
        measure: what the numbers are, in words.
        channels: the channels of d_inner that they cover, ascending.
        rows: the positions i that read, ascending.
        columns: the positions j that are read, ascending.
        tokens: the string of the token at each position of the prompt.
        heads: in Mamba-2 the heads whose channels they are, ascending, and the last axis of ``values`` if it has
            three; ``None`` in Mamba-1, and where channels were asked for by other means than by head.
    """

    values: Tensor
    layer: int
    measure: str
    channels: list[int]
    rows: list[int]
    columns: list[int]
    tokens: list[str]
    heads: list[int] | None = None
    _title: ClassVar[str]

    def heatmaps(self) -> list[Heatmap]:
        """One picture: each row's number for each column; the mean over channels where they were kept.

        Example::

            hidden_attention(model, prompt, 1).heatmaps()[0].values  # [L,L]
        """
        apart = self.values.dim() == 3
        measure = f"mean of {self.measure}" if apart else self.measure
        unit, count = ("channel", len(self.channels)) if self.heads is None else ("head", len(self.heads))
        title = f"{self._title}, layer {self.layer}\n{measure}, {count} {unit}{'s' * (count != 1)}"
        return [drawn(self, self.values.mean(-1) if apart else self.values, title, measure)]


@dataclass(frozen=True, eq=False)
class HiddenAttention(TokenPairs):
    """The result of `hidden_attention`: alpha[i,j]. See `TokenPairs`."""

    _title = "Hidden attention"


@dataclass(frozen=True, eq=False)
class Contributions(TokenPairs):
    """The result of `contributions`: the part of y_i that comes from x_j. See `TokenPairs`."""

    _title = "Contributions to y"


@dataclass(frozen=True, eq=False)
class AttentionMaps(Result):
    """The result of `attention_maps`: a map for each SSM and each attention, in execution order.

    Attributes:
        values: [maps, rows, columns]; 0 where the column is after the row.
        layers: the layer of each map.
        kinds: ``"SSM"`` or ``"attention"``, for each map.
        measures: what the numbers of each map are, in words.
        rows: the positions i that read, ascending.
        columns: the positions j that are read, ascending.
        tokens: the string of the token at each position of the prompt.
    """

    values: Tensor
    layers: list[int]
    kinds: list[str]
    measures: list[str]
    rows: list[int]
    columns: list[int]
    tokens: list[str]

    def heatmaps(self) -> list[Heatmap]:
        """A picture for each map, with its layer and kind as the title.

        Example::

            attention_maps(model, prompt).heatmaps()[0].title  # "Layer 0, SSM\\nmean of alpha"
        """
        maps = zip(self.values, self.layers, self.kinds, self.measures, strict=True)
        return [
            drawn(self, values, f"Layer {layer}, {kind}\n{measure}", measure) for values, layer, kind, measure in maps
        ]


def drawn(result: TokenPairs | AttentionMaps, values: Tensor, title: str, measure: str) -> Heatmap:
    """The picture of numbers [rows, columns] for the pairs of tokens of a result."""
    rows, columns = (labelled(result.tokens, positions) for positions in (result.rows, result.columns))
    return Heatmap(
        values=values,
        title=title,
        row_title="token that reads",
        row_labels=rows,
        column_title="Token that is read",
        column_labels=columns,
        value_title=measure,
        signed=measure not in UNSIGNED,
    )


def labelled(tokens: list[str], positions: list[int]) -> list[str]:
    """A label for each position: its token and its number."""
    return [f"{tokens[position]}_{position}" for position in positions]
