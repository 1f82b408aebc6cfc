"""Sizes that a configuration declares: refused unless they are those of the weights and can be built."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import SAFE, edit, refused
from safetensors.torch import load_file, save_file

from mamba_trace import MambaTrace
from mamba_trace.errors import CheckpointError

ORIGINAL = {"d_model": 8, "n_layer": 1, "vocab_size": 20}
HF = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("field", "value", "there"),
    [
        ("num_hidden_layers", 10**6, 3),
        ("num_hidden_layers", 10**9, 3),
        ("hidden_size", 10**9, 12),
        ("hidden_size", 10**30, 12),
        ("vocab_size", 10**12, 31),
    ],
)
def test_sizes_that_nobody_builds(folder: Path, field: str, value: int, there: int, weights: bool) -> None:
    edit(folder, **{field: value})
    if not weights:
        (folder / SAFE).unlink()
    start = time.monotonic()
    said = refused(folder)
    assert time.monotonic() - start < 5
    assert str(value) in said
    if weights:
        assert f" {there} " in said or f" {there};" in said
    else:
        assert "has no weights here" in said
        assert "At most 4096" in said or "At most 1000000000000" in said


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", 4, "declares num_hidden_layers 4 and the weights have 3 layers"),
        ("num_hidden_layers", 2, "declares num_hidden_layers 2 and the weights have 3 layers"),
        ("hidden_size", 16, "declares hidden_size 16 and the weights have 12"),
        ("vocab_size", 64, "declares vocab_size 64 and the weights have 31"),
        ("tie_word_embeddings", False, ""),
    ],
)
def test_sizes_that_are_not_those_of_the_weights(folder: Path, field: str, value: Any, words: str) -> None:
    edit(folder, **{field: value})
    if field == "tie_word_embeddings":
        weights = load_file(folder / SAFE)
        weights.pop("lm_head.weight", None)
        save_file(weights, folder / SAFE)
        words = "declares tie_word_embeddings false and the weights have no lm_head.weight"
    said = refused(folder)
    assert words in said
    assert f"the weights of {folder} do not fit its config.json" in said


def test_a_layer_far_above_the_others(folder: Path) -> None:
    weights = {
        "backbone.layers.999999999.norm.weight": torch.zeros(2),
        "backbone.embeddings.weight": torch.zeros(2, 2),
    }
    save_file(weights, folder / SAFE)
    assert "the weights name layer 999999999, and hold only 1" in refused(folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "num_hidden_layers",
            5,
            "do not fit config=: it declares num_hidden_layers 5 and the weights have 3 layers",
        ),
        ("vocab_size", 64, "do not fit config=: it declares vocab_size 64 and the weights have 31"),
        ("state_size", 7, "do not fit config=: it declares state_size 7 and the weights have 5"),
        ("conv_kernel", 4, "do not fit config=: it declares conv_kernel 4 and the weights have 3"),
        ("time_step_rank", 9, "do not fit config=: it declares time_step_rank 9 and the weights have 4"),
    ],
)
def test_a_config_that_does_not_fit_says_what(folder, tiny_config, field, value, words) -> None:
    setattr(tiny_config, field, value)
    assert words in refused(folder, config=tiny_config)


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (ORIGINAL | {"n_layer": 10**9}, "1000000000"),
        (HF | {"num_hidden_layers": 10**6}, "1000000"),
        (ORIGINAL | {"vocab_size": 10**12}, "1000000000000"),
        (ORIGINAL | {"d_model": 10**9}, "1000000000"),
        (ORIGINAL | {"d_model": 10**4, "n_layer": 1500}, "GiB of memory"),
    ],
)
def test_new_models_that_no_machine_holds(config: Any, number: str) -> None:
    with pytest.raises(CheckpointError, match=number):
        MambaTrace.from_config(config)
