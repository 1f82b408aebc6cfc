"""The scan over given A_bar and B_bar, and its gradients, as compiled loops for float32 on a CPU.

The matrices [B,L,E,N] are read once, in the order in which they lie in memory, so memory sets the pace. Each
piece is a range of channels of one row of the batch.
"""

from __future__ import annotations

import numpy as np

from ..buffers import Buffer, Layout
from .compiled import array, kernel, next_piece, parameters, strided, taking

WIDTH = 16  # channels in a block

FORWARD = Layout(
    "keep",
    A_bar=Buffer("batch length width n_state", dense=2),
    B_bar=Buffer("batch length width n_state", dense=2),
    x=Buffer("batch length width"),
    C=Buffer("batch length n_state"),
    h_start=Buffer("batch width n_state"),
    y=Buffer("batch length width"),
    h_last=Buffer("batch width n_state"),
    states=Buffer("batch length width n_state", when="keep"),
)
AT = FORWARD.at


@taking(FORWARD)
@kernel
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x channel blocks) over all positions.

    ``keep``: whether to keep the states. Results: y, h_last and states.
    """
    p = parameters(data)
    batch, length, width, n_state = p[AT.batch], p[AT.length], p[AT.width], p[AT.n_state]
    keep, pieces = p[AT.keep], p[AT.pieces]
    A_bar, A_b, A_t = strided(p, AT.A_bar)
    B_bar, B_b, B_t = strided(p, AT.B_bar)
    x = array(p, AT.x, (batch, length, width))
    C = array(p, AT.C, (batch, length, n_state))
    h_start = array(p, AT.h_start, (batch, width, n_state))
    y = array(p, AT.y, (batch, length, width))
    h_last = array(p, AT.h_last, (batch, width, n_state))
    states = array(p, AT.states, (batch, length, width, n_state))
    blocks = (width + WIDTH - 1) // WIDTH
    h = np.zeros((WIDTH, n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= pieces:
            break
        for block in range(batch * blocks * piece // pieces, batch * blocks * (piece + 1) // pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, width - e0)
            for e in range(w):
                for n in range(n_state):
                    h[e, n] = h_start[b, e0 + e, n]
            for t in range(length):
                for e in range(w):
                    at_A = b * A_b + t * A_t + (e0 + e) * n_state
                    at_B = b * B_b + t * B_t + (e0 + e) * n_state
                    xe, out = x[b, t, e0 + e], np.float32(0.0)
                    for n in range(n_state):
                        state = A_bar[at_A + n] * h[e, n] + B_bar[at_B + n] * xe
                        h[e, n] = state
                        out += state * C[b, t, n]
                    y[b, t, e0 + e] = out
                    if keep:
                        for n in range(n_state):
                            states[b, t, e0 + e, n] = h[e, n]
            for e in range(w):
                for n in range(n_state):
                    h_last[b, e0 + e, n] = h[e, n]
