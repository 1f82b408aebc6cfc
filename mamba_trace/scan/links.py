"""States that are handed out one by one where gradients are recorded, of positions that are run in one go.

The gradient of h_p is what reaches it from whoever holds it, from y_p, and A_bar_{p+1} times the gradient of h_{p+1}.
That product is all that is left for each position by itself. What follows for x, delta, A and B is found for all
positions at once, by the backward pass of one scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .recompute import gradients_of

Decays = Callable[[], Tensor]


class Links:
    """Positions of a recurrence that were run in one go.

    Args:
        scan: ``(*inputs, h) -> (y, h_last)``, differentiable in all of them.
        inputs: of each position by itself.
        y: their outputs [B,l,...].
        states: the state after each of them [B,l,...,N], with the gradients of all but the state before the first.
        decays: gives what the state before each is multiplied by, with as many axes as ``states``.

    Attributes:
        y, states: the same without gradients.
    """

    def __init__(
        self, scan: Callable[..., Any], inputs: Sequence[Sequence[Tensor]], y: Tensor, states: Tensor, decays: Decays
    ) -> None:
        self.y, self.states = y.detach(), states.detach()
        self._scan, self._inputs, self._decays = scan, inputs, functools.cache(decays)
        self._own = _Own.apply(states, self._decays).unbind(1)

    def state(self, place: int, before: Tensor) -> Tensor:
        """The state after one of the positions [B,...,N], which anybody may write to, given the one before it."""
        return _Link.apply(self._scan, self._decays, place, self._own[place], before, *self._inputs[place])


class _Own(torch.autograd.Function):
    """States [B,l,...,N] that take gradients in which those of the states after them are counted already."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, decays: Decays) -> Tensor:
        ctx.decays = decays
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        alone = grad.clone()
        alone[:, :-1].addcmul_(ctx.decays()[:, 1:], grad[:, 1:], value=-1)
        return alone, None


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
