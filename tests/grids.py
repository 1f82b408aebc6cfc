"""What the tests of grids share: prompts, an independent slow grid, and a metric that is interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import reference
import torch
from conftest import TINY
from torch import Tensor
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.patching import logit_diff, patch_grid
from mamba_trace.patching.question import positional
from mamba_trace.sites import BY_NAME, PURE, Layout

#: Prompts that differ at positions 2 and 4; 0 is the padding token.
OURS, THEIRS = torch.tensor([[3, 0, 7, 9, 4, 2]]), torch.tensor([[3, 0, 8, 9, 1, 2]])
#: Prompts that differ from the first token on.
LONG = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(3))
#: The sites that a grid can patch, as (model type, site), and those that tests with many runs take.
PATCHED: list[tuple[str, str]] = [
    (model_type, site)
    for model_type in TINY
    for site in positional(Layout((PURE["dual" if model_type == "mamba2" else "selective"],)))
]
TYPES_AND_STATES = [(model_type, site) for model_type in TINY for site in ("h", "conv")] + [("mamba2", "C_in")]
#: The tokens of the metrics.
PLUS, MINUS = 5, 6


def grid_of(model: MambaTrace, site: str = "h", **arguments: Any) -> Any:
    arguments.setdefault("metric", logit_diff(model, PLUS, MINUS))
    return patch_grid(model, LONG[:1], LONG[1:], site, progress=False, **arguments)


def difference(logits: Tensor) -> Tensor:
    """What `logit_diff` of `PLUS` and `MINUS` is, of the logits of one prompt [L,V]."""
    return logits[-1, PLUS] - logits[-1, MINUS]


def slow_grid(
    module: MambaForCausalLM,
    site: str,
    measure: Callable[[Tensor], Tensor] = difference,
    window: range = range(1),
    prompt: Tensor = OURS,
    source: Tensor = THEIRS,
) -> Tensor:
    """A grid by a float64 forward of the reference for each cell, patching ``window`` around its layer."""
    weights, config = module.state_dict(), module.config
    kept: dict[str, Tensor] = {}
    reference.forward(weights, config, source, lambda hook, value: kept.setdefault(hook, value.clone()))

    def cell(layers: list[int | None], position: int) -> Tensor:
        end = f".{position}" if site == "h" else ""
        targets = {BY_NAME[site].hook_name(layer) + end for layer in layers}

        def edit(hook: str, value: Tensor) -> Tensor:
            if hook not in targets:
                return value
            value = value.clone()
            where = (slice(None),) if site == "h" else (slice(None), position)
            value[where] = kept[hook][where]
            return value

        return measure(reference.forward(weights, config, prompt, edit)[0])

    n_layers, positions = config.num_hidden_layers, range(prompt.shape[1])
    rows: list[list[int | None]] = [
        [layer + offset for offset in window if 0 <= layer + offset < n_layers] for layer in range(n_layers)
    ]
    rows = [[None]] if BY_NAME[site].scope == "model" else rows
    return torch.stack([torch.stack([cell(layers, p) for p in positions]) for layers in rows])


class Interrupted:
    """A metric that is interrupted the n-th time it is asked, and never by default.

    Nobody can know which logits it looks at, so it is given all of them.
    """

    def __init__(self, metric: Any, after: float = math.inf) -> None:
        self.metric, self.after, self.asked = metric, after, 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.asked += 1
        if self.asked > self.after:
            raise KeyboardInterrupt
        return self.metric(logits)
