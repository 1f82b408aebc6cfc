"""What the running trace wants next: the one module that knows nnsight's internals.

The forward of a Mamba can be fused into kernels exactly as far as nobody looks inside. nnsight 0.8 runs the
body of a trace in greenlets, each always parked on one location, so before computing anything a module can
ask what is wanted of it right now. `Visit` answers that for one call of one module, serves the state after
a position, and keeps nnsight's visit counts right for the locations that a fused pass never offers.

The facts about nnsight 0.8 this module rests on, each held by a test in tests/test_demand.py:

* ``interleaver.mediators[i].pending`` is what worker i is parked on: ``provider`` (a location such as
  ``"model.backbone.layers.3.mixer.conv.output"``), and which visit of it, ``iteration``;
* ``interleaver.observers`` maps the locations caches subscribe to;
* ``interleaver.handle(location, value)`` serves a location and returns the possibly replaced value;
* ``interleaver.counts[location]`` says how often a location was offered over the life of the tree, and
  ``mediator.counts_at_start`` what it was when the worker began;
* ``interleaver.batcher`` narrows every value whose first dimension equals the number of rows of the batch,
  and nothing when it is ``None``;
* ``mediator.transform`` is a write-back, swapped in when the worker next asks for anything;
* the route from a module to the running trace is ``module.__dict__[STATE].active()``.

Positions. ``h[p]`` has a location of its own, ``<h>.<p>.output``, but no module, and counting a visit of
each position in every pass would cost a loop over all tokens. So the count of a position is not kept: it
is the count of the site ``h`` itself, set at the moment when somebody asks (`expect_position`) or is
served (`Visit.next_position`).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.eproperty import WriteBack
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.source import STATE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import MambaTraceError, PositionError, SiteValueError
from .names import public_path

#: The three locations nnsight counts for every module call.
LOCATIONS = ("input", "skip", "output")

#: Where a pass over positions stands, kept on the site's module: (interleaver, next position, length).
CURSOR = "_mamba_trace_cursor"
#: Which storages a run has handed out, kept on its interleaver.
SERVED = "_mamba_trace_served"


class SiteOrderError(MambaTraceError, OutOfOrderError):
    """A site was asked for after the run had gone past it."""


def listened_to(module: nn.Module | None) -> bool:
    """Whether PyTorch hooks are registered on a module, so that it must be called to fire them."""
    return module is not None and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def rebind_forward(module: nn.Module) -> None:
    """Make every wrapper around ``module.forward`` run the forward of its present class.

    accelerate and nnsight keep the forward they wrapped. When the class of a module changes under them,
    they must be told.
    """
    state = module.__dict__.get(STATE)
    if state is not None and not state.sourced:
        state.body = state.original = type(module).forward
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)


class Visit:
    """One call of one module's forward, as the running trace sees it.

    Args:
        module: the module whose forward is running. Outside a trace nothing is wanted.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        state = module.__dict__.get(STATE)
        self.interleaver: Any = None
        self.path: str | None = None
        if state is not None:
            self.interleaver, self.path, _ = state.active()

    @property
    def tracing(self) -> bool:
        """Whether a trace with workers is running over this module."""
        return self.interleaver is not None

    def inside(self, names: Iterable[str]) -> bool:
        """Whether anything inside this module is wanted: a site of ``names``, or any other location."""
        if any(listened_to(self.module._modules[name]) for name in names):
            return True
        if self.interleaver is None:
            return False
        own = {f"{self.path}.{key}" for key in LOCATIONS}
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

    def wants_output(self) -> bool:
        """Whether the output of the module itself is wanted, now that it is about to be returned."""
        if self.interleaver is None:
            return False
        location = f"{self.path}.output"
        return location in self.interleaver.observers or any(
            parked == location for _, parked in self._parked(location)
        )

    def pass_over(self, names: Iterable[str]) -> None:
        """Count one visit of each site in ``names`` without offering a value."""
        if self.interleaver is None:
            return
        counts = self.interleaver.counts
        for name in names:
            for key in LOCATIONS:
                location = f"{self.path}.{name}.{key}"
                counts[location] = counts.get(location, 0) + 1

    @contextlib.contextmanager
    def whole_batch(self) -> Iterator[None]:
        """Serve values whole: for those without a batch dimension, which nnsight might take for one."""
        if self.interleaver is None:
            yield
            return
        batcher, self.interleaver.batcher = self.interleaver.batcher, None
        try:
            yield
        finally:
            self.interleaver.batcher = batcher

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
        self._count_positions(prefix)
        wanted = []
        for mediator, location in list(self._parked(prefix)):
            position = position_of(location, prefix)
            if position is None:
                continue
            if not -length <= position < length:
                self._refuse(mediator, position_error(public_path(location), length))
                return self.next_position(name, start, length, mask)
            if position >= 0:
                _warn_if_padded(mediator, location, position, mask)
            wanted.append(position % length)
        for location in self.interleaver.observers:
            position = position_of(location, prefix)
            if position is not None and -length <= position < length:
                wanted.append(position % length)
        return min((position for position in wanted if position >= start), default=None)

    def serve_position(self, name: str, position: int, length: int, value: Tensor) -> Tensor:
        """Offer ``value`` as the state after ``position`` under both its names; return it, edited or not."""
        self.stand_at(name, position, length)
        prefix = f"{self.path}.{name}."
        names = [f"{prefix}{spelling}.output" for spelling in (position, position - length)]
        for location in names:
            if location in self.interleaver.observers:
                value = self.interleaver.handle(location, value)
        # A worker served under one name may go on to ask under the other.
        while asked := {location for _, location in self._parked(prefix)}.intersection(names):
            value = self.interleaver.handle(asked.pop(), value)
        return value

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

    def _count_positions(self, prefix: str) -> None:
        counts = self.interleaver.counts
        visits = counts.get(f"{prefix}output", 0)
        for location in self.interleaver.parked:
            if position_of(location, prefix) is not None:
                counts[location] = visits

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


def position_error(path: str, length: int) -> PositionError:
    """The error for a position outside a call of ``length`` positions."""
    return PositionError(
        f"{path}: this forward call has {length} position{'s' * (length != 1)}, so h[p] needs "
        f"{-length} <= p < {length}. Positions count the tokens of one call: every decode step of "
        f"generate has 1, which is h[0] or h[-1]"
    )


def _warn_if_padded(mediator: Mediator, location: str, position: int, mask: Tensor | None) -> None:
    if mask is None or isinstance(mask, FakeTensor) or mask.is_meta:
        return
    batcher = mediator.interleaver.batcher
    rows = mask
    if batcher is not None and batcher.batching and mediator.batch_group is not None:
        first, size = mediator.batch_group
        rows = mask[first : first + size]
    offsets = (rows.cumsum(-1) == 0).sum(-1).tolist()
    if not any(offsets):
        return
    told = str(offsets[0]) if len(set(offsets)) == 1 else str(offsets)
    warnings.warn(
        f"{public_path(location)}: this invoke is left-padded by {told}, so column {position} is not its "
        f"token {position}. Add the padding to the position, or count from the end with a negative one",
        stacklevel=2,
    )


# -- the worker's side: code that runs where the user wrote it ---------------------------------------------


def expect(location: str) -> None:
    """Refuse at once, at the user's line, a location that this run has already gone past.

    Raises:
        SiteOrderError: if it can no longer be served.
    """
    mediator = Mediator.current(public_path(location))
    path, last = public_path(location), getattr(mediator, "_mamba_trace_last", None)
    if mediator.iteration == 0 and mediator.occurrence(location) > 0:
        after = f" before {last}, which this block has already asked for" if last else ""
        raise SiteOrderError(
            f"{path} was already computed in this run. Sites are served in execution order: ask for "
            f"{path}{after} (`mamba-trace sites` prints the order), or in an invoke of its own"
        )
    mediator._mamba_trace_last = path


def expect_position(site: Any, position: int) -> None:
    """Set the visit count of ``h[position]`` as nnsight would have kept it, then `expect` it.

    Args:
        site: the envoy of the site with positions.
        position: as the user wrote it; negative counts from the end.

    Raises:
        SiteOrderError: if the state has already moved past this position.
    """
    whole, location = f"{site.path}.output", f"{site.path}.{position}.output"
    mediator = Mediator.current(public_path(location))
    counts = site.interleaver.counts
    cursor = site._module.__dict__.get(CURSOR)
    passed = False
    if cursor is not None and cursor[0] is site.interleaver:
        _, reached, length = cursor
        passed = -length <= position < length and position % length < reached
    counts[location] = counts.get(whole, 0) + passed
    mediator.counts_at_start[location] = mediator.counts_at_start.get(whole, 0)
    expect(location)


def current_value(location: str) -> Any:
    """The value at a location, as the running worker sees it."""
    return Mediator.value(location)


def keep_apart(location: str, value: Any) -> Any:
    """What to hand out for a read, so that no later edit in place changes what was read before.

    The first read of a tensor hands out the run's own. A further one (or one of another location, or by
    another worker, that shares its memory) hands out a copy, with which the run goes on: whatever was saved
    of the first, a slice of it included, keeps its values. If instead the first handle is edited, the run
    takes that.

    Args:
        location: where ``value`` was read by the running worker.
        value: what nnsight served.

    Raises:
        SiteValueError: when the worker moves on, if both handles were edited in place.
    """
    if not isinstance(value, Tensor):
        return value
    mediator = Mediator.current(location)
    served = _served_in_this_run(mediator.interleaver)
    if value.untyped_storage()._cdata not in served:
        served.add(value.untyped_storage()._cdata)
        return value
    copy = value.clone()
    served.add(copy.untyped_storage()._cdata)
    before, after = version(value), version(copy)

    def carry_on() -> Tensor:
        if version(value) == before:
            return copy
        if version(copy) == after:
            return value
        raise SiteValueError(
            f"{public_path(location)} was read twice and both values were edited in place; edit one of them"
        )

    # nnsight swaps the result in as soon as the worker asks for anything else, or ends.
    mediator.transform = WriteBack(carry_on, copy, None, location, mediator.wanted(location))
    return copy


def version(value: Tensor) -> int | None:
    """How often a tensor was edited in place; ``None`` where PyTorch does not count (inference mode)."""
    return None if value.is_inference() else value._version


def _served_in_this_run(interleaver: Any) -> set[int]:
    # The storages handed out in this run. `observers` is a new object in every run.
    run, served = interleaver.__dict__.get(SERVED, (None, set()))
    if run != id(interleaver.observers):
        served = set()
        interleaver.__dict__[SERVED] = (id(interleaver.observers), served)
    return served


def skip_module(envoy: Any, replacement: Any) -> None:
    """Skip the module of ``envoy``: nnsight's ``Envoy.skip``, also where a submodule hides the method."""
    Mediator.skip(f"{envoy.path}.skip", replacement)


__all__ = [
    "SiteOrderError",
    "Visit",
    "current_value",
    "expect",
    "expect_position",
    "keep_apart",
    "listened_to",
    "rebind_forward",
    "skip_module",
]
