"""The model's side of a trace: one call of one module, and what the running trace wants inside it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.interleaver import EarlyStopException, Mediator
from nnsight.intervention.source import STATE as CONTROLLER_STATE
from torch import Tensor, nn

from ..errors import SiteValueError
from ..names import public_path
from .forwards import has_global_hooks, listened_to
from .invokes import PerInvoke
from .positions import CURSOR, position_error, position_of, site_of_position, warn_if_padded

#: The three locations that nnsight counts for every call of a module.
LOCATIONS = ("input", "skip", "output")

#: The names under which the interleaver keeps, for the workers: the attention mask of the running forward
#: call, and the number of positions of the run's first forward call.
CALL_MASK, FIRST_LENGTH = "_mamba_trace_mask", "_mamba_trace_first_length"

#: Set on a worker while it only reads what it asks for.
READING = "_mamba_trace_reading"

#: Set on the first worker of a trace: the number of the trace. An ``id`` is given out again and will not do, nor will
#: the worker's mediator, which a lasting edit brings to one trace after the other.
NUMBER = "_mamba_trace_number"
_numbers = itertools.count()


def take_note_of_mask(interleaver: Any, mask: Any) -> None:
    """Keep the attention mask [B,L] of a forward call, for the workers to ask for (`worker.mask_of_call`)."""
    if interleaver is not None:
        interleaver.__dict__[CALL_MASK] = mask


def take_note_of_prompt(interleaver: Any, inputs: Mapping[str, Any]) -> None:
    """Keep the mask and the number of positions of a run's first forward call, for `worker.length_of_call`.

    Args:
        interleaver: the model's.
        inputs: the keyword arguments of the call.
    """
    take_note_of_mask(interleaver, inputs.get("attention_mask"))
    prompt = inputs.get("input_ids", inputs.get("inputs_embeds"))
    known = isinstance(prompt, Tensor) and prompt.dim() > 1
    interleaver.__dict__[FIRST_LENGTH] = prompt.shape[1] if known else None


@functools.lru_cache(maxsize=4096)
def locations_of(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The locations of modules inside the module at ``path``: the same strings in every call of it."""
    return tuple(f"{path}.{name}.{key}" for name in names for key in LOCATIONS)


#: Set on the first worker of a trace: what `observed_below` looks up, and of which locations that was made.
OBSERVED = "_mamba_trace_observed"


def first_worker(interleaver: Any) -> Any:
    """What stands for the running trace: its first worker, or on NDIF's host, which has none, what stands for that."""
    first = interleaver.mediators[0]
    return first if first.worker is None else first.worker


def observed_below(interleaver: Any, prefix: str) -> list[str]:
    """The locations that caches record and that begin with ``prefix``, a path and a full stop."""
    observers = interleaver.observers
    if not observers:
        return []
    kept = first_worker(interleaver).__dict__
    made_of, found = kept.get(OBSERVED, (None, {}))
    if made_of != (id(observers), len(observers)):
        found = {}
        for location in observers:
            steps = location.split(".")
            for end in range(1, len(steps)):
                found.setdefault(".".join(steps[:end]) + ".", []).append(location)
        kept[OBSERVED] = (id(observers), len(observers)), found
    below: list[str] = found.get(prefix, [])
    return below


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
        """The number of the running trace, which no other trace of the program has; ``None`` outside of traces."""
        if self.interleaver is None:
            return None
        number: int = first_worker(self.interleaver).__dict__.setdefault(NUMBER, next(_numbers))
        return number

    @property
    def batching(self) -> bool:
        """Whether several invokes share the batch, so that each is handed a view of its rows."""
        return bool(self.interleaver and self.interleaver.batcher and self.interleaver.batcher.batching)

    # -- what is wanted ------------------------------------------------------------------------------------

    def inside(self, hooks: Iterable[Mapping[int, Any]]) -> bool:
        """Whether anything inside this module is wanted: by one of the ``hooks`` on its sites, or at any location."""
        if has_global_hooks() or any(hooks):
            return True
        return self.interleaver is not None and self._wants_below("", {f"{self.path}.{key}" for key in LOCATIONS})

    def positions_alone(self, name: str, hooks: Iterable[Mapping[int, Any]]) -> bool:
        """Whether nothing inside this module is wanted but single positions of the site ``name``; see `inside`."""
        if has_global_hooks() or any(hooks):
            return False
        own, prefix = {f"{self.path}.{key}" for key in LOCATIONS}, f"{self.path}.{name}."
        return all(location in own or position_of(location, prefix) is not None for location in self._wanted_below(""))

    def wants(self, name: str) -> bool:
        """Whether site ``name`` is wanted now: by a worker that waits for it, a cache or a PyTorch hook."""
        return listened_to(self.module._modules[name]) or self._wants(f"{name}.", LOCATIONS)

    def may_edit(self, name: str) -> bool:
        """Whether somebody waits for site ``name`` who may edit it in place: a cache, for one, does not."""
        if listened_to(self.module._modules[name]):
            return True
        return any(not mediator.__dict__.get(READING) for mediator, _ in self._parked(f"{name}."))

    def wants_within(self, name: str) -> bool:
        """Whether anything at or below ``name`` is wanted now, such as one position of a site."""
        return listened_to(self.module._modules.get(name)) or self._wants_below(f"{name}.")

    def wants_output(self) -> bool:
        """Whether the output of the module itself is wanted, now that it is about to be returned."""
        return self._wants("", ["output"])

    def _wants(self, below: str, keys: Iterable[str]) -> bool:
        # Whether a cache or a worker at this visit wants one of the locations `keys`.
        if self.interleaver is None:
            return False
        locations = [f"{self.path}.{below}{key}" for key in keys]
        observers = self.interleaver.observers
        if observers and any(location in observers for location in locations):
            return True
        return any(location in locations for _, location in self._parked(below))

    def _wants_below(self, below: str, besides: Iterable[str] = ()) -> bool:
        # Whether a cache or a worker at this visit wants any location that begins so, `besides` excepted.
        return any(location not in besides for location in self._wanted_below(below))

    def _wanted_below(self, below: str) -> Iterable[str]:
        # The locations that begin so and that a cache or a worker at this visit wants.
        if self.interleaver is None:
            return ()
        self._count_positions()
        parked = (location for _, location in self._parked(below))
        return itertools.chain(parked, observed_below(self.interleaver, f"{self.path}.{below}"))

    def _parked(self, below: str) -> Iterator[tuple[Mediator, str]]:
        # The workers that wait for a location which begins so, at this visit of it, and what they wait for.
        prefix = f"{self.path}.{below}"
        for mediator in self.interleaver.mediators if self.interleaver is not None else ():
            pending = mediator.pending
            if pending is None or pending.provider is None or not pending.provider.startswith(prefix):
                continue
            if pending.iteration == mediator.occurrence(pending.provider):
                yield mediator, pending.provider

    # -- what is served ------------------------------------------------------------------------------------

    def pass_on(self, value: Tensor) -> Tensor:
        """A served value on its way on: in a batch of invokes, its gradient comes back contiguous.

        nnsight cuts an invoke's rows out of a gradient by the strides of the value, even if the gradient has
        other strides.
        """
        if not (self.batching and value.requires_grad):
            return value
        passed = value.view_as(value)
        passed.register_hook(Tensor.contiguous)
        return passed

    def pass_over(self, names: Iterable[str]) -> None:
        """Count one visit of each site in ``names`` without offering a value.

        Only workers and caches ask for the counts, a worker for those since its start.
        """
        running = self.interleaver
        if running is None or not (running.observers or any(mediator.worker for mediator in running.mediators)):
            return
        counts = running.counts
        for location in locations_of(self.path, tuple(names)):
            counts[location] = counts.get(location, 0) + 1

    def serve_whole(self, module: Any, value: Tensor) -> Tensor:
        """Offer a value without a batch axis at ``module``: whole to each invoke, which may edit its copy.

        Returns:
            ``value`` or its replacement, with a batch axis in front if invokes made their copies differ.
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

    # -- the state after a position --------------------------------------------------------------------------

    def next_position(self, name: str, start: int, length: int, mask: Tensor | None = None) -> int | None:
        """The first position from ``start`` on whose state is wanted, or ``None``.

        Args:
            name: the site with positions.
            start: the first position that has not run yet.
            length: the number of positions of this call.
            mask: the attention mask [B,L], to warn a user who counts the columns of a padded prompt.

        Raises:
            PositionError: at the user's line, for a position that this call does not have.
        """
        if self.interleaver is None:
            return None
        prefix = f"{self.path}.{name}."
        self.stand_at(name, start, length)
        self._count_positions()
        wanted = []
        for mediator, location in list(self._parked(f"{name}.")):
            position = position_of(location, prefix)
            if position is None:
                continue
            if not -length <= position < length:
                self._refuse(mediator, position_error(public_path(location), length))
                return self.next_position(name, start, length, mask)
            warn_if_padded(mediator, location, position, mask)
            wanted.append(position % length)
        for location in observed_below(self.interleaver, prefix):
            position, observers = position_of(location, prefix), self.interleaver.observers[location]
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
        # What Interleaver.handle does, for a place that has several names: workers are served in their own
        # order (the model's edits before the trace) under any of the names. An early stop waits until then.
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
        # Whether a worker waits for this visit of a place that has several names.
        pending = mediator.pending
        if pending is None or pending.provider not in names:
            return False
        self._count_position(mediator)
        return bool(pending.iteration == mediator.occurrence(pending.provider))

    @contextlib.contextmanager
    def positions(self, name: str) -> Iterator[None]:
        """A pass over the positions of site ``name``, which leaves nothing behind however it ends."""
        try:
            yield
        finally:
            self.module._modules[name].__dict__.pop(CURSOR, None)

    def stand_at(self, name: str, position: int, length: int) -> None:
        """Remember that every position before ``position`` has run."""
        self.module._modules[name].__dict__[CURSOR] = (self.interleaver, position, length)

    def _count_positions(self) -> None:
        # A position below this module was visited as often as its site, whichever mixer that is in.
        for waiting in self.interleaver.mediators:
            location = None if waiting.pending is None else waiting.pending.provider
            if location is not None and location.startswith(f"{self.path}."):
                self._count_position(waiting)

    def _count_position(self, waiting: Mediator) -> None:
        # The same of what one worker waits for.
        location = waiting.pending.provider
        whole = site_of_position(location)
        if whole is not None:
            self.interleaver.counts[location] = self.interleaver.counts.get(whole, 0)
            # For a worker in NDIF's sandbox, another process, which cannot do it in `expect_position`.
            waiting.counts_at_start[location] = waiting.counts_at_start.get(whole, 0)

    def _refuse(self, mediator: Mediator, error: Exception) -> None:
        # Raise `error` at the line where the worker waits. If its block catches the error, it goes on.
        if mediator.worker is None:  # the worker is in NDIF's sandbox, another process
            raise error
        mediator.worker.parent = getcurrent()
        try:
            mediator.pending = mediator.worker.throw(error)
        except BaseException as raised:
            raised.__intervention_tb__ = raised.__traceback__  # type: ignore[attr-defined]
            raise
        self.interleaver._reindex_parked()
