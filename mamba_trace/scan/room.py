"""Memory that a sweep's layers share, one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Room:
    """Memory for the values of a layer, which those of the next layer overwrite.

    Where a value has tens of megabytes, the operating system gives and takes back its memory each time, page by page.

    Args:
        rows: the largest batch. Layers may have fewer rows.

    Example::

        room = Room(rows=24)
        room.take("y", (3, 100, 8), rows=3)  # [3,100,8]
        room.take("y", (4, 100, 8), rows=4)  # the same memory
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], rows: int) -> Tensor:
        """A tensor in float32 on the CPU for the value ``name`` of a batch of some ``rows``; it may hold anything."""
        count = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = torch.empty(count * max(self.rows, rows) // rows, dtype=torch.float32, device="cpu")
        return self.kept[name][:count].view(shape)
