"""Running the cells of a plain model: each from its layer and its position on, as a row of a batch.

Each cell runs in two phases. Phase 1 (`run_patched_layers`) covers the patched layers: a trace watches a site
there, so the slow path runs, on the cell's own rows only. Phase 2 (`run_to_the_end`) covers the layers above:
nothing is watched, so all cells of a job share one fused batch, which grows where the patched layers of
further cells end.

Every cell starts at its own position, so the patched position is always its first. In phase 1 it is a row; rows of
later positions are shorter, and what pads them comes after their end and changes nothing before it. In phase 2 a row
of the batch is a row of the grid: the cells of all positions one behind the other, with nothing between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..scan.reference import accumulation_dtype
from ..scan.runs import Runs
from ..sites import STATE
from ..tracing import forward_of
from .metrics import of_few_logits
from .plan import Job, Limits, Plan
from .question import PROMPT, SOURCE, Question
from .unpatched import CellStarts, Unpatched, run_unpatched, starts_by_span

if TYPE_CHECKING:
    from ..model import MambaTrace


#: Of how many tokens at most the logits are computed by themselves.
FEW = 16


class InPhases:
    """One grid of a plain model, whose cells run in two phases.

    Attributes:
        logits: the logits of the unpatched runs on source and prompt, where a metric looks at them [2,m,V].
        tokens: whose logits alone are computed for each cell, ``None`` for all.
        measuring: the question, of these logits.
        jobs: the jobs that compute the grid; none for a site after all layers.
        slow: whether to tell the user how cells run, before they do.
    """

    slow = False

    def __init__(self, model: MambaTrace, question: Question, limits: Limits, processes: int) -> None:
        self.model, self.question = model, question
        self.plan = None if question.after_layers else Plan.of(model, question, limits, processes)
        self.spans = [] if self.plan is None else self.plan.spans
        self.jobs = [job for span in self.spans for job in span.jobs]
        site = question.patched if self.plan is not None and self.plan.short else None
        self.unpatched, self.starts = run_unpatched(model, question.tokens, question.looked_at, site)
        self.logits = self.unpatched.logits
        self.tokens, self.measuring = few_logits(model, question)

    def fill(self, values: Tensor) -> None:
        """Put what is known without running a cell into ``values`` [M,rows,L].

        Behind all layers, the source's value at a position gives the source's logits there, and no others.
        """
        if self.question.after_layers:
            for number, position in enumerate(self.question.looked_at):
                logits = self.logits[PROMPT].clone()  # [m,V]
                logits[number] = self.logits[SOURCE, number]
                values[:, :, position] = self.question.measure(logits[None])

    def cells(self, wanted: Collection[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Run the wanted jobs: yields each with its metrics [M,rows,k]."""
        needed = [any(job in wanted for job in span.jobs) for span in self.spans]
        if not any(needed):
            return
        made: Iterable[CellStarts | None] = [self.starts]
        if self.starts is None:
            spans, site = [span.positions for span in self.spans], self.question.patched
            made = starts_by_span(self.model, self.question.tokens, spans, needed, site, self.unpatched)
        for span, starts in zip(self.spans, made, strict=False):  # ends with the last span that is needed
            for job in span.jobs:
                if starts is not None and job in wanted:
                    yield job, self.metrics_of(job, starts)

    def metrics_of(self, job: Job, starts: CellStarts) -> Tensor:
        """Run the cells of a job: their metrics [M,rows,k]."""
        model, question, unpatched = self.model, self.question, self.unpatched
        assert self.plan is not None
        pieces = [
            run_patched_layers(model, piece, question, unpatched, starts) for piece in self.plan.budgets.pieces(job)
        ]
        # A row of the grid has the streams of all pieces, one run behind the other.
        streams = [torch.cat([run for piece in row for run in piece])[None] for row in zip(*pieces, strict=True)]
        logits = run_to_the_end(model, job, question, streams, unpatched, starts, self.tokens)  # [(row k),m,V]
        return rearrange(self.measuring.measure(logits), "metric (row k) -> metric row k", row=len(job.rows))

    def work(self, job: Job) -> int:
        """What a job costs: positions times layers."""
        question = self.question
        layers = sum(question.n_layers - question.windows[row].start for row in job.rows)
        return layers * len(job.positions) * (question.stop - job.positions.start)

    def __str__(self) -> str:
        if self.question.after_layers:
            return "no cell in a forward of its own, as the site comes after all layers"
        return "each cell from its layer and its position on, as a row of a batch"


def run_patched_layers(
    model: MambaTrace, cells: Job, question: Question, unpatched: Unpatched, starts: CellStarts
) -> list[list[Tensor]]:
    """Phase 1: run cells through the layers that they patch; each layer runs only the cells that patch it.

    Returns, for each row of the grid, the residual stream behind its last patched layer, from each position on [l,D].
    """
    windows = question.windows[cells.rows.start : cells.rows.stop]
    positions = torch.tensor(cells.positions, device="cpu")  # [k]
    offsets = positions - starts.positions.start
    steps = torch.arange(question.stop - cells.positions.start, device="cpu")
    span = (positions[:, None] + steps).clamp(max=question.stop - 1)  # [k,l]: past its end, the last again

    def places(layer: int) -> Tensor:
        return repeat(offsets, "k -> (window k)", window=sum(layer in window for window in windows))

    def starting(layer: int) -> list[Tensor]:
        return [unpatched.streams[layer][span]] * sum(window.start == layer for window in windows)

    first, last = windows[0].start, windows[-1].stop
    rows: list[Tensor] = []  # [k,l,D] for each window that is under way
    past = starts.start([places(layer) for layer in range(len(model.layers))], unpatched.attended)
    with model.trace(inputs_embeds=joined(starting(first)), cache=past, use_cache=False) as tracer:
        streams = nnsight.save([])
        for layer in range(last):
            block, new = model.layers[layer], starting(layer)
            if not rows and not new:
                block.skip(block.input)
                continue
            # Never the model's own input, which some models multiply by a factor.
            block.input = joined([*rows, *new])
            projected, values = unpatched.projected[layer], starts.values[layer]
            if projected is not None and not rows:  # every row is as in the unpatched run
                block.ssm.in_proj.skip(projected[span].repeat(len(new), 1, 1))
            rows += new
            if values is not None:
                patch(model, question, layer, values[offsets])
            rows = list(block.resid_post.output.split(len(offsets)))
            ended = sum(window.stop == layer + 1 for window in windows)
            streams.extend(rows[:ended])
            rows = rows[ended:]
        tracer.stop()
    lengths = [question.stop - position for position in cells.positions]
    return [[run[:length] for run, length in zip(stream, lengths, strict=True)] for stream in streams]


def patch(model: Any, question: Question, layer: int, values: Tensor) -> None:
    """In a trace, put the source's values [k,...] into the rows of every window, at their first position."""
    place = model.hook(question.patched.path(layer))
    if question.patched.name == STATE:
        h = place[0].output  # [B,...,N]
        h.unflatten(0, (-1, len(values)))[:] = values
    else:
        value = place.output  # [B,L,...]
        value.unflatten(0, (-1, len(values)))[:, :, 0] = values


def joined(rows: list[Tensor]) -> Tensor:
    """The rows [b,l,D] as one batch, on the device of the last, which is where they run next."""
    return torch.cat([tensor.to(rows[-1].device) for tensor in rows])


def run_to_the_end(
    model: MambaTrace,
    job: Job,
    question: Question,
    streams: list[Tensor],
    unpatched: Unpatched,
    starts: CellStarts,
    tokens: list[int] | None,
) -> Tensor:
    """Phase 2: run the cells of a job through the layers above their patched ones.

    Takes the ``streams`` behind these, for each row of the grid those of all positions one behind the other [1,L,D].
    Returns the logits of every cell, row by row of the grid, where a metric looks at them [(row k),m,V]: those of the
    ``tokens`` alone where there are any.
    """
    n_layers, positions = len(model.layers), torch.tensor(job.positions, device="cpu")
    behind = [question.windows[row].stop for row in job.rows]
    runs = Runs(tuple(question.stop - position for position in job.positions))

    def joining(layer: int) -> list[Tensor]:
        return [stream for stream, stop in zip(streams, behind, strict=True) if stop == layer]

    looked_at = torch.tensor(question.looked_at, device="cpu")
    starts_of_runs = torch.tensor([span.start for span in runs.spans], device="cpu")
    ends = starts_of_runs[:, None] + (looked_at - positions[:, None]).clamp(min=0)  # [k,m]: where these positions are
    read = ends.flatten()
    reads_on = model.layers[-1]._module.reads_on and len(read) < sum(runs.lengths)
    past = starts.start_runs(job.positions, runs, unpatched.attended, read if reads_on else None, len(streams))
    first = behind[0]
    with model.trace(inputs_embeds=torch.cat(joining(first)), cache=past, use_cache=False):
        for layer in range(n_layers):
            block = model.layers[layer]
            if layer < first:
                block.skip(block.input)
            elif joining(layer):
                block.input = joined([*([block.input] if layer > first else []), *joining(layer)])  # [row,L,D]
        streams_read = [stream[:, read] for stream in joining(n_layers)]  # [1,(k m),D]
        if first < n_layers:
            stream = model.norm_f.input
            streams_read.insert(0, stream if reads_on else stream[:, read.to(stream.device)])
        model.norm_f.input = joined(streams_read).unflatten(1, ends.shape).flatten(0, 1)  # [(row k),m,D]
        if tokens is not None:
            model.lm_head.skip(logits_of(tokens, model.lm_head._module, model.lm_head.input))
        logits = model.hook("logits").output.save()  # [(row k),m,V]
    before = looked_at < positions[:, None]  # [k,m]: before the run begins, logits are the unpatched run's
    if not before.any():
        return logits
    before = repeat(before, "k m -> (row k) m 1", row=len(job.rows)).to(logits.device)
    unpatched_logits = unpatched.logits[PROMPT] if tokens is None else unpatched.logits[PROMPT][..., tokens]
    return torch.where(before, unpatched_logits, logits)


def logits_of(tokens: list[int], head: nn.Linear, value: Tensor) -> Tensor:
    """What lm_head returns for some ``tokens`` [...,tokens], of its input [...,D].

    Each row is added up by itself, in the same way however many others there are, which matrix products of few columns
    do not do: the numbers of a cell do not depend on which others run with it.
    """
    weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    dtype = accumulation_dtype(weight)
    products = value.to(weight.device, dtype)[..., None, :] * weight.to(dtype)
    logits = products.sum(-1) if bias is None else products.sum(-1) + bias
    return logits.to(weight.dtype)


def few_logits(model: MambaTrace, question: Question) -> tuple[list[int] | None, Question]:
    """The tokens whose logits are all that a question needs, and the question of these; ``None`` if it needs all.

    Where there are few, most of lm_head is not multiplied by. One that is offloaded has no weight to read here.
    """
    few = of_few_logits(question.metrics)
    if few is None or len(few[0]) > FEW or forward_of(model.lm_head._module, nn.Linear) is None:
        return None, question
    tokens, metrics = few
    return tokens, replace(question, metrics=metrics)
