"""Gradients of kernels: by a slower function with the same meaning, and where no kernel can run at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active.

    `torch.func.grad`, `jvp` and `vmap`, and forward-mode differentiation, hand out tensors without memory of
    their own, which no compiled kernel can take. They know PyTorch's own operations, in which `reference` is
    written.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_memory(*tensors: Tensor | None) -> bool:
    """Whether the memory of each tensor holds its numbers, so that a kernel may read them there.

    It does not in a tensor of another class, in one that stands for zeros or for the negative of another, in a sparse
    or nested one, and in a batch of gradients (``is_grads_batched``).
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg() or tensor._is_zerotensor():
            return False
        key = _KEYS.get(tensor.device.type)
        if key is not None and not torch._C._dispatch_keys(tensor).has(key):
            return False
    return True


#: The key that a dense tensor has, by the type of its device. Sparse and nested ones and batches have others.
_KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}


def differentiated(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def recompute(fast: Callable[..., Any], slow: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """``fast(*inputs)``, with the gradients of ``slow``, which is run in the backward pass.

    Args:
        fast: need not be differentiable. It runs where all inputs are `in_memory`.
        slow: differentiable, to any order.
        *inputs: tensors, or ``None`` where both functions take it.
    """
    if transformed() or not (torch.compiler.is_compiling() or in_memory(*inputs)):
        return slow(*inputs)
    return _Recomputed.apply(fast, slow, *inputs) if differentiated(*inputs) else fast(*inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Any, slow: Any, *inputs: Tensor | None) -> Any:
        ctx.slow = slow
        ctx.save_for_backward(*inputs)
        return fast(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *gradients_of(ctx.slow, ctx.saved_tensors, grads))


def gradients_of(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of ``run(*inputs)``, computed now; differentiable again where gradients are enabled.

    Args:
        run: gives one tensor or several.
        inputs: its arguments.
        grads: the gradients of its results; ``None`` for one that takes none.

    Returns:
        The gradient of each of ``inputs``, ``None`` where it takes none.
    """
    again = torch.is_grad_enabled()
    # An input may have been computed from another, as delta is from x. What reaches the latter by way of the former
    # is no part of its gradient here, so each is replaced by a tensor that no other was computed from.
    if again:
        inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    else:  # nothing will ask for the graph that led to the inputs
        inputs = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
    with torch.enable_grad():
        results = run(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(r, g) for r, g in zip(results, grads, strict=False) if g is not None and r.requires_grad]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    outputs, weights = [result for result, _ in pairs], [grad for _, grad in pairs]
    some = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=again, allow_unused=True))
    return [next(some) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
