"""The scan on an NVIDIA GPU, on the kernels of mamba-ssm and causal-conv1d, which do less than is needed.

mamba-ssm's scan cannot begin at a state, ignores the gradient of the state it ends in, gives no state in
between and takes no second derivative. Its functions here mean what `reference` defines all the same:

- A state to begin at is written by N *virtual* positions before the first one. Position n has x = h_start[n],
  B = e_n / s and delta = s, so small that A_bar is 1: what it writes, delta B x, is h_start[n], and stays.
- The state at the end is read, where it takes a gradient, by N virtual positions after the last one. With
  delta = 0, A_bar is 1 and nothing is written; C = e_n reads component n as an output, which has a gradient.
- All states are N scans of one component each, whose outputs, C being 1, are its states.
- The gradient runs the kernel again, since what it needs depends on which results take one. Nothing but the
  arguments is kept until then. The second derivative is that of `reference`.

Everything is computed in float32 but for one case: the kernel takes the arguments of `gated_scan` in a half
precision that they share where it adds no virtual positions, since it then rounds once, as the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import calls as calls
from . import installed as installed
from .installed import INSTALL_CONV, INSTALL_SCAN

__all__ = [
    "INSTALL_CONV",
    "INSTALL_SCAN",
    "causal_conv",
    "conv_unavailable",
    "gated_scan",
    "selective_scan",
    "selective_states",
    "unavailable",
]

#: The largest N of the scan kernel.
MAX_STATE = 256
#: The widths of the convolution kernel.
WIDTHS = (2, 3, 4)

Run = Callable[..., tuple[Tensor, ...]]


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why the scan cannot run here, and what to do; ``None`` if it can.

    Args:
        device: where the inputs are; ``None`` asks whether it can run at all.
        dtype: what the inputs are accumulated in.
        d_state: N.
    """
    if isinstance(kernel := installed.scan_kernel(), str):
        return installed.missing(kernel, device)
    if (reason := installed.misplaced(device, dtype, (torch.float32,))) is not None:
        return reason
    if d_state > MAX_STATE:
        return f"it takes a state of at most {MAX_STATE}, not {d_state}"
    return None if device is None else installed.scan_failure(device)


def conv_unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, width: int = 4
) -> str | None:
    """Why `causal_conv` cannot run here, and what to do; ``None`` if it can.

    Args:
        device: where the inputs are; ``None`` asks whether it can run at all.
        dtype: of the input.
        width: of the kernel, K.
    """
    if isinstance(kernel := installed.conv_kernel(), str):
        return installed.missing(kernel, device)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if (reason := installed.misplaced(device, dtype, dtypes)) is not None:
        return reason
    if width not in WIDTHS:
        return f"it convolves over {WIDTHS[0]} to {WIDTHS[-1]} positions, not {width}"
    return None if device is None else installed.conv_failure(device)


# -- the functions of `reference` ------------------------------------------------------------------------


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    out, h_last = _apply(calls.scan, _define(reference.selective_scan), x, delta, A, B, C, h_start)
    return out.transpose(1, 2), h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    (states,) = _apply(calls.states, _define_states, x, delta, A, B, h_start)
    return reference.read_out(states, C), states


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
    """As `reference.gated_scan`: (after_skip [B,L,E] in the dtype of x, h_last [B,E,N] in float32)."""
    inputs = (x, delta_2, A, B, C, D, skip, h_start)
    out, h_last = _apply(calls.gated, _define(reference.gated_scan), *inputs)
    return out.transpose(1, 2), h_last


def causal_conv(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, activate: bool = False
) -> Tensor:
    """As `reference.causal_conv`; a half precision is rounded to once, after the activation."""

    def run(*inputs: Any, attached: bool = False) -> tuple[Tensor]:
        return (calls.convolve(*inputs, activate=activate),)

    def define(*inputs: Any) -> tuple[Tensor]:
        return (reference.causal_conv(*inputs, activate=activate).transpose(1, 2),)

    (out,) = _apply(run, define, x_in, weight, bias, before)
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


def _apply(run: Run, define: Run, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    # No result may be a view, which autograd would not let anybody edit in place. A view that is made of it
    # outside, as by the transpositions above, may be edited.
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _Differentiable.apply(run, define, *inputs)
    return run(*inputs)


class _Differentiable(torch.autograd.Function):
    """The results and gradients of ``run``, the second derivatives of ``define``."""

    @staticmethod
    def forward(ctx: Any, run: Run, define: Run, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.run, ctx.define = run, define
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        twice = torch.is_grad_enabled()
        if twice:
            results = ctx.define(*inputs)
        else:
            inputs = [tensor if tensor is None else tensor.detach() for tensor in inputs]
            for tensor, need in zip(inputs, needed, strict=True):
                if need:
                    tensor.requires_grad_()
            with torch.enable_grad():
                results = ctx.run(*inputs, attached=grads[-1] is not None)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                [tensor for tensor, need in zip(inputs, needed, strict=True) if need],
                [grad for _, grad in pairs],
                create_graph=twice,
                allow_unused=True,
            )
        )
        return (None, None, *(next(found) if need else None for need in needed))
