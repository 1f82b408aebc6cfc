"""A saved value is never changed by a later edit.

nnsight hands out the run's own tensor, and every read of a place hands out the same one. So in

    y = model.layers[1].ssm.y.output
    clean = y.save()
    y[:] = 0

all three are one tensor, and plain nnsight would zero what was saved. Here a saved value is copied when
somebody writes to it: from ``save()`` until the worker asks for something else, a `Guard` looks at each
function of PyTorch's that the worker calls. One that writes to saved memory writes to a copy instead, and the
run goes on with the copy. Where nothing is written, which is the usual case, nothing is copied, and a saved
value, a second read and the run's own value are one tensor with one gradient.

What is saved of a part of a value, such as ``y[:, -1].save()``, is a copy from the start; an edit of that in
place reaches the run, too. A saved list or dictionary keeps what was put into it.

The facts about nnsight 0.8 this module rests on, each held by a test in tests/test_demand.py: ``save``
returns what ``nnsight.tracing.tracer.mark`` returns; a worker calls ``mediator.flush()`` before each request
and at the end of its block, and nowhere else.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from greenlet import getcurrent
from nnsight.intervention.barrier import Barrier
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.tracing import tracer as nnsight_tracer
from nnsight.util import apply
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import SiteValueError
from ..names import public_path

#: On a worker's mediator: the place that it was last served, and the guard that is on duty.
PLACE, GUARD = "_mamba_trace_place", "_mamba_trace_guard"

#: Functions that let memory be written past PyTorch, and so count as writing.
ESCAPES = frozenset(
    "numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage set_ resize_".split()
)
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
        #: (copy, the part of a tensor that it is a copy of).
        self.copies: list[tuple[Tensor, Tensor]] = []
        #: Whether the worker has assigned something else to the place since.
        self.assigned = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is part of the memory here."""
        held = [*self.tensors, *(old for old, _ in self.retired)]
        return any(same_memory(tensor, other) for other in held)

    def save(self, value: Tensor) -> Tensor:
        """What is saved where a worker saves ``value``: itself, or a copy of a part of the value here."""
        for tensor in self.tensors:  # in a batch each read makes another view of an invoke's rows
            if same_view(value, tensor):
                self.protect(tensor)
                return value
        if not self.holds(value) or any(same_view(value, old) for old, _ in self.retired):
            return value
        copy = value.clone()
        self.copies.append((copy, value))
        return copy

    def protect(self, tensor: Tensor) -> None:
        """Let no more be written to one of the tensors here."""
        if not among(tensor, self.saved):
            self.saved.append(tensor)

    def writable(self, target: Tensor) -> Tensor:
        """Where a write to ``target`` goes: to memory of which nothing was saved."""
        target = next((part for copy, part in self.copies if copy is target), target)
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
        if new.stride() != old.stride():
            raise SiteValueError(
                f"a part of {public_path(self.visit[0])} is edited in place that was saved before: edit "
                f"{public_path(self.visit[0])} itself, or save a copy with .clone().save()"
            )
        offset = target.storage_offset() - old.storage_offset() + new.storage_offset()
        return new.as_strided(target.shape, target.stride(), offset)

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
        else:
            self.tensors = [new if other is tensor else other for other in self.tensors]
        self.saved = [other for other in self.saved if other is not tensor]
        self.retired.append((tensor, new))
        self.record(new)
        return new


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
            args = (move(args[0]), *args[1:])
        result = func(*args, **kwargs)
        # ``saved *= 2``, which arrives here as ``mul_``, binds its result to the name of what was saved.
        renamed = moves and isinstance(result, Tensor) and func.__name__ != "__setitem__"
        return nnsight_tracer.mark(result) if renamed and is_saved(targets[0]) else result


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of a function of PyTorch's writes to, or may let somebody write to."""
    if "out" in kwargs:
        return tensors_of(kwargs["out"])
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    by_data = name in ("__get__", "__set__") and getattr(func, "__self__", None) is Tensor.data
    if not (in_place or by_data or name == "__setitem__" or name in ESCAPES or kwargs.get("inplace")):
        return []
    return [arg for arg in args[:1] if isinstance(arg, Tensor)]


# -- windows: from a save to the worker's next request -------------------------------------------------------


class _Local(threading.local):
    def __init__(self) -> None:
        #: Guards on duty, the innermost last.
        self.guards: list[Guard] = []
        #: Saved lists and dictionaries, and how many of their entries were looked at.
        self.containers: list[tuple[Any, int]] = []


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
    if place.saved or place.retired or place.copies or saved_containers():
        open_guard(mediator)


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
        if place.saved or place.copies:
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

    def barrier(self, n: int) -> Barrier:
        """A meeting point for ``n`` of this trace's blocks, as nnsight's."""
        return GuardedBarrier(n)


class GuardedBarrier(Barrier):
    """nnsight's barrier, at which other workers and the model run without this worker's guard."""

    def __call__(self) -> None:
        mediator = Mediator.current("tracer.barrier()")
        guarded = mediator.__dict__.get(GUARD) is not None
        close_guard(mediator)
        super().__call__()
        if guarded:
            open_guard(mediator)


# -- saving --------------------------------------------------------------------------------------------------

_mark = nnsight_tracer.mark


def mark(value: Any) -> Any:
    """nnsight's ``mark``, by which every value is saved: what it returns is what ``save()`` returns."""
    mediator = running_mediator()
    place = None if mediator is None else mediator.__dict__.get(PLACE)
    if isinstance(value, Tensor):
        if place is None or mediator is None:
            return _mark(value)
        value = place.save(value)
        if place.saved or place.copies:
            open_guard(mediator)
    elif isinstance(value, (list, tuple, dict)):
        _local.containers = [*saved_containers(), (value, 0)]
        if place is not None and mediator is not None:
            settle(place)
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


def settle(place: Place) -> None:
    """Keep what was put into saved lists and dictionaries since the last look at them."""
    settled = []
    for container, seen in saved_containers():
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(itertools.islice(keys, seen, None)):
            entry = container[key]
            if not isinstance(entry, Tensor):
                for tensor in tensors_of(entry):
                    place.save(tensor)
                continue
            kept = place.save(entry)
            if kept is not entry and not isinstance(container, tuple):
                container[key] = kept
        settled.append((container, len(container)))
    _local.containers = settled


def running_mediator() -> Mediator | None:
    """The mediator of the running worker, or ``None`` outside of one."""
    reference = getattr(getcurrent(), "mediator", None)
    return None if reference is None else reference()


# -- tensors -------------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a value that nnsight serves: a tensor, or a container of them."""
    found: list[Tensor] = []
    apply(value, lambda tensor: found.append(tensor) or tensor, Tensor)  # type: ignore[func-returns-value]
    return found


def among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a tensor is one of others, the same object."""
    return any(tensor is other for other in others)


def same_view(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same part of one storage in the same way."""
    if tensor is other:
        return True
    shape = tensor.shape == other.shape and tensor.stride() == other.stride()
    return shape and tensor.storage_offset() == other.storage_offset() and same_memory(tensor, other)


def overlap(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    (first, last), (start, end) = span(tensor), span(other)
    return first <= end and start <= last and same_memory(tensor, other)


def span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element of its storage that a tensor shows."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + sum(int((size - 1) * stride) for size, stride in steps)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has a storage that can be looked at: one in a transform of torch.func has not."""
    return tensor.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are parts of one storage."""
    if not (has_memory(tensor) and has_memory(other)):
        return tensor is other
    with torch._C.DisableTorchFunction():  # a guard on duty would take the look for an escape
        return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
