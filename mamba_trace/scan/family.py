"""The two families of scans, which have the same functions with the same order of arguments.

    SELECTIVE  Mamba-1, Falcon-Mamba, Jamba: each channel has a delta and decays of its own
               x, delta [B,L,E], A [E,N], B, C [B,L,N], states [B,E,N]
    DUAL       Mamba-2 and the hybrids with its mixer: the channels of a head share one delta and one decay
               x [B,L,H,P], delta [B,L,H], A [H], B, C [B,L,G,N], states [B,H,P,N]

Whoever holds a `ScanFamily` can run scans without knowing which of the two it is: positions are the second axis
of all inputs that have positions, and rows the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import dispatch, dual, reference

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
        explicit_scan: ``(A_bar, B_bar, x, C, h_start) -> (y, h_last)``.
        explicit_states: the same with the state after each position.
        read_out: ``(states, C) -> y``.

    Example::

        y, h_last = DUAL.selective_scan(x, delta, A, B, C, kernels="cpu")
    """

    name: str
    selective_scan: Scan
    selective_states: Scan
    gated_scan: Scan
    explicit_scan: Scan
    explicit_states: Scan
    read_out: Callable[[Tensor, Tensor], Tensor]


#: The scans of Mamba-1.
SELECTIVE = ScanFamily(
    name="selective",
    selective_scan=dispatch.selective_scan,
    selective_states=dispatch.selective_states,
    gated_scan=dispatch.gated_scan,
    explicit_scan=dispatch.explicit_scan,
    explicit_states=dispatch.explicit_states,
    read_out=reference.read_out,
)


def _dual(definition: Scan) -> Scan:
    return dispatch.dispatched(definition, dual.BACKENDS, dual.outline)


#: The scans of Mamba-2.
DUAL = ScanFamily(
    name="dual",
    selective_scan=_dual(dual.reference.selective_scan),
    selective_states=_dual(dual.reference.selective_states),
    gated_scan=_dual(dual.reference.gated_scan),
    explicit_scan=_dual(dual.reference.explicit_scan),
    explicit_states=_dual(dual.reference.explicit_states),
    read_out=dual.reference.read_out,
)
