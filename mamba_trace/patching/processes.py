"""Several processes that compute one grid: who takes which jobs, and how what they found comes together.

A launcher (``torchrun``, ``accelerate launch``) starts the same program several times, on one machine or on
many. Each takes every k-th of the jobs that are not done yet and keeps what it finds; at the end every
process has all of it. Jobs do not depend on how many processes there are, so neither do the numbers, to the
last bit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from ..errors import ProcessesError

T = TypeVar("T")

_counters = itertools.count()


class Processes:
    """The processes that a launcher started, of which this is one; one alone is the usual case.

    Args:
        rank: the number of this one.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def here(cls, device: torch.device) -> Processes:
        """Those that were launched, connected by way of accelerate; ``device`` is where the model runs."""
        if not launched():
            return cls()
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes)

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all of them have a list of."""
        return list(items[self.rank :: self.size])

    def gather(self, items: list[T]) -> list[T]:
        """What all processes have, in order of rank. Every process waits for all others here."""
        return list(gather_object(items)) if self.size > 1 else items

    def check_same(self, asked: dict[str, Any]) -> None:
        """Raises `ProcessesError` in every process if they do not ask for the same."""
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
        """A number that all processes count together, from 0: what adds to it and returns it."""
        if self.size == 1:
            return Counter()
        store = distributed.distributed_c10d._get_default_store()
        key = (
            f"mamba_trace/{name}/{next(_counters)}"  # every process asks for the same ones in the same order
        )
        return lambda amount: store.add(key, amount)


class Counter:
    """A number that one process counts alone."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, amount: int) -> int:
        self.count += amount
        return self.count


def first_process() -> bool:
    """Whether this is the process that prints and writes: the first of those launched, or the only one."""
    return not launched() or PartialState().is_main_process


def own_device() -> str | None:
    """The accelerator that is this process's own among those on its machine; ``None`` where there is none."""
    accelerator = torch.accelerator.current_accelerator() if launched() else None
    if accelerator is None or not torch.accelerator.is_available():
        return None
    return f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}"


def part() -> None:
    """Disconnect from the other processes, at the end of a program."""
    if launched():
        PartialState().destroy_process_group()


def launched() -> bool:
    """Whether a launcher started several processes, or somebody connected them already."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
