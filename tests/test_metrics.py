"""Metrics are what their names say, of the logits of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModuleFactory
from grids import OURS, THEIRS, slow_grid
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching import log_prob, logit, patch_grid, prob


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (logit, lambda logits: logits[-1, 7]),
        (log_prob, lambda logits: logits[-1].log_softmax(-1)[7]),
        (prob, lambda logits: logits[-1].softmax(-1)[7]),
    ],
    ids=["logit", "log_prob", "prob"],
)
def test_metrics_are_what_their_names_say(
    exact: MambaTrace, tiny_hf: ModuleFactory, metric: Any, expected: Callable[[Tensor], Tensor]
) -> None:
    got = patch_grid(exact, OURS, THEIRS, "y", metric(exact, 7), progress=False)
    torch.testing.assert_close(got.values, slow_grid(tiny_hf(dtype=torch.float64), "y", expected), rtol=1e-9, atol=1e-9)
    assert got.metric == {logit: "logit", log_prob: "log probability", prob: "probability"}[metric] + " of 7"
