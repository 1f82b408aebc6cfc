"""The scan on a GPU that needs no CUDA toolkit: Triton's kernels, which it compiles at their first use.

The functions mean what `reference`'s do, accumulate in float32 and are differentiable in every argument and
both results; the second derivative is `reference`'s. Triton is an optional package, so the first call imports
it and the kernels, not this module. Under Triton's interpreter (TRITON_INTERPRET=1 set before Triton is
imported) the same kernels run, slowly, on tensors of a CPU: that is how they are tested.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference

__all__ = [
    "explicit_scan",
    "explicit_states",
    "gated_scan",
    "selective_scan",
    "selective_states",
    "unavailable",
]

#: A program holds a channel's whole state in the registers of one warp.
MAX_STATE = 256


# -- availability ------------------------------------------------------------------------------------------


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why this backend cannot run; ``None`` if it can.

    Args:
        device: of the inputs; ``None`` to ask whether it could run on any.
        dtype: that the scan accumulates in.
        d_state: N.
    """
    if (reason := _broken()) is not None:
        return reason
    if device is None:
        if not (torch.cuda.is_available() or _kernels().INTERPRETED):
            return (
                "PyTorch finds no CUDA device (torch.cuda.is_available() is False), and without one it runs "
                "only where TRITON_INTERPRET=1 is in the environment, slowly"
            )
    elif device.type != "cuda" and not (device.type == "cpu" and _kernels().INTERPRETED):
        return f"the model is on {device}, and it runs on a CUDA device alone: model.to('cuda')"
    if dtype != torch.float32:
        return f"it computes in float32, not {dtype}"
    if d_state > MAX_STATE:
        return f"it holds at most {MAX_STATE} state elements for each channel, not {d_state}"
    return _failure(device) if device is not None and device.type == "cuda" else None


@functools.cache
def _broken() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton: pip install triton"
    try:
        _kernels()
    except (
        Exception
    ) as error:  # whatever is wrong with an optional package must not stop a model from running
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return None


@functools.cache
def _failure(device: torch.device) -> str | None:
    """What goes wrong in a tiny scan on ``device``, if anything: Triton may lack a compiler, or a driver."""
    # Drawn from nothing, so that no generator's state changes.
    x, delta, A, B, C = (
        torch.linspace(start, stop, math.prod(shape), dtype=torch.float32, device="cpu").reshape(shape)
        for start, stop, shape in (
            (-1.0, 1.0, (1, 5, 3)),
            (0.1, 1.0, (1, 5, 3)),
            (-1.0, -0.1, (3, 2)),
            (1.0, -0.5, (1, 5, 2)),
            (0.5, 1.0, (1, 5, 2)),
        )
    )
    try:
        with torch.no_grad():
            results = selective_scan(*(tensor.to(device) for tensor in (x, delta, A, B, C)))
            expected = reference.selective_scan(x, delta, A, B, C)
            errors = [(a.cpu() - b).abs().max().item() for a, b in zip(results, expected, strict=True)]
    except Exception as error:  # as above
        return f"a test of it on {device} failed ({type(error).__name__}: {error})"
    if not max(errors) <= 1e-3:
        return f"a test of it on {device} gave wrong numbers (off by {max(errors):.1e})"
    return None


def _kernels() -> Any:
    return importlib.import_module(".launch", __package__)


# -- the scans ---------------------------------------------------------------------------------------------


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    return _selective(False, x, delta, A, B, C, h_start)


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    return _selective(True, x, delta, A, B, C, h_start)


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
    """As `reference.gated_scan`, in float32 but for the result, which has the dtype of x.

    One kernel where no gradient is wanted; a differentiable scan between PyTorch's operations where one is.
    """
    if _differentiable(x, delta_2, A, B, C, D, skip, h_start):
        y, h_last = selective_scan(x, F.softplus(delta_2.float()), A, B, C, h_start)
        return reference.gate(y, x, D, skip), h_last
    return _kernels().run_selective(x, delta_2, A, B, C, h_start, D=D, skip=skip)


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_scan`, in float32."""
    return _explicit(False, A_bar, B_bar, x, C, h_start)


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_states`, in float32."""
    return _explicit(True, A_bar, B_bar, x, C, h_start)


def _selective(keep: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    if _differentiable(*inputs):
        return _Selective.apply(keep, *inputs)
    states = _trajectory(inputs[0], inputs[2]) if keep else None
    y, h_last = _kernels().run_selective(*inputs, states=states)
    return y, h_last if states is None else states


def _explicit(keep: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    if _differentiable(*inputs):
        return _Explicit.apply(keep, *inputs)
    states = _trajectory(inputs[2], inputs[0]) if keep else None
    y, h_last = _kernels().run_explicit(*inputs, after=states)
    return y, h_last if states is None else states


def _trajectory(x: Tensor | None, A: Tensor | None) -> Tensor:
    assert x is not None
    assert A is not None
    return x.new_empty(*x.shape, A.shape[-1], dtype=torch.float32)


def _differentiable(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


# -- their gradients ---------------------------------------------------------------------------------------


class _Selective(torch.autograd.Function):
    """`_selective` under autograd, whose kernels it calls with gradients off."""

    @staticmethod
    def forward(ctx: Any, keep: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        x, _, A, *_ = inputs
        assert x is not None
        assert A is not None
        ctx.keep = keep
        ctx.set_materialize_grads(False)
        kernels = _kernels()
        chunks = -(-x.shape[1] // kernels.CHUNK)
        checkpoints = x.new_empty(x.shape[0], chunks, x.shape[2], A.shape[-1], dtype=torch.float32)
        states = _trajectory(x, A) if keep else None
        y, h_last = kernels.run_selective(*inputs, states=states, checkpoints=checkpoints)
        # Not ``states``: whoever asked for the trajectory may write into it.
        ctx.save_for_backward(*inputs, checkpoints)
        return y, h_last if states is None else states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *inputs, checkpoints = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            run = reference.selective_states if ctx.keep else reference.selective_scan
            return (None, *_by_reference(run, inputs, grads))
        gy, other = grads
        second = {"gstates" if ctx.keep else "gh_last": other}
        found = _kernels().selective_gradients(*inputs[:5], checkpoints, gy, **second)
        return (None, *_matching(found, inputs))


class _Explicit(torch.autograd.Function):
    """`_explicit` under autograd, whose kernels it calls with gradients off."""

    @staticmethod
    def forward(ctx: Any, keep: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.keep = keep
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return _explicit(keep, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            run = reference.explicit_states if ctx.keep else reference.explicit_scan
            return (None, *_by_reference(run, inputs, grads))
        gy, other = grads
        second = {"gstates" if ctx.keep else "gh_last": other}
        found = _kernels().explicit_gradients(*inputs, gy, **second)
        return (None, *_matching(found, inputs))


def _by_reference(run: Any, inputs: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    given = [tensor for tensor in inputs if tensor is not None]  # h_start, the last, may be missing
    pairs = [(result, grad) for result, grad in zip(run(*given), grads, strict=True) if grad is not None]
    found = reference.gradients([result for result, _ in pairs], given, [grad for _, grad in pairs])
    return [*found, *[None] * (len(inputs) - len(given))]


def _matching(found: tuple[Tensor, ...], inputs: Any) -> list[Tensor | None]:
    """Each gradient in the dtype of its input, ``None`` where there is no input."""
    return [
        None if tensor is None else grad.to(tensor.dtype) for grad, tensor in zip(found, inputs, strict=True)
    ]
