"""Mamba-2's scan with D and the gate over many positions, as compiled loops for float32 on a CPU.

What `loops.forward` computes with ``gated``, four positions at a time (a chunk), so that each number of the state is
read and written once for all of them. With h the state before a chunk, u_s = scale_s x_s and decay(s, t) the product
of the decays after s up to t:

    y_t = decay(start, t) C_t h + sum over s <= t of decay(s, t) (C_t B_s) u_s
    h'  = decay(start, end) h   + sum over s of decay(s, end) u_s B_s

(Mamba-2, arXiv 2405.21060, section 6: the block decomposition.) C_t B_s is the same for all heads of a group. A block
is 32 channels of one head. Its state lies transposed [N,32] while the block runs, so that no sum runs along a vector.
The results are rounded in another order than those of `loops`, in which a cut between two positions changes no bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..buffers import BlockLayout, Buffer
from ..cpu.compiled import OPTIONS, arguments_at, kernel, next_piece
from ..cpu.vectors import LANES, fetch, silu, transpose
from .loops import INPUTS
from .steps import CHUNK, chunk_step, gate_vector, write_vector

WIDTH = 2 * LANES  # channels in a block
AHEAD = 4 * CHUNK
FORWARD = BlockLayout(
    "started",
    **INPUTS | {"h_start": Buffer("batch heads width n_state", when="started")},
    D=Buffer("heads"), skip=Buffer("batch length heads width", dense=2),
    y=Buffer("batch length heads width"), h_last=Buffer("batch heads width n_state"),
)  # fmt: skip
step_32, step_16 = chunk_step(2), chunk_step(1)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@njit(inline="always", **OPTIONS)
def aligned(rows):  # type: ignore[no-untyped-def]
    """Zeros [rows * WIDTH], and twice `CHUNK` rows more, at an address where no vector lies in two lines of cache."""
    room = np.zeros((rows + 2 * CHUNK) * WIDTH, np.float32)
    return room[-(room.ctypes.data // 4) % LANES :]


@njit(inline="always", **OPTIONS)
def multiply(B, C, products, length, n_state):  # type: ignore[no-untyped-def]
    """C_t B_s [L,CHUNK] for the positions s <= t of the chunk that t is in: B and C [L,N]."""
    for t in range(length):
        for s in range(t % CHUNK + 1):
            total = ZERO
            for n in range(n_state):
                total += C[t, n] * B[t - t % CHUNK + s, n]
            products[t, s] = total


@njit(inline="always", **OPTIONS)
def weigh(decay, products, weights, start, first, count):  # type: ignore[no-untyped-def]
    """What the step takes for ``count`` positions from ``first`` on of the chunk at ``start`` [CHUNK,CHUNK + 2].

    A row t has decay(start, t), then decay(s, t) C_t B_s for each s, and last decay(t, end). Positions that are
    left out decay nothing.
    """
    for t in range(CHUNK):
        a = decay[first + t] if t < count else ONE
        weights[t, CHUNK + 1] = ONE
        weights[t, 0] = a * weights[t - 1, 0] if t else a
        for s in range(t):
            weights[s, CHUNK + 1] *= a
    for t in range(count):
        through = ONE
        for s in range(t, -1, -1):
            weights[t, 1 + s] = through * products[start + first + t, first + s]
            through *= decay[first + s]


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x heads x channel blocks) over all positions. Results: y and h_last.

    ``started``: whether there is a state to start from; otherwise it is zero.
    """
    p = arguments_at(data)
    of_head = (p.width + WIDTH - 1) // WIDTH
    blocks = p.batch * p.heads * of_head
    step_B, step_C = p.B.strides[1] // 4, p.C.strides[1] // 4
    products = np.zeros((p.length + CHUNK, CHUNK), np.float32)
    weights = np.zeros((CHUNK, CHUNK + 2), np.float32)
    decay = np.zeros(CHUNK, np.float32)
    h, u, y = aligned(p.n_state), aligned(CHUNK), aligned(CHUNK)
    known = -1  # the row and groups that the products are of
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(blocks * piece // p.pieces, blocks * (piece + 1) // p.pieces):
            unit, c0 = block // of_head, (block % of_head) * WIDTH
            b, head, w = unit // p.heads, unit % p.heads, min(WIDTH, p.width - c0)
            group_B, group_C = head * p.groups_B // p.heads, head * p.groups_C // p.heads
            wanted = (b * p.groups_B + group_B) * p.groups_C + group_C
            if wanted != known:
                multiply(p.B[b, :, group_B], p.C[b, :, group_C], products, p.length, p.n_state)
                known = wanted
            before, after = p.h_start[b, head], p.h_last[b, head]
            c, n = w - w % LANES, p.n_state - p.n_state % LANES
            if p.started:
                for i in range(0, c, LANES):
                    for j in range(0, n, LANES):
                        transpose(before, (c0 + i) * p.n_state + j, p.n_state, h, j * WIDTH + i, WIDTH)
                for i in range(w):
                    for j in range(n if i < c else 0, p.n_state):
                        h[j * WIDTH + i] = before[c0 + i, j]
            else:
                for i in range(p.n_state * WIDTH):
                    h[i] = ZERO
            for start in range(0, p.length, CHUNK):
                there = min(CHUNK, p.length - start)
                for t in range(start + AHEAD, min(start + AHEAD + CHUNK, p.length)):
                    for i in range(c0, c0 + w, LANES):
                        fetch(p.x[b, t, head], i)
                        fetch(p.y[b, t, head], i)
                        fetch(p.skip[b, t, head], i)
                suits = True  # a product of decays above 1 may be infinite where the state is not
                for t in range(there):
                    decay[t] = p.decay[b, start + t, head]
                    suits = suits and ZERO <= decay[t] <= ONE
                count = there if suits else 1
                for first in range(0, there, count):
                    if count == CHUNK:
                        weigh(decay, products, weights, start, 0, CHUNK)
                    else:
                        weigh(decay, products, weights, start, first, count)
                    for t in range(CHUNK):
                        scale = p.scale[b, start + first + t, head] if t < count else ZERO
                        x = p.x[b, start + first + min(t, count - 1), head]
                        for i in range(0, c, LANES):
                            write_vector(x, c0 + i, scale, u, t * WIDTH + i)
                        for i in range(c, w):
                            u[t * WIDTH + i] = scale * x[c0 + i]
                    B, C = p.B[b, start + first, group_B], p.C[b, start + first, group_C]
                    if w > LANES:
                        step_32(h, u, y, weights, B, C, step_B, step_C, count - 1, p.n_state, first * WIDTH)
                    else:
                        step_16(h, u, y, weights, B, C, step_B, step_C, count - 1, p.n_state, first * WIDTH)
                d = p.D[head]
                for t in range(there):
                    x, skip, out = p.x[b, start + t, head], p.skip[b, start + t, head], p.y[b, start + t, head]
                    for i in range(0, c, LANES):
                        gate_vector(y, t * WIDTH + i, x, skip, out, c0 + i, d)
                    for i in range(c, w):
                        out[c0 + i] = (y[t * WIDTH + i] + d * x[c0 + i]) * silu(skip[c0 + i])
            for i in range(0, c, LANES):
                for j in range(0, n, LANES):
                    transpose(h, j * WIDTH + i, WIDTH, after, (c0 + i) * p.n_state + j, p.n_state)
            for i in range(w):
                for j in range(n if i < c else 0, p.n_state):
                    after[c0 + i, j] = h[j * WIDTH + i]
