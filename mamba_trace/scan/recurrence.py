"""The inputs of one mixer call, from which any stretch of positions can be run.

A trace that asks for h[5] needs the scan from the start to position 5, then the state, then the scan from the
(possibly edited) state to the end. `Selective` runs such stretches from delta, A, B and C. `Explicit` runs
them from A_bar and B_bar, which is needed once somebody has edited those. The mixer does not need to know
which of the two it has.

A `Recurrence` has one axis of batch rows and one of positions; nothing outside depends on the axes of its
state, and it runs the scans of either family (`family`). The shapes below are those of the selective family; those
of the dual family stand in its `reference`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .family import SELECTIVE, ScanFamily
from .links import Links, read_each
from .recompute import differentiated, recompute, transformed

Pair = tuple[Tensor, Tensor]

#: Of how many short stretches each may be cut out of a tensor by itself, where gradients are recorded.
FEW = 8


class Stretched:
    """A tensor [B,L,...] that is cut into stretches of positions.

    The backward pass of a stretch that is cut out by itself fills a tensor of all L positions with zeros. So where
    gradients are recorded, the tensor is cut into single positions at once as soon as a few stretches have been taken.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.taken = whole, 0
        self.single: tuple[Tensor, ...] = ()

    def __call__(self, start: int, stop: int) -> Tensor:
        """The positions ``start`` to ``stop - 1``."""
        few = self.taken < FEW or (stop - start) * FEW >= self.whole.shape[1]
        if few or start == stop or not differentiated(self.whole):
            self.taken += 1
            return self.whole[:, start:stop]
        self.single = self.single or _Singles.apply(self.whole)
        return self.single[start] if stop - start == 1 else torch.cat(self.single[start:stop], dim=1)


class _Singles(torch.autograd.Function):
    """A tensor [B,L,...] as its L positions [B,1,...], the gradients of which need not all be there."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return whole.split(1, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        some = next((grad for grad in grads if grad is not None), None)
        return None if some is None else torch.cat([some.new_zeros(some.shape) if g is None else g for g in grads], 1)


@dataclass
class Recurrence(ABC):
    """A recurrence h_p = a_p h_{p-1} + b_p with outputs y_p = C_p h_p.

    Attributes:
        x: [B,L,E].
        C: [B,L,N].
        family: whose scans run.
        kernels: the backend to run them on, or ``"auto"``.
    """

    x: Tensor
    C: Tensor
    family: ScanFamily = field(default=SELECTIVE, kw_only=True)
    kernels: str = field(default="auto", kw_only=True)
    cuts: dict[str, Stretched] = field(default_factory=dict, init=False, repr=False)

    #: The arguments of `scan` but for the state, in its order.
    INPUTS: ClassVar[tuple[str, ...]]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The `INPUTS` of all positions."""
        return tuple(getattr(self, name) for name in self.INPUTS)

    def inputs(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """The `INPUTS` of positions ``start`` to ``stop - 1``."""
        return tuple(getattr(self, name) if name == "A" else self.cut(name, start, stop) for name in self.INPUTS)

    @property
    @abstractmethod
    def scan(self) -> Callable[..., Pair]:
        """``(*INPUTS, h) -> (y, h_last)``, differentiable in all of them."""

    @torch.no_grad()
    def decays(self, start: int, stop: int, axes: int) -> Tensor:
        """A_bar of positions ``start`` to ``stop - 1``, with as many axes as states [B,l,...,N] have."""
        A_bar = self._A_bar(start, stop)
        return A_bar.view(*A_bar.shape, *[1] * (axes - A_bar.dim()))

    @abstractmethod
    def _A_bar(self, start: int, stop: int) -> Tensor: ...

    def links(self, start: int, stop: int, h: Tensor) -> Links | None:
        """Run them where gradients are recorded and each state is handed out; ``None`` where that is not possible."""
        if transformed() or not self._one_A():
            return None
        h, inputs = h.detach(), self.inputs(start, stop)
        with torch.no_grad():
            y, found = self.states(start, stop, h)

        def one_by_one(*inputs: Tensor) -> Tensor:  # each position as a row, which begins at the state before it
            before = torch.cat((h[:, None], found[:, :-1]), dim=1).flatten(0, 1)
            rows = (t if name == "A" else t.flatten(0, 1)[:, None] for name, t in zip(self.INPUTS, inputs, strict=True))
            return self.scan(*rows, before)[1].view_as(found)

        states = recompute(lambda *_: found.view_as(found), one_by_one, *inputs)
        pairs = zip(self.INPUTS, inputs, strict=True)
        columns = ([t] * (stop - start) if name == "A" else t.split(1, dim=1) for name, t in pairs)
        return Links(self.scan, [*zip(*columns, strict=True)], y, states, lambda: self.decays(start, stop, h.dim() + 1))

    def _one_A(self) -> bool:
        return True

    def cut(self, name: str, start: int, stop: int) -> Tensor:
        """Positions ``start`` to ``stop - 1`` of one of its tensors [B,L,...], by its name."""
        if name not in self.cuts:
            self.cuts[name] = Stretched(getattr(self, name))
        return self.cuts[name](start, stop)

    @abstractmethod
    def run(self, start: int, stop: int, h: Tensor | None) -> Pair:
        """Run positions ``start`` to ``stop - 1`` from state ``h``: ``(y [B,l,E], h_last [B,E,N])``."""

    @abstractmethod
    def states(self, start: int, stop: int, h: Tensor | None) -> Pair:
        """Run them and keep the state after each position: ``(y [B,l,E], states [B,l,E,N])``."""

    def read(self, h: Tensor, position: int | slice = slice(None)) -> Tensor:
        """Compute y from states: h [B,E,N] at one position, or [B,l,E,N] at several."""
        C = self.C[:, position] if isinstance(position, slice) else self.cut("C", position, position + 1)[:, 0]
        return self.family.read_out(h, C)

    def read_each(
        self, start: int, y: Sequence[Tensor], states: Sequence[Tensor], whole: Tensor | None = None
    ) -> Tensor:
        """y [B,l,...] of single positions from ``start`` on, with the gradients of their states.

        Args:
            start: the first of them.
            y: of each [B,1,...].
            states: after each [B,...,N].
            whole: the same values in one tensor [B,l,...,N], where there is one.
        """
        C = self.C[:, start : start + len(states)]
        return read_each(self.family.read_out, C, torch.cat([*y], dim=1), states, whole)


@dataclass
class Selective(Recurrence):
    """The recurrence of delta [B,L,E], A [E,N] and B [B,L,N]."""

    delta: Tensor
    A: Tensor
    B: Tensor

    INPUTS = ("x", "delta", "A", "B", "C")

    def run(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self.scan(*self.inputs(start, stop), h)

    def states(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self.family.selective_states(*self.inputs(start, stop), h, kernels=self.kernels)

    @property
    def scan(self) -> Callable[..., Pair]:
        return functools.partial(self.family.selective_scan, kernels=self.kernels)

    def _one_A(self) -> bool:
        return self.A.dim() == self.family.axes_of_A

    def _A_bar(self, start: int, stop: int) -> Tensor:
        return self.family.exponent(self.delta[:, start:stop], self.A).exp_()


@dataclass
class Explicit(Recurrence):
    """The recurrence of given A_bar and B_bar [B,L,E,N]."""

    A_bar: Tensor
    B_bar: Tensor

    INPUTS = ("A_bar", "B_bar", "x", "C")

    def run(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self.scan(*self.inputs(start, stop), h)

    def states(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self.family.explicit_states(*self.inputs(start, stop), h, kernels=self.kernels)

    @property
    def scan(self) -> Callable[..., Pair]:
        return functools.partial(self.family.explicit_scan, kernels=self.kernels)

    def _A_bar(self, start: int, stop: int) -> Tensor:
        return self.A_bar[:, start:stop]


@dataclass
class Watched(Explicit):
    """A selective recurrence whose A_bar and B_bar were handed out to somebody who did not edit them.

    Its values are those of the selective scan. Its gradients pass through the matrices only, so that one can
    ask for the gradients of the matrices. Where no matrix takes a gradient, delta, A and B take none either.
    """

    selective: Selective

    def run(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self._by_matrices(self.selective.run, self.family.explicit_scan, start, stop, h)

    def states(self, start: int, stop: int, h: Tensor | None) -> Pair:
        return self._by_matrices(self.selective.states, self.family.explicit_states, start, stop, h)

    def _by_matrices(
        self, fast: Callable[..., Pair], slow: Callable[..., Pair], start: int, stop: int, h: Tensor | None
    ) -> Pair:
        return recompute(
            torch.no_grad()(lambda *matrices: fast(start, stop, matrices[-1])),
            lambda *matrices: slow(*matrices, kernels=self.kernels),
            *(*self.inputs(start, stop), h),
        )
