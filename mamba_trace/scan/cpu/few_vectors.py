"""A weight times few vectors, as compiled loops for float32 on a CPU.

Memory decides how long that takes, so each number of the weight is read from there once. A group of its rows is
multiplied by all vectors, some at a time: as many sums as the processor has registers for. Meanwhile the next group is
asked for. Each piece of work is a range of groups.

What is computed for a vector does not depend on the others.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..buffers import BlockLayout, Buffer
from .compiled import arguments_at, kernel, next_piece
from .vectors import INDEX, LANES, Total, Vectors, addresses, apart, ask_for, store_totals

FORWARD = BlockLayout(
    "biased",
    x=Buffer("lines inner", dense=1),
    weight=Buffer("width inner"),
    bias=Buffer("width", when="biased"),
    out=Buffer("lines width"),
)
ROWS = 4  # of the weight, in a group
LINES = 4  # vectors that are multiplied at a time


def products(lines: int) -> Any:
    """What multiplies `ROWS` rows of a weight by some vectors, of which ``first`` and ``line`` are the first.

    It asks for the row ``ahead`` on the way, and writes to ``out`` [lines,width].
    """

    @intrinsic
    def multiply(  # type: ignore[no-untyped-def]
        typingctx, weight, first, ahead, x, line, inner, out, width
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weight, first, ahead, x, line, inner, out, width = args
            kinds = [signature.args[place] for place in (0, 3, 6)]
            start, given, into = addresses(context, builder, kinds, (weight, x, out))

            def beginning(number: Any) -> Any:
                return builder.gep(start, [builder.mul(number, inner)])

            step = apart(context, builder, kinds[1], x)
            vectors_at = [builder.gep(given, [builder.mul(builder.add(line, INDEX(k)), step)]) for k in range(lines)]
            rows_at = [beginning(builder.add(first, INDEX(k))) for k in range(ROWS)]
            sums = [[Total(builder) for _ in rows_at] for _ in vectors_at]
            next_at, vectors = beginning(ahead), Vectors(builder)

            def add(load: Any, k: Any) -> None:
                numbers = [load(row, k) for row in rows_at]
                for totals, vector in zip(sums, vectors_at, strict=True):
                    factor = load(vector, k)
                    for total, number in zip(totals, numbers, strict=True):
                        total.add(vectors, vectors.times(number, factor))

            whole = builder.and_(inner, INDEX(-LANES))
            with cgutils.for_range_slice(builder, INDEX(0), whole, INDEX(LANES)) as (k, _):
                ask_for(builder, next_at, k)
                add(vectors.load, k)
            rest = builder.sub(inner, whole)
            with builder.if_then(builder.icmp_signed("!=", rest, INDEX(0))):
                add(functools.partial(vectors.load_first, rest), whole)
            for place, totals in enumerate(sums):
                to = builder.add(builder.mul(builder.add(line, INDEX(place)), width), first)
                store_totals(builder, totals, into, to)
            return context.get_dummy_value()

        index = types.int64
        return types.void(weight, index, index, x, index, index, out, index), codegen

    return multiply


by_lines, by_line = products(LINES), products(1)


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Multiply pieces of the weight's rows by all vectors, and add the bias if it is ``biased``. Result: out.

    There are `ROWS` rows or more. Those that are too few for a group are multiplied behind the last group, with some of
    its rows once more.
    """
    p = arguments_at(data)
    groups = p.width // ROWS
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        begin, end = groups * piece // p.pieces, groups * (piece + 1) // p.pieces
        if end == groups and end > begin and p.width % ROWS:
            end += 1
        for group in range(begin, end):
            first, line = min(ROWS * group, p.width - ROWS), 0
            ahead = min(first + ROWS, p.width - ROWS)
            while line + LINES <= p.lines:
                by_lines(p.weight, first, ahead + min(line // LINES, ROWS - 1), p.x, line, p.inner, p.out, p.width)
                line += LINES
            for last in range(line, p.lines):
                by_line(p.weight, first, first, p.x, last, p.inner, p.out, p.width)
            if p.biased:
                for line in range(p.lines):
                    for row in range(first, first + ROWS):
                        p.out[line, row] += p.bias[row]
