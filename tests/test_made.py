"""The file of every result says by what and of which model it was made."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import ModuleFactory

import mamba_trace
from mamba_trace import MambaTrace
from mamba_trace.hidden_attention import attention_maps, contributions, hidden_attention
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.patching import attribution_grid, logit, patch_grid
from mamba_trace.results import Result

IDS = torch.tensor([[1, 2, 3, 4]])
ANALYSES: dict[str, Callable[[MambaTrace], Result]] = {
    "patch_grid": lambda m: patch_grid(m, IDS, IDS + 1, metric=logit(m, 1), progress=False),
    "attribution_grid": lambda m: attribution_grid(m, IDS, IDS + 1, metric=logit(m, 1)),
    "hidden_attention": lambda m: hidden_attention(m, IDS, 0),
    "contributions": lambda m: contributions(m, IDS, 0, residual_direction=torch.ones(12)),
    "attention_maps": lambda m: attention_maps(m, IDS),
    "logit_lens": lambda m: logit_lens(m, IDS),
    "state_lens": lambda m: state_lens(m, IDS),
}


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_file_says_what_made_it(tiny_hf: ModuleFactory, tmp_path: Path, analysis: str, suffix: str) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64), kernels="reference")
    model._module.name_or_path = "somebody/mamba"
    model.config._commit_hash = "0123abc"
    loaded = Result.load(ANALYSES[analysis](model).save(tmp_path / f"result{suffix}"))
    assert loaded.made == {
        "versions": {"mamba_trace": mamba_trace.__version__}
        | {library: version(library) for library in ("torch", "transformers", "nnsight")},
        "model": "somebody/mamba",
        "revision": "0123abc",
        "architecture": "Mamba-1",
        "dtype": "float64",
        "device": "cpu",
        "kernels": "reference",
    }


def test_the_revision_that_was_asked_for(tiny_hf: ModuleFactory) -> None:
    model = MambaTrace(tiny_hf(), revision="v1")
    assert logit_lens(model, IDS).made["revision"] == "v1"
