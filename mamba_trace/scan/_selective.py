"""The selective scan as compiled loops over blocks of channels, for float32 on a CPU.

A block is 16 channels wide, so that each inner loop over channels becomes a few vector instructions. The
state of a block [N,16] stays in the first level of cache, and nothing of shape [B,L,E,N] exists unless the
trajectory is asked for.
"""

from __future__ import annotations

import numpy as np

from ._compiled import FIRST_OWN, LOG2E, PIECES, exp2, flat, kernel, next_piece, parameters, silu, softplus

WIDTH = 16  # channels in a block


@kernel
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x channel blocks) over all positions.

    Parameters: B, L, E, N; whether to take softplus of delta, to gate y, and to keep the states; then x,
    delta [B,L,E], B, C [B,L,N] and skip [B,L,E], of any strides but for their last axis; then, contiguous,
    A [E,N], D [E] and h_start [B,E,N]; then the results y [B,L,E], h_last [B,E,N] and states [B,L,E,N].
    """
    p = parameters(data)
    i = FIRST_OWN
    batch, length, width, n_state = p[i], p[i + 1], p[i + 2], p[i + 3]
    before_softplus, gated, keep = p[i + 4], p[i + 5], p[i + 6]
    x, x_b, x_t = flat(p, i + 7), p[i + 8], p[i + 9]
    delta, delta_b, delta_t = flat(p, i + 10), p[i + 11], p[i + 12]
    B, B_b, B_t = flat(p, i + 13), p[i + 14], p[i + 15]
    C, C_b, C_t = flat(p, i + 16), p[i + 17], p[i + 18]
    skip, skip_b, skip_t = flat(p, i + 19), p[i + 20], p[i + 21]
    A, D, h_start = flat(p, i + 22), flat(p, i + 23), flat(p, i + 24)
    y, h_last, states = flat(p, i + 27), flat(p, i + 30), flat(p, i + 33)
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
        if piece >= p[PIECES]:
            break
        for block in range(batch * blocks * piece // p[PIECES], batch * blocks * (piece + 1) // p[PIECES]):
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
