"""The gradients of the scan over given A_bar and B_bar as compiled loops; see `_explicit`."""

from __future__ import annotations

import numpy as np

from ._compiled import FIRST_OWN, PIECES, array, kernel, next_piece, parameters
from ._explicit import WIDTH


@kernel
def backward(data):  # type: ignore[no-untyped-def]
    """Gradients of pieces of the blocks of `_explicit.forward`.

    Parameters: B, L, E, N; whether there are gradients of the states; then, contiguous, A_bar, B_bar
    [B,L,E,N], x [B,L,E], C [B,L,N], h_start [B,E,N] and the states [B,L,E,N] of the run; the gradients of y
    [B,L,E], h_last [B,E,N] and the states [B,L,E,N]; then the results gA_bar, gB_bar [B,L,E,N], gx [B,L,E],
    gh_start [B,E,N] and gC [pieces,B,L,N] (zeros, to be summed over the pieces).
    """
    p = parameters(data)
    i = FIRST_OWN
    batch, length, width, n_state, keep = p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4]
    matrices = (batch, length, width, n_state)
    A_bar = array(p, i + 5, matrices)
    B_bar = array(p, i + 8, matrices)
    x = array(p, i + 11, (batch, length, width))
    C = array(p, i + 14, (batch, length, n_state))
    h_start = array(p, i + 17, (batch, width, n_state))
    states = array(p, i + 20, matrices)
    gy = array(p, i + 23, (batch, length, width))
    gh_last = array(p, i + 26, (batch, width, n_state))
    gstates = array(p, i + 29, matrices)
    gA_bar = array(p, i + 32, matrices)
    gB_bar = array(p, i + 35, matrices)
    gx = array(p, i + 38, (batch, length, width))
    gh = array(p, i + 41, (batch, width, n_state))
    gC = array(p, i + 44, (p[PIECES], batch, length, n_state))
    blocks = (width + WIDTH - 1) // WIDTH
    g = np.zeros((WIDTH, n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p[PIECES]:
            break
        for block in range(batch * blocks * piece // p[PIECES], batch * blocks * (piece + 1) // p[PIECES]):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, width - e0)
            for e in range(w):
                for n in range(n_state):
                    g[e, n] = gh_last[b, e0 + e, n]
            for t in range(length - 1, -1, -1):
                for e in range(w):
                    xe, go, through_b = x[b, t, e0 + e], gy[b, t, e0 + e], np.float32(0.0)
                    if keep:
                        for n in range(n_state):
                            g[e, n] += gstates[b, t, e0 + e, n]
                    for n in range(n_state):
                        before = states[b, t - 1, e0 + e, n] if t > 0 else h_start[b, e0 + e, n]
                        gn = g[e, n] + go * C[b, t, n]
                        gC[piece, b, t, n] += go * states[b, t, e0 + e, n]
                        gA_bar[b, t, e0 + e, n] = gn * before
                        gB_bar[b, t, e0 + e, n] = gn * xe
                        through_b += gn * B_bar[b, t, e0 + e, n]
                        g[e, n] = gn * A_bar[b, t, e0 + e, n]
                    gx[b, t, e0 + e] = through_b
            for e in range(w):
                for n in range(n_state):
                    gh[b, e0 + e, n] = g[e, n]
