"""The definition of Mamba-2's scan: the recurrence written out in plain PyTorch, one position at a time.

    h_p = exp(delta_p A) h_{p-1} + delta_p B_p x_p        y_p = C_p h_p

(Mamba-2, arXiv 2405.21060, section 6.) The functions have the names and the order of arguments that
`mamba_trace.scan.reference` has for Mamba-1. The shapes differ, since Mamba-2 has heads: H heads of P channels,
each with a state [P,N]; one delta and one A for each head; G groups of heads that share B and C. Head h belongs
to group h // (H/G).

Every function is one case of `linear_scan`. All accumulate in float32, or in float64 where an input is float64,
work on any device, under fake tensors and with any strides, and make no [B,L,H,P,N] tensor unless all states are
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ..reference import accumulation_dtype, in_dtype
from ..reference import unavailable as unavailable


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_p = exp(delta_p A) h_{p-1} + delta_p B_p x_p and y_p = C_p h_p over all positions.

    Args:
        x: input [B,L,H,P].
        delta: step sizes, after softplus and limits [B,L,H].
        A: one negative number for each head [H], or one for each batch row and head [B,H].
        B: input matrix [B,L,G,N].
        C: output matrix [B,L,G,N].
        h_start: state before the first position [B,H,P,N]; zeros if ``None``.

    Returns:
        ``(y, h_last)``: outputs [B,L,H,P] and the state after the last position [B,H,P,N], both in float32, or
        in float64 where an input is float64.

    Source:
        Mamba-2 (arXiv 2405.21060), section 6.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4, 8), torch.rand(2, 9, 4), -torch.rand(4), torch.rand(2, 9, 1, 3)
        y, h_last = selective_scan(x, delta, A, B, C=B)  # [2,9,4,8], [2,4,8,3]
    """
    return linear_scan(x, *decay_and_scale(delta, A, x, B, C, h_start), B, C, h_start)


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `selective_scan` and keep the state after each position: ``(y [B,L,H,P], states [B,L,H,P,N])``.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4, 8), torch.rand(2, 9, 4), -torch.rand(4), torch.rand(2, 9, 1, 3)
        y, states = selective_states(x, delta, A, B, C=B)  # [2,9,4,8], [2,9,4,8,3]
    """
    return linear_states(x, *decay_and_scale(delta, A, x, B, C, h_start), B, C, h_start)


def gated_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor,
    h_start: Tensor | None = None, *, scan: Callable[..., tuple[Tensor, Tensor]] = selective_scan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan` with what follows it in a mixer: D and the gate.

    Unlike in Mamba-1, the step sizes come after softplus and their limits: [B,L,H] is small, so that there is
    nothing to gain from doing these in the kernel.

    Args:
        x, delta, A, B, C, h_start: as for `selective_scan`.
        D: weight of the term that bypasses the state [H].
        skip: the gate before SiLU [B,L,H,P].
        scan: what runs the scan; a backend passes its own `selective_scan`.

    Returns:
        ``(after_skip, h_last)``: (y + D x) SiLU(skip) [B,L,H,P] in the dtype of x, rounded once, and the state
        after the last position [B,H,P,N].

    Example::

        x, delta, A, B = torch.rand(2, 9, 4, 8), torch.rand(2, 9, 4), -torch.rand(4), torch.rand(2, 9, 1, 3)
        out, h_last = gated_scan(x, delta, A, B, B, torch.ones(4), x)  # [2,9,4,8], [2,4,8,3]
    """
    y, h_last = scan(x, delta, A, B, C, h_start)
    return gate(y, x, D, skip), h_last


def gate(y: Tensor, x: Tensor, D: Tensor, skip: Tensor) -> Tensor:
    """(y + D x) SiLU(skip) [B,L,H,P] in the dtype of x: y, x, skip [B,L,H,P], D [H]."""
    return ((y + x.to(y.dtype) * D.to(y.dtype)[:, None]) * F.silu(skip.to(y.dtype))).to(x.dtype)


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_p = A_bar_p h_{p-1} + B_bar_p x_p and y_p = C_p h_p from discretised matrices.

    Args:
        A_bar: [B,L,H].
        B_bar: [B,L,H,N], or [B,L,H,P,N] where each channel has its own, as an edit of the write may make it.
        x: [B,L,H,P].
        C: [B,L,G,N].
        h_start: state before the first position [B,H,P,N]; zeros if ``None``.

    Returns:
        ``(y [B,L,H,P], h_last [B,H,P,N])``, as `selective_scan`.

    Example::

        A_bar, B_bar, x = torch.rand(2, 9, 4), torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 8)
        y, h_last = explicit_scan(A_bar, B_bar, x, torch.rand(2, 9, 1, 3))  # [2,9,4,8], [2,4,8,3]
    """
    return linear_scan(x, A_bar, torch.ones_like(A_bar), B_bar, C, h_start)


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `explicit_scan` and keep the state after each position: ``(y [B,L,H,P], states [B,L,H,P,N])``.

    Example::

        A_bar, B_bar, x = torch.rand(2, 9, 4), torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 8)
        y, states = explicit_states(A_bar, B_bar, x, torch.rand(2, 9, 1, 3))  # [2,9,4,8], [2,9,4,8,3]
    """
    return linear_states(x, A_bar, torch.ones_like(A_bar), B_bar, C, h_start)


def exponent(delta: Tensor, A: Tensor) -> Tensor:
    """delta A, of which A_bar is exp: delta [B,L,H] and A [H], or [B,H] -> [B,L,H], in the dtype of A."""
    return in_dtype(delta, A.dtype) * (A if A.dim() == 1 else A[:, None])


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y = C h: states [...,H,P,N] and C [...,G,N] -> [...,H,P]."""
    groups = rearrange(h, "... (g e) p n -> ... g e p n", g=C.shape[-2])
    y = einsum(groups, C.to(h.dtype), "... g e p n, ... g n -> ... g e p")
    return rearrange(y, "... g e p -> ... (g e) p")


# -- what every function above is a case of --------------------------------------------------------------------


def decay_and_scale(
    delta: Tensor, A: Tensor, *others: Tensor | None, exp: Callable[[Tensor], Tensor] = torch.exp
) -> tuple[Tensor, Tensor]:
    """exp(delta A) and delta [B,L,H], in the dtype that a scan of these tensors accumulates in."""
    dtype = accumulation_dtype(delta, A, *others)
    return exp(exponent(delta, in_dtype(A, dtype))), in_dtype(delta, dtype)


def linear_scan(
    x: Tensor, decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_p = decay_p h_{p-1} + scale_p B_p x_p and y_p = C_p h_p.

    Args:
        x: [B,L,H,P].
        decay, scale: one number for each head [B,L,H].
        B: [B,L,G,N] for any number of groups, or [B,L,H,P,N].
        C: [B,L,G,N].
        h_start: state before the first position [B,H,P,N]; zeros if ``None``.

    Returns:
        ``(y [B,L,H,P], h_last [B,H,P,N])``.
    """
    y, last = [], None
    for h, C_p in _run(x, decay, scale, B, C, h_start):
        y.append(read_out(h, C_p))
        last = h
    if last is None:
        return _nothing(x, decay, scale, B, C, h_start)
    return torch.stack(y, dim=1), last


def linear_states(
    x: Tensor, decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `linear_scan` and keep the state after each position: ``(y [B,L,H,P], states [B,L,H,P,N])``."""
    y, states = [], []
    for h, C_p in _run(x, decay, scale, B, C, h_start):
        y.append(read_out(h, C_p))
        states.append(h)
    if not states:
        out, h = _nothing(x, decay, scale, B, C, h_start)
        return out, h.new_zeros(h.shape[0], 0, *h.shape[1:])
    return torch.stack(y, dim=1), torch.stack(states, dim=1)


def _run(
    x: Tensor, decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    # The state after each position [B,H,P,N], and C there [B,G,N].
    dtype = accumulation_dtype(x, decay, scale, B, C, h_start)
    x, decay, scale, B, C = (tensor.to(dtype) for tensor in (x, decay, scale, B, C))
    h = _start(x, B, h_start, dtype)
    written = x * scale[..., None]  # [B,L,H,P]
    for position in range(x.shape[1]):
        B_p = B[:, position]
        if B_p.dim() == 3:  # [B,G,N]: one for all heads of a group
            B_p = B_p.repeat_interleave(x.shape[2] // B_p.shape[1], dim=1)[:, :, None]  # [B,H,1,N]
        h = decay[:, position, :, None, None] * h + written[:, position, ..., None] * B_p
        yield h, C[:, position]


def _start(x: Tensor, B: Tensor, h_start: Tensor | None, dtype: torch.dtype) -> Tensor:
    if h_start is not None:
        return h_start.to(dtype)
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=dtype)


def _nothing(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    # What a scan over no positions gives.
    dtype = accumulation_dtype(x, *others)
    B, h_start = others[2], others[-1]
    assert B is not None
    return x.to(dtype), _start(x, B, h_start, dtype)
