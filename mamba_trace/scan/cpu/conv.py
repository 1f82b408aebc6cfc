"""The causal depthwise convolution, with its SiLU, as compiled loops for float32 on a CPU.

Channels lie next to each other in memory, as the linear layers of a mixer write and read them, so nothing has
to be transposed. Each piece of work is a range of positions.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from .compiled import Kernel, arguments_at, kernel, next_piece
from .vectors import silu

IN_RUNS = False  # whether a row is several runs, one behind the other
FORWARD = BlockLayout(
    "past activate started kept biased",
    x_in=Buffer("batch length width", dense=1),
    before=Buffer("batch past width", when="started"),
    weight=Buffer("width taps"),
    bias=Buffer("width", when="biased"),
    out=Buffer("batch length width"),
    columns=Buffer("batch width taps", when="kept"),
)
RUNS = FORWARD.but("before", starts=Buffer("runs past width"), begins=Buffer("runs"))
UPDATE = BlockLayout(
    "biased",
    x_in=Buffer("batch width", dense=1),
    columns=Buffer("batch width taps"),
    weight=Buffer("width taps"),
    bias=Buffer("width", when="biased"),
    out=Buffer("batch width"),
)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Convolve pieces of the rows (batch x positions). Result: out.

    ``taps``: K; ``past``: K - 1, the number of columns ``before`` x_in; ``started``: whether there are any, or zeros;
    ``activate``: whether to apply SiLU; ``kept``: whether to put the last K columns, those before x_in included, into
    ``columns``; ``biased``: whether there is a bias.

    `IN_RUNS`: before the column ``begins[r]`` come ``starts[r]``, in all rows; none are kept.
    """
    p = arguments_at(data)
    row, bias = np.empty(p.width, np.float32), np.empty(p.width, np.float32)
    weight = np.empty((p.taps, p.width), np.float32)
    for e in range(p.width):
        bias[e] = p.bias[e] if p.biased else np.float32(0.0)
        for k in range(p.taps):
            weight[k, e] = p.weight[e, k]
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for line in range(p.batch * p.length * piece // p.pieces, p.batch * p.length * (piece + 1) // p.pieces):
            b, t = line // p.length, line % p.length
            x, y = p.x_in[b], p.out[b, t]
            if IN_RUNS:
                run = 0
                while run + 1 < p.runs and p.begins[run + 1] <= t:
                    run += 1
                first, before = int(p.begins[run]), p.starts[run]
            else:
                first, before = 0, p.before[b]
            if p.taps == 4 and t - first >= 3:  # the usual case in one pass
                w0, w1, w2, w3 = weight[0], weight[1], weight[2], weight[3]
                for e in range(p.width):
                    total = bias[e] + w0[e] * x[t - 3, e] + w1[e] * x[t - 2, e]
                    row[e] = total + w2[e] * x[t - 1, e] + w3[e] * x[t, e]
            else:
                for e in range(p.width):
                    row[e] = bias[e]
                for k in range(p.taps):
                    source = t - p.past + k
                    if source >= first or p.started:
                        column = x[source] if source >= first else before[p.past + source - first]
                        for e in range(p.width):
                            row[e] += weight[k, e] * column[e]
            if p.activate:
                for e in range(p.width):
                    y[e] = silu(row[e])
            else:
                for e in range(p.width):
                    y[e] = row[e]
            if p.kept and t == p.length - 1:
                for k in range(p.taps):
                    source = t - p.past + k
                    if source < 0 and not p.started:
                        row[:] = 0
                        column = row
                    else:
                        column = x[source] if source >= 0 else before[p.past + source]
                    for e in range(p.width):
                        p.columns[b, e, k] = column[e]


forward_runs = Kernel(forward.function, RUNS, IN_RUNS=True)


@kernel(UPDATE)
def update(data):  # type: ignore[no-untyped-def]
    """SiLU of the convolution of one position, in pieces of the rows. Results: out, and ``columns`` up to there."""
    p = arguments_at(data)
    row = np.empty(p.width, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for b in range(p.batch * piece // p.pieces, p.batch * (piece + 1) // p.pieces):
            for e in range(p.width):
                columns, total = p.columns[b, e], p.bias[e] if p.biased else np.float32(0.0)
                for k in range(p.taps - 1):
                    columns[k] = columns[k + 1]
                    total += p.weight[e, k] * columns[k]
                columns[p.taps - 1] = p.x_in[b, e]
                row[e] = total + p.weight[e, p.taps - 1] * p.x_in[b, e]
            for e in range(p.width):
                p.out[b, e] = silu(row[e])
