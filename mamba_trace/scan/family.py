"""The families of scans, which have the same functions with the same order of arguments.

    SELECTIVE  Mamba-1, Falcon-Mamba, Jamba: each channel has a delta and decays of its own
               x, delta [B,L,E], A [E,N], B, C [B,L,N], states [B,E,N]
    HEADED     Zamba: the same, with B and C of their own for each head: [B,L,H,N]
    DUAL       Mamba-2 and the hybrids with its mixer: the channels of a head share one delta and one decay
               x [B,L,H,P], delta [B,L,H], A [H], B, C [B,L,G,N], states [B,H,P,N]

Whoever holds a `ScanFamily` can run scans without knowing which of them it is: positions are the second axis
of all inputs that have positions, and rows the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu, dispatch, dual, reference
from .runs import gated_runs

Scan = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ScanFamily:
    """The functions of one family, each on the best backend or on the one that ``kernels=`` names.

    What each takes and gives in the family's shapes stands in its docstring.

    Attributes:
        name: ``"selective"`` or ``"dual"``.
        selective_scan: ``(x, delta, A, B, C, h_start) -> (y, h_last)``.
        selective_states: the same with the state after each position in place of the last state.
        gated_scan: ``(x, delta, A, B, C, D, skip, h_start) -> (after_skip, h_last)``. Its step sizes are those
            before softplus in the selective family, and those after softplus and limits in the dual family.
        gated_update: ``(x, delta, A, B, C, D, skip, h) -> (after_skip, h)``. The same on a CPU in float32, without
            gradients; h is overwritten with the last state. It may be ``None``, for zeros; the last state is in new
            memory then. ``None`` if there is no such function.
        gated_runs: ``(x, delta, A, B, C, D, skip, starts, runs) -> after_skip``. The same without gradients, for rows
            that are several `runs.Runs`; run r starts from ``starts[r]`` in every row. ``room=`` is a `room.Room` that
            the result may be made in.
        explicit_scan: ``(A_bar, B_bar, x, C, h_start) -> (y, h_last)``.
        explicit_states: the same with the state after each position.
        read_out: ``(states, C) -> y``.
        exponent: ``(delta, A) -> delta A``, of which A_bar is exp.
        axes_of_A: how many A has where all rows have the same.

    Example::

        y, h_last = DUAL.selective_scan(x, delta, A, B, C, kernels="cpu")
    """

    name: str
    selective_scan: Scan
    selective_states: Scan
    gated_scan: Scan
    gated_update: Callable[..., tuple[Tensor, Tensor]] | None
    gated_runs: Callable[..., Tensor]
    explicit_scan: Scan
    explicit_states: Scan
    read_out: Callable[[Tensor, Tensor], Tensor]
    exponent: Callable[[Tensor, Tensor], Tensor]
    axes_of_A: int


#: The scans of Mamba-1.
SELECTIVE = ScanFamily(
    name="selective",
    selective_scan=dispatch.selective_scan,
    selective_states=dispatch.selective_states,
    gated_scan=dispatch.gated_scan,
    gated_update=cpu.gated_update,
    gated_runs=dispatch.in_runs(dispatch.gated_scan),
    explicit_scan=dispatch.explicit_scan,
    explicit_states=dispatch.explicit_states,
    read_out=reference.read_out,
    exponent=reference.exponent,
    axes_of_A=2,
)


def _headed(scan: Scan, names: str) -> Scan:
    """A scan of the selective family for each head, with a B and a C of its own: the channels are those of all heads.

    Args:
        scan: of the selective family.
        names: of its arguments.
    """

    def run(*inputs: Tensor | None, kernels: str = "auto") -> tuple[Tensor, Tensor]:
        named = dict(zip(names.split(), inputs, strict=False))
        C = named["C"]
        assert C is not None
        parts = []
        for head in range(C.shape[2]):
            of_head = [_of_head(name, value, head, C.shape[2]) for name, value in named.items()]
            parts.append(scan(*of_head, kernels=kernels))
        ys, states = zip(*parts, strict=True)
        return torch.cat(ys, dim=-1), torch.cat(states, dim=-2)

    return run


#: Which axis of an argument has the channels, and of B and C the heads.
_CHANNELS = {"x": -1, "delta": -1, "D": -1, "skip": -1, "A": -2, "A_bar": -2, "B_bar": -2, "h_start": -2}


def _of_head(name: str, value: Tensor | None, head: int, heads: int) -> Tensor | None:
    if value is None or name in ("B", "C"):
        return None if value is None else value[:, :, head]
    axis = _CHANNELS[name]
    width = value.shape[axis] // heads
    return value.narrow(axis, head * width, width)


def _headed_read_out(states: Tensor, C: Tensor) -> Tensor:
    """y [...,E] of states [...,E,N] and C [...,H,N]."""
    return reference.read_out(states.unflatten(-2, (C.shape[-2], -1)), C).flatten(-2)


_headed_gated_scan = _headed(dispatch.gated_scan, "x delta A B C D skip h_start")
#: The scans of Zamba.
HEADED = ScanFamily(
    name="selective",
    selective_scan=_headed(dispatch.selective_scan, "x delta A B C h_start"),
    selective_states=_headed(dispatch.selective_states, "x delta A B C h_start"),
    gated_scan=_headed_gated_scan,
    gated_update=None,
    gated_runs=functools.partial(gated_runs, _headed_gated_scan),
    explicit_scan=_headed(dispatch.explicit_scan, "A_bar B_bar x C h_start"),
    explicit_states=_headed(dispatch.explicit_states, "A_bar B_bar x C h_start"),
    read_out=_headed_read_out,
    exponent=reference.exponent,
    axes_of_A=2,
)


def _dual(definition: Scan) -> Scan:
    return dispatch.dispatched(definition, dual.BACKENDS, dual.outline)


_dual_gated_scan = _dual(dual.reference.gated_scan)
#: The scans of Mamba-2.
DUAL = ScanFamily(
    name="dual",
    selective_scan=_dual(dual.reference.selective_scan),
    selective_states=_dual(dual.reference.selective_states),
    gated_scan=_dual_gated_scan,
    gated_update=dual.cpu.gated_update,
    gated_runs=dispatch.in_runs(_dual_gated_scan, dual.BACKENDS),
    explicit_scan=_dual(dual.reference.explicit_scan),
    explicit_states=_dual(dual.reference.explicit_states),
    read_out=dual.reference.read_out,
    exponent=dual.reference.exponent,
    axes_of_A=1,
)
