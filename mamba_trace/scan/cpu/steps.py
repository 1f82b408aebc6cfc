"""Steps of the selective scan in vector instructions, for the compiled loops of `selective`.

A step takes the channels of one block, which are the lanes of one vector, over one position. The state of the block is
[N,LANES].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import INDEX, LANES, Total, Vectors, addresses, totals


@intrinsic
def scan_step(typingctx, delta, x, at, a, h, B, C, n_state, out):  # type: ignore[no-untyped-def]
    """h = 2**(delta a) h + delta x B and out = C h.

    ``delta``, ``x`` and ``out``: arrays in which the vectors of the block begin at number ``at``; ``a`` and ``h``: its
    [N,LANES], of which h is changed; ``B`` and ``C``: the N numbers of the position.
    """
    kinds = (delta, x, a, h, B, C, out)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        delta, x, at, *arrays, n_state, out = args
        delta, x, a, h, B, C, out = addresses(context, builder, kinds, (delta, x, *arrays, out))
        single, whole = Vectors(builder, 1), Vectors(builder)
        d = whole.load(delta, at)
        write, total = whole.times(d, whole.load(x, at)), Total(builder)
        with cgutils.for_range_slice(builder, INDEX(0), n_state, INDEX(1)) as (n, _):
            place = builder.mul(n, INDEX(LANES))
            B_n, C_n = (whole.filled(single.load(array, n)) for array in (B, C))
            decay = whole.exp2(whole.times(d, whole.load(a, place)))
            state = whole.added(whole.times(decay, whole.load(h, place)), whole.times(write, B_n))
            whole.store(state, h, place)
            total.add(whole, whole.times(state, C_n))
        whole.store(builder.load(total.place), out, at)
        return context.get_dummy_value()

    return types.void(delta, x, types.int64, *kinds[2:6], types.int64, out), codegen


@intrinsic
def states_step(typingctx, delta, x, at, a, before, after, decays, B, n_state):  # type: ignore[no-untyped-def]
    """decays = 2**(delta a) and after = decays before + delta x B.

    ``delta``, ``x`` and ``at``: as in `scan_step`; ``a``, ``before``, ``after`` and ``decays``: [N,LANES] of the block.
    """
    kinds = (delta, x, a, before, after, decays, B)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        delta, x, at, *arrays, n_state = args
        delta, x, a, before, after, decays, B = addresses(context, builder, kinds, (delta, x, *arrays))
        single, whole = Vectors(builder, 1), Vectors(builder)
        d = whole.load(delta, at)
        write = whole.times(d, whole.load(x, at))
        with cgutils.for_range_slice(builder, INDEX(0), n_state, INDEX(1)) as (n, _):
            place = builder.mul(n, INDEX(LANES))
            decay = whole.exp2(whole.times(d, whole.load(a, place)))
            written = whole.times(write, whole.filled(single.load(B, n)))
            whole.store(decay, decays, place)
            whole.store(whole.added(whole.times(decay, whole.load(before, place)), written), after, place)
        return context.get_dummy_value()

    return types.void(delta, x, types.int64, *kinds[2:], types.int64), codegen


def gradient_step(count: int) -> Callable[..., None]:
    """Make the gradients of `states_step` and of C after, for ``count`` numbers of the state of each channel.

    It takes ``(g, gA, A, decays, before, after)``, arrays [N,LANES] of the block: g is the gradient of the state after
    this position, and becomes that of the state before; gA is added to. ``(gB, gC, B, C)``: the N numbers of the
    position; gB and gC are added to. ``(delta, x, gy, through_B, through_A)``: vectors of the block; what reaches delta
    by way of what is written, and of the decays, is added to the last two. ``first``: the first of the numbers.
    """

    @intrinsic
    def step(  # type: ignore[no-untyped-def]
        typingctx, g, gA, A, decays, before, after, gB, gC, B, C, delta, x, gy, through_B, through_A, first
    ):  # fmt: skip
        kinds = (g, gA, A, decays, before, after, gB, gC, B, C, delta, x, gy, through_B, through_A)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            *arrays, first = args
            g, gA, A, decays, before, after, gB, gC, B, C, *vectors = addresses(context, builder, kinds, arrays)
            single, whole, sums = Vectors(builder, 1), Vectors(builder), Vectors(builder, count)
            d, x, gy, by_write, by_decay = (whole.load(vector, INDEX(0)) for vector in vectors)
            write = whole.times(d, x)
            to_B, to_C = [], []
            for k in range(count):
                n = builder.add(first, INDEX(k))
                place = builder.mul(n, INDEX(LANES))
                B_n, C_n = (whole.filled(single.load(array, n)) for array in (B, C))
                decay, old = whole.load(decays, place), whole.load(before, place)
                gh = whole.added(whole.load(g, place), whole.times(gy, C_n))
                to_C.append(whole.times(gy, whole.load(after, place)))
                to_B.append(whole.times(gh, write))
                by_write = whole.added(by_write, whole.times(gh, B_n))
                passed = whole.times(gh, decay)
                through = whole.times(passed, old)
                by_decay = whole.added(by_decay, whole.times(through, whole.load(A, place)))
                whole.store(whole.added(whole.load(gA, place), whole.times(through, d)), gA, place)
                whole.store(passed, g, place)
            for values, array in ((to_B, gB), (to_C, gC)):
                sums.store(sums.added(sums.load(array, first), totals(builder, values)), array, first)
            for value, vector in zip((by_write, by_decay), vectors[3:], strict=True):
                whole.store(value, vector, INDEX(0))
            return context.get_dummy_value()

        return types.void(*kinds, types.int64), codegen

    return step


@intrinsic
def take(typingctx, row, first, count, vectors, at):  # type: ignore[no-untyped-def]
    """Copy ``count`` numbers of an array, from number ``first`` on, to number ``at`` of another, and zeros behind them.

    They are `LANES`, or fewer where a block is cut short.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, first, count, _, at = args
        (source, target), whole = addresses(context, builder, (row, vectors), args[::3]), Vectors(builder)
        with builder.if_else(builder.icmp_signed("==", count, INDEX(LANES))) as (full, cut):
            with full:
                whole.store(whole.load(source, first), target, at)
            with cut:
                whole.store(whole.load_first(count, source, first), target, at)
        return context.get_dummy_value()

    return types.void(row, types.int64, types.int64, vectors, types.int64), codegen


@intrinsic
def put(typingctx, vectors, at, count, row, first):  # type: ignore[no-untyped-def]
    """The inverse of `take`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, at, count, _, first = args
        (source, target), whole = addresses(context, builder, (vectors, row), args[::3]), Vectors(builder)
        value = whole.load(source, at)
        with builder.if_else(builder.icmp_signed("==", count, INDEX(LANES))) as (full, cut):
            with full:
                whole.store(value, target, first)
            with cut:
                whole.store_first(count, value, target, first)
        return context.get_dummy_value()

    return types.void(vectors, types.int64, types.int64, row, types.int64), codegen


@intrinsic
def softplus_vector(typingctx, delta, at):  # type: ignore[no-untyped-def]
    """The softplus of the vector that begins at number ``at`` of an array, in its place."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (start,), vectors = addresses(context, builder, (delta,), args[:1]), Vectors(builder)
        vectors.store(vectors.softplus(vectors.load(start, args[1])), start, args[1])
        return context.get_dummy_value()

    return types.void(delta, types.int64), codegen


@intrinsic
def gate_vector(typingctx, out, x, skip, at, D):  # type: ignore[no-untyped-def]
    """out = (out + D x) SiLU(skip) for the vectors that begin at number ``at``, and the first of D."""
    kinds = (out, x, skip, D)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *arrays, at, D = args
        out, x, skip, D = addresses(context, builder, kinds, (*arrays, D))
        vectors = Vectors(builder)
        through = vectors.times(vectors.load(D, INDEX(0)), vectors.load(x, at))
        whole = vectors.added(vectors.load(out, at), through)
        vectors.store(vectors.times(whole, vectors.silu(vectors.load(skip, at))), out, at)
        return context.get_dummy_value()

    return types.void(*kinds[:3], types.int64, D), codegen
