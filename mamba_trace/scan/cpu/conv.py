"""The causal depthwise convolution, with its SiLU, as compiled loops for float32 on a CPU.

Channels lie next to each other in memory, as a mixer's linear layers leave and want them, so nothing is
transposed. Each piece is a range of positions.
"""

from __future__ import annotations

import numpy as np

from ..buffers import Buffer, Layout
from .compiled import array, flat, kernel, next_piece, parameters, silu, strided, taking

FORWARD = Layout(
    "past activate",
    x_in=Buffer("batch length width", dense=1),
    before=Buffer("batch past width"),
    weight=Buffer("taps width"),
    bias=Buffer("width"),
    out=Buffer("batch length width"),
)
AT = FORWARD.at


@taking(FORWARD)
@kernel
def forward(data):  # type: ignore[no-untyped-def]
    """Convolve pieces of the rows (batch x positions).

    ``taps``: K; ``past``: K - 1, how many columns there are ``before`` x_in; ``activate``: whether to apply
    SiLU. Result: out.
    """
    p = parameters(data)
    batch, length, width = p[AT.batch], p[AT.length], p[AT.width]
    taps, past, activate, pieces = p[AT.taps], p[AT.past], p[AT.activate], p[AT.pieces]
    x_in, x_b, x_t = strided(p, AT.x_in)
    before = flat(p, AT.before)
    weight = array(p, AT.weight, (taps, width))
    bias = array(p, AT.bias, (width,))
    out = flat(p, AT.out)
    row = np.zeros(width, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= pieces:
            break
        for line in range(batch * length * piece // pieces, batch * length * (piece + 1) // pieces):
            b, t = line // length, line % length
            for e in range(width):
                row[e] = bias[e]
            for k in range(taps):
                source = t - past + k
                if source >= 0:
                    at = b * x_b + source * x_t
                    for e in range(width):
                        row[e] += weight[k, e] * x_in[at + e]
                else:
                    at = (b * past + past + source) * width
                    for e in range(width):
                        row[e] += weight[k, e] * before[at + e]
            at = line * width
            if activate:
                for e in range(width):
                    out[at + e] = silu(row[e])
            else:
                for e in range(width):
                    out[at + e] = row[e]
