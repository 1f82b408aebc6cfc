"""Running each cell whole: in a forward of its own, over the whole prompt and from the first layer.

Where something that the user has added may look at a run (see `changes`), it must see in each cell what it
would see in an ordinary trace of that cell: every position, one row, and no state from elsewhere. So cells
share nothing, source and prompt run one after the other, and cells before the first difference of the prompts
run too. That costs a forward for each cell, and one on the source for each row of the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..sites import STATE
from .changes import Change
from .plan import Job
from .question import PROMPT, SOURCE, Question

if TYPE_CHECKING:
    from ..model import MambaTrace


class Whole:
    """One grid, each cell of which runs whole because of ``changes``, at least one.

    Raises `UnknownSiteError` before anything runs, if a layer that is patched does not have the site.

    Attributes:
        logits: the logits of the unpatched runs on source and prompt, where a metric looks at them [2,m,V].
        jobs: one job for each cell, row by row of the grid, as the cells of a row share a run on the source.
        slow: whether to tell the user how cells run, before they do.
    """

    slow = True

    def __init__(self, model: MambaTrace, question: Question, changes: Sequence[Change]) -> None:
        self.model, self.question, self.changes = model, question, changes
        rows, positions = range(len(question.windows)), range(question.length)
        for row in rows:
            for layer in question.patched_layers(row):
                model.hook(question.site.path(layer))
        self.jobs = [Job(range(row, row + 1), range(p, p + 1)) for row in rows for p in positions]
        self.logits = torch.cat([patched_logits(model, question, run, {}, 0) for run in (SOURCE, PROMPT)])

    def fill(self, values: Tensor) -> None:
        """Do nothing: no value is known without running its cell."""

    def cells(self, wanted: Iterable[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Run the wanted jobs, in the order of `jobs`: yields each with its metrics [M,1,1]."""
        row, values = None, dict[int | None, Tensor]()
        for job in wanted:
            if job.rows.start != row:
                row = job.rows.start
                values = source_values(self.model, self.question, self.question.patched_layers(row))
            logits = patched_logits(self.model, self.question, PROMPT, values, job.positions.start)
            yield job, self.question.measure(logits)[..., None]

    def work(self, job: Job) -> int:
        """What a job costs: a forward for each cell."""
        return job.n_cells

    def __str__(self) -> str:
        more = len(self.changes) - 1
        what = self.changes[0].what + (f" and {more} more changes" if more else "")
        return (
            f"each cell in a forward of its own, over the whole prompt and from the first layer, as the "
            f"model has {what}, which may look at all of a run"
        )


def source_values(model: MambaTrace, question: Question, layers: Iterable[int | None]) -> dict[int | None, Tensor]:
    """The site's value [1,L,...] in some layers, in the run on the source."""
    with model.trace(question.tokens[SOURCE, None], use_cache=False):
        values = nnsight.save({})
        for layer in layers:
            values[layer] = model.hook(question.site.path(layer)).output.clone()
    return values


def patched_logits(model: Any, question: Question, run: int, values: dict[int | None, Tensor], position: int) -> Tensor:
    """The logits [1,m,V] of the run on source or prompt, with ``values`` put in at a position, by layer."""
    site = question.site
    with model.trace(question.tokens[run, None], use_cache=False):
        for layer, value in values.items():
            place = model.hook(site.path(layer))
            if site.name == STATE:
                place[position].output[:] = value[:, position]
            else:
                place.output[:, position] = value[:, position]
        logits = model.hook("logits").output[:, question.looked_at].save()
    return logits
