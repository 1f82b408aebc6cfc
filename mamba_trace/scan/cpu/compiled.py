"""What the compiled loops share: how they are compiled, called and vectorised.

A kernel is a C function of one argument, the address of its parameters: int64 numbers that hold sizes, flags
and the addresses and strides of float32 arrays, at the places of its `Layout`. Such a function can be run by
any pool of threads, PyTorch's own among them (see `team`), and needs no interpreter. Its work is cut into
pieces; every thread takes the next piece until none is left, so a thread that comes late, or never, is made
up for by the others.

Numba compiles a kernel when its module is first imported and keeps the result on disk. It turns the inner
loops into vector instructions, exponentials included: they are polynomials, because a call of libm's in a
loop keeps it scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from ..buffers import Layout

LOG2E = np.float32(math.log2(math.e))
#: Taylor coefficients of 2**f, lowest first; on [-1/2, 1/2] their error is below float32's.
EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
#: Coefficients of log(1 + u) = 2 artanh(s) in odd powers of s = u / (2 + u), which is at most 1/3.
ARTANH = tuple(np.float32(2 / (2 * k + 1)) for k in range(8))
FAST = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"fastmath": FAST, "error_model": "numpy"}  # a division raises nothing

MOST = 64  # parameters: no kernel reads past the end of its layout
FLAT = 1 << 62  # no bound on an index


def kernel(function: Callable[[Any], None]) -> Any:
    """Compile a function of one address, and keep the result on disk where there is a folder to write to."""
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # numba found no such folder
        return cfunc(signature, **OPTIONS)(function)


@dataclass(frozen=True)
class Kernel:
    """A compiled function of one address, and what stands there."""

    compiled: Any
    layout: Layout


def taking(layout: Layout) -> Callable[[Any], Kernel]:
    """Make a `Kernel` of a compiled function that reads its parameters at the places of ``layout``."""
    return lambda compiled: Kernel(compiled, layout)


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """The pointer to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def _fetch_and_add_one(typingctx: Any, where: Any) -> Any:
    """Count up the int64 at a pointer, whatever other threads do; what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


@njit(inline="always", **OPTIONS)
def parameters(data):  # type: ignore[no-untyped-def]
    """The parameters at an address."""
    return carray(data, MOST, np.int64)


@njit(inline="always", **OPTIONS)
def next_piece(data):  # type: ignore[no-untyped-def]
    """The number of a piece nobody has taken yet."""
    return _fetch_and_add_one(data)


@njit(inline="always", **OPTIONS)
def flat(p, i):  # type: ignore[no-untyped-def]
    """The memory at the address in parameter ``i``, as float32 numbers."""
    return carray(_pointer(p[i]), FLAT, np.float32)


@njit(inline="always", **OPTIONS)
def strided(p, i):  # type: ignore[no-untyped-def]
    """The memory at the address in parameter ``i``, and the strides of its first two axes."""
    return flat(p, i), p[i + 1], p[i + 2]


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
    return p * _as_float(np.int32(np.int32(whole) + np.int32(127)) << np.int32(23))


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


@njit(inline="always", **OPTIONS)
def array(p, i, shape):  # type: ignore[no-untyped-def]
    """The contiguous array at the address in parameter ``i``."""
    return carray(_pointer(p[i]), shape, np.float32)
