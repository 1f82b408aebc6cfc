"""The gradients of `kernels`, by the same division into programs.

The backward pass needs the states of the forward pass, from the last to the first. The states of the
selective scan are computed again, a chunk at a time, from the checkpoints that the forward pass left; a
program keeps the states of a chunk in a scratch buffer of its own. The inputs of the explicit scan are as
large as its trajectory, so the trajectory is computed again as a whole. The gradients of B and C are sums
over channels, and so over programs, which add to them atomically: their last bits depend on the order.

Positions past the last change nothing here either: their decay is 1 and all their gradients are 0.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
import triton
import triton.language as tl

from .kernels import locate, tile


@triton.jit(do_not_specialize=["length"])
def selective_backward_kernel(
    x, delta, A, B, C, gy, gh_last, gstates,  # read at any strides
    checkpoints, scratch, gx, gdelta, gA, gB, gC, gh_start,  # dense
    length, width, d_state,
    x_strides, delta_strides, A_strides, B_strides, C_strides, gy_strides, gh_strides, gstates_strides,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of `selective_kernel` without a gate, from those of its results (``None`` for zeros).

    ``checkpoints`` [B,ceil(L/CHUNK),E,N]; ``scratch`` [programs,CHUNK,BLOCK_E,BLOCK_N]. Results: gx, gdelta
    [B,L,E]; gA, gh_start [B,E,N]; gB, gC [B,L,N] in float32, which are added to.
    """
    row, e, n = locate(width, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [E,N]
    a = tl.load(tile(A + row * A_strides[0], A_strides, e, n), mask=inside, other=0.0).to(tl.float32)
    g = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)  # of the state after the position at hand
    if gh_last is not None:
        g += tl.load(tile(gh_last + row * gh_strides[0], gh_strides, e, n), mask=inside, other=0.0)
    ga = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    in_block = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    scratch_at = scratch + tl.cast(tl.program_id(0), tl.int64) * (CHUNK * BLOCK_E * BLOCK_N) + in_block
    chunks = tl.cdiv(length, CHUNK)
    checkpoints_at = checkpoints + (row + 1) * chunks * plane + local

    end = tl.cast(tl.cdiv(length, UNROLL) * UNROLL, tl.int64)  # from where these walk back
    C_at = C + row * C_strides[0] + end * C_strides[1] + n * C_strides[2]
    gx_at = gx + (row * length + end) * width + e
    gdelta_at = gdelta + (row * length + end) * width + e
    gB_at = gB + (row * length + end) * d_state + n
    gC_at = gC + (row * length + end) * d_state + n
    if gy is not None:
        gy_at = gy + row * gy_strides[0] + end * gy_strides[1] + e * gy_strides[2]
    if gstates is not None:
        gstates_at = tile(gstates + row * gstates_strides[0] + end * gstates_strides[1], gstates_strides, e, n)

    for back in range(0, chunks):
        first = (chunks - 1 - back) * CHUNK
        stop = tl.minimum(first + CHUNK, length)
        checkpoints_at -= plane
        h = tl.load(checkpoints_at, mask=inside, other=0.0)
        p = tl.cast(first, tl.int64)
        x_at = x + row * x_strides[0] + p * x_strides[1] + e * x_strides[2]
        delta_at = delta + row * delta_strides[0] + p * delta_strides[1] + e * delta_strides[2]
        B_at = B + row * B_strides[0] + p * B_strides[1] + n * B_strides[2]
        before_at = scratch_at
        for start in range(first, stop, UNROLL):
            loaded = ()
            for i in tl.static_range(UNROLL):
                in_e = e < tl.where(start + i < length, width, 0)
                in_n = n < tl.where(start + i < length, d_state, 0)
                x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
                delta_p = tl.load(delta_at, mask=in_e, other=0.0).to(tl.float32)
                B_p = tl.load(B_at, mask=in_n, other=0.0).to(tl.float32)
                loaded += ((x_p, delta_p, B_p),)
                x_at += x_strides[1]
                delta_at += delta_strides[1]
                B_at += B_strides[1]
            for i in tl.static_range(UNROLL):
                x_p, delta_p, B_p = loaded[i]
                tl.store(before_at, h)
                before_at += BLOCK_E * BLOCK_N
                h = tl.exp(delta_p[:, None] * a) * h + (delta_p * x_p)[:, None] * B_p[None, :]
        tl.debug_barrier()  # other threads of this program may load what one has stored

        padded = first + tl.cdiv(stop - first, UNROLL) * UNROLL
        for start in range(0, stop - first, UNROLL):  # counted from the last
            loaded = ()
            for i in tl.static_range(UNROLL):
                x_at -= x_strides[1]
                delta_at -= delta_strides[1]
                B_at -= B_strides[1]
                C_at -= C_strides[1]
                before_at -= BLOCK_E * BLOCK_N
                position = padded - 1 - start - i
                in_e = e < tl.where(position < length, width, 0)
                in_n = n < tl.where(position < length, d_state, 0)
                x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
                delta_p = tl.load(delta_at, mask=in_e, other=0.0).to(tl.float32)
                B_p = tl.load(B_at, mask=in_n, other=0.0).to(tl.float32)
                C_p = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
                before = tl.load(before_at)
                gy_p = x_p
                if gy is not None:
                    gy_at -= gy_strides[1]
                    gy_p = tl.load(gy_at, mask=in_e, other=0.0)
                gstates_p = before
                if gstates is not None:
                    gstates_at -= gstates_strides[1]
                    gstates_p = tl.load(gstates_at, mask=in_e[:, None] & (n < d_state)[None, :], other=0.0)
                loaded += ((in_e, in_n, x_p, delta_p, B_p, C_p, before, gy_p, gstates_p),)
            for i in tl.static_range(UNROLL):
                in_e, in_n, x_p, delta_p, B_p, C_p, before, gy_p, gstates_p = loaded[i]
                gx_at -= width
                gdelta_at -= width
                gB_at -= d_state
                gC_at -= d_state
                if gstates is not None:
                    g += gstates_p
                decay = tl.exp(delta_p[:, None] * a)
                kept = decay * before
                delta_x = delta_p * x_p
                if gy is not None:
                    g += gy_p[:, None] * C_p[None, :]
                    h = kept + delta_x[:, None] * B_p[None, :]
                    tl.atomic_add(gC_at, tl.sum(gy_p[:, None] * h, axis=0), mask=in_n, sem="relaxed")
                tl.atomic_add(gB_at, tl.sum(g * delta_x[:, None], axis=0), mask=in_n, sem="relaxed")
                write = tl.sum(g * B_p[None, :], axis=1)  # gradient of delta x
                exponent = g * kept  # gradient of delta A
                gdelta_p = x_p * write + tl.sum(exponent * a, axis=1)
                tl.store(gx_at, (delta_p * write).to(gx.dtype.element_ty), mask=in_e)
                tl.store(gdelta_at, gdelta_p.to(gdelta.dtype.element_ty), mask=in_e)
                ga += exponent * delta_p[:, None]
                g *= decay
        tl.debug_barrier()  # the next chunk's states go where this one's were
    tl.store(gA + row * plane + local, ga, mask=inside)
    tl.store(gh_start + row * plane + local, g, mask=inside)


@triton.jit(do_not_specialize=["length"])
def explicit_backward_kernel(
    A_bar, B_bar, x, C, gy, gh_last, gstates,  # read at any strides
    before, gA_bar, gB_bar, gx, gC, gh_start,  # dense
    length, width, d_state,
    A_strides, B_strides, x_strides, C_strides, gy_strides, gh_strides, gstates_strides,
    UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of `explicit_kernel` from those of its results (``None`` for zeros).

    ``before`` [B,L,E,N] holds the state before each position. Results: gA_bar, gB_bar [B,L,E,N]; gx [B,L,E];
    gh_start [B,E,N]; gC [B,L,N] in float32, which is added to.
    """
    row, e, n = locate(width, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [E,N]
    g = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)  # of the state after the position at hand
    if gh_last is not None:
        g += tl.load(tile(gh_last + row * gh_strides[0], gh_strides, e, n), mask=inside, other=0.0)
    last = tl.cast(length - 1, tl.int64)
    A_at = tile(A_bar + row * A_strides[0] + last * A_strides[1], A_strides, e, n)
    B_at = tile(B_bar + row * B_strides[0] + last * B_strides[1], B_strides, e, n)
    x_at = x + row * x_strides[0] + last * x_strides[1] + e * x_strides[2]
    C_at = C + row * C_strides[0] + last * C_strides[1] + n * C_strides[2]
    before_at = before + (row * length + last) * plane + local
    gA_at = gA_bar + (row * length + last) * plane + local
    gB_at = gB_bar + (row * length + last) * plane + local
    gx_at = gx + (row * length + last) * width + e
    gC_at = gC + (row * length + last) * d_state + n
    if gy is not None:
        gy_at = gy + row * gy_strides[0] + last * gy_strides[1] + e * gy_strides[2]
    if gstates is not None:
        gstates_at = tile(gstates + row * gstates_strides[0] + last * gstates_strides[1], gstates_strides, e, n)

    for start in range(0, length, UNROLL):  # counted from the last
        loaded = ()
        for i in tl.static_range(UNROLL):
            in_e = e < tl.where(start + i < length, width, 0)
            in_n = n < tl.where(start + i < length, d_state, 0)
            here = in_e[:, None] & (n < d_state)[None, :]
            A_p = tl.load(A_at, mask=here, other=1.0).to(tl.float32)
            B_p = tl.load(B_at, mask=here, other=0.0).to(tl.float32)
            h = tl.load(before_at, mask=here, other=0.0)
            x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
            C_p = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
            A_at -= A_strides[1]
            B_at -= B_strides[1]
            x_at -= x_strides[1]
            C_at -= C_strides[1]
            before_at -= plane
            gy_p = x_p
            if gy is not None:
                gy_p = tl.load(gy_at, mask=in_e, other=0.0)
                gy_at -= gy_strides[1]
            gstates_p = h
            if gstates is not None:
                gstates_p = tl.load(gstates_at, mask=here, other=0.0)
                gstates_at -= gstates_strides[1]
            loaded += ((in_e, in_n, A_p, B_p, h, x_p, C_p, gy_p, gstates_p),)
        for i in tl.static_range(UNROLL):
            in_e, in_n, A_p, B_p, h, x_p, C_p, gy_p, gstates_p = loaded[i]
            here = in_e[:, None] & (n < d_state)[None, :]
            if gstates is not None:
                g += gstates_p
            if gy is not None:
                g += gy_p[:, None] * C_p[None, :]
                after = A_p * h + B_p * x_p[:, None]
                tl.atomic_add(gC_at, tl.sum(gy_p[:, None] * after, axis=0), mask=in_n, sem="relaxed")
            tl.store(gA_at, (g * h).to(gA_bar.dtype.element_ty), mask=here)
            tl.store(gB_at, (g * x_p[:, None]).to(gB_bar.dtype.element_ty), mask=here)
            tl.store(gx_at, tl.sum(g * B_p, axis=1).to(gx.dtype.element_ty), mask=in_e)
            gA_at -= plane
            gB_at -= plane
            gx_at -= width
            gC_at -= d_state
            g *= A_p
    tl.store(gh_start + row * plane + local, g, mask=inside)
