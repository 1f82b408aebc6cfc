"""The gradients of the selective scan as compiled loops, for float32 on a CPU; see `_selective`.

The states are computed again, chunk by chunk from the last to the first, so nothing grows with the length
but one state for each chunk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..buffers import Buffer, Layout
from .compiled import LOG2E, OPTIONS, array, exp2, kernel, next_piece, parameters, taking
from .selective import WIDTH

CHUNK = 64  # positions between the states that are kept

BACKWARD = Layout(
    "keep",
    A=Buffer("width n_state"),
    x=Buffer("batch length width"),
    delta=Buffer("batch length width"),
    B=Buffer("batch length n_state"),
    C=Buffer("batch length n_state"),
    h_start=Buffer("batch width n_state"),
    gy=Buffer("batch length width"),
    gh_last=Buffer("batch width n_state"),
    gstates=Buffer("batch length width n_state", when="keep"),
    gx=Buffer("batch length width"),
    gdelta=Buffer("batch length width"),
    gA=Buffer("batch width n_state"),
    gh_start=Buffer("batch width n_state"),
    gB=Buffer("pieces batch length n_state"),
    gC=Buffer("pieces batch length n_state"),
)
AT = BACKWARD.at


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


@taking(BACKWARD)
@kernel
def backward(data):  # type: ignore[no-untyped-def]
    """Gradients of pieces of the blocks of `_selective.forward`.

    ``keep``: whether there are gradients of the states. Results: gx, gdelta and gh_start; gA, to be
    summed over the batch; gB and gC, zeros that are added to, to be summed over the pieces.
    """
    p = parameters(data)
    batch, length, width, n_state = p[AT.batch], p[AT.length], p[AT.width], p[AT.n_state]
    keep, pieces = p[AT.keep], p[AT.pieces]
    A = array(p, AT.A, (width, n_state))
    x = array(p, AT.x, (batch, length, width))
    delta = array(p, AT.delta, (batch, length, width))
    B = array(p, AT.B, (batch, length, n_state))
    C = array(p, AT.C, (batch, length, n_state))
    h_start = array(p, AT.h_start, (batch, width, n_state))
    gy = array(p, AT.gy, (batch, length, width))
    gh_last = array(p, AT.gh_last, (batch, width, n_state))
    gstates = array(p, AT.gstates, (batch, length, width, n_state))
    gx = array(p, AT.gx, (batch, length, width))
    gdelta = array(p, AT.gdelta, (batch, length, width))
    gA = array(p, AT.gA, (batch, width, n_state))
    gh = array(p, AT.gh_start, (batch, width, n_state))
    gB = array(p, AT.gB, (pieces, batch, length, n_state))
    gC = array(p, AT.gC, (pieces, batch, length, n_state))
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
        if piece >= pieces:
            break
        for block in range(batch * blocks * piece // pieces, batch * blocks * (piece + 1) // pieces):
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
