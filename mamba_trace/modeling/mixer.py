"""Hugging Face's mixer made hookable: the state space layer, with every value a site.

`HookableMixer` is what the mixers of both families share; `selective` and `dual` complete it. The forward is
the table of `sites` written out. Where nothing inside is wanted, no site is called and no
value is made that the plain computation does not need. The parameters keep their names, and inner modules that are
quantised, adapted, hooked, offloaded or looked into are called, so that they do what they do in Hugging Face's own
model. Of those that are still the plain modules a kernel may read the weight; and a mixer that nobody looks into need
not run its forward at all (`unwatched`).

Differences from Hugging Face 5, all of them on purpose:

* a cached state is used when several new tokens arrive at once (Hugging Face starts again from zero);
* padding neither decays the state nor enters the convolution's state, on either side;
* accumulation is in float32 or better: a float64 model computes in float64.
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import SiteValueError
from ..scan import ScanFamily, causal_conv, convolution
from ..scan.record import note, recording
from ..scan.reference import accumulation_dtype
from ..sites import Family
from ..tracing import Visit, is_itself
from .discretisation import Discretisation
from .offers import Offers
from .past import PastStates, masked, seen_by
from .repeated import SILU
from .run_report import LayerRun, RunReport
from .starting import columns_read
from .stretches import Starts, Stretches
from .unwatched import unwatched


def recorded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mixer's forward, run where somebody may look into it. The model's report takes note of what the mixer runs."""

    @functools.wraps(forward)
    def wrapper(
        self: HookableMixer, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        visit = Visit(self)
        run = self.begin(visit, hidden_states.shape[1])
        if (out := unwatched(self, visit, run, hidden_states, cache, attention_mask)) is not None:
            return out
        with recording(run.calls, run.reasons):
            return forward(self, hidden_states, cache, attention_mask, **kwargs)

    return wrapper


class HookableMixer(nn.Module):
    """Mixin over Hugging Face's mixer, which has the attributes up to ``D``.

    Attributes:
        family: how its state moves.
        lacks: the names of sites of the family that it lacks.
        norm_first: whether its own norm comes before its gate.
        own_axes: the axes of its sites where they are not those of the family.
        scans: the scans of that family.
        columns_in, columns_out: the sites of the parts of the convolution's channels, before and after it.
        kernels: which scan it runs.
        report: where it takes note of what it runs: the model's, which its mixers share.
        last_run: what it ran in its last call.
    """

    layer_idx: Any
    intermediate_size: int  # E
    ssm_state_size: Any  # N; Hugging Face's classes declare these numbers differently
    conv_kernel_size: Any  # K
    act: Any
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    scope = "mixer"
    family: Family
    lacks: tuple[str, ...] = ()
    norm_first = False
    own_axes: ClassVar[dict[str, str]] = {}
    scans: ScanFamily
    columns_in: tuple[str, ...]
    columns_out: tuple[str, ...]
    kernels: str = "auto"
    report: RunReport
    last_run: LayerRun

    def begin(self, visit: Visit, length: int) -> LayerRun:
        """Take note that a call begins, of some ``length``."""
        run = self.report.begin(self.layer_idx, length, visit.trace)
        self.__dict__["last_run"] = run  # PyTorch's setter would look for parameters and modules of that name
        return run

    # -- what a family brings --------------------------------------------------------------------------

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter that the mixer fixes, and K, the width of the convolution."""

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """The axes of a state behind the batch."""

    @abstractmethod
    def divided(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """in_proj's output [B,L,...] as the gate [B,L,E], the convolution's columns [B,L,channels], and delta_1
        where it is a part of it."""

    @abstractmethod
    def split(self, columns: Tensor) -> Sequence[Tensor]:
        """The parts of the convolution's columns [B,L,channels], x [B,L,E] first."""

    @abstractmethod
    def discretisation(
        self, offer: Offers, x: Tensor, delta_1: Tensor | None, others: Sequence[Tensor]
    ) -> Discretisation:
        """The parameters of the scan. Offers delta_1 and delta_2.

        Args:
            offer: of the running call.
            x: the input of the SSM [B,L,E].
            delta_1: as `divided` gives it.
            others: the parts of the convolution's output behind x.
        """

    def by_head(self, value: Tensor) -> Tensor:
        """Channels [...,E] as the scans of the family take them."""
        return value

    def by_channel(self, value: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        return value

    def D_of_scans(self) -> Tensor:
        """D as the scans of the family take it."""
        return self.D

    def D_of_channels(self) -> Tensor:
        """D [E]."""
        return self.D_of_scans()

    def to_cache(self, h: Tensor | None) -> Tensor | None:
        """A state as Hugging Face's cache has it."""
        return h

    def from_cache(self, h: Tensor | None) -> Tensor | None:
        """The inverse of `to_cache`."""
        return h

    def entered(self, hidden_states: Tensor) -> Tensor:
        """The input of in_proj [B,L,D]."""
        return hidden_states

    def finished(self, offer: Offers, output: Tensor, skip: Tensor) -> Tensor:
        """The input of out_proj [B,L,E], of what `scan` returned and of the gate."""
        return offer("after_skip", output)

    # -- the forward -----------------------------------------------------------------------------------

    @recorded
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        past = PastStates(self, cache, attention_mask, hidden_states)
        offer = Offers(self, past.mask)
        skip, columns, delta_1 = self.divided(self.in_proj(offer.into("in_proj", self.entered(hidden_states))))
        skip = offer("skip", skip)
        # Masked after in_proj, which may have a bias of its own or an adapter's.
        columns = self.offered(offer, self.columns_in, masked(columns, past.mask))
        x, *others = self.split(masked(self.convolve(offer, columns, past), past.mask))
        x = offer("ssm_input", x)  # [B,L,E]
        h = self.initial_state(offer, x, past)
        output, h = self.scan(offer, x, skip, h, self.discretisation(offer, x, delta_1, others))
        past.keep(self.to_cache(h))
        output, skip = (columns_read(past.fixed, value, self.layer_idx) for value in (output, skip))
        return self.left(offer, output.to(hidden_states.dtype), skip)

    def left(self, offer: Offers, output: Tensor, skip: Tensor) -> Tensor:
        """What the mixer returns [B,L,D], of what `scan` returned [B,L,E] and of the gate."""
        out = self.out_proj(offer.into("out_proj", self.finished(offer, output, skip)))
        offer.close()
        return offer.result(out)

    def offered(self, offer: Offers, names: tuple[str, ...], columns: Tensor) -> Tensor:
        """Offer the parts of the convolution's columns [B,L,channels], each at the site that ``names`` it."""
        if not offer.open:
            return columns
        parts = self.split(columns)
        served = [offer(name, part) for name, part in zip(names, parts, strict=True)]
        if all(part is given for part, given in zip(served, parts, strict=True)):
            return columns
        return served[0] if len(served) == 1 else torch.cat([part.flatten(2) for part in served], dim=-1)

    # -- the convolution -------------------------------------------------------------------------------

    def convolve(self, offer: Offers, x_in: Tensor, past: PastStates) -> Tensor:
        """SiLU of the causal convolution of the columns ``x_in`` [B,L,channels] after those of ``past``."""
        backend = self.conv_backend(x_in)
        conv1d, whole = None if backend is None else self.plain_conv1d(offer), False
        if backend is None or conv1d is None:
            conv = past.in_runs(functools.partial(self.call_conv1d, offer), x_in)
            reason = "" if backend is None else "conv1d is wanted, hooked or changed"
        else:
            silu = type(self.act) in SILU and offer.inside("conv") is None
            whole = silu and offer.bypass("act", type(self.act)) is not None
            weight, bias = conv1d.weight[:, 0], conv1d.bias  # [channels,K], [channels] or None
            x_in, before = past.convolution(x_in)  # [B,L,channels], [B,channels,K] or None
            conv = causal_conv(x_in, weight, bias, before, activate=whole, backend=backend, runs=past.runs)
            reason = "" if whole else "conv or its SiLU is wanted or hooked"
        self.last_run.reasons += [reason] if reason else []
        if whole:
            offer.leave_out("conv")
            return conv
        return self.act(self.offered(offer, self.columns_out, conv))

    def plain_conv1d(self, offer: Offers) -> nn.Conv1d | None:
        """conv1d if a kernel may read its weight [channels,1,K]."""
        return offer.bypass("conv1d", nn.Conv1d) if self.has_plain_conv1d() else None

    def has_plain_conv1d(self) -> bool:
        """Whether conv1d is the convolution that the configuration says, and nobody has changed or hooked it."""
        K = self.conv_kernel_size
        conv1d: Any = self._modules["conv1d"]
        if not is_itself(conv1d, nn.Conv1d):  # an adapter has none of the attributes
            return False
        own = (conv1d.kernel_size, conv1d.padding, conv1d.stride, conv1d.dilation, conv1d.groups, conv1d.padding_mode)
        return own == ((K,), (K - 1,), (1,), (1,), self.n_channels, "zeros")

    def conv_backend(self, x_in: Tensor) -> ModuleType | None:
        """What can convolve ``x_in`` faster than PyTorch, or ``None``."""
        if isinstance(x_in, FakeTensor) or x_in.numel() == 0:
            return None
        return convolution(self.kernels, x_in.device, x_in.dtype, self.conv_kernel_size)

    def call_conv1d(self, offer: Offers, past: PastStates, x_in: Tensor) -> Tensor:
        """The convolution [B,L,channels] by a call of its module. An edit of the module's input is cached."""
        x_in, before = past.convolution(x_in)  # [B,L,channels], [B,channels,K] or None
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
            columns = self.conv1d(offer.into("conv1d", columns))[..., context : context + length]  # [B,channels,L]
        if columns.shape[-1] != length:
            raise SiteValueError(
                f"layers[{self.layer_idx}].ssm.conv1d returned {columns.shape[-1] + context} columns for the "
                f"{length + context} that it was given, and the mixer needs one for each: like Hugging Face's, it "
                f"pads both ends by its width less one, padding={self.conv_kernel_size - 1}"
            )
        if seen:
            past.keep_columns(seen[0])
        return rearrange(columns, "b e l -> b l e").contiguous()

    # -- the scan --------------------------------------------------------------------------------------

    def scan(
        self, offer: Offers, x: Tensor, skip: Tensor, h: Tensor | Starts | None, parameters: Discretisation
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the SSM [B,L,E], gated if no norm comes before the gate, and its last state [B,...,N].

        It takes as few kernels as will do. No state is returned where the rows are several runs.
        """
        parameters.offer(offer)
        wanted = offer.inside("scan", "states")
        if wanted is None and not self.norm_first:
            offer.leave_out("scan", "states")
            return self.fused(x, skip, h, parameters)
        edited = ", and A_bar, B_bar or write edited" if parameters.edited else ""
        reason = f"{wanted} is wanted{edited}" if wanted else "a norm comes before the gate"
        self.last_run.reasons.append(reason)
        recurrence = parameters.recurrence(self.kernels)
        if isinstance(h, Starts):
            pieces, h = h.run(recurrence), None
        else:
            pieces, h = Stretches(offer, recurrence, h).run()
        del parameters, recurrence  # and with them delta, which makes room for what follows
        return self.read_out(offer, pieces, x, skip), h

    def read_out(self, offer: Offers, pieces: list[Tensor], x: Tensor, skip: Tensor) -> Tensor:
        """`scan`'s output of the outputs of all stretches, of which the list is emptied."""
        # y has no name here, so that it is given up where ssm_output is made of it.
        ssm_output = offer("ssm_output", self.with_D(offer("y", self.by_channel(joined(pieces))), x))  # [B,L,E]
        return ssm_output if self.norm_first else F.silu(skip.to(ssm_output.dtype)).mul_(ssm_output)

    def fused(
        self, x: Tensor, skip: Tensor, h: Tensor | Starts | None, parameters: Discretisation
    ) -> tuple[Tensor, Tensor | None]:
        """`scan` in one kernel."""
        steps, A, B, C, D = parameters.steps(), parameters.A, parameters.B, parameters.C, self.D_of_scans()
        x, skip = self.by_head(x), self.by_head(skip)
        if isinstance(h, Starts):
            gated = self.scans.gated_runs(x, steps, A, B, C, D, skip, h.states, h.runs, kernels=self.kernels)
            return self.by_channel(gated), None
        gated, h = self.scans.gated_scan(x, steps, A, B, C, D, skip, h, kernels=self.kernels)
        return self.by_channel(gated), h

    def with_D(self, y: Tensor, x: Tensor) -> Tensor:
        """y + D x [B,L,E]."""
        return torch.addcmul(y, x.to(y.dtype), self.D_of_channels().to(y.dtype))

    def initial_state(self, offer: Offers, x: Tensor, past: PastStates) -> Tensor | Starts | None:
        """The state before the first position [B,...,N], or ``None`` for zeros that nobody wants.

        Where the rows are several runs, those before each of them.
        """
        h = self.from_cache(past.state())
        if not offer.wants("h_start"):
            offer.pass_over("h_start")
            return h if past.runs is None or h is None else Starts(h, past.runs)
        if h is None:
            h = x.new_zeros(x.shape[0], *self.state_shape, dtype=accumulation_dtype(x))
        if x.requires_grad or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            h.requires_grad_()  # so that its gradient can be asked for
        return offer("h_start", h)

    @property
    def n_channels(self) -> int:
        """How many channels the convolution has."""
        return self.intermediate_size


def joined(pieces: list[Tensor]) -> Tensor:
    """The outputs of all stretches [B,L,...]. The list is emptied, so that they are in memory once."""
    whole = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
    pieces.clear()
    return whole
