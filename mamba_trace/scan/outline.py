"""The shape of a scan without the work: for fake tensors and the meta device (``model.scan``).

The results have the shapes, dtypes and dependencies of the results of `reference`. Their values mean nothing.
They take a handful of operations, however long the prompt is.
"""

from __future__ import annotations

from torch import Tensor

from .reference import accumulation_dtype, gate


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The outline of `reference.selective_scan`."""
    dtype = accumulation_dtype(x, delta, A, B, C, h_start)
    y = x.to(dtype) * delta.to(dtype) * (B.to(dtype) * C.to(dtype)).sum(-1, keepdim=True)  # [B,L,E]
    h_last = y.sum(1)[..., None] * A.to(dtype)  # [B,E,N]
    if h_start is not None:
        y = y + h_start.to(dtype).sum(-1)[:, None]
        h_last = h_last + h_start.to(dtype)
    return y, h_last


def selective_states(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outline of `reference.selective_states`."""
    y, h_last = selective_scan(*inputs)
    return y, y[..., None] * h_last[:, None]


def gated_scan(
    x: Tensor, delta_2: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor
) -> tuple[Tensor, Tensor]:
    """The outline of `reference.gated_scan`."""
    y, h_last = selective_scan(x, delta_2, A, B, C, *h_start)
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
    states = A_bar.to(dtype) * B_bar.to(dtype) * x.to(dtype)[..., None] * C.to(dtype)[:, :, None]
    if h_start is not None:
        states = states + h_start.to(dtype)[:, None]
    return states.sum(-1), states
