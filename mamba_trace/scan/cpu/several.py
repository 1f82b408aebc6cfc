"""Several kernels one after the other, without coming back to Python between them."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..buffers import BlockLayout
from . import team
from .compiled import Kernel, arguments_at, kernel
from .libraries import address_of
from .vectors import INDEX, SHORT

POINTER = ir.IntType(8).as_pointer()
#: How many numbers a launch has, which follow those of the layout: where the kernel stands, its block, and the threads.
LAUNCH = 3
LAYOUT = BlockLayout("launches parallel")


@intrinsic
def number_at(typingctx, address, place):  # type: ignore[no-untyped-def]
    """A number of those that stand at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.gep(builder.bitcast(args[0], INDEX.as_pointer()), [args[1]]))

    return types.int64(types.voidptr, types.int64), codegen


@intrinsic
def launch(typingctx, function, block, threads, parallel):  # type: ignore[no-untyped-def]
    """Run a kernel on its block, no piece of which is taken yet, on some threads.

    ``parallel`` is where GOMP_parallel stands (see `team`).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function, block, threads, parallel = args
        builder.store(INDEX(0), builder.inttoptr(block, INDEX.as_pointer()))
        alone = ir.FunctionType(ir.VoidType(), [POINTER])
        together = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, SHORT, SHORT])
        kernel, data = builder.inttoptr(function, POINTER), builder.inttoptr(block, POINTER)
        with builder.if_else(builder.icmp_signed("==", threads, INDEX(1))) as (one, more):
            with one:
                builder.call(builder.bitcast(kernel, alone.as_pointer()), [data])
            with more:
                start = builder.inttoptr(parallel, together.as_pointer())
                builder.call(start, [kernel, data, builder.trunc(threads, SHORT), SHORT(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@kernel(LAYOUT)
def forward(data):  # type: ignore[no-untyped-def]
    """Run ``launches`` kernels."""
    p = arguments_at(data)
    for number in range(p.launches):
        place = FIRST + LAUNCH * number
        launch(number_at(data, place), number_at(data, place + 1), number_at(data, place + 2), p.parallel)


#: Where the first launch stands.
FIRST = LAYOUT.length


class Together:
    """Kernels that are run one after the other.

    Args:
        launches: each with its kernel, its block, which is kept, and how many pieces its work is cut into. As many
            threads run it as PyTorch has now.
    """

    def __init__(self, launches: list[tuple[Kernel, array[int], int]]) -> None:
        self.launches = launches
        threads = [min(torch.get_num_threads(), count) for _, _, count in launches]
        parallel = address_of(team.openmp())
        self.at_once = bool(parallel) or max(threads) == 1
        numbers: list[int] = []
        for (run, block, _), each in zip(launches, threads, strict=True):
            numbers += (run.compiled.address, block.buffer_info()[0], each)
        head = LAYOUT.pack(1, {"launches": len(launches), "parallel": parallel})
        self.block = array("q", [*head, *numbers])
        self.address, self.function = self.block.buffer_info()[0], forward.compiled.ctypes

    def run(self) -> None:
        """Run them."""
        if self.at_once:
            self.function(self.address)
            return
        for run, block, count in self.launches:
            block[0] = 0
            team.launch(run.compiled, block, count)
