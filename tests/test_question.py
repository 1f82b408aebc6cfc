"""What a grid cannot be asked is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grids import LONG, grid_of

from mamba_trace import MambaTrace
from mamba_trace.errors import (
    ArgumentError,
    LayerError,
    MetricError,
    PositionError,
    PromptError,
    UnknownSiteError,
)
from mamba_trace.patching import attribution_grid, logit, patch_grid, run
from mamba_trace.patching.question import windows


def test_windows_are_cut_at_the_ends() -> None:
    assert windows(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert windows(3, 2) == [range(0, 2), range(1, 3), range(2, 3)]
    assert windows(4, 4) == [range(0, 3), range(0, 4), range(1, 4), range(2, 4)]


def test_what_cannot_be_is_refused_before_anything_runs(tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "InPhases", None)
    with pytest.raises(LayerError, match=r"window=4: this model has 3 layers"):
        grid_of(tiny, window=4)
    for wrong in (None, 1.5, slice(2, 5), [1, 1], [True], "1"):
        with pytest.raises(PositionError, match="metric_positions="):
            grid_of(tiny, metric_positions=wrong)
    for name, value in (("window", 2.0), ("batch_size", 2.5), ("memory", -1), ("batch_size", True)):
        with pytest.raises(ArgumentError, match=f"{name}="):
            grid_of(tiny, **{name: value})
    assert issubclass(ArgumentError, ValueError)
    with pytest.raises(UnknownSiteError, match="a grid is of one site"):
        grid_of(tiny, ["h", "conv"])
    with pytest.raises(PromptError, match="dtype bool"):
        patch_grid(tiny, LONG[:1] > 3, LONG[1:], "h", logit(tiny, 3))
    with pytest.raises(PositionError, match=r"metric_positions has 13, and the prompt has 13 positions: -13 to 12"):
        grid_of(tiny, metric_positions=[0, 13])
    with pytest.raises(PositionError, match=r"metric_positions=\[\] is empty"):
        grid_of(tiny, metric_positions=[])
    with pytest.raises(MetricError, match="or a dict of several"):
        grid_of(tiny, metric={"m": 3})


@pytest.mark.parametrize("make", [patch_grid, attribution_grid], ids=["patch_grid", "attribution_grid"])
def test_a_grid_is_no_part_of_a_trace(tiny: MambaTrace, make: Callable[..., Any]) -> None:
    metric = logit(tiny, 3)

    def misplaced() -> None:
        with tiny.trace(LONG):
            tiny.layers[0].resid_pre.output.save()
            make(tiny, LONG[:1], LONG[1:], "h", metric)

    with pytest.raises(RuntimeError, match=f"{make.__name__} is a trace of its own, and this model is in one"):
        misplaced()
