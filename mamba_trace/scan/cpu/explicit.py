"""The scan over given A_bar and B_bar, and its gradients, as compiled loops for float32 on a CPU.

The matrices [B,L,E,N] are read once, in the order in which they lie in memory, so memory sets the pace. Each
piece of work is a range of channels of one batch row.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from .compiled import arguments_at, kernel, next_piece

WIDTH = 16  # channels in a block

FORWARD = BlockLayout(
    "keep",
    A_bar=Buffer("batch length width n_state", dense=2), B_bar=Buffer("batch length width n_state", dense=2),
    x=Buffer("batch length width"), C=Buffer("batch length n_state"), h_start=Buffer("batch width n_state"),
    y=Buffer("batch length width"), h_last=Buffer("batch width n_state"),
    states=Buffer("batch length width n_state", when="keep"),
)  # fmt: skip
BACKWARD = BlockLayout(
    "keep",
    A_bar=Buffer("batch length width n_state"), B_bar=Buffer("batch length width n_state"),
    x=Buffer("batch length width"), C=Buffer("batch length n_state"), h_start=Buffer("batch width n_state"),
    states=Buffer("batch length width n_state"),
    gy=Buffer("batch length width"), gh_last=Buffer("batch width n_state"),
    gstates=Buffer("batch length width n_state", when="keep"),
    gA_bar=Buffer("batch length width n_state"), gB_bar=Buffer("batch length width n_state"),
    gx=Buffer("batch length width"), gC=Buffer("pieces batch length n_state"),
    gh_start=Buffer("batch width n_state"),
)  # fmt: skip


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x channel blocks) over all positions. Results: y, h_last and states.

    ``keep``: whether to keep the states.
    """
    p = arguments_at(data)
    blocks = (p.width + WIDTH - 1) // WIDTH
    h = np.zeros((WIDTH, p.n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(p.batch * blocks * piece // p.pieces, p.batch * blocks * (piece + 1) // p.pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, p.width - e0)
            for e in range(w):
                for n in range(p.n_state):
                    h[e, n] = p.h_start[b, e0 + e, n]
            for t in range(p.length):
                for e in range(w):
                    xe, out = p.x[b, t, e0 + e], np.float32(0.0)
                    for n in range(p.n_state):
                        state = p.A_bar[b, t, e0 + e, n] * h[e, n] + p.B_bar[b, t, e0 + e, n] * xe
                        h[e, n] = state
                        out += state * p.C[b, t, n]
                    p.y[b, t, e0 + e] = out
                    if p.keep:
                        for n in range(p.n_state):
                            p.states[b, t, e0 + e, n] = h[e, n]
            for e in range(w):
                for n in range(p.n_state):
                    p.h_last[b, e0 + e, n] = h[e, n]


@kernel(BACKWARD)
def backward(data):  # type: ignore[no-untyped-def]
    """Compute the gradients for pieces of the blocks of `forward`.

    ``states`` are those that `forward` made; ``keep``: whether there are gradients of them. Results: gA_bar,
    gB_bar, gx and gh_start; gC, which must be zeros before, is added to, and is to be summed over the pieces.
    """
    p = arguments_at(data)
    blocks = (p.width + WIDTH - 1) // WIDTH
    g = np.zeros((WIDTH, p.n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(p.batch * blocks * piece // p.pieces, p.batch * blocks * (piece + 1) // p.pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, p.width - e0)
            for e in range(w):
                for n in range(p.n_state):
                    g[e, n] = p.gh_last[b, e0 + e, n]
            for t in range(p.length - 1, -1, -1):
                for e in range(w):
                    xe, go, through_b = p.x[b, t, e0 + e], p.gy[b, t, e0 + e], np.float32(0.0)
                    if p.keep:
                        for n in range(p.n_state):
                            g[e, n] += p.gstates[b, t, e0 + e, n]
                    for n in range(p.n_state):
                        before = p.states[b, t - 1, e0 + e, n] if t > 0 else p.h_start[b, e0 + e, n]
                        gn = g[e, n] + go * p.C[b, t, n]
                        p.gC[piece, b, t, n] += go * p.states[b, t, e0 + e, n]
                        p.gA_bar[b, t, e0 + e, n] = gn * before
                        p.gB_bar[b, t, e0 + e, n] = gn * xe
                        through_b += gn * p.B_bar[b, t, e0 + e, n]
                        g[e, n] = gn * p.A_bar[b, t, e0 + e, n]
                    p.gx[b, t, e0 + e] = through_b
            for e in range(w):
                for n in range(p.n_state):
                    p.gh_start[b, e0 + e, n] = g[e, n]
