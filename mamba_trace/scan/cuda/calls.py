"""Calls of mamba-ssm's and causal-conv1d's kernels: layouts, dtypes and virtual positions (see `cuda`).

What the kernels need was read in their sources. Activations are [B,E,L] and [B,N,L]. Their last axis is
contiguous, and so is the last axis of the gradient that comes back. Where L is a multiple of 128, rows begin
at multiples of 16 bytes, since the kernels then load vectors of that size. All activations share one dtype; A
and D are in float32.

No tensor that is returned here is a view.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..buffers import Buffer, check
from . import installed

#: A virtual position that writes a state has this times the state as its x, this as its B, and the inverse of
#: this number's square as its delta. Then exp(delta A) is 1 and the gradient of A is too small to be seen for
#: any |A| N below 2^24, and no state from 1e-30 to 1e30 overflows or underflows on the way. Being a power of
#: two, it makes the written state exact.
LIFT = 2.0**25

#: The arrays that the convolution takes.
CONVOLVED = {
    "x": Buffer("batch width length", dtype=None),
    "weight": Buffer("width taps", dtype=None),
    "bias": Buffer("width", dtype=None),
}


@functools.cache
def scanned(dtype: torch.dtype) -> dict[str, Buffer]:
    """The arrays that the scan takes where its activations are in ``dtype``."""
    buffers = {name: Buffer("batch width length", dtype=dtype) for name in ("u", "delta", "z")}
    buffers |= {name: Buffer("batch n_state length", dtype=dtype) for name in ("B", "C")}
    return buffers | {"A": Buffer("width n_state", dense=0), "D": Buffer("width")}


def scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None, *, attached: bool = False
) -> tuple[Tensor, Tensor]:
    """(y [B,E,L], h_last [B,E,N]) in float32, for x, delta [B,L,E], A [E,N], B, C [B,L,N] and h [B,E,N].

    The gradient of h_last is right only if it is ``attached``.
    """
    u, delta, B, C = (_channels(tensor) for tensor in (x, delta, B, C))
    return _call(u, delta, A, B, C, h, attached=attached)


def states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h: Tensor | None, *, attached: bool = False
) -> tuple[Tensor]:
    """The state after each position [B,L,E,N] in float32; the arguments are those of `scan`."""
    x, delta, B = _packed(_channels(x)), _packed(_channels(delta)), _packed(_channels(B))
    C = torch.ones_like(B[:, :1])
    components = []
    for n in range(A.shape[1]):
        component = slice(n, n + 1)
        start = None if h is None else h[..., component]
        out, _ = _call(x, delta, A[:, component], B[:, component], C, start)
        components.append(out.transpose(1, 2))
    return (torch.stack(components, dim=-1),)


def gated(
    x: Tensor, delta_2: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, skip: Tensor, h: Tensor | None =
    None, *, attached: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """((y + D x) SiLU(skip) [B,E,L] in the dtype of x, h_last [B,E,N] in float32); skip [B,L,E], D [E].

    The gradient of h_last is right only if it is ``attached``.
    """
    if attached:  # the virtual positions that read the state must not be gated
        out, h_last = scan(x, F.softplus(delta_2.float()), A, B, C, h, attached=True)
        return reference.gate(out.transpose(1, 2), x, D, skip).transpose(1, 2), h_last
    if h is None:
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in (x, delta_2, B, C, skip)))
        delta, softplus = delta_2, True
    else:
        dtype, delta, softplus = torch.float32, F.softplus(delta_2.float()), False
    u, delta, B, C, z = (_channels(tensor, dtype) for tensor in (x, delta, B, C, skip))
    out, h_last = _call(u, delta, A, B, C, h, D, z, softplus=softplus)
    return out.to(x.dtype), h_last


def convolve(x_in: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, *, activate: bool) -> Tensor:
    """`reference.causal_conv` as [B,E,L]."""
    x, virtual = x_in.transpose(1, 2), 0
    if before is not None:
        virtual = weight.shape[1] - 1
        x = torch.cat((before[..., 1:].to(x.dtype), x), dim=-1)  # [B,E,K-1+L]
    if bias is not None:
        bias = bias.to(weight.dtype).contiguous()
    kernel = installed.conv_kernel()
    assert not isinstance(kernel, str), kernel
    x, weight = _packed(x), weight.contiguous()
    sizes = dict(zip(("batch", "width", "length"), x.shape, strict=True))
    check({"x": x, "weight": weight, "bias": bias}, CONVOLVED, taps=weight.shape[1], **sizes)
    out = kernel(x=x, weight=weight, bias=bias, activation="silu" if activate else None)
    assert isinstance(out, Tensor)
    _pack_gradient(out)
    return out[..., virtual:].clone() if virtual else out


def _call(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None,
    D: Tensor | None = None, z: Tensor | None = None, *, softplus: bool = False, attached: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Runs the kernel with virtual positions around: (out [B,E,L], h_last [B,E,N]); u, delta, z [B,E,L], B, C
    # [B,N,L].
    virtual, d_state = 0, A.shape[1]
    if h_start is not None:
        virtual = d_state
        u, delta, B, C = _write(h_start, u, delta, B, C)
        z = None if z is None else F.pad(z, (virtual, 0))
    if attached:
        u, delta, B, C = _read(u, delta, B, C)
    kernel = installed.scan_kernel()
    assert not isinstance(kernel, str), kernel
    packed = (tensor if tensor is None else _packed(tensor) for tensor in (u, delta, B, C, z))
    u, delta, B, C, z = packed  # type: ignore[assignment]
    A, D = A.float(), None if D is None else D.float().contiguous()
    arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
    batch, width, length = u.shape
    check(arrays, scanned(u.dtype), batch=batch, width=width, length=length, n_state=d_state)
    out, h_last = kernel(**arrays, delta_bias=None, delta_softplus=softplus, return_last_state=True)
    _pack_gradient(out)
    if attached:
        out, h_last = out[..., :-d_state], out[..., -d_state:]
    else:
        h_last = h_last.clone(memory_format=torch.contiguous_format)  # it is a view of the states of all chunks
    return out[..., virtual:].clone() if virtual else out, h_last


def _write(h_start: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    # Adds N positions in front, after which the state is h_start.
    batch, _, d_state = h_start.shape
    unit = LIFT * torch.eye(d_state, dtype=B.dtype, device=B.device)  # [N,N]
    u = torch.cat((LIFT * h_start.to(u.dtype), u), dim=-1)
    delta = F.pad(delta, (d_state, 0), value=LIFT**-2)
    B = torch.cat((unit.expand(batch, -1, -1), B), dim=-1)
    return u, delta, B, F.pad(C, (d_state, 0))


def _read(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    # Adds N positions at the end, whose outputs are the state there: where delta is 0, A_bar is 1.
    batch, d_state, _ = C.shape
    unit = torch.eye(d_state, dtype=C.dtype, device=C.device)
    u, delta, B = (F.pad(tensor, (0, d_state)) for tensor in (u, delta, B))
    return u, delta, B, torch.cat((C, unit.expand(batch, -1, -1)), dim=-1)


def _channels(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype).transpose(1, 2)  # [B,L,E] -> [B,E,L]


def _packed(tensor: Tensor) -> Tensor:
    # A tensor with an axis of length 1 may count as contiguous with any stride along it. It may begin
    # anywhere.
    if tensor.is_contiguous() and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _pack_gradient(out: Tensor) -> None:
    # The gradient that comes back from later operations may be laid out in any way.
    if out.requires_grad:
        out.register_hook(_packed)
