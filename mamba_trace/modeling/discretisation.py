"""The parameters of one scan, from delta_2 to C: made as far as somebody wants to see them, and no further.

The scan kernels never make A_bar or B_bar. A user who wants one of these gets it, and the scan then runs on
what came back. Mamba-1's kernels take delta_2 [B,L,E] and make delta of it themselves; in Mamba-2 it has one
number for each head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..scan import DUAL, HEADED, SELECTIVE, Explicit, Recurrence, ScanFamily, Selective, Watched
from ..scan.elements import rates, softplus
from ..scan.reference import accumulation_dtype, in_dtype
from .offers import Offers
from .past import masked

#: delta_2 of padding: softplus of it is exactly 0, in half precision too.
NO_TIME = -1e4


@dataclass
class Discretisation(ABC):
    """The parameters of one scan while they are offered. Matrices that nobody wants are ``None``.

    Shapes are those of the family: see `sites.SITES`.
    """

    x: Tensor  # the input of the SSM, as the scans of the family take it
    delta_2: Tensor | None  # given up once delta is made
    mask: Tensor | None  # [B,L]
    A_log: Tensor
    B: Tensor
    C: Tensor
    A: Tensor = field(init=False)  # with a batch axis in front where invokes have made it differ
    A_bar: Tensor | None = field(init=False, default=None)
    B_bar: Tensor | None = field(init=False, default=None)
    write: Tensor | None = field(init=False, default=None)  # B_bar x
    edited: bool = field(init=False, default=False)  # whether one of these three was edited
    _delta: Tensor | None = field(init=False, default=None)

    scans: ClassVar[ScanFamily]

    def offer(self, offer: Offers) -> None:
        """Offer delta, A, A_bar, B, B_bar, C and write."""
        delta, _ = offer.optional("delta", lambda: self.delta)
        self._delta = self._delta if delta is None else delta
        # Made no sooner than here: gradients come back in the opposite order.
        self.A = offer("A", self.make_A())
        self.A_bar, A_bar_edited = offer.optional("A_bar", self.make_A_bar)
        self.B = offer("B", self.B)
        self.B_bar, B_bar_edited = offer.optional("B_bar", self.make_B_bar)
        self.C = offer("C", self.C)
        self.write, write_edited = offer.optional("write", self.make_write)
        self.edited = A_bar_edited or B_bar_edited or write_edited

    @property
    def delta(self) -> Tensor:
        """The step sizes in float32 or better. Padding takes no time: a step of 0 neither decays nor writes."""
        if self._delta is None:
            assert self.delta_2 is not None
            dtype = accumulation_dtype(self.delta_2)
            self._delta = masked(self.limited(softplus(in_dtype(self.delta_2, dtype))), self.mask)
            self.delta_2 = None
        return self._delta

    def limited(self, delta: Tensor) -> Tensor:
        """delta within the limits of the mixer."""
        return delta

    def make_A(self) -> Tensor:
        """-exp(A_log) in float32 or better."""
        return rates(self.A_log)

    @abstractmethod
    def steps(self) -> Tensor:
        """What `ScanFamily.gated_scan` takes for its step sizes."""

    def make_A_bar(self) -> Tensor:
        """exp(delta A)."""
        return exponential(self.scans.exponent(self.delta, self.A))

    @abstractmethod
    def make_B_bar(self) -> Tensor:
        """delta B."""

    @abstractmethod
    def make_write(self) -> Tensor:
        """delta B x."""

    def recurrence(self, kernels: str) -> Recurrence:
        """What the scan has to run: the matrices, if somebody edited them."""
        how: Any = {"kernels": kernels, "family": self.scans}
        selective = Selective(self.x, self.C, self.delta, self.A, self.B, **how)
        handed_out = [m for m in (self.A_bar, self.B_bar, self.write) if m is not None]
        # If any input takes a gradient, it comes by way of what was handed out, detached or not.
        inputs = (self.x, self.delta, self.A, self.B, *handed_out)
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if not self.edited and not (handed_out and differentiated):
            return selective
        A_bar = self.make_A_bar() if self.A_bar is None else self.A_bar
        if self.write is not None:  # it is all that reaches the state: B_bar x, whatever the two were
            matrices = (torch.ones_like(self.x), self.C, A_bar, self.write)
        else:
            matrices = (self.x, self.C, A_bar, self.make_B_bar() if self.B_bar is None else self.B_bar)
        if self.edited:
            return Explicit(*matrices, **how)
        return Watched(*matrices, selective, **how)


class SelectiveDiscretisation(Discretisation):
    """Of Mamba-1: x [B,L,E], delta [B,L,E], A [E,N], B and C [B,L,N]."""

    scans = SELECTIVE

    def steps(self) -> Tensor:
        """delta_2 [B,L,E], from which the scan kernels make delta by softplus."""
        assert self.delta_2 is not None
        return masked(self.delta_2, self.mask, NO_TIME)

    def make_B_bar(self) -> Tensor:
        """delta B [B,L,E,N]."""
        delta, B = self.delta.to(self.A.dtype), self.B.to(self.A.dtype)
        return rearrange(delta, "b l e -> b l e 1") * rearrange(B, "b l n -> b l 1 n")

    def make_write(self) -> Tensor:
        """delta B x [B,L,E,N]."""
        B_bar = self.make_B_bar() if self.B_bar is None else self.B_bar
        return B_bar * rearrange(self.x.to(B_bar.dtype), "b l e -> b l e 1")


class HeadedDiscretisation(SelectiveDiscretisation):
    """Of Zamba: as of Mamba-1, with B and C of their own for each head [B,L,H,N]."""

    scans = HEADED

    def make_B_bar(self) -> Tensor:
        """delta B [B,L,E,N]."""
        delta, B = self.delta.to(self.A.dtype), self.B.to(self.A.dtype)
        channels = repeat(B, "b l h n -> b l (h p) n", p=delta.shape[2] // B.shape[2])
        return rearrange(delta, "b l e -> b l e 1") * channels


@dataclass
class DualDiscretisation(Discretisation):
    """Of Mamba-2: x [B,L,H,P], delta [B,L,H], A [H], B and C [B,L,G,N]."""

    limit: tuple[float, float] = (0.0, math.inf)

    scans = DUAL

    def limited(self, delta: Tensor) -> Tensor:
        return delta if self.limit == (0.0, math.inf) else delta.clamp(*self.limit)

    def steps(self) -> Tensor:
        """delta [B,L,H]."""
        return self.delta

    def make_B_bar(self) -> Tensor:
        """delta B [B,L,H,N]."""
        delta, B = self.delta.to(self.A.dtype), self.B.to(self.A.dtype)
        heads = repeat(B, "b l g n -> b l (g e) n", e=delta.shape[2] // B.shape[2])
        return rearrange(delta, "b l h -> b l h 1") * heads

    def make_write(self) -> Tensor:
        """delta B x [B,L,H,P,N]."""
        B_bar = self.make_B_bar() if self.B_bar is None else self.B_bar
        x = rearrange(self.x.to(B_bar.dtype), "b l h p -> b l h p 1")
        return rearrange(B_bar, "b l h n -> b l h 1 n") * x


def exponential(exponent: Tensor) -> Tensor:
    """exp of a tensor that nobody else needs, in its own memory where no gradient is asked for.

    Where one is, the backward pass reads the result of exp, which an edit in place must not touch: it is copied.
    """
    return torch.exp(exponent).clone() if exponent.requires_grad else exponent.exp_()
