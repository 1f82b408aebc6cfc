"""Running a compiled kernel on several threads: PyTorch's own, where it has OpenMP.

PyTorch's OpenMP threads go on spinning for a while after each matmul. Threads of anybody else's would fight
them for the cores, so on two cores a second one gains nothing; a kernel that the spinning threads themselves
run starts at once. Where PyTorch's OpenMP library cannot be called, a pool of Python threads runs the kernel.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError

#: A piece of fewer steps (16 channels at one position) is not worth a thread of its own.
SMALL = 256
#: Pieces a thread takes, one after the other, so that one that is held up holds up nobody else.
SHARES = 4


def pieces(blocks: int, length: int, shares: int = SHARES) -> int:
    """How many pieces to cut ``blocks`` blocks of ``length`` positions into."""
    threads = torch.get_num_threads()
    wanted = threads * shares if threads > 1 else 1
    return max(1, min(wanted, blocks, blocks * length // SMALL))


def run(kernel: Any, count: int, *parameters: int | Tensor | None) -> None:
    """Run a kernel of `_compiled` to its end.

    Args:
        kernel: the compiled function.
        count: how many pieces its work is cut into.
        *parameters: what it takes: a number as it is; a tensor as its address, followed, where it has three
            or more axes, by the strides of its first two; ``None`` as a tensor of three axes, never read.
    """
    numbers = [0, count]
    for parameter in parameters:
        if isinstance(parameter, Tensor):
            if not parameter.is_cpu:
                raise BackendError(f"a tensor on {parameter.device} among the inputs of a scan on the CPU")
            numbers.append(parameter.data_ptr())
            numbers += parameter.stride()[:2] if parameter.dim() > 2 else ()
        else:
            numbers += [0, 0, 0] if parameter is None else [parameter]
    packed = np.zeros(64, np.int64)
    packed[: len(numbers)] = numbers
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        kernel.ctypes(packed.ctypes.data)
    elif (parallel := _openmp()) is not None:
        parallel(kernel.address, packed.ctypes.data, threads, 0)
    else:
        waiting = [_pool().submit(kernel.ctypes, packed.ctypes.data) for _ in range(threads - 1)]
        kernel.ctypes(packed.ctypes.data)
        for future in waiting:
            future.result()


@functools.cache
def _openmp() -> Callable[..., None] | None:
    # GOMP_parallel(function, argument, threads, flags) of the OpenMP library that PyTorch has loaded.
    folder = Path(torch.__file__).parent
    for library in (*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*")):
        try:
            # Never a second OpenMP: only one that is in memory already.
            parallel = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mamba_trace_scan")


def _after_fork() -> None:
    # Threads do not survive a fork, neither Python's nor OpenMP's, which would wait for them for ever.
    global _openmp
    _pool.cache_clear()
    _openmp = lambda: None  # type: ignore[assignment]  # noqa: E731


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
