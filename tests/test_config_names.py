"""Misspelt fields of configurations for new models: refused with the nearest name, and right ones taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MambaConfig

from mamba_trace import MambaTrace
from mamba_trace.conversion import FORMATS, convert_config
from mamba_trace.errors import CheckpointError

ORIGINAL = {"d_model": 8, "n_layer": 1, "vocab_size": 20}
LENS = {"d_model": 8, "n_layers": 1, "vocab_size": 20}
HF = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
# The config.json of state-spaces/mamba-130m-hf has the original format's names beside Hugging Face's.
BOTH = HF | {
    "d_inner": 16,
    "d_model": 8,
    "n_layer": 1,
    "fused_add_norm": True,
    "rms_norm": True,
    "ssm_cfg": {},
}
BOTH |= {"intermediate_size": 16, "pad_vocab_size_multiple": 8, "architectures": ["MambaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ORIGINAL | {"d_stat": 2}, "no field 'd_stat'; did you mean ssm_cfg.d_state"),
        (ORIGINAL | {"d_state": 2}, "no field 'd_state'; it belongs where ssm_cfg.d_state is"),
        (ORIGINAL | {"n_layr": 2}, "no field 'n_layr'; did you mean n_layer"),
        (ORIGINAL | {"norm_eps": 1e-3}, "no field 'norm_eps'; did you mean norm_epsilon"),
        (ORIGINAL | {"xyzzy": 1}, "the original format has no field 'xyzzy'. It has attn_cfg, "),
        (ORIGINAL | {"ssm_cfg": {"d_stat": 2}}, "no field 'd_stat'; did you mean ssm_cfg.d_state"),
        (ORIGINAL | {"ssm_cfg": "abc"}, "ssm_cfg must be an object of settings, found 'abc'"),
        (HF | {"hiden_size": 4}, "no field 'hiden_size'; did you mean hidden_size"),
        (HF | {"state_sise": 4}, "no field 'state_sise'; did you mean state_size"),
        (HF | {"d_state": 4}, "no field 'd_state': it is called state_size, which is 16 here and not 4"),
        (HF | {"n_layer": 7}, "it is called num_hidden_layers, which is 1 here and not 7"),
        (MambaConfig(hiden_size=4, num_hidden_layers=1), "no field 'hiden_size'; did you mean hidden_size"),
        (LENS | {"d_stat": 2}, "no field 'd_stat'; did you mean d_state"),
        (LENS | {"initializer_cfg": {"dt_mn": 1}}, "'dt_mn'; did you mean initializer_cfg.dt_min"),
        (SimpleNamespace(**LENS, d_stat=2), "no field 'd_stat'; did you mean d_state"),
    ],
)
def test_misspelt_fields(config: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        MambaTrace.from_config(config)
    assert words in str(caught.value)
    weights = MambaTrace.from_config(ORIGINAL)._module.state_dict()
    with pytest.raises(CheckpointError, match=words.partition(";")[0].replace("(", r"\(")):
        MambaTrace.from_state_dict(config, weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "config", [ORIGINAL, LENS, HF, BOTH, HF | {"my_note": 1}], ids=["original", "lens", "hf", "both", "note"]
)
def test_right_fields_are_taken_and_so_is_what_conversion_writes(config: Any, format: str) -> None:
    converted = convert_config(config, format)
    first, second = MambaTrace.from_config(config), MambaTrace.from_config(converted)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_the_view_of_a_model_is_a_configuration() -> None:
    model = MambaTrace.from_config(ORIGINAL)
    again = MambaTrace.from_config(model.cfg.to_dict())
    assert again.config.hidden_size == 8
