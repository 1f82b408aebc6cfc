"""Vector instructions for the compiled loops, where the compiler does not make good code by itself.

It cannot know that the arrays of a loop do not overlap, so it keeps sums in memory or compares addresses before each
short loop, which costs as much as the loop. Here the vectors and what stays in registers are spelt out. So are the
exponentials, for vectors and for single numbers: Numba takes far longer to compile a function of many lines.

Each function with a vector in it is one that Numba's loops call. Of its arrays only the address of the first number is
looked at. A processor whose vectors are shorter takes several for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, SupportsFloat

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # numbers in a vector
FAST = ("contract", "reassoc", "nsz", "arcp")
LOG2E = np.float32(math.log2(math.e))
#: log(2) as a number of few digits and what it lacks.
LOG2 = (np.float32(0.693359375), np.float32(-2.12194440e-4))
#: Coefficients of 2**f, lowest first, with the least relative error on [-1/2, 1/2]: in float32 2e-8, less than its own.
EXP2 = tuple(map(np.float32, (1, 0.693147206, 0.240226469, 0.0555032878, 0.00961848897, 0.00133999312, 0.000153458075)))
#: A whole number that this is added to stands in the last bits of the sum, with 127 added: an exponent of float32.
IN_LAST_BITS = 1.5 * 2**23 + 127
#: Coefficients of log(1 + u) = 2 artanh(s) in odd powers of s = u / (2 + u), which is at most 1/3.
ARTANH = tuple(np.float32(2 / (2 * k + 1)) for k in range(8))
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

    def load_first(self, count: Any, start: Any, index: Any) -> Any:
        """The vector of the first ``count`` numbers from one of an array on, with zeros behind them."""
        place, lanes = self.address(start, index), self._first(count)
        kind = ir.FunctionType(self.type, [place.type, SHORT, lanes.type, self.type])
        zeros = ir.Constant(self.type, [0.0] * self.lanes)
        return self.builder.call(self._function("masked.load", kind), [place, SHORT(4), lanes, zeros])

    def store_first(self, count: Any, value: Any, start: Any, index: Any) -> None:
        """Write the first ``count`` numbers of a vector."""
        place, lanes = self.address(start, index), self._first(count)
        kind = ir.FunctionType(ir.VoidType(), [self.type, place.type, SHORT, lanes.type])
        self.builder.call(self._function("masked.store", kind), [value, place, SHORT(4), lanes])

    def _first(self, count: Any) -> Any:
        # Which lanes are the first ``count``.
        kind = ir.VectorType(SHORT, self.lanes)
        number = self.builder.trunc(count, SHORT)
        counts = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, SHORT(0))
        counts = self.shuffled(counts, counts, [0] * self.lanes)
        return self.builder.icmp_signed("<", ir.Constant(kind, list(range(self.lanes))), counts)

    def _function(self, name: str, kind: Any) -> Any:
        # A function that LLVM has for vectors of numbers at an address.
        return cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{self.lanes}f32.p0")

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

    def over(self, one: Any, other: Any) -> Any:
        """The quotient."""
        return self.builder.fdiv(one, other, flags=FAST)

    def same(self, number: SupportsFloat) -> Any:
        """The constant vector of one number."""
        return self._same(self.type, float(number))

    def _same(self, kind: Any, number: float) -> Any:
        return ir.Constant(kind, number if self.lanes == 1 else [number] * self.lanes)

    def _called(self, name: str, *values: Any) -> Any:
        # A function that LLVM has for numbers of each kind.
        kind = ir.FunctionType(self.type, [self.type] * len(values))
        name = f"llvm.{name}.f32" if self.lanes == 1 else f"llvm.{name}.v{self.lanes}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)

    def _within(self, v: Any, beyond: str, bound: float) -> Any:
        # The bound where v is beyond it. What is no number stays.
        there = self.builder.fcmp_ordered(beyond, v, self.same(bound))
        return self.builder.select(there, self.same(bound), v)

    def _polynomial(self, coefficients: tuple[Any, ...], v: Any) -> Any:
        total = self.same(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = self.added(self.times(total, v), self.same(coefficient))
        return total

    def silu(self, v: Any) -> Any:
        """v sigmoid(v)."""
        e = self.exp2(self.times(v, self.same(-LOG2E)))
        return self.over(v, self.added(e, self.same(1.0)))

    def softplus(self, v: Any) -> Any:
        """log(1 + exp(v)), to float32's precision of its own value however small that is."""
        u = self.exp(self.times(self._called("fabs", v), self.same(-1.0)))
        s = self.over(u, self.added(u, self.same(2.0)))
        log = self.times(self._polynomial(ARTANH, self.times(s, s)), s)
        return self.added(self._within(v, "<", 0.0), log)

    def exp(self, v: Any) -> Any:
        """e**v, to float32's precision however large v is; 0 and infinity as `exp2`."""
        v = self._within(self._within(v, "<", -127 * math.log(2)), ">", 128 * math.log(2))
        whole = self._called("rint", self.times(v, self.same(LOG2E)))
        for part in LOG2:  # what is left of v is exact
            v = self._called("fma", whole, self.same(-part), v)
        return self._power(whole, self.times(v, self.same(LOG2E)))

    def exp2(self, v: Any) -> Any:
        """2**v; 0 below the smallest normal number and infinity above the largest."""
        v = self._within(self._within(v, "<", -127.0), ">", 128.0)
        whole = self._called("rint", v)
        return self._power(whole, self.builder.fsub(v, whole, flags=FAST))

    def _power(self, whole: Any, fraction: Any) -> Any:
        # 2 to the sum of a whole number and a fraction of up to a half.
        b, power = self.builder, self._polynomial(EXP2, fraction)
        bits = SHORT if self.lanes == 1 else ir.VectorType(SHORT, self.lanes)
        exponent = b.shl(b.bitcast(self.added(whole, self.same(IN_LAST_BITS)), bits), self._same(bits, 23))
        return self.times(power, b.bitcast(exponent, self.type))


def of_a_number(name: str) -> Any:
    """A function of `Vectors` for a single number. The compiler makes vectors of them in a loop."""

    @intrinsic
    def function(typingctx: Any, v: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(Vectors(builder, 1), name)(*args)

        return types.float32(types.float32), codegen

    return function


silu, number_exp, number_softplus = map(of_a_number, ("silu", "exp", "softplus"))


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


def totals(builder: Any, values: list[Any]) -> Any:
    """The sum of the lanes of each of up to `LANES` vectors, in one vector of as many; a number if it is one.

    Two vectors are halved and put side by side in one, two of these likewise, until all sums stand in one: that takes
    fewer instructions than each sum by itself.
    """
    vectors, count = Vectors(builder), len(values)
    block = LANES  # lanes that belong to one sum
    while block > 1:
        low = [lane for lane in range(LANES) if lane % block < block // 2]
        low += [LANES + lane for lane in low]
        high = [lane + block // 2 for lane in low]
        pairs = list(zip(values[::2], values[1::2], strict=True)) if len(values) > 1 else [(values[0], values[0])]
        values = [vectors.added(vectors.shuffled(*pair, low), vectors.shuffled(*pair, high)) for pair in pairs]
        block //= 2
    sums = vectors.shuffled(values[0], values[0], list(range(count)))
    return builder.extract_element(sums, SHORT(0)) if count == 1 else sums


def store_totals(builder: Any, sums: list[Total], start: Any, index: Any) -> None:
    """Write the `totals` of some sums to an array beginning at a number."""
    Vectors(builder, len(sums)).store(totals(builder, [builder.load(each.place) for each in sums]), start, index)


def parts(builder: Any, n_state: Any) -> Iterator[tuple[Vectors, Any]]:
    """Loop over the state: yields what writes the instructions, and the index of the first of its numbers.

    The body is written twice: for whole vectors, and for what is left, number by number.
    """
    whole = builder.and_(n_state, INDEX(-LANES))
    for lanes, start, stop in ((LANES, INDEX(0), whole), (1, whole, n_state)):
        vectors = Vectors(builder, lanes)
        with cgutils.for_range_slice(builder, start, stop, INDEX(lanes)) as (n, _):
            yield vectors, n


def addresses(context: Any, builder: Any, kinds: Any, arrays: Any) -> list[Any]:
    return [context.make_array(kind)(context, builder, value=a).data for kind, a in zip(kinds, arrays, strict=True)]


def apart(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """How many numbers lie between the beginnings of two lines of an array [lines,...]."""
    strides = context.make_array(kind)(context, builder, value=array).strides
    return builder.sdiv(cgutils.unpack_tuple(builder, strides)[0], INDEX(4))


def ask_for(builder: Any, start: Any, index: Any) -> None:
    """Ask for a number of an array to be brought into the cache."""
    place = builder.bitcast(builder.gep(start, [index]), ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, SHORT, SHORT, SHORT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, SHORT(0), SHORT(3), SHORT(1)])


@intrinsic
def fetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    """`ask_for` a number of an array, from a place that no processor foresees."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (start,) = addresses(context, builder, signature.args[:1], args[:1])
        ask_for(builder, start, args[1])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def transpose(typingctx, source, first, step, target, to, to_step):  # type: ignore[no-untyped-def]
    """Write a square of `LANES` x `LANES` numbers with its axes exchanged.

    It begins at number ``first`` of ``source``, where its rows are ``step`` numbers apart; ``to`` and ``to_step`` say
    the same of ``target``. In each round the corners of ever smaller squares change places.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        starts = addresses(context, builder, signature.args[::3], args[::3])
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
