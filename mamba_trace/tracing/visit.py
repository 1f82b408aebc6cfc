"""The model's side: one call of one module, and what is wanted inside it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.interleaver import EarlyStopException, Mediator
from nnsight.intervention.source import STATE as CONTROLLER_STATE
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ..errors import PositionError, SiteValueError
from ..modeling.past import told_of_padding
from ..names import public_path
from ..sites import STATE
from .frames import users_frame
from .invokes import PerInvoke

#: The three locations nnsight counts for every module call.
LOCATIONS = ("input", "skip", "output")

#: The attention mask of the forward call that runs, kept on the interleaver.
CALL_MASK = "_mamba_trace_mask"

#: Set on a worker that goes through every position, so that one of padding is no reason to warn.
EVERY_POSITION = "_mamba_trace_every_position"

#: Where a pass over positions stands, kept on the site's module: (interleaver, next position, length).
CURSOR = "_mamba_trace_cursor"

#: The number of positions of the first forward call of a run, kept on the interleaver.
FIRST_LENGTH = "_mamba_trace_first_length"

#: The lines that a worker was warned at.
TOLD = "_mamba_trace_told"

#: Set on a worker while what it asks for is not going to be edited.
READING = "_mamba_trace_reading"


def listened_to(module: nn.Module | None) -> bool:
    """Whether PyTorch hooks are registered on a module, or on all, so that it must be called to fire them."""
    return module is not None and (has_hooks_of_its_own(module) or has_global_hooks())


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether PyTorch hooks are registered on a module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def take_note_of_mask(interleaver: Any, mask: Any) -> None:
    """Keep the attention mask of a forward call [B,L], for the workers to ask for (`worker.mask_of_call`)."""
    if interleaver is not None:
        interleaver.__dict__[CALL_MASK] = mask


def take_note_of_length(interleaver: Any, length: int | None) -> None:
    """Keep the number of positions of a run's first forward call, if known (`worker.length_of_call`)."""
    interleaver.__dict__[FIRST_LENGTH] = length


class Visit:
    """One call of one module's forward, as the running trace sees it.

    Args:
        module: the module whose forward is running. Outside a trace nothing is wanted.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        state = module.__dict__.get(CONTROLLER_STATE)
        self.interleaver: Any = None
        self.path: str | None = None
        if state is not None:
            self.interleaver, self.path, _ = state.active()

    @property
    def tracing(self) -> bool:
        """Whether a trace with workers is running over this module."""
        return self.interleaver is not None

    @property
    def trace(self) -> int | None:
        """What tells one running trace from another; ``None`` outside of traces."""
        return None if self.interleaver is None else id(self.interleaver.mediators[0].worker)

    @property
    def batching(self) -> bool:
        """Whether several invokes share the batch, so that each is handed a view of its rows."""
        if self.interleaver is None or self.interleaver.batcher is None:
            return False
        return self.interleaver.batcher.batching

    def inside(self, names: Iterable[str]) -> bool:
        """Whether anything inside this module is wanted: a site of ``names``, or any other location."""
        modules: dict[str, Any] = self.module._modules
        if has_global_hooks() or any(has_hooks_of_its_own(modules[name]) for name in names):
            return True
        if self.interleaver is None:
            return False
        own = {f"{self.path}.{key}" for key in LOCATIONS}
        self._count_positions()
        if any(location not in own for _, location in self._parked(f"{self.path}.")):
            return True
        return bool(self.interleaver.observers) and any(
            location not in own and location.startswith(f"{self.path}.")
            for location in self.interleaver.observers
        )

    def wants(self, name: str) -> bool:
        """Whether site ``name`` is wanted now: a worker waits for it, a cache or a PyTorch hook takes it."""
        if listened_to(self.module._modules[name]):
            return True
        if self.interleaver is None:
            return False
        locations = {f"{self.path}.{name}.{key}" for key in LOCATIONS}
        if not locations.isdisjoint(self.interleaver.observers):
            return True
        return any(location in locations for _, location in self._parked(f"{self.path}.{name}."))

    def may_edit(self, name: str) -> bool:
        """Whether somebody waits for site ``name`` who may edit it in place: a cache, for one, does not."""
        if listened_to(self.module._modules[name]):
            return True
        if self.interleaver is None:
            return False
        prefix = f"{self.path}.{name}."
        return any(not mediator.__dict__.get(READING) for mediator, _ in self._parked(prefix))

    def wants_within(self, name: str) -> bool:
        """Whether anything at or below ``name`` is wanted now, such as one position of a site."""
        if listened_to(self.module._modules.get(name)):
            return True
        if self.interleaver is None:
            return False
        prefix = f"{self.path}.{name}."
        self._count_positions()
        if any(location.startswith(prefix) for location in self.interleaver.observers):
            return True
        return any(self._parked(prefix))

    def wants_output(self) -> bool:
        """Whether the output of the module itself is wanted, now that it is about to be returned."""
        if self.interleaver is None:
            return False
        location = f"{self.path}.output"
        return location in self.interleaver.observers or any(
            parked == location for _, parked in self._parked(location)
        )

    def pass_on(self, value: Tensor) -> Tensor:
        """A served value on its way on: in a batch of invokes its gradient comes back contiguous.

        nnsight cuts an invoke's rows out of a gradient by the strides of the value, whatever the gradient's
        own are.
        """
        if not (self.batching and value.requires_grad):
            return value
        passed = value.view_as(value)
        passed.register_hook(Tensor.contiguous)
        return passed

    def pass_over(self, names: Iterable[str]) -> None:
        """Count one visit of each site in ``names`` without offering a value."""
        if self.interleaver is None:
            return
        counts = self.interleaver.counts
        for name in names:
            for key in LOCATIONS:
                location = f"{self.path}.{name}.{key}"
                counts[location] = counts.get(location, 0) + 1

    def serve_whole(self, module: Any, value: Tensor) -> Tensor:
        """Offer a value without a batch axis at ``module``: whole to each invoke, which may edit its own.

        Returns:
            ``value`` or what replaced it; with a batch axis in front where invokes made it differ.
        """
        if self.interleaver is None:
            return module(value)
        batcher = self.interleaver.batcher
        invokes = PerInvoke(value, self.interleaver) if self.batching else None
        self.interleaver.batcher = invokes
        try:
            returned = module(value)
        finally:
            self.interleaver.batcher = batcher
        if invokes is None:
            return returned
        if returned is value:
            return invokes.merged()
        if invokes.edited:
            path = public_path(f"{self.path}.{module.site.name}")
            raise SiteValueError(
                f"{path} was edited by an invoke and replaced for all of them by a PyTorch hook: do either"
            )
        return returned

    # -- the state after a position --------------------------------------------------------------------

    def next_position(self, name: str, start: int, length: int, mask: Tensor | None = None) -> int | None:
        """The first position from ``start`` on whose state is wanted, or ``None``.

        Args:
            name: the site with positions.
            start: the first position not run yet.
            length: the number of positions of this call.
            mask: attention mask [B,L], to warn whoever counts columns of a left-padded prompt.

        Raises:
            PositionError: at the user's line, for a position this call does not have.
        """
        if self.interleaver is None:
            return None
        prefix = f"{self.path}.{name}."
        self.stand_at(name, start, length)
        self._count_positions()
        wanted = []
        for mediator, location in list(self._parked(prefix)):
            position = position_of(location, prefix)
            if position is None:
                continue
            if not -length <= position < length:
                self._refuse(mediator, position_error(public_path(location), length))
                return self.next_position(name, start, length, mask)
            _warn_if_padded(mediator, location, position, mask)
            wanted.append(position % length)
        for location, observers in self.interleaver.observers.items():
            position = position_of(location, prefix)
            if position is None:
                continue
            if -length <= position < length:
                wanted.append(position % length)
            elif observers[0][0].occurrence(f"{prefix}output") == 0:  # a later step may be too short for it
                raise position_error(public_path(location), length)
        return min((position for position in wanted if position >= start), default=None)

    def serve_position(self, name: str, position: int, length: int, value: Tensor) -> Tensor:
        """Offer ``value`` as the state after ``position`` under both its names; return it, edited or not."""
        self.stand_at(name, position, length)
        prefix = f"{self.path}.{name}."
        names = [f"{prefix}{spelling}.output" for spelling in (position, position - length)]
        value, stopped = self._serve_workers(names, value)
        for location in names:
            for mediator, cache, selected in self.interleaver.observers.get(location, ()):
                batcher = self.interleaver.batcher
                rows = value if batcher is None else batcher.narrow(value, mediator.batch_group)
                cache.observe_selected(selected, rows)
        if stopped is not None:
            raise stopped
        return self.pass_on(value)

    def _serve_workers(self, names: list[str], value: Tensor) -> tuple[Tensor, EarlyStopException | None]:
        # Interleaver.handle for a place of several names: whichever of them workers use, they are served in
        # their own order, edits of the model before the trace. A stop is held back until all are.
        stopped = None
        while asking := [mediator for mediator in self.interleaver.mediators if self._asks(mediator, names)]:
            for mediator in asking:
                while self._asks(mediator, names):
                    try:
                        value = mediator.handle(mediator.pending.provider, value)
                    except EarlyStopException as stop:
                        stopped, mediator.pending = stop, None
        self.interleaver._reindex_parked()
        return value, stopped

    def _asks(self, mediator: Mediator, names: list[str]) -> bool:
        # Whether a worker waits for this visit of a place of several names.
        self._count_positions()
        pending = mediator.pending
        if pending is None or pending.provider not in names:
            return False
        return bool(pending.iteration == mediator.occurrence(pending.provider))

    @contextlib.contextmanager
    def positions(self, name: str) -> Iterator[None]:
        """A pass over the positions of site ``name``: forgotten however it ends."""
        try:
            yield
        finally:
            self.module._modules[name].__dict__.pop(CURSOR, None)

    def stand_at(self, name: str, position: int, length: int) -> None:
        """Remember that every position before ``position`` has been run."""
        self.module._modules[name].__dict__[CURSOR] = (self.interleaver, position, length)

    def _count_positions(self) -> None:
        # A position below this module was visited as often as its site, in whatever mixer that is.
        counts = self.interleaver.counts
        for waiting in self.interleaver.mediators:
            location = None if waiting.pending is None else waiting.pending.provider
            whole = None if location is None else site_of_position(location)
            if location is None or whole is None or not location.startswith(f"{self.path}."):
                continue
            counts[location] = counts.get(whole, 0)
            # A worker in NDIF's sandbox, another process, cannot say what it began at: `expect_position`.
            for mediator in self.interleaver.mediators:
                mediator.counts_at_start[location] = mediator.counts_at_start.get(whole, 0)

    def _parked(self, prefix: str) -> Iterator[tuple[Mediator, str]]:
        # The workers this visit will serve: parked on a location under `prefix`, at this occurrence of it.
        for mediator in self.interleaver.mediators:
            pending = mediator.pending
            if pending is None or pending.provider is None or not pending.provider.startswith(prefix):
                continue
            if pending.iteration == mediator.occurrence(pending.provider):
                yield mediator, pending.provider

    def _refuse(self, mediator: Mediator, error: Exception) -> None:
        # Raise `error` at the line the worker is parked on. If its block catches it, the worker goes on.
        if mediator.worker is None:  # it runs in NDIF's sandbox, another process
            raise error
        mediator.worker.parent = getcurrent()
        try:
            mediator.pending = mediator.worker.throw(error)
        except BaseException as raised:
            raised.__intervention_tb__ = raised.__traceback__  # type: ignore[attr-defined]
            raise
        self.interleaver._reindex_parked()


def position_of(location: str, prefix: str) -> int | None:
    """The p of ``"<prefix><p>.output"``, or ``None`` for any other location."""
    if not location.startswith(prefix):
        return None
    match = re.fullmatch(r"(-?\d+)\.output", location[len(prefix) :])
    return None if match is None else int(match[1])


def site_of_position(location: str) -> str | None:
    """The location of the site that a position belongs to, or ``None`` for any other location."""
    match = re.fullmatch(rf"(.+\.{STATE})\.-?\d+\.output", location)
    return None if match is None else f"{match[1]}.output"


def position_error(path: str, length: int) -> PositionError:
    """The error for a position outside a call of ``length`` positions."""
    return PositionError(
        f"{path}: this forward call has {length} position{'s' * (length != 1)}, so h[p] needs "
        f"{-length} <= p < {length}. Positions count the tokens of one call: every decode step of "
        f"generate has 1, which is h[0] or h[-1]"
    )


def _warn_if_padded(mediator: Mediator, location: str, position: int, mask: Tensor | None) -> None:
    if mask is None or mediator.__dict__.get(EVERY_POSITION):
        return
    told = told_of_padding(public_path(location), position, rows_of(mediator, mask))
    if told is None:
        return
    message = f"{told}. Where it is padding, the state is the one before it, and an edit has no effect"
    if mediator.worker is None:  # it runs in NDIF's sandbox, another process
        warnings.warn(message, UserWarning, stacklevel=2)
        return
    frame = users_frame(mediator.worker.gr_frame)
    # Once for each line, which may be in a loop over all positions.
    told_at = mediator.__dict__.setdefault(TOLD, set())
    if (frame.f_code.co_filename, frame.f_lineno) in told_at:
        return
    told_at.add((frame.f_code.co_filename, frame.f_lineno))
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def rows_of(mediator: Mediator, mask: Tensor) -> Tensor:
    """The rows of a worker's invoke of a mask [B,L] of the whole batch."""
    batcher = mediator.interleaver.batcher
    if batcher is None or not batcher.batching or mediator.batch_group is None or len(mask) != batcher.total:
        return mask
    first, size = mediator.batch_group
    return mask[first : first + size]
