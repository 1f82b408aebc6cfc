"""Heatmaps of every size and shape that the tests of the drawings share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mamba_trace.results.heatmap import Heatmap

WORDS = ["Lately", ",", " Emma", " and", " Shelby", " had", " fun", " at", " school", ".", " <|endoftext|>"]
NAN, INF = math.nan, math.inf


def picture(values: Any, **changes: Any) -> Heatmap:
    """A heatmap of values, rows by columns, whose columns are tokens."""
    values = torch.as_tensor(values)
    rows, columns = values.shape
    labels = [f"{WORDS[column % len(WORDS)]}_{column}" for column in range(columns)]
    settings: dict[str, Any] = {
        "title": "A title",
        "row_title": "layer",
        "row_labels": [str(row) for row in range(rows)],
        "column_labels": labels,
    }
    return Heatmap(values=values, **(settings | changes))


def shaped(rows: int, columns: int, **changes: Any) -> Heatmap:
    generator = torch.Generator().manual_seed(rows)
    return picture(torch.randn(rows, columns, generator=generator), **changes)


def square(size: int) -> Heatmap:
    heatmap = shaped(size, size)
    return shaped(size, size, row_labels=heatmap.column_labels, row_title="reading position")


def lens(rows: int, columns: int) -> Heatmap:
    texts = [[WORDS[(row + column) % len(WORDS)] for column in range(columns)] for row in range(rows)]
    return shaped(rows, columns, texts=texts)


SIZES: dict[str, list[Heatmap]] = {
    "1x15": [shaped(1, 15, value_title="normalised metric")],
    "first label": [shaped(8, 15, column_labels=["a_very_long_first_token_0", *map(str, range(14))])],
    "8x1": [shaped(8, 1)],
    "8x15": [shaped(8, 15)],
    "24x17": [shaped(24, 17)],
    "64x300": [shaped(64, 300)],
    "17x17": [square(17)],
    "120x120": [square(120)],
    "lens 9x15": [lens(9, 15)],
    "three": [shaped(8, 15, title="two\nlines"), square(17), lens(9, 15)],
}
every_size = pytest.mark.parametrize("heatmaps", SIZES.values(), ids=SIZES.keys())
