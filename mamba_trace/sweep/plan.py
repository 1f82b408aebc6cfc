"""Which cells of a grid run together: as many as memory permits, and as few as are worth padding.

Cells that share a forward are rows of its batch. Rows of one position have one length; a row of a later
position is shorter and is padded to the longest. So several positions share a forward only where padding them
takes less time than a forward of their own would, and where the memory of all their rows is within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..sites import Site

#: What one more call of a layer costs beside the positions in it, in positions: on a CPU the layer's weights
#: are read again, on a GPU its kernels are launched again.
OVERHEAD = {"cpu": 30, "cuda": 1000}


@dataclass(frozen=True)
class Job:
    """Cells that one forward computes: every one of ``rows`` of the grid at every one of ``positions``."""

    rows: range
    positions: range

    @property
    def n_cells(self) -> int:
        """How many cells it has."""
        return len(self.rows) * len(self.positions)


@dataclass(frozen=True)
class Footprint:
    """What one row of a forward takes at its peak, in bytes: ``per_row + length * per_position``.

    Example::

        Footprint.of(model.config, BY_NAME["h"], itemsize=4).rows(2**29, length=17)
    """

    per_row: int
    per_position: int

    @classmethod
    def of(cls, config: object, site: Site, itemsize: int) -> Footprint:
        """That of a model's layers where ``site`` is edited, for values of ``itemsize`` bytes."""
        D, E, N = (getattr(config, name) for name in ("hidden_size", "intermediate_size", "state_size"))
        state = E * N * max(itemsize, 4)
        # The residual stream before and after a layer, in_proj's output, and what convolution and scan make.
        per_position = (5 * D + 8 * E) * max(itemsize, 4)
        if "L" in site.axes and "N" in site.axes and "E" in site.axes and site.name != "h":
            per_position += 4 * state  # A_bar, B_bar and what comes of an edit of them
        return cls(per_row=4 * state, per_position=per_position)

    def rows(self, memory: int, length: int) -> int:
        """How many rows of ``length`` positions fit into ``memory`` bytes; at least one."""
        return max(1, memory // (self.per_row + length * self.per_position))


def windows(n_layers: int, window: int) -> list[range]:
    """The layers that each row of a grid patches: ``window`` of them around its own, those that there are.

    >>> windows(4, 3)
    [range(0, 2), range(0, 3), range(1, 4), range(2, 4)]
    """
    before = (window - 1) // 2
    return [
        range(max(layer - before, 0), min(layer - before + window, n_layers)) for layer in range(n_layers)
    ]


def plan(n_rows: int, positions: range, stop: int, fits: Callable[[int], int], overhead: int) -> list[Job]:
    """The jobs that compute a grid, in order of position.

    Args:
        n_rows: of the grid.
        positions: those to compute.
        stop: where every run ends: one past the last position that a metric looks at.
        fits: how many cells that run over a given number of positions may share a forward.
        overhead: of a call of a layer, in positions; see `OVERHEAD`.
    """
    jobs: list[Job] = []
    start = positions.start
    # Rows fill up over the layers: half of them run on average. Per position, a forward of k positions costs
    # overhead / k for its calls and n_rows (k - 1) / 4 for its padding, least at this k.
    worth = max(1, round(2 * math.sqrt(overhead / n_rows)))
    while start < positions.stop:
        most = max(1, fits(stop - start))
        together = range(start, min(start + max(1, min(most // n_rows, worth)), positions.stop))
        for row in range(0, n_rows, min(most, n_rows)):
            jobs.append(Job(range(row, min(row + most, n_rows)), together))
        start = together.stop
    return jobs
