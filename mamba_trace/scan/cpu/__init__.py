"""The scan on a CPU in float32: compiled loops, on PyTorch's own threads.

Each differentiable scan is registered with PyTorch as a custom operator, so that it also runs in compiled
graphs; its second derivative is that of `reference`. Where no gradient is needed, softplus, D and the gate
are computed in the loop of the scan, and SiLU in the loop of the convolution.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from array import array
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..noting import notes
from ..recompute import recompute
from ..reference import in_dtype
from ..room import Room
from ..runs import Runs
from . import team
from .operators import as_dense, as_floats, ended_state, kernels_in, operator, run_forward, starting_state

#: Whether the kernels are worth a call for a single position.
TAKES_ONE_POSITION = True
#: How long the runs of a row may be that `gated_runs` takes.
LONGEST_RUN = math.inf


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
    # Compiling can fail in many ways, and none of them may stop a model from running.
    if importlib.util.find_spec("numba") is None:
        return "it needs numba: pip install numba"
    try:
        _ = kernels_in(".norm").forward.compiled  # of all kernels the one that is compiled fastest
        return None
    except Exception as error:
        return f"numba does not work here ({type(error).__name__}: {error})"


GATED = ("x", "delta", "A", "B", "C", "D", "skip")  # the inputs of the gated scan in float32
_selective: Any = operator(
    ".selective",
    ("x", "delta", "A", "B", "C", "h_start"),
    reference.selective_scan,
    reference.selective_states,
    started=1,
    gated=0,
    D=None,
    skip=None,
)
_explicit: Any = operator(
    ".explicit", ("A_bar", "B_bar", "x", "C", "h_start"), reference.explicit_scan, reference.explicit_states
)


# -- the functions of `reference`, in float32 ----------------------------------------------------------------


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    y, h_last, _ = _selective(*as_floats(x, delta, A, B, C), starting_state(x, A.shape[-1], h_start), False)
    return y, h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    y, _, states = _selective(*as_floats(x, delta, A, B, C), starting_state(x, A.shape[-1], h_start), True)
    return y, states


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_scan`, in float32."""
    y, h_last, _ = _explicit(*as_floats(A_bar, B_bar, x, C), starting_state(x, A_bar.shape[-1], h_start), False)
    return y, h_last


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_states`, in float32."""
    y, _, states = _explicit(*as_floats(A_bar, B_bar, x, C), starting_state(x, A_bar.shape[-1], h_start), True)
    return y, states


def gated_scan(x: Tensor, delta_2: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`, in float32: one kernel; its backward pass goes through `selective_scan`."""
    in_steps = functools.partial(reference.gated_scan, scan=selective_scan)
    return recompute(_gated, in_steps, x, delta_2, *others)


def _gated(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    *h_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    start = next(iter(h_start), None)
    start = None if start is None else as_dense(start)
    return _into(ended_state(x, A.shape[-1]), x, delta_2, A, B, C, D, skip, start)


def gated_update(
    x: Tensor, delta_2: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `ScanFamily.gated_update`, in float32: `gated_scan` in the memory of h."""
    return _into(ended_state(x, C.shape[-1]) if h is None else h, x, delta_2, A, B, C, D, skip, h)


def _into(h_last: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    # The gated scan from the state h, the last of the inputs, which may be h_last, the memory of the last state.
    *rest, h = others
    inputs = dict(zip(GATED, as_floats(x, *rest), strict=True))
    y, started = h_last.new_empty(x.shape), int(h is not None)
    run_forward(".selective", inputs, started=started, gated=1, keep=0, y=y, h_start=h, h_last=h_last, states=None)
    return in_dtype(y, x.dtype), h_last


def gated_runs(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    starts: Tensor,
    runs: Runs,
    room: Room | None = None,
) -> Tensor:
    """As `ScanFamily.gated_runs`, in float32: one kernel for all runs."""
    *tensors, starts = as_floats(x, delta_2, A, B, C, D, skip, starts)
    inputs = dict(zip(GATED, tensors, strict=True)) | {"starts": starts, "begins": runs.begins}
    y = (room or Room(len(x))).take("y", x.shape, len(x))
    run_forward(".selective", inputs, "forward_runs", started=1, gated=1, keep=0, y=y, states=None)
    return in_dtype(y, x.dtype)


def causal_conv(
    x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, activate: bool = False
) -> Tensor:
    """As `reference.causal_conv`, in float32."""
    fast, slow = (functools.partial(run, activate=activate) for run in (convolved, reference.causal_conv))
    return recompute(fast, slow, x_in, weight, bias, before)


def causal_conv_runs(
    x_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    runs: Runs,
    *,
    activate: bool,
    room: Room | None = None,
) -> Tensor:
    """As `scan.runs.causal_conv_runs`, in float32: one kernel for all runs. Not differentiable.

    The result is made in ``room``, if there is any.
    """
    given: Any = {"starts": _history(starts), "begins": runs.begins}
    given["out"] = None if room is None else room.take("conv", x_in.shape, len(x_in))
    return _run_conv("forward_runs", x_in, weight, bias, activate, started=1, kept=0, columns=None, **given)


def conv_update(x_in: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """SiLU of the convolution of one position [B,1,channels], in float32: one kernel. Not differentiable.

    Args:
        x_in: [B,1,channels].
        weight: [channels,K].
        bias: [channels] or ``None``.
        columns: those before [B,channels,K], which become those up to this position, in place.
    """
    out, width = torch.empty_like(x_in, memory_format=torch.contiguous_format), x_in.shape[-1]
    biased: Any = {"biased": int(bias is not None), "bias": None if bias is None else as_dense(bias)}
    arrays = {"x_in": x_in[:, 0], "columns": columns, "weight": as_dense(weight), "out": out[:, 0]}
    team.run(kernels_in(".conv").update, team.pieces(len(x_in), -(-width // 4)), **arrays, **biased)
    return out


def convolved(
    x_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    activate: bool,
    columns: Tensor | None = None,
) -> Tensor:
    """As `causal_conv`, but not differentiable: one kernel.

    Args:
        x_in, weight, bias, before, activate: as there.
        columns: in float32 and dense [B,channels,K]. It is overwritten with the last columns of x_in; those of
            ``before``, or zeros, come before them where x_in has fewer.
    """
    history = None if before is None else _history(before)
    flags: Any = {"started": int(before is not None), "kept": int(columns is not None)}
    return _run_conv("forward", x_in, weight, bias, activate, before=history, columns=columns, **flags)


def _history(before: Tensor) -> Tensor:
    # The columns [B,channels,K] before a call as the kernel takes those that it reads [B,K-1,channels].
    return as_dense(before[..., 1:].transpose(1, 2))


def _run_conv(
    kernel: str,
    x_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    out: Tensor | None = None,
    **others: Any,
) -> Tensor:
    batch, length, width = x_in.shape
    (given,) = as_floats(x_in)
    out = given.new_empty(given.shape) if out is None else out
    team.run(
        getattr(kernels_in(".conv"), kernel),
        team.pieces(batch * length, -(-width // 4)),  # far less work at a position than in a scan
        past=weight.shape[1] - 1,
        activate=int(activate),
        x_in=given,
        weight=as_dense(weight),
        biased=int(bias is not None),
        bias=None if bias is None else as_dense(bias),
        out=out,
        **others,
    )
    return in_dtype(out, x_in.dtype)


# -- a linear layer ------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`scan.linear.linear` [...,M] of few vectors x [...,K] in float32, a dense weight [M,K] and a dense bias [M].

    Not differentiable. It is written into ``out``, if that is given, which is dense. Where a weight is small the call
    takes longer than the loop, so nothing is checked here: it is for `scan.linear`, which has looked at the tensors.
    """
    width, inner = weight.shape
    vectors = x if x.dim() == 2 else x.reshape(-1, inner)
    vectors = vectors if vectors.stride(1) == 1 else vectors.contiguous()
    lines, out = len(vectors), x.new_empty(*x.shape[:-1], width) if out is None else out
    kernel, pieces = kernels_in(".few_vectors").forward, team.pieces(width // 4, lines * inner // 16)
    sizes = (int(bias is not None), lines, inner, width)
    addresses = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    block = array("q", (0, pieces, *sizes, vectors.data_ptr(), vectors.stride(0), *addresses))
    if (listener := notes.listener) is not None:
        listener(kernel, block, pieces, {"biased": sizes[0], "x": vectors, "weight": weight, "bias": bias, "out": out})
    team.launch(kernel.compiled, block, pieces)
    return out


def has_blas() -> bool:
    """Whether `linear_by_blas` can run here."""
    return kernels_in(".blas").sgemm() != 0


def linear_by_blas(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of any number of vectors, as PyTorch multiplies them. Not differentiable."""
    width, inner = weight.shape
    vectors = x.reshape(-1, inner)
    vectors = vectors if vectors.stride(1) == 1 and vectors.stride(0) >= inner else vectors.contiguous()
    out, blas = vectors.new_empty(len(vectors), width), kernels_in(".blas")
    arrays = {"x": vectors, "weight": weight, "bias": bias, "out": out}
    team.run(blas.forward, 1, sgemm=blas.sgemm(), biased=blas.when_biased(x, bias), **arrays)
    return out.view(*x.shape[:-1], width)


# -- number by number ----------------------------------------------------------------------------------------


def of_each(kernel: str, one: Tensor) -> Tensor:
    """What a kernel of `elements` makes of each number of a dense tensor in float32; not differentiable."""
    out = torch.empty_like(one)
    team.run(getattr(kernels_in(".elements"), kernel), _shares(one), one=one.view(-1), out=out.view(-1))
    return out


def of_pairs(kernel: str, one: Tensor, other: Tensor) -> Tensor:
    """What a kernel of `elements` makes of tensors in float32: the last axes of ``one`` are those of ``other``.

    Only the last axis of ``one`` need be dense where that is the only one of ``other``.
    """
    out = torch.empty_like(one, memory_format=torch.contiguous_format)
    lines = (-1, other.numel())
    arrays = {"one": one.view(lines), "other": other.view(-1), "out": out.view(lines)}
    team.run(getattr(kernels_in(".elements"), kernel), _shares(one), **arrays)
    return out


def _shares(tensor: Tensor) -> int:
    return team.pieces(tensor.numel() // 64, 1)  # a scan's step takes as long as 64 numbers here


# -- the norm ------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, group_size: int) -> Tensor:
    """`scan.norm.rms_norm` of values in float32 [...,E]; not differentiable."""
    width = x.shape[-1]
    rows = x if x.dim() == 3 else x.reshape(1, -1, width)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    out = rows.new_empty(rows.shape)
    team.run(
        kernels_in(".norm").forward,
        team.pieces(rows.shape[0] * rows.shape[1], -(-width // 64)),  # a scan's step takes as long as 64 channels here
        epsilon=_bits(epsilon),
        groups=width // group_size,
        weighted=int(weight is not None),
        x=rows,
        weight=None if weight is None else as_dense(weight),
        out=out,
    )
    return out if x.dim() == 3 else out.view(x.shape)


@functools.cache
def _bits(number: float) -> int:
    # The bits of a float32, which a kernel takes as an integer.
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))
