"""The arrays that compiled kernels take, declared once by name and checked whenever a tensor is handed over.

Compiled code reads and writes the memory at an address. There a wrong dtype, stride or length raises no
error: it gives wrong numbers or overwrites the heap. So each kernel declares its arrays (`Buffer`), and no
tensor reaches a kernel before its device, dtype, shape and strides have been compared with the declaration.

`BlockLayout` is the declaration of a whole CPU kernel, which takes one block of int64 numbers. It says where in
the block each number and each array stands. The caller fills the block from it, and the kernel is compiled
from it.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import BackendError


@dataclass(frozen=True)
class Buffer:
    """An array that a kernel takes.

    Attributes:
        axes: the names of its axes, separated by spaces.
        dense: how many of its last axes lie in memory without gaps; the kernel is told the strides of the
            others. ``None`` means all of them.
        dtype: the dtype of its elements; ``None`` where the kernel takes any floating-point dtype.
        when: the name of a number; where that is 0 the kernel does not look at the array. ``None`` where the
            kernel always looks at it.
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

    @functools.cached_property
    def loose(self) -> int:
        """How many of its first axes may have any stride."""
        return 0 if self.dense is None else self.rank - self.dense

    def without_gaps(self, tensor: Tensor) -> bool:
        """Whether a tensor of this rank lies in memory as densely as declared."""
        if tensor.is_contiguous():
            return True
        if self.loose == 0:
            return False
        expected = 1
        for axis in range(self.rank - 1, self.loose - 1, -1):
            if tensor.shape[axis] > 1 and tensor.stride(axis) != expected:
                return False
            expected *= tensor.shape[axis]
        return True

    def claim(self, name: str, tensor: Tensor | None, sizes: dict[str, int]) -> None:
        """Refuse a tensor that does not match this declaration.

        Args:
            name: what the array is called.
            tensor: what a kernel is about to be given.
            sizes: the sizes of the axes known so far; those that this array is the first to have are added.

        Raises:
            BackendError: with what the kernel was given and what it takes.
        """
        if tensor is None or len(shape := tensor.shape) != self.rank:
            self.refuse(name, tensor, sizes)
        if shape != (*map(sizes.get, self.names),):
            for axis, size in zip(self.names, shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    self.refuse(name, tensor, sizes)
        suits = tensor.dtype is self.dtype if self.dtype else tensor.is_floating_point()
        if not suits or not (tensor.is_contiguous() or (self.loose and self.without_gaps(tensor))):
            self.refuse(name, tensor, sizes)

    def refuse(self, name: str, given: Tensor | None, sizes: Mapping[str, int]) -> NoReturn:
        """Raise the `BackendError` that says what the kernel was given for this array and what it takes."""
        dtype = "floating-point" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        known = f" = {[sizes[axis] for axis in self.names]}" if sizes.keys() >= {*self.names} else ""
        wanted = f"[{self.axes.replace(' ', ', ')}]{known} in {dtype}, without gaps in the last"
        what = "nothing"
        if given is not None:
            what = f"{list(given.shape)} in {str(given.dtype).removeprefix('torch.')} on {given.device}"
            what = f"{what} with strides {list(given.stride())}"
        message = f"a compiled kernel takes {name} as {wanted} {self.rank - self.loose} axes"
        raise BackendError(f"{message}, and was handed {what}")


def check(arrays: Mapping[str, Tensor | None], buffers: Mapping[str, Buffer], **sizes: int) -> None:
    """Refuse arrays that a kernel cannot take.

    Args:
        arrays: the arrays by name; ``None`` where an array is missing. All of them must be on one device.
        buffers: their declarations by name.
        **sizes: the sizes of axes. An axis without one has the size that the first array gives it.

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
        buffers[name].claim(name, tensor, sizes)


#: How many sets of shapes a layout remembers.
REMEMBERED = 256


class BlockLayout:
    """Where in its block of int64 numbers a CPU kernel finds each number and each array.

    The block begins with the ``next`` piece of work to take and the number of ``pieces``. The numbers that
    the caller gives follow, then the sizes of all axes, and last the arrays: an address each, followed by the
    strides of the axes that need not be dense. An axis that is not among the given numbers has the size that
    the first array with that axis has.

    Args:
        numbers: the names of the numbers that the caller gives, separated by spaces.
        **buffers: the declarations of the arrays by name.

    Attributes:
        places: the place of each number, and the first place of each array, by name.
        length: how many numbers the block has.

    Example::

        layout = BlockLayout("scale", x=Buffer("length width", dense=1), out=Buffer("length width"))
        layout.places  # next: 0, pieces: 1, scale: 2, length: 3, width: 4, x: 5, out: 7
        layout.pack(1, {"scale": 2, "x": torch.rand(5, 4)[:, :3], "out": torch.empty(5, 3)})
    """

    def __init__(self, numbers: str, **buffers: Buffer) -> None:
        self.given = tuple(numbers.split())
        self.buffers = buffers
        self.names = {*self.given, *buffers}
        axes = (axis for buffer in buffers.values() for axis in buffer.names)
        self.numbers = tuple(dict.fromkeys(("next", "pieces", *self.given, *axes)))
        self.places = {name: place for place, name in enumerate(self.numbers)}
        self.length = len(self.numbers)
        self._entries = [(n, b, b.dtype, b.loose, b.when) for n, b in buffers.items()]
        self._agreed: dict[tuple[Any, ...], list[int]] = {}
        for name, buffer in buffers.items():
            self.places[name] = self.length
            self.length += 1 + buffer.loose

    def but(self, left_out: str, **others: Buffer) -> BlockLayout:
        """A layout without the arrays ``left_out`` of this one, their names separated by spaces, and with others."""
        kept = {name: buffer for name, buffer in self.buffers.items() if name not in left_out.split()}
        return BlockLayout(" ".join(self.given), **kept, **others)

    def pack(self, pieces: int, given: Mapping[str, Any]) -> array[int]:
        """Make the block of numbers for one call. It keeps no tensor alive.

        Args:
            pieces: how many pieces the work is cut into.
            given: every number and every tensor by name.

        Raises:
            BackendError: if a name is missing or unknown, or if a tensor does not match its declaration.
        """
        if given.keys() != self.names:
            raise BackendError(f"a scan on the CPU takes {sorted(self.names)}, and was handed {sorted(given)}")
        # This runs at each call of each kernel, so it is remembered which shapes agree.
        shapes: list[Any] = [given[name] for name in self.given]
        addresses: list[int] = []
        for name, buffer, dtype, loose, when in self._entries:
            if when is not None and not given[when]:
                addresses += [0] * (1 + loose)
                continue
            tensor = given[name]
            if tensor is None or not tensor.is_cpu or tensor.dtype is not dtype:
                self._claim(given)  # which raises
            if not (tensor.is_contiguous() or buffer.without_gaps(tensor)):
                self._claim(given)
            shapes.append(tensor.shape)
            addresses.append(tensor.data_ptr())
            if loose:
                addresses += tensor.stride()[:loose]
        key = tuple(shapes)
        if (sizes := self._agreed.get(key)) is None:
            if len(self._agreed) >= REMEMBERED:
                self._agreed.clear()
            sizes = self._agreed[key] = self._claim(given)
        return array("q", [0, pieces, *sizes, *addresses])

    def _claim(self, given: Mapping[str, Any]) -> list[int]:
        # The numbers of a block behind ``pieces``, once every tensor that is looked at was found to match.
        sizes: dict[str, int] = {name: given[name] for name in self.given}
        for name, buffer in self.buffers.items():
            if buffer.when is not None and not sizes[buffer.when]:
                continue
            tensor = given[name]
            if tensor is not None and not tensor.is_cpu:
                where = f"a tensor on {tensor.device} among the inputs of a scan on the CPU"
                raise BackendError(f"{where}: {name}")
            buffer.claim(name, tensor, sizes)
        return [sizes.get(name, 0) for name in self.numbers[2:]]
