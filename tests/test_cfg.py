"""`model.cfg`: MambaLens's names over the Hugging Face configuration, read-only and never stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_hf
from family_models import MODEL_TYPES, each_architecture, family_model
from safetensors import safe_open

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config
from mamba_trace.conversion.config_fields import FIELDS
from mamba_trace.hooked.cfg import LensConfig
from mamba_trace.model import DEMO

RECORDED = Path(__file__).parent / "data" / "mamba_lens.safetensors"


def test_every_name_and_its_value(tiny: MambaTrace) -> None:
    cfg = tiny.cfg
    assert (cfg.d_model, cfg.D) == (12, 12)
    assert (cfg.n_layers, cfg.n_layer) == (3, 3)
    assert (cfg.d_inner, cfg.E, cfg.expand) == (24, 24, 2)
    assert (cfg.d_state, cfg.N) == (5, 5)
    assert (cfg.dt_rank, cfg.D_delta) == (4, 4)
    assert (cfg.d_conv, cfg.D_conv) == (3, 3)
    assert (cfg.vocab_size, cfg.d_vocab, cfg.V) == (31, 31, 31)
    assert (cfg.bias, cfg.conv_bias, cfg.eps) == (False, True, 1e-5)
    assert cfg.n_ctx is None
    assert (cfg.device, cfg.dtype) == (torch.device("cpu"), torch.float32)
    assert (cfg.default_prepend_bos, cfg.tokenizer_prepends_bos) == (False, False)
    assert cfg.initializer_cfg.dt_min == 0.001
    assert cfg.initializer_cfg.n_residuals_per_layer == 1


def test_the_names_are_all_of_mamba_lens(tiny: MambaTrace) -> None:
    with safe_open(str(RECORDED), framework="pt") as file:
        recorded = json.loads(file.metadata()["spec"])["config"]
    missing = recorded.keys() - tiny.cfg.to_dict().keys()
    assert missing == {"pad_vocab_size_multiple"}  # vocab_size counts the padding
    assert recorded["initializer_cfg"].keys() == tiny.cfg.to_dict()["initializer_cfg"].keys()


def test_the_values_are_those_of_the_conversion() -> None:
    model = MambaTrace(make_hf(use_bias=True, time_step_rank="auto", time_step_min=0.01))
    converted = convert_config(model.config, "mamba_lens")
    values = model.cfg.to_dict()
    for field in FIELDS:
        if field.mamba_lens and len(field.mamba_lens) == 1:
            assert values[field.mamba_lens[0]] == converted[field.mamba_lens[0]], field
    assert values["initializer_cfg"] == converted["initializer_cfg"]
    assert values["d_inner"] == converted["d_inner"]


def test_it_is_a_view(tiny: MambaTrace) -> None:
    cfg = tiny.cfg
    tiny.config.layer_norm_epsilon = 1e-3
    tiny.config.time_step_max = 0.5
    assert (cfg.eps, cfg.initializer_cfg.dt_max) == (1e-3, 0.5)
    assert cfg.huggingface is tiny.config
    tiny._module.to(torch.bfloat16)
    assert cfg.dtype == torch.bfloat16


def test_it_follows_the_loading_of_the_weights() -> None:
    model = MambaTrace(DEMO)
    cfg = model.cfg
    assert (cfg.n_layers, cfg.device) == (8, torch.device("meta"))
    model.dispatch()
    assert cfg.device.type != "meta"


def test_names_can_be_listed_and_asked_for(tiny: MambaTrace) -> None:
    assert "d_model" in tiny.cfg
    assert "hidden_size" not in tiny.cfg
    assert list(tiny.cfg) == list(tiny.cfg.to_dict())
    assert set(tiny.cfg) <= set(dir(tiny.cfg))
    assert "  n_layers: 3\n" in repr(tiny.cfg)
    json.dumps({name: str(value) for name, value in tiny.cfg.to_dict().items()})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n_layrs", r"model\.cfg has no 'n_layrs'; did you mean n_layers.*It has: d_model, n_layers"),
        ("hidden_size", r"it is model\.config\.hidden_size"),
        ("n_heads", "a Mamba has no attention heads"),
        ("d_mlp", "no MLP.*d_inner"),
    ],
)
def test_names_that_do_not_exist(tiny: MambaTrace, name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(tiny.cfg, name)
    assert not hasattr(tiny.cfg, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d_model", r"model\.cfg\.d_model cannot be set.*MambaTrace\.from_config"),
        ("nonsense", "cannot be set"),
        ("device", r"model\.to"),
        ("default_prepend_bos", r"model\.default_prepend_bos"),
    ],
)
def test_it_cannot_be_assigned_to(tiny: MambaTrace, name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        setattr(tiny.cfg, name, 1)
    with pytest.raises(AttributeError, match="cannot be set"):
        delattr(tiny.cfg, name)
    with pytest.raises(AttributeError):
        tiny.cfg = 1
    assert isinstance(tiny.cfg, LensConfig)
    assert tiny.cfg.d_model == tiny.config.hidden_size == 12


# ---------------------------------------------------------------- the other architectures


def test_mamba2_under_the_same_names() -> None:
    cfg = MambaTrace(family_model("mamba2", time_step_min=0.01)).cfg
    assert (cfg.d_model, cfg.D, cfg.n_layers, cfg.d_inner, cfg.E, cfg.expand) == (12, 12, 3, 24, 24, 2)
    assert (cfg.d_state, cfg.N, cfg.d_conv, cfg.D_conv, cfg.vocab_size, cfg.V) == (5, 5, 3, 3, 31, 31)
    assert (cfg.n_heads, cfg.H, cfg.d_head, cfg.P, cfg.n_groups, cfg.G) == (6, 6, 4, 4, 2, 2)
    assert (cfg.bias, cfg.conv_bias, cfg.eps, cfg.n_ctx) == (False, True, 1e-5, None)
    assert (cfg.chunk_size, tuple(cfg.dt_limit)) == (4, (0.0, float("inf")))
    assert (cfg.initializer_cfg.dt_min, cfg.initializer_cfg.A_init_range) == (0.01, (1.0, 16.0))
    assert cfg.H * cfg.P == cfg.E


def test_falcon_mamba_under_the_same_names() -> None:
    cfg, of_mamba = (MambaTrace(family_model(each)).cfg for each in ("falcon_mamba", "mamba"))
    assert cfg.inner_eps == 1e-6
    values = cfg.to_dict()
    del values["inner_eps"]
    assert values == of_mamba.to_dict()


@each_architecture
def test_every_name_has_a_value(model_type: str) -> None:
    cfg = MambaTrace(family_model(model_type)).cfg
    assert list(cfg) == list(cfg.to_dict())
    assert all(getattr(cfg, name) is not None for name in cfg if name != "n_ctx")
    assert "  n_layers: 3\n" in repr(cfg)


@pytest.mark.parametrize(
    ("model_type", "name", "words"),
    [
        ("mamba", "d_head", "a Mamba has no attention heads, and only a Mamba-2 has heads of its own"),
        ("falcon_mamba", "n_heads", "a Mamba has no attention heads, and only a Mamba-2 has heads of its own"),
        ("mamba", "n_groups", "which only a Mamba-2 has: this is a Mamba-1"),
        ("mamba", "inner_eps", "which only a Falcon-Mamba has: this is a Mamba-1"),
        ("mamba2", "inner_eps", "which only a Falcon-Mamba has: this is a Mamba-2"),
        ("mamba2", "dt_rank", "in a Mamba-2 delta_1 has one number for each of the n_heads heads"),
        ("mamba2", "D_delta", "in a Mamba-2 delta_1 has one number for each of the n_heads heads"),
        ("mamba2", "n_key_value_heads", "a Mamba has no attention heads"),
        ("mamba2", "num_heads", r"it is model\.config\.num_heads"),
    ],
)
def test_names_that_another_architecture_has(model_type: str, name: str, words: str) -> None:
    cfg = MambaTrace(family_model(model_type)).cfg
    with pytest.raises(AttributeError, match=words):
        getattr(cfg, name)
    assert name not in cfg


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_before_the_weights_are_loaded(tmp_path: Path, model_type: str) -> None:
    family_model(model_type).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer"):
        model = MambaTrace(tmp_path)
    assert (model.cfg.E, model.cfg.device) == (24, torch.device("meta"))
