"""Running cells: rows of a batch, each from its layer and its position on.

At every layer the rows whose patch begins there join the batch, with the residual stream of the unpatched
run. Every row starts at its position, so the place that is patched is always the first. Rows of later
positions are shorter; what pads them comes after their end and changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..past import StartingStates
from ..sites import STATE, Site
from .plan import Job
from .unpatched import PROMPT, Stretch, Unpatched

if TYPE_CHECKING:
    from ..model import MambaTrace


def patched_logits(
    model: MambaTrace,
    job: Job,
    windows: Sequence[range],
    site: Site,
    unpatched: Unpatched,
    stretch: Stretch,
    looked_at: Sequence[int],
) -> Tensor:
    """The logits of the cells of ``job``, at the positions ``looked_at``.

    Args:
        model: the model.
        job: rows of the grid and positions of ``stretch``.
        windows: of every row of the grid, the layers that it patches.
        site: what is patched.
        unpatched, stretch: what cells start from.
        looked_at: m positions, in ascending order.

    Returns:
        [rows,k,m,V].
    """
    cells = Cells(job, [windows[row] for row in job.rows], unpatched, stretch, max(looked_at) + 1)
    n_layers, first = len(model.layers), cells.windows[0].start
    with model.trace(inputs_embeds=cells.joining(first), cache=cells.start(n_layers), use_cache=False):
        for layer in range(n_layers):
            block = model.layers[layer]
            if layer < first:
                block.skip(block.input)
                continue
            joining = cells.joining(layer)
            if layer > first and joining is not None:
                block.input = torch.cat((block.input, joining))  # [B,l,D]
            rows = cells.patched(layer)
            if rows:
                cells.patch(model.hook(site.path(layer)), site, layer, rows)
        stream = model.norm_f.input  # [B,l,D]
        model.norm_f.input = stream[torch.arange(len(stream))[:, None], cells.ends(looked_at, len(stream))]
        logits = model.lm_head.output.save()  # [B,m,V]
    logits = logits.unflatten(0, (len(job.rows), len(job.positions)))  # [rows,k,m,V]
    return cells.with_unpatched(logits, looked_at)


class Cells:
    """The rows of one job's batch: row ``r k + i`` is the r-th row of the grid at the i-th of k positions.

    Args:
        job: which cells.
        windows: of each row of the grid in the job, the layers it patches; starts and ends ascend.
        unpatched, stretch: what they start from.
        stop: where every run ends.
    """

    def __init__(
        self, job: Job, windows: Sequence[range], unpatched: Unpatched, stretch: Stretch, stop: int
    ) -> None:
        self.windows, self.unpatched, self.stretch = windows, unpatched, stretch
        self.positions = torch.tensor(job.positions)  # [k]
        self.offsets = self.positions - stretch.positions.start  # [k]: where in the stretch
        span = self.positions[:, None] + torch.arange(stop - job.positions.start)  # [k,l]
        self.span = span.clamp(max=stop - 1)

    def joining(self, layer: int) -> Tensor | None:
        """The residual stream into ``layer`` of the rows whose window begins there, or ``None``: [b,l,D]."""
        n_rows = sum(window.start == layer for window in self.windows)
        if not n_rows:
            return None
        return self.unpatched.streams[layer][self.span].repeat(n_rows, 1, 1)

    def start(self, n_layers: int) -> StartingStates:
        """Where each row of each layer starts."""
        places = [
            self.offsets.repeat(sum(window.start <= layer for window in self.windows)).to(state.device)
            for layer, state in zip(range(n_layers), self.stretch.states, strict=True)
        ]
        return StartingStates(self.stretch.columns, self.stretch.states, places)

    def patched(self, layer: int) -> slice | None:
        """The rows of the batch that are patched at ``layer``."""
        found = [row for row, window in enumerate(self.windows) if layer in window]
        k = len(self.positions)
        return slice(found[0] * k, (found[-1] + 1) * k) if found else None

    def patch(self, place: Any, site: Site, layer: int, rows: slice) -> None:
        """Put the source's values into ``rows`` at the first position, in a trace."""
        values = self.stretch.values[layer][self.offsets]  # [k,...]
        values = values.repeat((rows.stop - rows.start) // len(values), *[1] * (values.dim() - 1))
        if site.name == STATE:
            place[0].output[rows] = values
        else:
            place.output[rows, 0] = values

    def ends(self, looked_at: Sequence[int], n_rows: int) -> Tensor:
        """Where in each row the positions looked at are [B,m]; 0 for what comes before the row."""
        ends = (torch.tensor(looked_at) - self.positions[:, None]).clamp(min=0)  # [k,m]
        return ends.repeat(n_rows // len(ends), 1)

    def with_unpatched(self, logits: Tensor, looked_at: Sequence[int]) -> Tensor:
        """``logits`` [rows,k,m,V] with the unpatched run's where a position comes before its row's start."""
        before = torch.tensor(looked_at) < self.positions[:, None]  # [k,m]
        if not before.any():
            return logits
        return torch.where(before.to(logits.device)[..., None], self.unpatched.logits[PROMPT], logits)
