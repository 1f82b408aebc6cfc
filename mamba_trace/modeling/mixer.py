"""Hugging Face's Mamba, made hookable: the same computation in the same parameters, every value a site.

`make_hookable` changes the class of a model's blocks and mixers in place and gives them one parameterless
`SiteModule` for each site that no module of Hugging Face's produces. Nothing else changes: the parameters
keep their names, and `from_pretrained`, `generate`, caches, quantised or adapted inner layers and
`device_map` go on working, because inner modules are always called and never bypassed by reading a weight.

The forward is the table of `sites` written out. Where nothing inside a module is wanted, no site is called
and no value is made that the plain computation does not need.

Differences from Hugging Face 5, all of them on purpose:

* a cached state is used when several new tokens arrive at once (Hugging Face starts again from zero);
* padding neither decays the state nor enters the convolution's state, on either side;
* accumulation is in float32 or better: a float64 model computes in float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..scan import Recurrence, causal_conv, convolution, gated_scan
from ..scan.record import note, recording
from ..scan.reference import accumulation_dtype
from ..sites import STATE
from ..tracing import Visit, take_note_of_mask
from .discretisation import Discretisation
from .offers import Offers, same_contents
from .past import PastStates, kept_at_padding, masked, offered, seen_by
from .run_report import LayerRun, RunReport


class HookableBlock:
    """Mixin over Hugging Face's block: residual stream -> norm -> mixer -> residual stream."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        checkpointing = self.gradient_checkpointing
        # It would run the block again in the backward pass, without the edits of the trace.
        self.gradient_checkpointing = checkpointing and not Visit(self).tracing
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.gradient_checkpointing = checkpointing

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        offer = Offers(self, "block")
        take_note_of_mask(offer.visit.interleaver, attention_mask)
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        layer_input = offer("layer_input", resid)  # [B,L,D]
        normalized = self.norm(offer.into("norm", layer_input.to(self.norm.weight.dtype)))  # [B,L,D]
        if self.residual_in_fp32:
            resid = resid.to(accumulation_dtype(resid))
        out = self.mixer(offer.into("mixer", normalized), cache=cache, attention_mask=attention_mask)
        resid = offer("resid_post", resid + out)  # [B,L,D]
        offer.close()
        return offer.result(resid)


class HookableRMSNorm:
    """Mixin over Hugging Face's RMSNorm, which rounds float64 to float32: this one does not."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(accumulation_dtype(hidden_states))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def recorded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mixer's forward, which takes note in the model's report of what it runs."""

    @functools.wraps(forward)
    def wrapper(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.last_run = self.report.begin(self.layer_idx, hidden_states.shape[1], Visit(self).trace)
        with recording(self.last_run.calls):
            return forward(self, hidden_states, *args, **kwargs)

    return wrapper


class HookableMixer:
    """Mixin over Hugging Face's mixer: the selective state space layer, site by site."""

    kernels = "auto"
    report: RunReport  # of the model: its mixers share it
    last_run: LayerRun

    @recorded
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        offer = Offers(self, "mixer")
        past = PastStates(self, cache)
        mask = past.mask(attention_mask, hidden_states)  # [B,L] or None
        fused = self.in_proj(offer.into("in_proj", hidden_states))  # [B,L,2E]
        x_in, skip = fused.split(self.intermediate_size, dim=-1)  # [B,L,E] each
        skip = offer("skip", skip)
        # After in_proj, which may have a bias of its own or an adapter's.
        x_in = offered(offer, "x_in", masked(x_in, mask), mask)
        x = self.convolve(offer, x_in, past, mask)  # [B,L,E]
        x = offered(offer, "ssm_input", masked(x, mask), mask)  # [B,L,E]
        gated, h = self.scan(offer, x, skip, mask, past)  # [B,L,E], [B,E,N]
        past.keep(h)
        after_skip = offer("after_skip", gated.to(hidden_states.dtype))  # [B,L,E]
        out = self.out_proj(offer.into("out_proj", after_skip))  # [B,L,D]
        offer.close()
        return offer.result(out)

    # -- the convolution -------------------------------------------------------------------------------

    def convolve(self: Any, offer: Offers, x_in: Tensor, past: PastStates, mask: Tensor | None) -> Tensor:
        """SiLU of the causal convolution [B,L,E] of ``x_in`` [B,L,E] after the columns of ``past``."""
        x_in, before = past.convolution(x_in, mask)  # [B,L,E], [B,E,K] or None
        backend = self.conv_backend(x_in)
        conv1d = None if backend is None else offer.bypass("conv1d", nn.Conv1d)
        if backend is None or conv1d is None:
            if backend is not None:
                self.last_run.reasons.append("conv1d is wanted, hooked or changed")
            conv, seen = self.call_convolution(offer, x_in, before, mask)
            if seen is not None:
                past.keep_columns(seen, mask)
            return self.act(offer("conv", conv))
        whole = offer.first_wanted("conv") is None and offer.bypass("act", type(self.act)) is not None
        weight = conv1d.weight[:, 0]  # [E,K]
        conv = causal_conv(x_in, weight, conv1d.bias, before, activate=whole, backend=backend)
        if whole:
            offer.pass_over("conv")
            return conv
        self.last_run.reasons.append("conv or its SiLU is wanted or hooked")
        return self.act(offer("conv", conv))

    def conv_backend(self: Any, x_in: Tensor) -> ModuleType | None:
        """What can convolve ``x_in`` and apply SiLU faster than PyTorch, or ``None``."""
        if isinstance(x_in, FakeTensor) or x_in.numel() == 0 or self.activation not in ("silu", "swish"):
            return None
        return convolution(self.kernels, x_in.device, x_in.dtype, self.conv_kernel_size)

    def call_convolution(
        self: Any, offer: Offers, x_in: Tensor, before: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution [B,L,E] by way of its module, and the columns that it saw where somebody looks."""
        note("causal_conv", "PyTorch", x_in.shape[1])
        columns = x_in.transpose(1, 2)  # [B,E,L]
        length, context = columns.shape[-1], 0
        if before is not None:
            context = before.shape[-1]
            columns = torch.cat((before.to(columns.dtype), columns), dim=-1)
        wanted = offer.first_wanted("conv1d") is not None
        looked_at: Any = seen_by(self.conv1d, mask, context) if wanted else contextlib.nullcontext([])
        with looked_at as seen:
            # The module pads both ends; what lies past the last token is cut off.
            columns = self.conv1d(offer.into("conv1d", columns))[..., context : context + length]  # [B,E,L]
        return columns.transpose(1, 2).contiguous(), seen[0] if seen else None

    # -- the scan --------------------------------------------------------------------------------------

    def scan(
        self: Any, offer: Offers, x: Tensor, skip: Tensor, mask: Tensor | None, past: PastStates
    ) -> tuple[Tensor, Tensor]:
        """The gated output of the SSM [B,L,E] and its last state [B,E,N], in as few kernels as will do."""
        h = self.initial_state(offer, x, past)  # [B,E,N] or None
        delta_1, B, C = self.selective_parameters(offer, x, mask)
        delta_1 = offer("delta_1", delta_1)  # [B,L,R]
        # The only reference to delta_2 [B,L,E], which is given up where delta takes its place.
        parameters = Discretisation(
            x, offer("delta_2", self.dt_proj(offer.into("dt_proj", delta_1))), mask, self.A_log, B, C
        )
        parameters.offer(offer)
        wanted = parameters.seen or offer.first_wanted(STATE, "h_read", "y", "ssm_output")
        if wanted is None:
            offer.pass_over(STATE, "h_read", "y", "ssm_output")
            steps, A, B, C = parameters.before_softplus(), parameters.A, parameters.B, parameters.C
            return gated_scan(x, steps, A, B, C, self.D, skip, h, kernels=self.kernels)
        edited = ", and A_bar, B_bar or write edited" if parameters.edited else ""
        self.last_run.reasons.append(f"{wanted} is wanted{edited}")
        done = self.recur(offer, parameters.recurrence(self.kernels), h, mask)
        del parameters  # and with it delta, which makes room for what follows
        h = done[-1].after  # [B,E,N]
        ssm_output = offer("ssm_output", past_the_state(offer("y", joined(done)), x, self.D))  # [B,L,E]
        return F.silu(skip.to(ssm_output.dtype)).mul_(ssm_output), h

    def initial_state(self: Any, offer: Offers, x: Tensor, past: PastStates) -> Tensor | None:
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

    def selective_parameters(
        self: Any, offer: Offers, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_proj, split: delta_1 [B,L,R], B [B,L,N] and C [B,L,N]."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        looked_at = mask is not None and offer.first_wanted("x_proj") is not None
        projected = self.x_proj(offer.into("x_proj", x))  # [B,L,R+2N]
        return (masked(projected, mask) if looked_at else projected).split(sizes, dim=-1)

    def recur(
        self, offer: Offers, recurrence: Recurrence, h: Tensor | None, mask: Tensor | None
    ) -> list[Stretch]:
        """Run the recurrence from state ``h``, stopping where a state is wanted."""
        length = recurrence.x.shape[1]
        done: list[Stretch] = []
        start = 0
        with offer.visit.positions(STATE):
            while offer.open and (at := offer.visit.next_position(STATE, start, length, mask)) is not None:
                done.append(self.run_to(at, offer, recurrence, start, h, mask))
                start, h = at + 1, done[-1].after
            if offer.wants(STATE) or offer.wants("h_read"):
                offer.visit.stand_at(STATE, length, length)
                return [self.serve_states(offer, recurrence, done, start, h, mask)]
            offer.pass_over(STATE, "h_read")
        if start < length or not done:
            done.append(Stretch(start, length, h, *recurrence.run(start, length, h)))
        return done

    def run_to(
        self,
        at: int,
        offer: Offers,
        recurrence: Recurrence,
        start: int,
        h: Tensor | None,
        mask: Tensor | None,
    ) -> Stretch:
        """Run from ``start`` to position ``at``, offer the state there, and read y from what came back."""
        y, state = recurrence.run(start, at + 1, h)
        # A copy, since the backward pass of y reads the original, which an edit in place must not touch.
        copy = state.clone(memory_format=torch.contiguous_format)
        after = offer.visit.serve_position(STATE, at, recurrence.x.shape[1], copy)
        # What was assigned counts where its contents are the same, too: it may be detached.
        if after is not copy or after.requires_grad or not same_contents(state, after):
            after = kept_at_padding(after, state, mask, at)
            y = torch.cat((y[:, :-1], recurrence.read(after, at)[:, None]), dim=1)
        return Stretch(start, at + 1, h, y, after)

    def serve_states(
        self,
        offer: Offers,
        recurrence: Recurrence,
        done: list[Stretch],
        start: int,
        h: Tensor | None,
        mask: Tensor | None,
    ) -> Stretch:
        """Run the rest from ``start``, offer the trajectory, and read y and h_last from what came back."""
        length = recurrence.x.shape[1]
        parts = [stretch.states(recurrence) for stretch in done]
        if start < length or not done:
            parts.append(recurrence.states(start, length, h))
        y, states = (torch.cat(pieces, dim=1) if done else pieces[0] for pieces in zip(*parts, strict=True))
        last = states[:, -1].clone()  # the whole trajectory is a record: its edits are not carried on
        unedited = (
            recurrence.read(states) if offer.visit.may_edit(STATE) and not states.requires_grad else None
        )
        read = offer("h_read", offer(STATE, states))  # [B,L,E,N]
        if read is not states or read.requires_grad:
            y = recurrence.read(read)
        elif unedited is not None and not same_contents(unedited, edited := recurrence.read(read)):
            y = edited
        return Stretch(0, length, None, y, last)


@dataclass
class Stretch:
    """Positions run in one go.

    Attributes:
        start, stop: the positions ``start`` to ``stop - 1``.
        before: the state before them [B,E,N], or ``None`` for zeros.
        y: their outputs [B,l,E].
        after: the state handed on after the last of them, edited or not [B,E,N].
    """

    start: int
    stop: int
    before: Tensor | None
    y: Tensor
    after: Tensor

    def states(self, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        """y [B,l,E] and the state after each position [B,l,E,N], an edit of the last one included."""
        _, states = recurrence.states(self.start, self.stop - 1, self.before)
        return self.y, torch.cat((states, self.after[:, None]), dim=1)


def joined(done: list[Stretch]) -> Tensor:
    """y of all positions [B,L,E]. The stretches are used up."""
    pieces = [stretch.y for stretch in done]
    done.clear()
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def past_the_state(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """y + D x: y, x [B,L,E], D [E]."""
    return torch.addcmul(y, x.to(y.dtype), D.to(y.dtype))
