"""Which cells of a grid run together: as many as memory permits, and as few as are worth padding.

Cells that share a forward are rows of its batch. Rows of one position have one length; a row of a later
position is shorter and is padded to the longest. So several positions share a forward only where padding them
takes less time than a forward of their own would, and where the memory of all their rows is within bounds.

A grid is a list of `Job`, each a forward to the end, in order of position. Several of them in a row share the
run through the layers that they patch (`Group`), in which few rows run at a time, and several of those the
states that they start from (`Span`). All this depends on the question and the limits alone, not on who
computes what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sites import STATE, Site

if TYPE_CHECKING:
    from ..model import MambaTrace
    from .question import Question

#: What one more call of a layer costs beside the positions in it, in positions: on a CPU the layer's weights
#: are read again, on a GPU its kernels are launched again. Estimates; that for a GPU was never timed.
OVERHEAD = {"cpu": 72, "cuda": 1000}


@dataclass(frozen=True)
class Limits:
    """How much runs at once.

    Attributes:
        batch_size: cells in one forward; ``None`` for as many as memory permits.
        memory: bytes that a forward's activations may take, the streams of cells between their two parts, and
            the states that cells start from, each.
    """

    batch_size: int | None
    memory: int


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
class Group:
    """Jobs of the same rows, one after the other, that run together through the layers that they patch."""

    jobs: list[Job]

    @property
    def whole(self) -> Job:
        """All their cells."""
        return Job(self.jobs[0].rows, range(self.jobs[0].positions.start, self.jobs[-1].positions.stop))


@dataclass(frozen=True)
class Span:
    """Groups that start from states made in one go."""

    groups: list[Group]

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all groups."""
        return [job for group in self.groups for job in group.jobs]

    @property
    def positions(self) -> range:
        """Where they start."""
        return range(self.groups[0].whole.positions.start, self.groups[-1].whole.positions.stop)


@dataclass(frozen=True)
class Footprint:
    """What one row of a forward takes at its peak, in bytes: ``per_row + length * per_position``.

    Example::

        Footprint.of(model.config, BY_NAME["h"], itemsize=4).rows(2**29, length=17)
    """

    per_row: int
    per_position: int

    @classmethod
    def of(cls, config: Any, site: Site | None, itemsize: int) -> Footprint:
        """That of a model's layers where ``site`` is edited, if any, for values of ``itemsize`` bytes."""
        itemsize = max(itemsize, 4)
        state = config.intermediate_size * config.state_size * itemsize
        # The stream before and after a layer, in_proj's output, and what convolution and scan make of it.
        per_position = (5 * config.hidden_size + 8 * config.intermediate_size) * itemsize
        if site is not None and set("LEN") <= set(site.axes) and site.name != STATE:
            per_position += 4 * state  # A_bar, B_bar and what comes of an edit of them
        return cls(per_row=4 * state, per_position=per_position)

    def rows(self, memory: int, length: int) -> int:
        """How many rows of ``length`` positions fit into ``memory`` bytes; at least one."""
        return max(1, memory // (self.per_row + length * self.per_position))


@dataclass(frozen=True)
class Plan:
    """All the jobs of a grid, in order of position, and what they share.

    Attributes:
        stretches: of jobs that start from states made in one go.
        short: the states of all positions fit into memory, so that one run makes them with all else.
    """

    stretches: list[Span]
    short: bool

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all spans."""
        return [job for span in self.stretches for job in span.jobs]

    @classmethod
    def of(cls, model: MambaTrace, question: Question, limits: Limits) -> Plan:
        """The plan of a grid."""
        parameter = next(model._module.parameters())
        itemsize, config = parameter.dtype.itemsize, model.config
        overhead = OVERHEAD.get(parameter.device.type, OVERHEAD["cuda"])
        n_rows, stop = len(question.windows), question.stop
        most = math.inf if limits.batch_size is None else limits.batch_size
        plain, edited = (Footprint.of(config, site, itemsize) for site in (None, question.patched))

        def cells(length: int) -> int:
            return int(min(most, plain.rows(limits.memory, length)))

        def together(length: int) -> int:
            streams = n_rows * length * config.hidden_size * max(itemsize, 4)
            rows = min(most, edited.rows(limits.memory, length), question.window * limits.memory // streams)
            return int(min(rows // question.window, math.isqrt(2 * overhead)))

        # States of the run on the prompt, values of that on the source, which may be as large, of all layers.
        state = 2 * config.intermediate_size * config.state_size * max(itemsize, 4)
        longest = limits.memory // (2 * state * config.num_hidden_layers)
        jobs = jobs_of(n_rows, question.positions, stop, cells, overhead)
        groups = [Group(found) for found in runs(jobs, lambda job: together(stop - job.positions.start))]
        wholes = {group.whole: group for group in groups}
        spans = [
            Span([wholes[job] for job in found])
            for found in runs(list(wholes), lambda _: longest, apart=False)
        ]
        return cls(spans, short=question.length <= longest)


def jobs_of(n_rows: int, positions: range, stop: int, fits: Callable[[int], int], overhead: int) -> list[Job]:
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
    # Rows join layer by layer: half of them run on average. Per position, a forward of k positions costs
    # overhead / k for its calls and n_rows (k - 1) / 4 for its padding, least at this k.
    worth = max(1, round(2 * math.sqrt(overhead / n_rows)))
    while start < positions.stop:
        most = max(1, fits(stop - start))
        together = range(start, min(start + max(1, min(most // n_rows, worth)), positions.stop))
        for row in range(0, n_rows, min(most, n_rows)):
            jobs.append(Job(range(row, min(row + most, n_rows)), together))
        start = together.stop
    return jobs


def runs(jobs: list[Job], longest: Callable[[Job], int], apart: bool = True) -> list[list[Job]]:
    """Jobs in order, in runs that have as many positions as the first of them permits, or no more than it.

    Args:
        jobs: in order of position.
        longest: how many positions a run that starts with a job may have.
        apart: whether jobs of other rows start a run of their own.
    """
    found: list[list[Job]] = []
    for job in jobs:
        first = found[-1][0] if found else job
        fits = job.positions.stop - first.positions.start <= max(longest(first), len(first.positions))
        if found and fits and not (apart and job.rows != first.rows):
            found[-1].append(job)
        else:
            found.append([job])
    return found


def windows(n_layers: int, window: int) -> list[range]:
    """The layers that each row of a grid patches: ``window`` of them around its own, those that there are.

    >>> windows(4, 3)
    [range(0, 2), range(0, 3), range(1, 4), range(2, 4)]
    """
    before = (window - 1) // 2
    return [
        range(max(layer - before, 0), min(layer - before + window, n_layers)) for layer in range(n_layers)
    ]
