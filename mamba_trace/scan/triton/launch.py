"""The Triton kernels called on tensors: what they write into, their grid and their blocks.

Importing this module imports Triton. Nothing here is differentiable; gradients are separate functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import Buffer, check
from . import backward, kernels

#: Positions between the states that the backward pass keeps, a multiple of what is unrolled.
CHUNK = 64
#: Positions loaded together, for a block of TILE: with more the kernel waits less often, but needs more
#: registers.
UNROLL = 8
#: The same going backwards, where each position needs more registers.
UNROLL_BACKWARD = 4
#: Elements of a block of the state: 4 for each thread of a warp. With more there would be too few programs to
#: fill a GPU from one batch row (E=1536, N=16: 192 programs), with fewer a step is all waiting for the last.
TILE = 128
#: Whether Triton's interpreter runs these, on a CPU too: TRITON_INTERPRET=1 when Triton was imported.
#: ``tl.sum`` is a kernel of Triton's own, which must be interpreted as well.
INTERPRETED = triton.knobs.runtime.interpret and not isinstance(tl.sum, triton.runtime.JITFunction)

_ANY = dict.fromkeys(("x", "delta", "skip", "gy"), "batch length width")
_ANY |= dict.fromkeys(("A", "h_start", "gh_last"), "batch width n_state") | {"D": "width"}
_ANY |= dict.fromkeys(("B", "C"), "batch length n_state")
_ANY |= dict.fromkeys(("A_bar", "B_bar", "gstates"), "batch length width n_state")
_ROUNDED = dict.fromkeys(("y", "gx", "gdelta"), "batch length width")
_ROUNDED |= dict.fromkeys(("gA_bar", "gB_bar"), "batch length width n_state")
_EXACT = dict.fromkeys(("h_last", "gA", "gh_start"), "batch width n_state")
_EXACT |= dict.fromkeys(("states", "before"), "batch length width n_state")
_EXACT |= dict.fromkeys(("gB", "gC"), "batch length n_state")
_EXACT |= {"checkpoints": "batch chunks width n_state", "scratch": "programs chunk block_e block_n"}
#: What the kernels take, by the names of their arguments: inputs of any strides and floating-point dtype,
#: results in a dtype that they round to, and what they accumulate or read again, in float32.
BUFFERS = {name: Buffer(axes, dense=0, dtype=None) for name, axes in _ANY.items()}
BUFFERS |= {name: Buffer(axes, dtype=None) for name, axes in _ROUNDED.items()}
BUFFERS |= {name: Buffer(axes) for name, axes in _EXACT.items()}


def run_selective(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None, *,
    D: Tensor | None = None, skip: Tensor | None = None,
    states: Tensor | None = None, checkpoints: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(y, h_last)`` of `reference.selective_scan`, or of `reference.gated_scan` given ``D`` and ``skip``.

    ``states`` [B,L,E,N] and ``checkpoints`` [B,ceil(L/CHUNK),E,N] are written where they are given.
    """
    batch, length, width = x.shape
    y = x.new_empty(x.shape, dtype=torch.float32 if skip is None else x.dtype)
    h_last = x.new_empty(batch, width, A.shape[-1], dtype=torch.float32)
    A = A.expand(batch, -1, -1)
    launch(
        kernels.selective_kernel,
        {"batch": batch, "length": length, "width": width, "n_state": A.shape[-1]},
        {"x": x, "delta": delta, "A": A, "B": B, "C": C, "h_start": h_start, "D": D, "skip": skip},
        {"y": y, "h_last": h_last, "states": states, "checkpoints": checkpoints},
        CHUNK=CHUNK,
    )
    return y, h_last


def empty_checkpoints(x: Tensor, C: Tensor) -> Tensor:
    """Room for the states before each CHUNK of positions [B,ceil(L/CHUNK),...,N]: x [B,L,...], C [B,L,...,N]."""
    batch, length, *channels = x.shape
    return x.new_empty(batch, -(-length // CHUNK), *channels, C.shape[-1], dtype=torch.float32)


def run_explicit(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None, *,
    states: Tensor | None = None, before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(y, h_last)`` of `reference.explicit_scan`.

    The ``states`` after each position, and those ``before``, [B,L,E,N], are written where they are given.
    """
    batch, length, width, d_state = A_bar.shape
    y = x.new_empty(x.shape, dtype=torch.float32)
    h_last = x.new_empty(batch, width, d_state, dtype=torch.float32)
    launch(
        kernels.explicit_kernel,
        {"batch": batch, "length": length, "width": width, "n_state": d_state},
        {"A_bar": A_bar, "B_bar": B_bar, "x": x, "C": C, "h_start": h_start},
        {"y": y, "h_last": h_last, "states": states, "before": before},
    )
    return y, h_last


def selective_gradients(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None, checkpoints: Tensor,
    gy: Tensor | None, gh_last: Tensor | None = None, gstates: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, delta, A, B, C and h_start.

    Args:
        x, delta, A, B, C, h_start: the inputs of `run_selective`.
        checkpoints: the states before each CHUNK of positions, as it wrote them.
        gy, gh_last, gstates: the gradients of y, h_last and the states; ``None`` for zeros.
    """
    batch, length, width = x.shape
    d_state = A.shape[-1]
    programs, block_e, block_n = blocks(width, d_state)
    gx, gdelta = x.new_empty(x.shape), delta.new_empty(x.shape)
    gA, gh_start = x.new_empty(2, batch, width, d_state, dtype=torch.float32)
    gB, gC = x.new_zeros(2, batch, length, d_state, dtype=torch.float32)
    scratch = x.new_empty(batch * programs, CHUNK, block_e, block_n, dtype=torch.float32)
    grads = {"gy": gy, "gh_last": gh_last, "gstates": gstates}
    results = {"gx": gx, "gdelta": gdelta, "gA": gA, "gB": gB, "gC": gC, "gh_start": gh_start}
    launch(
        backward.selective_backward_kernel,
        {"batch": batch, "length": length, "width": width, "n_state": d_state},
        {"x": x, "delta": delta, "A": A.expand(batch, -1, -1), "B": B, "C": C, **grads},
        {"checkpoints": checkpoints, "scratch": scratch, **results},
        unroll=UNROLL_BACKWARD,
        CHUNK=CHUNK,
    )
    return gx, gdelta, gA if A.dim() == 3 else gA.sum(0), gB, gC, gh_start


def explicit_gradients(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None,
    gy: Tensor | None, gh_last: Tensor | None = None, gstates: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of A_bar, B_bar, x, C and h_start from those of y, h_last and the states."""
    batch, length, width, d_state = A_bar.shape
    before = x.new_empty(A_bar.shape, dtype=torch.float32)
    run_explicit(A_bar, B_bar, x, C, h_start, before=before)
    gA_bar, gB_bar, gx = A_bar.new_empty(A_bar.shape), B_bar.new_empty(A_bar.shape), x.new_empty(x.shape)
    gC = x.new_zeros(batch, length, d_state, dtype=torch.float32)
    gh_start = x.new_empty(batch, width, d_state, dtype=torch.float32)
    grads = {"gy": gy, "gh_last": gh_last, "gstates": gstates}
    launch(
        backward.explicit_backward_kernel,
        {"batch": batch, "length": length, "width": width, "n_state": d_state},
        {"A_bar": A_bar, "B_bar": B_bar, "x": x, "C": C, **grads},
        {"before": before, "gA_bar": gA_bar, "gB_bar": gB_bar, "gx": gx, "gC": gC, "gh_start": gh_start},
        unroll=UNROLL_BACKWARD,
    )
    return gA_bar, gB_bar, gx, gC, gh_start


def blocks(width: int, d_state: int) -> tuple[int, int, int]:
    """``(programs for each batch row and head, BLOCK_E, BLOCK_N)``."""
    block_n = triton.next_power_of_2(d_state)
    # The interpreter's time is that of the programs, whatever their blocks.
    block_e = 16 if INTERPRETED else min(32, max(1, TILE // block_n))
    return triton.cdiv(width, block_e), block_e, block_n


def launch(
    kernel: Any,
    axes: Mapping[str, int],
    strided: Mapping[str, Tensor | None],
    dense: Mapping[str, Tensor | None],
    buffers: Mapping[str, Buffer] = BUFFERS,
    unroll: int = UNROLL,
    **constants: int,
) -> None:
    """Run ``kernel`` for each batch row, head and block of channels.

    Args:
        kernel: takes the arrays in the order in which they are given here, then the sizes of ``axes`` but for
            the batch, then the strides of the arrays in ``strided``, then constants.
        axes: the sizes of the axes: ``batch`` first, and ``length``, ``width`` and ``n_state`` among them. Where
            there are ``heads``, the width is that of one of them.
        strided: the arrays that the kernel reads at any strides, by name.
        dense: the arrays that the kernel writes, or that an earlier kernel wrote for it, by name.
        buffers: the declarations of the arrays.
        unroll: positions loaded together, for a block of TILE.
        **constants: further constants.

    Raises:
        BackendError: if a tensor does not match its declaration in ``buffers``.
    """
    _, *numbers = axes.values()
    of_each, block_e, block_n = blocks(axes["width"], axes["n_state"])
    programs = axes["batch"] * axes.get("heads", 1) * of_each
    tensors = {**strided, **dense}
    sizes = {"programs": programs, "chunk": CHUNK, "block_e": block_e, "block_n": block_n}
    check(tensors, buffers, chunks=-(-axes["length"] // CHUNK), **axes, **sizes)
    some = next(tensor for tensor in tensors.values() if tensor is not None)
    with torch.cuda.device_of(some):
        kernel[(programs,)](
            *tensors.values(),
            *numbers,
            *(None if tensor is None else tensor.stride() for tensor in strided.values()),
            **constants,
            UNROLL=unroll * TILE // max(TILE, block_n),  # a single channel may have a state of more than TILE
            BLOCK_E=block_e,
            BLOCK_N=block_n,
            num_warps=1,
            enable_fp_fusion=True,
        )
