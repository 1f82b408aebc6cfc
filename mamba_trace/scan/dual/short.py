"""Mamba-2's scan over few positions, of many rows that start from one state: all of it by matmuls.

A state is as large as the products of dozens of positions with all of a layer's weights. So where a row has few
positions, to read its state and to write the next one takes longer than everything else. Here no row has a state
of its own. The recurrence is linear: what the starting state gives to y is C h_start, decayed since, one matmul for
all rows. What a row's own positions give one another is a matrix [l,l] for
each head (Mamba-2, arXiv 2405.21060, section 6: the quadratic form).
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..record import note
from ..reference import accumulation_dtype
from .reference import gate

#: The most positions that this takes: the time of the matrices grows with their square. An estimate.
MOST_POSITIONS = 32


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether a scan of x [B,L,...] and ``others`` can be run here: few positions, on a CPU, without gradients."""
    if isinstance(x, FakeTensor) or x.device.type != "cpu" or not 0 < x.shape[1] <= MOST_POSITIONS:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)))


def gated_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, state: Tensor
) -> Tensor:
    """`reference.gated_scan` of rows that all start from ``state``, without the state after the last position.

    Args:
        x, delta, A, B, C, D, skip: as for `reference.gated_scan`.
        state: the state that the rows start from [H,P,N].

    Returns:
        (y + D x) SiLU(skip) [B,L,H,P] in the dtype of x.

    Example::

        x, delta, A, B = torch.rand(3, 9, 4, 8), torch.rand(3, 9, 4), -torch.rand(4), torch.rand(3, 9, 1, 5)
        out = gated_scan(x, delta, A, B, B, torch.ones(4), x, torch.rand(4, 8, 5))  # [3,9,4,8]
    """
    note("gated_scan", "matmuls", x.shape[1])
    dtype = accumulation_dtype(x, delta, A, B, C, D, state)
    wide, delta, B, C = (tensor.to(dtype) for tensor in (x, delta, B, C))
    exponents = rearrange(delta * A.to(dtype), "b l h -> b h l")
    y = within(wide, delta, exponents, B, C)
    decay = rearrange(exponents.cumsum(-1).exp(), "b h l -> b l h 1")  # since the start
    y = y.addcmul(from_start(C, state.to(dtype)), decay)
    return gate(y, x, D, skip)


def within(x: Tensor, delta: Tensor, exponents: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What the positions of each row give one another [B,L,H,P]: for ``exponents`` delta A [B,H,L]."""
    length = x.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    # Sums over the positions between two of them, each added up by itself: a difference of sums loses digits.
    between = exponents[..., None].expand(*exponents.shape, length).masked_fill(~later, 0).cumsum(-2)
    weights = between.exp_().mul_(rearrange(delta, "b l h -> b h 1 l"))
    products = einsum(C, B, "b i g n, b j g n -> b g i j").tril()
    groups = weights.view(len(x), products.shape[1], -1, length, length)
    weights = groups.mul_(products[:, :, None]).flatten(1, 2)  # [B,H,L,L]
    return rearrange(weights @ rearrange(x, "b l h p -> b h l p"), "b h l p -> b l h p")


def from_start(C: Tensor, state: Tensor) -> Tensor:
    """C h_start [B,L,H,P], not decayed yet: C [B,L,G,N], and all rows start from ``state`` [H,P,N]."""
    of_groups = state.unflatten(0, (C.shape[2], -1))  # [G,e,P,N]
    return einsum(C, of_groups, "b l g n, g e p n -> b l g e p").flatten(2, 3)
