"""Tensors as parts of memory: which share memory, and which part of a copy is which part of the original."""

from __future__ import annotations

from typing import Any

import torch
from nnsight.util import apply
from torch import Tensor

#: What a tensor is beside its numbers: its shape and dtype, and whether its storage still holds all of them.
Form = tuple[torch.Size, torch.dtype, bool]


def form_of(tensor: Tensor) -> Form:
    """The form of a tensor, which editing its numbers in place does not change."""
    if not has_memory(tensor) or not tensor.numel():
        return tensor.shape, tensor.dtype, True
    with torch._C.DisableTorchFunction():  # a `Guard` would take this for an attempt to write to the memory
        there = tensor.untyped_storage().nbytes()
    return tensor.shape, tensor.dtype, bool((span(tensor)[1] + 1) * tensor.itemsize <= there)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value that nnsight serves: a tensor, or a container of tensors."""
    tensors: list[Tensor] = []
    apply(value, lambda tensor: tensors.append(tensor) or tensor, Tensor)  # type: ignore[func-returns-value]
    return tensors


def same_view(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same part of one storage in the same way."""
    if tensor is other:
        return True
    shape = tensor.shape == other.shape and tensor.stride() == other.stride()
    return shape and tensor.storage_offset() == other.storage_offset() and same_memory(tensor, other)


def same_part(target: Tensor, old: Tensor, new: Tensor) -> Tensor | None:
    """The part of ``new`` that ``target`` is of ``old``; ``new`` has the shape of ``old``, in another layout.

    Returns:
        A view of ``new``; ``None`` if ``target`` is not a slice of ``old``, with its axes in any order.
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
        axis_of_old = next(fitting, None)
        if axis_of_old is None and size != 1:
            return None
        strides.append(1 if axis_of_old is None else stride // old.stride(axis_of_old) * new.stride(axis_of_old))
    return None if rest else new.as_strided(target.shape, strides, offset)


def overlap(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    (first, last), (start, end) = span(tensor), span(other)
    return first <= end and start <= last and same_memory(tensor, other)


def span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element of its storage that a tensor shows."""
    first = int(tensor.storage_offset())
    if tensor.is_contiguous():
        return first, first + int(tensor.numel()) - 1
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + sum(int((size - 1) * stride) for size, stride in steps)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has a storage to look at; a tensor in a transform of torch.func does not."""
    return tensor.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are parts of one storage."""
    return tensor is other or (memory_of(tensor) == memory_of(other) != 0)


def memory_of(tensor: Tensor) -> int:
    """A number that identifies the tensor's storage as long as the storage exists; 0 if it has none."""
    if not has_memory(tensor):
        return 0
    with torch._C.DisableTorchFunction():  # a `Guard` would take this for an attempt to write to the memory
        return int(tensor.untyped_storage()._cdata)
