"""mamba-ssm's and causal-conv1d's functions in plain PyTorch, to test what calls them without a GPU.

They have the signatures of the real ones, refuse what the real ones refuse or would misread, and share their
shortcomings: results in the dtype of the input, no state to begin at, no gradient of the last state, no
second derivative. What the kernels ask for was read in their sources (mamba-ssm 2.3.2, causal-conv1d 1.7.0).

`install` puts them in place of the real ones and lets the backend run on the CPU::

    def test_something(monkeypatch):
        kernels = cuda_stand_ins.install(monkeypatch)
        model = MambaTrace(tiny_hf(), kernels="cuda")
        ...
        assert [call.name for call in kernels.calls] == ["conv", "scan"]

With ``kernels="auto"`` a model on the CPU goes on choosing the ``cpu`` backend, unless the test also sets
``dispatch.SUITABLE["cpu"]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_trace.scan import cuda
from mamba_trace.scan.cuda import installed

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        name: ``"scan"`` or ``"conv"``.
        shapes: of the tensors that it was given, by the names that the real function has for them.
        dtype: of its result.
        flags: ``"D"``, ``"z"``, ``"delta_bias"``, ``"softplus"`` and ``"last_state"`` of a scan, ``"bias"``
            and ``"silu"`` of a convolution, where it was asked for them; ``"grad"`` where its result has one.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    flags: frozenset[str]

    @property
    def length(self) -> int:
        """Positions it ran over, virtual ones among them."""
        return self.shapes["u" if self.name == "scan" else "x"][-1]


@dataclass
class StandIns:
    """The two functions, and the calls of them since they were installed or ``calls`` was cleared."""

    calls: list[Call] = field(default_factory=list)

    def lengths(self) -> list[int]:
        """Positions that each call ran over."""
        return [call.length for call in self.calls]

    def selective_scan_fn(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """mamba-ssm's: u, delta, z [B,E,L], A [E,N], B, C [B,N,L], D, delta_bias [E]."""
        check_scan(u, delta, A, B, C, D, z, delta_bias)
        given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        asked = {"softplus": delta_softplus, "last_state": return_last_state}
        self.calls.append(recorded("scan", u.dtype, given, asked))
        out, last_state = _Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last_state[..., -1, 1::2]) if return_last_state else out

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """causal-conv1d's: x [B,E,L], weight [E,K], bias [E]."""
        assert seq_idx is None, "not modelled"
        assert initial_states is None, "the layout of ours does not allow it"
        assert not return_final_states, "the layout of ours does not allow it"
        assert final_states_out is None
        check_conv(x, weight, bias, activation)
        given, asked = {"x": x, "weight": weight, "bias": bias}, {"silu": activation is not None}
        self.calls.append(recorded("conv", x.dtype, given, asked))
        return _Conv.apply(x, weight, bias, activation is not None)


def install(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Let ``mamba_trace.scan.cuda`` call stand-ins, on tensors of the CPU, until the test ends."""
    stand_ins = StandIns()
    monkeypatch.setattr(installed, "scan_kernel", lambda: stand_ins.selective_scan_fn)
    monkeypatch.setattr(installed, "conv_kernel", lambda: stand_ins.causal_conv1d_fn)
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cpu",))
    # The small examples are left to the tests of them: they would be among the calls.
    monkeypatch.setattr(cuda, "scan_failure", lambda device: None)
    monkeypatch.setattr(cuda, "conv_failure", lambda device: None)
    return stand_ins


def recorded(name: str, dtype: torch.dtype, given: dict[str, Tensor | None], asked: dict[str, bool]) -> Call:
    """The call of ``name`` on the tensors ``given``, with the flags ``asked``."""
    tensors = {key: tensor for key, tensor in given.items() if tensor is not None}
    flags = {key for key in ("D", "z", "delta_bias", "bias") if key in tensors}
    flags |= {key for key, value in asked.items() if value}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        flags.add("grad")
    return Call(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, dtype, frozenset(flags))


# -- what the real ones ask for --------------------------------------------------------------------------


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Refuse what the kernel refuses, reads in another layout, or crashes on."""
    batch, width, length = u.shape
    d_state = A.shape[1]
    assert 1 <= d_state <= 256
    assert length >= 1
    assert delta.shape == u.shape
    assert A.shape == (width, d_state)
    assert A.dtype == torch.float32
    assert B.shape == C.shape == (batch, d_state, length)
    assert u.dtype in DTYPES
    for tensor in (u, delta, B, C, z):
        if tensor is not None:
            assert tensor.dtype == u.dtype
            check_rows(tensor)
    if z is not None:
        assert z.shape == u.shape
    for tensor in (D, delta_bias):
        if tensor is not None:
            assert tensor.shape == (width,)
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
    assert len({tensor.device for tensor in (u, delta, A, B, C, D, z) if tensor is not None}) == 1


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Refuse what the kernel refuses, reads in another layout, or crashes on."""
    assert activation in (None, "silu", "swish")
    assert x.dtype in DTYPES
    assert weight.dtype in DTYPES
    assert x.dim() == 3
    assert weight.shape[0] == x.shape[1]
    assert 2 <= weight.shape[1] <= 4
    check_rows(x)
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    assert not channels_last, "that layout needs E and strides divisible by 8"
    if bias is not None:
        assert bias.shape == weight.shape[:1]
        assert bias.dtype == weight.dtype
        assert bias.device == weight.device == x.device


def check_rows(tensor: Tensor) -> None:
    """The last axis contiguous, and where vectors are loaded each row at a multiple of 16 bytes."""
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    if tensor.shape[-1] % 8 == 0:
        size = tensor.element_size()
        assert tensor.data_ptr() % 16 == 0
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            assert length == 1 or stride * size % 16 == 0


# -- what the real ones do -------------------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """(out [B,E,L], states of chunks [B,E,1,2N]); the gradient of the latter is not looked at."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.inputs = inputs[:-1]
        ctx.softplus = inputs[-1]
        return plain_scan(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        check_rows(grad)
        return (*derivatives(lambda *inputs: plain_scan(*inputs, ctx.softplus)[0], ctx.inputs, grad), None)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.inputs, ctx.activate = inputs[:-1], inputs[-1]
        return plain_conv(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_rows(grad)
        return (*derivatives(lambda *inputs: plain_conv(*inputs, ctx.activate), ctx.inputs, grad), None)


def derivatives(run: Any, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradient of each of ``inputs``, not differentiable again, as what compiled code returns."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = run(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(out, wanted, grad))
    return [None if leaf is None else next(found) for leaf in leaves]


def plain_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence in float32; (out in the dtype of u, the state at the end as the kernel leaves it)."""
    dtype = u.dtype
    u, delta, B, C = (tensor.float() for tensor in (u, delta, B, C))
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape)  # [B,E,N]
    outputs = []
    for position in range(u.shape[-1]):
        step = delta[..., position, None]  # [B,E,1]
        h = torch.exp(step * A) * h + step * u[..., position, None] * B[:, None, :, position]
        outputs.append((h * C[:, None, :, position]).sum(-1))
    out = torch.stack(outputs, dim=-1)
    out = out if D is None else out + D[:, None] * u
    out = out if z is None else out * F.silu(z.float())
    chunks = torch.stack((torch.ones_like(h), h), dim=-1).flatten(-2)[:, :, None].detach()
    return out.to(dtype), chunks


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
    """The convolution in float32, rounded once."""
    width = weight.shape[1]
    padded = F.pad(x.float(), (width - 1, 0))
    out = F.conv1d(padded, weight.float()[:, None], None if bias is None else bias.float(), groups=x.shape[1])
    return (F.silu(out) if activate else out).to(x.dtype)
