"""The recurrence as Triton kernels, forwards: any dtypes and strides come in, float32 accumulates.

A program takes one batch row and a block of channels through all positions. Its state [BLOCK_E,BLOCK_N] stays
in registers, so nothing of shape [B,L,E,N] exists unless the trajectory is asked for. The loop does little
arithmetic and mostly waits for memory, so the loads of UNROLL positions are issued before the first of them
is used. Positions past the last get values that change nothing: delta 0, or A_bar 1 and B_bar 0.

The inputs have the shapes that `reference` has, each with its strides as a tuple; the results are contiguous.
A result that is not asked for is ``None``, and Triton then compiles a kernel without it.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
import triton
import triton.language as tl


@triton.jit
def locate(width, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's batch row, channels [BLOCK_E] and state indices [BLOCK_N], int64 as offsets may be."""
    blocks = tl.cdiv(width, BLOCK_E)
    row = tl.program_id(0) // blocks
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    return tl.cast(row, tl.int64), tl.cast(e, tl.int64), tl.cast(tl.arange(0, BLOCK_N), tl.int64)


@triton.jit
def tile(start, strides, e, n):
    """Pointers to [BLOCK_E,BLOCK_N] elements; the last two of ``strides`` are those of E and N."""
    return start + e[:, None] * strides[-2] + n[None, :] * strides[-1]


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to a relative precision of float32 however small it is.

    log1p(u), with u = exp(-|x|) in [0, 1], is 2 atanh(s), s = u / (2 + u) <= 1/3: a series without the
    cancellation of log(1 + u), and without a library that the interpreter and other GPUs lack.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit(do_not_specialize=["length"])
def selective_kernel(
    x, delta, A, B, C, h_start, D, skip,  # read at any strides
    y, h_last, states, checkpoints,  # dense
    length, width, d_state,
    x_strides, delta_strides, A_strides, B_strides, C_strides, h_strides, D_strides, skip_strides,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`reference.selective_scan`; with ``skip``, `reference.gated_scan`.

    ``states`` [B,L,E,N] receives the state after each position, ``checkpoints`` [B,ceil(L/CHUNK),E,N] the one
    before each CHUNK of them.
    """
    row, e, n = locate(width, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [E,N]
    a = tl.load(tile(A + row * A_strides[0], A_strides, e, n), mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if h_start is not None:
        at = tile(h_start + row * h_strides[0], h_strides, e, n)
        h += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x_at = x + row * x_strides[0] + e * x_strides[2]
    delta_at = delta + row * delta_strides[0] + e * delta_strides[2]
    B_at = B + row * B_strides[0] + n * B_strides[2]
    C_at = C + row * C_strides[0] + n * C_strides[2]
    y_at = y + row * length * width + e
    if skip is not None:
        skip_at = skip + row * skip_strides[0] + e * skip_strides[2]
        d = tl.load(D + e * D_strides[0], mask=e < width, other=0.0).to(tl.float32)
    if states is not None:
        states_at = states + row * length * plane + local
    if checkpoints is not None:
        checkpoints_at = checkpoints + row * tl.cdiv(length, CHUNK) * plane + local

    for start in range(0, length, UNROLL):
        if checkpoints is not None:  # noqa: SIM102 - known when compiling, unlike the next
            if start % CHUNK == 0:
                tl.store(checkpoints_at, h, mask=inside)
                checkpoints_at += plane
        loaded = ()
        for i in tl.static_range(UNROLL):
            in_e = e < tl.where(start + i < length, width, 0)
            in_n = n < tl.where(start + i < length, d_state, 0)
            x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
            delta_p = tl.load(delta_at, mask=in_e, other=0.0).to(tl.float32)
            B_p = tl.load(B_at, mask=in_n, other=0.0).to(tl.float32)
            C_p = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
            gate = x_p
            if skip is not None:
                gate = tl.load(skip_at, mask=in_e, other=0.0).to(tl.float32)
                skip_at += skip_strides[1]
                delta_p = tl.where(in_e, softplus(delta_p), 0.0)
            loaded += ((in_e, x_p, delta_p, B_p, C_p, gate),)
            x_at += x_strides[1]
            delta_at += delta_strides[1]
            B_at += B_strides[1]
            C_at += C_strides[1]
        for i in tl.static_range(UNROLL):
            in_e, x_p, delta_p, B_p, C_p, gate = loaded[i]
            h = tl.exp(delta_p[:, None] * a) * h + (delta_p * x_p)[:, None] * B_p[None, :]
            out = tl.sum(h * C_p[None, :], axis=1)
            if skip is not None:
                out = (out + x_p * d) * (gate * tl.sigmoid(gate))
            tl.store(y_at, out.to(y.dtype.element_ty), mask=in_e)
            y_at += width
            if states is not None:
                tl.store(states_at, h, mask=inside & in_e[:, None])
                states_at += plane
    tl.store(h_last + row * plane + local, h, mask=inside)


@triton.jit(do_not_specialize=["length"])
def explicit_kernel(
    A_bar, B_bar, x, C, h_start,  # read at any strides
    y, h_last, states, before,  # dense
    length, width, d_state,
    A_strides, B_strides, x_strides, C_strides, h_strides,
    UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`reference.explicit_scan`; ``states``, ``before`` [B,L,E,N] get those after, before each position."""
    row, e, n = locate(width, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [E,N]
    h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if h_start is not None:
        at = tile(h_start + row * h_strides[0], h_strides, e, n)
        h += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    A_at = tile(A_bar + row * A_strides[0], A_strides, e, n)
    B_at = tile(B_bar + row * B_strides[0], B_strides, e, n)
    x_at = x + row * x_strides[0] + e * x_strides[2]
    C_at = C + row * C_strides[0] + n * C_strides[2]
    y_at = y + row * length * width + e
    if states is not None:
        states_at = states + row * length * plane + local
    if before is not None:
        before_at = before + row * length * plane + local

    for start in range(0, length, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            in_e = e < tl.where(start + i < length, width, 0)
            here = in_e[:, None] & (n < d_state)[None, :]
            A_p = tl.load(A_at, mask=here, other=1.0).to(tl.float32)
            B_p = tl.load(B_at, mask=here, other=0.0).to(tl.float32)
            x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
            in_n = n < tl.where(start + i < length, d_state, 0)
            C_p = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
            loaded += ((in_e, A_p, B_p, x_p, C_p),)
            A_at += A_strides[1]
            B_at += B_strides[1]
            x_at += x_strides[1]
            C_at += C_strides[1]
        for i in tl.static_range(UNROLL):
            in_e, A_p, B_p, x_p, C_p = loaded[i]
            here = in_e[:, None] & (n < d_state)[None, :]
            if before is not None:
                tl.store(before_at, h, mask=here)
                before_at += plane
            h = A_p * h + B_p * x_p[:, None]
            tl.store(y_at, tl.sum(h * C_p[None, :], axis=1), mask=in_e)
            y_at += width
            if states is not None:
                tl.store(states_at, h, mask=here)
                states_at += plane
    tl.store(h_last + row * plane + local, h, mask=inside)
