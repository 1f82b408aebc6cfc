"""What a block of code computes, noted while it runs, to be computed again on other memory without that code.

On a CPU the calls of Python and PyTorch around the kernels can take longer than the kernels. Which kernels run, with
which numbers, and where their tensors lie is the same whenever the same code runs on tensors of the same shapes. So a
`Capture` takes note of it once, and a `Replay` starts the kernels again with the addresses that have changed.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..noting import notes
from . import of_pairs
from .operators import kernels_in

_aten: Any = torch.ops.aten
#: Operations that only take memory.
TAKE_MEMORY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.empty_strided.default,
    _aten.new_empty_strided.default,
}
#: Operations of which kernels compute the very numbers, by the names of these.
EXACT = {_aten.add.Tensor: "sums", _aten.mul.Tensor: "products"}


class Launch(NamedTuple):
    """A kernel that was run, in how many pieces, and the tensors that it looked at, by name."""

    kernel: Any
    block: array[int]
    pieces: int
    tensors: dict[str, Tensor]


class Operation(NamedTuple):
    """An operation of PyTorch that was run, as one that writes into tensors that are there."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Moving(NamedTuple):
    """Stands for a tensor that is another one in each run."""

    number: int


class Capture(TorchDispatchMode):
    """Takes note of all that is computed in a ``with`` block.

    Attributes:
        steps: what was computed, in order.
        made: the tensors that memory was taken for, by the address of that memory.
        refused: why it cannot be computed again; "" if it can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Launch | Operation] = []
        self.made: dict[int, Tensor] = {}
        self.refused = ""

    def __enter__(self) -> Capture:
        super().__enter__()
        notes.listener = self.launched
        return self

    def __exit__(self, *raised: Any) -> None:
        notes.listener = None
        super().__exit__(*raised)

    def launched(self, kernel: Any, block: array[int], pieces: int, given: dict[str, Any]) -> None:
        """Take note of a kernel."""
        looked_at = {name: given[name] for name, b in kernel.layout.buffers.items() if not b.when or given[b.when]}
        self.steps.append(Launch(kernel, block, pieces, looked_at))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in EXACT and not kwargs and ends_alike(*args):
            return self._made(of_pairs(EXACT[function], *args))
        result = function(*args, **kwargs)
        if function in TAKE_MEMORY:
            return self._made(result)
        if function.is_view:
            return result
        into = writing(function)
        if args and result is args[0]:  # in place
            self.steps.append(Operation(function, args, kwargs))
        elif isinstance(result, Tensor) and into is not None:
            self.steps.append(Operation(into, args, {**kwargs, "out": self._made(result)}))
        else:
            self.refused = self.refused or str(function)
        return result

    def _made(self, tensor: Tensor) -> Tensor:
        self.made[memory(tensor)] = tensor
        return tensor


def writing(function: Any) -> Any:
    """The operation that writes what ``function`` returns into a tensor, and takes what that takes; or ``None``."""
    into = getattr(function.overloadpacket, "out", None)
    if into is None:
        return None
    own, its = ([argument.name for argument in each._schema.arguments] for each in (function, into))
    return into if its == [*own, "out"] else None


def ends_alike(one: Any, other: Any) -> bool:
    """Whether two arguments are tensors as `of_pairs` takes them."""
    if not all(isinstance(tensor, Tensor) and tensor.dtype is torch.float32 for tensor in (one, other)):
        return False
    shape, end = tuple(one.shape), tuple(other.shape)
    if len(end) > len(shape):
        return False
    while len(end) > 1 and end[0] == 1:
        end = end[1:]
    if not end or len(end) > len(shape) or shape[-len(end) :] != end or not one.numel() or not other.is_contiguous():
        return False
    return one.is_contiguous() or (len(end) == 1 and one.stride(-1) == 1 and lines_evenly_apart(one))


def lines_evenly_apart(tensor: Tensor) -> bool:
    """Whether all lines of a tensor, along its last axis, are as far from each other in memory."""
    axes = range(tensor.dim() - 2)
    return all(tensor.stride(axis) == tensor.shape[axis + 1] * tensor.stride(axis + 1) for axis in axes)


def memory(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


class Scratch(threading.local):
    """The memory that a thread's replays use for what they make on the way, one after the other."""

    taken = torch.empty(0, device="cpu")

    def take(self, count: int) -> Tensor:
        """Memory for ``count`` numbers in float32, or more; it may hold anything.

        It at least doubles, so that all that earlier replays keep is no more than it has now.
        """
        if len(self.taken) < count:
            with torch.inference_mode(False):  # so that it may be written in any mode
                self.taken = torch.empty(max(count, 2 * len(self.taken)), dtype=torch.float32, device="cpu")
        return self.taken


_scratch = Scratch()
LINE = 64  # bytes that the cache has together


class Replay:
    """Computes again what was noted.

    Args:
        capture: the notes.
        moving: the tensors that are others in each run. They need not have been there before.
        fixed: all other tensors that were there before. The caller sees to it that they stay where they are.

    Attributes:
        refused: why it cannot; "" if it can.
        steps: what is run, in order: operations, and kernels one behind the other.
        places: where an address stands, and which moving tensor it is in, how many bytes behind its first number.
    """

    def __init__(self, capture: Capture, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        self.refused = capture.refused
        self._moving = moving
        self._roots = {memory(tensor): number for number, tensor in enumerate(moving)}
        self._made = {address: tensor for address, tensor in capture.made.items() if address not in self._roots}
        self._there = {*map(memory, fixed)}
        if len(self._roots) < len(moving) or not self._there.isdisjoint(self._roots):
            self.refused = self.refused or "tensors that share memory"
        self.places: list[tuple[array[int], int, int, int]] = []
        self.steps: list[Any] = []
        row: list[Any] = []
        self._place_made()
        for step in capture.steps:
            if isinstance(step, Launch):
                row.append(self._launch(step))
            else:
                self._end(row)
                self.steps.append(self._operation(step))
        self._end(row)
        del self._moving, self._roots, self._made, self._there, self._offsets

    def _place_made(self) -> None:
        # What is made on the way need not stay in the memory that it was made in.
        count, self._offsets = 0, dict[int, int]()
        for address, tensor in self._made.items():
            self._offsets[address] = count
            count += -(-tensor.untyped_storage().nbytes() // LINE) * LINE
        self.scratch = _scratch.take(count // 4)

    def _end(self, row: list[Any]) -> None:
        if row and not self.refused:
            self.steps.append(kernels_in(".several").Together(row[:]))
        row.clear()

    def _operation(self, step: Operation) -> Operation:
        kwargs = {name: self._argument(value) for name, value in step.kwargs.items()}
        return Operation(step.function, tuple(map(self._argument, step.args)), kwargs)

    def _argument(self, value: Any) -> Any:
        # An argument of an operation as it is kept.
        if not isinstance(value, Tensor):
            return value
        for number, tensor in enumerate(self._moving):
            if value is tensor:
                return Moving(number)
        offset = self._offsets.get(memory(value))
        if offset is None or value.dtype is not torch.float32:
            self.refused = self.refused or "an operation on a tensor that was there, or not in float32"
            return value
        return self.scratch.as_strided(value.shape, value.stride(), offset // 4 + value.storage_offset())

    def _launch(self, launch: Launch) -> tuple[Any, array[int], int]:
        kernel, block, pieces, tensors = launch
        for name, tensor in tensors.items():
            place, start, address = kernel.layout.places[name], memory(tensor), tensor.data_ptr()
            if (number := self._roots.get(start)) is not None:
                self.places.append((block, place, number, address - self._moving[number].data_ptr()))
            elif (offset := self._offsets.get(start)) is not None:
                block[place] = self.scratch.data_ptr() + offset + address - start
            elif start not in self._there:
                self.refused = self.refused or f"{name} was not there before"
        return kernel, block, pieces

    def run(self, *moving: Tensor) -> None:
        """Compute it on these tensors."""
        addresses = [tensor.data_ptr() for tensor in moving]
        for block, place, number, offset in self.places:
            block[place] = addresses[number] + offset
        for step in self.steps:
            if type(step) is not Operation:
                step.run()
                continue
            function, args, kwargs = step
            given = [moving[arg.number] if type(arg) is Moving else arg for arg in args]
            named = {name: moving[arg.number] if type(arg) is Moving else arg for name, arg in kwargs.items()}
            function(*given, **named)
