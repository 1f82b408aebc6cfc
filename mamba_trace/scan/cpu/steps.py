"""Steps of the selective scan in vector instructions, for the compiled loops of `selective`.

A step takes the channels of one block, which are the lanes of one vector, over one position. The state of the block is
[N,LANES].
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import INDEX, LANES, Total, Vectors, addresses


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
def copy_vector(typingctx, source, first, target, at):  # type: ignore[no-untyped-def]
    """Copy the vector that begins at number ``first`` of an array to number ``at`` of another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (one, other), vectors = addresses(context, builder, (source, target), args[::2]), Vectors(builder)
        vectors.store(vectors.load(one, args[1]), other, args[3])
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), codegen


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
