"""Running a compiled kernel on several threads: PyTorch's own, where it has OpenMP.

PyTorch's OpenMP threads go on spinning for a while after each matmul. Any other threads would fight them for
the cores, so on two cores a second thread would gain nothing, whereas a kernel that the spinning threads run
starts at once. Where PyTorch's OpenMP library cannot be called, a pool of Python threads runs the kernel.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..noting import notes
from .libraries import loaded

#: A piece with fewer steps than this is not worth a thread. A step is one position of 16 channels whose states
#: have `D_STATE` numbers.
SMALL = 256
#: The size of the states of a step.
D_STATE = 16
#: How many pieces each thread is to take, so that a thread that is held up does not hold up the others.
SHARES = 4


def pieces(blocks: int, length: int, shares: int = SHARES) -> int:
    """How many pieces to cut ``blocks`` blocks of ``length`` positions into."""
    threads = torch.get_num_threads()
    wanted = threads * shares if threads > 1 else 1
    return max(1, min(wanted, blocks, blocks * length // SMALL))


def run(kernel: Any, count: int, **given: int | Tensor | None) -> None:
    """Run a `compiled.Kernel` until all its work is done.

    Args:
        kernel: the kernel.
        count: how many pieces its work is cut into.
        **given: every number and every tensor of its layout.

    Raises:
        BackendError: if a name is missing or unknown, or if a tensor does not match the layout.
    """
    block = kernel.layout.pack(count, given)
    if (listener := notes.listener) is not None:
        listener(kernel, block, count, given)
    launch(kernel.compiled, block, count)


def launch(function: Any, block: array[int], count: int) -> None:
    """Run a compiled function on its block until all its work, which is cut into ``count`` pieces, is done."""
    address, _ = block.buffer_info()
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        function.ctypes(address)
    elif (parallel := openmp()) is not None:
        parallel(function.address, address, threads, 0)
    else:
        waiting = [_pool().submit(function.ctypes, address) for _ in range(threads - 1)]
        function.ctypes(address)
        for future in waiting:
            future.result()


@functools.cache
def openmp() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP library that PyTorch has loaded, or ``None``."""
    parallel = loaded("GOMP_parallel", "torch/lib/lib*omp*.so*", "torch.libs/lib*omp*.so*")
    if parallel is not None:
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mamba_trace_scan")


def _after_fork() -> None:
    # Neither Python's threads nor OpenMP's survive a fork; OpenMP would wait for its threads for ever.
    global openmp
    _pool.cache_clear()
    openmp = lambda: None  # type: ignore[assignment]  # noqa: E731


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
