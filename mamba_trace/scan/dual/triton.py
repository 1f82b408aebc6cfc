"""Mamba-2's scan on a GPU that needs no CUDA toolkit: Triton's kernels, which Triton compiles at their first use.

As in `scan.triton`, Triton is imported at the first call, and its interpreter runs the same kernels on a CPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .. import triton
from ..recompute import differentiated
from ..triton import TritonScan
from . import reference
from .linear import LinearScans, decay_and_scale


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 128
) -> str | None:
    """Why this backend cannot run; ``None`` if it can. The arguments are those of `scan.triton.unavailable`."""
    if (reason := triton.unavailable(device, dtype, d_state)) is not None:
        return reason
    return _failure(device) if device is not None and device.type == "cuda" else None


@functools.cache
def _failure(device: torch.device) -> str | None:
    # What goes wrong in a tiny scan on ``device``, if anything.
    def waves(*shape: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float32, device="cpu").view(shape)

    B = waves(1, 5, 1, 4)
    inputs = waves(1, 5, 2, 3), waves(1, 5, 2).abs() + 0.1, -waves(2).abs(), B, 0.5 - B
    return triton.failure_of(selective_scan, reference.selective_scan, device, *inputs)


def _kernels() -> Any:
    return importlib.import_module(".triton_launch", __package__)


_linear = TritonScan(
    ("x", "decay", "scale", "B", "C", "h_start"),
    _kernels,
    "run_linear",
    "linear_gradients",
    reference.linear_scan,
    reference.linear_states,
)


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    *inputs, keep = inputs  # type: ignore[assignment]
    return _linear(*inputs, keep=keep)


_scans = LinearScans(_run)
selective_scan, selective_states = _scans.selective_scan, _scans.selective_states
explicit_scan, explicit_states = _scans.explicit_scan, _scans.explicit_states


def gated_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`, in float32; the first result has the dtype of x.

    One kernel runs where no gradient is wanted, otherwise a differentiable scan between PyTorch's operations.
    """
    if differentiated(x, delta, A, B, C, D, skip, *h_start):
        return _scans.gated_in_steps(x, delta, A, B, C, D, skip, *h_start)
    return _kernels().run_linear(x, *decay_and_scale(delta, A), B, C, *h_start, D=D, skip=skip)
