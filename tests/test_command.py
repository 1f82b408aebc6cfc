"""The command ``mamba-trace patch`` on every architecture: what it computes, and what it refuses first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, ModuleFactory
from rich.console import Console

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.errors import UnknownSiteError
from mamba_trace.patching import attribution_grid, logit_diff, patch_grid
from mamba_trace.patching.command import PatchCommand


@pytest.fixture(scope="module", params=TINY)
def model(tiny_hf: ModuleFactory, request: pytest.FixtureRequest) -> MambaTrace:
    """A tiny model with the tokenizer of the shipped one."""
    tokenizer: Any = MambaTrace.demo().tokenizer
    return MambaTrace(tiny_hf(model_type=request.param, vocab_size=len(tokenizer)), tokenizer=tokenizer)


def command(sites: list[str], **options: Any) -> PatchCommand:
    given = {"window": 1, "batch_size": None, "keep": None, "progress": False, **options}
    return PatchCommand("tiny", PROMPT, SOURCE, sites, not options, None, given)


def test_it_computes_prints_and_describes_grids(model: MambaTrace, capsys: pytest.CaptureFixture[str]) -> None:
    metric = logit_diff(model, " Emma", " Shelby")
    sites = ["h", "hook_C_in"] if model.architecture.family == "dual" else ["h", "hook_conv"]
    patch = command(sites)
    grids = patch.grids(model, metric)
    assert list(grids) == ["h", "h, to first order", sites[1], f"{sites[1]}, to first order"]
    for site in sites:
        assert grids[site].values.equal(patch_grid(model, PROMPT, SOURCE, site, metric, progress=False).values)
        estimate = grids[f"{site}, to first order"].values
        assert estimate.equal(attribution_grid(model, PROMPT, SOURCE, site, metric).values)
    (first, *_, last) = json.loads(patch.as_json(grids))["grids"]
    assert first["values"] == grids["h"].values.tolist()
    assert last["site"] == sites[1].removeprefix("hook_")
    patch.print(grids, Console(width=120))
    assert "correlation with patching" in capsys.readouterr().out


def test_a_site_that_the_model_lacks_is_refused_before_any_grid(
    model: MambaTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = command(["h", "inner_norm"], keep=tmp_path)  # there is one, in some architecture
    metric = logit_diff(model, " Emma", " Shelby")
    if model.architecture.family == "dual":
        assert list(patch.grids(model, metric)) == ["h", "inner_norm"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["h", "inner_norm"]
        return
    monkeypatch.setattr(MambaTrace, "trace", None)
    with pytest.raises(
        UnknownSiteError, match=r"'inner_norm' is not a place of this model, a Mamba-1: .* of Mamba-2; "
    ):
        patch.grids(model, metric)
