"""States that are handed out one by one where gradients are recorded, of positions that are run in one go.

The gradient of h_p is what reaches it from whoever holds it, from y_p, and A_bar_{p+1} times the gradient of h_{p+1}.
That product is all that is left for each position by itself. What follows from these gradients for x, delta, A and B
is found for all positions at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .recompute import differentiated, gradients_of, transformed

Decays = Callable[[], Tensor]


class Links:
    """Positions of a recurrence that were run in one go.

    Args:
        scan: ``(*inputs, h) -> (y, h_last)``, differentiable in all of them.
        inputs: of each position by itself.
        y: their outputs [B,l,...].
        states: the state after each of them [B,l,...,N], with the gradients of what the position itself adds to it.
        decays: gives what the state before each is multiplied by, with as many axes as ``states``.

    Attributes:
        y, states: the same without gradients.
    """

    def __init__(
        self, scan: Callable[..., Any], inputs: Sequence[Sequence[Tensor]], y: Tensor, states: Tensor, decays: Decays
    ) -> None:
        self.y, self.states = y.detach(), states.detach()
        self._scan, self._inputs, self._decays = scan, inputs, functools.cache(decays)
        self._own = states.unbind(1)

    def state(self, place: int, before: Tensor) -> Tensor:
        """The state after one of the positions [B,...,N], which anybody may write to, given the one before it."""
        return _Link.apply(self._scan, self._decays, place, self._own[place], before, *self._inputs[place])


def read_each(
    read: Callable[[Tensor, Tensor], Tensor], C: Tensor, y: Tensor, states: Sequence[Tensor], whole: Tensor | None
) -> Tensor:
    """y [B,l,...] of single positions, with the gradients of ``read(states, C)``.

    Args:
        read: `ScanFamily.read_out`.
        C: of the positions [B,l,...,N].
        y: that of the same values.
        states: after each position [B,...,N].
        whole: the same values in one tensor [B,l,...,N], where there is one.
    """

    def read_now(C: Tensor, *states: Tensor) -> Tensor:
        return read(torch.stack(states, dim=1), C)

    if transformed():
        return read_now(C, *states)
    return _Read.apply(read, read_now, y, whole, C, *states) if differentiated(C, *states) else y


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: Any, read_now: Any, y: Tensor, whole: Any, C: Tensor, *states: Tensor) -> Tensor:
        ctx.read, ctx.read_now, ctx.whole = read, read_now, whole
        ctx.save_for_backward(C, *states)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        C, *states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, None, None, *gradients_of(ctx.read_now, (C, *states), grads))
        whole = torch.stack(states, dim=1) if ctx.whole is None else ctx.whole
        of_states, of_C = gradients_of(ctx.read, (whole.detach().requires_grad_(), C), grads)
        assert of_states is not None
        return (None, None, None, None, of_C, *of_states.unbind(1))


class _Link(torch.autograd.Function):
    """A state, of which what the position itself adds is differentiated elsewhere, but for higher derivatives."""

    @staticmethod
    def forward(
        ctx: Any, scan: Any, decays: Decays, place: int, own: Tensor, before: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.scan, ctx.decays, ctx.place = scan, decays, place
        ctx.save_for_backward(*inputs, before)
        return own.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        if not torch.is_grad_enabled():
            others = [None] * (len(ctx.needs_input_grad) - 5)
            return (None, None, None, grad, grad * ctx.decays()[:, ctx.place], *others)
        *of_inputs, of_before = gradients_of(ctx.scan, ctx.saved_tensors, (None, grad))
        return (None, None, None, None, of_before, *of_inputs)
