"""Running cells whole: each in a forward of its own, over the whole prompt and from the first layer.

Where something of the user's may look at a run (see `changes`), it must see in each cell what it would see in
an ordinary trace of that cell: every position, one row, and no state from elsewhere. So nothing is shared
between cells, no cell is left out because the prompts are still the same at its position, and the runs on
source and prompt are two. That takes a forward for each cell, and one on the source for each row of the grid.
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
from .question import Question
from .unpatched import PROMPT, SOURCE

if TYPE_CHECKING:
    from ..model import MambaTrace


class Whole:
    """One grid, each of whose cells runs whole.

    Args:
        model: the model.
        question: what is asked.
        changes: what has been done to the model, for which cells run whole; at least one.

    Attributes:
        logits: of the unpatched runs on source and prompt at the positions that are looked at [2,m,V].
        jobs: one for each cell, row by row of the grid, as the cells of a row share the run on the source.
        slow: whether to say how cells run before they do.

    Raises:
        UnknownSiteError: before anything runs, if a layer that is patched does not have the site.
    """

    slow = True

    def __init__(self, model: MambaTrace, question: Question, changes: Sequence[Change]) -> None:
        self.model, self.question, self.changes = model, question, changes
        for row in range(len(question.windows)):
            for layer in patched_layers(question, row):
                model.hook(question.site.path(layer))
        rows, positions = range(len(question.windows)), range(question.length)
        self.jobs = [Job(range(row, row + 1), range(p, p + 1)) for row in rows for p in positions]
        self.logits = torch.cat([patched_logits(model, question, row, {}, 0) for row in (SOURCE, PROMPT)])

    def fill(self, values: Tensor) -> None:
        """Nothing is known without a run of a cell."""

    def cells(self, wanted: Iterable[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Run jobs, in the order of `jobs`: each with its metrics [M,1,1]."""
        row, values = None, dict[int | None, Tensor]()
        for job in wanted:
            if job.rows.start != row:
                row = job.rows.start
                values = source_values(self.model, self.question, row)
            logits = patched_logits(self.model, self.question, PROMPT, values, job.positions.start)
            yield job, self.question.measure(logits)[..., None]

    def work(self, job: Job) -> int:
        """What a job takes: a forward for each cell."""
        return job.n_cells

    def __str__(self) -> str:
        more = len(self.changes) - 1
        what = self.changes[0].what + (f" and {more} more changes" if more else "")
        return (
            f"each cell in a forward of its own, over the whole prompt and from the first layer, as the "
            f"model has {what}, which may look at all of a run"
        )


def patched_layers(question: Question, row: int) -> Iterable[int | None]:
    """The layers that a row of the grid patches; ``None`` for a site of the whole model."""
    return [None] if question.site.scope == "model" else question.windows[row]


def source_values(model: MambaTrace, question: Question, row: int) -> dict[int | None, Tensor]:
    """The site's value [1,L,...] in each layer that a row of the grid patches, in the run on the source."""
    with model.trace(question.tokens[SOURCE, None], use_cache=False):
        values = nnsight.save({})
        for layer in patched_layers(question, row):
            values[layer] = model.hook(question.site.path(layer)).output.clone()
    return values


def patched_logits(
    model: Any, question: Question, run: int, values: dict[int | None, Tensor], position: int
) -> Tensor:
    """The logits [1,m,V] of a run on source or prompt, with ``values`` at a position of some layers."""
    site = question.site
    with model.trace(question.tokens[run, None], use_cache=False):
        for layer, value in values.items():
            place = model.hook(site.path(layer))
            if site.name == STATE:
                place[position].output[:] = value[:, position]
            else:
                place.output[:, position] = value[:, position]
        logits = model.lm_head.output[:, question.looked_at].save()
    return logits
