"""What a grid asks: of which runs, which site, at which layers, measured how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sites import BY_NAME, Site
from .metrics import Metric, measured
from .plan import windows


@dataclass(frozen=True)
class Question:
    """A grid before it is computed.

    Attributes:
        tokens: of source and prompt [2,L].
        site: what is patched; `windows` gives the layers of each row.
        n_layers: of the model.
        window: how many layers are patched together.
        metrics: by name.
        looked_at: the positions whose logits they see, ascending.
        single: they see one position's logits [B,V], and not [B,m,V].
    """

    tokens: Tensor
    site: Site
    n_layers: int
    window: int
    metrics: Mapping[str, Metric]
    looked_at: list[int]
    single: bool

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @property
    def stop(self) -> int:
        """Where every run ends: one past the last position looked at."""
        return self.looked_at[-1] + 1

    @property
    def positions(self) -> range:
        """The positions where a patch can change an answer: not after the last that is looked at, nor before
        the first where the prompts differ, up to which both runs are the same."""
        differ = (self.tokens[0] != self.tokens[1]).nonzero()[:, 0].tolist()
        first = differ[0] if differ else self.stop
        return range(min(first, self.stop), self.stop)

    @property
    def windows(self) -> list[range]:
        """Of each row of the grid, the layers it patches."""
        if self.site.scope == "model":
            return [range(1)]
        return windows(self.n_layers, self.window)

    @property
    def patched(self) -> Site:
        """The site that cells patch: the embeddings are the stream into the first layer."""
        return BY_NAME["resid_pre"] if self.site.name == "embeddings" else self.site

    @property
    def after_layers(self) -> bool:
        """Whether the site comes after all layers, where a position has an effect on its own logits alone."""
        return self.site.scope == "model" and self.site.name != "embeddings"

    def described(self) -> dict[str, Any]:
        """What tells one grid from another, as JSON."""
        return {
            "site": self.site.name,
            "n_layers": self.n_layers,
            "length": self.length,
            "window": self.window,
            "metrics": list(self.metrics),
            "metric_positions": self.looked_at,
            "prompts": hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest(),
        }

    def measure(self, logits: Tensor) -> Tensor:
        """Every metric of logits [B,m,V]: [M,B], on the CPU. Raises `MetricError`.

        A metric may do anything to the logits that it gets, so each gets its own; the last one these.
        """
        logits = logits[:, 0] if self.single else logits
        last, found = len(self.metrics) - 1, []
        for number, metric in enumerate(self.metrics.values()):
            own = logits if number == last else logits.clone()
            # A copy, as a metric may return the same tensor each time, filled anew.
            found.append(measured(metric, own).detach().cpu().clone())
        return torch.stack(found)
