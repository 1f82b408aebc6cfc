"""A saved value is never changed by a later edit.

nnsight hands out the run's own tensor, and every read of a place hands out the same one. So in

    y = model.layers[1].ssm.y.output
    clean = y.save()
    y[:] = 0

all three are one tensor, and plain nnsight would zero what was saved. Here a saved value is copied when
somebody writes to it: until the worker asks for something else, a `Guard` looks at each function of PyTorch's
that the worker calls. One that would write to what was saved writes to a copy, with which the run goes on,
and ``y``, which had its name before, becomes the name of that copy. Where nothing is written nothing is
copied, and a saved value has the gradient of its place.

Where no gradient is recorded, a value that has a name already is copied when it is saved, so that nothing
that is done to the name later can reach what was saved.

So an edit in place always reaches the run, also one of a saved value, and never what was saved. A saved list
or dictionary keeps what was put into it.

The facts about nnsight 0.8 this module rests on, each held by a test in tests/test_demand.py: ``save``
returns what ``nnsight.tracing.tracer.mark`` returns, around which this module puts a function of its own
(which changes nothing for other models than this package's); a worker calls ``mediator.flush()`` before each
request and at the end of its block, and nowhere else.
"""

from __future__ import annotations

import dis
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from greenlet import getcurrent
from nnsight.intervention.barrier import Barrier
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.tracing import tracer as nnsight_tracer
from nnsight.tracing.util import push
from nnsight.util import apply
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import SiteValueError
from ..names import public_path
from .views import among, memory_of, overlap, same_memory, same_part, same_view, tensors_of

#: On a worker's mediator: the place that it was last served, and the guard that is on duty.
PLACE, GUARD = "_mamba_trace_place", "_mamba_trace_guard"

#: Saved containers with no more entries than this are looked at as a whole.
SHORT = 64

#: Functions that let memory be written past PyTorch, and so count as writing.
ESCAPES = frozenset(
    "numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage set_ resize_".split()
)
#: The first operator of a BINARY_OP that assigns: ``+=``.
FIRST_INPLACE = 13
#: Functions named like writing ones that leave memory alone.
HARMLESS = frozenset("requires_grad_ detach_ share_memory_ rename_ retain_grad".split())


class Place:
    """What one worker was served at one visit of one place, and what was saved of it.

    Args:
        visit: the location, and how often the worker's run had come to it before.
        value: what the worker was served: a tensor, or a container of tensors.
        rebuild, extract: as for `keep_apart`.
        record: told of each tensor that takes the place of another.
    """

    def __init__(
        self,
        visit: tuple[str, int],
        value: Any,
        rebuild: Callable[[Any], Any],
        extract: Callable[[Any], Any],
        record: Callable[[Tensor], Any],
    ) -> None:
        self.visit, self.value = visit, value
        self.rebuild, self.extract, self.record = rebuild, extract, record
        self.tensors = tensors_of(value)
        #: Those of ``tensors`` that were saved.
        self.saved: list[Tensor] = []
        #: (tensor, the one that has taken its place), in the order in which that happened.
        self.retired: list[tuple[Tensor, Tensor]] = []
        #: (copy, the part of a tensor that it is a copy of), by the memory of the copy: they may be many.
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        #: (tensor, a name that it had before it was saved).
        self.names: list[tuple[Tensor, str]] = []
        #: Whether the worker has assigned something else to the place since.
        self.assigned = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is part of the memory here."""
        held = [*self.tensors, *(old for old, _ in self.retired)]
        return any(same_memory(tensor, other) for other in held)

    def save(self, value: Tensor, names: Sequence[str] = ()) -> Tensor:
        """What is saved where a worker saves ``value``: itself, or a copy.

        Args:
            value: a value that was read here, a part of it, or anything else.
            names: those that the worker has for it already.
        """
        whole = next((tensor for tensor in self.tensors if same_view(value, tensor)), None)
        if whole is not None and (value.requires_grad or not names):
            self.protect(whole)
            self.names += [(value, name) for name in names]
            return value
        if not self.holds(value) or any(same_view(value, old) for old, _ in self.retired):
            return value
        copy = value.clone(memory_format=torch.contiguous_format)
        if value.requires_grad:
            # nnsight asks the saved tensor for its gradient, which is that of what it is a copy of.
            copy.register_hook = value.register_hook  # type: ignore[method-assign]
            _local.borrowers.append(weakref.ref(copy))
        self.copies[memory_of(copy)] = (copy, value)
        return copy

    def protect(self, tensor: Tensor) -> None:
        """Let no more be written to one of the tensors here."""
        if not among(tensor, self.saved):
            self.saved.append(tensor)

    def writable(self, target: Tensor) -> Tensor:
        """Where a write to ``target`` goes: to memory of which nothing was saved."""
        if (found := self.copies.get(memory_of(target))) is not None:
            target = self.moved(target, *found)
        for old, new in self.retired:
            if same_memory(target, old):
                target = self.moved(target, old, new)
        for tensor in self.saved:
            if same_memory(target, tensor):
                return self.moved(target, tensor, self.renew(tensor))
        return target

    def moved(self, target: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """``target``, a view of ``old``, as the same view of ``new``."""
        if same_view(target, old):
            return new
        found = same_part(target, old, new)
        if found is None:
            path = public_path(self.visit[0])
            raise SiteValueError(
                f"{path} is edited in place through a view that is no slice of it, and was saved before: "
                f"edit {path} itself, or save a copy with .clone().save()"
            )
        return found

    def renew(self, tensor: Tensor) -> Tensor:
        """Make the run go on with a copy of ``tensor``, which is only what was saved from now on."""
        index = next(number for number, other in enumerate(self.tensors) if other is tensor)
        new = tensor.clone()
        location, occurrence = self.visit
        here = Mediator.current(location).occurrence(location) == occurrence
        if here and not self.assigned:
            replaced = apply(self.value, lambda other: new if other is tensor else other, Tensor)
            Mediator.swap(location, self.rebuild(replaced))
            self.value = self.extract(Mediator.value(location))  # in a batch, this worker's rows
            self.tensors = tensors_of(self.value)
            new = self.tensors[index]
            retire_for_others(location, tensor, new)
        else:
            self.tensors = [new if other is tensor else other for other in self.tensors]
        self.saved = [other for other in self.saved if other is not tensor]
        self.retired.append((tensor, new))
        self.record(new)
        rename([(old, name) for old, name in self.names if same_view(old, tensor)], new, sys._getframe(1))
        return new


def retire_for_others(location: str, old: Tensor, new: Tensor) -> None:
    """Tell the workers of other invokes that hold rows of a batch that the run has gone on with another one.

    Args:
        location: where they were served.
        old, new: this worker's rows of either batch.
    """
    mediator = Mediator.current(location)
    batcher = mediator.interleaver.batcher
    if batcher is None or not batcher.batching or new._base is None:
        return
    for other in mediator.interleaver.mediators:
        place = None if other is mediator else other.__dict__.get(PLACE)
        if place is None or place.visit[0] != location or other.batch_group is None:
            continue
        rows = batcher.narrow(new._base, other.batch_group)
        for number, tensor in enumerate(place.tensors):
            if same_memory(tensor, old) and tensor.shape == rows.shape:
                place.retired.append((tensor, rows))
                place.tensors[number] = rows


class Guard(TorchFunctionMode):
    """Sends the writes of one worker to memory of which nothing was saved.

    Args:
        place: the place that the worker was last served.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.busy = False

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        targets = [] if self.busy else written(func, args, kwargs)
        if not targets:
            return func(*args, **kwargs)
        self.busy = True
        try:
            settle(self.place)
            moves = [(target, self.place.writable(target)) for target in targets]
        finally:
            self.busy = False
        moves = [(target, other) for target, other in moves if other is not target]

        def move(value: Any) -> Any:
            return next((other for target, other in moves if target is value), value)

        if "out" in kwargs:
            kwargs = {**kwargs, "out": apply(kwargs["out"], move, Tensor)}
        else:
            args = (
                apply(args[0], move, Tensor) if isinstance(args[0], (list, tuple)) else move(args[0]),
                *args[1:],
            )
        result = func(*args, **kwargs)
        # ``saved *= 2`` arrives here as ``mul_``, and binds its result to the name of what was saved.
        renamed = moves and is_saved(targets[0]) and is_augmented_assignment(sys._getframe(1))
        return nnsight_tracer.mark(result) if renamed else result


def is_augmented_assignment(frame: FrameType) -> bool:
    """Whether a frame is at an instruction such as that of ``a *= b``."""
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] >= FIRST_INPLACE)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of a function of PyTorch's writes to, or may let somebody write to."""
    if "out" in kwargs:
        return tensors_of(kwargs["out"])
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    by_data = name in ("__get__", "__set__") and getattr(func, "__self__", None) is Tensor.data
    if not (in_place or by_data or name == "__setitem__" or name in ESCAPES or kwargs.get("inplace")):
        return []
    return tensors_of(list(args[0]) if name.startswith("_foreach_") else args[:1])


# -- windows: from a save to the worker's next request -------------------------------------------------------


class _Local(threading.local):
    def __init__(self) -> None:
        #: Guards on duty, the innermost last.
        self.guards: list[Guard] = []
        #: Saved lists and dictionaries, and how many of their entries were looked at.
        self.containers: list[tuple[Any, int]] = []
        #: Copies that borrow the gradient of what they are copies of, as long as the trace runs.
        self.borrowers: list[weakref.ref[Tensor]] = []


_local = _Local()


def watch(mediator: Mediator, place: Place) -> None:
    """Remember what a worker is handed, and guard what was saved of it before."""
    earlier = mediator.__dict__.get(PLACE)
    if earlier is not None and earlier.visit == place.visit and not earlier.assigned:
        pairs = list(zip(earlier.tensors, place.tensors, strict=False))
        if len(pairs) == len(place.tensors) and all(same_view(old, new) for old, new in pairs):
            place = earlier
    mediator.__dict__[PLACE] = place
    for other in mediator.interleaver.mediators:
        theirs = None if other is mediator else other.__dict__.get(PLACE)
        for saved, tensor in itertools.product(theirs.saved if theirs else (), place.tensors):
            if overlap(saved, tensor):
                place.protect(tensor)
    if needs_guard(place):
        open_guard(mediator)


def needs_guard(place: Place) -> bool:
    """Whether a write to what was read at a place may have to go elsewhere."""
    return bool(place.saved or place.retired or place.copies or saved_containers())


def open_guard(mediator: Mediator) -> None:
    """Put a guard on duty until the worker asks for something else."""
    place = mediator.__dict__.get(PLACE)
    if place is None or mediator.__dict__.get(GUARD) is not None:
        return
    guard = Guard(place)
    guard.__enter__()
    _local.guards.append(guard)
    mediator.__dict__[GUARD] = guard
    reference = weakref.ref(mediator)

    def flush() -> None:
        worker = reference()
        assert worker is not None
        if guard.busy:  # the request is its own
            return
        close_guard(worker)
        worker.flush()

    mediator.__dict__["flush"] = flush


def close_guard(mediator: Mediator) -> None:
    """Take a worker's guard off duty."""
    guard = mediator.__dict__.pop(GUARD, None)
    mediator.__dict__.pop("flush", None)
    if guard is not None and guard in _local.guards:
        dismiss(len(_local.guards) - 1)


def dismiss(remaining: int) -> None:
    """Take guards off duty that a worker which ended in an exception has left, down to a number of them."""
    while len(_local.guards) > remaining:
        _local.guards.pop().__exit__(None, None, None)


def assigned(mediator: Mediator) -> None:
    """Note that a worker has assigned a value to the place it was last served."""
    place = mediator.__dict__.get(PLACE)
    if place is not None:
        place.assigned = True
        if needs_guard(place):
            open_guard(mediator)


class GuardedTracer(InterleavingTracer):
    """nnsight's tracer, around workers that may leave guards on duty where they end."""

    def execute(self, code: CodeType) -> None:
        """Run the block as nnsight does."""
        before = len(_local.guards)
        try:
            super().execute(code)
        finally:
            dismiss(before)
            for reference in _local.borrowers:
                if (borrower := reference()) is not None:
                    del borrower.__dict__["register_hook"]
            _local.borrowers.clear()

    def barrier(self, n: int) -> Barrier:
        """A meeting point for ``n`` of this trace's blocks, as nnsight's."""
        return GuardedBarrier(n)


class GuardedBarrier(Barrier):
    """nnsight's barrier, at which other workers and the model run without this worker's guard."""

    def __call__(self) -> None:
        mediator = Mediator.current("tracer.barrier()")
        close_guard(mediator)
        super().__call__()
        place = mediator.__dict__.get(PLACE)
        if place is not None and needs_guard(place):
            open_guard(mediator)


# -- saving --------------------------------------------------------------------------------------------------

_mark = nnsight_tracer.mark


def mark(value: Any) -> Any:
    """nnsight's ``mark``, by which every value is saved: what it returns is what ``save()`` returns."""
    mediator = running_mediator()
    if mediator is None and not isinstance(value, (list, dict)):
        return _mark(value)
    if isinstance(value, Envoy) and hasattr(type(value), "_expect"):  # a place of this package's
        raise SiteValueError(f"{public_path(value.path)} is a place: save its value, with .output.save()")
    place = None if mediator is None else mediator.__dict__.get(PLACE)
    if isinstance(value, (list, tuple, dict)):
        _mark(value)
        _local.containers = [*saved_containers(), (value, 0)]
        if place is not None:
            settle(place)
    elif isinstance(value, Tensor) and place is not None:
        _mark(value)  # by a name that it has already it is returned, too
        value = place.save(value, names_of(value, sys._getframe(1)))
    if mediator is not None and place is not None and needs_guard(place):
        open_guard(mediator)
    return _mark(value)


nnsight_tracer.mark = mark


def is_saved(value: Any) -> bool:
    """Whether a value was saved in the traces that are running."""
    return id(value) in nnsight_tracer._saves()


def saved_containers() -> list[tuple[Any, int]]:
    """The lists and dictionaries that were saved in the traces that are running."""
    if _local.containers:
        _local.containers = [entry for entry in _local.containers if is_saved(entry[0])]
    return _local.containers


def names_of(value: Any, frame: FrameType | None) -> list[str]:
    """The names that a value has in the code that a worker runs: in a frame, and in those that called it."""
    found = []
    while frame is not None:
        if frame.f_globals.get("__name__") != nnsight_tracer.__name__:
            found += [name for name, other in frame.f_locals.items() if other is value]
        frame = frame.f_back
    return found


def rename(names: list[tuple[Tensor, str]], new: Tensor, frame: FrameType | None) -> None:
    """Make the names that tensors have in a frame, and in those that called it, the names of another."""
    while frame is not None and names:
        if frame.f_globals.get("__name__") not in (__name__, nnsight_tracer.__name__):
            here = {name: new for old, name in names if frame.f_locals.get(name) is old}
            if here:
                _mark(new)  # as the name may be all that the user has of what was saved
                push(frame, here)
        frame = frame.f_back


def settle(place: Place) -> None:
    """Keep what was put into saved lists and dictionaries since the last look at them.

    Short ones are looked at as a whole, as an entry may have been overwritten.
    """
    settled = []
    for container, seen in saved_containers():
        start = 0 if len(container) <= SHORT else seen
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(itertools.islice(keys, start, None)):
            kept = keep_in(container[key], place)
            if kept is not container[key] and not isinstance(container, tuple):
                container[key] = kept
        settled.append((container, len(container)))
    _local.containers = settled


def keep_in(entry: Any, place: Place) -> Any:
    """An entry of a saved container, in which parts of what was read at a place are copies."""
    if isinstance(entry, Tensor):
        return entry if memory_of(entry) in place.copies else place.save(entry)
    if type(entry) in (list, tuple):
        kept = [keep_in(part, place) for part in entry]
        same = all(one is other for one, other in zip(kept, entry, strict=True))
        if not same and isinstance(entry, list):
            entry[:] = kept
        return entry if same or isinstance(entry, list) else tuple(kept)
    if type(entry) is dict:
        entry.update({key: keep_in(part, place) for key, part in entry.items()})
    return entry


def running_mediator() -> Mediator | None:
    """The mediator of the running worker, or ``None`` outside of one."""
    reference = getattr(getcurrent(), "mediator", None)
    return None if reference is None else reference()
