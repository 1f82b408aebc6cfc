"""Which cells of a grid run together: as many as are worth a forward, and no more than memory permits.

The plan is a list of `Job` in order of position. Each job is one forward through phase 2, the layers above the
patched ones (see `phases`), with enough positions to be worth its calls. In phase 1, the patched layers, few rows run
at a time, and what is shorter is padded, so that a job may take it in several pieces. Neighbouring jobs form a `Span`,
whose starting states are made in one run. The plan depends on the question, the limits and the number of processes,
never on which of them computes which job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..scan.runs import TOGETHER
from ..sites import BY_NAME, STATE, Kind, Site
from .question import Question

if TYPE_CHECKING:
    from ..model import MambaTrace

T = TypeVar("T")

#: The fixed cost of calling a layer once more, as a number of positions that take as long: a CPU reads the
#: layer's weights again, a GPU launches its kernels again. Estimates; the one for a GPU was never timed.
OVERHEAD = {"cpu": 72, "cuda": 1000}
#: How many times as long the call of a layer takes in which a trace watches a site. An estimate.
TRACED = 3
#: How many times as long as its calls a forward is to take; one that takes longer gains next to nothing.
WORTH = 32


@dataclass(frozen=True)
class Limits:
    """What the user allows to run at once.

    Attributes:
        batch_size: cells in one forward; ``None`` for as many as memory permits.
        memory: bytes for the activations of a forward, again for the states that cells start from, and again for
            logits.
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
class Span:
    """Neighbouring jobs, whose starting states are made in one run."""

    jobs: list[Job]

    @property
    def positions(self) -> range:
        """The positions where its cells start."""
        return range(self.jobs[0].positions.start, self.jobs[-1].positions.stop)


@dataclass(frozen=True)
class Footprint:
    """Bytes that one layer takes, where several rows run it.

    Attributes:
        position: of the activations at one position of a row.
        patch: how many more of them an edit of the patched site makes.
        row: of what each row takes whatever its length: the keys and values that it reads.
        state: of one state; 0 without an SSM.
        value: of the patched site at one position; 0 in a layer without it.
    """

    position: int
    patch: int
    row: int
    state: int
    value: int

    @classmethod
    def of(cls, kind: Kind, sizes: Mapping[str, int], site: Site, itemsize: int, length: int) -> Footprint:
        """The footprint of a layer.

        Args:
            kind: what stands in it.
            sizes: of its axes, and under `INNER` how many numbers an MLP or experts make at one position.
            site: the patched one.
            itemsize: bytes of a number.
            length: of the prompt.
        """

        def numbers(name: str) -> int:
            return at_a_position(BY_NAME[name].axes_in(kind.family or "dual"), sizes)

        ssm = attention = row = state = patch = 0
        if kind.family is not None:
            # in_proj's output, and what convolution and scan make of it.
            ssm, state = 8 * sizes["E"] + 4 * (numbers("B") + numbers("C")), numbers(STATE)
        if "attn" in kind.parts:
            # Scores and a mask over all keys, where no fused kernel runs; keys and values of a row's own.
            attention = 4 * numbers("q") + 4 * numbers("k") + 2 * sizes["Q"] * length
            row = 2 * numbers("k") * length
        value = at_a_position(site.axes_in(kind.family or "dual"), sizes) if kind.has(site) else 0
        if value and kind.family is not None and set("LEN") <= set(site.axes) and site.name != STATE:
            # A_bar, B_bar or write, and the values computed from an edit of it.
            patch = 4 * max(numbers("B_bar"), value)
        # The parts run one after the other, between the stream before and after.
        position = 5 * sizes["D"] + max(ssm, attention, sizes.get(INNER, 0))
        return cls(*(count * itemsize for count in (position, patch, row, state, value)))


#: The key of the sizes under which the width of an MLP stands.
INNER = "inner"


def at_a_position(axes: str, sizes: Mapping[str, int]) -> int:
    """How many numbers a value has at one position of one row."""
    return math.prod(sizes[axis] for axis in axes if axis not in "BL")


def sizes_of(block: Any, stream: int) -> dict[str, int]:
    """The size of each axis letter that a block fixes, D included, and its `INNER` width."""
    parts = {name: block.part(name) for name in ("ssm", "attn", "moe", "mlp")}
    sizes = {"D": stream}
    for part in ("ssm", "attn", "moe"):
        sizes |= parts[part].sizes if parts[part] is not None else {}
    fed = [parts[name] for name in ("moe", "mlp") if parts[name] is not None]
    return sizes | {INNER: sum(map(width_of, fed))}


def width_of(fed: nn.Module) -> int:
    """About how many numbers an MLP, or the experts that each token has, make at one position."""
    linear = sum(getattr(module, "out_features", 0) for module in fed.modules())
    of_experts = sum(weight.shape[1] for weight in fed.parameters() if weight.dim() == 3)  # [X,out,in]
    return linear + of_experts * max(getattr(module, "top_k", 1) for module in fed.modules())


@dataclass(frozen=True)
class Budgets:
    """How much of a grid may run together: one budget for each step, and why the step has a limit.

    Attributes:
        question, limits: as `Plan.of` gets them.
        layers: the footprint of each layer.
        logits: bytes of those at one position.
        overhead: the cost of calling a layer once more, in positions; see `OVERHEAD`.
    """

    question: Question
    limits: Limits
    layers: Sequence[Footprint]
    logits: int
    overhead: int

    def rows_of_a_forward(self, length: int, patching: bool) -> int:
        """Rows of ``length`` positions in one forward: the activations of a layer are held at once.

        Where it is ``patching``, these include what an edit of the site makes. At least one row.
        """

        def bytes_of_a_row(layer: Footprint) -> int:
            return 4 * layer.state + layer.row + length * (layer.position + (layer.patch if patching else 0))

        states = 2 * TOGETHER * max(layer.state for layer in self.layers)  # of runs that are rows, before and after
        rows = max(1, (self.limits.memory - states) // max(map(bytes_of_a_row, self.layers)))
        return min(rows, self.limits.batch_size or rows)

    def rows_of_a_job(self, positions: range) -> int:
        """Rows of the grid whose cells at these positions share a forward of phase 2, in which no site is watched."""
        rows = self.rows_of_a_forward(columns_of(positions, self.question.stop), patching=False)
        rows = min(rows, self.limits.memory // (len(positions) * len(self.question.looked_at) * self.logits))
        return rows if self.limits.batch_size is None else min(rows, self.limits.batch_size // len(positions))

    def pieces(self, job: Job) -> list[Job]:
        """The cells of a job that run through phase 1 together.

        Two things limit them: the activations of a forward, which at each position runs as many rows of the grid as a
        window has layers; and padding, as k positions waste k²/2: at most what another call costs.
        """
        pieces, start = [], job.positions.start
        while start < job.positions.stop:
            activations = self.rows_of_a_forward(self.question.stop - start, patching=True) // self.question.window
            most = max(1, min(activations, math.isqrt(2 * TRACED * self.overhead)))
            piece = range(start, min(start + most, job.positions.stop))
            pieces.append(Job(job.rows, piece))
            start = piece.stop
        return pieces

    def positions_of_a_span(self) -> int:
        """Positions whose starting states are held at once, for all layers.

        Their run keeps copies of one prompt's states and of the source's values, which may be as large as states. In
        one layer after the other it makes those of both prompts, and what they are computed from.
        """
        kept = [layer.state + layer.value for layer in self.layers]
        bytes_of_a_position = sum(kept) + 4 * max(kept)
        return self.limits.memory // bytes_of_a_position if any(kept) else self.question.length


@dataclass(frozen=True)
class Plan:
    """All the work of a grid, in order of position.

    Attributes:
        spans: the work, by the starting states that it shares.
        short: whether the states of all positions of the prompt fit into memory, so that the unpatched runs
            can make them along with everything else.
        budgets: how much of it runs together.
    """

    spans: list[Span]
    short: bool
    budgets: Budgets

    @classmethod
    def of(cls, model: MambaTrace, question: Question, limits: Limits, processes: int = 1) -> Plan:
        """Plan a grid that some ``processes`` compute."""
        parameter = next(model._module.parameters())
        overhead = OVERHEAD.get(parameter.device.type, OVERHEAD["cuda"])
        width, itemsize = model.config.hidden_size, max(parameter.dtype.itemsize, 4)
        layers = [
            Footprint.of(kind, sizes_of(envoy._module, width), question.patched, itemsize, question.length)
            for kind, envoy in zip(question.layout.layers, model.layers, strict=True)
        ]
        budgets = Budgets(question, limits, layers, model.config.vocab_size * itemsize, overhead)
        states_fit = max(1, budgets.positions_of_a_span())

        def share_states(first: Job, job: Job) -> bool:
            return job.positions.stop - first.positions.start <= states_fit

        # Rows join layer by layer: half of them run on average.
        n_rows = len(question.windows)
        all_columns = columns_of(question.positions, question.stop)
        n_jobs = max(processes, math.ceil(all_columns * n_rows / 2 / (WORTH * overhead)))
        enough = math.ceil(all_columns / n_jobs)
        jobs = jobs_of(n_rows, question.positions, question.stop, budgets.rows_of_a_job, enough, states_fit)
        spans = [Span(run) for run in runs(jobs, share_states)]
        return cls(spans, question.length <= states_fit, budgets)


def columns_of(positions: range, stop: int) -> int:
    """How many columns a row has that runs from each of ``positions`` up to ``stop``, one run behind the other."""
    return sum(stop - position for position in positions)


def jobs_of(
    n_rows: int, positions: range, stop: int, rows_that_fit: Callable[[range], int], enough: int, most: int
) -> list[Job]:
    """The jobs that compute ``positions`` of a grid, in order of position.

    Args:
        n_rows: of the grid.
        positions: its positions.
        stop: one past the last position that a metric looks at, where every run ends.
        rows_that_fit: how many rows may share a forward with their cells at some positions.
        enough: a job with as many columns in each row takes no further position.
        most: positions of a job.
    """
    jobs: list[Job] = []
    start = positions.start
    while start < positions.stop:
        together = range(start, start + 1)
        while together.stop < positions.stop and len(together) < most and columns_of(together, stop) < enough:
            longer = range(start, together.stop + 1)
            if rows_that_fit(longer) < n_rows:
                break
            together = longer
        rows = max(1, min(rows_that_fit(together), n_rows))
        jobs += [Job(range(row, min(row + rows, n_rows)), together) for row in range(0, n_rows, rows)]
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
