"""Mamba-2's scan on a CPU in float32: compiled loops, on PyTorch's own threads.

The scan and the explicit scan are one kernel (`loops`), whose decay and scale are exp(delta A) and delta, or A_bar
and 1. Only an explicit scan in which each channel has its own B_bar is another kernel (`written`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu import as_floats, operator, run_forward, starting_state
from ..cpu import unavailable as unavailable
from ..recompute import recompute
from . import reference

#: Whether the kernels are worth a call for a single position.
TAKES_ONE_POSITION = True

_LOOPS = "..dual.loops"  # seen from `scan.cpu`
_INPUTS = ("x", "decay", "scale", "B", "C", "h_start")
_linear: Any = operator(
    _LOOPS, _INPUTS, reference.linear_scan, reference.linear_states, **{"gated": 0, "D": None, "skip": None}
)


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    y, h_last, _ = _run(x, *reference.decay_and_scale(delta, A), B, C, h_start, False)
    return y, h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    y, _, states = _run(x, *reference.decay_and_scale(delta, A), B, C, h_start, True)
    return y, states


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_scan`, in float32."""
    y, h_last, _ = _run(x, A_bar, torch.ones_like(A_bar), B_bar, C, h_start, False)
    return y, h_last


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_states`, in float32."""
    y, _, states = _run(x, A_bar, torch.ones_like(A_bar), B_bar, C, h_start, True)
    return y, states


def _run(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, h_start, keep = others
    x, decay, scale, B, C = as_floats(x, *inputs)
    h = starting_state(x, C.shape[-1], h_start)
    if B.dim() == 4:
        return _linear(x, decay, scale, B, C, h, keep)
    # Each channel has its own B: it is then a head of its own, with one channel.
    heads, width = x.shape[2:]
    y, h_last, states = _linear(
        x.flatten(2)[..., None],
        decay.repeat_interleave(width, dim=2),
        scale.repeat_interleave(width, dim=2),
        B.flatten(2, 3),
        C,
        h.flatten(1, 2)[:, :, None],
        keep,
    )
    sizes = (heads, width)
    return y[..., 0].unflatten(2, sizes), h_last[:, :, 0].unflatten(1, sizes), states[:, :, :, 0].unflatten(2, sizes)


def gated_scan(x: Tensor, delta: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`, in float32: one kernel; its backward pass goes through `selective_scan`."""
    return recompute(_gated, _gated_in_steps, x, delta, *others)


def _gated_in_steps(*inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.gated_scan(*inputs, scan=selective_scan)


def _gated(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay, scale = reference.decay_and_scale(delta, A)
    names = ("x", "decay", "scale", "B", "C", "D", "skip")
    inputs = dict(zip(names, as_floats(x, decay, scale, B, C, D, skip), strict=True))
    inputs["h_start"] = h = starting_state(x, C.shape[-1], *h_start)
    y, h_last = h.new_empty(x.shape), torch.empty_like(h)
    run_forward(_LOOPS, inputs, gated=1, keep=0, y=y, h_last=h_last, states=None)
    return y.to(x.dtype), h_last
