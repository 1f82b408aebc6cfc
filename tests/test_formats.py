"""Configurations converted from one format to another: exact round trips, and what later edits do to them."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from configurations import MAMBA2_130M, MAMBA_130M, MAMBA_LENS, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig

from mamba_trace.conversion import (
    FORMATS,
    SOURCE_KEY,
    convert_config,
    detect_config_format,
)
from mamba_trace.conversion.formats import unnamed_settings
from mamba_trace.errors import CheckpointError


def test_original_mamba2_has_the_defaults_of_mamba_ssm() -> None:
    config = convert_config(MAMBA2_130M, "huggingface")
    twin = Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, n_groups=1)
    twin.state_size, twin.expand, twin.conv_kernel, twin.chunk_size = 128, 2, 4, 256
    twin.time_step_limit, twin.tie_word_embeddings = [0.0, math.inf], True
    twin.pad_token_id = twin.bos_token_id = twin.eos_token_id = 0  # of gpt-neox-20b's tokenizer
    twin.initializer_range, twin.rescale_prenorm_residual = 0.02, True
    found = plain(config)
    del found[SOURCE_KEY]
    assert found == plain(twin)
    assert isinstance(config, Mamba2Config)
    assert convert_config(MAMBA2_130M, "huggingface", trained=True).rescale_prenorm_residual is False
    assert unnamed_settings(config) == {"n_residuals_per_layer": 1, "A_init_range": (1.0, 16.0), "conv_init": None}


def test_ssm_options_of_mamba2_are_mapped() -> None:
    ssm: dict[str, Any] = {"layer": "Mamba2", "d_state": 16, "d_conv": 3, "expand": 3, "headdim": 32, "ngroups": 4}
    ssm |= {"dt_limit": [0.01, 0.5], "chunk_size": 64, "bias": True, "conv_bias": False}
    ssm |= {"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 0.003, "A_init_range": [2, 4], "conv_init": 0.5}
    config = convert_config(MAMBA2_130M | {"ssm_cfg": ssm}, "huggingface")
    assert (config.state_size, config.conv_kernel, config.expand, config.head_dim, config.n_groups) == (16, 3, 3, 32, 4)
    assert (config.num_heads, config.chunk_size, config.use_bias, config.use_conv_bias) == (72, 64, True, False)
    assert list(config.time_step_limit) == [0.01, 0.5]
    assert (config.time_step_min, config.time_step_max, config.time_step_floor) == (0.01, 0.2, 0.003)
    assert unnamed_settings(config)["A_init_range"] == (2.0, 4.0)
    assert unnamed_settings(config)["conv_init"] == 0.5
    assert convert_config(config, "original") == MAMBA2_130M | {"ssm_cfg": ssm}


def test_original_result_of_mamba2_has_only_fields_of_mamba_ssm() -> None:
    config = Mamba2Config(vocab_size=32, hidden_size=16, num_heads=8, head_dim=4, state_size=3, num_hidden_layers=2)
    found = convert_config(config, "original", keep_source=False)
    assert found.keys() == MAMBA2_130M.keys()
    assert found["ssm_cfg"] == {"layer": "Mamba2", "d_state": 3, "headdim": 4, "ngroups": 8}
    assert (found["vocab_size"], found["pad_vocab_size_multiple"], found["tie_embeddings"]) == (32, 16, False)
    for vocab_size, multiple in ((24, 8), (21, 1)):
        config.vocab_size = vocab_size
        found = convert_config(config, "original", keep_source=False)
        assert (found["vocab_size"], found["pad_vocab_size_multiple"]) == (vocab_size, multiple)


@pytest.mark.parametrize("limit", [[0.0, {"__float__": "Infinity"}], [0.0, math.inf], (0.0, math.inf)])
def test_an_endless_time_step_limit_in_any_spelling(limit: Any) -> None:
    config = {"model_type": "mamba2", "hidden_size": 16, "num_heads": 8, "head_dim": 4, "time_step_limit": limit}
    found = convert_config(config, "huggingface")
    assert list(found.time_step_limit) == [0.0, math.inf]
    assert "dt_limit" not in convert_config(config, "original", keep_source=False)["ssm_cfg"]
    config["time_step_limit"] = [0.25, limit[1]]
    assert convert_config(config, "original", keep_source=False)["ssm_cfg"]["dt_limit"] == [0.25, math.inf]


def test_original_to_huggingface_is_the_hf_twin() -> None:
    config = convert_config(MAMBA_130M, "huggingface")
    twin = MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16)
    twin.initializer_range, twin.rescale_prenorm_residual = 0.02, True  # mamba_ssm's defaults
    found = plain(config)
    del found[SOURCE_KEY]
    assert found == plain(twin)
    assert (config.intermediate_size, config.time_step_rank) == (1536, 48)
    assert convert_config(MAMBA_130M, "huggingface", trained=True).rescale_prenorm_residual is False


ORIGINALS = st.fixed_dictionaries(
    {"d_model": st.integers(1, 64), "n_layer": st.integers(1, 4), "vocab_size": st.integers(1, 99)},
    optional={
        "ssm_cfg": st.fixed_dictionaries(
            {},
            optional={
                "d_state": st.integers(1, 32),
                "d_conv": st.integers(2, 4),
                "expand": st.integers(1, 3),
                "dt_rank": st.just("auto") | st.integers(1, 9),
                "bias": st.booleans(),
                "conv_bias": st.booleans(),
                "dt_scale": st.sampled_from([1, 0.5]),
                "layer": st.just("Mamba1"),
                "use_fast_path": st.booleans(),
            },
        ),
        "rms_norm": st.just(True),
        "residual_in_fp32": st.booleans(),
        "fused_add_norm": st.booleans(),
        "pad_vocab_size_multiple": st.sampled_from([1, 8, 16]),
        "tie_embeddings": st.booleans(),
        "d_intermediate": st.just(0),
        "attn_layer_idx": st.just([]),
        "attn_cfg": st.just({}),
        "initializer_cfg": st.just({"initializer_range": 0.5}),
        "unknown": st.sampled_from([None, "x", [1, {"y": 2}]]),
    },
)
HUGGINGFACES = st.builds(
    lambda extra, **fields: MambaConfig(**fields, **extra),
    extra=st.sampled_from([{}, {"unknown": [1]}, {"architectures": ["MambaForCausalLM"]}]),
    vocab_size=st.integers(1, 99),
    hidden_size=st.integers(1, 64),
    state_size=st.integers(1, 32),
    num_hidden_layers=st.integers(1, 4),
    eos_token_id=st.sampled_from([0, 3, [1, 2]]),
    time_step_rank=st.just("auto") | st.integers(1, 9),
    use_bias=st.booleans(),
    residual_in_fp32=st.booleans(),
    rescale_prenorm_residual=st.booleans(),
    initializer_range=st.sampled_from([0.1, 0.02]),
    use_cache=st.booleans(),
    tie_word_embeddings=st.booleans(),
)
MAMBA_LENSES = st.builds(
    lambda n_ctx, auto, left_out: {
        key: value
        for key, value in (MAMBA_LENS | {"n_ctx": n_ctx} | ({"d_inner": -1, "dt_rank": "auto"} if auto else {})).items()
        if key not in left_out
    },
    n_ctx=st.integers(1, 9),
    auto=st.booleans(),
    left_out=st.sets(st.sampled_from(["initializer_cfg", "device", "d_inner", "d_state", "pad_vocab_size_multiple"])),
)
ORIGINALS_OF_MAMBA2 = st.fixed_dictionaries(
    {
        "d_model": st.sampled_from([8, 16]),
        "n_layer": st.integers(1, 4),
        "vocab_size": st.integers(1, 99),
        "ssm_cfg": st.fixed_dictionaries(
            {"layer": st.just("Mamba2"), "headdim": st.sampled_from([2, 4])},  # an even number of heads
            optional={
                "d_state": st.integers(1, 32),
                "d_conv": st.integers(2, 4),
                "expand": st.integers(2, 4),
                "ngroups": st.sampled_from([1, 2]),
                "chunk_size": st.integers(1, 64),
                "dt_limit": st.sampled_from([[0.0, math.inf], [0, 1], [0.1, 0.5]]),
                "A_init_range": st.sampled_from([[1, 16], [0.5, 2.0]]),
                "conv_init": st.sampled_from([None, 1, 0.5]),
                "bias": st.booleans(),
                "conv_bias": st.booleans(),
                "rmsnorm": st.just(True),
                "d_ssm": st.none(),
            },
        ),
    },
    optional={
        "pad_vocab_size_multiple": st.sampled_from([1, 8, 16]),
        "tie_embeddings": st.booleans(),
        "d_intermediate": st.just(0),
        "attn_layer_idx": st.just([]),
        "attn_cfg": st.just({}),
        "initializer_cfg": st.just({"initializer_range": 0.5}),
        "unknown": st.sampled_from([None, "x", [1, {"y": 2}]]),
    },
)
HUGGINGFACES_OF_MAMBA2 = st.builds(
    lambda extra, head_dim, hidden_size, **fields: Mamba2Config(
        head_dim=head_dim, hidden_size=hidden_size, num_heads=2 * hidden_size // head_dim, **fields, **extra
    ),
    extra=st.sampled_from([{}, {"unknown": [1]}, {"intermediate_size": 7, "norm_before_gate": True}]),
    head_dim=st.sampled_from([2, 4]),
    hidden_size=st.sampled_from([8, 16]),
    n_groups=st.sampled_from([1, 2]),
    vocab_size=st.integers(1, 99),
    num_hidden_layers=st.integers(1, 4),
    time_step_limit=st.sampled_from([(0.0, math.inf), [0.0, math.inf], (0.1, 0.5)]),
    time_step_rank=st.just("auto") | st.integers(1, 9),
    rescale_prenorm_residual=st.booleans(),
    eos_token_id=st.sampled_from([0, 3, [1, 2]]),
    tie_word_embeddings=st.booleans(),
)
ROUTES = st.lists(st.sampled_from(FORMATS), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(config=ORIGINALS | HUGGINGFACES | MAMBA_LENSES, route=ROUTES, trained=st.booleans())
def test_config_round_trip_by_any_route_is_exact(config: Any, route: list[str], trained: bool) -> None:
    """Through any formats, and through JSON at every step, back to exactly what went in."""
    start = detect_config_format(config)
    before, found = deepcopy(plain(config)), config
    for to in route:
        if to == start:  # a Hugging Face config that is to be loaded may have lost its rescaling: not on the way
            continue
        found = convert_config(found, to, trained=trained)
        found = MambaConfig.from_dict(json.loads(json.dumps(plain(found)))) if to == "huggingface" else found
        found = json.loads(json.dumps(found)) if to != "huggingface" else found
    back = convert_config(found, start)
    assert plain(back) == before
    assert plain(config) == before, "the argument was changed"


@settings(max_examples=30, deadline=None)
@given(config=ORIGINALS_OF_MAMBA2 | HUGGINGFACES_OF_MAMBA2, again=st.booleans(), trained=st.booleans())
def test_config_round_trip_of_mamba2_is_exact(config: Any, again: bool, trained: bool) -> None:
    start = detect_config_format(config)
    before, to = deepcopy(plain(config)), "original" if start == "huggingface" else "huggingface"
    found = config
    for format in (to, start, to)[:: 1 if again else 3]:
        found = convert_config(found, format, trained=trained and format == to)
        through = json.loads(json.dumps(plain(found)))
        found = Mamba2Config.from_dict(through) if format == "huggingface" else through
    assert plain(convert_config(found, start)) == before
    assert plain(config) == before, "the argument was changed"


def test_the_configuration_of_a_falcon_mamba_is_its_own() -> None:
    config = FalconMambaConfig(hidden_size=16, mixer_rms_eps=1e-3, rescale_prenorm_residual=True)
    assert detect_config_format(config) == detect_config_format(config.to_dict()) == "huggingface"
    for given_ in (config, config.to_dict()):
        found = convert_config(given_, "huggingface", trained=True)
        assert isinstance(found, FalconMambaConfig)
        assert (found.mixer_rms_eps, found.rescale_prenorm_residual) == (1e-3, False)
    assert config.rescale_prenorm_residual is True


def test_config_round_trip_survives_save_pretrained(tmp_path: Path) -> None:
    source = MAMBA_130M | {"n_layer": 1, "unknown": {"a": [1, None]}}
    config = convert_config(source, "huggingface", trained=True)
    # as save_pretrained of a model does
    config.architectures, config.dtype = ["MambaForCausalLM"], "float32"
    config.save_pretrained(tmp_path)
    read = MambaConfig.from_pretrained(tmp_path)
    assert convert_config(read, "original") == source
    assert convert_config(convert_config(read, "mamba_lens"), "original") == source


def test_later_edits_reach_the_way_back() -> None:
    config = convert_config(MAMBA_130M, "huggingface")
    config.vocab_size, config.state_size = 50283, 8  # as after resize_token_embeddings
    back = convert_config(config, "original", keep_source=False)
    edits = {"vocab_size": 50283, "pad_vocab_size_multiple": 1, "ssm_cfg": {"d_state": 8}}
    assert back == MAMBA_130M | edits
    config = convert_config(MAMBA_130M, "huggingface")
    config.eos_token_id = 7  # which the original format has no place for
    assert convert_config(convert_config(config, "original"), "huggingface").eos_token_id == 7


def test_trained_concerns_rescaling_only() -> None:
    with_, without = (convert_config(MAMBA_LENS, "huggingface", trained=t) for t in (True, False))
    difference = {k for k, v in plain(with_).items() if plain(without)[k] != v}
    assert difference == {"rescale_prenorm_residual", SOURCE_KEY}
    assert convert_config(with_, "mamba_lens") == convert_config(without, "mamba_lens") == MAMBA_LENS
    with_.state_size = 8
    edited = convert_config(with_, "mamba_lens", keep_source=False)
    assert edited == MAMBA_LENS | {"d_state": 8}  # with the rescaling that only loading switched off
    rescaled = MambaConfig(rescale_prenorm_residual=True)
    assert convert_config(rescaled, "huggingface", trained=True).rescale_prenorm_residual is False
    assert rescaled.rescale_prenorm_residual is True


@pytest.mark.parametrize("source", [5, {}, {"format": "zz", "trained": False, "config": {}}])
def test_a_source_that_conversion_did_not_write(source: Any) -> None:
    config = MAMBA_130M | {"attn_cfg": {"mamba_trace_source": source}}
    if not source:
        assert convert_config(config, "huggingface").hidden_size == 768
        return
    with pytest.raises(CheckpointError, match="mamba_trace_source is not what convert_config put there"):
        convert_config(config, "huggingface")
