"""The definition: the recurrence written out in plain PyTorch, one position at a time.

Every other backend is tested against this file, in float64 too. It makes no [B,L,E,N] tensor, works on any
device, under fake tensors and with any strides, and accumulates in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any input is float64."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype: itself, without a call of PyTorch's dispatcher, where it is in that one."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why this backend cannot run on ``device``, accumulating in ``dtype``; ``None``, since it always can."""
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

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        y, h_last = selective_scan(x, delta, A, B, C=B)  # [2,9,4], [2,4,3]
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
    """Run `selective_scan` and keep the state after each position: ``(y [B,L,E], states [B,L,E,N])``.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        y, states = selective_states(x, delta, A, B, C=B)  # [2,9,4], [2,9,4,3]
    """
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
    x: Tensor, delta_2: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor,
    h_start: Tensor | None = None, *, scan: Callable[..., tuple[Tensor, Tensor]] = selective_scan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan` with what surrounds it in a mixer: softplus before, D and the gate after.

    Args:
        x, A, B, C, h_start: as for `selective_scan`.
        delta_2: step sizes before softplus [B,L,E].
        D: weight of the term that bypasses the state [E].
        skip: the gate before SiLU [B,L,E].
        scan: what runs the scan; a backend passes its own `selective_scan`.

    Returns:
        ``(after_skip, h_last)``: (y + D x) SiLU(skip) [B,L,E] in the dtype of x, rounded once, and the state
        after the last position [B,E,N].

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        out, h_last = gated_scan(x, delta, A, B, B, torch.ones(4), x)  # [2,9,4], [2,4,3]
    """
    dtype = accumulation_dtype(x, delta_2, A, B, C, h_start)
    y, h_last = scan(x, F.softplus(delta_2.to(dtype)), A, B, C, h_start)
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

    Example::

        A_bar, B_bar = torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 3)
        y, h_last = explicit_scan(A_bar, B_bar, torch.rand(2, 9, 4), torch.rand(2, 9, 3))  # [2,9,4], [2,4,3]
    """
    y, states = explicit_states(A_bar, B_bar, x, C, h_start)
    return y, states[:, -1] if states.shape[1] else _start(y, A_bar.shape[-1], h_start, y.dtype)


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `explicit_scan` and keep the state after each position: ``(y [B,L,E], states [B,L,E,N])``.

    Example::

        A_bar, B_bar = torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 3)
        y, states = explicit_states(A_bar, B_bar, torch.rand(2, 9, 4), torch.rand(2, 9, 3))  # [2,9,4], [2,9,4,3]
    """
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


def exponent(delta: Tensor, A: Tensor) -> Tensor:
    """delta A, of which A_bar is exp: delta [B,L,E] and A [E,N], or [B,E,N] -> [B,L,E,N], in the dtype of A."""
    return delta.to(A.dtype)[..., None] * (A if A.dim() == 2 else A[:, None])


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y = C h: state [...,E,N] and C [...,N] -> [...,E]."""
    return torch.einsum("...en,...n->...e", h, C.to(h.dtype))


def _start(x: Tensor, d_state: int, h_start: Tensor | None, dtype: torch.dtype) -> Tensor:
    if h_start is not None:
        return h_start.to(dtype)
    return x.new_zeros(x.shape[0], x.shape[2], d_state, dtype=dtype)


def _stack(y: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(y, dim=1) if y else torch.zeros_like(x)
