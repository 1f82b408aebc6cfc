"""The scan on an NVIDIA GPU, on the kernels of mamba-ssm and causal-conv1d, which do less than is needed.

mamba-ssm's scan cannot begin at a state, ignores the gradient of the state it ends in, gives no state in
between and takes no second derivative. The functions here nevertheless mean what `reference` defines:

- A state to begin at is written by N *virtual* positions before the first position. Virtual position n has
  x = h_start[n], B = e_n / s and delta = s, which is so small that A_bar is 1. So what it writes,
  delta B x, is h_start[n], and it stays.
- Where the state at the end takes a gradient, N virtual positions after the last position read it. With delta
  = 0, A_bar is 1 and nothing is written; with C = e_n, component n is read as an output, which has a
  gradient.
- All states are N scans of one component each: with C = 1 their outputs are their states.
- The backward pass runs the kernel again, since what it needs depends on which results take a gradient. Only
  the arguments are kept until then. The second derivative is that of `reference`.

Everything is computed in float32 with one exception. The kernel takes the arguments of `gated_scan` in a half
precision that they share, where it adds no virtual positions: it then rounds once, as the definition does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..recompute import differentiated, gradients_of, in_memory
from . import calls, installed
from .installed import INSTALL_CONV as INSTALL_CONV
from .installed import INSTALL_SCAN as INSTALL_SCAN

#: The largest N of the scan kernel.
MAX_STATE = 256
#: The numbers of positions that the convolution kernel can look at.
WIDTHS = (2, 3, 4)

Run = Callable[..., tuple[Tensor, ...]]


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why the scan cannot run here, and what to do about it; ``None`` if it can run.

    Args:
        device: where the inputs are; ``None`` asks whether the scan can run at all.
        dtype: the dtype that the scan accumulates in.
        d_state: N.
    """
    if isinstance(kernel := installed.scan_kernel(), str):
        return installed.missing(kernel, device)
    if (reason := installed.misplaced(device, dtype, (torch.float32,))) is not None:
        return reason
    if d_state > MAX_STATE:
        return f"it takes a state of at most {MAX_STATE}, not {d_state}"
    return None if device is None else scan_failure(device)


def conv_unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, width: int = 4
) -> str | None:
    """Why `causal_conv` cannot run here, and what to do about it; ``None`` if it can run.

    Args:
        device: where the inputs are; ``None`` asks whether the convolution can run at all.
        dtype: the dtype of the input.
        width: how many positions the convolution looks at, K.
    """
    if isinstance(kernel := installed.conv_kernel(), str):
        return installed.missing(kernel, device)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if (reason := installed.misplaced(device, dtype, dtypes)) is not None:
        return reason
    if width not in WIDTHS:
        return f"it convolves over {WIDTHS[0]} to {WIDTHS[-1]} positions, not {width}"
    return None if device is None else conv_failure(device)


def conv_misfit() -> str | None:
    """Why the release of causal-conv1d that is installed cannot be used, and what to do about it."""
    return kernel if isinstance(kernel := installed.conv_kernel(), installed.Misfit) else None


@functools.cache
def scan_failure(device: torch.device) -> str | None:
    """How the scan kernel fails on ``device``; ``None`` if it gets a small example right."""
    x, B, C = (installed.waves(1, 5, width, device=device) for width in (8, 3, 3))
    delta, A = x.abs() + 0.1, -installed.waves(8, 3, device=device).abs() - 0.5
    inputs = (x, delta, A, B, C, installed.waves(1, 8, 3, device=device))
    return installed.failure(selective_scan, reference.selective_scan, *inputs)


@functools.cache
def conv_failure(device: torch.device) -> str | None:
    """How the convolution kernel fails on ``device``; ``None`` if it gets a small example right."""
    shapes = ((1, 5, 8), (8, 4), (8,), (1, 8, 4))
    inputs = (installed.waves(*shape, device=device) for shape in shapes)
    run, define = (functools.partial(each, activate=True) for each in (causal_conv, reference.causal_conv))
    return installed.failure(run, define, *inputs)


# -- the functions of `reference` ------------------------------------------------------------------------


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    out, h_last = apply(calls.scan, _define(reference.selective_scan), x, delta, A, B, C, h_start)
    return out.transpose(1, 2), h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    (states,) = apply(calls.states, _define_states, x, delta, A, B, h_start)
    return reference.read_out(states, C), states


def gated_scan(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`: (after_skip [B,L,E] in the dtype of x, h_last [B,E,N] in float32)."""
    out, h_last = apply(calls.gated, _define(reference.gated_scan), x, *others)
    return out.transpose(1, 2), h_last


def causal_conv(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, activate: bool = False
) -> Tensor:
    """As `reference.causal_conv`; values in half precision are rounded once, after the activation."""

    def run(*inputs: Any, attached: bool = False) -> tuple[Tensor]:
        return (calls.convolve(*inputs, activate=activate),)

    def define(*inputs: Any) -> tuple[Tensor]:
        return (reference.causal_conv(*inputs, activate=activate).transpose(1, 2),)

    (out,) = apply(run, define, x_in, weight, bias, before)
    return out.transpose(1, 2)


def _define(function: Run) -> Run:
    # In the layout of the kernels, [B,E,L].
    def run(*inputs: Any) -> tuple[Tensor, ...]:
        y, h_last = function(*inputs)
        return y.transpose(1, 2), h_last

    return run


def _define_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor | None) -> tuple[Tensor]:
    return (reference.selective_states(x, delta, A, B, B, h_start)[1],)  # whatever C is


# -- gradients -------------------------------------------------------------------------------------------


def apply(run: Run, define: Run, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """``run(*inputs)``, with the second derivatives of ``define``.

    Args:
        run: calls a kernel, and is differentiable once. It takes ``attached``, whether the last of its results
            takes a gradient. None of its results is a view, which autograd would not let anybody edit in place.
        define: the same in operations that can be differentiated to any order.
        *inputs: their arguments.
    """
    return _Kernel.apply(run, define, *inputs) if differentiated(*inputs) else run(*inputs)


class _Kernel(torch.autograd.Function):
    """The results and gradients of ``run``, and the second derivatives of ``define``."""

    @staticmethod
    def forward(ctx: Any, run: Run, define: Run, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.run, ctx.define = run, define
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run = ctx.define
        if not torch.is_grad_enabled() and in_memory(*grads):  # one gradient, and no second derivative
            run = functools.partial(ctx.run, attached=grads[-1] is not None)
        return (None, None, *gradients_of(run, ctx.saved_tensors, grads))
