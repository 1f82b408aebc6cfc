"""Mamba-2's scan on a CPU in float32: compiled loops (`loops`), on PyTorch's own threads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cpu import unavailable as unavailable
from ..cpu.operators import as_dense, as_floats, ended_state, operator, run_forward, starting_state
from ..linear import linear_into
from ..recompute import recompute
from ..reference import in_dtype
from ..room import Room
from ..runs import Runs
from . import reference
from .linear import LinearScans, decay_and_scale

#: Whether the kernels are worth a call for a single position.
TAKES_ONE_POSITION = True
#: How long the runs of a row may be that `gated_runs` takes: its time grows with the square. An estimate.
LONGEST_RUN = 32

_LOOPS, _GATED, _RUNS = "..dual.loops", "..dual.gated", "..dual.runs"  # as seen from `scan.cpu`
#: From how many positions on the gated scan runs chunk by chunk: the states are transposed before and after.
MANY = 32
_NAMES = ("x", "decay", "scale", "B", "C")
_linear: Any = operator(
    _LOOPS,
    (*_NAMES, "h_start"),
    reference.linear_scan,
    reference.linear_states,
    **{"started": 1, "gated": 0, "D": None, "skip": None},
)


def _run(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *inputs, h_start, keep = others
    x, *inputs = as_floats(x, *inputs)
    y, h_last, states = _linear(x, *inputs, starting_state(x, inputs[-1].shape[-1], h_start), keep)
    return y, states if keep else h_last


_scans = LinearScans(_run)
selective_scan, selective_states = _scans.selective_scan, _scans.selective_states
explicit_scan, explicit_states = _scans.explicit_scan, _scans.explicit_states


def gated_scan(x: Tensor, delta: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.gated_scan`, in float32: one kernel; its backward pass goes through `selective_scan`."""
    return recompute(_gated, _scans.gated_in_steps, x, delta, *others)


def _gated(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, *h_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    start = next(iter(h_start), None)
    start = None if start is None else as_dense(start)
    return _into(ended_state(x, C.shape[-1]), x, delta, A, B, C, D, skip, start)


def gated_update(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `ScanFamily.gated_update`, in float32: `gated_scan` in the memory of h."""
    return _into(ended_state(x, C.shape[-1]) if h is None else h, x, delta, A, B, C, D, skip, h)


def _into(
    h_last: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The gated scan from the state h, which may be h_last, the memory of the last state.
    given = as_floats(x, *decay_and_scale(delta, A), B, C, D, skip)
    inputs = dict(zip((*_NAMES, "D", "skip"), given, strict=True))
    results: Any = {"y": h_last.new_empty(x.shape), "h_last": h_last}
    results |= {"started": int(h is not None), "h_start": h}
    if x.shape[1] >= MANY:
        run_forward(_GATED, inputs, **results)
    else:
        run_forward(_LOOPS, inputs, gated=1, keep=0, states=None, **results)
    return in_dtype(results["y"], x.dtype), h_last


def gated_runs(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    starts: Tensor,
    runs: Runs,
    room: Room | None = None,
) -> Tensor:
    """As `ScanFamily.gated_runs`, in float32: a matmul for what each run reads of its start, and one kernel."""
    given = as_floats(x, *decay_and_scale(delta, A), B, C, D, skip)
    inputs = dict(zip((*_NAMES, "D", "skip"), given, strict=True))
    (starts,) = as_floats(starts)
    rows, groups = len(x), C.shape[2]
    states = starts.view(len(starts), groups, -1, starts.shape[-1])  # [runs,G,channels,N]
    room = room or Room(rows)
    read = room.take("read", (groups, rows * x.shape[1], states.shape[2]), rows)
    for span, state in zip(runs.spans, states, strict=True):
        lines = slice(rows * span.start, rows * span.stop)
        for group in range(groups):
            C_of_run = inputs["C"][:, span, group].reshape(-1, C.shape[-1])  # [B l,N]
            linear_into(read[group, lines], C_of_run, state[group])
    y = room.take("y", x.shape, rows)
    longest = max(runs.lengths)
    inputs |= {"read": read, "begins": runs.begins}
    run_forward(_RUNS, inputs, longest=longest, y=y)
    return in_dtype(y, x.dtype)
