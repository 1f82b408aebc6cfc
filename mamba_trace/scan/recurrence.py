"""The inputs of one mixer call, from which any stretch of positions can be run.

A trace that wants h[5] needs the scan from the start to position 5, then the state, then the scan from the
(edited) state to the end. `Selective` runs such stretches from delta, A, B and C; `Explicit` from A_bar and
B_bar, which is what remains to be done once somebody has edited those. The mixer does not care which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dispatch import explicit_scan, explicit_states, selective_scan, selective_states
from .recompute import recompute
from .reference import read_out


@dataclass
class Recurrence(ABC):
    """A recurrence h_p = a_p h_{p-1} + b_p with outputs y_p = C_p h_p, run on the backend ``kernels``.

    Attributes:
        x: [B,L,E].
        C: [B,L,N].
    """

    x: Tensor
    C: Tensor
    kernels: str = field(default="auto", kw_only=True)

    @abstractmethod
    def run(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions ``start`` to ``stop - 1`` from state ``h`` [B,E,N]: ``(y [B,l,E], h_last [B,E,N])``."""

    @abstractmethod
    def states(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same with the state after each position: ``(y [B,l,E], states [B,l,E,N])``."""

    def read(self, h: Tensor, position: int | slice = slice(None)) -> Tensor:
        """y from states: h [B,E,N] at one position, or [B,L,E,N] at all of them."""
        return read_out(h, self.C[:, position])


@dataclass
class Selective(Recurrence):
    """The recurrence of delta [B,L,E], A [E,N] and B [B,L,N]."""

    delta: Tensor
    A: Tensor
    B: Tensor

    def run(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return selective_scan(*self._stretch(start, stop), h, kernels=self.kernels)

    def states(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return selective_states(*self._stretch(start, stop), h, kernels=self.kernels)

    def _stretch(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        span = slice(start, stop)
        return self.x[:, span], self.delta[:, span], self.A, self.B[:, span], self.C[:, span]


@dataclass
class Explicit(Recurrence):
    """The recurrence of given A_bar and B_bar [B,L,E,N]."""

    A_bar: Tensor
    B_bar: Tensor

    def run(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return explicit_scan(*self._matrices(start, stop), h, kernels=self.kernels)

    def states(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return explicit_states(*self._matrices(start, stop), h, kernels=self.kernels)

    def _matrices(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        span = slice(start, stop)
        return self.A_bar[:, span], self.B_bar[:, span], self.x[:, span], self.C[:, span]


@dataclass
class Watched(Explicit):
    """A selective recurrence whose A_bar and B_bar were handed out, and not edited.

    It runs as ever. Gradients go by way of the matrices, so that theirs can be asked for, and by no other:
    where no matrix takes one, neither do delta, A and B.
    """

    selective: Selective

    def run(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return recompute(
            torch.no_grad()(lambda *matrices: self.selective.run(start, stop, matrices[-1])),
            lambda *matrices: explicit_scan(*matrices, kernels=self.kernels),
            *(*self._matrices(start, stop), h),
        )

    def states(self, start: int, stop: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return recompute(
            torch.no_grad()(lambda *matrices: self.selective.states(start, stop, matrices[-1])),
            lambda *matrices: explicit_states(*matrices, kernels=self.kernels),
            *(*self._matrices(start, stop), h),
        )
