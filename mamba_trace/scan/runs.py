"""Rows that are several runs, one behind the other: nothing goes from one run to the next.

All rows have the same runs, and a run starts from the same state and the same columns in every row. So linear layers
and norms see one long row, with nothing to pad, and only the convolution and the scan look at the runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .room import Room

#: The inputs of `ScanFamily.gated_scan` before h_start that have positions.
_POSITIONS = (True, True, False, True, True, False, True)
#: How many rows a kernel that knows of no runs is given at once, if a call has fewer: each run is then a row.
TOGETHER = 64


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

    def as_rows(self, rows: int) -> Iterator[AsRows]:
        """The runs in groups, each run of which is to be a row of its own, where there are some ``rows``."""
        many = max(1, TOGETHER // rows)
        for first in range(0, len(self.lengths), many):
            yield AsRows(self.spans[first : first + many], slice(first, first + many))


@dataclass(frozen=True)
class AsRows:
    """Neighbouring runs as rows of their own, the shorter ones padded at their ends.

    Attributes:
        spans: the positions of each.
        numbers: which of all runs they are.
    """

    spans: tuple[slice, ...]
    numbers: slice

    @functools.cached_property
    def _at(self) -> Tensor:
        longest = max(span.stop - span.start for span in self.spans)
        edges = torch.tensor([(span.start, span.stop - 1) for span in self.spans], device="cpu")
        steps = torch.arange(longest, device="cpu")
        return torch.minimum(edges[:, :1] + steps, edges[:, 1:])  # [runs,longest]: past its end, the last again

    def cut(self, value: Tensor) -> Tensor:
        """The rows [B runs,longest,...] of ``value`` [B,L,...]."""
        if len(self.spans) == 1:
            return value[:, self.spans[0]]
        return value[:, self._at.to(value.device)].flatten(0, 1)

    def of_each(self, starts: Tensor, rows: int) -> Tensor:
        """What each row starts from [B runs,...], of ``starts`` [all runs,...]."""
        own = starts[self.numbers]
        return own.expand(rows, *own.shape).flatten(0, 1)

    def parts(self, result: Tensor, rows: int) -> Iterator[Tensor]:
        """The runs of ``result`` [B runs,longest,...] [B,l,...]."""
        for span, part in zip(self.spans, result.unflatten(0, (rows, -1)).unbind(1), strict=True):
            yield part[:, : span.stop - span.start]


def gated_runs(
    scan: Callable[..., tuple[Tensor, Tensor]], *inputs: Any, kernels: str = "auto", room: Room | None = None
) -> Tensor:
    """`ScanFamily.gated_runs` by the family's ``gated_scan``, which knows of no runs, nor of ``room``."""
    *of_rows, starts, runs = inputs
    rows = len(of_rows[0])

    def parts() -> Iterator[Tensor]:
        for group in runs.as_rows(rows):
            own = [group.cut(each) if cut else each for each, cut in zip(of_rows, _POSITIONS, strict=True)]
            gated, _ = scan(*own, group.of_each(starts, rows), kernels=kernels)
            yield from group.parts(gated, rows)

    return runs.joined(parts())


def causal_conv_runs(
    backend: ModuleType, x_in: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, runs: Runs, activate: bool
) -> Tensor:
    """A backend's ``causal_conv`` in all runs, after the columns ``starts`` [runs,channels,K]."""
    if (fast := getattr(backend, "causal_conv_runs", None)) is not None:
        return fast(x_in, weight, bias, starts, runs, activate=activate)
    rows = len(x_in)

    def parts() -> Iterator[Tensor]:
        for group in runs.as_rows(rows):
            before = group.of_each(starts, rows)
            yield from group.parts(backend.causal_conv(group.cut(x_in), weight, bias, before, activate=activate), rows)

    return runs.joined(parts())
