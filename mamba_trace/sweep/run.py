"""Computing a grid: every job that is not done yet, measured as it comes and kept as it goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from .kept import FolderPath, Kept
from .patched import last_logits, patched_streams
from .plan import Job, Limits, Plan
from .processes import Processes
from .question import Question
from .unpatched import PROMPT, SOURCE, Stretch, Unpatched, run_unpatched, stretches

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Answers:
    """What came out.

    Attributes:
        values: of each metric [M,rows,L].
        source, prompt: each metric of the unpatched runs [M].
    """

    values: Tensor
    source: Tensor
    prompt: Tensor


def answers(
    model: MambaTrace,
    question: Question,
    limits: Limits,
    keep: FolderPath,
    progress: bool,
    distribute: bool,
) -> Answers:
    """Compute a grid.

    Args:
        model: the model.
        question: what is asked.
        limits: how much runs at once.
        keep: a folder that finished cells are kept in and taken from.
        progress: show a progress bar on stderr.
        distribute: share the cells with the other processes that a launcher started.
    """
    processes = Processes.here(model.device) if distribute else Processes()
    processes.check_same(question.described())
    with torch.no_grad():
        plan = None if question.after_layers else Plan.of(model, question, limits)
        whole = question.patched if plan is not None and plan.short else None
        unpatched, stretch = run_unpatched(model, question.tokens, question.looked_at, whole)
        both = question.measure(unpatched.logits)  # [M,2]
        kept = Kept.open(keep, question, both)
        # A patch that changes nothing leaves the prompt's answer.
        values = both[:, PROMPT, None, None].repeat(1, len(question.windows), question.length)
        if plan is None:
            after_layers(question, unpatched, values)
        else:
            kept.jobs |= set(processes.gather(list(kept.jobs)))
            missing = [job for job in plan.jobs if not kept.has(job)]
            with bar_over(missing, question, kept, processes, progress) as bar:
                mine = set(processes.share(missing))
                for job, found in sweep(model, question, plan, unpatched, stretch, mine):
                    kept.add(job, found)
                    bar.done(job)
                kept.cells = dict(processes.gather(list(kept.cells.items())))
                bar.show()
            kept.fill(values)
    return Answers(values, both[:, SOURCE], both[:, PROMPT])


def on_server(model: MambaTrace, remote: bool | str, compute: Callable[..., Answers], *args: Any) -> Answers:
    """What ``compute(model, *args)`` returns on a server: one session, from which only answers come back."""
    with model.session(remote=remote):
        found = compute(model, *args)
        values = nnsight.save(found.values)
        source, prompt = nnsight.save(found.source), nnsight.save(found.prompt)
    return Answers(values, source, prompt)


def after_layers(question: Question, unpatched: Unpatched, values: Tensor) -> None:
    """Fill the row of a site after all layers: the source's logits at a position, the prompt's elsewhere."""
    for m, position in enumerate(question.looked_at):
        logits = unpatched.logits[PROMPT].clone()  # [m,V]
        logits[m] = unpatched.logits[SOURCE, m]
        values[:, :, position] = question.measure(logits[None])


def sweep(
    model: MambaTrace,
    question: Question,
    plan: Plan,
    unpatched: Unpatched,
    whole: Stretch | None,
    wanted: Collection[Job],
) -> Iterator[tuple[Job, Tensor]]:
    """Run those of a grid's jobs that are wanted: each with its metrics [M,rows,k].

    ``whole`` is the stretch of all positions, where there is one already.
    """
    needed = [any(job in wanted for job in stretch.jobs) for stretch in plan.stretches]
    if not any(needed):
        return
    spans = [stretch.positions for stretch in plan.stretches]
    found: Iterable[Stretch | None] = [whole]
    if whole is None:
        found = stretches(model, question.tokens, spans, needed, question.patched)
    for planned, stretch in zip(plan.stretches, found, strict=False):  # it ends with the last that is needed
        for group in planned.groups:
            jobs = [job for job in group.jobs if job in wanted]
            if stretch is None or not jobs:
                continue
            patched = patched_streams(model, group.whole, question, unpatched, stretch)
            for job in jobs:
                logits = last_logits(model, job, question, patched, unpatched, stretch)  # [rows,k,m,V]
                yield job, question.measure(logits.flatten(0, 1)).unflatten(1, logits.shape[:2])


@contextmanager
def bar_over(
    jobs: list[Job], question: Question, kept: Kept, processes: Processes, show: bool
) -> Iterator[Bar]:
    """A progress bar over the time that jobs take, which is not the same for all cells."""
    bar = Bar(jobs, question, processes, show)
    try:
        yield bar
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{bar.cells} of {bar.all_cells} cells {kept.fate}")
        raise
    finally:
        bar.bar.close()


class Bar:
    """A progress bar that shows the cells of all processes, and estimates by what is left to run."""

    def __init__(self, jobs: list[Job], question: Question, processes: Processes, show: bool) -> None:
        self.question, self.processes = question, processes
        self.all_cells = len(question.windows) * question.length
        self.others = self.all_cells - sum(job.n_cells for job in jobs)  # kept, or what no patch can change
        self.cells = self.others
        shared = f" on {processes.size} processes" if processes.size > 1 else ""
        self.bar = tqdm(
            total=sum(map(self.work, jobs)),
            desc=f"patching {question.site.name}{shared}",
            disable=not show or processes.rank > 0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]",
            postfix=f"{self.cells}/{self.all_cells}",
        )
        self.worked = processes.counter("work")
        self.done_cells = processes.counter("cells")

    def work(self, job: Job) -> int:
        """Positions times layers."""
        layers = sum(self.question.n_layers - self.question.windows[row].start for row in job.rows)
        return layers * len(job.positions) * (self.question.stop - job.positions.start)

    def done(self, job: Job) -> None:
        """Count a job of this process."""
        self.show(job.n_cells, self.work(job))

    def show(self, cells: int = 0, work: int = 0) -> None:
        """Count, and show how far all processes are."""
        self.cells = self.others + self.done_cells(cells)
        self.bar.set_postfix_str(f"{self.cells}/{self.all_cells}", refresh=False)
        self.bar.update(self.worked(work) - self.bar.n)
