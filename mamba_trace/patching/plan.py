"""Which cells of a grid run together: as many as memory permits, and as few as padding is worth.

Cells that share a forward are rows of its batch. Cells of one position are rows of one length. A row of a
later position is shorter and is padded to the longest, so several positions share a forward only where the
padding takes less time than a forward of their own would.

The plan is a list of `Job` in order of position. Each job is one forward through phase 2, the layers above
the patched ones (see `phases`). Neighbouring jobs form a `Group`, which shares one forward through phase 1,
the patched layers, where few rows run at a time. Neighbouring groups form a `Span`, whose starting states are
made in one run. The plan depends on the question and the limits only, never on which process computes which
job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..modeling.architectures import axis_sizes
from ..sites import BY_NAME, STATE, Family, Site
from .question import Question

if TYPE_CHECKING:
    from ..model import MambaTrace

T = TypeVar("T")

#: The fixed cost of calling a layer once more, as a number of positions that take as long: a CPU reads the
#: layer's weights again, a GPU launches its kernels again. Estimates; the one for a GPU was never timed.
OVERHEAD = {"cpu": 72, "cuda": 1000}


@dataclass(frozen=True)
class Limits:
    """What the user allows to run at once.

    Attributes:
        batch_size: cells in one forward; ``None`` for as many as memory permits.
        memory: bytes for the activations of a forward, again for the residual streams of cells that are
            between the two phases, and again for the states that cells start from.
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
    """Neighbouring jobs of the same rows, which run through the patched layers together."""

    jobs: list[Job]

    @property
    def cells(self) -> Job:
        """The cells of all its jobs."""
        start, stop = self.jobs[0].positions.start, self.jobs[-1].positions.stop
        return Job(self.jobs[0].rows, range(start, stop))


@dataclass(frozen=True)
class Span:
    """Neighbouring groups, whose starting states are made in one run."""

    groups: list[Group]

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all its groups."""
        return [job for group in self.groups for job in group.jobs]

    @property
    def positions(self) -> range:
        """The positions where its cells start."""
        return range(self.jobs[0].positions.start, self.jobs[-1].positions.stop)


@dataclass(frozen=True)
class Budgets:
    """How much of a grid may run together: one budget for each step, and why the step has a limit.

    Attributes:
        question, limits: as `Plan.of` gets them.
        family: of the model's mixers.
        sizes: the size of each axis letter that the model fixes.
        itemsize: bytes of a number; at least 4, as states and streams are float32 or better.
        overhead: the cost of calling a layer once more, in positions; see `OVERHEAD`.
    """

    question: Question
    limits: Limits
    family: Family
    sizes: Mapping[str, int]
    itemsize: int
    overhead: int

    def at_a_position(self, site: Site) -> int:
        """Bytes of a site's value at one position of one row."""
        axes = site.axes_in(self.family)
        return math.prod(self.sizes[axis] for axis in axes if axis not in "BL") * self.itemsize

    @property
    def state(self) -> int:
        """Bytes of one state."""
        return self.at_a_position(BY_NAME[STATE])

    def rows_of_a_forward(self, length: int, site: Site | None) -> int:
        """Rows of ``length`` positions in one forward: the activations of a layer are held at once.

        With a site, these include what an edit of it makes. At least one row.
        """
        # The stream before and after a layer, in_proj's output, and what convolution and scan make of it.
        shared = sum(map(self.at_a_position, (BY_NAME["B"], BY_NAME["C"])))
        position = (5 * self.sizes["D"] + 8 * self.sizes["E"]) * self.itemsize + 4 * shared
        if site is not None and set("LEN") <= set(site.axes) and site.name != STATE:
            # A_bar, B_bar or write, and the values computed from an edit of it.
            position += 4 * max(self.at_a_position(BY_NAME["B_bar"]), self.at_a_position(site))
        rows = max(1, self.limits.memory // (4 * self.state + length * position))
        return min(rows, self.limits.batch_size or rows)

    def cells_of_a_job(self, length: int) -> int:
        """Cells of ``length`` positions in one forward of phase 2, in which no site is watched."""
        return self.rows_of_a_forward(length, None)

    def positions_of_a_group(self, length: int) -> int:
        """Positions that run through phase 1 together, where the first of them has ``length`` to run.

        Three things limit them: the activations of a forward, which at each position runs as many rows of the
        grid as a window has layers; the residual streams of all rows, which wait for phase 2; and padding.
        """
        question = self.question
        activations = self.rows_of_a_forward(length, question.patched) // question.window
        stream = length * self.sizes["D"] * self.itemsize
        streams = self.limits.memory // (len(question.windows) * stream)
        padding = math.isqrt(2 * self.overhead)  # k positions waste k²/2: at most what another call costs
        return min(activations, streams, padding)

    def positions_of_a_span(self) -> int:
        """Positions whose starting states are held at once, for all layers.

        Their run computes the states of both prompts, and keeps copies of one prompt's states and of the
        source's values, which may be as large as states.
        """
        return self.limits.memory // (4 * self.state * self.question.n_layers)


@dataclass(frozen=True)
class Plan:
    """All the work of a grid, in order of position.

    Attributes:
        spans: the work, by the starting states that it shares.
        short: whether the states of all positions of the prompt fit into memory, so that the unpatched runs
            can make them along with everything else.
    """

    spans: list[Span]
    short: bool

    @classmethod
    def of(cls, model: MambaTrace, question: Question, limits: Limits) -> Plan:
        """Plan a grid."""
        parameter = next(model._module.parameters())
        overhead = OVERHEAD.get(parameter.device.type, OVERHEAD["cuda"])
        family, sizes = model.architecture.family, axis_sizes(model._module)
        budgets = Budgets(question, limits, family, sizes, max(parameter.dtype.itemsize, 4), overhead)
        states_fit = budgets.positions_of_a_span()

        def share_phase_1(first: Job, job: Job) -> bool:
            most = budgets.positions_of_a_group(question.stop - first.positions.start)
            return job.rows == first.rows and job.positions.stop - first.positions.start <= most

        def share_states(first: Group, group: Group) -> bool:
            start, stop = first.cells.positions.start, group.cells.positions.stop
            return stop - start <= max(states_fit, len(first.cells.positions))

        n_rows, fits = len(question.windows), budgets.cells_of_a_job
        jobs = jobs_of(n_rows, question.positions, question.stop, fits, overhead)
        groups = [Group(run) for run in runs(jobs, share_phase_1)]
        return cls([Span(run) for run in runs(groups, share_states)], short=question.length <= states_fit)


def jobs_of(n_rows: int, positions: range, stop: int, fits: Callable[[int], int], overhead: int) -> list[Job]:
    """The jobs that compute ``positions`` of a grid, in order of position.

    Every run ends at ``stop``, one past the last position that a metric looks at. ``fits`` says how many
    cells that run over a given number of positions may share a forward; for ``overhead`` see `OVERHEAD`.
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


def runs(parts: list[T], joins: Callable[[T, T], bool]) -> list[list[T]]:
    """Cut a list into runs: a part joins the run before it where ``joins(first part of the run, part)``."""
    cut: list[list[T]] = []
    for part in parts:
        if cut and joins(cut[-1][0], part):
            cut[-1].append(part)
        else:
            cut.append([part])
    return cut
