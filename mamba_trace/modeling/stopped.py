"""A long prompt in a mixer of which single states alone are wanted, ``h[p]``.

It goes through the prompt in the stretches of an unwatched mixer. Only those in which somebody wants a state run the
bare scan, stopped there. Where one who was handed a state then asks for what comes after it in this mixer, such as y,
which the other stretches never made, the mixer runs once more, all positions at once, with the same states.
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


class Stopped:
    """What `Anew` is to an unwatched call, to one of which some states are wanted.

    Args:
        past: what came before the call, and what its stretches hand on.
        visit: of the running trace.
        nobody: stands for the offers of the call.
        total: how many positions the call has.
        run: takes note of the kernels.

    Attributes:
        start: where the next stretch begins.
        reached: the first position whose state was neither handed out nor passed by.
        edited: the positions whose state was edited, and that state.
        offer: the sites from the state on.
    """

    def __init__(self, past: Anew, visit: Visit, nobody: Any, total: int, run: LayerRun) -> None:
        self.past, self.visit, self.nobody, self.total, self.run = past, visit, nobody, total, run
        self.mixer = past.mixer
        self.start = self.reached = 0
        self.edited: list[tuple[int, Tensor]] = []
        self.offer = Offers(self.mixer)
        past.remember()

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `Anew.convolved`."""
        return self.past.convolved(columns, weight, bias)

    def scanned(self, x: Tensor, skip: Tensor, discretise: Callable[[], Discretisation]) -> Tensor:
        """As `Anew.scanned`, stopped where a state is wanted.

        Raises:
            MoreIsWanted: if more of the mixer is wanted.
        """
        parameters = [discretise()].pop  # gives the only reference away, so that delta goes when y is there
        length = x.shape[1]
        if self.start == 0:
            self._pass_over_the_first()
        self.reached = self.start
        at = self.visit.next_position(STATE, self.start, self.total)
        if at is not None and at < self.start + length:
            gated = self._stopped(x, skip, self._stretches(parameters(), first=self.start, total=self.total))
        else:
            if at is None:  # who was refused a position, and goes on all the same, may want another place
                self._refuse_more()
            self._note("gated_scan", length)
            gated = self.past.scanned(x, skip, parameters)
        self.start += length
        return gated

    def _pass_over_the_first(self) -> None:
        # All that has run before a state is handed out: who has that in hand comes too late for these.
        names = self.mixer.__dict__[SITE_NAMES]
        self.offer.pass_over(*self.nobody.passed_by, *names[: names.index(STATE)])

    def _refuse_more(self) -> None:
        if not self.visit.positions_alone(STATE, self.mixer.__dict__[SITE_HOOKS]):
            raise MoreIsWanted

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
        self.reached = self.start + stretches.start
        self._refuse_more()
        pieces, state = stretches.finish()
        self.past.arrived(state)
        del stretches
        gated: Tensor = self.mixer.read_out(self.nobody, pieces, x, skip)
        return gated

    def _stretches(self, parameters: Discretisation, **where: Any) -> Stretches:
        parameters.A = parameters.make_A()
        return Stretches(self.offer, parameters.recurrence(self.mixer.kernels), self.past.state, **where)

    def ended(self) -> None:
        """As `Anew.ended`."""
        self.past.ended()
        self.offer.pass_over(*(name for name in self.nobody.passed_by if name not in self.offer.done))
        self.offer.close()

    def whole(self, hidden_states: Tensor) -> Tensor:
        """What the mixer returns [B,L,D], run once more behind the states that were handed out, with all that is left.

        Args:
            hidden_states: its input [B,L,D].
        """
        self.past.undo()
        self.run.calls.append(Call("conv_silu", "cpu", self.total))
        skip, x, discretise = self.nobody.before_scan(hidden_states, self)
        stretches = self._stretches(discretise())
        stretches.edit_again(self.edited)
        if stretches.start < self.reached:
            stretches.run_on(self.reached)
        pieces, state = stretches.run()
        del stretches
        out: Tensor = self.mixer.left(self.offer, self.mixer.read_out(self.offer, pieces, x, skip), skip)
        self.past.arrived(state)
        self.past.ended()
        return out
