"""The gradients of the scan over given A_bar and B_bar as compiled loops; see `_explicit`."""

from __future__ import annotations

import numpy as np

from ..buffers import Buffer, Layout
from .compiled import array, kernel, next_piece, parameters, taking
from .explicit import WIDTH

BACKWARD = Layout(
    "keep",
    A_bar=Buffer("batch length width n_state"),
    B_bar=Buffer("batch length width n_state"),
    x=Buffer("batch length width"),
    C=Buffer("batch length n_state"),
    h_start=Buffer("batch width n_state"),
    states=Buffer("batch length width n_state"),
    gy=Buffer("batch length width"),
    gh_last=Buffer("batch width n_state"),
    gstates=Buffer("batch length width n_state", when="keep"),
    gA_bar=Buffer("batch length width n_state"),
    gB_bar=Buffer("batch length width n_state"),
    gx=Buffer("batch length width"),
    gh_start=Buffer("batch width n_state"),
    gC=Buffer("pieces batch length n_state"),
)
AT = BACKWARD.at


@taking(BACKWARD)
@kernel
def backward(data):  # type: ignore[no-untyped-def]
    """Gradients of pieces of the blocks of `_explicit.forward`.

    ``states`` are those of the run; ``keep``: whether there are gradients of the states. Results:
    gA_bar, gB_bar, gx and gh_start; gC, zeros that are added to, to be summed over the pieces.
    """
    p = parameters(data)
    batch, length, width, n_state = p[AT.batch], p[AT.length], p[AT.width], p[AT.n_state]
    keep, pieces = p[AT.keep], p[AT.pieces]
    matrices = (batch, length, width, n_state)
    A_bar = array(p, AT.A_bar, matrices)
    B_bar = array(p, AT.B_bar, matrices)
    x = array(p, AT.x, (batch, length, width))
    C = array(p, AT.C, (batch, length, n_state))
    h_start = array(p, AT.h_start, (batch, width, n_state))
    states = array(p, AT.states, matrices)
    gy = array(p, AT.gy, (batch, length, width))
    gh_last = array(p, AT.gh_last, (batch, width, n_state))
    gstates = array(p, AT.gstates, matrices)
    gA_bar = array(p, AT.gA_bar, matrices)
    gB_bar = array(p, AT.gB_bar, matrices)
    gx = array(p, AT.gx, (batch, length, width))
    gh = array(p, AT.gh_start, (batch, width, n_state))
    gC = array(p, AT.gC, (pieces, batch, length, n_state))
    blocks = (width + WIDTH - 1) // WIDTH
    g = np.zeros((WIDTH, n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= pieces:
            break
        for block in range(batch * blocks * piece // pieces, batch * blocks * (piece + 1) // pieces):
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
