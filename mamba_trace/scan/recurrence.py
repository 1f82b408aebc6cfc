"""The inputs of one mixer call, from which any stretch of positions can be run.

A trace that wants h[5] needs the scan from the start to position 5, then the state, then the scan from the
(edited) state to the end. `Selective` runs such stretches from delta, A, B and C; `Explicit` from A_bar and
B_bar, which is what remains to be done once somebody has edited those. The mixer does not care which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import explicit_scan, read_out, selective_scan


@dataclass
class Recurrence(ABC):
    """A recurrence h_p = a_p h_{p-1} + b_p with outputs y_p = C_p h_p.

    Attributes:
        x: [B,L,E].
        C: [B,L,N].
    """

    x: Tensor
    C: Tensor

    @abstractmethod
    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``start`` to ``stop - 1`` from state ``h`` [B,E,N]: ``(y [B,l,E], h_last [B,E,N])``."""

    def states(self, start: int, stop: int, h: Tensor) -> Tensor:
        """The state after each position from ``start`` to ``stop - 1``, from state ``h``: [B,l,E,N]."""
        trajectory = []
        for position in range(start, stop):
            _, h = self.run(position, position + 1, h)
            trajectory.append(h)
        return torch.stack(trajectory, dim=1) if trajectory else h.new_zeros(h.shape[0], 0, *h.shape[1:])

    def read(self, h: Tensor, position: int | slice = slice(None)) -> Tensor:
        """y from states: h [B,E,N] at one position, or [B,L,E,N] at all of them."""
        return read_out(h, self.C[:, position])


@dataclass
class Selective(Recurrence):
    """The recurrence of delta [B,L,E], A [E,N] and B [B,L,N]."""

    delta: Tensor
    A: Tensor
    B: Tensor

    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        span = slice(start, stop)
        return selective_scan(
            self.x[:, span], self.delta[:, span], self.A, self.B[:, span], self.C[:, span], h
        )


@dataclass
class Explicit(Recurrence):
    """The recurrence of given A_bar and B_bar [B,L,E,N]."""

    A_bar: Tensor
    B_bar: Tensor

    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        span = slice(start, stop)
        return explicit_scan(self.A_bar[:, span], self.B_bar[:, span], self.x[:, span], self.C[:, span], h)
