"""Running cells in parts: each from its layer and its position on, as rows of batches that cells share.

This is how a plain model is swept. Where something of a user's may look at a run, cells run whole instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from .patched import last_logits, patched_streams
from .plan import Job, Limits, Plan
from .question import Question
from .unpatched import PROMPT, SOURCE, Stretch, Unpatched, run_unpatched, stretches

if TYPE_CHECKING:
    from ..model import MambaTrace


class InParts:
    """One grid, whose cells run from their layer and their position on.

    Args:
        model: the model.
        question: what is asked.
        limits: how much runs at once.

    Attributes:
        logits: of the unpatched runs on source and prompt at the positions that are looked at [2,m,V].
        jobs: those that compute the grid; none for a site after all layers.
        slow: whether to say how cells run before they do.
    """

    slow = False

    def __init__(self, model: MambaTrace, question: Question, limits: Limits) -> None:
        self.model, self.question = model, question
        self.plan = None if question.after_layers else Plan.of(model, question, limits)
        site = question.patched if self.plan is not None and self.plan.short else None
        self.unpatched, self.whole = run_unpatched(model, question.tokens, question.looked_at, site)
        self.logits = self.unpatched.logits
        self.jobs = [] if self.plan is None else self.plan.jobs

    def fill(self, values: Tensor) -> None:
        """Put what is known without a run of a cell into ``values`` [M,rows,L]."""
        if self.question.after_layers:
            after_layers(self.question, self.unpatched, values)

    def cells(self, wanted: Collection[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Run jobs: each with its metrics [M,rows,k]."""
        if self.plan is None:
            return iter(())
        return sweep(self.model, self.question, self.plan, self.unpatched, self.whole, set(wanted))

    def work(self, job: Job) -> int:
        """What a job takes: positions times layers."""
        question = self.question
        layers = sum(question.n_layers - question.windows[row].start for row in job.rows)
        return layers * len(job.positions) * (question.stop - job.positions.start)

    def __str__(self) -> str:
        if self.plan is None:
            return "no cell in a forward of its own, as the site comes after all layers"
        return "each cell from its layer and its position on, as a row of a batch"


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
