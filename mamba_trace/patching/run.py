"""Computing a grid: every job that is not done yet is measured as it comes and kept as it goes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ArgumentError, MetricError
from .changes import changes, uncut
from .kept import SAME, FolderPath, Kept
from .marks import mark_of_function, mark_of_weights, settings_of
from .phases import InPhases
from .plan import Job, Limits
from .processes import Processes
from .question import PROMPT, SOURCE, Question
from .whole import Whole

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Answers:
    """The numbers of a grid.

    Attributes:
        values: every cell, for each metric [M,rows,L].
        source, prompt: each metric of the unpatched runs [M].
        plan: how cells ran and why, in words.
    """

    values: Tensor
    source: Tensor
    prompt: Tensor
    plan: str = ""


def answers(
    model: MambaTrace,
    question: Question,
    limits: Limits,
    keep: FolderPath,
    progress: bool,
    distribute: bool,
    begun: Answers | None = None,
) -> Answers:
    """Compute a grid, within ``limits``; the cells that ``begun`` has are taken from there.

    The other arguments are as in `patch_grid`. On Ctrl-C the exception has the cells that are done as `Answers`, in
    an attribute ``partial``.
    """
    model.dispatch()
    processes = Processes.here(model.device) if distribute else Processes()
    changed = changes(model)
    asked = question.described() | {
        "changes": [[change.what, change.mark] for change in changed],
        "architecture": model.architecture.name,
        "settings": settings_of(model._module),
    }
    processes.check_same(asked)
    if keep is not None:
        # The marks of the first process, as a metric may refer to the rank that it runs on.
        marks = [mark_of_function(metric) for metric in question.metrics.values()]
        asked["metric_functions"] = processes.gather([marks])[0]
        asked["weights"] = mark_of_weights(model._module)
    with torch.no_grad():
        whole = changed or uncut(question.layout, question.site)
        way = Whole(model, question, whole) if whole else InPhases(model, question, limits, processes.size)
        both = question.measure(way.logits.clone())  # [M,2]
        if bool(both.isnan().any()):
            raise MetricError(
                f"a metric of the unpatched runs is nan (source, prompt: "
                f"{dict(zip(question.metrics, both.tolist(), strict=True))}), and nothing can be compared with it"
            )
        kept = Kept.open(keep, asked, both)
        # A patch that changes nothing leaves the prompt's answer.
        values = both[:, PROMPT, None, None].repeat(1, len(question.windows), question.length)
        way.fill(values)
        if begun is not None:
            check_same_runs(begun, both)
            kept.take(begun.values.to(values), way.jobs)
        kept.jobs |= set(processes.gather(list(kept.jobs)))
        missing = [job for job in way.jobs if not kept.has(job)]
        with closing(Bar(missing, way, question, processes, progress and bool(way.jobs))) as bar:
            try:
                for job, metrics in way.cells(processes.share(missing)):
                    kept.add(job, metrics)
                    bar.count(job.n_cells, way.work(job))
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"{bar.cells} of {bar.all_cells} cells {kept.fate}")
                done = so_far(values, missing, kept)
                interrupt.partial = Answers(done, both[:, SOURCE], both[:, PROMPT], str(way))  # type: ignore[attr-defined]
                raise
            kept.cells = dict(processes.gather(list(kept.cells.items())))
            bar.count(0, 0)
        kept.fill(values)
    return Answers(values, both[:, SOURCE], both[:, PROMPT], str(way))


def check_same_runs(begun: Answers, both: Tensor) -> None:
    """Raises `ArgumentError` if the unpatched runs of an interrupted grid had other metrics than ``both`` [M,2]."""
    before = torch.stack((begun.source, begun.prompt), dim=-1).to(both)
    if not torch.allclose(before, both, rtol=SAME, atol=SAME):
        raise ArgumentError(
            f"resume= is a grid of another model or metric: its unpatched runs (source, prompt) measured "
            f"{before.tolist()}, and those of this call {both.tolist()}"
        )


def so_far(values: Tensor, missing: list[Job], kept: Kept) -> Tensor:
    """The cells of an interrupted grid: ``values`` [M,rows,L], with nan where one of the ``missing`` is not done."""
    done = values.clone()
    for job in missing:
        done[:, job.rows.start : job.rows.stop, job.positions.start : job.positions.stop] = math.nan
    kept.fill(done)
    return done


def on_server(model: MambaTrace, remote: bool | str, compute: Callable[..., Answers], *args: Any) -> Answers:
    """What ``compute(model, *args)`` returns, from a server: one session, of which only this comes back."""
    with model.session(remote=remote):
        computed = compute(model, *args)
        values = nnsight.save(computed.values)
        source, prompt = nnsight.save(computed.source), nnsight.save(computed.prompt)
        plan = nnsight.save(computed.plan)
    return Answers(values, source, prompt, plan)


class Bar:
    """A progress bar that shows the finished cells of all processes.

    It moves by the work that jobs cost, as some cells take longer than others, so the time left is right.
    """

    def __init__(
        self, jobs: list[Job], way: Whole | InPhases, question: Question, processes: Processes, show: bool
    ) -> None:
        self.all_cells = len(question.windows) * question.length
        # Cells that are kept already, or that no patch can change.
        self.others = self.all_cells - sum(job.n_cells for job in jobs)
        self.cells = self.others
        shared = f" on {processes.size} processes" if processes.size > 1 else ""
        self.bar = tqdm(
            total=sum(map(way.work, jobs)),
            desc=f"patching {question.site.name}{shared}",
            disable=not show or processes.rank > 0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]",
            postfix=f"{self.cells}/{self.all_cells}",
        )
        self.close = self.bar.close
        if way.slow and not self.bar.disable:
            self.bar.write(f"patching {question.site.name}: {way}", file=sys.stderr)
        self.add_work, self.add_cells = processes.counter("work"), processes.counter("cells")

    def count(self, cells: int, work: int) -> None:
        """Add what this process has done, and show how far all processes are."""
        self.cells = self.others + self.add_cells(cells)
        self.bar.set_postfix_str(f"{self.cells}/{self.all_cells}", refresh=False)
        self.bar.update(self.add_work(work) - self.bar.n)
