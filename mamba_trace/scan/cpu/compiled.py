"""What the compiled loops share: how they are compiled, find their arguments, and vectorise.

A kernel is a C function of one argument: the address of a block of int64 numbers, which `BlockLayout.pack` fills
with sizes, flags, and the addresses and strides of float32 arrays. `arguments_at` is compiled from the same
`BlockLayout`: it gives a named tuple of everything in the block, so that a kernel writes ``p.width`` and
``p.x[b, t, e]`` and no place is counted by hand. A name that the layout lacks, or too many or too few
indices, do not compile.

A C function can be run by any pool of threads, PyTorch's own among them (see `team`), and needs no
interpreter. The work is cut into pieces. Every thread takes the next piece until none is left, so the others
make up for a thread that starts late or never.

Numba compiles a kernel when it first runs and keeps the result on disk. It turns the inner loops into vector
instructions, exponentials included: those are polynomials here, because a call into libm keeps a loop scalar.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ..buffers import BlockLayout

LOG2E = np.float32(math.log2(math.e))
#: Taylor coefficients of 2**f, lowest first; on [-1/2, 1/2] their error is below float32's.
EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
#: Coefficients of log(1 + u) = 2 artanh(s) in odd powers of s = u / (2 + u), which is at most 1/3.
ARTANH = tuple(np.float32(2 / (2 * k + 1)) for k in range(8))
FAST = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"fastmath": FAST, "error_model": "numpy"}  # a division raises nothing

#: A size that Numba may be told of the axes of an array. It adds the size to an index below 0. With a size of
#: 0 or this one, which times 4 bytes is 0 modulo 2^64, the compiler drops the addition, and with it a
#: comparison in every loop.
BOUNDLESS = 1 << 62


class Kernel:
    """A function of one address, compiled when it first runs, and the layout of what stands at that address.

    Args:
        function: the function. It calls `arguments_at` for what stands at the address.
        layout: the layout.
        **constants: values for globals of the function's module, for this kernel alone. What a branch on them leaves
            out is not compiled.

    Example::

        @kernel(FORWARD)
        def forward(data):
            p = arguments_at(data)

        forward_runs = Kernel(forward.function, RUNS, IN_RUNS=True)
    """

    def __init__(self, function: Callable[[Any], None], layout: BlockLayout, **constants: Any) -> None:
        self.function = function
        self.layout = layout
        self.constants = constants

    @functools.cached_property
    def compiled(self) -> Any:
        """Numba's compiled function, which is kept on disk where there is a folder to write to."""
        # Numba's cache asks whether the file and the closure of a function have changed. The layout's places and
        # the constants are compiled in as well, so they are put into the closure: no other code is ever run.
        own = CellType(f"{_unpacking(self.layout)}\n{self.constants}")
        code = self.function.__code__.replace(co_freevars=("own",))
        globals_ = self.function.__globals__ | self.constants | {"arguments_at": _arguments_of(self.layout)}
        function = FunctionType(code, globals_, self.function.__name__, closure=(own,))
        signature = types.void(types.voidptr)
        with _nothing_collected():
            try:
                return cfunc(signature, cache=True, **OPTIONS)(function)
            except RuntimeError:  # Numba found no such folder
                return cfunc(signature, **OPTIONS)(function)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    # To compile makes objects by the hundred thousand, all of which are kept until the end. Python would look through
    # them, and through all others in memory, again and again.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def kernel(layout: BlockLayout) -> Callable[[Callable[[Any], None]], Kernel]:
    """Make a `Kernel` of a function whose arguments stand at the places of ``layout``."""
    return lambda function: Kernel(function, layout)


def arguments_at(data: Any) -> Any:
    """A named tuple of all numbers and arrays of the layout of the kernel that calls this, which stand at ``data``."""
    raise NotImplementedError("only a compiled kernel has arguments")  # each kernel is compiled with its own


def _arguments_of(layout: BlockLayout) -> Any:
    names = [*layout.places]
    scope = {"parameters": _parameters, "view": _view, "Arguments": namedtuple("Arguments", names)}
    exec(_unpacking(layout), scope)
    return njit(inline="always", **OPTIONS)(scope["unpack"])


def _unpacking(layout: BlockLayout) -> str:
    # The source of the function of `_arguments_of`.
    fields = []
    for name, place in layout.places.items():
        if (buffer := layout.buffers.get(name)) is None:
            fields.append(f"{name}=p[{place}]")
            continue
        strides = [f"p[{place + 1 + axis}]" for axis in range(buffer.loose)]
        for axis in range(buffer.loose, buffer.rank):
            sizes = [f"p[{layout.places[inner]}]" for inner in buffer.names[axis + 1 :]]
            strides.append(" * ".join(sizes) or "1")
        size = BOUNDLESS if buffer.loose else 0  # measured: the fastest of the ways that drop the comparison
        fields.append(f"{name}=view(p[{place}], ({', '.join(strides)},), {size})")
    block = f"parameters(data, {layout.length})"
    return f"def unpack(data):\n    p = {block}\n    return Arguments({', '.join(fields)})"


@intrinsic
def _view(typingctx: Any, address: Any, strides: Any, size: Any) -> Any:
    """The float32 array at an address, with the strides in elements and the same size for every axis."""
    kind = types.Array(types.float32, len(strides), "A")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(args[0], ir.FloatType().as_pointer()),
            shape=[args[2]] * len(strides),
            strides=[builder.mul(each, each.type(4)) for each in cgutils.unpack_tuple(builder, args[1])],
            itemsize=context.get_constant(types.intp, 4),
            meminfo=None,
        )
        return array._getvalue()

    return kind(types.int64, strides, types.int64), codegen


@njit(inline="always", **OPTIONS)
def _parameters(data, length):  # type: ignore[no-untyped-def]
    """The numbers at an address."""
    return carray(data, length, np.int64)


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def next_piece(typingctx: Any, data: Any) -> Any:
    """The number of a piece that no thread has taken yet: the first number at ``data``, counted up by one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


@njit(inline="always", **OPTIONS)
def exp2(v):  # type: ignore[no-untyped-def]
    """2**v; 0 below the smallest normal number and infinity above the largest."""
    v = min(max(v, np.float32(-127.0)), np.float32(128.0))
    whole = np.floor(v + np.float32(0.5))
    f = v - whole
    p = EXP2[7]
    p = p * f + EXP2[6]
    p = p * f + EXP2[5]
    p = p * f + EXP2[4]
    p = p * f + EXP2[3]
    p = p * f + EXP2[2]
    p = p * f + EXP2[1]
    p = p * f + EXP2[0]
    return p * as_float(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(inline="always", **OPTIONS)
def softplus(v):  # type: ignore[no-untyped-def]
    """log(1 + exp(v)), to float32's precision of its own value however small that is."""
    u = exp2(-abs(v) * LOG2E)
    s = u / (u + np.float32(2.0))
    q = s * s
    p = ARTANH[7]
    p = p * q + ARTANH[6]
    p = p * q + ARTANH[5]
    p = p * q + ARTANH[4]
    p = p * q + ARTANH[3]
    p = p * q + ARTANH[2]
    p = p * q + ARTANH[1]
    p = p * q + ARTANH[0]
    return max(v, np.float32(0.0)) + p * s


@njit(inline="always", **OPTIONS)
def silu(v):  # type: ignore[no-untyped-def]
    """v sigmoid(v)."""
    return v / (np.float32(1.0) + exp2(-v * LOG2E))
