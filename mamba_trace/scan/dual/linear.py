"""The functions of `reference` for a backend that has one kernel: all of them are cases of `reference.linear_scan`.

A scan has exp(delta A) and delta for decay and scale, and an explicit scan A_bar and 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..elements import exponentials
from . import reference

Pair = tuple[Tensor, Tensor]
#: As in `reference`, with compiled exponentials.
decay_and_scale = functools.partial(reference.decay_and_scale, exp=exponentials)


class LinearScans:
    """The scans of one backend.

    Args:
        run: ``(x, decay, scale, B, C, h_start, keep) -> (y, second)`` as `reference.linear_scan`, or as
            `reference.linear_states` where ``keep``; differentiable. B is [B,L,G,N].
    """

    def __init__(self, run: Callable[..., Pair]) -> None:
        self._run = run

    def selective_scan(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
    ) -> Pair:
        """As `reference.selective_scan`, in float32."""
        return self._run(x, *decay_and_scale(delta, A), B, C, h_start, False)

    def selective_states(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
    ) -> Pair:
        """As `reference.selective_states`, in float32."""
        return self._run(x, *decay_and_scale(delta, A), B, C, h_start, True)

    def gated_in_steps(self, *inputs: Any) -> Pair:
        """As `reference.gated_scan`, in float32: the scan, followed by PyTorch's operations."""
        return reference.gated_scan(*inputs, scan=self.selective_scan)

    def explicit_scan(self, A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None) -> Pair:
        """As `reference.explicit_scan`, in float32."""
        return self._explicit(A_bar, B_bar, x, C, h_start, False)

    def explicit_states(
        self, A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
    ) -> Pair:
        """As `reference.explicit_states`, in float32."""
        return self._explicit(A_bar, B_bar, x, C, h_start, True)

    def _explicit(self, A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None, keep: bool) -> Pair:
        if B_bar.dim() == 4:
            return self._run(x, A_bar, torch.ones_like(A_bar), B_bar, C, h_start, keep)
        # Each channel has its own B_bar: it is then a head of its own, with a single channel.
        heads, width = x.shape[2:]
        A_bar, B_bar = A_bar.repeat_interleave(width, dim=2), B_bar.flatten(2, 3)
        h = None if h_start is None else h_start.flatten(1, 2)[:, :, None]
        y, second = self._run(x.flatten(2)[..., None], A_bar, torch.ones_like(A_bar), B_bar, C, h, keep)
        return y[..., 0].unflatten(2, (heads, width)), second.squeeze(-2).unflatten(-2, (heads, width))
