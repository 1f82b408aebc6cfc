"""How much memory a run on the CPU takes at its peak, and which tensors it makes: the same at every run.

Two things count, and no one tool sees both:

* *Bytes* come from PyTorch's CPU allocator, by way of the profiler's memory events. It sees every tensor:
  results, temporaries inside PyTorch's kernels and whatever a custom operator such as the scan allocates
  in its own code. It does not see what numpy or compiled code takes from the C library.
* *Shapes* come from a dispatch mode, which sees each operation with its results. A custom operator is one
  operation there: its results have shapes, the temporaries in its code do not.

The mode changes what is computed (under it ``F.linear`` adds a bias out of place, which takes more memory),
so `PeakMemory.of` runs what it measures twice: once under the profiler, once under the mode. A tensor that
no shape betrays, such as [B,L,E,N] made within a custom operator, still shows in `PeakMemory.largest`.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The profiler's library announces every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class PeakMemory:
    """What one run on the CPU allocated.

    Attributes:
        peak: bytes, the most that the run held at once beyond what was held before it.
        kept: bytes held after the run and not before it, its result included.
        allocations: bytes of each allocation, in order.
        shapes: the shape of every tensor whose memory is new, and the first operation that made one.

    Example::

        memory = PeakMemory.of(lambda: model(tokens))
        assert (B, L, E, N) not in memory.shapes
        assert memory.largest < B * L * E * N * 4
    """

    peak: int
    kept: int
    allocations: list[int]
    shapes: dict[tuple[int, ...], str]

    @property
    def largest(self) -> int:
        """Bytes of the largest single allocation."""
        return max(self.allocations, default=0)

    @classmethod
    def of(cls, run: Callable[[], Any]) -> PeakMemory:
        """Measure ``run``, which is called three times: what the first call leaves behind does not count."""
        run()
        changes = allocator_events(run)
        held = list(itertools.accumulate(changes, initial=0))
        with NewTensors() as new:
            run()
        return cls(max(held), held[-1], [change for change in changes if change > 0], new.shapes)


def allocator_events(run: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) of the CPU allocator, in order."""
    gc.collect()  # what earlier runs left in cycles is not released during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


class NewTensors(TorchDispatchMode):
    """While it is entered, records the shapes of tensors that share memory with no argument.

    Attributes:
        shapes: each shape, and the name of the first operation that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage(leaf) not in given:
                self.shapes.setdefault(tuple(leaf.shape), str(func))
        return result


def storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in."""
    return tensor.untyped_storage()._cdata
