"""The compiled halves of mamba-ssm and causal-conv1d in plain PyTorch: what their Python calls, and nothing more.

``selective_scan_cuda`` and ``causal_conv1d_cuda`` are modules with the functions and the order of arguments of the
real ones. They refuse what the C++ of the real ones refuses (csrc/selective_scan/selective_scan.cpp of mamba-ssm 2.3.0
to 2.3.2, csrc/causal_conv1d.cpp of causal-conv1d 1.5.0 to 1.7.0), except that all tensors have to be on the CPU instead
of on a GPU, and what the kernels would misread (`cuda_stand_ins.check_rows`). What is not filled is NaN.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from cuda_stand_ins import DTYPES, check_rows, derivatives, plain_scan
from torch import Tensor

#: Positions in a chunk of the scan kernel, which keeps the state at the end of each.
CHUNK = 2048


def selective_scan_cuda() -> ModuleType:
    """A stand-in for mamba-ssm's module."""
    module = ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = scan_forward, scan_backward  # type: ignore[attr-defined]
    return module


def causal_conv1d_cuda(release: str) -> ModuleType:
    """A stand-in for the module of a release of causal-conv1d; before 1.5.1 it made its results itself."""
    module = ModuleType("causal_conv1d_cuda")
    functions = (conv_forward, conv_backward, conv_update)
    if release.startswith("1.5.0"):
        functions = (old_conv_forward, old_conv_backward, old_conv_update)
    names = ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update")
    for name, function in zip(names, functions, strict=True):
        setattr(module, name, function)
    return module


def array(
    tensor: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None, last: bool = False, what: str = ""
) -> None:
    """Refuse what is not a tensor of a shape and a dtype, or has gaps in its ``last`` axis."""
    assert isinstance(tensor, Tensor), what
    assert tensor.device.type == "cpu", what
    assert tuple(tensor.shape) == shape, f"{what}: {tuple(tensor.shape)}, not {shape}"
    assert dtype is None or tensor.dtype == dtype, f"{what}: {tensor.dtype}, not {dtype}"
    assert not last or tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"{what}: strides {tensor.stride()}"


# -- mamba-ssm's scan --------------------------------------------------------------------------------------------


def check_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, softplus: Any
) -> tuple[int, int, int, int]:
    """Refuse what both passes refuse; returns the sizes: batch, width, length and state."""
    (batch, width, length), n_state, dtype = u.shape, A.shape[1], u.dtype
    assert dtype in DTYPES
    assert A.dtype == torch.float32, "complex numbers are not modelled"
    assert isinstance(softplus, bool)
    assert 1 <= n_state <= 256
    assert min(batch, width, length) >= 1, "a grid of nothing cannot be launched"
    assert B.dim() == C.dim() == 4, "constant B and C are not modelled"
    groups = B.shape[1]
    assert width % groups == 0
    array(A, (width, n_state), what="A")
    for name, tensor in (("u", u), ("delta", delta), ("z", z)):
        if tensor is not None:
            array(tensor, (batch, width, length), dtype, last=True, what=name)
            check_rows(tensor)
    for name, tensor in (("B", B), ("C", C)):
        array(tensor, (batch, groups, n_state, length), dtype, last=True, what=name)
        check_rows(tensor)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            array(tensor, (width,), torch.float32, last=True, what=name)
    return batch, width, length, n_state


def computed(*inputs: Any, softplus: bool) -> tuple[Tensor, Tensor]:
    """(out [B,E,L], states of chunks), of B and C [B,G,N,L]: each group has a scan of its own."""
    u, delta, A, B, C, D, z, bias = inputs
    outs, states = [], []
    for group, columns in enumerate(torch.arange(u.shape[1]).chunk(B.shape[1])):
        D_of, bias_of = (None if tensor is None else tensor[columns] for tensor in (D, bias))
        z_of = None if z is None else z[:, columns]
        each = (u[:, columns], delta[:, columns], A[columns], B[:, group], C[:, group], D_of, z_of, bias_of)
        out, state = plain_scan(*each, softplus)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states, dim=1)


@torch.no_grad()
def scan_forward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: Any
) -> list[Tensor]:
    """out [B,E,L] without the gate, laid out as delta; states [B,E,chunks,2N]; the gated out, laid out as z."""
    batch, width, length, n_state = check_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    plain, last = computed(u, delta, A, B, C, D, None, delta_bias, softplus=delta_softplus)
    states = torch.full((batch, width, -(-length // CHUNK), 2 * n_state), torch.nan)
    states[:, :, -1] = last[:, :, -1]
    results = [torch.empty_like(delta).copy_(plain), states]
    if z is not None:
        gated, _ = computed(u, delta, A, B, C, D, z, delta_bias, softplus=delta_softplus)
        results.append(torch.empty_like(z).copy_(gated))
    return results


@torch.no_grad()
def scan_backward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, dout: Any, x: Any, out: Any, dz: Any,
    delta_softplus: Any, recompute_out_z: Any,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of all arguments up to delta_bias, that of z at the end, and the gated out if it is asked for."""
    batch, width, length, n_state = check_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    array(dout, u.shape, u.dtype, last=True, what="dout")
    check_rows(dout)
    assert x is not None or length <= CHUNK
    if x is not None:
        array(x, (batch, width, -(-length // CHUNK), 2 * n_state), torch.float32, what="x")
        assert x.is_contiguous()
    if z is not None:
        array(out, u.shape, u.dtype, last=True, what="out")
    if dz is not None:
        array(dz, u.shape, u.dtype, last=True, what="dz")
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    grads = derivatives(lambda *given: computed(*given, softplus=delta_softplus)[0], inputs, dout)
    found = [
        None if grad is None else torch.empty_like(given).copy_(grad)
        for given, grad in zip(inputs, grads, strict=True)
    ]  # fmt: skip
    results = [*found[:6], found[7]]
    if z is not None:
        results.append(found[6] if dz is None else dz.copy_(found[6]))
    if recompute_out_z:
        results.append(torch.empty_like(out).copy_(computed(*inputs, softplus=delta_softplus)[0]))
    return results


# -- causal-conv1d -----------------------------------------------------------------------------------------------


def check_conv(x: Any, weight: Any, bias: Any, seq_idx: Any, *states: Any, silu: Any) -> bool:
    """Refuse what both passes refuse; returns whether the channels are the last axis in memory."""
    (batch, width, length), taps = x.shape, weight.shape[-1]
    assert x.dtype in DTYPES
    assert weight.dtype in DTYPES
    assert isinstance(silu, bool)
    assert min(batch, width, length) >= 1, "a grid of nothing cannot be launched"
    assert 2 <= taps <= 4
    array(x, (batch, width, length), what="x")
    array(weight, (width, taps), what="weight")
    assert 1 in (x.stride(1), x.stride(2))
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    if channels_last:
        assert width % 8 == 0
        assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    else:
        check_rows(x)
    if bias is not None:
        array(bias, (width,), weight.dtype, what="bias")
        assert bias.stride(-1) == 1
    if seq_idx is not None:
        assert channels_last, "seq_idx needs the channels last"
        array(seq_idx, (batch, length), torch.int32, what="seq_idx")
        assert seq_idx.is_contiguous()
    for state in states:
        if state is not None:
            assert channels_last, "states need the channels last"
            array(state, (batch, width, taps - 1), x.dtype, what="a state")
            assert state.stride(1) == 1
    return channels_last


def windows(x: Tensor, taps: int, first: Tensor | None, seq_idx: Any) -> Tensor:
    """What each position sees [B,E,L,K] in float32: zeros in place of other sequences, ``first`` before the columns."""
    before = x.new_zeros(*x.shape[:2], taps - 1) if first is None else first
    seen = torch.cat((before, x), dim=-1).float().unfold(2, taps, 1)
    if seq_idx is None:
        return seen
    start = seq_idx.new_full((len(x), taps - 1), -1) if first is None else seq_idx[:, :1].expand(-1, taps - 1)
    same = torch.cat((start, seq_idx), dim=1).unfold(1, taps, 1) == seq_idx[..., None]
    return torch.where(same[:, None], seen, 0.0)


def convolved(seen: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution [B,E,L] in float32, before its activation."""
    out = torch.einsum("belk,ek->bel", seen, weight.float())
    return out if bias is None else out + bias.float()[:, None]


def activated(out: Tensor, silu: bool) -> Tensor:
    """``out``, or its SiLU."""
    return F.silu(out) if silu else out


@torch.no_grad()
def conv_forward(
    x: Any, weight: Any, bias: Any, seq_idx: Any, initial_states: Any, out: Any, final_states_out: Any, silu: Any
) -> None:
    """Writes out [B,E,L], and the last columns that were seen."""
    check_conv(x, weight, bias, seq_idx, initial_states, final_states_out, silu=silu)
    array(out, x.shape, x.dtype, what="out")
    assert out.stride() == x.stride() or 1 in x.shape, "the kernel writes as it reads"
    seen = windows(x, weight.shape[1], initial_states, seq_idx)
    out.copy_(activated(convolved(seen, weight, bias), silu))
    if final_states_out is not None:
        taps = weight.shape[1]
        before = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states
        final_states_out.copy_(torch.cat((before, x), dim=-1)[..., 1 - taps :])


@torch.no_grad()
def conv_backward(
    x: Any, weight: Any, bias: Any, dout: Any, seq_idx: Any, initial_states: Any, dfinal_states: Any, dx: Any,
    dweight: Any, dbias: Any, dinitial_states: Any, silu: Any,
) -> None:  # fmt: skip
    """Writes dx, and adds to the other gradients, which are in float32."""
    last = check_conv(x, weight, bias, seq_idx, initial_states, silu=silu)
    assert (bias is None) == (dbias is None)
    array(dout, x.shape, what="dout")
    if last and dout.stride(1) != 1:
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    elif not last and dout.stride(2) != 1:
        dout = dout.contiguous()
    assert not last or dout.stride(0) % 8 == dout.stride(2) % 8 == 0
    assert last or check_rows(dout) is None
    array(dx, x.shape, x.dtype, what="dx")
    assert dx.stride(1 if last else 2) == 1
    array(dweight, weight.shape, torch.float32, what="dweight")
    # By hand, since autograd sees nothing inside an operator of PyTorch's, as which causal-conv1d registers this.
    taps, length = weight.shape[1], x.shape[-1]
    grad, seen = dout.float(), windows(x, taps, initial_states, seq_idx)
    if silu:
        out = convolved(seen, weight, bias)
        grad = grad * out.sigmoid() * (1 + out * (1 - out.sigmoid()))
    dweight += torch.einsum("bel,belk->ek", grad, seen)
    if dbias is not None:
        array(dbias, bias.shape, torch.float32, what="dbias")
        dbias += grad.sum((0, 2))
    kept = windows(torch.ones_like(x), taps, torch.ones_like(x[..., :1]).expand(-1, -1, taps - 1), seq_idx)
    through = torch.einsum("bel,belk,ek->belk", grad, kept, weight.float())
    dcolumns = x.new_zeros(*x.shape[:2], taps - 1 + length, dtype=torch.float32)
    for tap in range(taps):
        dcolumns[..., tap : tap + length] += through[..., tap]
    if dfinal_states is not None:
        dcolumns[..., 1 - taps :] += dfinal_states
    dx.copy_(dcolumns[..., taps - 1 :])
    if dinitial_states is not None:
        assert dinitial_states.stride(1) == 1
        dinitial_states.copy_(dcolumns[..., : taps - 1])


@torch.no_grad()
def conv_update(
    x: Any, conv_state: Any, weight: Any, bias: Any, out: Any, silu: Any, cache_seqlens: Any, conv_state_indices: Any
) -> None:
    """Writes out [B,E,L] for a few more columns, and moves the state [B,E,K'] on."""
    assert cache_seqlens is conv_state_indices is None, "not modelled"
    (batch, width, length), taps, kept = x.shape, weight.shape[-1], conv_state.shape[-1]
    assert x.dtype in DTYPES
    assert weight.dtype in DTYPES
    assert isinstance(silu, bool)
    assert 2 <= taps <= 4
    assert kept >= taps - 1
    array(x, (batch, width, length), what="x")
    array(weight, (width, taps), what="weight")
    array(conv_state, (batch, width, kept), x.dtype, what="conv_state")
    if bias is not None:
        array(bias, (width,), weight.dtype, what="bias")
        assert bias.stride(-1) == 1
    columns = torch.cat((conv_state, x), dim=-1)
    seen = windows(x, taps, conv_state[..., kept + 1 - taps :], None)
    out.copy_(activated(convolved(seen, weight, bias), silu))
    conv_state.copy_(columns[..., -kept:])


def old_conv_forward(x: Any, weight: Any, bias: Any, seq_idx: Any, initial: Any, final: Any, silu: Any) -> Tensor:
    """`conv_forward`, which makes its result."""
    out = torch.empty_like(x)
    conv_forward(x, weight, bias, seq_idx, initial, out, final, silu)
    return out


def old_conv_backward(
    x: Any, weight: Any, bias: Any, dout: Any, seq_idx: Any, initial: Any, dfinal: Any, dx: Any, wanted: Any, silu: Any
) -> list[Tensor | None]:
    """`conv_backward`, which makes its results."""
    dx = torch.empty_like(x) if dx is None else dx
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    dinitial = torch.empty_like(initial) if wanted else None
    conv_backward(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu)
    return [dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype), dinitial]


def old_conv_update(
    x: Any, conv_state: Any, weight: Any, bias: Any, silu: Any, cache_seqlens: Any, conv_state_indices: Any
) -> Tensor:
    """`conv_update`, which makes its result."""
    out = torch.empty_like(x)
    conv_update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices)
    return out
