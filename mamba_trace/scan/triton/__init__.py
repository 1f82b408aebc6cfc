"""The scan on a GPU that needs no CUDA toolkit: Triton's kernels, which Triton compiles at their first use.

The functions mean what those of `reference` do. They accumulate in float32 and are differentiable in every
argument and both results; the second derivative is that of `reference`. Triton is an optional package, so the
first call imports it and the kernels, and this module does not. Under Triton's interpreter
(TRITON_INTERPRET=1 set before Triton is imported) the same kernels run, slowly, on tensors of a CPU: that is
how they are tested.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..recompute import differentiated, gradients_of

#: A program holds a channel's whole state in the registers of one warp.
MAX_STATE = 256


# -- availability ------------------------------------------------------------------------------------------


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 16
) -> str | None:
    """Why this backend cannot run; ``None`` if it can.

    Args:
        device: where the inputs are; ``None`` asks whether the backend could run on any device.
        dtype: the dtype that the scan accumulates in.
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
    except Exception as error:  # whatever is wrong with an optional package must not stop a model from running
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return None


@functools.cache
def _failure(device: torch.device) -> str | None:
    # What goes wrong in a tiny scan on ``device``, if anything: Triton may lack a compiler, or a driver. The
    # inputs are not drawn at random, so that no generator's state changes.
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
    from . import launch

    return launch


# -- the functions of `reference`, in float32 ----------------------------------------------------------------


def gated_scan(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    *h_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`, in float32; the first result has the dtype of x.

    One kernel runs where no gradient is wanted, otherwise a differentiable scan between PyTorch's operations.
    """
    if differentiated(x, delta_2, A, B, C, D, skip, *h_start):
        return reference.gated_scan(x, delta_2, A, B, C, D, skip, *h_start, scan=selective_scan)
    return _kernels().run_selective(x, delta_2, A, B, C, *h_start, D=D, skip=skip)


def _scan(family: str, what: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    # ``{family}_{what}`` of `reference`.
    inputs += (None,) * (INPUTS[family] - len(inputs))  # h_start, the last of them, may be missing
    if differentiated(*inputs):
        return _Differentiable.apply(family, what, *inputs)
    return _run(family, what, *inputs)


def _run(family: str, what: str, *inputs: Any, **checkpoints: Tensor) -> tuple[Tensor, Tensor]:
    states = None
    if what == "states":
        first, _, third, *_ = inputs  # x and A, or A_bar and x
        shape = first.shape if family == "explicit" else (*first.shape, third.shape[-1])
        states = first.new_empty(shape, dtype=torch.float32)
    y, h_last = getattr(_kernels(), f"run_{family}")(*inputs, states=states, **checkpoints)
    return y, h_last if states is None else states


#: How many inputs the scans of a family have.
INPUTS = {"selective": 6, "explicit": 5}
selective_scan = functools.partial(_scan, "selective", "scan")
selective_states = functools.partial(_scan, "selective", "states")
explicit_scan = functools.partial(_scan, "explicit", "scan")
explicit_states = functools.partial(_scan, "explicit", "states")


class _Differentiable(torch.autograd.Function):
    """`_run` under autograd, which calls the kernels with gradients off."""

    @staticmethod
    def forward(ctx: Any, family: str, what: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.family, ctx.what = family, what
        ctx.set_materialize_grads(False)
        kept = {"checkpoints": _kernels().empty_checkpoints(inputs[0], inputs[2])} if family == "selective" else {}
        # The trajectory is not saved: the caller may write into it.
        ctx.save_for_backward(*inputs, *kept.values())
        return _run(family, what, *inputs, **kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors[: INPUTS[ctx.family]]
        if torch.is_grad_enabled():  # a second derivative will be asked for
            definition = getattr(reference, f"{ctx.family}_{ctx.what}")
            return (None, None, *gradients_of(definition, inputs, grads))
        second = {"gstates" if ctx.what == "states" else "gh_last": grads[1]}
        gradients = getattr(_kernels(), f"{ctx.family}_gradients")(*ctx.saved_tensors, grads[0], **second)
        pairs = zip(gradients, inputs, strict=True)
        return (None, None, *(None if tensor is None else grad.to(tensor.dtype) for grad, tensor in pairs))
