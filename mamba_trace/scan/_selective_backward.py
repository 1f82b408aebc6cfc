"""The gradients of the selective scan as compiled loops, for float32 on a CPU; see `_selective`.

The states are computed again, chunk by chunk from the last to the first, so nothing grows with the length
but one state for each chunk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ._compiled import FIRST_OWN, LOG2E, OPTIONS, PIECES, array, exp2, kernel, next_piece, parameters
from ._selective import WIDTH

CHUNK = 64  # positions between the states that are kept


@njit(**OPTIONS)
def run_chunk(  # type: ignore[no-untyped-def]
    x, delta, B, a, starts, c, states, decays, b, e0, w, begin, end
):
    """From starts[c] on, the states after positions ``begin`` to ``end - 1`` of a block, and its A_bar."""
    for n in range(a.shape[0]):
        for e in range(WIDTH):
            states[0, n, e] = starts[c, n, e]
    d = np.zeros(WIDTH, np.float32)
    dx = np.zeros(WIDTH, np.float32)
    for t in range(begin, end):
        for e in range(w):
            d[e] = delta[b, t, e0 + e]
            dx[e] = d[e] * x[b, t, e0 + e]
        for n in range(a.shape[0]):
            bn = B[b, t, n]
            for e in range(WIDTH):
                decay = exp2(d[e] * a[n, e])
                decays[t - begin, n, e] = decay
                states[t - begin + 1, n, e] = decay * states[t - begin, n, e] + dx[e] * bn


@kernel
def backward(data):  # type: ignore[no-untyped-def]
    """Gradients of pieces of the blocks of `_selective.forward`.

    Parameters: B, L, E, N; whether there are gradients of the states; then, contiguous, A [E,N]; x, delta
    [B,L,E], B, C [B,L,N] and h_start [B,E,N]; the gradients of y [B,L,E], h_last [B,E,N] and the states
    [B,L,E,N]; then the results gx, gdelta [B,L,E], gA [B,E,N] (to be summed over B), gh_start [B,E,N], and
    gB, gC [pieces,B,L,N] (zeros, to be summed over the pieces).
    """
    p = parameters(data)
    i = FIRST_OWN
    batch, length, width, n_state, keep = p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4]
    A = array(p, i + 5, (width, n_state))
    x = array(p, i + 6, (batch, length, width))
    delta = array(p, i + 9, (batch, length, width))
    B = array(p, i + 12, (batch, length, n_state))
    C = array(p, i + 15, (batch, length, n_state))
    h_start = array(p, i + 18, (batch, width, n_state))
    gy = array(p, i + 21, (batch, length, width))
    gh_last = array(p, i + 24, (batch, width, n_state))
    gstates = array(p, i + 27, (batch, length, width, n_state))
    gx = array(p, i + 30, (batch, length, width))
    gdelta = array(p, i + 33, (batch, length, width))
    gA = array(p, i + 36, (batch, width, n_state))
    gh = array(p, i + 39, (batch, width, n_state))
    gB = array(p, i + 42, (p[PIECES], batch, length, n_state))
    gC = array(p, i + 45, (p[PIECES], batch, length, n_state))
    blocks = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    raw = np.zeros((n_state, WIDTH), np.float32)
    a = np.zeros((n_state, WIDTH), np.float32)
    g = np.zeros((n_state, WIDTH), np.float32)
    ga = np.zeros((n_state, WIDTH), np.float32)
    starts = np.zeros((chunks + 1, n_state, WIDTH), np.float32)
    states = np.zeros((CHUNK + 1, n_state, WIDTH), np.float32)
    decays = np.zeros((CHUNK, n_state, WIDTH), np.float32)
    d = np.zeros(WIDTH, np.float32)
    xs = np.zeros(WIDTH, np.float32)
    go = np.zeros(WIDTH, np.float32)
    through_b = np.zeros(WIDTH, np.float32)
    through_a = np.zeros(WIDTH, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p[PIECES]:
            break
        for block in range(batch * blocks * piece // p[PIECES], batch * blocks * (piece + 1) // p[PIECES]):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, width - e0)
            for e in range(WIDTH):
                d[e], xs[e], go[e] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for n in range(n_state):
                for e in range(WIDTH):
                    raw[n, e], a[n, e], starts[0, n, e] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    g[n, e], ga[n, e] = np.float32(0.0), np.float32(0.0)
                for e in range(w):
                    raw[n, e] = A[e0 + e, n]
                    a[n, e] = A[e0 + e, n] * LOG2E
                    starts[0, n, e] = h_start[b, e0 + e, n]
                    g[n, e] = gh_last[b, e0 + e, n]
            for c in range(chunks - 1):  # the last chunk is run below
                run_chunk(x, delta, B, a, starts, c, states, decays, b, e0, w, c * CHUNK, (c + 1) * CHUNK)
                for n in range(n_state):
                    for e in range(WIDTH):
                        starts[c + 1, n, e] = states[CHUNK, n, e]
            for c in range(chunks - 1, -1, -1):
                begin, end = c * CHUNK, min((c + 1) * CHUNK, length)
                run_chunk(x, delta, B, a, starts, c, states, decays, b, e0, w, begin, end)
                for t in range(end - 1, begin - 1, -1):
                    for e in range(w):
                        d[e] = delta[b, t, e0 + e]
                        xs[e] = x[b, t, e0 + e]
                        go[e] = gy[b, t, e0 + e]
                    if keep:
                        for n in range(n_state):
                            for e in range(w):
                                g[n, e] += gstates[b, t, e0 + e, n]
                    for e in range(WIDTH):
                        through_b[e] = np.float32(0.0)
                        through_a[e] = np.float32(0.0)
                    for n in range(n_state):
                        bn, cn = B[b, t, n], C[b, t, n]
                        sum_b, sum_c = np.float32(0.0), np.float32(0.0)
                        for e in range(WIDTH):
                            decay = decays[t - begin, n, e]
                            gn = g[n, e] + go[e] * cn
                            sum_c += go[e] * states[t - begin + 1, n, e]
                            sum_b += gn * d[e] * xs[e]
                            through_b[e] += gn * bn
                            log_decay = gn * states[t - begin, n, e] * decay
                            through_a[e] += log_decay * raw[n, e]
                            ga[n, e] += log_decay * d[e]
                            g[n, e] = gn * decay
                        gB[piece, b, t, n] += sum_b
                        gC[piece, b, t, n] += sum_c
                    for e in range(w):
                        gx[b, t, e0 + e] = d[e] * through_b[e]
                        gdelta[b, t, e0 + e] = xs[e] * through_b[e] + through_a[e]
            for n in range(n_state):
                for e in range(w):
                    gA[b, e0 + e, n] = ga[n, e]
                    gh[b, e0 + e, n] = g[n, e]
