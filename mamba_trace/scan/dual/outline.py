"""The shape of Mamba-2's scan without the work: for fake tensors and the meta device (``model.scan``).

The results have the shapes, dtypes and dependencies of the results of `reference`. Their values mean nothing.
They take a handful of operations, however long the prompt is.
"""

from __future__ import annotations

from torch import Tensor

from ..reference import accumulation_dtype
from .reference import gate


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The outline of `reference.selective_scan`."""
    dtype = accumulation_dtype(x, delta, A, B, C, h_start)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    y = x * delta[..., None] * (B * C).sum((-1, -2))[..., None, None]  # [B,L,H,P]
    h_last = y.sum(1)[..., None] * A[..., None, None] * B.sum((1, 2))[:, None, None]  # [B,H,P,N]
    if h_start is not None:
        y = y + h_start.to(dtype).sum(-1)[:, None]
        h_last = h_last + h_start.to(dtype)
    return y, h_last


def selective_states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outline of `reference.selective_states`."""
    y, h_last = selective_scan(*inputs)
    return y, y[..., None] * h_last[:, None]


def gated_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor
) -> tuple[Tensor, Tensor]:
    """The outline of `reference.gated_scan`."""
    y, h_last = selective_scan(x, delta, A, B, C, *h_start)
    return gate(y, x, D, skip), h_last


def explicit_scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outline of `reference.explicit_scan`."""
    y, states = explicit_states(*inputs)
    return y, states.sum(1)


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The outline of `reference.explicit_states`."""
    dtype = accumulation_dtype(A_bar, B_bar, x, C, h_start)
    A_bar, B_bar, x, C = (tensor.to(dtype) for tensor in (A_bar, B_bar, x, C))
    B_bar = B_bar if B_bar.dim() == 5 else B_bar[:, :, :, None]  # [B,L,H,1 or P,N]
    states = A_bar[..., None, None] * B_bar * x[..., None] * C.sum(2)[:, :, None, None]
    if h_start is not None:
        states = states + h_start.to(dtype)[:, None]
    return states.sum(-1), states
