"""The selective scan: one signature, one meaning on every backend.

    h_p = exp(delta_p A) h_{p-1} + delta_p B_p x_p        y_p = C_p h_p

(Mamba, section 3.2 and algorithm 2, with the Euler form of B that every implementation uses.)

`selective_scan` computes it from the parameters and never builds a [B,L,E,N] tensor. `explicit_scan`
computes h = A_bar h + B_bar x from discretised matrices, for when someone has edited those. Both take an
initial state, return the last one, and are differentiable in every argument and both results. `Recurrence`
is what a mixer holds: the inputs of one call, from which it runs any stretch of positions.

Mamba-2's scan has heads, whose states share one decay. Its functions have the same names and the same order of
arguments, in other shapes: `DUAL` has them, as `SELECTIVE` has those above.
"""

from .dispatch import (
    KERNELS,
    Availability,
    availability,
    causal_conv,
    check,
    convolution,
    explicit_scan,
    explicit_states,
    gated_scan,
    selective_scan,
    selective_states,
)
from .family import DUAL, HEADED, SELECTIVE, ScanFamily
from .links import Links
from .recurrence import Explicit, Recurrence, Selective, Watched

__all__ = [
    "DUAL",
    "HEADED",
    "KERNELS",
    "SELECTIVE",
    "Availability",
    "Explicit",
    "Links",
    "Recurrence",
    "ScanFamily",
    "Selective",
    "Watched",
    "availability",
    "causal_conv",
    "check",
    "convolution",
    "explicit_scan",
    "explicit_states",
    "gated_scan",
    "selective_scan",
    "selective_states",
]
