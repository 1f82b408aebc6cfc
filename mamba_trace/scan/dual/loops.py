"""Mamba-2's scan and its gradients as compiled loops over blocks of a head's channels, for float32 on a CPU.

Both kernels run h_p = decay_p h_{p-1} + (scale_p x_p) B_p with y_p = C_p h_p, which has one decay and one scale
for each head. A block is 16 channels of one head: its state [16,N] stays in the first level of cache, and the
inner loop over N becomes vector instructions.
"""

from __future__ import annotations

import numpy as np

from ..buffers import Buffer, Layout
from ..cpu.compiled import arguments_of, kernel, next_piece, silu

WIDTH = 16  # channels in a block
CHUNK = 32  # positions between the states that the backward pass keeps

_READ = {
    "x": Buffer("batch length heads width", dense=2),
    "decay": Buffer("batch length heads", dense=1), "scale": Buffer("batch length heads", dense=1),
    "B": Buffer("batch length groups_B n_state", dense=2), "C": Buffer("batch length groups_C n_state", dense=2),
    "h_start": Buffer("batch heads width n_state"),
}  # fmt: skip
FORWARD = Layout(
    "gated keep",
    **_READ, D=Buffer("heads", when="gated"), skip=Buffer("batch length heads width", dense=2, when="gated"),
    y=Buffer("batch length heads width"), h_last=Buffer("batch heads width n_state"),
    states=Buffer("batch length heads width n_state", when="keep"),
)  # fmt: skip
BACKWARD = Layout(
    "keep",
    **_READ,
    gy=Buffer("batch length heads width"), gh_last=Buffer("batch heads width n_state"),
    gstates=Buffer("batch length heads width n_state", when="keep"),
    gx=Buffer("batch length heads width"), gh_start=Buffer("batch heads width n_state"),
    gdecay=Buffer("pieces batch length heads"), gscale=Buffer("pieces batch length heads"),
    gB=Buffer("pieces batch length groups_B n_state"), gC=Buffer("pieces batch length groups_C n_state"),
)  # fmt: skip
forward_arguments, backward_arguments = arguments_of(FORWARD), arguments_of(BACKWARD)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x heads x channel blocks) over all positions. Results: y, h_last and states.

    ``gated``: whether to add D x to y and gate it after; ``keep``: whether to keep the states.
    """
    p = forward_arguments(data)
    of_head = (p.width + WIDTH - 1) // WIDTH
    blocks = p.batch * p.heads * of_head
    h = np.zeros((WIDTH, p.n_state), np.float32)
    xs = np.zeros(WIDTH, np.float32)
    out = np.zeros(WIDTH, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(blocks * piece // p.pieces, blocks * (piece + 1) // p.pieces):
            row, c0 = block // of_head, (block % of_head) * WIDTH
            b, head = row // p.heads, row % p.heads
            w = min(WIDTH, p.width - c0)
            group_B, group_C = head * p.groups_B // p.heads, head * p.groups_C // p.heads
            for c in range(w):
                for n in range(p.n_state):
                    h[c, n] = p.h_start[b, head, c0 + c, n]
            for t in range(p.length):
                a, s = p.decay[b, t, head], p.scale[b, t, head]
                for c in range(w):
                    xs[c] = p.x[b, t, head, c0 + c]
                for c in range(0, w, 4):  # B and C are loaded once for four channels
                    d0, d1, d2, d3 = s * xs[c], s * xs[c + 1], s * xs[c + 2], s * xs[c + 3]
                    y0 = y1 = y2 = y3 = np.float32(0.0)
                    for n in range(p.n_state):
                        bn, cn = p.B[b, t, group_B, n], p.C[b, t, group_C, n]
                        h0 = a * h[c, n] + d0 * bn
                        h1 = a * h[c + 1, n] + d1 * bn
                        h2 = a * h[c + 2, n] + d2 * bn
                        h3 = a * h[c + 3, n] + d3 * bn
                        h[c, n], h[c + 1, n], h[c + 2, n], h[c + 3, n] = h0, h1, h2, h3
                        y0 += h0 * cn
                        y1 += h1 * cn
                        y2 += h2 * cn
                        y3 += h3 * cn
                    out[c], out[c + 1], out[c + 2], out[c + 3] = y0, y1, y2, y3
                if p.gated:
                    for c in range(w):
                        out[c] = (out[c] + p.D[head] * xs[c]) * silu(p.skip[b, t, head, c0 + c])
                for c in range(w):
                    p.y[b, t, head, c0 + c] = out[c]
                if p.keep:
                    for c in range(w):
                        for n in range(p.n_state):
                            p.states[b, t, head, c0 + c, n] = h[c, n]
            for c in range(w):
                for n in range(p.n_state):
                    p.h_last[b, head, c0 + c, n] = h[c, n]


@kernel(BACKWARD)
def backward(data):  # type: ignore[no-untyped-def]
    """Compute the gradients for pieces of the blocks of `forward`, each from its last position to its first.

    ``keep``: whether there are gradients of the states. Results: gx and gh_start; gdecay, gscale, gB and gC, which
    must be zeros before, are added to, and are to be summed over the pieces.

    A first pass keeps the state before each chunk. Then the states of one chunk after the other, the last chunk
    first, are computed again from there.
    """
    p = backward_arguments(data)
    of_head = (p.width + WIDTH - 1) // WIDTH
    blocks = p.batch * p.heads * of_head
    chunks = (p.length + CHUNK - 1) // CHUNK
    zero = np.float32(0.0)
    starts = np.zeros((chunks + 1, WIDTH, p.n_state), np.float32)
    states = np.zeros((CHUNK + 1, WIDTH, p.n_state), np.float32)
    g = np.zeros((WIDTH, p.n_state), np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(blocks * piece // p.pieces, blocks * (piece + 1) // p.pieces):
            row, c0 = block // of_head, (block % of_head) * WIDTH
            b, head = row // p.heads, row % p.heads
            w = min(WIDTH, p.width - c0)
            group_B, group_C = head * p.groups_B // p.heads, head * p.groups_C // p.heads
            for c in range(w):
                for n in range(p.n_state):
                    starts[0, c, n] = p.h_start[b, head, c0 + c, n]
                    g[c, n] = p.gh_last[b, head, c0 + c, n]
            for forth in range(2 * chunks - 1):
                # Forwards through all chunks but the last, then backwards from the last.
                chunk = forth if forth < chunks else 2 * chunks - 2 - forth
                begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, p.length)
                for c in range(w):
                    for n in range(p.n_state):
                        states[0, c, n] = starts[chunk, c, n]
                for t in range(begin, end):
                    a, s = p.decay[b, t, head], p.scale[b, t, head]
                    for c in range(w):
                        d = s * p.x[b, t, head, c0 + c]
                        for n in range(p.n_state):
                            states[t - begin + 1, c, n] = a * states[t - begin, c, n] + d * p.B[b, t, group_B, n]
                if forth < chunks - 1:
                    for c in range(w):
                        for n in range(p.n_state):
                            starts[chunk + 1, c, n] = states[CHUNK, c, n]
                    continue
                for t in range(end - 1, begin - 1, -1):
                    a, s, i = p.decay[b, t, head], p.scale[b, t, head], t - begin
                    through_a, through_s = zero, zero
                    for c in range(w):
                        if p.keep:
                            for n in range(p.n_state):
                                g[c, n] += p.gstates[b, t, head, c0 + c, n]
                        xc, go = p.x[b, t, head, c0 + c], p.gy[b, t, head, c0 + c]
                        d, write, decayed = s * xc, zero, zero
                        for n in range(p.n_state):
                            gn = g[c, n] + go * p.C[b, t, group_C, n]
                            p.gC[piece, b, t, group_C, n] += go * states[i + 1, c, n]
                            p.gB[piece, b, t, group_B, n] += gn * d
                            write += gn * p.B[b, t, group_B, n]
                            decayed += gn * states[i, c, n]
                            g[c, n] = gn * a
                        p.gx[b, t, head, c0 + c] = s * write
                        through_s += xc * write
                        through_a += decayed
                    p.gdecay[piece, b, t, head] += through_a
                    p.gscale[piece, b, t, head] += through_s
            for c in range(w):
                for n in range(p.n_state):
                    p.gh_start[b, head, c0 + c, n] = g[c, n]
