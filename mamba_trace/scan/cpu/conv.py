"""The causal depthwise convolution, with its SiLU, as compiled loops for float32 on a CPU.

Channels lie next to each other in memory, as the linear layers of a mixer write and read them, so nothing has
to be transposed. Each piece of work is a range of positions.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from .compiled import arguments_of, kernel, next_piece, silu

FORWARD = BlockLayout(
    "past activate whole runs",
    x_in=Buffer("batch length width", dense=1),
    before=Buffer("batch past width", when="whole"),
    starts=Buffer("runs past width", when="runs"),
    begins=Buffer("runs", when="runs"),
    weight=Buffer("taps width"),
    bias=Buffer("width"),
    out=Buffer("batch length width"),
)
forward_arguments = arguments_of(FORWARD)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Convolve pieces of the rows (batch x positions). Result: out.

    ``taps``: K; ``past``: K - 1, the number of columns ``before`` x_in; ``activate``: whether to apply SiLU; ``whole``:
    whether a row is one run. Otherwise it is some ``runs``: before the column ``begins[r]`` come ``starts[r]``, in all
    rows.
    """
    p = forward_arguments(data)
    row = np.empty(p.width, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for line in range(p.batch * p.length * piece // p.pieces, p.batch * p.length * (piece + 1) // p.pieces):
            b, t = line // p.length, line % p.length
            run, first = 0, 0
            if not p.whole:
                while run + 1 < p.runs and p.begins[run + 1] <= t:
                    run += 1
                first = int(p.begins[run])
            before = p.before[b] if p.whole else p.starts[run]
            if p.taps == 4 and t - first >= 3:  # the usual case in one pass
                x, y = p.x_in[b], p.out[b, t]
                w0, w1, w2, w3 = p.weight[0], p.weight[1], p.weight[2], p.weight[3]
                if p.activate:
                    for e in range(p.width):
                        total = p.bias[e] + w0[e] * x[t - 3, e] + w1[e] * x[t - 2, e]
                        y[e] = silu(total + w2[e] * x[t - 1, e] + w3[e] * x[t, e])
                else:
                    for e in range(p.width):
                        total = p.bias[e] + w0[e] * x[t - 3, e] + w1[e] * x[t - 2, e]
                        y[e] = total + w2[e] * x[t - 1, e] + w3[e] * x[t, e]
                continue
            for e in range(p.width):
                row[e] = p.bias[e]
            for k in range(p.taps):
                source = t - p.past + k
                if source >= first:
                    for e in range(p.width):
                        row[e] += p.weight[k, e] * p.x_in[b, source, e]
                else:
                    for e in range(p.width):
                        row[e] += p.weight[k, e] * before[p.past + source - first, e]
            if p.activate:
                for e in range(p.width):
                    p.out[b, t, e] = silu(row[e])
            else:
                for e in range(p.width):
                    p.out[b, t, e] = row[e]
