"""Memory that a trace was handed at one place is not handed out again at another place.

Two places of a model may hold one tensor: the final norm's output is lm_head's input. An in-place edit of the
second would change what was read at the first. So the first read of a place whose memory was already handed
out elsewhere returns a copy, and the run continues with that copy. Later reads of the same place, in the same
visit, return the same tensor, as in nnsight.
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

from .saving import watch
from .served import Served
from .views import has_memory, span, tensors_of


class HandedOut:
    """The memory that the workers of one run were handed, and in which visit of which location."""

    def __init__(self) -> None:
        # By the address of a storage; the weak reference keeps that address from being used again.
        self.ranges: dict[int, tuple[StorageWeakRef, dict[tuple[int, int, tuple[str, int]], None]]] = {}

    def record(self, value: Tensor, visit: tuple[str, int]) -> bool:
        """Remember the memory of ``value``; return whether another visit was handed any of it."""
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


#: By the first worker of a run. This is not kept on the interleaver, which is copied with its model: the copy
#: of a weak reference to a storage would release the storage a second time.
_RUNS: weakref.WeakKeyDictionary[greenlet, HandedOut] = weakref.WeakKeyDictionary()


def keep_apart(
    location: str,
    value: Any,
    rebuild: Callable[[Any], Any] = lambda value: value,
    extract: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """What a read of ``value`` returns: the value itself, or a copy that the run continues with.

    Args:
        location: where the running worker read it.
        value: a tensor, or a container of tensors, that was served there.
        rebuild: turns a replacement for ``value`` into the whole value at the location.
        extract: the opposite: picks ``value`` out of the whole value at the location.
    """
    mediator = Mediator.current(location)
    handed_out = _RUNS.setdefault(mediator.interleaver.mediators[0].worker, HandedOut())
    visit = (location, mediator.occurrence(location))
    shared = {id(tensor) for tensor in tensors_of(value) if handed_out.record(tensor, visit)}
    if shared:
        own = apply(value, lambda tensor: tensor.clone() if id(tensor) in shared else tensor, Tensor)
        Mediator.swap(location, rebuild(own))
        value = extract(Mediator.value(location))  # in a batch of invokes, this worker's rows of it
        for tensor in tensors_of(value):
            handed_out.record(tensor, visit)
    watch(mediator, Served(visit, value, rebuild, extract, lambda tensor: handed_out.record(tensor, visit)))
    return value
