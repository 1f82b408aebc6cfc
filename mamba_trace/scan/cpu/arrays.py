"""What the compiled loops for the CPU take and return."""

from __future__ import annotations

import torch
from torch import Tensor


def as_floats(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, with the last axis dense; of the other axes the loops know the strides."""
    return [t if t.dtype == torch.float32 and t.stride(-1) == 1 else as_dense(t) for t in tensors]


def as_dense(tensor: Tensor) -> Tensor:
    """The tensor in float32 and contiguous."""
    return tensor.to(torch.float32).contiguous()


def starting_state(x: Tensor, A: Tensor, h: Tensor | None) -> Tensor:
    """The state to start from [B,E,N] in float32, for x [B,L,E] and A [...,N]."""
    if h is None:
        return x.new_zeros(x.shape[0], x.shape[2], A.shape[-1], dtype=torch.float32)
    return as_dense(h)


def empty_results(x: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y [B,L,E], h_last [B,E,N] and the states: [B,L,E,N], or [B,0,E,N] if not to be kept."""
    batch, length, width = x.shape
    y = x.new_empty(batch, length, width, dtype=torch.float32)
    h_last = y.new_empty(batch, width, A.shape[-1])
    return y, h_last, y.new_empty(batch, length if keep else 0, width, A.shape[-1])


def count_blocks(x: Tensor, width: int) -> int:
    """How many blocks of ``width`` channels the rows of x [B,L,E] have."""
    return x.shape[0] * -(-x.shape[2] // width)
