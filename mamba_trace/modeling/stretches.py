"""One pass over the positions: the recurrence, run piece by piece and stopped where a state is wanted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..scan import Links, Recurrence
from ..scan.recompute import differentiated, transformed
from ..scan.runs import Runs
from ..sites import STATE
from .offers import Offers, same_contents


@dataclass
class Stretch:
    """The positions ``start`` to ``stop - 1``, of which nobody has changed a state but the last."""

    start: int
    stop: int
    before: Tensor | None  # the state before them [B,...,N], None for zeros
    y: list[Tensor]  # their outputs, in one or several pieces [B,l,...]
    after: Tensor | None = None  # the state after the last of them [B,...,N], where it was changed or has a gradient
    unread: bool = False  # whether y is still to be read from ``after``, for its gradients alone
    ahead: Ahead | None = None  # from which ``after`` is, unedited, where it was run ahead

    def states(self, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        """y [B,l,...] and the state after each position [B,l,...,N], an edit of the last one included."""
        stop = self.stop if self.after is None else self.stop - 1
        _, states = recurrence.states(self.start, stop, self.before)
        after = () if self.after is None else (self.after[:, None],)
        return torch.cat(self.y, dim=1), torch.cat((states, *after), dim=1)


@dataclass(frozen=True)
class Starts:
    """The states that the runs of a call start from, where each row is several.

    Attributes:
        states: of each run, the same in all rows [runs,...,N].
        runs: where they are.
    """

    states: Tensor
    runs: Runs

    def run(self, recurrence: Recurrence) -> list[Tensor]:
        """y [B,l,...] of each run of a recurrence."""
        rows = len(recurrence.x)
        states = (state.expand(rows, *state.shape) for state in self.states)
        pairs = zip(self.runs.spans, states, strict=True)
        return [recurrence.run(span.start, span.stop, state)[0] for span, state in pairs]


@dataclass(frozen=True, eq=False)
class Ahead:
    """Positions that were run in one go, in the hope that the state after each of them will only be read."""

    start: int
    y: Tensor  # their outputs [B,l,...]
    states: Tensor  # the state after each of them [B,l,...,N]
    links: Links | None = None  # how the states depend on each other, where gradients are recorded

    def has(self, position: int) -> bool:
        """Whether a position is one of them."""
        return 0 <= position - self.start < self.y.shape[1]

    def of(self, start: int, count: int) -> Tensor:
        """The state after each of ``count`` positions [B,l,...,N]."""
        return self.states[:, start - self.start :][:, :count]

    def at(self, position: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y [B,1,...] at a position, the state after it [B,...,N], and a copy for others, given the state before it."""
        place = position - self.start
        y, state = self.y[:, place : place + 1], self.states[:, place]
        return y, state, copied(state) if self.links is None else self.links.state(place, before)


def copied(state: Tensor) -> Tensor:
    """A copy for others: the backward pass of y reads the original, which an edit in place must not touch."""
    return state.clone(memory_format=torch.contiguous_format)


#: How many times as many positions are run ahead as were only read before, and how many numbers their states may have:
#: these are 16 MiB, which malloc uses again for the next, where it would map 32 MiB anew each time.
AHEAD, MUCH = 4, 1 << 22
#: How many numbers the states of all positions of a call may have that are run ahead, or read together, with gradients:
#: these are kept beside what is handed out, and where both fill memory, filling it takes all the time there is.
IN_ALL = 1 << 24


@dataclass
class Stretches:
    """A recurrence of one mixer while it runs.

    Its positions are all those of a call, or some in the middle of a longer one.
    """

    offer: Offers
    recurrence: Recurrence
    h: Tensor | None  # the state [B,...,N] that the next position starts from, None for zeros
    start: int = 0  # the next position
    done: list[Stretch] = field(default_factory=list)
    ahead: Ahead | None = None
    read_in_a_row: int = 0  # how many single positions in a row were only read
    first: int = 0  # which position of the call is the first of the recurrence
    total: int | None = None  # how many positions the call has, if not as many as the recurrence
    #: The positions of the call whose state was edited, and that state.
    edited: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many positions the recurrence has: L."""
        return self.recurrence.x.shape[1]

    def run(self) -> tuple[list[Tensor], Tensor]:
        """Run all positions: y [B,l,...] of each stretch, and the state after the last one [B,...,N]."""
        offer, visit = self.offer, self.offer.visit
        with visit.positions(STATE):
            self.serve_positions()
            if any(offer.wants(name) for name in offer.left("states")):
                visit.stand_at(STATE, self.length, self.length)
                return self._serve_states()
            offer.leave_out("states")
        return self.finish()

    def serve_positions(self) -> None:
        """Run up to each position whose state is wanted, and offer that."""
        while self.offer.open:
            total = self.length if self.total is None else self.total
            at = self.offer.visit.next_position(STATE, self.first + self.start, total, self.offer.mask)
            if at is None or at - self.first >= self.length:
                return
            self._run_to(at - self.first, total)

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Run the positions that are left: what `run` returns."""
        if self.start < self.length or not self.done:
            self.run_on(self.length)
        assert self.h is not None
        return self._outputs(), self.h

    def run_on(self, stop: int) -> None:
        """Run all positions before ``stop`` that have not run yet."""
        y, h = self.recurrence.run(self.start, stop, self.h)
        self._add(Stretch(self.start, stop, self.h, [y]))
        self.start, self.h = stop, h

    def edit_again(self, edited: list[tuple[int, Tensor]]) -> None:
        """Run up to each of these positions, and go on from the state that it has here."""
        for at, after in edited:
            y, state, _ = self._state_after(at)
            self._go_on(at, y, state, after, only_read=False)

    def _outputs(self) -> list[Tensor]:
        """y [B,l,...] of all stretches; those that are still to be read are read together."""
        outputs: list[Tensor] = []
        for (unread, ahead), stretches in itertools.groupby(self.done, lambda stretch: (stretch.unread, stretch.ahead)):
            group = [*stretches]
            ys = [y for stretch in group for y in stretch.y]
            if not unread:
                outputs += ys
                continue
            start, states = group[0].start, [stretch.after for stretch in group if stretch.after is not None]
            whole = None if ahead is None else ahead.of(start, len(group))
            outputs.append(self.recurrence.read_each(start, ys, states, whole))
        return outputs

    def _run_to(self, at: int, total: int) -> None:
        """Run up to position ``at``, and offer the state there as one of ``total`` positions."""
        y, state, copy = self._state_after(at)
        recorded = copy.requires_grad
        after = self.offer.visit.serve_position(STATE, self.first + at, total, copy)
        # A tensor that was assigned or detached counts even where its contents are the same.
        only_read = after is copy and after.requires_grad >= recorded and same_contents(state, after)
        self._go_on(at, y, state, after, only_read)

    def _go_on(self, at: int, y: Tensor, state: Tensor, after: Tensor, only_read: bool) -> None:
        """Read y from what became of the state after position ``at``, and start from that."""
        linked = self.ahead is not None and self.ahead.links is not None
        unread = only_read and at == self.start and (linked or after.requires_grad)
        unread = unread and self._few(after) and not self._padded(at, at + 1)
        plain = not (linked or state.requires_grad or after.requires_grad or transformed())
        if not unread and (after.requires_grad or not only_read):
            if self.offer.mask is not None:  # no edit changes the state on padding
                after = torch.where(self.offer.mask[:, at].view(-1, *[1] * (state.dim() - 1)), after, state)
            # What was handed out may be edited once more, when it is too late.
            after = state.copy_(after) if plain else after
            self.edited.append((self.first + at, after))
            read = self.recurrence.read(after, at)[:, None]
            y = torch.cat((y[:, :-1], read), dim=1) if y.shape[1] > 1 else read
            only_read = False
        elif plain:
            after = state
        self.read_in_a_row = self.read_in_a_row + 1 if only_read and at == self.start else 0
        if not only_read or (after.requires_grad and not linked):
            self.ahead = None
        kept = None if only_read and plain else after
        self._add(Stretch(self.start, at + 1, self.h, [y], kept, unread, self.ahead if linked else None))
        self.start, self.h = at + 1, after

    def _add(self, stretch: Stretch) -> None:
        # To the last one, where the state between them is as the recurrence has left it: it need not be kept.
        last = self.done[-1] if self.done else None
        if last is None or last.after is not None or stretch.unread or stretch.ahead is not None:
            self.done.append(stretch)
        else:
            last.stop, last.after = stretch.stop, stretch.after
            last.y += stretch.y

    def _few(self, state: Tensor) -> bool:
        return self.length * state.numel() <= IN_ALL

    def _padded(self, start: int, stop: int) -> bool:
        return self.offer.mask is not None and not bool(self.offer.mask[:, start:stop].all())

    def _state_after(self, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """y [B,l,...] of the positions up to ``at``, the state after it [B,...,N], and a copy of that for others.

        Where one position after the other is only read, `AHEAD` times as many are run at once as were read before.
        """
        if at == self.start and self.read_in_a_row >= 2:
            if self.ahead is None or not self.ahead.has(at):
                if self.ahead is not None and self.ahead.links is None and self.h is not None:
                    self.h = copied(self.h)  # a part of its memory, which is to be there for the next
                self.ahead = None
                self.ahead = self._run_ahead(at)
            if self.ahead is not None:
                assert self.h is not None
                return self.ahead.at(at, self.h)
        self.ahead = None
        y, state = self.recurrence.run(self.start, at + 1, self.h)
        return y, state, copied(state)

    def _run_ahead(self, at: int) -> Ahead | None:
        assert self.h is not None
        stop = min(self.length, at + AHEAD * self.read_in_a_row, at + 1 + MUCH // max(1, self.h.numel()))
        if not differentiated(self.h, *self.recurrence.tensors):
            return Ahead(at, *self.recurrence.states(at, stop, self.h))
        if self._padded(at, stop) or not self._few(self.h):
            return None
        links = self.recurrence.links(at, stop, self.h)
        return None if links is None else Ahead(at, links.y, links.states, links)

    def _serve_states(self) -> tuple[list[Tensor], Tensor]:
        """Run the rest, offer the trajectory, and read y from what came back."""
        parts = [stretch.states(self.recurrence) for stretch in self.done]
        if self.start < self.length or not self.done:
            parts.append(self.recurrence.states(self.start, self.length, self.h))
        y, states = (torch.cat(p, dim=1) if self.done else p[0] for p in zip(*parts, strict=True))
        last = states[:, -1].clone()  # the whole trajectory is a record: its edits are not carried on
        visit = self.offer.visit
        may_change = visit.may_edit(STATE) and not states.requires_grad
        unedited = self.recurrence.read(states) if may_change else None
        served = self.offer(STATE, states)
        may_differ = served is not states or visit.may_edit("h_read")
        read = self.offer("h_read", served)  # [B,L,...,N]
        if (may_differ and read is not states) or read.requires_grad:
            y = self.recurrence.read(read)
        elif unedited is not None and not same_contents(unedited, edited := self.recurrence.read(read)):
            y = edited
        return [y], last
