"""The definition: the recurrence written out in plain PyTorch, one position at a time.

Everything else is tested against this file, in float64 too. It makes no [B,L,E,N] tensor, works on any
device, under fake tensors and with any strides, and accumulates in float32 or better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any input is float64."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why this backend cannot run on ``device``, accumulating in ``dtype``: there is no reason."""
    return None


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_p = exp(delta_p A) h_{p-1} + delta_p B_p x_p and y_p = C_p h_p over all positions.

    Args:
        x: input [B,L,E].
        delta: step sizes, after softplus [B,L,E].
        A: state matrix, negative [E,N], or one for each row [B,E,N].
        B: input matrix [B,L,N].
        C: output matrix [B,L,N].
        h_start: state before the first position [B,E,N]; zeros if ``None``.

    Returns:
        ``(y, h_last)``: outputs [B,L,E] and the state after the last position [B,E,N], both in float32, or in
        float64 where an input is float64.

    Source:
        Mamba (arXiv 2312.00752), section 3.2.
    """
    dtype = accumulation_dtype(x, delta, A, B, C, h_start)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    h = _start(x, A.shape[-1], h_start, dtype)
    delta_x = delta * x  # [B,L,E]
    y = []
    for position in range(x.shape[1]):
        decay = torch.exp(delta[:, position, :, None] * A)  # [B,E,N]
        h = decay * h + delta_x[:, position, :, None] * B[:, position, None, :]  # [B,E,N]
        y.append(read_out(h, C[:, position]))
    return _stack(y, x), h


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`selective_scan` with the state after each position: ``(y [B,L,E], states [B,L,E,N])``."""
    y, states = [], []
    h = _start(x, A.shape[-1], h_start, accumulation_dtype(x, delta, A, B, C, h_start))
    for position in range(x.shape[1]):
        at = slice(position, position + 1)
        out, h = selective_scan(x[:, at], delta[:, at], A, B[:, at], C[:, at], h)
        y.append(out)
        states.append(h)
    if not states:
        return x.to(h.dtype), h.new_zeros(h.shape[0], 0, *h.shape[1:])
    return torch.cat(y, dim=1), torch.stack(states, dim=1)


def gated_scan(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    h_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` with what stands around it in a mixer: softplus before, D and the gate after.

    Args:
        x, A, B, C, h_start: as for `selective_scan`.
        delta_2: step sizes before softplus [B,L,E].
        D: weight of the term that passes the state by [E].
        skip: the gate before SiLU [B,L,E].

    Returns:
        ``(after_skip, h_last)``: (y + D x) SiLU(skip) [B,L,E] in the dtype of x, rounded once, and the state
        after the last position [B,E,N].
    """
    dtype = accumulation_dtype(x, delta_2, A, B, C, h_start)
    y, h_last = selective_scan(x, F.softplus(delta_2.to(dtype)), A, B, C, h_start)
    return gate(y, x, D, skip), h_last


def gate(y: Tensor, x: Tensor, D: Tensor, skip: Tensor) -> Tensor:
    """(y + D x) SiLU(skip) [B,L,E] in the dtype of x: y, x, skip [B,L,E], D [E]."""
    return ((y + x.to(y.dtype) * D.to(y.dtype)) * F.silu(skip.to(y.dtype))).to(x.dtype)


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_p = A_bar_p h_{p-1} + B_bar_p x_p and y_p = C_p h_p from discretised matrices.

    Args:
        A_bar, B_bar: [B,L,E,N].
        x: [B,L,E].
        C: [B,L,N].
        h_start: state before the first position [B,E,N]; zeros if ``None``.

    Returns:
        ``(y [B,L,E], h_last [B,E,N])``, as `selective_scan`.
    """
    y, states = explicit_states(A_bar, B_bar, x, C, h_start)
    return y, states[:, -1] if states.shape[1] else _start(y, A_bar.shape[-1], h_start, y.dtype)


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`explicit_scan` with the state after each position: ``(y [B,L,E], states [B,L,E,N])``."""
    dtype = accumulation_dtype(A_bar, B_bar, x, C, h_start)
    x, C = x.to(dtype), C.to(dtype)
    h = _start(x, A_bar.shape[-1], h_start, dtype)
    y, states = [], []
    for position in range(x.shape[1]):
        write = B_bar[:, position].to(dtype) * x[:, position, :, None]  # [B,E,N]
        h = A_bar[:, position].to(dtype) * h + write
        y.append(read_out(h, C[:, position]))
        states.append(h)
    return _stack(y, x), torch.stack(states, dim=1) if states else h.new_zeros(A_bar.shape)


def causal_conv(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, activate: bool = False
) -> Tensor:
    """The causal depthwise convolution over positions, followed by SiLU where ``activate``.

    Args:
        x_in: [B,L,E].
        weight: [E,K]; the last column meets the position itself.
        bias: [E] or ``None``.
        before: the columns before the first position [B,E,K]; zeros if ``None``.

    Returns:
        [B,L,E] in the dtype of ``x_in``.
    """
    width, kernel = weight.shape
    history = x_in.new_zeros(x_in.shape[0], width, kernel) if before is None else before.to(x_in.dtype)
    columns = torch.cat((history[..., 1:], x_in.transpose(1, 2)), dim=-1)  # [B,E,K-1+L]
    conv = F.conv1d(columns, weight[:, None], bias, groups=width).transpose(1, 2)
    return F.silu(conv) if activate else conv


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y = C h: state [...,E,N] and C [...,N] -> [...,E]."""
    return torch.einsum("...en,...n->...e", h, C.to(h.dtype))


def _start(x: Tensor, d_state: int, h_start: Tensor | None, dtype: torch.dtype) -> Tensor:
    if h_start is not None:
        return h_start.to(dtype)
    return x.new_zeros(x.shape[0], x.shape[2], d_state, dtype=dtype)


def _stack(y: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(y, dim=1) if y else torch.zeros_like(x)


def gradients(
    results: Sequence[Tensor], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient of each of ``inputs``, ``None`` where it takes none, itself differentiable."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=False) if result.requires_grad]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
