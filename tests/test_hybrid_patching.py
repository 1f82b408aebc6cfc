"""Grids over mixed layers: rows are the layers that have the site, and each cell is what its own trace gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grids import LONG, MINUS, OURS, PLUS, THEIRS
from hybrid_models import HYBRIDS, make_hybrid
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import LayerError, MetricError, PositionError, UnknownSiteError
from mamba_trace.modeling.architectures import BY_TYPE
from mamba_trace.patching import PatchGrid, attribution_grid, logit_diff, patch_grid
from mamba_trace.patching.question import find_site, positional
from mamba_trace.sites import BY_NAME, STATE

#: The kinds whose architecture the package has.
KINDS = [kind for kind in HYBRIDS if HYBRIDS[kind]["model_type"] in BY_TYPE]
#: One kind of each architecture, with all its kinds of layers.
PLAIN_KINDS = [kind for kind in KINDS if "," not in kind]
Rows = list[list[int | None]]


def exact(kind: str) -> MambaTrace:
    return MambaTrace(make_hybrid(kind, dtype=torch.float64))


def rows_of(model: MambaTrace, site: str, window: range = range(1)) -> Rows:
    """The layers that each row patches, by what `model.layers` offers and not by the layout."""
    if BY_NAME[site].scope == "model":
        return [[None]]
    there = []
    for layer in range(len(model.layers)):
        try:
            model.hook(BY_NAME[site].path(layer))
        except UnknownSiteError:
            continue
        there.append(layer)
    return [[layer + offset for offset in window if layer + offset in there] for layer in there]


def values_of(model: MambaTrace, site: str, layers: list[int | None], tokens: Tensor) -> dict[int | None, Tensor]:
    """The site's value in some layers, by an ordinary trace."""
    values: dict[int | None, Tensor] = {}
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        for layer in layers:
            values[layer] = model.hook(BY_NAME[site].path(layer)).output.clone()
    return values


def traced(model: MambaTrace, site: str, row: list[int | None], position: int, values: Any, prompt: Tensor) -> Tensor:
    """The model's own logits [L,V] in an ordinary trace that patches one position of some layers."""
    with torch.no_grad(), model.trace(prompt, use_cache=False) as tracer:
        for layer in row:
            place = model.hook(BY_NAME[site].path(layer))
            if site == STATE:
                place[position].output = values[layer][:, position]
            else:
                place.output[:, position] = values[layer][:, position]
        logits = model.hook("logits").output.save()
        result = tracer.result.save()
    # Nemotron-H returns them rounded to float32.
    torch.testing.assert_close(result.logits.double(), logits, rtol=1e-6, atol=1e-6)
    return logits[0]


def by_hand(model: MambaTrace, site: str, rows: Rows, prompt: Tensor = OURS, source: Tensor = THEIRS) -> Tensor:
    """The grid of `logit_diff` by a trace for each cell."""
    layers = sorted({layer for row in rows for layer in row}, key=lambda layer: layer or 0)
    values = values_of(model, site, layers, source)
    cells = []
    for row in rows:
        for position in range(prompt.shape[1]):
            logits = traced(model, site, row, position, values, prompt)[-1]
            cells.append(logits[PLUS] - logits[MINUS])
    return torch.stack(cells).unflatten(0, (len(rows), prompt.shape[1]))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def sites_of(kind: str) -> list[str]:
    """Those that a grid of such a model can patch."""
    return positional(exact(kind)._layout)


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "site"), [(kind, site) for kind in PLAIN_KINDS for site in sites_of(kind)])
def test_every_cell_of_every_site_is_its_own_trace(kind: str, site: str) -> None:
    model = exact(kind)
    rows = rows_of(model, site)
    got = patch_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), batch_size=4, progress=False)
    assert got.layers == [layer for (layer,) in rows if layer is not None]
    assert got.row_labels == ([site] if rows == [[None]] else [str(layer) for layer in got.layers])
    expected = by_hand(model, site, rows)
    close(got.values, expected)
    assert ((expected - got.prompt_metric).abs().amax(1) > 1e-6).all(), "no row is without effect"
