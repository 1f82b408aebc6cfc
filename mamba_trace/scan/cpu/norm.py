"""The root mean square norm as compiled loops for float32 on a CPU: two passes over each row.

Each piece of work is a range of rows. A row is in the first levels of cache in the second pass.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from .compiled import arguments_at, as_float, kernel, next_piece

FORWARD = BlockLayout(
    "epsilon groups weighted",
    x=Buffer("batch length width", dense=1),
    weight=Buffer("width", when="weighted"),
    out=Buffer("batch length width"),
)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Norm pieces of the rows (batch x positions), each of the ``groups`` of channels by itself. Result: out.

    ``epsilon``: the bits of the float32 that is added to the mean of the squares; ``weighted``: whether there are
    weights.
    """
    p = arguments_at(data)
    size = p.width // p.groups
    epsilon, count = as_float(np.int32(p.epsilon)), np.float32(size)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for line in range(p.batch * p.length * piece // p.pieces, p.batch * p.length * (piece + 1) // p.pieces):
            x, out = p.x[line // p.length, line % p.length], p.out[line // p.length, line % p.length]
            for g in range(p.groups):
                total = np.float32(0.0)
                for c in range(g * size, (g + 1) * size):
                    total += x[c] * x[c]
                scale = np.float32(1.0) / np.sqrt(total / count + epsilon)
                for c in range(g * size, (g + 1) * size):
                    out[c] = p.weight[c] * (x[c] * scale) if p.weighted else x[c] * scale
