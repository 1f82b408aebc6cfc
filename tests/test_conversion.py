"""Configurations in three formats: where each value goes, exact round trips, the words of errors."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import MambaConfig

from mamba_trace.conversion import (
    FORMATS,
    SOURCE_KEY,
    convert_config,
    detect_config_format,
    residuals_per_layer,
)
from mamba_trace.errors import CheckpointError

RECORDED = Path(__file__).parent / "data" / "mamba_lens.safetensors"
MAMBA_130M: dict[str, Any] = {  # the config.json of state-spaces/mamba-130m
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MAMBA_LENS: dict[str, Any] = {  # every attribute of a MambaCfg
    "d_model": 24,
    "n_layers": 2,
    "vocab_size": 56,
    "d_state": 4,
    "expand": 2,
    "dt_rank": 3,
    "d_conv": 4,
    "pad_vocab_size_multiple": 8,
    "conv_bias": True,
    "bias": False,
    "default_prepend_bos": False,
    "tokenizer_prepends_bos": False,
    "n_ctx": 100,
    "device": "cpu",
    "initializer_cfg": {
        "initializer_range": 0.03,
        "rescale_prenorm_residual": True,
        "n_residuals_per_layer": 2,
        "dt_init": "constant",
        "dt_scale": 0.5,
        "dt_min": 0.01,
        "dt_max": 0.2,
        "dt_init_floor": 0.002,
    },
    "d_inner": 48,
}


@dataclass
class InitializerLike:
    """As MambaLens 0.0.4's MambaInitCfg is by default: tuples, by trailing commas."""

    initializer_range: Any = (0.02,)
    rescale_prenorm_residual: Any = (True,)
    n_residuals_per_layer: Any = (1,)
    dt_init: Any = ("random",)
    dt_scale: Any = (1.0,)
    dt_min: Any = (0.001,)
    dt_max: Any = (0.1,)
    dt_init_floor: Any = 1e-4


@dataclass
class ConfigLike:
    """An object with the attributes of MambaLens's MambaCfg."""

    d_model: int = 24
    n_layers: int = 2
    vocab_size: int = 56
    d_state: int = 4
    dt_rank: int = 2
    device: Any = field(default_factory=lambda: torch.device("cpu"))
    initializer_cfg: Any = field(default_factory=InitializerLike)


def plain(config: Any) -> Any:
    """What can be compared: a dict, without the folder that a MambaConfig was read from."""
    if not isinstance(config, MambaConfig):
        return config
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}


def test_config_formats_are_detected() -> None:
    assert detect_config_format(MAMBA_130M) == "original"
    assert detect_config_format(MambaConfig()) == "huggingface"
    assert detect_config_format({"model_type": "mamba"}) == "huggingface"
    assert detect_config_format(MAMBA_LENS) == detect_config_format(ConfigLike()) == "mamba_lens"


def test_original_to_huggingface_is_the_hf_twin() -> None:
    config = convert_config(MAMBA_130M, "huggingface")
    twin = MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16)
    twin.initializer_range, twin.rescale_prenorm_residual = 0.02, True  # mamba_ssm's defaults
    found = plain(config)
    del found[SOURCE_KEY]
    assert found == plain(twin)
    assert (config.intermediate_size, config.time_step_rank) == (1536, 48)
    assert convert_config(MAMBA_130M, "huggingface", trained=True).rescale_prenorm_residual is False


def test_ssm_options_and_initializer_options_are_mapped() -> None:
    ssm: dict[str, Any] = {
        "d_state": 4,
        "d_conv": 3,
        "expand": 3,
        "dt_rank": 5,
        "bias": True,
        "conv_bias": False,
    }
    ssm |= {"dt_init": "constant", "dt_scale": 2, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 0.003}
    initializer = {"initializer_range": 0.3, "rescale_prenorm_residual": False, "n_residuals_per_layer": 2}
    config = convert_config(MAMBA_130M | {"ssm_cfg": ssm, "initializer_cfg": initializer}, "huggingface")
    expected = MambaConfig(
        state_size=4,
        conv_kernel=3,
        expand=3,
        time_step_rank=5,
        use_bias=True,
        use_conv_bias=False,
        time_step_init_scheme="constant",
        time_step_scale=2.0,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_floor=0.003,
        initializer_range=0.3,
        num_hidden_layers=24,
    )
    found = plain(config)
    del found[SOURCE_KEY]
    assert found == plain(expected)
    assert residuals_per_layer(config) == 2


def test_mamba_lens_knobs_are_mapped() -> None:
    config = convert_config(MAMBA_LENS, "huggingface")
    assert config.initializer_range == 0.03
    assert config.rescale_prenorm_residual is True
    assert config.time_step_init_scheme == "constant"
    assert config.time_step_scale == 0.5
    assert (config.time_step_min, config.time_step_max, config.time_step_floor) == (0.01, 0.2, 0.002)
    assert config.tie_word_embeddings is False  # MambaLens trains lm_head on its own
    assert residuals_per_layer(config) == residuals_per_layer(convert_config(config, "original")) == 2
    assert residuals_per_layer(MambaConfig()) == 1


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


def test_mamba_lens_result_has_exactly_the_fields_of_mamba_cfg() -> None:
    found = convert_config(MAMBA_130M, "mamba_lens", keep_source=False)
    assert found.keys() == MAMBA_LENS.keys()
    assert found["initializer_cfg"].keys() == MAMBA_LENS["initializer_cfg"].keys()
    assert (found["vocab_size"], found["dt_rank"], found["d_inner"]) == (50280, 48, 1536)


def test_original_result_has_only_fields_of_mamba_ssm() -> None:
    known = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"}
    known |= {"pad_vocab_size_multiple", "tie_embeddings"}
    config = MambaConfig(vocab_size=21, hidden_size=12, state_size=3, time_step_rank=2)
    found = convert_config(config, "original", keep_source=False)
    assert found.keys() == known
    assert found["ssm_cfg"] == {"d_state": 3, "dt_rank": 2}
    assert (found["vocab_size"], found["pad_vocab_size_multiple"]) == (21, 1)  # not padded a second time
    assert convert_config(found, "huggingface").vocab_size == 21


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2'; only Mamba-1"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]: some layers are attention"),
        ({"d_intermediate": 64}, "d_intermediate is 64: the blocks have an MLP"),
        ({"rms_norm": False}, "rms_norm is False: the norms are LayerNorm"),
        ({"ssm_cfg": {"headdim": 64}}, "options that Mamba-1 does not have: headdim"),
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
    with pytest.raises(CheckpointError, match="model_type 'falcon_mamba'; only Mamba-1 is supported so far"):
        detect_config_format({"model_type": "falcon_mamba"})
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


@pytest.mark.parametrize("source", [5, {}, {"format": "zz", "trained": False, "config": {}}])
def test_a_source_that_conversion_did_not_write(source: Any) -> None:
    config = MAMBA_130M | {"attn_cfg": {"mamba_trace_source": source}}
    if not source:
        assert convert_config(config, "huggingface").hidden_size == 768
        return
    with pytest.raises(CheckpointError, match="mamba_trace_source is not what convert_config put there"):
        convert_config(config, "huggingface")
