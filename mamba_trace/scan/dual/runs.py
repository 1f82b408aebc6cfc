"""Mamba-2's gated scan of rows that are several short runs, as compiled loops for float32 on a CPU.

A state is as large as the products of dozens of positions with all of a layer's weights. So where a run has few
positions, to read its state and to write the next one takes longer than everything else. Here no row has a state
of its own. The recurrence is linear: what the starting state of a run gives to y is C h_start, decayed since, one
matmul for all rows, which is ``read``. What a run's own positions give one another is a matrix for each head (Mamba-2,
arXiv 2405.21060, section 6: the quadratic form):

    y_t = decay(start, t) C_t h_start + sum over s <= t of decay(s, t) (C_t B_s) scale_s x_s
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from ..cpu.compiled import arguments_at, kernel, next_piece
from ..cpu.vectors import silu

WIDTH = 64  # channels that count as a block
FORWARD = BlockLayout(
    "longest",
    x=Buffer("batch length heads width", dense=2),
    decay=Buffer("batch length heads", dense=1), scale=Buffer("batch length heads", dense=1),
    B=Buffer("batch length groups n_state", dense=2), C=Buffer("batch length groups n_state", dense=2),
    D=Buffer("heads"), skip=Buffer("batch length heads width", dense=2),
    read=Buffer("groups lines channels"), begins=Buffer("runs"), y=Buffer("batch length heads width"),
)  # fmt: skip
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the runs of all rows. Result: y, with D and the gate.

    Run r of each row begins at position ``begins[r]``, and is at most ``longest``. The lines of ``read`` are the
    positions of all rows, run by run.
    """
    p = arguments_at(data)
    products = np.zeros((p.longest, p.longest), np.float32)
    weights = np.zeros(p.longest, np.float32)
    out = np.zeros(p.width, np.float32)
    of_group = p.heads // p.groups
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for unit in range(p.batch * p.runs * piece // p.pieces, p.batch * p.runs * (piece + 1) // p.pieces):
            run, b = unit // p.batch, unit % p.batch
            first = int(p.begins[run])
            count = (int(p.begins[run + 1]) if run + 1 < p.runs else p.length) - first
            line = p.batch * first + b * count
            for group in range(p.groups):
                for t in range(count):
                    for s in range(t + 1):
                        B, C, total = p.B[b, first + s, group], p.C[b, first + t, group], ZERO
                        for n in range(p.n_state):
                            total += C[n] * B[n]
                        products[t, s] = total
                for member in range(of_group):
                    head, through, d = group * of_group + member, ONE, p.D[group * of_group + member]
                    for t in range(count):
                        decay = p.decay[b, first + t, head]
                        through *= decay
                        for s in range(t):
                            weights[s] *= decay
                        weights[t] = p.scale[b, first + t, head]
                        read, x = p.read[group, line + t], p.x[b, first + t, head]
                        for i in range(p.width):
                            out[i] = through * read[member * p.width + i] + d * x[i]
                        for s in range(t + 1):
                            weight, x = weights[s] * products[t, s], p.x[b, first + s, head]
                            for i in range(p.width):
                                out[i] += weight * x[i]
                        skip, y = p.skip[b, first + t, head], p.y[b, first + t, head]
                        for i in range(p.width):
                            y[i] = out[i] * silu(skip[i])
