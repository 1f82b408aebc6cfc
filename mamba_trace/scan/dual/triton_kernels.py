"""Mamba-2's recurrence and its gradients as Triton kernels: any dtypes and strides come in, float32 accumulates.

A program takes a block of channels of one head of one batch row through all positions, with its state
[BLOCK_E,BLOCK_N] in registers. Decay and scale are one number for each head and position. As in `scan.triton`, the
loads of UNROLL positions are issued before the first of them is used, and positions past the last get values that
change nothing: decay 1, and 0 for all else.

The backward pass computes the states again, a chunk at a time from the last to the first, from the checkpoints that
the forward pass left; a program keeps the states of a chunk in a scratch buffer of its own. The gradients of decay,
scale, B and C are sums over programs, which add to them atomically: their last bits depend on the order.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
import triton
import triton.language as tl


@triton.jit
def place(heads, width, groups_B, groups_C, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's row, head, groups of B and C, channels [BLOCK_E] and state indices [BLOCK_N], all int64."""
    blocks = tl.cdiv(width, BLOCK_E)
    unit = tl.program_id(0) // blocks
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    row, head = tl.cast(unit // heads, tl.int64), tl.cast(unit % heads, tl.int64)
    n = tl.cast(tl.arange(0, BLOCK_N), tl.int64)
    return row, head, head * groups_B // heads, head * groups_C // heads, tl.cast(e, tl.int64), n


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    x, decay, scale, B, C, h_start, D, skip,  # read at any strides
    y, h_last, states, checkpoints,  # dense
    length, heads, width, groups_B, groups_C, d_state,
    x_strides, decay_strides, scale_strides, B_strides, C_strides, h_strides, D_strides, skip_strides,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`reference.linear_scan`; with ``skip``, `reference.gate` of its y.

    ``states`` [B,L,H,P,N] receives the state after each position, ``checkpoints`` [B,ceil(L/CHUNK),H,P,N] the one
    before each CHUNK of them.
    """
    row, head, group_B, group_C, e, n = place(heads, width, groups_B, groups_C, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [P,N]
    h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if h_start is not None:
        at = h_start + row * h_strides[0] + head * h_strides[1] + e[:, None] * h_strides[2] + n[None, :] * h_strides[3]
        h += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x_at = x + row * x_strides[0] + head * x_strides[2] + e * x_strides[3]
    decay_at = decay + row * decay_strides[0] + head * decay_strides[2]
    scale_at = scale + row * scale_strides[0] + head * scale_strides[2]
    B_at = B + row * B_strides[0] + group_B * B_strides[2] + n * B_strides[3]
    C_at = C + row * C_strides[0] + group_C * C_strides[2] + n * C_strides[3]
    y_at = y + (row * length * heads + head) * width + e
    if skip is not None:
        skip_at = skip + row * skip_strides[0] + head * skip_strides[2] + e * skip_strides[3]
        d = tl.load(D + head * D_strides[0]).to(tl.float32)
    if states is not None:
        states_at = states + (row * length * heads + head) * plane + local
    if checkpoints is not None:
        checkpoints_at = checkpoints + (row * tl.cdiv(length, CHUNK) * heads + head) * plane + local

    for start in range(0, length, UNROLL):
        if checkpoints is not None:  # noqa: SIM102 - known when compiling, unlike the next
            if start % CHUNK == 0:
                tl.store(checkpoints_at, h, mask=inside)
                checkpoints_at += heads * plane
        loaded = ()
        for i in tl.static_range(UNROLL):
            here = start + i < length
            in_e = e < tl.where(here, width, 0)
            in_n = n < tl.where(here, d_state, 0)
            x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
            decay_p = tl.load(decay_at, mask=here, other=1.0).to(tl.float32)
            scale_p = tl.load(scale_at, mask=here, other=0.0).to(tl.float32)
            B_p = tl.load(B_at, mask=in_n, other=0.0).to(tl.float32)
            C_p = tl.load(C_at, mask=in_n, other=0.0).to(tl.float32)
            gate = x_p
            if skip is not None:
                gate = tl.load(skip_at, mask=in_e, other=0.0).to(tl.float32)
                skip_at += skip_strides[1]
            loaded += ((in_e, x_p, decay_p, scale_p, B_p, C_p, gate),)
            x_at += x_strides[1]
            decay_at += decay_strides[1]
            scale_at += scale_strides[1]
            B_at += B_strides[1]
            C_at += C_strides[1]
        for i in tl.static_range(UNROLL):
            in_e, x_p, decay_p, scale_p, B_p, C_p, gate = loaded[i]
            h = decay_p * h + (scale_p * x_p)[:, None] * B_p[None, :]
            out = tl.sum(h * C_p[None, :], axis=1)
            if skip is not None:
                out = (out + x_p * d) * (gate * tl.sigmoid(gate))
            tl.store(y_at, out.to(y.dtype.element_ty), mask=in_e)
            y_at += heads * width
            if states is not None:
                tl.store(states_at, h, mask=inside & in_e[:, None])
                states_at += heads * plane
    tl.store(h_last + (row * heads + head) * plane + local, h, mask=inside)


@triton.jit(do_not_specialize=["length"])
def linear_backward_kernel(
    x, decay, scale, B, C, gy, gh_last, gstates,  # read at any strides
    checkpoints, scratch, gx, gdecay, gscale, gB, gC, gh_start,  # dense
    length, heads, width, groups_B, groups_C, d_state,
    x_strides, decay_strides, scale_strides, B_strides, C_strides, gy_strides, gh_strides, gstates_strides,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of `linear_kernel` without a gate, from those of its results (``None`` for zeros).

    ``scratch`` [programs,CHUNK,BLOCK_E,BLOCK_N]. Results: gx [B,L,H,P] and gh_start [B,H,P,N]; gdecay, gscale
    [B,L,H], gB and gC [B,L,G,N] in float32, which are added to.
    """
    row, head, group_B, group_C, e, n = place(heads, width, groups_B, groups_C, BLOCK_E, BLOCK_N)
    inside = (e < width)[:, None] & (n < d_state)[None, :]
    plane = width * d_state
    local = e[:, None] * d_state + n[None, :]  # places in a contiguous [P,N]
    g = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)  # of the state after the position at hand
    if gh_last is not None:
        at = gh_last + row * gh_strides[0] + head * gh_strides[1]
        at = at + e[:, None] * gh_strides[2] + n[None, :] * gh_strides[3]
        g += tl.load(at, mask=inside, other=0.0)
    in_block = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    scratch_at = scratch + tl.cast(tl.program_id(0), tl.int64) * (CHUNK * BLOCK_E * BLOCK_N) + in_block
    chunks = tl.cdiv(length, CHUNK)
    checkpoints_at = checkpoints + ((row + 1) * chunks * heads + head) * plane + local

    end = tl.cast(tl.cdiv(length, UNROLL) * UNROLL, tl.int64)  # from where these walk back
    C_at = C + row * C_strides[0] + end * C_strides[1] + group_C * C_strides[2] + n * C_strides[3]
    at_head = (row * length + end) * heads + head
    gx_at = gx + at_head * width + e
    gdecay_at = gdecay + at_head
    gscale_at = gscale + at_head
    gB_at = gB + ((row * length + end) * groups_B + group_B) * d_state + n
    gC_at = gC + ((row * length + end) * groups_C + group_C) * d_state + n
    if gy is not None:
        gy_at = gy + row * gy_strides[0] + end * gy_strides[1] + head * gy_strides[2] + e * gy_strides[3]
    if gstates is not None:
        gstates_at = gstates + row * gstates_strides[0] + end * gstates_strides[1] + head * gstates_strides[2]
        gstates_at = gstates_at + e[:, None] * gstates_strides[3] + n[None, :] * gstates_strides[4]

    for back in range(0, chunks):
        first = (chunks - 1 - back) * CHUNK
        stop = tl.minimum(first + CHUNK, length)
        checkpoints_at -= heads * plane
        h = tl.load(checkpoints_at, mask=inside, other=0.0)
        p = tl.cast(first, tl.int64)
        x_at = x + row * x_strides[0] + p * x_strides[1] + head * x_strides[2] + e * x_strides[3]
        decay_at = decay + row * decay_strides[0] + p * decay_strides[1] + head * decay_strides[2]
        scale_at = scale + row * scale_strides[0] + p * scale_strides[1] + head * scale_strides[2]
        B_at = B + row * B_strides[0] + p * B_strides[1] + group_B * B_strides[2] + n * B_strides[3]
        before_at = scratch_at
        for start in range(first, stop, UNROLL):
            loaded = ()
            for i in tl.static_range(UNROLL):
                here = start + i < length
                x_p = tl.load(x_at, mask=e < tl.where(here, width, 0), other=0.0).to(tl.float32)
                decay_p = tl.load(decay_at, mask=here, other=1.0).to(tl.float32)
                scale_p = tl.load(scale_at, mask=here, other=0.0).to(tl.float32)
                B_p = tl.load(B_at, mask=n < tl.where(here, d_state, 0), other=0.0).to(tl.float32)
                loaded += ((x_p, decay_p, scale_p, B_p),)
                x_at += x_strides[1]
                decay_at += decay_strides[1]
                scale_at += scale_strides[1]
                B_at += B_strides[1]
            for i in tl.static_range(UNROLL):
                x_p, decay_p, scale_p, B_p = loaded[i]
                tl.store(before_at, h)
                before_at += BLOCK_E * BLOCK_N
                h = decay_p * h + (scale_p * x_p)[:, None] * B_p[None, :]
        tl.debug_barrier()  # other threads of this program may load what one has stored

        padded = first + tl.cdiv(stop - first, UNROLL) * UNROLL
        for start in range(0, stop - first, UNROLL):  # counted from the last
            loaded = ()
            for i in tl.static_range(UNROLL):
                x_at -= x_strides[1]
                decay_at -= decay_strides[1]
                scale_at -= scale_strides[1]
                B_at -= B_strides[1]
                C_at -= C_strides[1]
                before_at -= BLOCK_E * BLOCK_N
                here = padded - 1 - start - i < length
                in_e = e < tl.where(here, width, 0)
                in_n = n < tl.where(here, d_state, 0)
                x_p = tl.load(x_at, mask=in_e, other=0.0).to(tl.float32)
                decay_p = tl.load(decay_at, mask=here, other=1.0).to(tl.float32)
                scale_p = tl.load(scale_at, mask=here, other=0.0).to(tl.float32)
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
                loaded += ((here, in_e, in_n, x_p, decay_p, scale_p, B_p, C_p, before, gy_p, gstates_p),)
            for i in tl.static_range(UNROLL):
                here, in_e, in_n, x_p, decay_p, scale_p, B_p, C_p, before, gy_p, gstates_p = loaded[i]
                gx_at -= heads * width
                gdecay_at -= heads
                gscale_at -= heads
                gB_at -= groups_B * d_state
                gC_at -= groups_C * d_state
                if gstates is not None:
                    g += gstates_p
                write_p = scale_p * x_p
                if gy is not None:
                    g += gy_p[:, None] * C_p[None, :]
                    h = decay_p * before + write_p[:, None] * B_p[None, :]
                    tl.atomic_add(gC_at, tl.sum(gy_p[:, None] * h, axis=0), mask=in_n, sem="relaxed")
                tl.atomic_add(gB_at, tl.sum(g * write_p[:, None], axis=0), mask=in_n, sem="relaxed")
                write = tl.sum(g * B_p[None, :], axis=1)  # gradient of scale x
                tl.store(gx_at, (scale_p * write).to(gx.dtype.element_ty), mask=in_e)
                tl.atomic_add(gscale_at, tl.sum(x_p * write, axis=0), mask=here, sem="relaxed")
                decayed = tl.sum(tl.sum(g * before, axis=1), axis=0)
                tl.atomic_add(gdecay_at, decayed, mask=here, sem="relaxed")
                g *= decay_p
        tl.debug_barrier()  # the next chunk's states go where this one's were
    tl.store(gh_start + (row * heads + head) * plane + local, g, mask=inside)
