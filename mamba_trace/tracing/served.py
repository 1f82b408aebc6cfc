"""What a worker was served at one place, which parts of it were saved, and where later writes to it go."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent
from nnsight.intervention.interleaver import Mediator
from nnsight.tracing import tracer as nnsight_tracer
from nnsight.tracing.util import push
from nnsight.util import apply
from torch import Tensor

from ..errors import SiteValueError
from ..names import public_path
from .views import form_of, memory_of, same_memory, same_part, same_view, tensors_of

#: The name under which a worker's mediator keeps the `Served` of the worker's last read.
SERVED = "_mamba_trace_served"
#: The name under which it keeps the worker's guard (`saving.Guard`).
GUARD = "_mamba_trace_guard"

#: nnsight's own ``mark``; `saving` puts another function in its place.
nnsight_mark = nnsight_tracer.mark


class _Local(threading.local):
    def __init__(self) -> None:
        #: The guards that are active (`saving.Guard`), the innermost last.
        self.guards: list[Any] = []
        #: Saved lists and dictionaries, and how many of their entries `saving.settle` has seen.
        self.containers: list[tuple[Any, int]] = []
        #: Copies that use ``register_hook`` of what they were copied from, as long as the trace runs.
        self.borrowers: list[weakref.ref[Tensor]] = []
        #: Whether a trace of this package hands over what its blocks have bound (`unsaved`).
        self.watched = False


#: What the traces that are running in this thread have saved.
local = _Local()


class Served:
    """What one worker was served in one visit of one place, and what was saved of it.

    Args:
        visit: the location, and how often the worker's run had come to it before.
        value: what the worker was served: a tensor, or a container of tensors.
        rebuild, extract: as for `keep_apart`.
        record: called with each tensor that takes the place of another.
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
        #: The form of each of ``tensors``, on which the model counts when it goes on.
        self.forms = [form_of(tensor) for tensor in self.tensors]
        #: The members of ``tensors`` that were saved.
        self.saved: list[Tensor] = []
        #: (tensor, the tensor that has taken its place), in the order in which that happened.
        self.retired: list[tuple[Tensor, Tensor]] = []
        #: (copy, the part of a tensor that was copied), by the memory of the copy, as there may be many.
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        #: (tensor, a name that it had before it was saved).
        self.names: list[tuple[Tensor, str]] = []
        #: Whether the worker has since assigned another value to the place.
        self.assigned = False
        #: The worker's request that was answered with this.
        self.request: Any = None

    def check_forms(self) -> None:
        """Refuse an edit in place that has made another shape or dtype of what was read here.

        Raises:
            SiteValueError: with both shapes; the run has not gone on with it.
        """
        for tensor, (shape, dtype, _) in zip(self.tensors, self.forms, strict=True):
            if form_of(tensor) != (shape, dtype, True):
                place, _, key = self.visit[0].rpartition(".")
                asked, before = f"{public_path(place)}.{key}", f"{tuple(shape)} of {dtype}"
                now = f"{tuple(tensor.shape)} of {tensor.dtype}"
                made = "lose its memory" if now == before else now
                raise SiteValueError(
                    f"{asked} was {before}, and an edit in place made it {made}. The model goes on with "
                    f"this very tensor: edit its numbers alone, and reshape a copy, {asked}.clone()"
                )

    def needs_guard(self) -> bool:
        """Whether a write to what was read here may have to be redirected."""
        return bool(self.saved or self.retired or self.copies)

    def save(self, value: Tensor, names: Sequence[str] = ()) -> Tensor:
        """What is saved where a worker saves ``value``: the value itself, or a copy.

        Args:
            value: a value that was read here, a part of it, or anything else.
            names: the names that the worker already has for it.
        """
        whole = next((tensor for tensor in self.tensors if same_view(value, tensor)), None)
        if whole is not None and (value.requires_grad or not names):
            if not any(whole is other for other in self.saved):  # later it also has the name that it was saved under
                self.names += [(value, name) for name in names]
            self.protect(whole)
            return value
        held = any(same_memory(value, tensor) for tensor in self.tensors)
        held = held or any(same_memory(value, old) for old, _ in self.retired)
        if not held or any(same_view(value, old) for old, _ in self.retired):
            return value
        copy = value.clone(memory_format=torch.contiguous_format)
        if value.requires_grad:
            # nnsight asks the saved tensor for its gradient, which only the original has.
            copy.register_hook = value.register_hook  # type: ignore[method-assign]
            local.borrowers.append(weakref.ref(copy))
        self.copies[memory_of(copy)] = (copy, value)
        return copy

    def keep(self, entry: Any) -> Any:
        """An entry of a saved container, with copies in place of any parts of what was read here."""
        if isinstance(entry, Tensor):
            return entry if memory_of(entry) in self.copies else self.save(entry)
        if type(entry) in (list, tuple):
            kept = [self.keep(part) for part in entry]
            same = all(after is before for after, before in zip(kept, entry, strict=True))
            if not same and isinstance(entry, list):
                entry[:] = kept
            return entry if same or isinstance(entry, list) else tuple(kept)
        if type(entry) is dict:
            entry.update({key: self.keep(part) for key, part in entry.items()})
        return entry

    def protect(self, tensor: Tensor) -> None:
        """Allow no further writes to one of the tensors here."""
        if not any(tensor is other for other in self.saved):
            self.saved.append(tensor)

    def writable(self, target: Tensor) -> Tensor:
        """The tensor to write to instead of ``target``: one in whose memory nothing is saved."""
        if (copied := self.copies.get(memory_of(target))) is not None:
            target = self.moved(target, *copied)
        for old, new in self.retired:
            if same_memory(target, old):
                target = self.moved(target, old, new)
        for tensor in self.saved:
            if same_memory(target, tensor):
                return self.moved(target, tensor, self.renew(tensor))
        return target

    def moved(self, target: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The view of ``new`` that corresponds to ``target``, a view of ``old``."""
        if same_view(target, old):
            return new
        part = same_part(target, old, new)
        if part is None:
            path = public_path(self.visit[0])
            raise SiteValueError(
                f"{path} is edited in place through a view that is not a slice of it, and was saved before: "
                f"edit {path} itself, or save a copy with .clone().save()"
            )
        return part

    def renew(self, tensor: Tensor) -> Tensor:
        """Let the run continue with a copy of ``tensor``, so that ``tensor`` itself stays as it was saved."""
        index = next(number for number, other in enumerate(self.tensors) if other is tensor)
        new = tensor.clone()
        location, occurrence = self.visit
        if Mediator.current(location).occurrence(location) == occurrence and not self.assigned:
            replaced = apply(self.value, lambda other: new if other is tensor else other, Tensor)
            Mediator.swap(location, self.rebuild(replaced))
            self.value = self.extract(Mediator.value(location))  # in a batch, this worker's rows
            self.request = Mediator.current(location).pending
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


def still_there(location: str) -> Served | None:
    """What the running worker was served last, if that is what a request for ``location`` would give it again.

    It is where the worker has neither assigned to the place nor asked for anything since: the model stands still.
    """
    reference = getattr(getcurrent(), "mediator", None)
    mediator = None if reference is None else reference()
    served = served_to(mediator)
    if mediator is None or served is None or served.assigned or served.visit[0] != location:
        return None
    if served.request is None or served.request is not mediator.pending or mediator.transform is not None:
        return None
    # What autograd knows of a view may be out of date once a part of it was edited; `register_hook` crashes then.
    if any(tensor.requires_grad and tensor._base is not None for tensor in served.tensors):
        return None
    return served if served.visit[1] == mediator.wanted(location) else None


def served_to(mediator: Mediator | None) -> Served | None:
    """What the worker of a mediator was served last, if anything."""
    return None if mediator is None else mediator.__dict__.get(SERVED)


def retire_for_others(location: str, old: Tensor, new: Tensor) -> None:
    """Tell the workers of other invokes that the run has continued with another batch than they hold rows of.

    Args:
        location: where they were served.
        old, new: the running worker's rows of the earlier batch and of the new one.
    """
    mediator = Mediator.current(location)
    batcher = mediator.interleaver.batcher
    if batcher is None or not batcher.batching or new._base is None:
        return
    for other in mediator.interleaver.mediators:
        served = None if other is mediator else served_to(other)
        if served is None or served.visit[0] != location or other.batch_group is None:
            continue
        rows = batcher.narrow(new._base, other.batch_group)
        for number, tensor in enumerate(served.tensors):
            if same_memory(tensor, old) and tensor.shape == rows.shape:
                served.retired.append((tensor, rows))
                served.tensors[number] = rows


# -- the names that a worker's code has for a tensor ---------------------------------------------------------


def names_of(value: Any, frame: FrameType) -> list[str]:
    """The names that a value has in the code that a worker runs: in a frame and in its callers."""
    return [name for code in _users(frame) for name, other in code.f_locals.items() if other is value]


def rename(names: list[tuple[Tensor, str]], new: Tensor, frame: FrameType) -> None:
    """Make names that stand for tensors, in a frame and in its callers, stand for ``new`` instead."""
    for code in _users(frame) if names else ():
        here = {name: new for old, name in names if code.f_locals.get(name) is old}
        if here:
            nnsight_mark(new)  # the name may be all that the user has of what was saved
            push(code, here)


def _users(frame: FrameType | None) -> Iterator[FrameType]:
    # A frame and its callers, without the machinery of saving, this package's and nnsight's.
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name != nnsight_tracer.__name__ and not name.startswith(f"{__package__}."):
            yield frame
        frame = frame.f_back


def end_borrowing() -> None:
    """At the end of a trace: give the copies that were saved back their own ``register_hook``."""
    for reference in local.borrowers:
        if (borrower := reference()) is not None:
            del borrower.__dict__["register_hook"]
    local.borrowers.clear()
