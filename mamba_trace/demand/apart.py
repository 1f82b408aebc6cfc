"""A saved value is never changed by a later edit.

nnsight hands out the run's own tensor, every time the same. So ``clean = site.output.save()`` followed by
``site.output[:] = 0`` would zero ``clean`` too, and so would an edit of another location that shares its
memory. Nothing says which of the tensors handed out were saved, in whole, in part or in a list, so a
further read of memory that was already handed out gets a copy of it, and the run goes on with whatever was
edited in any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from nnsight.intervention.eproperty import WriteBack
from nnsight.intervention.interleaver import Mediator
from nnsight.util import apply
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import SiteValueError
from ..names import public_path

#: Which memory a run has handed out, kept on its interleaver: (run, {storage: [(first, last) byte]}).
SERVED = "_mamba_trace_served"
#: What one worker has read at one visit, kept on the worker: (visit, [(tensor, contents when last seen)]).
HANDLES = "_mamba_trace_handles"


#: Storage -> a weak reference, which keeps its address from being used again, and the ranges handed out.
Served = dict[int, tuple[StorageWeakRef, list[tuple[int, int]]]]


def keep_apart(location: str, value: Any, rebuild: Callable[[Tensor], Any] = lambda tensor: tensor) -> Any:
    """What to hand out for a read of ``value``: itself, or a copy that the run goes on with.

    Args:
        location: where the running worker read it.
        value: what nnsight served there: a tensor, or a container of tensors.
        rebuild: makes what stands at the location of a tensor in the place of ``value``.

    Raises:
        SiteValueError: when the worker moves on, if two tensors read here were edited in place to disagree.
    """
    mediator = Mediator.current(location)
    served = _served_in_this_run(mediator.interleaver)
    if not isinstance(value, Tensor):
        return _keep_parts_apart(location, served, value)
    if not _record(served, value):
        return value
    copy = value.clone()
    _record(served, copy)
    visit = (location, mediator.occurrence(location))
    earlier = mediator.__dict__.get(HANDLES)
    handles = [] if earlier is None or earlier[0] != visit else earlier[1]
    if all(handle is not value for handle, _ in handles):
        handles.append((value, value.detach().clone()))
    handles.append((copy, copy.detach().clone()))

    def carry_on() -> Any:
        mediator.__dict__[HANDLES] = (visit, [(handle, handle.detach().clone()) for handle, _ in handles])
        return rebuild(_merge(public_path(location), handles))

    # nnsight swaps the result in as soon as the worker asks for anything else, or ends.
    mediator.transform = WriteBack(carry_on, copy, None, location, mediator.wanted(location))
    return copy


def _keep_parts_apart(location: str, served: Served, value: Any) -> Any:
    # A container of tensors, such as a model's output: the run goes on with the one that is handed out.
    copied = []

    def part(tensor: Tensor) -> Tensor:
        if not _record(served, tensor):
            return tensor
        copied.append(tensor.clone())
        _record(served, copied[-1])
        return copied[-1]

    fresh = apply(value, part, Tensor)
    if copied:
        Mediator.swap(location, fresh)
    return fresh if copied else value


def _merge(path: str, handles: list[tuple[Tensor, Tensor]]) -> Tensor:
    # The last handle, with every edit that was made in place of an earlier one.
    merged, contents = handles[-1]
    if isinstance(merged, FakeTensor):  # has no contents to compare
        return merged
    taken = _changed(merged, contents)
    for handle, contents in handles[:-1]:
        changed = _changed(handle, contents)
        if not bool(changed.any()):
            continue
        if bool((changed & taken & _changed(handle, merged)).any()):
            raise SiteValueError(
                f"{path} was read more than once, and two of the values were edited in place to disagree: "
                f"edit one of them"
            )
        merged, taken = torch.where(changed, handle, merged), taken | changed
    return merged


def _changed(value: Tensor, contents: Tensor) -> Tensor:
    # Where contents differ; NaN is equal to NaN.
    value, contents = value.detach(), contents.detach()
    return (value != contents) & ~(value.isnan() & contents.isnan())


def version(value: Tensor) -> int | None:
    """How often a tensor was edited in place; ``None`` where PyTorch does not count (inference mode)."""
    return None if value.is_inference() else value._version


def _served_in_this_run(interleaver: Any) -> Served:
    # Every run starts its workers anew.
    worker = interleaver.mediators[0].worker
    run, served = interleaver.__dict__.get(SERVED, (None, {}))
    if run is None or run() is not worker:
        served = {}
        interleaver.__dict__[SERVED] = (weakref.ref(worker), served)
    return served


def _record(served: Served, value: Tensor) -> bool:
    # Remember the memory of `value`; say whether any of it was handed out before.
    first = int(value.storage_offset())
    last = first + sum(
        int((size - 1) * stride) for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    storage = StorageWeakRef(value.untyped_storage())
    _, ranges = served.setdefault(storage.cdata, (storage, []))
    overlap = any(first <= end and start <= last for start, end in ranges)
    ranges.append((first, last))
    return overlap and value.numel() > 0
