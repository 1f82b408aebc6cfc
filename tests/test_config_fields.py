"""Where each value of a configuration stands in each format, and what it is where it is left out."""

from __future__ import annotations

from typing import Any

import pytest
from configurations import MAMBA_130M, MAMBA_LENS, plain
from transformers import MambaConfig

from mamba_trace.conversion import SOURCE_KEY, convert_config, residuals_per_layer
from mamba_trace.conversion.config_fields import (
    FIELDS,
    INNER_WIDTH,
    LENS_ALIASES,
    N_RESIDUALS,
    REQUIRED,
    Field,
    aliases_of,
)
from mamba_trace.modeling.architectures import ARCHITECTURES


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


OTHER = {int: 7, float: 0.25, str: "constant"}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_field_is_read_where_the_table_says(field: Field) -> None:
    other = OTHER[field.kind] if field.kind is not bool else not field.default
    for format, base in (("original", MAMBA_130M), ("mamba_lens", MAMBA_LENS)):
        path = field.path(format)
        if path is None:
            continue
        changed = {key: value for key, value in base.items() if key not in ("d_inner", path[0])}
        changed["pad_vocab_size_multiple"] = 1
        changed[path[0]] = {path[1]: other} if len(path) == 2 else other
        config = convert_config(changed, "huggingface")
        found = residuals_per_layer(config) if field.name == N_RESIDUALS else getattr(config, field.name)
        assert found == other, format


def test_defaults_and_second_names_are_those_of_hugging_face() -> None:
    config = MambaConfig()
    own = {"initializer_range", "rescale_prenorm_residual", "time_step_rank", N_RESIDUALS}  # mamba_ssm's
    for field in FIELDS:
        if field.default is not REQUIRED and field.name not in own:
            assert getattr(config, field.name) == field.default, field.name
    aliases = [aliases_of(architecture) for architecture in ARCHITECTURES]
    for architecture, names in zip(ARCHITECTURES, aliases, strict=True):
        fields = architecture.config_class().to_dict() | {INNER_WIDTH: None}  # which is computed
        assert set(names.values()) <= fields.keys()
    assert {alias for names in aliases for alias in names} == LENS_ALIASES.keys()
