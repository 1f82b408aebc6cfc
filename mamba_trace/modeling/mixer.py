"""Hugging Face's mixer made hookable: the selective state space layer, with every value a site.

The forward is the table of `sites` written out. Where nothing inside is wanted, no site is called and no
value is made that the plain computation does not need. The parameters keep their names, and inner modules are
called, so that quantised, adapted, hooked and offloaded ones do what they do in Hugging Face's own model.
There is one exception: a kernel reads the weight of conv1d, and applies SiLU, where conv1d and the activation
are still the plain modules and nobody has hooked, changed or looked into them.

Differences from Hugging Face 5, all of them on purpose:

* a cached state is used when several new tokens arrive at once (Hugging Face starts again from zero);
* padding neither decays the state nor enters the convolution's state, on either side;
* accumulation is in float32 or better: a float64 model computes in float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..scan import causal_conv, convolution, gated_scan
from ..scan.record import note, recording
from ..scan.reference import accumulation_dtype
from ..tracing import Visit
from .discretisation import Discretisation
from .offers import Offers
from .past import PastStates, masked, seen_by
from .run_report import LayerRun, RunReport
from .stretches import Stretches


def recorded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mixer's forward, which takes note in the model's report of what it runs."""

    @functools.wraps(forward)
    def wrapper(self: HookableMixer, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.last_run = self.report.begin(self.layer_idx, hidden_states.shape[1], Visit(self).trace)
        with recording(self.last_run.calls):
            return forward(self, hidden_states, *args, **kwargs)

    return wrapper


class HookableMixer(nn.Module):
    """Mixin over Hugging Face's mixer, which has the attributes up to ``D``."""

    layer_idx: int
    intermediate_size: int  # E
    ssm_state_size: int  # N
    time_step_rank: int  # R
    conv_kernel_size: int  # K
    activation: str
    act: nn.Module
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    kernels: str = "auto"
    report: RunReport  # the model's: its mixers share it
    last_run: LayerRun

    @recorded
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        past = PastStates(self, cache, attention_mask, hidden_states)
        offer = Offers(self, "mixer", past.mask)
        fused = self.in_proj(offer.into("in_proj", hidden_states))  # [B,L,2E]
        x_in, skip = fused.split(self.intermediate_size, dim=-1)  # [B,L,E] each
        skip = offer("skip", skip)
        # Masked after in_proj, which may have a bias of its own or an adapter's.
        x_in = offer("x_in", masked(x_in, past.mask))
        x = self.convolve(offer, x_in, past)
        x = offer("ssm_input", masked(x, past.mask))  # [B,L,E]
        gated, h = self.scan(offer, x, skip, past)  # [B,L,E], [B,E,N]
        past.keep(h)
        after_skip = offer("after_skip", gated.to(hidden_states.dtype))  # [B,L,E]
        out = self.out_proj(offer.into("out_proj", after_skip))  # [B,L,D]
        offer.close()
        return offer.result(out)

    # -- the convolution -------------------------------------------------------------------------------

    def convolve(self, offer: Offers, x_in: Tensor, past: PastStates) -> Tensor:
        """SiLU of the causal convolution [B,L,E] of ``x_in`` [B,L,E] after the columns of ``past``."""
        x_in, before = past.convolution(x_in)  # [B,L,E], [B,E,K] or None
        backend = self.conv_backend(x_in)
        conv1d, whole = None if backend is None else self.plain_conv1d(offer), False
        if backend is None or conv1d is None:
            conv = self.call_conv1d(offer, x_in, before, past)
            reason = "" if backend is None else "conv1d is wanted, hooked or changed"
        else:
            whole = offer.inside("conv") is None and offer.bypass("act", type(self.act)) is not None
            weight, bias = conv1d.weight[:, 0], conv1d.bias  # [E,K], [E] or None
            conv = causal_conv(x_in, weight, bias, before, activate=whole, backend=backend)
            reason = "" if whole else "conv or its SiLU is wanted or hooked"
        self.last_run.reasons += [reason] if reason else []
        if whole:
            offer.leave_out("conv")
            return conv
        return self.act(offer("conv", conv))

    def plain_conv1d(self, offer: Offers) -> nn.Conv1d | None:
        """conv1d if a kernel may read its weight [E,1,K]: the convolution that the configuration says."""
        K, E = self.conv_kernel_size, self.intermediate_size
        plain = {"kernel_size": (K,), "padding": (K - 1,), "stride": (1,), "dilation": (1,), "groups": E}
        return offer.bypass("conv1d", nn.Conv1d, padding_mode="zeros", **plain)

    def conv_backend(self, x_in: Tensor) -> ModuleType | None:
        """What can convolve ``x_in`` and apply SiLU faster than PyTorch, or ``None``."""
        if isinstance(x_in, FakeTensor) or x_in.numel() == 0 or self.activation not in ("silu", "swish"):
            return None
        return convolution(self.kernels, x_in.device, x_in.dtype, self.conv_kernel_size)

    def call_conv1d(self, offer: Offers, x_in: Tensor, before: Tensor | None, past: PastStates) -> Tensor:
        """The convolution [B,L,E] by a call of its module. An edit of the module's input is cached."""
        note("causal_conv", "PyTorch", x_in.shape[1])
        columns = rearrange(x_in, "b l e -> b e l")
        length, context = x_in.shape[1], 0
        if before is not None:
            context = before.shape[-1]
            columns = torch.cat((before.to(columns.dtype), columns), dim=-1)
        wanted = offer.first_wanted("conv1d") is not None
        looked_at: Any = seen_by(self.conv1d, past.mask, context) if wanted else contextlib.nullcontext([])
        with looked_at as seen:
            # The module pads both ends; what lies past the last token is cut off.
            columns = self.conv1d(offer.into("conv1d", columns))[..., context : context + length]  # [B,E,L]
        if seen:
            past.keep_columns(seen[0])
        return rearrange(columns, "b e l -> b l e").contiguous()

    # -- the scan --------------------------------------------------------------------------------------

    def scan(self, offer: Offers, x: Tensor, skip: Tensor, past: PastStates) -> tuple[Tensor, Tensor]:
        """The gated output of the SSM [B,L,E] and its last state [B,E,N], in as few kernels as will do."""
        h = self.initial_state(offer, x, past)  # [B,E,N] or None
        delta_1, B, C = self.selective_parameters(offer, x)
        delta_1 = offer("delta_1", delta_1)  # [B,L,R]
        # The only reference to delta_2 [B,L,E], which is given up where delta takes its place.
        parameters = Discretisation(
            x, offer("delta_2", self.dt_proj(offer.into("dt_proj", delta_1))), past.mask, self.A_log, B, C
        )
        parameters.offer(offer)
        wanted = offer.inside("scan", "states")
        if wanted is None:
            offer.leave_out("scan", "states")
            steps, A, B, C = parameters.before_softplus(), parameters.A, parameters.B, parameters.C
            return gated_scan(x, steps, A, B, C, self.D, skip, h, kernels=self.kernels)
        edited = ", and A_bar, B_bar or write edited" if parameters.edited else ""
        self.last_run.reasons.append(f"{wanted} is wanted{edited}")
        pieces, h = Stretches(offer, parameters.recurrence(self.kernels), h).run()  # [B,l,E], [B,E,N]
        del parameters  # and with it delta, which makes room for what follows
        ssm_output = offer("ssm_output", self.with_D(offer("y", joined(pieces)), x))  # [B,L,E]
        return F.silu(skip.to(ssm_output.dtype)).mul_(ssm_output), h

    def with_D(self, y: Tensor, x: Tensor) -> Tensor:
        """y + D x [B,L,E]."""
        return torch.addcmul(y, x.to(y.dtype), self.D.to(y.dtype))

    def initial_state(self, offer: Offers, x: Tensor, past: PastStates) -> Tensor | None:
        """The state before the first position [B,E,N], or ``None`` for zeros that nobody wants."""
        h = past.state()
        if not offer.wants("h_start"):
            offer.pass_over("h_start")
            return h
        if h is None:
            h = x.new_zeros(x.shape[0], x.shape[2], self.ssm_state_size, dtype=accumulation_dtype(x))
        if x.requires_grad or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            h.requires_grad_()  # so that its gradient can be asked for
        return offer("h_start", h)

    def selective_parameters(self, offer: Offers, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_proj, split: delta_1 [B,L,R], B [B,L,N] and C [B,L,N]."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        looked_at = offer.first_wanted("x_proj") is not None
        projected = self.x_proj(offer.into("x_proj", x))  # [B,L,R+2N]
        delta_1, B, C = (masked(projected, offer.mask) if looked_at else projected).split(sizes, dim=-1)
        return delta_1, B, C


def joined(pieces: list[Tensor]) -> Tensor:
    """The outputs of all stretches [B,L,E]. The list is emptied, so that they are in memory once."""
    whole = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
    pieces.clear()
    return whole
