"""Computing a grid: every job that is not done yet, measured as it comes and kept as it goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from .changes import changes
from .kept import FolderPath, Kept
from .marks import mark_of_function, mark_of_weights
from .parts import InParts
from .plan import Job, Limits
from .processes import Processes
from .question import Question
from .unpatched import PROMPT, SOURCE
from .whole import Whole

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Answers:
    """What came out.

    Attributes:
        values: of each metric [M,rows,L].
        source, prompt: each metric of the unpatched runs [M].
        plan: how cells ran, and why so, in words.
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
    model.dispatch()
    processes = Processes.here(model.device) if distribute else Processes()
    changed = changes(model)
    asked = question.described() | {"changes": [[change.what, change.mark] for change in changed]}
    processes.check_same(asked)
    if keep is not None:
        # The first process's, as a metric may refer to the rank that it runs on.
        marks = [mark_of_function(metric) for metric in question.metrics.values()]
        asked["metric_functions"] = processes.gather([marks])[0]
        asked["weights"] = mark_of_weights(model._module)
    with torch.no_grad():
        way = Whole(model, question, changed) if changed else InParts(model, question, limits)
        both = question.measure(way.logits.clone())  # [M,2]
        kept = Kept.open(keep, asked, both)
        # A patch that changes nothing leaves the prompt's answer.
        values = both[:, PROMPT, None, None].repeat(1, len(question.windows), question.length)
        way.fill(values)
        kept.jobs |= set(processes.gather(list(kept.jobs)))
        missing = [job for job in way.jobs if not kept.has(job)]
        with bar_over(missing, way, question, kept, processes, progress) as bar:
            for job, found in way.cells(processes.share(missing)):
                kept.add(job, found)
                bar.done(job)
            kept.cells = dict(processes.gather(list(kept.cells.items())))
            bar.show()
        kept.fill(values)
    return Answers(values, both[:, SOURCE], both[:, PROMPT], str(way))


def on_server(model: MambaTrace, remote: bool | str, compute: Callable[..., Answers], *args: Any) -> Answers:
    """What ``compute(model, *args)`` returns on a server: one session, from which only answers come back."""
    with model.session(remote=remote):
        found = compute(model, *args)
        values = nnsight.save(found.values)
        source, prompt = nnsight.save(found.source), nnsight.save(found.prompt)
        plan = nnsight.save(found.plan)
    return Answers(values, source, prompt, plan)


@contextmanager
def bar_over(
    jobs: list[Job], way: Whole | InParts, question: Question, kept: Kept, processes: Processes, show: bool
) -> Iterator[Bar]:
    """A progress bar over the time that jobs take, which is not the same for all cells."""
    bar = Bar(jobs, way, question, processes, show and bool(way.jobs))
    try:
        yield bar
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{bar.cells} of {bar.all_cells} cells {kept.fate}")
        raise
    finally:
        bar.bar.close()


class Bar:
    """A progress bar that shows the cells of all processes, and estimates by what is left to run."""

    def __init__(
        self, jobs: list[Job], way: Whole | InParts, question: Question, processes: Processes, show: bool
    ) -> None:
        self.way, self.processes = way, processes
        self.all_cells = len(question.windows) * question.length
        self.others = self.all_cells - sum(job.n_cells for job in jobs)  # kept, or what no patch can change
        self.cells = self.others
        shared = f" on {processes.size} processes" if processes.size > 1 else ""
        self.bar = tqdm(
            total=sum(map(way.work, jobs)),
            desc=f"patching {question.site.name}{shared}",
            disable=not show or processes.rank > 0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]",
            postfix=f"{self.cells}/{self.all_cells}",
        )
        if way.slow and not self.bar.disable:
            self.bar.write(f"patching {question.site.name}: {way}", file=sys.stderr)
        self.worked = processes.counter("work")
        self.done_cells = processes.counter("cells")

    def done(self, job: Job) -> None:
        """Count a job of this process."""
        self.show(job.n_cells, self.way.work(job))

    def show(self, cells: int = 0, work: int = 0) -> None:
        """Count, and show how far all processes are."""
        self.cells = self.others + self.done_cells(cells)
        self.bar.set_postfix_str(f"{self.cells}/{self.all_cells}", refresh=False)
        self.bar.update(self.worked(work) - self.bar.n)
