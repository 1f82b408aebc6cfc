"""The scan on a CPU in float32: compiled loops, on PyTorch's own threads.

What can be differentiated is registered with PyTorch as custom operators, so that it runs in compiled graphs;
the second derivative is `reference`'s. Where no gradient is needed, softplus, D and the gate are computed in
the loop of the scan, and SiLU in that of the convolution.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..recompute import recompute
from ..reference import gradients
from . import team
from .arrays import as_dense, as_floats, count_blocks, empty_results, starting_state
from .explicit_scan import explicit_scan, explicit_states

__all__ = [
    "causal_conv",
    "conv_unavailable",
    "explicit_scan",
    "explicit_states",
    "gated_scan",
    "selective_scan",
    "selective_states",
    "unavailable",
]


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why this backend cannot run on ``device``, accumulating in ``dtype``; ``None`` if it can."""
    if (reason := _broken()) is not None:
        return reason
    if device is not None and device.type != "cpu":
        return f"the model is on {device}, and it runs on the CPU alone"
    if dtype != torch.float32:
        return f"it computes in float32, not {dtype}"
    return None


def conv_unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, width: int = 4
) -> str | None:
    """Why `causal_conv` cannot run on ``device`` for inputs of ``dtype``; ``None`` if it can."""
    return unavailable(device, torch.promote_types(dtype, torch.float32))


@functools.cache
def _broken() -> str | None:
    # Importing compiled code can fail in many ways, and none of them may stop a model from running.
    if importlib.util.find_spec("numba") is None:
        return "it needs numba: pip install numba"
    try:
        importlib.import_module(".selective", __package__)
        return None
    except Exception as error:
        return f"numba does not work here ({type(error).__name__}: {error})"


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    y, h_last, _ = _scan(*as_floats(x, delta, A, B, C), starting_state(x, A, h_start), False)
    return y, h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    y, _, states = _scan(*as_floats(x, delta, A, B, C), starting_state(x, A, h_start), True)
    return y, states


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
    """As `reference.gated_scan`, in float32."""
    return recompute(_gated, _gated_in_steps, x, delta_2, A, B, C, D, skip, h_start)


def causal_conv(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, activate: bool = False
) -> Tensor:
    """As `reference.causal_conv`, in float32."""
    fast = functools.partial(_convolve, activate=activate)
    return recompute(
        fast, functools.partial(reference.causal_conv, activate=activate), x_in, weight, bias, before
    )


# -- the selective scan --------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    y: Tensor,
    h_last: Tensor,
    states: Tensor | None = None,
    D: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    # With D and skip: softplus before, D and the gate after.
    from . import selective as _selective

    gated = int(D is not None)
    team.run(
        _selective.forward,
        team.pieces(count_blocks(x, _selective.WIDTH), x.shape[1]),
        before_softplus=gated,
        gated=gated,
        keep=int(states is not None and states.shape[1] > 0),
        x=x,
        delta=delta,
        B=B,
        C=C,
        skip=skip,
        A=A.contiguous(),
        D=D,
        h_start=h,
        y=y,
        h_last=h_last,
        states=states,
    )


def _run(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    results = empty_results(x, A, keep)
    if x.shape[1]:
        _forward(x, delta, A, B, C, h, *results)
    else:
        results[1].copy_(h)
    return results


def _run_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    gy: Tensor,
    gh_last: Tensor,
    gstates: Tensor,
) -> list[Tensor]:
    from . import selective_backward as _selective_backward
    from .selective import WIDTH

    x, delta, A, B, C, h, gy, gh_last, gstates = map(as_dense, (x, delta, A, B, C, h, gy, gh_last, gstates))
    count = team.pieces(count_blocks(x, WIDTH), x.shape[1], shares=1)
    gx, gdelta, gA, gh = (torch.empty_like(tensor) for tensor in (x, x, h, h))
    gB, gC = B.new_zeros(count, *B.shape), C.new_zeros(count, *C.shape)
    team.run(
        _selective_backward.backward,
        count,
        keep=int(gstates.shape[1] > 0),
        A=A,
        x=x,
        delta=delta,
        B=B,
        C=C,
        h_start=h,
        gy=gy,
        gh_last=gh_last,
        gstates=gstates,
        gx=gx,
        gdelta=gdelta,
        gA=gA,
        gh_start=gh,
        gB=gB,
        gC=gC,
    )
    return [gx, gdelta, gA.sum(0), gB.sum(0), gC.sum(0), gh]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])


def _differentiate(ctx: Any, gy: Tensor, gh_last: Tensor, gstates: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative will be asked for
        results = [*reference.selective_scan(*inputs)]
        if gstates.shape[1]:
            results.append(reference.selective_states(*inputs)[1])
        return (*gradients(results, inputs, (gy, gh_last, gstates)), None)
    return (*_scan_backward(*inputs, gy, gh_last, gstates), None)


_scan: Any = torch.library.custom_op("mamba_trace::selective_scan_cpu", _run, mutates_args=())
_scan.register_fake(lambda x, delta, A, B, C, h, keep: empty_results(x, A, keep))
_scan.register_autograd(_differentiate, setup_context=_keep_inputs)

_scan_backward: Any = torch.library.custom_op(
    "mamba_trace::selective_scan_cpu_backward", _run_backward, mutates_args=()
)
_scan_backward.register_fake(
    lambda *tensors: [tensor.new_empty(tensor.shape) for tensor in tensors[:6]],
)


def _gated(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    h_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float32)
    h_last = x.new_empty(x.shape[0], x.shape[2], A.shape[-1], dtype=torch.float32)
    h, dtype = starting_state(x, A, h_start), x.dtype
    x, delta_2, A, B, C, D, skip = as_floats(x, delta_2, A, B, C, D, skip)
    _forward(x, delta_2, A, B, C, h, y, h_last, D=D, skip=skip)
    return y.to(dtype), h_last


def _gated_in_steps(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    h_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, h_last = selective_scan(x, F.softplus(delta_2.float()), A, B, C, h_start)
    return reference.gate(y, x, D, skip), h_last


# -- the convolution -----------------------------------------------------------------------------------------


def _convolve(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, activate: bool
) -> Tensor:
    from . import conv as _conv

    batch, length, width = x_in.shape
    taps = weight.shape[1]
    history = x_in.new_zeros(batch, taps - 1, width) if before is None else before[..., 1:].transpose(1, 2)
    bias = x_in.new_zeros(width) if bias is None else bias
    (x_in_f,) = as_floats(x_in)
    out = x_in_f.new_empty(x_in_f.shape, dtype=torch.float32)
    team.run(
        _conv.forward,
        team.pieces(batch * length, -(-width // 4)),  # far less work at a position than in a scan
        past=taps - 1,
        activate=int(activate),
        x_in=x_in_f,
        before=as_dense(history),
        weight=as_dense(weight.t()),
        bias=as_dense(bias),
        out=out,
    )
    return out.to(x_in.dtype)
