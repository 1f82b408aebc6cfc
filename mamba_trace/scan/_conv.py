"""The causal depthwise convolution, with its SiLU, as compiled loops for float32 on a CPU.

Channels lie next to each other in memory, as a mixer's linear layers leave and want them, so nothing is
transposed. Each piece is a range of positions.
"""

from __future__ import annotations

import numpy as np

from ._compiled import FIRST_OWN, PIECES, array, flat, kernel, next_piece, parameters, silu


@kernel
def forward(data):  # type: ignore[no-untyped-def]
    """Convolve pieces of the rows (batch x positions).

    Parameters: B, L, E, K; whether to apply SiLU; then x_in [B,L,E], of any strides but for its last axis;
    then, contiguous, what came before it [B,K-1,E], weight [K,E] and bias [E]; then the result [B,L,E].
    """
    p = parameters(data)
    i = FIRST_OWN
    batch, length, width, taps, activate = p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4]
    x_in, x_b, x_t = flat(p, i + 5), p[i + 6], p[i + 7]
    before = flat(p, i + 8)
    weight = array(p, i + 11, (taps, width))
    bias = array(p, i + 12, (width,))
    out = flat(p, i + 13)
    row = np.zeros(width, np.float32)
    while True:
        piece = next_piece(data)
        if piece >= p[PIECES]:
            break
        for line in range(batch * length * piece // p[PIECES], batch * length * (piece + 1) // p[PIECES]):
            b, t = line // length, line % length
            for e in range(width):
                row[e] = bias[e]
            for k in range(taps):
                source = t - (taps - 1) + k
                if source >= 0:
                    at = b * x_b + source * x_t
                    for e in range(width):
                        row[e] += weight[k, e] * x_in[at + e]
                else:
                    at = (b * (taps - 1) + taps - 1 + source) * width
                    for e in range(width):
                        row[e] += weight[k, e] * before[at + e]
            at = line * width
            if activate:
                for e in range(width):
                    out[at + e] = silu(row[e])
            else:
                for e in range(width):
                    out[at + e] = row[e]
