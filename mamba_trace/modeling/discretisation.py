"""The parameters of one scan, from delta_2 to C: made as far as somebody wants to see them, and no further.

The scan kernels take delta_2, make delta of it themselves, and never make A_bar or B_bar [B,L,E,N]. Whoever
wants one of these gets it, and then the scan runs on what came back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scan import Explicit, Recurrence, Selective, Watched
from ..scan.reference import accumulation_dtype
from .offers import Offers
from .past import masked, offered

#: delta_2 of padding: softplus of it is exactly 0, in half precision too.
NO_TIME = -1e4


@dataclass
class Discretisation:
    """The parameters of one scan while they are offered.

    Attributes:
        x: input of the SSM [B,L,E].
        delta_2: [B,L,E]; given up once delta is made.
        mask: attention mask [B,L], or ``None``.
        B, C: [B,L,N].
        A_log: [E,N].
        A: [E,N], or [B,E,N] where invokes have made it differ.
        A_bar, B_bar: [B,L,E,N], or ``None`` where nobody wants them.
        write: B_bar x [B,L,E,N], or ``None`` where nobody wants it.
        seen: the first of delta, A_bar, B_bar and write that somebody wanted.
        edited: whether A_bar, B_bar or write was edited.
    """

    x: Tensor
    delta_2: Tensor | None
    mask: Tensor | None
    A_log: Tensor
    B: Tensor
    C: Tensor
    A: Tensor = field(init=False)
    A_bar: Tensor | None = None
    B_bar: Tensor | None = None
    write: Tensor | None = None
    seen: str | None = None
    edited: bool = False
    _delta: Tensor | None = None

    def offer(self, offer: Offers) -> None:
        """Offer delta, A, A_bar, B, B_bar, C and write."""
        delta, _ = self._optional(offer, "delta")
        self._delta = self._delta if delta is None else delta
        # Made no sooner than here: gradients come back in the opposite order.
        self.A = offer("A", -torch.exp(self.A_log.to(accumulation_dtype(self.A_log))))
        self.A_bar, A_bar_edited = self._optional(offer, "A_bar")
        self.B = offered(offer, "B", self.B, self.mask)
        self.B_bar, B_bar_edited = self._optional(offer, "B_bar")
        self.C = offered(offer, "C", self.C, self.mask)
        self.write, write_edited = self._optional(offer, "write")
        self.edited = A_bar_edited or B_bar_edited or write_edited

    def _optional(self, offer: Offers, name: str) -> tuple[Tensor | None, bool]:
        makers = {"A_bar": self.make_A_bar, "B_bar": self.make_B_bar, "write": self.make_write}
        value, edited = offer.optional(name, makers.get(name, lambda: self.delta))
        if value is not None:
            self.seen = self.seen or name
            if edited:  # padding decays nothing and writes nothing, whatever was put there
                value = masked(value, self.mask, 1.0 if name == "A_bar" else 0.0)
        return value, edited

    @property
    def delta(self) -> Tensor:
        """[B,L,E] in float32 or better. Padding takes no time: a step of 0 neither decays nor writes."""
        if self._delta is None:
            assert self.delta_2 is not None
            dtype = accumulation_dtype(self.delta_2)
            self._delta = masked(F.softplus(self.delta_2.to(dtype)), self.mask)
            self.delta_2 = None
        return self._delta

    def before_softplus(self) -> Tensor:
        """delta_2 [B,L,E], of which softplus is delta."""
        assert self.delta_2 is not None
        if self.mask is None:
            return self.delta_2
        return self.delta_2.masked_fill(self.mask[..., None] == 0, NO_TIME)

    def make_A_bar(self) -> Tensor:
        """exp(delta A) [B,L,E,N]."""
        A = self.A
        A_bar = torch.exp(self.delta.to(A.dtype)[..., None] * (A[:, None] if A.dim() == 3 else A))
        # The backward pass of exp reads its result, which an edit in place must not touch.
        return A_bar.clone() if A_bar.requires_grad else A_bar

    def make_B_bar(self) -> Tensor:
        """delta B [B,L,E,N]."""
        dtype = self.A.dtype
        return self.delta.to(dtype)[..., None] * self.B.to(dtype)[:, :, None, :]

    def make_write(self) -> Tensor:
        """delta B x [B,L,E,N]."""
        B_bar = self.make_B_bar() if self.B_bar is None else self.B_bar
        return B_bar * self.x.to(B_bar.dtype)[..., None]

    def recurrence(self, kernels: str) -> Recurrence:
        """What the scan has to run: the matrices, if somebody edited them."""
        selective = Selective(self.x, self.C, self.delta, self.A, self.B, kernels=kernels)
        handed_out = [m for m in (self.A_bar, self.B_bar, self.write) if m is not None]
        # Whatever takes a gradient, its way leads through what was handed out, detached or not.
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
            return Explicit(*matrices, kernels=kernels)
        return Watched(*matrices, selective, kernels=kernels)
