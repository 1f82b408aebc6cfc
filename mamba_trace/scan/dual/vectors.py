"""Steps of Mamba-2's scan in vector instructions, for the compiled loops of `loops`.

A step takes some channels of a head over one position: it reads and writes the state [channels,N] and sums over N.
The compiler does not make good code of that by itself. It cannot know that the arrays do not overlap, so it keeps
the sums in memory or compares addresses before each of these short loops, which costs as much as the loop. Here
the vectors and what stays in registers are spelt out, and the sums of several channels are added up together.

Each step is a function that Numba's loops call. Of its arrays only the address of the first number is looked at:
they are dense, and a row of a state is N numbers. A processor whose vectors are shorter takes several for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu.compiled import EXP2, LOG2E

LANES = 16  # numbers in a vector
CHUNK = 4  # positions in a `chunk_step`
FAST = ("contract", "reassoc", "nsz")
FLOAT, INDEX, SHORT = ir.FloatType(), ir.IntType(64), ir.IntType(32)


class Vectors:
    """Writes instructions on vectors of ``lanes`` numbers, or on single numbers where ``lanes`` is 1."""

    def __init__(self, builder: Any, lanes: int = LANES) -> None:
        self.builder = builder
        self.lanes = lanes
        self.type = FLOAT if lanes == 1 else ir.VectorType(FLOAT, lanes)

    def address(self, start: Any, index: Any) -> Any:
        """Where the vector stands that begins at a number of an array."""
        place = self.builder.gep(start, [index])
        return place if self.lanes == 1 else self.builder.bitcast(place, self.type.as_pointer())

    def load(self, start: Any, index: Any) -> Any:
        """The vector that begins at a number of an array."""
        return self.builder.load(self.address(start, index), align=4)

    def store(self, value: Any, start: Any, index: Any) -> None:
        """Write a vector that begins at a number of an array."""
        self.builder.store(value, self.address(start, index), align=4)

    def filled(self, number: Any) -> Any:
        """The vector with this number in all lanes."""
        if self.lanes == 1:
            return number
        first = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), number, SHORT(0))
        return self.shuffled(first, first, [0] * self.lanes)

    def shuffled(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """The vector of these lanes; those of ``other`` are counted after those of ``one``."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(SHORT, len(lanes)), lanes))

    def added(self, one: Any, other: Any) -> Any:
        """The sum."""
        return self.builder.fadd(one, other, flags=FAST)

    def times(self, one: Any, other: Any) -> Any:
        """The product."""
        return self.builder.fmul(one, other, flags=FAST)

    def same(self, number: SupportsFloat) -> Any:
        """The constant vector of one number."""
        return ir.Constant(self.type, [float(number)] * self.lanes)

    def silu(self, v: Any) -> Any:
        """v sigmoid(v), as `compiled.silu` has it, for whole vectors."""
        e = self.exp2(self.times(v, self.same(-LOG2E)))
        return self.builder.fdiv(v, self.added(e, self.same(1.0)), flags=FAST)

    def exp2(self, v: Any) -> Any:
        """2**v, as `compiled.exp2` has it, for whole vectors."""
        b = self.builder
        for within, bound in ((">", self.same(-127.0)), ("<", self.same(128.0))):
            v = b.select(b.fcmp_ordered(within, v, bound), v, bound)
        kind = ir.FunctionType(self.type, [self.type])
        floor = cgutils.get_or_insert_function(b.module, kind, f"llvm.floor.v{self.lanes}f32")
        whole = b.call(floor, [self.added(v, self.same(0.5))])
        fraction, power = b.fsub(v, whole, flags=FAST), self.same(EXP2[-1])
        for coefficient in reversed(EXP2[:-1]):
            power = self.added(self.times(power, fraction), self.same(coefficient))
        counts = ir.VectorType(SHORT, self.lanes)
        exponent = b.add(b.fptosi(whole, counts), ir.Constant(counts, [127] * self.lanes))
        scale = b.bitcast(b.shl(exponent, ir.Constant(counts, [23] * self.lanes)), self.type)
        return self.times(power, scale)


class Total:
    """A vector that a loop adds to, which ends up in a register."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        whole = Vectors(builder)
        self.place = cgutils.alloca_once(builder, whole.type)
        builder.store(ir.Constant(whole.type, [0.0] * LANES), self.place)

    def add(self, vectors: Vectors, value: Any) -> None:
        """Add a vector, or a single number to the first lane."""
        total = self.builder.load(self.place)
        if vectors.lanes > 1:
            total = vectors.added(total, value)
        else:
            first = vectors.added(self.builder.extract_element(total, SHORT(0)), value)
            total = self.builder.insert_element(total, first, SHORT(0))
        self.builder.store(total, self.place)


def store_totals(builder: Any, sums: list[Total], start: Any, index: Any) -> None:
    """Add up the lanes of each sum, and write the totals to an array beginning at a number.

    Two sums are halved and put side by side in one vector, two of these likewise, until all totals of up to
    `LANES` sums stand in one vector: that takes fewer instructions than each sum by itself.
    """
    vectors = Vectors(builder)
    values = [builder.load(each.place) for each in sums]
    block = LANES  # lanes that belong to one sum
    while block > 1:
        low = [lane for lane in range(LANES) if lane % block < block // 2]
        low += [LANES + lane for lane in low]
        high = [lane + block // 2 for lane in low]
        pairs = list(zip(values[::2], values[1::2], strict=True)) if len(values) > 1 else [(values[0], values[0])]
        values = [vectors.added(vectors.shuffled(*pair, low), vectors.shuffled(*pair, high)) for pair in pairs]
        block //= 2
    count = len(sums)
    totals = vectors.shuffled(values[0], values[0], list(range(count)))
    if count == 1:
        totals = builder.extract_element(totals, SHORT(0))
    Vectors(builder, count).store(totals, start, index)


def parts(builder: Any, n_state: Any) -> Iterator[tuple[Vectors, Any]]:
    """Loop over the state: yields what writes the instructions, and the index of the first of its numbers.

    The body is written twice: for whole vectors, and for what is left, number by number.
    """
    whole = builder.and_(n_state, INDEX(-LANES))
    for lanes, start, stop in ((LANES, INDEX(0), whole), (1, whole, n_state)):
        vectors = Vectors(builder, lanes)
        with cgutils.for_range_slice(builder, start, stop, INDEX(lanes)) as (n, _):
            yield vectors, n


def _addresses(context: Any, builder: Any, kinds: Any, arrays: Any) -> list[Any]:
    return [context.make_array(kind)(context, builder, value=a).data for kind, a in zip(kinds, arrays, strict=True)]


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
            before, after, x, y, B, C = _addresses(context, builder, kinds, args[:6])
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
            h, u, y, weights, B, C = _addresses(context, builder, kinds, args[:6])
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
        (source, target), vectors = _addresses(context, builder, (x, u), (args[0], args[3])), Vectors(builder)
        vectors.store(vectors.times(vectors.filled(args[2]), vectors.load(source, args[1])), target, args[4])
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32, u, types.int64), codegen


@intrinsic
def gate_vector(typingctx, y, to, x, skip, out, at, d):  # type: ignore[no-untyped-def]
    """out = (y + d x) SiLU(skip) for the channels of a vector, which begins at ``to`` in y, at ``at`` in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, vectors = (y, x, skip, out), Vectors(builder)
        own, *others = _addresses(context, builder, kinds, (args[0], *args[2:5]))
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
            g, states, gB, gC, B, C, write, gy, *through = _addresses(context, builder, kinds, args[:10])
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


@intrinsic
def fetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Ask for a number of an array to be brought into the cache, from a place that no processor foresees."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (start,) = _addresses(context, builder, signature.args[:1], args[:1])
        place = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, SHORT, SHORT, SHORT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, SHORT(0), SHORT(3), SHORT(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def transpose(typingctx, source, first, step, target, to, to_step):  # type: ignore[no-untyped-def]
    """Write a square of `LANES` x `LANES` numbers with its axes exchanged.

    It begins at number ``first`` of ``source``, where its rows are ``step`` numbers apart; ``to`` and ``to_step`` say
    the same of ``target``. In each round the corners of ever smaller squares change places.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        starts = _addresses(context, builder, signature.args[::3], args[::3])
        vectors, every = Vectors(builder), range(LANES)

        def row(at: int, k: int) -> Any:
            return builder.add(args[at], builder.mul(INDEX(k), args[at + 1]))

        rows = [vectors.load(starts[0], row(1, k)) for k in every]
        side = LANES // 2
        while side:
            upper = [lane if not lane & side else LANES + lane - side for lane in every]
            lower = [lane + side if not lane & side else LANES + lane for lane in every]
            for k in (k for k in every if not k & side):
                pair = rows[k], rows[k + side]
                rows[k], rows[k + side] = vectors.shuffled(*pair, upper), vectors.shuffled(*pair, lower)
            side //= 2
        for k in every:
            vectors.store(rows[k], starts[1], row(4, k))
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64, types.int64), codegen
