"""mamba-ssm's functions for Mamba-2 in plain PyTorch, to test what calls them without a GPU.

They have the signatures of the real ones, refuse what the real ones refuse or would misread, and share their
shortcomings: one A for all rows, no negative delta and no growth, no second derivative, a state that is written in
place, strides that are read of what may be missing. What they ask for was read in the sources of mamba-ssm 2.3.2.post1
(``ops/triton/ssd_combined.py`` and ``selective_state_update.py``). That the real kernels round the factors of products
to TF32 is not imitated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_trace.scan.cuda import installed
from mamba_trace.scan.dual import cuda


@dataclass
class DualStandIns:
    """The two functions, and the names and dtypes of what each call since their installation was given."""

    calls: list[tuple[str, dict[str, torch.dtype]]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Which function each call was of."""
        return [name for name, _ in self.calls]

    def record(self, name: str, **tensors: Tensor | None) -> None:
        """Note a call."""
        self.calls.append((name, {key: tensor.dtype for key, tensor in tensors.items() if tensor is not None}))

    def mamba_chunk_scan_combined(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """mamba-ssm's: x, z [B,L,H,P], dt [B,L,H], A, D [H], B, C [B,L,G,N], initial_states [B,H,P,N]."""
        assert dt_bias is seq_idx is cu_seqlens is None
        assert not dt_softplus
        assert not return_varlen_states
        assert dt_limit == (0.0, float("inf"))
        assert chunk_size & (chunk_size - 1) == 0
        assert bool((dt >= 0).all()), "the real one takes less for 0"
        assert bool((A <= 0).all()), "the real one lets no state grow"
        batch, length, heads, width = x.shape
        groups, d_state = B.shape[2:]
        assert length >= 1
        assert heads % groups == 0
        assert B.shape == C.shape == (batch, length, groups, d_state)
        assert dt.shape == (batch, length, heads)
        assert A.shape == (heads,)
        assert D is None or D.shape in ((heads,), (heads, width))
        assert z is None or z.shape == x.shape
        assert initial_states is None or initial_states.shape == (batch, heads, width, d_state)
        self.record("scan", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, initial_states=initial_states)
        out, final = _ChunkScan.apply(x, dt, A, B, C, D, z, initial_states)
        return (out, final.unflatten(-1, (width, d_state))) if return_final_states else out

    @torch.no_grad()
    def selective_state_update(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
        state_batch_indices: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """mamba-ssm's: state [B,H,P,N], which it changes, x, dt, z [B,H,P], A [H,P,N], B, C [B,G,N], D [H,P]."""
        assert not dt_softplus
        assert state_batch_indices is None
        batch, heads, width, d_state = state.shape
        assert x.shape == dt.shape == (batch, heads, width)
        assert A.shape == (heads, width, d_state)
        assert B.shape == C.shape
        assert B.shape[::2] == (batch, d_state)
        assert heads % B.shape[1] == 0
        assert D is not None, "the real one reads its strides"
        assert dt_bias is not None, "the real one reads its strides"
        assert D.shape == dt_bias.shape == (heads, width)
        assert z is None or z.shape == x.shape
        tied = all(each.stride(-1) == 0 for each in (A, dt, dt_bias))
        assert tied or width == 1, "the real one would take its slow path"
        self.record("update", state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z)
        inputs = (x[:, None], (dt + dt_bias)[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], D[:, 0])
        out, final = plain_scan(*inputs, None if z is None else z[:, None], state)
        state.copy_(final.view_as(state))
        return out[:, 0]


class _ChunkScan(torch.autograd.Function):
    """(out [B,L,H,P], final states [B,H,P N]), whose gradients are not differentiable again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.inputs = inputs
        return plain_scan(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in ctx.inputs]
        with torch.enable_grad():
            results = plain_scan(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(results, wanted, grads, allow_unused=True))
        return tuple(None if leaf is None else next(found) for leaf in leaves)


def plain_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, with D and the gate."""
    dtype = x.dtype
    each = x.shape[2] // B.shape[2]
    B, C = (tensor.float().repeat_interleave(each, dim=2) for tensor in (B, C))
    x, dt = x.float(), dt.float()
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if h is None else h.float()
    outputs = []
    for p in range(x.shape[1]):
        written = torch.einsum("bhp,bhn->bhpn", dt[:, p, :, None] * x[:, p], B[:, p])
        h = torch.exp(dt[:, p] * A)[..., None, None] * h + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, p]))
    out = torch.stack(outputs, dim=1)
    out = out if D is None else out + D.float()[:, None] * x
    out = out if z is None else out * F.silu(z.float())
    return out.to(dtype), h.flatten(2)


def install(monkeypatch: pytest.MonkeyPatch) -> DualStandIns:
    """Let ``mamba_trace.scan.dual.cuda`` call stand-ins, on tensors of the CPU, until the test ends."""
    stand_ins = DualStandIns()
    monkeypatch.setattr(installed, "chunk_scan_kernel", lambda: stand_ins.mamba_chunk_scan_combined)
    monkeypatch.setattr(installed, "state_update_kernel", lambda: stand_ins.selective_state_update)
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cpu",))
    # The small example is left to the tests of it: it would be among the calls.
    monkeypatch.setattr(cuda, "dual_failure", lambda device: None)
    return stand_ins
