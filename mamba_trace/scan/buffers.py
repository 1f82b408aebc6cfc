"""What a compiled kernel takes, stated once by name, and checked where a tensor is handed over.

Compiled code reads and writes the memory at an address. There a wrong dtype, stride or length is no error but
a wrong number, or a heap that is overwritten. So each kernel declares its arrays (`Buffer`), and no tensor
reaches one before `fits` has compared its device, dtype, shape and strides with the declaration.

`Layout` is the declaration of a kernel of the CPU, which takes a single block of int64 numbers: it gives each
number and each array its place there, for the kernel to read and for the caller to fill.
"""

from __future__ import annotations

import functools
from array import array
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import BackendError


@dataclass(frozen=True)
class Buffer:
    """An array that a kernel takes.

    Attributes:
        axes: the names of its axes, separated by spaces.
        dense: how many of its last axes lie in memory without gaps; the kernel is told the strides of the
            others. All of them if ``None``.
        dtype: of its elements; ``None`` where the kernel takes any floating-point one.
        when: the number that is 0 where the kernel does not look at the array; ``None`` where it always does.
    """

    axes: str
    dense: int | None = None
    dtype: torch.dtype | None = torch.float32
    when: str | None = None

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of its axes, one by one."""
        return self.axes.split()

    @functools.cached_property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.names)


def fits(tensor: Tensor, shape: tuple[int, ...], wanted: tuple[int, ...], buffer: Buffer) -> bool:
    """Whether a tensor of shape ``shape`` has the one that is wanted, and the dtype and density declared."""
    dtype, dense = buffer.dtype, buffer.dense
    if shape != wanted or (tensor.dtype is not dtype if dtype else not tensor.is_floating_point()):
        return False
    if tensor.is_contiguous():
        return True
    if dense is None:
        return False
    expected = 1
    for axis in range(len(shape) - 1, len(shape) - 1 - dense, -1):
        if shape[axis] > 1 and tensor.stride(axis) != expected:
            return False
        expected *= shape[axis]
    return True


def refuse(name: str, given: Tensor | None, shape: tuple[int, ...] | None, buffer: Buffer) -> NoReturn:
    """Raise the error for an array that a kernel cannot take.

    Raises:
        BackendError: with what the kernel was given and what it takes.
    """
    dtype = "floating-point" if buffer.dtype is None else str(buffer.dtype).removeprefix("torch.")
    dense = buffer.rank if buffer.dense is None else buffer.dense
    sizes = "" if shape is None else f" = {list(shape)}"
    wanted = f"[{buffer.axes.replace(' ', ', ')}]{sizes} in {dtype}, without gaps in the last {dense} axes"
    what = "nothing"
    if given is not None:
        what = f"{list(given.shape)} in {str(given.dtype).removeprefix('torch.')} on {given.device}"
        what = f"{what} with strides {list(given.stride())}"
    raise BackendError(f"a compiled kernel takes {name} as {wanted}, and was handed {what}")


def check(arrays: Mapping[str, Tensor | None], buffers: Mapping[str, Buffer], **sizes: int) -> None:
    """Refuse arrays that a kernel cannot take.

    Args:
        arrays: by name; ``None`` where one is missing. All of them are to be on one device.
        buffers: their declarations by name.
        **sizes: of every axis.

    Raises:
        BackendError: with what the kernel was given and what it takes.
    """
    device = None
    for name, tensor in arrays.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device != device:
            raise BackendError(f"a compiled kernel on {device} was handed {name} on {tensor.device}")
        buffer = buffers[name]
        wanted = tuple(sizes[axis] for axis in buffer.names)
        if not fits(tensor, tensor.shape, wanted, buffer):
            refuse(name, tensor, wanted, buffer)


class _Placed(NamedTuple):
    """An array of a `Layout`: its declaration, and what `Layout.pack` needs of it at each call."""

    name: str
    buffer: Buffer
    rank: int
    sizes: Callable[[list[int]], tuple[int, ...]]  # takes its shape out of the numbers
    new: tuple[int, ...]  # its axes whose sizes no earlier array has
    when: int | None  # where the number is that is 0 where the kernel does not look at it
    nowhere: tuple[int, ...]  # what stands in its places then


class Layout:
    """Where in its block of int64 numbers a kernel of the CPU finds each number and each array.

    Each axis of an array is a number too: one that the caller gives, or the size that the first array with
    that axis has. An array takes a place for its address, and where not all of its axes are dense two more,
    for the strides of its first two axes.

    Args:
        numbers: the names of the numbers that the caller gives, separated by spaces.
        **arrays: the arrays by name.

    Attributes:
        at: a named tuple of the places, which Numba takes for constants: ``p[AT.width]``. There are two more
            numbers, the first of every kernel: the ``next`` piece to take, and how many ``pieces`` there are.

    Example::

        layout = Layout("scale", x=Buffer("length width", dense=1), out=Buffer("length width"))
        layout.at  # (next=0, pieces=1, scale=2, length=3, width=4, x=5, out=8)
        layout.pack(1, {"scale": 2, "x": torch.rand(5, 4)[:, :3], "out": torch.empty(5, 3)})
    """

    def __init__(self, numbers: str, **arrays: Buffer) -> None:
        self.given = tuple(numbers.split())
        places = {name: place for place, name in enumerate(("next", "pieces", *self.given))}
        placed = []
        for name, buffer in arrays.items():
            axes = buffer.names
            new = tuple(index for index, axis in enumerate(axes) if axis not in places)
            for index in new:
                places[axes[index]] = len(places)
            sizes = _taking([places[axis] for axis in axes])
            when = None if buffer.when is None else places[buffer.when]
            nowhere = (0,) if buffer.dense is None else (0, 0, 0)
            placed.append(_Placed(name, buffer, len(axes), sizes, new, when, nowhere))
        self.arrays, end = tuple(placed), len(places)
        for name, buffer in arrays.items():
            places[name], end = end, end + (1 if buffer.dense is None else 3)
        self.at: Any = namedtuple("Places", list(places))(**places)
        self.names = (*self.given, *arrays)

    def pack(self, pieces: int, given: Mapping[str, Any]) -> array[int]:
        """The block of numbers for one call, which keeps no tensor alive.

        Args:
            pieces: how many pieces the work is cut into.
            given: every number and every tensor by name.

        Raises:
            BackendError: if one is missing, or a tensor is not what its declaration says.
        """
        if len(given) != len(self.names) or not all(map(given.__contains__, self.names)):
            raise BackendError(f"a scan on the CPU takes {self.names}, and was handed {list(given)}")
        numbers: list[int] = [0, pieces, *(given[name] for name in self.given)]
        addresses: list[int] = []
        for name, buffer, rank, sizes, new, when, nowhere in self.arrays:  # at each call of each kernel
            if when is not None and not numbers[when]:
                addresses += nowhere
                continue
            tensor = given[name]
            if tensor is None or len(shape := tensor.shape) != rank:
                refuse(name, tensor, None, buffer)
            for axis in new:
                numbers.append(shape[axis])
            if not tensor.is_cpu:
                where = f"a tensor on {tensor.device} among the inputs of a scan on the CPU"
                raise BackendError(f"{where}: {name}")
            if not fits(tensor, shape, wanted := sizes(numbers), buffer):
                refuse(name, tensor, wanted, buffer)
            addresses.append(tensor.data_ptr())
            if buffer.dense is not None:
                addresses += tensor.stride()[:2]
        return array("q", numbers + addresses)


def _taking(places: list[int]) -> Callable[[list[int]], tuple[int, ...]]:
    # A function that takes the elements at ``places`` out of a list, always as a tuple.
    if len(places) == 1:
        return lambda numbers: (numbers[places[0]],)
    return itemgetter(*places)
