"""Mamba-2's scan on an NVIDIA GPU, on the kernels of mamba-ssm.

The kernel for whole prompts begins at a state and gives the gradients of all arguments and both results. What it
lacks: it gives no state in between and takes no matrices (`scan.dispatch` has Triton run these), takes one A for
all rows, and has no second derivative, which here is that of `reference`. It takes a negative delta for 0, and
lets no state grow, so where an edit makes one do that, `reference` runs. It keeps the states between its chunks in
the dtype of C, so everything is handed over in float32. Even so its matrix products round to TF32.

A single position is one call of another kernel, which is exact, but writes into the state and has no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..buffers import Buffer, check
from ..cuda import apply, installed
from ..recompute import differentiated
from ..rows import by_rows
from . import reference

#: Whether the kernels are worth a call for a single position.
TAKES_ONE_POSITION = True
#: Positions in a chunk of the kernel.
CHUNK = 256

Pair = tuple[Tensor, Tensor]

_X, _STATE = Buffer("batch length heads width", dense=1), Buffer("batch heads width n_state")
#: The arrays that the kernel for whole prompts takes.
SCANNED = {
    "x": _X, "dt": Buffer("batch length heads", dense=1), "A": Buffer("heads"),
    "B": Buffer("batch length groups n_state", dense=1), "C": Buffer("batch length groups n_state", dense=1),
    "D": Buffer("heads"), "z": _X, "initial_states": _STATE,
}  # fmt: skip
#: The arrays that the kernel for a single position takes.
UPDATED = {
    "state": _STATE, "x": Buffer("batch heads width"), "dt": Buffer("batch heads width", dense=0),
    "A": Buffer("heads width n_state", dense=0),
    "B": Buffer("batch groups n_state", dense=1), "C": Buffer("batch groups n_state", dense=1),
    "D": Buffer("heads width", dense=0), "z": Buffer("batch heads width", dense=1),
    "dt_bias": Buffer("heads width", dense=0),
}  # fmt: skip


def unavailable(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, d_state: int = 128
) -> str | None:
    """Why the scan cannot run here, and what to do about it; ``None`` if it can run.

    Args:
        device: where the inputs are; ``None`` asks whether the scan can run at all.
        dtype: the dtype that the scan accumulates in.
        d_state: N.
    """
    for kernel in (installed.chunk_scan_kernel(), installed.state_update_kernel()):
        if isinstance(kernel, str):
            return installed.missing(kernel, device)
    if (reason := installed.misplaced(device, dtype, (torch.float32,))) is not None:
        return reason
    return None if device is None else dual_failure(device)


@functools.cache
def dual_failure(device: torch.device) -> str | None:
    """How the kernels fail on ``device``; ``None`` if they get a small example right."""
    for length in (5, 1):
        x, B, C = (installed.waves(1, length, *sizes, device=device) for sizes in ((2, 16), (1, 16), (1, 16)))
        delta, A = installed.waves(1, length, 2, device=device).abs() + 0.1, installed.waves(2, device=device) - 1.5
        inputs = (x, delta, A, B, C, installed.waves(1, 2, 16, 16, device=device))
        if (reason := installed.failure(selective_scan, reference.selective_scan, *inputs)) is not None:
            return reason
    return None


# -- the functions of `reference` ------------------------------------------------------------------------------


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None) -> Pair:
    """As `reference.selective_scan`, in float32."""
    inputs = (x, delta, A, B, C, h_start)
    if A.dim() == 2:
        return by_rows(selective_scan, inputs, A)
    if x.shape[1] == 1:
        return reference.selective_scan(*inputs) if differentiated(*inputs) else _update(*inputs)
    if not _decays(delta, A):
        return reference.selective_scan(*inputs)
    y, h_last = apply(_scan, reference.selective_scan, *inputs)
    return y, h_last


def gated_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor | None
) -> Pair:
    """As `reference.gated_scan`, in float32; the first result has the dtype of x.

    One kernel runs where no gradient is wanted, otherwise a differentiable scan between PyTorch's operations.
    """
    inputs: tuple[Any, ...] = (x, delta, A, B, C, D, skip, *h_start)
    if A.dim() == 2:
        return by_rows(gated_scan, inputs, A)
    if differentiated(*inputs):
        return reference.gated_scan(*inputs, scan=selective_scan)
    if x.shape[1] > 1 and not _decays(delta, A):
        return reference.gated_scan(*inputs)
    run: Any = _update if x.shape[1] == 1 else _scan
    y, h_last = run(x, delta, A, B, C, *(h_start or (None,)), D, skip)
    return y.to(x.dtype), h_last


@torch.no_grad()
def _decays(delta: Tensor, A: Tensor) -> bool:
    # Whether every A_bar = exp(delta A) is that of a delta that is not negative and an A that is not positive; not
    # so where there is a NaN.
    return bool(torch.maximum(A.amax(), -delta.amin()) <= 0)


# -- calls of the kernels --------------------------------------------------------------------------------------


def _scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None,
    D: Tensor | None = None, z: Tensor | None = None, *, attached: bool = False,
) -> Pair:  # fmt: skip
    # Differentiable once. Whether h_last takes a gradient makes no difference here.
    x, delta, B, C = (_rows(tensor) for tensor in (x, delta, B, C))
    A, h, D = A.float().contiguous(), _dense(h), _dense(D)
    z = None if z is None else _rows(z)
    arrays = {"x": x, "dt": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "initial_states": h}
    check(arrays, SCANNED)
    kernel: Any = installed.chunk_scan_kernel()
    y, h_last = kernel(**arrays, chunk_size=CHUNK, return_final_states=True)
    return y, h_last.clone(memory_format=torch.contiguous_format)  # it is a view


def _update(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None,
    D: Tensor | None = None, z: Tensor | None = None,
) -> Pair:  # fmt: skip
    # The kernel reads strides of D and of the bias of delta even where there are none, so it gets zeros. That
    # their last strides are 0 tells it that the channels of a head share one delta.
    (batch, _, heads, width), d_state = x.shape, B.shape[-1]
    x, B, C = (tensor[:, 0].float().contiguous() for tensor in (x, B, C))
    zeros = x.new_zeros(heads)
    if h is None:
        state = x.new_zeros(batch, heads, width, d_state)
    else:
        state = h.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    arrays = {
        "x": x,
        "state": state,
        "dt": delta[:, 0, :, None].float().expand(-1, -1, width),
        "A": A[:, None, None].float().expand(-1, width, d_state),
        "B": B,
        "C": C,
        "D": (zeros if D is None else D.float())[:, None].expand(-1, width),
        "z": None if z is None else _rows(z)[:, 0],
        "dt_bias": zeros[:, None].expand(-1, width),
    }
    check(arrays, UPDATED)
    kernel: Any = installed.state_update_kernel()
    return kernel(**arrays, dt_softplus=False)[:, None], state


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _rows(tensor: Tensor) -> Tensor:
    # In float32, with the last axis dense.
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
