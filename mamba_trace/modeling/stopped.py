"""A long prompt in a mixer of which single states alone are wanted, ``h[p]``.

It goes through the prompt in the stretches of an unwatched mixer. Only those in which somebody wants a state run the
bare scan, stopped there. Where one who was handed a state then asks for more of this mixer, such as y, which the other
stretches never made, the mixer runs once more, all positions at once, with the same states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..scan.record import Call
from ..sites import STATE
from ..tracing import Visit
from .carried import Anew
from .discretisation import Discretisation
from .offers import SITE_HOOKS, SITE_NAMES, Offers
from .run_report import LayerRun
from .stretches import Stretches


class MoreIsWanted(Exception):
    """Somebody wants more of a mixer than single states."""


class Stopped(Anew):
    """What a call in stretches hands on, where some of its states are wanted.

    Args:
        past: what came before the call.
        mixer: whose call it is.
        visit: of the running trace.
        nobody: stands for the offers of the call.
        total: how many positions the call has.
        run: takes note of the kernels.
    """

    def __init__(self, past: Anew, mixer: Any, visit: Visit, nobody: Any, total: int, run: LayerRun) -> None:
        self.past, self.mixer, self.visit, self.nobody, self.total, self.run = past, mixer, visit, nobody, total, run
        self.saved = [None if own is None else own.clone() for own in (past.columns, past.state)], past.begun
        self.start = 0  # the next position
        self.edited: list[tuple[int, Tensor]] = []
        names = mixer.__dict__[SITE_NAMES]
        self.early = names[: names.index(STATE)]
        self.offer = Offers(mixer)

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.past.convolved(columns, weight, bias)

    def scanned(self, mixer: Any, x: Tensor, skip: Tensor, discretise: Callable[[], Discretisation]) -> Tensor:
        if not self.start:  # nobody can ask for these any more, now that a state may be handed out
            self.offer.pass_over(*self.nobody.passed_by, *self.early)
        length = x.shape[1]
        at = self.visit.next_position(STATE, self.start, self.total)
        if at is None or at >= self.start + length:
            self._note("gated_scan", length)
            gated = self.past.scanned(mixer, x, skip, discretise)
        else:
            gated = self._stopped(x, skip, self._stretches(discretise(), first=self.start, total=self.total))
        self.start += length
        return gated

    def _note(self, function: str, length: int) -> None:
        # Stretches in a row are noted as one call.
        last = self.run.calls[-1]
        if last.function == function:
            self.run.calls[-1] = Call(function, "cpu", last.positions + length)
        else:
            self.run.calls.append(Call(function, "cpu", length))

    def _stopped(self, x: Tensor, skip: Tensor, stretches: Stretches) -> Tensor:
        stretches.serve_positions()
        self.edited += stretches.edited
        if not self.visit.positions_alone(STATE, self.mixer.__dict__[SITE_HOOKS]):
            self.start += stretches.start
            raise MoreIsWanted
        pieces, state = stretches.finish()
        self.past.arrived(state)
        del stretches  # and with them delta, which makes room for what follows
        gated: Tensor = self.mixer.read_out(self.nobody, pieces, x, skip)
        return gated

    def _stretches(self, parameters: Discretisation, **where: Any) -> Stretches:
        parameters.A = parameters.make_A()
        return Stretches(self.offer, parameters.recurrence(self.mixer.kernels), self.past.state, **where)

    def ended(self, mixer: Any) -> None:
        self.past.ended(mixer)
        self.offer.pass_over(*(name for name in self.nobody.passed_by if name not in self.offer.done))
        self.offer.close()

    # -- once more -------------------------------------------------------------------------------------

    def whole(self, hidden_states: Tensor) -> Tensor:
        """What the mixer returns [B,L,D] where more is wanted of it, after the states that were handed out."""
        self._return()
        mixer, reached = self.mixer, self.start
        skip, x, discretise = self.nobody.before_scan(hidden_states, self)
        stretches = self._stretches(discretise())
        stretches.edit_again(self.edited)
        stretches.run_on(reached)
        pieces, state = stretches.run()
        self.past.arrived(state)
        self.past.ended(mixer)
        del stretches
        out: Tensor = mixer.left(self.offer, mixer.read_out(self.offer, pieces, x, skip), skip)
        return out

    def _return(self) -> None:
        # To what came before the call.
        (columns, state), self.past.begun = self.saved
        for name, value in (("columns", columns), ("state", state)):
            own = getattr(self.past, name)
            if value is None or own is None:
                setattr(self.past, name, value)
            else:
                own.copy_(value)
