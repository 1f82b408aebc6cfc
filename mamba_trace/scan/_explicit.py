"""The scan over given A_bar and B_bar, and its gradients, as compiled loops for float32 on a CPU.

The matrices [B,L,E,N] are read once, in the order in which they lie in memory, so memory sets the pace. Each
piece is a range of channels of one row of the batch.
"""

from __future__ import annotations

import numpy as np

from ._compiled import FIRST_OWN, PIECES, array, flat, kernel, next_piece, parameters

WIDTH = 16  # channels in a block


@kernel
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x channel blocks) over all positions.

    Parameters: B, L, E, N; whether to keep the states; then A_bar and B_bar [B,L,E,N], of any strides but for
    their last two axes; then, contiguous, x [B,L,E], C [B,L,N] and h_start [B,E,N]; then the results
    y [B,L,E], h_last [B,E,N] and states [B,L,E,N].
    """
    p = parameters(data)
    i = FIRST_OWN
    batch, length, width, n_state, keep = p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4]
    A_bar, A_b, A_t = flat(p, i + 5), p[i + 6], p[i + 7]
    B_bar, B_b, B_t = flat(p, i + 8), p[i + 9], p[i + 10]
    x = array(p, i + 11, (batch, length, width))
    C = array(p, i + 14, (batch, length, n_state))
    h_start = array(p, i + 17, (batch, width, n_state))
    y = array(p, i + 20, (batch, length, width))
    h_last = array(p, i + 23, (batch, width, n_state))
    states = array(p, i + 26, (batch, length, width, n_state))
    blocks = (width + WIDTH - 1) // WIDTH
    h = np.zeros((WIDTH, n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p[PIECES]:
            break
        for block in range(batch * blocks * piece // p[PIECES], batch * blocks * (piece + 1) // p[PIECES]):
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
