"""The root mean square norm of a block and of a mixer: one function, compiled where a CPU can run that.

The norms of the architectures differ in what is around it, such as a gate, and in when they round. Everything
that they share is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from .noting import under_a_mode
from .recompute import differentiated, in_memory, recompute, transformed
from .reference import accumulation_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
    wide_weight: bool = False,
) -> Tensor:
    """weight x / sqrt(mean(x^2) + epsilon), where the mean is that of a group of channels.

    The norm is computed in float32 or better.

    Args:
        x: [...,E].
        weight: [E]; ``None`` for 1 throughout.
        epsilon: what is added to the mean of the squares.
        group_size: how many channels next to each other share a mean: all of them if ``None``.
        dtype: what the norm is rounded to: the dtype of x if ``None``.
        wide_weight: whether it is rounded after it is multiplied by the weight, and not before.

    Returns:
        [...,E], in ``dtype``, or where it is rounded before in that of its product with the weight.

    Source:
        Root mean square layer normalization (arXiv 1910.07467), equation 4.

    Example::

        rms_norm(torch.rand(2, 9, 8), torch.ones(8), 1e-5, group_size=4)  # [2,9,8]
    """
    size, dtype = group_size or x.shape[-1], dtype or x.dtype

    def defined(x: Tensor, weight: Tensor | None) -> Tensor:
        groups = x.to(accumulation_dtype(x)).unflatten(-1, (-1, size))
        normed = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + epsilon)).flatten(-2)
        if weight is None:
            return normed.to(dtype)
        return (weight.to(normed.dtype) * normed).to(dtype) if wide_weight else weight * normed.to(dtype)

    if dtype is not torch.float32 or not computed_in_floats(x, weight):
        return defined(x, weight)
    if not differentiated(x, weight):
        return cpu.rms_norm(x, weight, epsilon, size)
    # With gradients as well, so that a run has the same numbers whether anybody asks for them.
    return recompute(lambda x, weight: cpu.rms_norm(x, weight, epsilon, size), defined, x, weight)


def computed_in_floats(*given: Tensor | None) -> bool:
    """Whether a compiled loop can run on tensors: in float32 and on a CPU."""
    tensors = [tensor for tensor in given if tensor is not None]
    if any(t.dtype is not torch.float32 or not t.is_cpu or t.numel() == 0 for t in tensors):
        return False
    if transformed() or under_a_mode() or torch.compiler.is_compiling():
        return False
    return in_memory(*tensors) and cpu.unavailable() is None
