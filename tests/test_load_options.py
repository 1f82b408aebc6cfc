"""Arguments for loading: refused when they are given, in words, and taken where they are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import logits, refused
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config
from mamba_trace.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


def test_a_config_in_place_of_the_checkpoints(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    whole = MambaTrace(folder, dispatch=True)
    config = convert_config(whole.config, "huggingface")
    config.layer_norm_epsilon = 0.5
    config.save_pretrained(tmp_path / "config")
    want = logits(MambaTrace.from_state_dict(config, whole._module.state_dict()), tokens)
    assert not torch.allclose(want, logits(whole, tokens))
    ways = (config, config.to_dict(), convert_config(config, "original"), tmp_path / "config")
    for given in (*ways, str(tmp_path / "config" / "config.json")):
        model = MambaTrace(folder, config=given)
        assert torch.equal(logits(model, tokens), want)
        assert model.config.layer_norm_epsilon == 0.5
    assert torch.equal(logits(MambaTrace(folder, layer_norm_epsilon=0.5), tokens), want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": 5}, "expected a configuration (dict, MambaConfig or MambaCfg), found int"),
        ({"config": "/no/such/folder"}, "no such folder: /no/such/folder"),
        ({"config": {"model_type": "llama"}}, "model_type 'llama'"),
        (
            {"config": {"model_type": "mamba", "hiden_size": 3}},
            "has no field 'hiden_size'; did you mean hidden_size",
        ),
        ({"dtype": "zz"}, "dtype='zz' is no dtype of weights; it is one of float32"),
        ({"dtype": "flaot32"}, "did you mean float32"),
        ({"dtype": torch.int64}, "dtype=torch.int64 is no dtype of weights"),
        ({"torch_dtype": "zz"}, "dtype='zz' is no dtype of weights"),
        ({"device": "zz"}, "device='zz' is no device. There are "),
        ({"device_map": "zz"}, "device_map='zz' is no device. There are "),
        ({"device_map": "autoo"}, "or it is auto, balanced"),
        (
            {"device": "cuda:99", "dispatch": True},
            "device='cuda:99' cannot be used on this machine. There are ",
        ),
        ({"device_map": "cuda:99", "dispatch": True}, "device_map='cuda:99' cannot be used on this machine"),
        ({"dtpye": torch.float32, "dispatch": True}, "take no argument dtpye; did you mean dtype"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' cannot be set"),
        ({"hidden_act": "zzz"}, "hidden_act 'zzz' is no activation"),
    ],
)
def test_arguments_are_refused_when_they_are_given(folder: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(folder, **options)


def test_a_device_that_is_elsewhere_is_no_fault_before_weights_are_loaded(folder: Path) -> None:
    assert not MambaTrace(folder, device_map="cuda:99").dispatched  # for remote=True, where it may be


def test_a_dtype_by_name_is_that_of_the_model_before_weights_are_loaded(folder: Path) -> None:
    model = MambaTrace(folder, dtype="bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.is_meta


@pytest.mark.parametrize("dtype", ["zz", torch.int8, 5])
def test_a_new_model_has_a_floating_dtype(dtype: Any) -> None:
    with pytest.raises(CheckpointError, match="is no dtype of weights"):
        MambaTrace.from_config({"d_model": 8, "n_layer": 1, "vocab_size": 20}, dtype=dtype)
