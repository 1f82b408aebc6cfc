"""Several processes that compute one grid: which process takes which jobs, and how the results come together.

A launcher (``torchrun``, ``accelerate launch``) starts the same program several times, on one machine or on
many. Of the unfinished jobs each process takes every k-th and keeps what it computes; at the end every
process has all of it. Jobs do not depend on the number of processes, so the numbers do not either, to the
last bit.
"""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from ..errors import ProcessesError

T = TypeVar("T")

_counters = itertools.count()


class Processes:
    """The processes that a launcher started; usually there is only this one.

    Args:
        rank: the number of this process.
        size: how many processes there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def here(cls, device: torch.device) -> Processes:
        """The launched processes, connected through accelerate; ``device`` is where the model runs.

        Whoever connects them disconnects them as the program ends: with the threads of a connection
        still at work, Python's own end may abort the process (SIGABRT) after its results are there.
        """
        if not launched():
            return cls()
        if not _connected():
            atexit.register(_disconnect)
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes)

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that all processes have."""
        return list(items[self.rank :: self.size])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in order of rank. Every process waits here for all others."""
        return list(gather_object(items)) if self.size > 1 else items

    def check_same(self, asked: dict[str, Any]) -> None:
        """Raises `ProcessesError` in every process if they ask for different grids."""
        everyone = self.gather([asked])
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other[name] != value:
                    raise ProcessesError(
                        f"{self.size} processes share this grid, but process {rank} asks for {name} "
                        f"{other[name]!r} and process 0 for {value!r}. Ask for the same in all of them, or "
                        f"pass distribute=False to compute a grid in each"
                    )

    def counter(self, name: str) -> Callable[[int], int]:
        """A number that all processes count together, from 0: a function that adds to it and returns it."""
        if self.size == 1:
            count = 0

            def add(amount: int) -> int:
                nonlocal count
                count += amount
                return count

            return add
        store = distributed.distributed_c10d._get_default_store()
        # Every process makes the same counters in the same order.
        key = f"mamba_trace/{name}/{next(_counters)}"
        return lambda amount: store.add(key, amount)


@contextmanager
def in_the_first_process() -> Iterator[bool]:
    """Whether this process prints and writes: it is the first that was launched, or the only one.

    Afterwards the processes disconnect from each other, as the program ends.
    """
    try:
        yield not launched() or PartialState().is_main_process
    finally:
        _disconnect()


def _connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _disconnect() -> None:
    if _connected():
        distributed.destroy_process_group()


def own_device() -> str | None:
    """The accelerator of its machine that this process uses alone; ``None`` where there is none."""
    accelerator = torch.accelerator.current_accelerator() if launched() else None
    if accelerator is None or not torch.accelerator.is_available():
        return None
    return f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}"


def launched() -> bool:
    """Whether a launcher started several processes, or somebody connected them already."""
    if _connected():
        return distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
