"""The inputs of one mixer call, from which any stretch of positions can be run.

A trace that wants h[5] needs the scan from the start to position 5, then the state, then the scan from the
(edited) state to the end. `Selective` runs such stretches from delta, A, B and C; `Explicit` from A_bar and
B_bar, which is what remains to be done once somebody has edited those. The mixer does not care which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import selective_scan, selective_states
from .reference import explicit_scan, gradients, read_out


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

    def states(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the state after each position: ``(y [B,l,E], states [B,l,E,N])``."""
        y, trajectory = [], []
        for position in range(start, stop):
            out, h = self.run(position, position + 1, h)
            y.append(out)
            trajectory.append(h)
        if not y:
            return self.run(start, start, h)[0], h.new_zeros(h.shape[0], 0, *h.shape[1:])
        return torch.cat(y, dim=1), torch.stack(trajectory, dim=1)

    def read(self, h: Tensor, position: int | slice = slice(None)) -> Tensor:
        """y from states: h [B,E,N] at one position, or [B,L,E,N] at all of them."""
        return read_out(h, self.C[:, position])


@dataclass
class Selective(Recurrence):
    """The recurrence of delta [B,L,E], A [E,N] and B [B,L,N], on the backend ``kernels``."""

    delta: Tensor
    A: Tensor
    B: Tensor
    kernels: str = field(default="auto", kw_only=True)

    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*self._stretch(start, stop), h, kernels=self.kernels)

    def states(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        return selective_states(*self._stretch(start, stop), h, kernels=self.kernels)

    def _stretch(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        span = slice(start, stop)
        return self.x[:, span], self.delta[:, span], self.A, self.B[:, span], self.C[:, span]


@dataclass
class Watched(Selective):
    """A `Selective` recurrence whose A_bar and B_bar [B,L,E,N] were handed out, and not edited.

    It runs as ever. Gradients go by way of the matrices, so that theirs can be asked for.
    """

    A_bar: Tensor
    B_bar: Tensor

    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        if start == stop:
            return super().run(start, stop, h)
        span = slice(start, stop)
        matrices = self.A_bar[:, span], self.B_bar[:, span], self.x[:, span], self.C[:, span], h
        return _ThroughMatrices.apply(super().run, start, stop, *matrices)

    def states(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        return Recurrence.states(self, start, stop, h)  # by way of `run`, and so of the matrices


class _ThroughMatrices(torch.autograd.Function):
    """Any run forwards; backwards, the gradient of `explicit_scan` on the given matrices."""

    @staticmethod
    def forward(ctx: Any, run: Any, start: int, stop: int, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*matrices)
        return run(start, stop, matrices[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        matrices = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            return (None, None, None, *gradients(explicit_scan(*matrices), matrices, grads))
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in matrices]
            results = explicit_scan(*leaves)
        return (None, None, None, *gradients(results, leaves, grads))


@dataclass
class Explicit(Recurrence):
    """The recurrence of given A_bar and B_bar [B,L,E,N]."""

    A_bar: Tensor
    B_bar: Tensor

    def run(self, start: int, stop: int, h: Tensor) -> tuple[Tensor, Tensor]:
        span = slice(start, stop)
        return explicit_scan(self.A_bar[:, span], self.B_bar[:, span], self.x[:, span], self.C[:, span], h)
