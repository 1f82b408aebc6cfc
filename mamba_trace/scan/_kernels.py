"""The recurrence as compiled loops over blocks of channels, for float32 on a CPU.

Numba compiles these on first use and keeps the result on disk. A block is 16 channels wide, so that LLVM
turns each inner loop over channels into vector instructions, the exponential included: it is a polynomial,
because a call of libm's in the loop would keep it scalar. The state of a block [N,16] stays in the first
level of cache, and nothing of shape [B,L,E,N] exists unless the trajectory is asked for.

Layouts: x, delta, y [B,L,E]; A [E,N]; B, C [B,L,N]; h [B,E,N]; all float32 and contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

WIDTH = 16  # channels in a block
CHUNK = 64  # positions between the states that the backward pass keeps
LOG2E = np.float32(math.log2(math.e))
#: Taylor coefficients of 2**f, lowest first; on [-1/2, 1/2] their error is below float32's.
EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
FAST = {"contract", "reassoc", "nsz", "arcp"}


def compiled(function: Callable[..., None]) -> Any:
    """Compile at the first call, and keep the result on disk where there is a folder to write to."""
    try:
        return njit(nogil=True, cache=True, fastmath=FAST)(function)
    except RuntimeError:  # numba found no such folder
        return njit(nogil=True, fastmath=FAST)(function)


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always", fastmath=FAST)
def _exp2(v):  # type: ignore[no-untyped-def]
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


@compiled
def forward(x, delta, A, B, C, h_start, y, h_last, states, first, last):  # type: ignore[no-untyped-def]
    """Run the blocks ``first`` to ``last - 1`` (of batch x channel blocks) over all positions.

    ``states`` receives the state after each position: [B,L,E,N], or [B,0,E,N] for none.
    """
    length, width, n_state = x.shape[1], x.shape[2], A.shape[1]
    blocks = (width + WIDTH - 1) // WIDTH
    a = np.zeros((n_state, WIDTH), np.float32)
    h = np.zeros((n_state, WIDTH), np.float32)
    d = np.zeros(WIDTH, np.float32)
    dx = np.zeros(WIDTH, np.float32)
    out = np.zeros(WIDTH, np.float32)
    keep = states.shape[1] > 0
    for block in range(first, last):
        b, e0 = block // blocks, (block % blocks) * WIDTH
        w = min(WIDTH, width - e0)
        for n in range(n_state):
            for e in range(w):
                a[n, e] = A[e0 + e, n] * LOG2E
                h[n, e] = h_start[b, e0 + e, n]
        for t in range(length):
            for e in range(w):
                d[e] = delta[b, t, e0 + e]
                dx[e] = d[e] * x[b, t, e0 + e]
            for e in range(WIDTH):
                out[e] = np.float32(0.0)
            for n in range(n_state):
                bn, cn = B[b, t, n], C[b, t, n]
                for e in range(WIDTH):
                    state = _exp2(d[e] * a[n, e]) * h[n, e] + dx[e] * bn
                    h[n, e] = state
                    out[e] += state * cn
            for e in range(w):
                y[b, t, e0 + e] = out[e]
            if keep:
                for e in range(w):
                    for n in range(n_state):
                        states[b, t, e0 + e, n] = h[n, e]
        for n in range(n_state):
            for e in range(w):
                h_last[b, e0 + e, n] = h[n, e]


@compiled
def backward(  # type: ignore[no-untyped-def]
    x, delta, A, B, C, h_start, gy, gh_last, gstates, gx, gdelta, gA, gB, gC, gh, first, last
):
    """The gradients of `forward` for the blocks ``first`` to ``last - 1``.

    gy [B,L,E], gh_last [B,E,N] and gstates ([B,L,E,N], or [B,0,E,N] for none) are the gradients of the
    results. gx, gdelta [B,L,E], gA [B,E,N] (to be summed over B) and gh [B,E,N] are written; gB and gC
    [B,L,N] are added to, so every concurrent call needs its own. States are computed again, by chunks.
    """
    length, width, n_state = x.shape[1], x.shape[2], A.shape[1]
    blocks = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    raw = np.zeros((n_state, WIDTH), np.float32)
    a = np.zeros((n_state, WIDTH), np.float32)
    g = np.zeros((n_state, WIDTH), np.float32)
    ga = np.zeros((n_state, WIDTH), np.float32)
    starts = np.zeros((chunks + 1, n_state, WIDTH), np.float32)
    states = np.zeros((CHUNK + 1, n_state, WIDTH), np.float32)
    d = np.zeros(WIDTH, np.float32)
    xs = np.zeros(WIDTH, np.float32)
    go = np.zeros(WIDTH, np.float32)
    through_b = np.zeros(WIDTH, np.float32)
    through_a = np.zeros(WIDTH, np.float32)
    keep = gstates.shape[1] > 0
    for block in range(first, last):
        b, e0 = block // blocks, (block % blocks) * WIDTH
        w = min(WIDTH, width - e0)
        raw[:], a[:], g[:], ga[:], starts[0] = 0, 0, 0, 0, 0
        d[:], xs[:], go[:] = 0, 0, 0
        for n in range(n_state):
            for e in range(w):
                raw[n, e] = A[e0 + e, n]
                a[n, e] = A[e0 + e, n] * LOG2E
                starts[0, n, e] = h_start[b, e0 + e, n]
                g[n, e] = gh_last[b, e0 + e, n]
        for c in range(chunks - 1):  # the last chunk's states are computed below
            starts[c + 1] = starts[c]
            for t in range(c * CHUNK, (c + 1) * CHUNK):
                for e in range(w):
                    d[e] = delta[b, t, e0 + e]
                    xs[e] = d[e] * x[b, t, e0 + e]
                for n in range(n_state):
                    bn = B[b, t, n]
                    for e in range(WIDTH):
                        starts[c + 1, n, e] = _exp2(d[e] * a[n, e]) * starts[c + 1, n, e] + xs[e] * bn
        for c in range(chunks - 1, -1, -1):
            begin, end = c * CHUNK, min((c + 1) * CHUNK, length)
            states[0] = starts[c]
            for t in range(begin, end):
                i = t - begin
                for e in range(w):
                    d[e] = delta[b, t, e0 + e]
                    xs[e] = d[e] * x[b, t, e0 + e]
                for n in range(n_state):
                    bn = B[b, t, n]
                    for e in range(WIDTH):
                        states[i + 1, n, e] = _exp2(d[e] * a[n, e]) * states[i, n, e] + xs[e] * bn
            for t in range(end - 1, begin - 1, -1):
                i = t - begin
                for e in range(w):
                    d[e] = delta[b, t, e0 + e]
                    xs[e] = x[b, t, e0 + e]
                    go[e] = gy[b, t, e0 + e]
                if keep:
                    for n in range(n_state):
                        for e in range(w):
                            g[n, e] += gstates[b, t, e0 + e, n]
                for e in range(WIDTH):
                    through_b[e] = np.float32(0.0)
                    through_a[e] = np.float32(0.0)
                for n in range(n_state):
                    bn, cn = B[b, t, n], C[b, t, n]
                    sum_b, sum_c = np.float32(0.0), np.float32(0.0)
                    for e in range(WIDTH):
                        decay = _exp2(d[e] * a[n, e])
                        gn = g[n, e] + go[e] * cn
                        sum_c += go[e] * states[i + 1, n, e]
                        sum_b += gn * d[e] * xs[e]
                        through_b[e] += gn * bn
                        log_decay = gn * states[i, n, e] * decay
                        through_a[e] += log_decay * raw[n, e]
                        ga[n, e] += log_decay * d[e]
                        g[n, e] = gn * decay
                    gB[b, t, n] += sum_b
                    gC[b, t, n] += sum_c
                for e in range(w):
                    gx[b, t, e0 + e] = d[e] * through_b[e]
                    gdelta[b, t, e0 + e] = xs[e] * through_b[e] + through_a[e]
        for n in range(n_state):
            for e in range(w):
                gA[b, e0 + e, n] = ga[n, e]
                gh[b, e0 + e, n] = g[n, e]
