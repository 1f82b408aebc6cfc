"""A saved value is never changed by a later edit.

nnsight hands out the run's own tensor, and every read of a place hands out the same one. So in

    y = model.layers[1].ssm.y.output
    clean = y.save()
    y[:] = 0

``y``, ``clean`` and the run's value are one tensor, and plain nnsight would zero what was saved. Here a saved
value is copied when somebody writes to it. From a save until the worker's next request, a `Guard` looks at
each function of PyTorch that the worker calls. If a function would write to what was saved, it writes to a
copy instead; the run continues with that copy, and ``y``, which was the name of the value before it was
saved, becomes the name of the copy. If nothing is written nothing is copied, and a saved value has the
gradient of its place. If no gradient is recorded, a value that already has a name is copied when it is saved,
so that nothing that is done to the name later can reach what was saved.

So an in-place edit always reaches the run, even an edit of a saved value, and never what was saved. A saved
list or dictionary keeps the values that were put into it.

All values are saved by ``nnsight.tracing.tracer.mark``; this module puts its own function in that place. It
changes nothing for models other than this package's.
"""

from __future__ import annotations

import dis
import itertools
import sys
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.barrier import Barrier
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.tracing import tracer as nnsight_tracer
from nnsight.tracing.tracer import Tracer
from nnsight.util import apply
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import SiteValueError
from ..names import public_path
from .served import GUARD, SERVED, Served, end_borrowing, local, names_of, nnsight_mark, served_to
from .unsaved import watched
from .views import overlap, same_view, tensors_of

#: Saved containers with at most this many entries are searched as a whole each time.
SHORT = 64

#: Functions that let memory be written without PyTorch, so that a call of one counts as a write.
ESCAPES = frozenset("numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage set_ resize_".split())
#: The first operator of a BINARY_OP that assigns: ``+=``.
FIRST_INPLACE = 13
#: Functions whose names end like those of writing functions, but which write to no memory.
HARMLESS = frozenset("requires_grad_ detach_ share_memory_ rename_ retain_grad".split())


class Guard(TorchFunctionMode):
    """Redirects the writes of one worker to memory in which nothing is saved.

    Args:
        served: what the worker was served last.
    """

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served
        self.busy = False
        self.worker = weakref.ref(getcurrent())

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        targets = [] if self.busy else written(func, args, kwargs)
        if not targets or not self.in_worker():
            return func(*args, **kwargs)
        self.busy = True
        try:
            settle(self.served)
            moves = [(target, self.served.writable(target)) for target in targets]
        finally:
            self.busy = False
        moves = [(target, other) for target, other in moves if other is not target]

        def move(value: Any) -> Any:
            return next((other for target, other in moves if target is value), value)

        if "out" in kwargs:
            kwargs = {**kwargs, "out": apply(kwargs["out"], move, Tensor)}
        else:
            first = apply(args[0], move, Tensor) if isinstance(args[0], (list, tuple)) else move(args[0])
            args = (first, *args[1:])
        result = func(*args, **kwargs)
        # ``saved *= 2`` arrives here as ``mul_``, and binds its result to the name of what was saved.
        renamed = moves and is_saved(targets[0]) and is_augmented_assignment(sys._getframe(1))
        return nnsight_mark(result) if renamed else result

    def in_worker(self) -> bool:
        """Whether the guarded worker runs, or a block in it; in NDIF's sandbox the process also packs what it sends."""
        running, worker = getcurrent(), self.worker()
        while running is not None and running is not worker:
            running = running.parent
        return running is not None


def is_augmented_assignment(frame: FrameType) -> bool:
    """Whether a frame is at an instruction such as ``a *= b``."""
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] >= FIRST_INPLACE)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of a PyTorch function writes to, or may let somebody write to."""
    if "out" in kwargs:
        return tensors_of(kwargs["out"])
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    by_data = name in ("__get__", "__set__") and getattr(func, "__self__", None) is Tensor.data
    if not (in_place or by_data or name == "__setitem__" or name in ESCAPES or kwargs.get("inplace")):
        return []
    return tensors_of(list(args[0]) if name.startswith("_foreach_") else args[:1])


# -- when a guard is active: from a save to the worker's next request ---------------------------------------


def watch(mediator: Mediator, served: Served) -> None:
    """Remember what a worker is handed, and guard what was saved of it before."""
    earlier = served_to(mediator)
    if earlier is not None and earlier.visit == served.visit and not earlier.assigned:
        pairs = list(zip(earlier.tensors, served.tensors, strict=False))
        if len(pairs) == len(served.tensors) and all(same_view(old, new) for old, new in pairs):
            served = earlier
    mediator.__dict__[SERVED], served.request = served, mediator.pending
    for other in mediator.interleaver.mediators:
        theirs = None if other is mediator else served_to(other)
        for saved, tensor in itertools.product(theirs.saved if theirs else (), served.tensors):
            if overlap(saved, tensor):
                served.protect(tensor)
    reference = weakref.ref(mediator)

    def flush() -> None:  # nnsight calls it before each request and at the end of the block, nowhere else
        worker = reference()
        assert worker is not None
        move_on(worker)

    mediator.__dict__["flush"] = flush
    guard_if_needed(mediator)


def move_on(mediator: Mediator) -> None:
    """What happens when a worker makes a request, or its block ends: the model may go on."""
    guard, served = mediator.__dict__.get(GUARD), served_to(mediator)
    if guard is not None and guard.busy:  # the guard's own requests leave it active
        return
    end_guard(mediator)
    if served is not None:
        try:
            served.check_forms()
        except BaseException:  # the block may catch it, and go on
            guard_if_needed(mediator)
            raise
    type(mediator).flush(mediator)


def guard_if_needed(mediator: Mediator) -> None:
    """Activate a guard until the worker's next request, if a write may have to be redirected until then."""
    served = served_to(mediator)
    if served is None or mediator.__dict__.get(GUARD) is not None:
        return
    if not (served.needs_guard() or saved_containers()):
        return
    guard = Guard(served)
    guard.__enter__()
    local.guards.append(guard)
    mediator.__dict__[GUARD] = guard


def end_guard(mediator: Mediator) -> None:
    """Deactivate a worker's guard."""
    guard = mediator.__dict__.pop(GUARD, None)
    if guard is not None and guard in local.guards:
        _leave_guards(len(local.guards) - 1)


def _leave_guards(remaining: int) -> None:
    # Workers that ended in an exception have left their guards active: deactivate all but the first ones.
    while len(local.guards) > remaining:
        local.guards.pop().__exit__(None, None, None)


def assigned(location: str) -> None:
    """Note that the running worker has assigned a value to the place that it was last served."""
    mediator = Mediator.current(location)
    if (served := served_to(mediator)) is not None:
        served.assigned = True
        guard_if_needed(mediator)


class ForgettingTracer(Tracer):
    """A tracer after which whoever saved a list or a dictionary is alone in holding it."""

    def __exit__(self, *raised: Any) -> bool:
        try:
            return super().__exit__(*raised)
        finally:
            saved_containers()


class GuardedTracer(ForgettingTracer, InterleavingTracer):
    """nnsight's tracer, which also deactivates guards that its workers left active where they ended."""

    def execute(self, code: CodeType) -> None:
        """Run the block as nnsight does."""
        before = len(local.guards)
        try:
            with watched():
                super().execute(code)
        finally:
            _leave_guards(before)
            end_borrowing()

    def barrier(self, n: int) -> Barrier:
        """A meeting point for ``n`` of this trace's blocks, as nnsight's."""
        return GuardedBarrier(n)


class GuardedBarrier(Barrier):
    """nnsight's barrier, at which other workers and the model run without this worker's guard."""

    def __call__(self) -> None:
        mediator = Mediator.current("tracer.barrier()")
        end_guard(mediator)
        super().__call__()
        guard_if_needed(mediator)


# -- saving --------------------------------------------------------------------------------------------------


def mark(value: Any) -> Any:
    """nnsight's ``mark``, which saves every value; ``save()`` returns what this returns."""
    reference = getattr(getcurrent(), "mediator", None)
    mediator: Mediator | None = None if reference is None else reference()
    if mediator is None and not isinstance(value, (list, dict)):
        return nnsight_mark(value)
    if isinstance(value, Envoy) and hasattr(type(value), "_expect"):  # a place of this package
        raise SiteValueError(f"{public_path(value.path)} is a place: save its value, with .output.save()")
    served = served_to(mediator)
    if isinstance(value, (list, tuple, dict)):
        nnsight_mark(value)
        local.containers = [*saved_containers(), (value, 0)]
        if served is not None:
            settle(served)
    elif isinstance(value, Tensor) and served is not None:
        nnsight_mark(value)  # the value is also returned under any name that it already has
        value = served.save(value, names_of(value, sys._getframe(1)))
    if mediator is not None:
        guard_if_needed(mediator)
    return nnsight_mark(value)


nnsight_tracer.mark = mark


def is_saved(value: Any) -> bool:
    """Whether a value was saved in the traces that are running."""
    return id(value) in nnsight_tracer._saves()


def saved_containers() -> list[tuple[Any, int]]:
    """The lists and dictionaries that were saved in the traces that are running."""
    if local.containers:
        local.containers = [entry for entry in local.containers if is_saved(entry[0])]
    return local.containers


def settle(served: Served) -> None:
    """Keep from later writes what was put into saved lists and dictionaries since the last call.

    Short containers are searched as a whole, as an entry may have been overwritten.
    """
    settled = []
    for container, seen in saved_containers():
        start = 0 if len(container) <= SHORT else seen
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(itertools.islice(keys, start, None)):
            kept = served.keep(container[key])
            if kept is not container[key] and not isinstance(container, tuple):
                container[key] = kept
        settled.append((container, len(container)))
    local.containers = settled
