"""Running cells: rows of a batch, each from its layer and its position on.

A cell runs in two parts. In the layers that it patches a site is wanted, which costs kernels; there only the
rows that are patched run (`patched_streams`). Behind them nobody looks inside: the rows join one batch that
grows from layer to layer and runs fused to the end (`last_logits`). Every row starts at its position, so the
place that is patched is always the first. Rows of later positions are shorter; what pads them comes after
their end and changes nothing before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..sites import STATE
from .plan import Job
from .question import Question
from .unpatched import PROMPT, Stretch, Unpatched

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Patched:
    """Cells that have run through the layers that they patch.

    Attributes:
        job: which: rows of the grid, and k positions.
        streams: of each row, the residual stream behind its last patched layer [k,l,D].
    """

    job: Job
    streams: list[Tensor]

    def part(self, row: int, positions: range, length: int) -> Tensor:
        """The streams of some positions of a row of the grid, as far as they need: [b,length,D]."""
        first = positions.start - self.job.positions.start
        return self.streams[row - self.job.rows.start][first : first + len(positions), :length]


def patched_streams(
    model: MambaTrace, job: Job, question: Question, unpatched: Unpatched, stretch: Stretch
) -> Patched:
    """Run cells through the layers that they patch; at each layer a row for every window that it is in."""
    windows = [question.windows[row] for row in job.rows]
    positions = torch.tensor(job.positions, device="cpu")  # [k]
    offsets = positions - stretch.positions.start
    steps = torch.arange(question.stop - job.positions.start, device="cpu")
    span = (positions[:, None] + steps).clamp(max=question.stop - 1)  # [k,l]: at its end over and over

    def starting(layer: int) -> list[Tensor]:
        new = sum(window.start == layer for window in windows)
        return [unpatched.streams[layer][span]] * new

    def running(layer: int) -> int:
        return sum(layer in window for window in windows)

    first, last = windows[0].start, windows[-1].stop
    rows = starting(first)
    places = [offsets.repeat(running(layer)) for layer in range(len(model.layers))]
    with model.trace(inputs_embeds=joined(rows), cache=stretch.start(places), use_cache=False) as tracer:
        streams = nnsight.save([])
        for layer in range(last):
            block = model.layers[layer]
            if layer < first:
                block.skip(block.input)
                continue
            new = starting(layer)
            if layer > first:
                block.input = joined([*rows, *new])
            if unpatched.projected and (layer == first or not rows):  # as in the unpatched run
                block.ssm.in_proj.skip(unpatched.projected[layer][span].repeat(len(new), 1, 1))
            patch(model, question, layer, stretch.values[layer][offsets])
            rows = list(block.resid_post.output.split(len(offsets)))  # [k,l,D] each
            ended = sum(window.stop == layer + 1 for window in windows)
            streams.extend(rows[:ended])
            rows = rows[ended:]
        tracer.stop()
    return Patched(job, streams)


def patch(model: Any, question: Question, layer: int, values: Tensor) -> None:
    """Put the source's values [k,...] into every row at its first position, in a trace."""
    site = question.patched
    place = model.hook(site.path(layer))
    if site.name == STATE:
        h = place[0].output  # [B,E,N]
        h.unflatten(0, (-1, len(values)))[:] = values
    else:
        value = place.output  # [B,L,...]
        value.unflatten(0, (-1, len(values)))[:, :, 0] = values


def joined(rows: list[Tensor]) -> Tensor:
    """Rows [b,l,D] of one batch, on the device of the last, which is where they go on."""
    return torch.cat([tensor.to(rows[-1].device) for tensor in rows])


def last_logits(
    model: MambaTrace, job: Job, question: Question, patched: Patched, unpatched: Unpatched, stretch: Stretch
) -> Tensor:
    """Run cells from behind their patched layers to the end.

    Args:
        model: the model.
        job: the cells, row by row of the grid.
        question: what is asked.
        patched: among others, these cells.
        unpatched, stretch: what cells start from.

    Returns:
        Their logits at the m positions that metrics look at [rows,k,m,V].
    """
    n_layers, positions = len(model.layers), torch.tensor(job.positions, device="cpu")
    behind = {row: question.windows[row].stop for row in job.rows}
    first = behind[job.rows.start]

    def joining(layer: int) -> list[Tensor]:
        length = question.stop - job.positions.start
        return [patched.part(row, job.positions, length) for row in job.rows if behind[row] == layer]

    offsets = positions - stretch.positions.start
    places = [offsets.repeat(sum(stop <= layer for stop in behind.values())) for layer in range(n_layers)]
    looked_at = torch.tensor(question.looked_at, device="cpu")
    ends = (looked_at - positions[:, None]).clamp(min=0).repeat(len(job.rows), 1)  # [B,m]
    with model.trace(inputs_embeds=torch.cat(joining(first)), cache=stretch.start(places), use_cache=False):
        for layer in range(n_layers):
            block = model.layers[layer]
            if layer < first:
                block.skip(block.input)
            elif layer > first and joining(layer):
                block.input = joined([block.input, *joining(layer)])  # [B,l,D]
        stream = joined([model.norm_f.input, *(joining(n_layers) if first < n_layers else ())])
        model.norm_f.input = stream[torch.arange(len(stream), device="cpu")[:, None], ends]  # [B,m,D]
        logits = model.lm_head.output.save()  # [B,m,V]
    logits = logits.unflatten(0, (len(job.rows), len(positions)))
    before = looked_at < positions[:, None]  # [k,m]: not in the row, and so as in the unpatched run
    if not before.any():
        return logits
    return torch.where(before.to(logits.device)[..., None], unpatched.logits[PROMPT], logits)
