"""The root mean square norm as compiled loops for float32 on a CPU: two passes over each row.

Each piece of work is a range of rows. A row is in the first levels of cache in the second pass.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from .compiled import arguments_at, as_float, kernel, next_piece

FORWARD = BlockLayout(
    "epsilon",
    x=Buffer("rows groups width", dense=2),
    weight=Buffer("groups width"),
    out=Buffer("rows groups width"),
)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Norm pieces of the rows, each group by itself. Result: out.

    ``epsilon``: the bits of the float32 that is added to the mean of the squares.
    """
    p = arguments_at(data)
    epsilon, count = as_float(np.int32(p.epsilon)), np.float32(p.width)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for r in range(p.rows * piece // p.pieces, p.rows * (piece + 1) // p.pieces):
            for g in range(p.groups):
                total = np.float32(0.0)
                for c in range(p.width):
                    total += p.x[r, g, c] * p.x[r, g, c]
                scale = np.float32(1.0) / np.sqrt(total / count + epsilon)
                for c in range(p.width):
                    p.out[r, g, c] = p.weight[g, c] * (p.x[r, g, c] * scale)
