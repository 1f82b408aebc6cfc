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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..recompute import differentiated, gradients_of, in_memory

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
    return failure_of(selective_scan, reference.selective_scan, device, x, delta, A, B, C)


def failure_of(
    run: Callable[..., Any], define: Callable[..., Any], device: torch.device, *inputs: Tensor
) -> str | None:
    """How ``run`` fails on ``device`` or differs from ``define``, given inputs on the CPU; ``None`` if it does not."""
    try:
        with torch.no_grad():
            results = run(*(tensor.to(device) for tensor in inputs))
            expected = define(*inputs)
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


@dataclass(frozen=True)
class TritonScan:
    """A scan on a pair of kernels.

    Attributes:
        names: what its inputs are called; ``x``, ``C`` and last ``h_start``, which may be missing, are among them.
        launch: imports the module with its kernels.
        run: which function of the module runs it: ``(*inputs, states) -> (y, h_last)``, where ``states`` is
            written unless it is ``None``.
        gradients: which function gives the gradients of the inputs from those of the results.
        scan: the definition, whose second derivatives are taken.
        states: the definition with all states in place of h_last.
        chunked: whether the gradients need the ``checkpoints`` that ``run`` writes.
    """

    names: tuple[str, ...]
    launch: Callable[[], Any]
    run: str
    gradients: str
    scan: Callable[..., tuple[Tensor, Tensor]]
    states: Callable[..., tuple[Tensor, Tensor]]
    chunked: bool = True

    def __call__(self, *inputs: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
        """``(y, h_last)``, or ``(y, states)`` where ``keep``."""
        inputs += (None,) * (len(self.names) - len(inputs))
        return _Differentiable.apply(self, keep, *inputs) if differentiated(*inputs) else self.compute(keep, *inputs)

    def sizes(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """x [B,L,...] and C [B,L,...,N]."""
        return inputs[self.names.index("x")], inputs[self.names.index("C")]

    def compute(self, keep: bool, *inputs: Any, **checkpoints: Tensor) -> tuple[Tensor, Tensor]:
        """The same without a gradient."""
        x, C = self.sizes(inputs)
        states = x.new_empty(*x.shape, C.shape[-1], dtype=torch.float32) if keep else None
        y, h_last = getattr(self.launch(), self.run)(*inputs, states=states, **checkpoints)
        return y, h_last if states is None else states


class _Differentiable(torch.autograd.Function):
    """`TritonScan.compute` under autograd, which calls the kernels with gradients off."""

    @staticmethod
    def forward(ctx: Any, scan: TritonScan, keep: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.scan, ctx.keep = scan, keep
        ctx.set_materialize_grads(False)
        kept = {"checkpoints": _kernels().empty_checkpoints(*scan.sizes(inputs))} if scan.chunked else {}
        # The trajectory is not saved: the caller may write into it.
        ctx.save_for_backward(*inputs, *kept.values())
        return scan.compute(keep, *inputs, **kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scan: TritonScan = ctx.scan
        inputs = ctx.saved_tensors[: len(scan.names)]
        if torch.is_grad_enabled() or not in_memory(*grads):  # a second derivative will be asked for, or many gradients
            return (None, None, *gradients_of(scan.states if ctx.keep else scan.scan, inputs, grads))
        second = {"gstates" if ctx.keep else "gh_last": grads[1]}
        gradients = getattr(scan.launch(), scan.gradients)(*ctx.saved_tensors, grads[0], **second)
        pairs = zip(gradients, inputs, strict=True)
        return (None, None, *(None if tensor is None else grad.to(tensor.dtype) for grad, tensor in pairs))


_selective = TritonScan(
    ("x", "delta", "A", "B", "C", "h_start"),
    _kernels,
    "run_selective",
    "selective_gradients",
    reference.selective_scan,
    reference.selective_states,
)
_explicit = TritonScan(
    ("A_bar", "B_bar", "x", "C", "h_start"),
    _kernels,
    "run_explicit",
    "explicit_gradients",
    reference.explicit_scan,
    reference.explicit_states,
    chunked=False,
)
selective_scan = functools.partial(_selective, keep=False)
selective_states = functools.partial(_selective, keep=True)
explicit_scan = functools.partial(_explicit, keep=False)
explicit_states = functools.partial(_explicit, keep=True)
