"""A fast forward whose backward is that of a slower function with the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import gradients
from .transforms import transformed


def recompute(fast: Callable[..., Any], slow: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """``fast(*inputs)``; where a gradient is needed, it is ``slow``'s, run again in the backward pass.

    Args:
        fast: need not be differentiable.
        slow: differentiable, to any order.
        *inputs: tensors, or ``None`` as either function takes it.
    """
    if transformed():
        return slow(*inputs)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _Recomputed.apply(fast, slow, *inputs)
    return fast(*inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Any, slow: Any, *inputs: Tensor | None) -> Any:
        ctx.slow = slow
        ctx.save_for_backward(*inputs)
        return fast(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no second derivative will be asked for
            inputs = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            results = ctx.slow(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return (None, None, *gradients(results, inputs, grads))
