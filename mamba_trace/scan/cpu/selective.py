"""The selective scan as compiled loops over blocks of channels, for float32 on a CPU.

A block is 16 channels wide, so that each inner loop over channels becomes a few vector instructions. The
state of a block [N,16] stays in the first level of cache, and nothing of shape [B,L,E,N] exists unless the
trajectory is asked for.
"""

from __future__ import annotations

import numpy as np

from ..buffers import Buffer, Layout
from .compiled import LOG2E, exp2, flat, kernel, next_piece, parameters, silu, softplus, strided, taking

WIDTH = 16  # channels in a block

FORWARD = Layout(
    "before_softplus gated keep",
    x=Buffer("batch length width", dense=1),
    delta=Buffer("batch length width", dense=1),
    B=Buffer("batch length n_state", dense=1),
    C=Buffer("batch length n_state", dense=1),
    skip=Buffer("batch length width", dense=1, when="gated"),
    A=Buffer("width n_state"),
    D=Buffer("width", when="gated"),
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

    ``before_softplus``: whether to take softplus of delta; ``gated``: whether to add D x to y and gate it;
    ``keep``: whether to keep the states. Results: y, h_last and states.
    """
    p = parameters(data)
    batch, length, width, n_state = p[AT.batch], p[AT.length], p[AT.width], p[AT.n_state]
    before_softplus, gated, keep, pieces = p[AT.before_softplus], p[AT.gated], p[AT.keep], p[AT.pieces]
    x, x_b, x_t = strided(p, AT.x)
    delta, delta_b, delta_t = strided(p, AT.delta)
    B, B_b, B_t = strided(p, AT.B)
    C, C_b, C_t = strided(p, AT.C)
    skip, skip_b, skip_t = strided(p, AT.skip)
    A, D, h_start = flat(p, AT.A), flat(p, AT.D), flat(p, AT.h_start)
    y, h_last, states = flat(p, AT.y), flat(p, AT.h_last), flat(p, AT.states)
    blocks = (width + WIDTH - 1) // WIDTH
    # Where a block is cut short, nobody reads what its last columns hold.
    a = np.empty((n_state, WIDTH), np.float32)
    h = np.empty((n_state, WIDTH), np.float32)
    d = np.empty(WIDTH, np.float32)
    xs = np.empty(WIDTH, np.float32)
    dx = np.empty(WIDTH, np.float32)
    out = np.empty(WIDTH, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= pieces:
            break
        for block in range(batch * blocks * piece // pieces, batch * blocks * (piece + 1) // pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, width - e0)
            start = (b * width + e0) * n_state
            for n in range(n_state):
                for e in range(w):
                    a[n, e] = A[(e0 + e) * n_state + n] * LOG2E
                    h[n, e] = h_start[start + e * n_state + n]
            for t in range(length):
                at = b * x_b + t * x_t + e0
                for e in range(w):
                    xs[e] = x[at + e]
                at = b * delta_b + t * delta_t + e0
                for e in range(w):
                    d[e] = delta[at + e]
                if before_softplus:
                    for e in range(WIDTH):
                        d[e] = softplus(d[e])
                for e in range(WIDTH):
                    dx[e] = d[e] * xs[e]
                    out[e] = np.float32(0.0)
                at_B, at_C = b * B_b + t * B_t, b * C_b + t * C_t
                for n in range(n_state):
                    bn, cn = B[at_B + n], C[at_C + n]
                    for e in range(WIDTH):
                        state = exp2(d[e] * a[n, e]) * h[n, e] + dx[e] * bn
                        h[n, e] = state
                        out[e] += state * cn
                if gated:
                    at = b * skip_b + t * skip_t + e0
                    for e in range(w):
                        dx[e] = skip[at + e]
                        out[e] += D[e0 + e] * xs[e]
                    for e in range(WIDTH):
                        out[e] *= silu(dx[e])
                at = (b * length + t) * width + e0
                for e in range(w):
                    y[at + e] = out[e]
                if keep:
                    for e in range(w):
                        for n in range(n_state):
                            states[(at + e) * n_state + n] = h[n, e]
            for n in range(n_state):
                for e in range(w):
                    h_last[start + e * n_state + n] = h[n, e]
