"""Memory that a trace was handed at one place is not handed out again at another.

Two places of a model may hold one tensor: the final norm's output is lm_head's input. An edit in place of the
second would change what was read at the first. So the first read of a place whose memory was already handed
out elsewhere gets a copy, and the run goes on with that copy. Further reads of the same place, in the same
visit, get the same tensor, as in nnsight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from greenlet import greenlet
from nnsight.intervention.interleaver import Mediator
from nnsight.util import apply
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .saving import Place, watch
from .views import among, has_memory, span, tensors_of

#: One visit of one place: its location, and how often the worker's run had come to it before.
Visit = tuple[str, int]


class HandedOut:
    """The memory that the workers of one run were handed, and at which place."""

    def __init__(self) -> None:
        # The weak reference keeps the storage's address from being used again.
        self.ranges: dict[int, tuple[StorageWeakRef, dict[tuple[int, int, Visit], None]]] = {}

    def record(self, value: Tensor, visit: Visit) -> bool:
        """Remember the memory of ``value``; say whether any of it was handed out at another visit."""
        if not has_memory(value) or not value.numel():
            return False
        first, last = span(value)
        storage = StorageWeakRef(value.untyped_storage())
        _, ranges = self.ranges.setdefault(storage.cdata, (storage, {}))
        if (first, last, visit) in ranges:
            return False
        elsewhere = any(first <= end and start <= last for start, end, other in ranges if other != visit)
        ranges[first, last, visit] = None
        return elsewhere


#: By the first worker of a run. Kept here and not on the interleaver, which is copied with its model: a copy
#: of a weak reference to a storage would give back what it never took.
_RUNS: weakref.WeakKeyDictionary[greenlet, HandedOut] = weakref.WeakKeyDictionary()


def keep_apart(
    location: str,
    value: Any,
    rebuild: Callable[[Any], Any] = lambda value: value,
    extract: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """What to hand out for a read of ``value``: itself, or a copy that the run goes on with.

    Args:
        location: where the running worker read it.
        value: a tensor, or a container of tensors, that was served there.
        rebuild: makes what stands at the location from something in the place of ``value``.
        extract: the opposite: finds ``value`` in what stands at the location.
    """
    mediator = Mediator.current(location)
    handed_out = _handed_out_in(mediator.interleaver)
    visit = (location, mediator.occurrence(location))
    shared = [tensor for tensor in tensors_of(value) if handed_out.record(tensor, visit)]
    if shared:
        own = apply(value, lambda tensor: tensor.clone() if among(tensor, shared) else tensor, Tensor)
        Mediator.swap(location, rebuild(own))
        value = extract(Mediator.value(location))  # in a batch of invokes, this worker's rows of it
        for tensor in tensors_of(value):
            handed_out.record(tensor, visit)
    watch(mediator, Place(visit, value, rebuild, extract, lambda tensor: handed_out.record(tensor, visit)))
    return value


def _handed_out_in(interleaver: Any) -> HandedOut:
    # Every run starts its workers anew.
    return _RUNS.setdefault(interleaver.mediators[0].worker, HandedOut())
