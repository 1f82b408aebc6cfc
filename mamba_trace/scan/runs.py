"""Rows that are several runs, one behind the other: nothing goes from one run to the next.

All rows have the same runs, and a run starts from the same state and the same columns in every row. So linear layers
and norms see one long row, with nothing to pad, and only the convolution and the scan look at the runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: The inputs of `ScanFamily.gated_scan` before h_start that have positions.
_POSITIONS = (True, True, False, True, True, False, True)


@dataclass(frozen=True)
class Runs:
    """Where the runs of a row are.

    Attributes:
        lengths: how many positions each has.

    Example::

        Runs((3, 2)).spans  # (slice(0, 3), slice(3, 5))
    """

    lengths: tuple[int, ...]

    @functools.cached_property
    def spans(self) -> tuple[slice, ...]:
        """The positions of each run."""
        return tuple(slice(*edges) for edges in pairwise(accumulate(self.lengths, initial=0)))

    @functools.cached_property
    def begins(self) -> Tensor:
        """The first position of each run [runs]: in float32, as a kernel takes it."""
        return torch.tensor([span.start for span in self.spans], dtype=torch.float32, device="cpu")

    def joined(self, parts: Iterable[Tensor]) -> Tensor:
        """One behind the other, what each run has [B,l,...]: [B,L,...]."""
        parts = iter(parts)
        first = next(parts)
        whole = first.new_empty(len(first), self.spans[-1].stop, *first.shape[2:])
        for span, part in zip(self.spans, chain((first,), parts), strict=True):
            whole[:, span] = part
        return whole


def gated_runs(scan: Callable[..., tuple[Tensor, Tensor]], *inputs: Any, kernels: str = "auto") -> Tensor:
    """A family's ``gated_scan`` of each run by itself; see `ScanFamily.gated_runs`."""
    *inputs_of_rows, starts, runs = inputs
    rows = len(inputs_of_rows[0])

    def run(number: int) -> Tensor:
        span = runs.spans[number]
        own = [each[:, span] if cut else each for each, cut in zip(inputs_of_rows, _POSITIONS, strict=True)]
        start = starts[number].expand(rows, *starts.shape[1:])
        return scan(*own, start, kernels=kernels)[0]

    return runs.joined(map(run, range(len(runs.spans))))


def causal_conv_runs(
    backend: ModuleType, x_in: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, runs: Runs, activate: bool
) -> Tensor:
    """A backend's ``causal_conv`` of each run by itself, after the columns ``starts`` [runs,channels,K]."""
    if (fast := getattr(backend, "causal_conv_runs", None)) is not None:
        return fast(x_in, weight, bias, starts, runs, activate=activate)
    before = [start.expand(len(x_in), *start.shape) for start in starts]
    pairs = zip(runs.spans, before, strict=True)
    return runs.joined(backend.causal_conv(x_in[:, span], weight, bias, b, activate=activate) for span, b in pairs)
