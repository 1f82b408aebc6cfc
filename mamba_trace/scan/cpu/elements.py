"""What is computed of each number by itself, as compiled loops for float32 on a CPU.

Each piece of work is a range of the numbers.
"""

from __future__ import annotations

from ..buffers import BlockLayout, Buffer
from .compiled import Kernel, arguments_at, kernel, next_piece
from .vectors import number_exp, number_softplus

ONE = BlockLayout("", one=Buffer("numbers"), out=Buffer("numbers"))
TWO = BlockLayout("", one=Buffer("lines width", dense=1), other=Buffer("width"), out=Buffer("lines width"))
EXP, RATE, SUM = False, False, False  # which function is compiled


@kernel(ONE)
def softplus(data):  # type: ignore[no-untyped-def]
    """out = log(1 + exp(one)); with `EXP`, exp(one); with `RATE`, -exp(one)."""
    p = arguments_at(data)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for n in range(p.numbers * piece // p.pieces, p.numbers * (piece + 1) // p.pieces):
            if EXP:
                p.out[n] = number_exp(p.one[n])
            elif RATE:
                p.out[n] = -number_exp(p.one[n])
            else:
                p.out[n] = number_softplus(p.one[n])


exponentials = Kernel(softplus.function, ONE, EXP=True)
rates = Kernel(softplus.function, ONE, RATE=True)


@kernel(TWO)
def products(data):  # type: ignore[no-untyped-def]
    """out = one * other, which is the same for all lines; with `SUM`, one + other."""
    p = arguments_at(data)
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        first, end = p.width * piece // p.pieces, p.width * (piece + 1) // p.pieces
        for line in range(p.lines):
            for n in range(first, end):
                p.out[line, n] = p.one[line, n] + p.other[n] if SUM else p.one[line, n] * p.other[n]


sums = Kernel(products.function, TWO, SUM=True)
