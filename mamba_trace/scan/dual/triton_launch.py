"""Mamba-2's Triton kernels called on tensors. Importing this module imports Triton; nothing here is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import Buffer
from ..triton.launch import CHUNK, UNROLL_BACKWARD, blocks, launch
from . import triton_kernels as kernels

_ANY = dict.fromkeys(("x", "skip", "gy"), "batch length heads width") | {"D": "heads"}
_ANY |= dict.fromkeys(("decay", "scale"), "batch length heads")
_ANY |= {"B": "batch length groups_B n_state", "C": "batch length groups_C n_state"}
_ANY |= dict.fromkeys(("h_start", "gh_last"), "batch heads width n_state")
_ANY |= {"gstates": "batch length heads width n_state"}
_ROUNDED = dict.fromkeys(("y", "gx"), "batch length heads width")
_EXACT = dict.fromkeys(("h_last", "gh_start"), "batch heads width n_state")
_EXACT |= dict.fromkeys(("gdecay", "gscale"), "batch length heads")
_EXACT |= {"gB": "batch length groups_B n_state", "gC": "batch length groups_C n_state"}
_EXACT |= {"states": "batch length heads width n_state", "checkpoints": "batch chunks heads width n_state"}
_EXACT |= {"scratch": "programs chunk block_e block_n"}
#: What the kernels take, as in `scan.triton.launch`.
BUFFERS = {name: Buffer(axes, dense=0, dtype=None) for name, axes in _ANY.items()}
BUFFERS |= {name: Buffer(axes, dtype=None) for name, axes in _ROUNDED.items()}
BUFFERS |= {name: Buffer(axes) for name, axes in _EXACT.items()}


def run_linear(
    x: Tensor, decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None, *,
    D: Tensor | None = None, skip: Tensor | None = None,
    states: Tensor | None = None, checkpoints: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(y, h_last)`` of `reference.linear_scan`, y being gated given ``D`` and ``skip``.

    ``states`` [B,L,H,P,N] and ``checkpoints`` [B,ceil(L/CHUNK),H,P,N] are written where they are given.
    """
    y = x.new_empty(x.shape, dtype=torch.float32 if skip is None else x.dtype)
    h_last = x.new_empty(x.shape[0], *x.shape[2:], C.shape[-1], dtype=torch.float32)
    inputs = {"x": x, "decay": decay, "scale": scale, "B": B, "C": C, "h_start": h_start, "D": D, "skip": skip}
    results = {"y": y, "h_last": h_last, "states": states, "checkpoints": checkpoints}
    launch(kernels.linear_kernel, _axes(x, B, C), inputs, results, BUFFERS, CHUNK=CHUNK)
    return y, h_last


def linear_gradients(
    x: Tensor, decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None, checkpoints: Tensor,
    gy: Tensor | None, gh_last: Tensor | None = None, gstates: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, decay, scale, B, C and h_start.

    Args:
        x, decay, scale, B, C, h_start: the inputs of `run_linear`.
        checkpoints: the states before each CHUNK of positions, as it wrote them.
        gy, gh_last, gstates: the gradients of y, h_last and the states; ``None`` for zeros.
    """
    axes = _axes(x, B, C)
    batch, _, heads, width = x.shape
    programs, block_e, block_n = blocks(width, C.shape[-1])
    gx, gh_start = x.new_empty(x.shape), x.new_empty(batch, heads, width, C.shape[-1], dtype=torch.float32)
    gdecay, gscale, gB, gC = (x.new_zeros(tensor.shape, dtype=torch.float32) for tensor in (decay, scale, B, C))
    scratch = x.new_empty(batch * heads * programs, CHUNK, block_e, block_n, dtype=torch.float32)
    inputs = {"x": x, "decay": decay, "scale": scale, "B": B, "C": C}
    results = {"gx": gx, "gdecay": gdecay, "gscale": gscale, "gB": gB, "gC": gC, "gh_start": gh_start}
    launch(
        kernels.linear_backward_kernel,
        axes,
        {**inputs, "gy": gy, "gh_last": gh_last, "gstates": gstates},
        {"checkpoints": checkpoints, "scratch": scratch, **results},
        BUFFERS,
        unroll=UNROLL_BACKWARD,
        CHUNK=CHUNK,
    )
    return gx, gdecay, gscale, gB, gC, gh_start


def _axes(x: Tensor, B: Tensor, C: Tensor) -> dict[str, int]:
    sizes = dict(zip(("batch", "length", "heads", "width"), x.shape, strict=True))
    return sizes | {"groups_B": B.shape[2], "groups_C": C.shape[2], "n_state": C.shape[3]}
