"""A value without a batch axis in a batch of several invokes.

nnsight hands each invoke its rows of a value. A, of shape [E,N], has none, so an edit by one invoke would
reach all of them. Here every invoke gets a copy of its own, and what goes on has a batch axis if they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class PerInvoke:
    """Stands in for nnsight's batcher while such a value is served.

    Args:
        value: the value, the same for every invoke.
        interleaver: the running interleaver, whose workers say which rows are whose.
    """

    batching = True

    def __init__(self, value: Tensor, interleaver: Any) -> None:
        self.shared = value
        groups = (mediator.batch_group for mediator in interleaver.mediators)
        self.groups = sorted({tuple(group) for group in groups if group is not None})
        self.own: dict[int, Tensor] = {}

    def narrow(self, value: Any, group: list[int] | None) -> Any:
        """The copy of the invoke with rows ``group``; a worker on the whole batch sees the shared value."""
        if not isinstance(value, Tensor):
            return value
        if group is None:
            return self.shared
        if group[0] not in self.own:
            self.own[group[0]] = self.shared.clone()
        return self.own[group[0]]

    def widen(self, value: Any, group: list[int] | None, edited: Any) -> Any:
        """Keep what an invoke assigned as its own."""
        if group is None:
            self.shared = edited
        else:
            self.own[group[0]] = edited
        return value

    def gather_skip(self, value: Any, group: list[int] | None, replacement: Any) -> Any:
        """A skipped site has the replacement for its value."""
        return self.widen(replacement, group, replacement)

    def assemble_skip(self, value: Any) -> Any:
        """Nothing was gathered."""
        return value

    def merged(self) -> Tensor:
        """The value that goes on: the shared one, or [B,...] if an invoke has edited its own."""
        if not self.edited:
            return self.shared
        rows = [self.own[start] if self._edited(start) else self.shared for start, _ in self.groups]
        sizes = [size for _, size in self.groups]
        return torch.cat([row.expand(size, *row.shape) for row, size in zip(rows, sizes, strict=True)])

    @property
    def edited(self) -> bool:
        """Whether an invoke has edited its own."""
        return any(self._edited(start) for start, _ in self.groups)

    def _edited(self, start: int) -> bool:
        own = self.own.get(start)
        if own is None:
            return False
        return isinstance(own, FakeTensor) or own.requires_grad or not torch.equal(own, self.shared)
