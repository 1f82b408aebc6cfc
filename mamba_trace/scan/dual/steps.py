"""Steps of Mamba-2's scan in vector instructions, for the compiled loops of `loops` and `gated`.

A step takes some channels of a head over one position, or a chunk: it reads and writes the state [channels,N] and sums
over N. The sums of several channels are added up together. Its arrays are dense, and a row of a state is N numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu.vectors import INDEX, LANES, Total, Vectors, addresses, parts, store_totals

CHUNK = 4  # positions in a `chunk_step`


def forward_step(channels: int) -> Callable[..., None]:
    """Make the step h = decay h + (scale x) B and y = C h for some channels of a head.

    It takes ``(before, after, x, y, B, C)``, arrays; ``before_row`` and ``after_row``, where the first channel
    stands in the states; ``channel``, where it stands in x and y; ``decay`` and ``scale``; ``n_state``.
    """

    @intrinsic
    def step(typingctx, before, after, x, y, B, C, before_row, after_row, channel, decay, scale, n_state):  # type: ignore[no-untyped-def]
        places, numbers = (types.int64,) * 3, (types.float32,) * 2
        kinds = (before, after, x, y, B, C)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            before, after, x, y, B, C = addresses(context, builder, kinds, args[:6])
            before_row, after_row, channel, decay, scale, n_state = args[6:]
            single, every = Vectors(builder, 1), range(channels)
            writes = [single.times(scale, single.load(x, builder.add(channel, INDEX(k)))) for k in every]
            sums = [Total(builder) for _ in every]
            for vectors, n in parts(builder, n_state):
                a, B_n, C_n = vectors.filled(decay), vectors.load(B, n), vectors.load(C, n)
                for k in every:
                    old, new = (_in_row(builder, row, k, n_state, n) for row in (before_row, after_row))
                    write = vectors.times(vectors.filled(writes[k]), B_n)
                    h = vectors.added(vectors.times(a, vectors.load(before, old)), write)
                    vectors.store(h, after, new)
                    sums[k].add(vectors, vectors.times(h, C_n))
            store_totals(builder, sums, y, channel)
            return context.get_dummy_value()

        return types.void(*kinds, *places, *numbers, types.int64), codegen

    return step


def chunk_step(count: int) -> Callable[..., None]:
    """Make the step of `gated` over the positions of a chunk, for the channels of ``count`` vectors.

    It takes ``(h, u, y, weights, B, C)``, arrays of which h is changed and y is the result: h [N,2 * LANES], u and y
    [CHUNK,2 * LANES], weights [CHUNK,CHUNK + 2]; ``step_B`` and ``step_C``, how many numbers a position is from the
    next in B and C; ``last``, the last position that these have; ``n_state``; ``first``, where the result begins in y.
    """

    @intrinsic
    def step(typingctx, h, u, y, weights, B, C, step_B, step_C, last, n_state, first):  # type: ignore[no-untyped-def]
        kinds = (h, u, y, weights, B, C)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            h, u, y, weights, B, C = addresses(context, builder, kinds, args[:6])
            step_B, step_C, last, n_state, first = args[6:]
            single, whole = Vectors(builder, 1), Vectors(builder)
            positions, every, width = range(CHUNK), range(count), 2 * LANES

            def weight(t: int, place: int) -> Any:
                return whole.filled(single.load(weights, INDEX(t * (CHUNK + 2) + place)))

            def here(t: int) -> Any:
                within = builder.icmp_signed("<", INDEX(t), last)
                return builder.select(within, INDEX(t), last)

            rows = [(builder.mul(here(t), step_B), builder.mul(here(t), step_C)) for t in positions]
            given = [[whole.load(u, INDEX(t * width + v * LANES)) for v in every] for t in positions]
            writes = [[whole.times(weight(t, CHUNK + 1), each) for each in given[t]] for t in positions]
            sums = [[Total(builder) for _ in every] for _ in positions]
            a = weight(CHUNK - 1, 0)
            with cgutils.for_range_slice(builder, INDEX(0), n_state, INDEX(1)) as (n, _):
                place = builder.mul(n, INDEX(width))
                places = [builder.add(place, INDEX(v * LANES)) for v in every]
                before = [whole.load(h, each) for each in places]
                after = [whole.times(a, each) for each in before]
                for t in positions:
                    B_n, C_n = (
                        whole.filled(single.load(array, builder.add(row, n)))
                        for array, row in zip((B, C), rows[t], strict=True)
                    )
                    for v in every:
                        sums[t][v].add(whole, whole.times(C_n, before[v]))
                        after[v] = whole.added(after[v], whole.times(B_n, writes[t][v]))
                for v in every:
                    whole.store(after[v], h, places[v])
            for t in positions:
                for v in every:
                    out = whole.times(weight(t, 0), builder.load(sums[t][v].place))
                    for s in range(t + 1):
                        out = whole.added(out, whole.times(weight(t, 1 + s), given[s][v]))
                    whole.store(out, y, builder.add(first, INDEX(t * width + v * LANES)))
            return context.get_dummy_value()

        return types.void(*kinds, *(types.int64,) * 5), codegen

    return step


@intrinsic
def write_vector(typingctx, x, at, scale, u, to):  # type: ignore[no-untyped-def]
    """u = scale x for the channels of a vector: it begins at number ``at`` of x and at number ``to`` of u."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (source, target), vectors = addresses(context, builder, (x, u), (args[0], args[3])), Vectors(builder)
        vectors.store(vectors.times(vectors.filled(args[2]), vectors.load(source, args[1])), target, args[4])
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32, u, types.int64), codegen


@intrinsic
def gate_vector(typingctx, y, to, x, skip, out, at, d):  # type: ignore[no-untyped-def]
    """out = (y + d x) SiLU(skip) for the channels of a vector, which begins at ``to`` in y, at ``at`` in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, vectors = (y, x, skip, out), Vectors(builder)
        own, *others = addresses(context, builder, kinds, (args[0], *args[2:5]))
        x_c, skip_c = (vectors.load(each, args[5]) for each in others[:2])
        whole = vectors.added(vectors.load(own, args[1]), vectors.times(vectors.filled(args[6]), x_c))
        vectors.store(vectors.times(whole, vectors.silu(skip_c)), others[2], args[5])
        return context.get_dummy_value()

    return types.void(y, types.int64, x, skip, out, types.int64, types.float32), codegen


def backward_step(channels: int) -> Callable[..., None]:
    """Make the gradients of `forward_step` for some channels of a block.

    It takes ``(g, states, gB, gC, B, C)``, arrays, of which g, gB and gC are changed: g is the gradient of the
    state after this position, and becomes that of the state before; ``(write, gy, through_write, through_decay)``,
    arrays: scale x and the gradient of y of each channel of the block, and what receives the gradients of the
    former, and of the decay; ``before_row`` and ``after_row``, where the block's first channel stands in
    ``states``; ``channel``, where the first channel stands in the block; ``decay``; ``n_state``.
    """

    @intrinsic
    def step(  # type: ignore[no-untyped-def]
        typingctx, g, states, gB, gC, B, C, write, gy, through_write, through_decay, before_row, after_row, channel,
        decay, n_state,
    ):  # fmt: skip
        kinds = (g, states, gB, gC, B, C, write, gy, through_write, through_decay)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            g, states, gB, gC, B, C, write, gy, *through = addresses(context, builder, kinds, args[:10])
            before_row, after_row, channel, decay, n_state = args[10:]
            rows = [channel, *(builder.add(row, channel) for row in (before_row, after_row))]
            single, every = Vectors(builder, 1), range(channels)
            at = [builder.add(channel, INDEX(k)) for k in every]
            writes, gys = ([single.load(start, place) for place in at] for start in (write, gy))
            sums, decayed = [Total(builder) for _ in every], Total(builder)
            for vectors, n in parts(builder, n_state):
                a, B_n, C_n, gB_n, gC_n = vectors.filled(decay), *(vectors.load(each, n) for each in (B, C, gB, gC))
                for k in every:
                    here, old, new = (_in_row(builder, row, k, n_state, n) for row in rows)
                    gy_k = vectors.filled(gys[k])
                    gh = vectors.added(vectors.load(g, here), vectors.times(gy_k, C_n))
                    gC_n = vectors.added(gC_n, vectors.times(gy_k, vectors.load(states, new)))
                    gB_n = vectors.added(gB_n, vectors.times(vectors.filled(writes[k]), gh))
                    sums[k].add(vectors, vectors.times(gh, B_n))
                    decayed.add(vectors, vectors.times(gh, vectors.load(states, old)))
                    vectors.store(vectors.times(a, gh), g, here)
                vectors.store(gB_n, gB, n)
                vectors.store(gC_n, gC, n)
            store_totals(builder, sums, through[0], channel)
            store_totals(builder, [decayed], through[1], INDEX(0))
            return context.get_dummy_value()

        return types.void(*kinds, *(types.int64,) * 3, types.float32, types.int64), codegen

    return step


def _in_row(builder: Any, row: Any, k: int, n_state: Any, n: Any) -> Any:
    return builder.add(builder.mul(builder.add(row, INDEX(k)), n_state), n)
