"""Tensors as parts of memory: which are the same part, which overlap, and where a part is in a copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nnsight.util import apply
from torch import Tensor


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


def same_part(target: Tensor, old: Tensor, new: Tensor) -> Tensor | None:
    """The part of ``new`` that ``target`` is of ``old``, a tensor of the same shape in another layout.

    Returns:
        A view of ``new``, or ``None`` where ``target`` is no slice of ``old``, its axes in whatever order.
    """
    axes = sorted((axis for axis in range(old.dim()) if old.shape[axis] > 1), key=old.stride, reverse=True)
    rest = int(target.storage_offset()) - int(old.storage_offset())
    offset = int(new.storage_offset())
    for axis in axes:
        index, rest = divmod(rest, old.stride(axis))
        offset += index * new.stride(axis)
    strides = []
    for size, stride in zip(target.shape, target.stride(), strict=True):
        fitting = (
            axis
            for axis in axes
            if stride and not stride % old.stride(axis)
            if (size - 1) * (stride // old.stride(axis)) < old.shape[axis]
        )
        found = next(fitting, None)
        if found is None and size != 1:
            return None
        strides.append(1 if found is None else stride // old.stride(found) * new.stride(found))
    return None if rest else new.as_strided(target.shape, strides, offset)


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
    return tensor is other or (memory_of(tensor) == memory_of(other) != 0)


def memory_of(tensor: Tensor) -> int:
    """What tells the storage of a tensor from others as long as it is there; 0 where it has none."""
    if not has_memory(tensor):
        return 0
    with torch._C.DisableTorchFunction():  # a guard on duty would take the look for an escape
        return int(tensor.untyped_storage()._cdata)
