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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .demand import Visit, version
from .offers import Offers
from .past import PastStates, masked
from .scan import Explicit, Recurrence, Selective, Watched
from .scan.reference import accumulation_dtype
from .sites import STATE


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


class HookableMixer:
    """Mixin over Hugging Face's mixer: the selective state space layer, site by site."""

    kernels = "auto"

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        offer = Offers(self, "mixer")
        length = hidden_states.shape[1]
        # A mask may cover the cached tokens too; this call's are the last ones.
        mask = None if attention_mask is None else attention_mask[:, -length:]  # [B,L]
        past = PastStates(self, cache)

        fused = self.in_proj(offer.into("in_proj", hidden_states))  # [B,L,2E]
        x_in, skip = fused.split(self.intermediate_size, dim=-1)  # [B,L,E] each
        skip = offer("skip", skip)
        # After in_proj, which may have a bias of its own or an adapter's.
        x_in = offer("x_in", masked(x_in, mask))
        conv = offer("conv", self.convolve(offer, x_in, past.convolution(x_in, mask)))  # [B,L,E]
        x = offer("ssm_input", masked(self.act(conv), mask))  # [B,L,E]

        recurrence, h = self.discretise(offer, x, mask, past)
        y, h = self.recur(offer, recurrence, h, mask)  # [B,L,E], [B,E,N]
        past.keep(h)

        y = offer("y", y)  # [B,L,E]
        ssm_output = offer("ssm_output", y + x * self.D.to(y.dtype))  # [B,L,E]
        gated = ssm_output * F.silu(skip.to(y.dtype))
        after_skip = offer("after_skip", gated.to(hidden_states.dtype))  # [B,L,E]
        out = self.out_proj(offer.into("out_proj", after_skip))  # [B,L,D]
        offer.close()
        return offer.result(out)

    def convolve(self: Any, offer: Offers, x_in: Tensor, before: Tensor | None) -> Tensor:
        """The causal convolution [B,L,E] of ``x_in`` [B,L,E] after the columns ``before`` [B,E,K]."""
        columns = x_in.transpose(1, 2)  # [B,E,L]
        length, context = columns.shape[-1], 0
        if before is not None:
            context = before.shape[-1]
            columns = torch.cat((before.to(columns.dtype), columns), dim=-1)
        # The module pads both ends; what lies past the last token is cut off.
        columns = self.conv1d(offer.into("conv1d", columns))[..., context : context + length]  # [B,E,L]
        return columns.transpose(1, 2).contiguous()

    def selective_parameters(self: Any, offer: Offers, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_proj, split: delta_1 [B,L,R], B [B,L,N] and C [B,L,N]."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        return self.x_proj(offer.into("x_proj", x)).split(sizes, dim=-1)

    def discretise(
        self: Any, offer: Offers, x: Tensor, mask: Tensor | None, past: PastStates
    ) -> tuple[Recurrence, Tensor]:
        """Offer h_start to C; return the recurrence they define and the initial state [B,E,N]."""
        h = past.state(x)  # [B,E,N]
        if offer.wants("h_start") and x.requires_grad:
            h.requires_grad_()  # so that its gradient can be asked for
        h = offer("h_start", h)
        delta_1, B, C = self.selective_parameters(offer, x)
        delta_1 = offer("delta_1", delta_1)  # [B,L,R]
        delta_2 = offer("delta_2", self.dt_proj(offer.into("dt_proj", delta_1)))  # [B,L,E]
        # Padding takes no time: a step of 0 neither decays the state nor writes to it.
        delta = offer("delta", masked(F.softplus(delta_2), mask))  # [B,L,E]
        A = offer("A", -torch.exp(self.A_log.to(accumulation_dtype(self.A_log))))  # [E,N]
        A_bar, A_bar_edited = offer.optional("A_bar", lambda: discrete_A(delta, A))  # [B,L,E,N]
        B = offer("B", B)  # [B,L,N]
        B_bar, B_bar_edited = offer.optional("B_bar", lambda: discrete_B(delta, B, A.dtype))  # [B,L,E,N]
        C = offer("C", C)  # [B,L,N]
        edited = A_bar_edited or B_bar_edited
        handed_out = A_bar is not None or B_bar is not None
        if not edited and not (handed_out and torch.is_grad_enabled() and delta.requires_grad):
            return Selective(x, C, delta, A, B, kernels=self.kernels), h
        A_bar = discrete_A(delta, A) if A_bar is None else A_bar
        B_bar = discrete_B(delta, B, A.dtype) if B_bar is None else B_bar
        if edited:
            return Explicit(x, C, A_bar, B_bar), h
        return Watched(x, C, delta, A, B, A_bar, B_bar, kernels=self.kernels), h

    def recur(
        self, offer: Offers, recurrence: Recurrence, h: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence from state ``h``, stopping where a state is wanted: ``(y [B,L,E], h_last)``."""
        length = recurrence.x.shape[1]
        done: list[Stretch] = []
        start = 0
        with offer.visit.positions(STATE):
            while offer.open and (at := offer.visit.next_position(STATE, start, length, mask)) is not None:
                done.append(self.run_to(at, offer, recurrence, start, h))
                start, h = at + 1, done[-1].after
            if offer.wants(STATE):
                offer.visit.stand_at(STATE, length, length)
                return self.serve_states(offer, recurrence, done, start, h)
            offer.pass_over(STATE)
        if start < length or not done:
            y, h = recurrence.run(start, length, h)
            done.append(Stretch(start, length, h, y, h))
        return torch.cat([stretch.y for stretch in done], dim=1) if len(done) > 1 else done[0].y, h

    def run_to(self, at: int, offer: Offers, recurrence: Recurrence, start: int, h: Tensor) -> Stretch:
        """Run from ``start`` to position ``at``, offer the state there, and read y from what came back."""
        y, reached = recurrence.run(start, at + 1, h)
        # A copy, since the backward pass of y reads the original, which an edit in place must not touch.
        reached = reached.clone(memory_format=torch.contiguous_format)
        before = version(reached)
        after = offer.visit.serve_position(STATE, at, recurrence.x.shape[1], reached)
        if touched(reached, before, after):
            y = torch.cat((y[:, :-1], recurrence.read(after, at)[:, None]), dim=1)
        return Stretch(start, at + 1, h, y, after)

    def serve_states(
        self, offer: Offers, recurrence: Recurrence, done: list[Stretch], start: int, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the rest from ``start``, offer the trajectory, and read y and h_last from what came back."""
        parts = [*(stretch.states(recurrence) for stretch in done)]
        parts.append(recurrence.states(start, recurrence.x.shape[1], h))
        y, states = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
        before = version(states)
        served = offer(STATE, states)  # [B,L,E,N]
        return recurrence.read(served) if touched(states, before, served) else y, served[:, -1]


@dataclass
class Stretch:
    """Positions run in one go.

    Attributes:
        start, stop: the positions ``start`` to ``stop - 1``.
        before: the state before them [B,E,N].
        y: their outputs [B,l,E].
        after: the state handed on after the last of them, edited or not [B,E,N].
    """

    start: int
    stop: int
    before: Tensor
    y: Tensor
    after: Tensor

    def states(self, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        """y [B,l,E] and the state after each position [B,l,E,N], an edit of the last one included."""
        _, states = recurrence.states(self.start, self.stop - 1, self.before)
        return self.y, torch.cat((states, self.after[:, None]), dim=1)


def touched(handed_out: Tensor, before: int | None, served: Tensor) -> bool:
    """Whether what follows must be computed from ``served``: it was edited, or its gradient is kept."""
    return served is not handed_out or before is None or version(served) != before or served.requires_grad


def discrete_A(delta: Tensor, A: Tensor) -> Tensor:
    """exp(delta A): delta [B,L,E], A [E,N] or [B,E,N] -> [B,L,E,N]."""
    A_bar = torch.exp(delta.to(A.dtype)[..., None] * (A[:, None] if A.dim() == 3 else A))
    # The backward pass of exp reads its result, which an edit in place must not touch.
    return A_bar.clone() if A_bar.requires_grad else A_bar


def discrete_B(delta: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """delta B: delta [B,L,E], B [B,L,N] -> [B,L,E,N]."""
    return delta.to(dtype)[..., None] * B.to(dtype)[:, :, None, :]
