"""Configurations that are read: which format each has, and the words for those that no Mamba can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configurations import MAMBA_130M, MAMBA_LENS, ConfigLike, plain
from safetensors import safe_open
from transformers import MambaConfig

from mamba_trace.conversion import convert_config, detect_config_format
from mamba_trace.errors import CheckpointError
from mamba_trace.modeling.architectures import BY_TYPE

RECORDED = Path(__file__).parent / "data" / "mamba_lens.safetensors"


def test_config_formats_are_detected() -> None:
    assert detect_config_format(MAMBA_130M) == "original"
    assert detect_config_format(MambaConfig()) == "huggingface"
    assert detect_config_format({"model_type": "mamba"}) == "huggingface"
    assert detect_config_format(MAMBA_LENS) == detect_config_format(ConfigLike()) == "mamba_lens"


def test_an_object_with_mamba_lens_attributes() -> None:
    config = convert_config(ConfigLike(), "huggingface")
    assert (config.hidden_size, config.state_size, config.time_step_rank) == (24, 4, 2)
    assert (config.initializer_range, config.time_step_min, config.rescale_prenorm_residual) == (
        0.02,
        0.001,
        True,
    )
    normal = convert_config(ConfigLike(), "mamba_lens")
    assert normal["device"] == "cpu"
    assert normal["initializer_cfg"]["dt_init"] == "random"
    assert convert_config(config, "mamba_lens") == normal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"ssm_cfg": {"layer": "Mamba3"}},
            "ssm_cfg.layer is 'Mamba3', and the layers that can be loaded are 'Mamba1', 'Mamba2'$",
        ),
        ({"ssm_cfg": {"layer": 2}}, "ssm_cfg.layer is 2, and the layers"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]: some layers are attention"),
        ({"d_intermediate": 64}, "d_intermediate is 64: the blocks have an MLP"),
        ({"rms_norm": False}, "rms_norm is False: the norms are LayerNorm"),
        (
            {"ssm_cfg": {"headdim": 64}},
            "Mamba-1 does not have: headdim. A Mamba-2 has them: ssm_cfg.layer, 'Mamba1' here",
        ),
        ({"ssm_cfg": {"dt_init": "zero"}}, "dt_init must be 'random' or 'constant', found 'zero'"),
        ({"ssm_cfg": {"d_state": 0}}, "ssm_cfg.d_state must be a whole number of at least 1, found 0"),
        (
            {"ssm_cfg": {"dt_rank": "all"}},
            "ssm_cfg.dt_rank must be a whole number of at least 1, found 'all'",
        ),
        ({"ssm_cfg": {"expand": 1.5}}, "ssm_cfg.expand must be a whole number of at least 1, found 1.5"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be at least 1, found 0"),
        ({"residual_in_fp32": "yes"}, "residual_in_fp32 must be true or false, found 'yes'"),
    ],
)
def test_inexpressible_originals_are_rejected(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        convert_config(MAMBA_130M | change, "huggingface")


def test_inexpressible_models_are_rejected() -> None:
    with pytest.raises(CheckpointError, match="epsilon of 1e-05, found 1e-06"):
        convert_config(MambaConfig(layer_norm_epsilon=1e-6), "mamba_lens")
    with pytest.raises(CheckpointError, match="the original format has only silu, found hidden_act 'gelu'"):
        convert_config(MambaConfig(hidden_act="gelu"), "original")
    with pytest.raises(CheckpointError, match=r"d_inner is 50, but expand \* d_model is 48"):
        convert_config(MAMBA_LENS | {"d_inner": 50}, "huggingface")
    assert convert_config(MambaConfig(layer_norm_epsilon=1e-6), "original")["norm_epsilon"] == 1e-6


def test_configurations_of_nothing_known_are_rejected() -> None:
    known = f"only {', '.join(map(repr, BY_TYPE))} are supported, and state-spaces' original format"
    for config in ({"model_type": "llama"}, {"model_type": ["mamba"]}):
        with pytest.raises(CheckpointError, match=known):
            detect_config_format(config)
    with pytest.raises(CheckpointError, match="model_type 'llama'; " + known):
        convert_config({"model_type": "llama"}, "original", source="huggingface")
    with pytest.raises(CheckpointError, match=r"Found the keys hidden_size.*add model_type='mamba'"):
        detect_config_format({"hidden_size": 3})
    with pytest.raises(CheckpointError, match="found int"):
        detect_config_format(3)
    with pytest.raises(CheckpointError, match="unknown format 'hf'; the formats are 'original', 'huggingface'"):
        convert_config(MAMBA_130M, "hf")
    with pytest.raises(CheckpointError, match="the original configuration has no n_layer"):
        convert_config({"d_model": 3, "vocab_size": 8}, "huggingface", source="original")


def test_configurations_that_mamba_lens_wrote() -> None:
    with safe_open(RECORDED, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
    from_lens, from_original = (convert_config(spec[key], "huggingface") for key in ("config", "original_config"))
    assert convert_config(from_lens, "mamba_lens") == spec["config"]
    del from_lens.mamba_trace_source, from_original.mamba_trace_source
    assert plain(from_lens) == plain(from_original)
