"""The selective scan and its gradients as compiled loops over blocks of channels, for float32 on a CPU.

A block is 16 channels wide: one vector, or two where a processor has shorter ones. What happens to it at a position
is written in vector instructions (`steps`). Softplus and the gate, which no position has to wait for, are taken for
the positions of a tile one after the other, so that the processor computes several at once. The state of a block
[N,16] stays in the first level of cache, and nothing of shape [B,L,E,N] exists unless the trajectory is asked for.
The backward pass computes the states again, chunk by chunk from the last to the first, so nothing but one state for
each chunk grows with the length.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..buffers import BlockLayout, Buffer
from .compiled import OPTIONS, Kernel, arguments_at, kernel, next_piece
from .steps import gate_vector, gradient_step, put, scan_step, softplus_vector, states_step, take
from .vectors import LANES, LOG2E, fetch, transpose

WIDTH = LANES  # channels in a block
AHEAD = 8  # positions from the one at which its memory is asked for
TILE = 8  # positions in a tile
CHUNK = 64  # positions between the states that the backward pass keeps
ENDS = 5  # how many positions' time it takes to turn a block's states around and back, an estimate
gradient_16, gradient_1 = gradient_step(LANES), gradient_step(1)
IN_RUNS = False  # whether a row is several runs, one behind the other

FORWARD = BlockLayout(
    "started gated keep",
    x=Buffer("batch length width", dense=1), delta=Buffer("batch length width", dense=1),
    B=Buffer("batch length n_state", dense=1), C=Buffer("batch length n_state", dense=1),
    skip=Buffer("batch length width", dense=1, when="gated"),
    A=Buffer("width n_state"), D=Buffer("width", when="gated"),
    h_start=Buffer("batch width n_state", when="started"),
    y=Buffer("batch length width"), h_last=Buffer("batch width n_state"),
    states=Buffer("batch length width n_state", when="keep"),
)  # fmt: skip
RUNS = FORWARD.but("h_start h_last", starts=Buffer("runs width n_state"), begins=Buffer("runs"))
BACKWARD = BlockLayout(
    "keep",
    x=Buffer("batch length width"), delta=Buffer("batch length width"), A=Buffer("width n_state"),
    B=Buffer("batch length n_state"), C=Buffer("batch length n_state"), h_start=Buffer("batch width n_state"),
    gy=Buffer("batch length width"), gh_last=Buffer("batch width n_state"),
    gstates=Buffer("batch length width n_state", when="keep"),
    gx=Buffer("batch length width"), gdelta=Buffer("batch length width"), gA=Buffer("batch width n_state"),
    gB=Buffer("pieces batch length n_state"), gC=Buffer("pieces batch length n_state"),
    gh_start=Buffer("batch width n_state"),
)  # fmt: skip


@njit(**OPTIONS)
def turn_in(rows, e0, block, w, n_state):  # type: ignore[no-untyped-def]
    """Put ``w`` channels of dense rows [width,n_state], from the channel ``e0`` on, into a block [n_state,WIDTH]."""
    if w == WIDTH and n_state % WIDTH == 0:
        for n in range(0, n_state, WIDTH):
            transpose(rows, e0 * n_state + n, n_state, block, n * WIDTH, WIDTH)
    else:
        for n in range(n_state):
            for e in range(w):
                block[n, e] = rows[e0 + e, n]


@njit(**OPTIONS)
def turn_out(block, rows, e0, w, n_state):  # type: ignore[no-untyped-def]
    """The inverse of `turn_in`."""
    if w == WIDTH and n_state % WIDTH == 0:
        for n in range(0, n_state, WIDTH):
            transpose(block, n * WIDTH, WIDTH, rows, e0 * n_state + n, n_state)
    else:
        for n in range(n_state):
            for e in range(w):
                rows[e0 + e, n] = block[n, e]


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x channel blocks) over all positions. Results: y, h_last and states.

    ``started``: whether there is a state to start from, otherwise it is zero; ``gated``: whether to take softplus
    of delta before, and to add D x to y and gate it after; ``keep``: whether to keep the states. `IN_RUNS`: run r
    starts from the state ``starts[r]`` at position ``begins[r]``, in every row; there is no h_last.
    """
    p = arguments_at(data)
    blocks = (p.width + WIDTH - 1) // WIDTH
    # In a block that is cut short, nothing reads the last columns.
    a = np.empty((p.n_state, WIDTH), np.float32)
    h = np.empty((p.n_state, WIDTH), np.float32)
    x = np.empty(TILE * WIDTH, np.float32)
    delta = np.empty(TILE * WIDTH, np.float32)
    skip = np.empty(TILE * WIDTH, np.float32)
    out = np.empty(TILE * WIDTH, np.float32)
    D = np.empty(WIDTH, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(p.batch * blocks * piece // p.pieces, p.batch * blocks * (piece + 1) // p.pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, p.width - e0)
            turn_in(p.A, e0, a, w, p.n_state)
            for n in range(p.n_state):
                for e in range(WIDTH):
                    a[n, e] *= LOG2E
            if p.gated:
                take(p.D, e0, w, D, 0)
            for run in range(p.runs if IN_RUNS else 1):
                if IN_RUNS:
                    begin, start = int(p.begins[run]), p.starts[run]
                    end = int(p.begins[run + 1]) if run + 1 < p.runs else p.length
                else:
                    begin, end, start = 0, p.length, p.h_start[b]
                if p.started:
                    turn_in(start, e0, h, w, p.n_state)
                else:
                    h[:] = np.float32(0.0)
                for first in range(begin, end, TILE):
                    last = min(first + TILE, end)
                    for t in range(first, last):
                        if t + AHEAD < p.length:
                            fetch(p.x[b, t + AHEAD], e0)
                            fetch(p.delta[b, t + AHEAD], e0)
                            fetch(p.y[b, t + AHEAD], e0)
                            if p.gated:
                                fetch(p.skip[b, t + AHEAD], e0)
                        at = (t - first) * WIDTH
                        take(p.x[b, t], e0, w, x, at)
                        take(p.delta[b, t], e0, w, delta, at)
                        if p.gated:
                            softplus_vector(delta, at)
                            take(p.skip[b, t], e0, w, skip, at)
                    for t in range(first, last):
                        scan_step(delta, x, (t - first) * WIDTH, a, h, p.B[b, t], p.C[b, t], p.n_state, out)
                        if p.keep:
                            turn_out(h, p.states[b, t], e0, w, p.n_state)
                    for t in range(first, last):
                        at = (t - first) * WIDTH
                        if p.gated:
                            gate_vector(out, x, skip, at, D)
                        put(out, at, w, p.y[b, t], e0)
            if not IN_RUNS:
                turn_out(h, p.h_last[b], e0, w, p.n_state)


forward_runs = Kernel(forward.function, RUNS, IN_RUNS=True)


@njit(**OPTIONS)
def run_chunk(x, delta, B, a, start, states, decays, d, xs, b, e0, w, begin, end):  # type: ignore[no-untyped-def]
    """From the state ``start``, the states after positions ``begin`` to ``end - 1`` of a block, and A_bar.

    ``d`` and ``xs``: room for a vector each, which is 0 behind the last channel.
    """
    for n in range(a.shape[0]):
        for e in range(WIDTH):
            states[0, n, e] = start[n, e]
    for t in range(begin, end):
        take(x[b, t], e0, w, xs, 0)
        take(delta[b, t], e0, w, d, 0)
        i = t - begin
        states_step(d, xs, 0, a, states[i], states[i + 1], decays[i], B[b, t], a.shape[0])


@kernel(BACKWARD)
def backward(data):  # type: ignore[no-untyped-def]
    """Compute the gradients for pieces of the blocks of `forward`.

    ``keep``: whether there are gradients of the states. Results: gx, gdelta and gh_start; gA, to be summed
    over the batch; gB and gC, which must be zeros before, are added to, and are to be summed over the pieces.
    """
    p = arguments_at(data)
    blocks = (p.width + WIDTH - 1) // WIDTH
    chunks = (p.length + CHUNK - 1) // CHUNK
    raw = np.zeros((p.n_state, WIDTH), np.float32)
    a = np.zeros((p.n_state, WIDTH), np.float32)
    g = np.zeros((p.n_state, WIDTH), np.float32)
    ga = np.zeros((p.n_state, WIDTH), np.float32)
    starts = np.zeros((chunks + 1, p.n_state, WIDTH), np.float32)
    states = np.zeros((CHUNK + 1, p.n_state, WIDTH), np.float32)
    decays = np.zeros((CHUNK, p.n_state, WIDTH), np.float32)
    d = np.zeros(WIDTH, np.float32)
    xs = np.zeros(WIDTH, np.float32)
    go = np.zeros(WIDTH, np.float32)
    gstate = np.zeros((p.n_state, WIDTH), np.float32)
    through_b = np.zeros(WIDTH, np.float32)
    through_a = np.zeros(WIDTH, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(p.batch * blocks * piece // p.pieces, p.batch * blocks * (piece + 1) // p.pieces):
            b, e0 = block // blocks, (block % blocks) * WIDTH
            w = min(WIDTH, p.width - e0)
            for e in range(WIDTH):
                d[e], xs[e], go[e] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for n in range(p.n_state):
                for e in range(WIDTH):
                    raw[n, e], starts[0, n, e] = np.float32(0.0), np.float32(0.0)
                    g[n, e], ga[n, e], gstate[n, e] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            turn_in(p.A, e0, raw, w, p.n_state)
            turn_in(p.h_start[b], e0, starts[0], w, p.n_state)
            turn_in(p.gh_last[b], e0, g, w, p.n_state)
            for n in range(p.n_state):
                for e in range(WIDTH):
                    a[n, e] = raw[n, e] * LOG2E
            for c in range(chunks - 1):  # the last chunk is run below
                begin, end = c * CHUNK, (c + 1) * CHUNK
                run_chunk(p.x, p.delta, p.B, a, starts[c], states, decays, d, xs, b, e0, w, begin, end)
                for n in range(p.n_state):
                    for e in range(WIDTH):
                        starts[c + 1, n, e] = states[CHUNK, n, e]
            for c in range(chunks - 1, -1, -1):
                begin, end = c * CHUNK, min((c + 1) * CHUNK, p.length)
                run_chunk(p.x, p.delta, p.B, a, starts[c], states, decays, d, xs, b, e0, w, begin, end)
                for t in range(end - 1, begin - 1, -1):
                    take(p.delta[b, t], e0, w, d, 0)
                    take(p.x[b, t], e0, w, xs, 0)
                    take(p.gy[b, t], e0, w, go, 0)
                    if p.keep:
                        turn_in(p.gstates[b, t], e0, gstate, w, p.n_state)
                        for n in range(p.n_state):
                            for e in range(WIDTH):
                                g[n, e] += gstate[n, e]
                    for e in range(WIDTH):
                        through_b[e] = np.float32(0.0)
                        through_a[e] = np.float32(0.0)
                    i, n = t - begin, 0
                    while n + LANES <= p.n_state:
                        gradient_16(
                            g, ga, raw, decays[i], states[i], states[i + 1], p.gB[piece, b, t], p.gC[piece, b, t],
                            p.B[b, t], p.C[b, t], d, xs, go, through_b, through_a, n,
                        )  # fmt: skip
                        n += LANES
                    while n < p.n_state:
                        gradient_1(
                            g, ga, raw, decays[i], states[i], states[i + 1], p.gB[piece, b, t], p.gC[piece, b, t],
                            p.B[b, t], p.C[b, t], d, xs, go, through_b, through_a, n,
                        )  # fmt: skip
                        n += 1
                    for e in range(w):
                        p.gx[b, t, e0 + e] = d[e] * through_b[e]
                        p.gdelta[b, t, e0 + e] = xs[e] * through_b[e] + through_a[e]
            turn_out(ga, p.gA[b], e0, w, p.n_state)
            turn_out(g, p.gh_start[b], e0, w, p.n_state)
