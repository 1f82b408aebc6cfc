"""What cannot be loaded is refused when it is asked for, in words; nothing is built and no code is run."""

from __future__ import annotations

import io
import json
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import MambaConfig

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config
from mamba_trace.conversion.checkpoints import save_original
from mamba_trace.errors import CheckpointError
from mamba_trace.model import DEMO

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
FORMATS = ("original", "huggingface")
SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(params=FORMATS)
def folder(tiny_hf, tmp_path: Path, request) -> Path:
    """A good checkpoint in one of the formats."""
    module = tiny_hf()
    if request.param == "original":
        save_original(module, tmp_path / "checkpoint", safe_serialization=True)
    else:
        module.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits(model: MambaTrace, tokens: Tensor) -> Tensor:
    with torch.no_grad(), model.trace(tokens):
        out = model.lm_head.output.save()
    return out


def refused(*args: Any, **kwargs: Any) -> str:
    """The words of the refusal."""
    with pytest.raises(CheckpointError) as caught:
        MambaTrace(*args, **kwargs)
    words = str(caught.value)
    assert "\n" not in words
    assert len(words) < 800
    return words


def pickled(value: Any, zipped: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def edit(folder: Path, **changes: Any) -> None:
    """Change the config.json under the names of its format: Hugging Face's are given."""
    config = json.loads((folder / "config.json").read_text())
    original = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "layer_norm_epsilon": "norm_epsilon",
    }
    original |= {"tie_word_embeddings": "tie_embeddings"}
    if "model_type" not in config:
        changes = {original.get(name, name): value for name, value in changes.items()}
    (folder / "config.json").write_text(json.dumps(config | changes))


# -- files of weights --------------------------------------------------------------------------------------

WEIGHTS = {
    "an empty file": (SAFE, b"", "cannot be read; it may be incomplete, it has 0 bytes.*Download it again"),
    "garbage": (SAFE, b"hello", "cannot be read; it may be incomplete, it has 5 bytes"),
    "a header that lies": (SAFE, (2**40).to_bytes(8, "little") + b"{}", "cannot be read"),
    "a pointer": (SAFE, b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
    "another model": (SAFE, save({"a": torch.zeros(2)}), "do not hold the weights of a Mamba: they have a"),
    "an empty pickle": (PICKLE, b"", "cannot be read"),
    "no pickle": (PICKLE, b"hello", "no file of weights that torch.save wrote, it begins with b'he'"),
    "a page": (PICKLE, b"<!DOCTYPE html>", "no file of weights that torch.save wrote"),
    "a pickle's pointer": (PICKLE, b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    "half a zip file": (PICKLE, pickled({"a": torch.zeros(9)})[:300], "cannot be read"),
    "half an old file": (PICKLE, pickled({"a": torch.zeros(9)}, zipped=False)[:-9], "cannot be read"),
    "a tensor": (PICKLE, pickled(torch.zeros(3)), "must hold a dict of tensors, found a Tensor"),
    "a dict of dicts": (
        PICKLE,
        pickled({"model": {}}),
        "found a dict under 'model'. Save the model's state_dict",
    ),
    "no names": (PICKLE, pickled({1: torch.zeros(2)}), "must hold a dict of tensors by their names"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_broken_weights_are_refused_at_once(folder: Path, fault: str) -> None:
    name, content, words = WEIGHTS[fault]
    (folder / SAFE).unlink()
    (folder / name).write_bytes(content)
    said = refused(folder)
    assert re.search(words, said), said
    assert str(folder) in said


def test_half_a_file_and_a_folder_in_its_place(folder: Path) -> None:
    content = (folder / SAFE).read_bytes()
    for size in (len(content) // 2, len(content) - 1):
        (folder / SAFE).write_bytes(content[:size])
        assert f"{SAFE} cannot be read; it may be incomplete, it has {size} bytes" in refused(folder)
    (folder / SAFE).unlink()
    (folder / SAFE).mkdir()
    assert f"{folder / SAFE} is no file" in refused(folder)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("zipped", [True, False, None, 0, 4], ids=str)
def test_code_in_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, zipped: Any) -> None:
    (folder / SAFE).unlink()
    value = {"a": Malicious(tmp_path / "ran")}
    plain = (
        None if isinstance(zipped, bool) else pickle.dumps(value, protocol=2 if zipped is None else zipped)
    )
    (folder / PICKLE).write_bytes(pickled(value, zipped) if plain is None else plain)
    for options in (
        {},
        {"dispatch": True},
        {"weights_only": False},
        {"weights_only": False, "dispatch": True},
    ):
        said = refused(folder, **options)
        if zipped != 0:  # protocol 0 has no mark of a pickle
            assert "is a pickle that holds more than tensors, and loading it could run code" in said
    assert not (tmp_path / "ran").exists()


# -- configurations ----------------------------------------------------------------------------------------

CONFIGS = {
    "": "is not JSON: it is empty",
    "{": "is not JSON",
    "[]": "must hold a JSON object, found a list",
    "[" * 100_000: "is not JSON",
    '{"model_type": "mamba", "hidden_size": ' + "9" * 5000 + "}": "is not JSON",
    '{"model_type": 5}': "model_type 5",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:12])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    said = refused(folder)
    assert CONFIGS[text] in said
    assert str(folder) in said


def test_a_config_that_is_a_folder_or_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert f"{folder / 'config.json'} is not JSON" in refused(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert f"{folder / 'config.json'} is a folder" in refused(folder)


VALUES: list[tuple[str, Any]] = [
    *(("hidden_size", value) for value in ("12", -1, 0, 12.0, True, None, [12])),
    *(("num_hidden_layers", value) for value in ("3", -1, 0)),
    *(("vocab_size", value) for value in ("31", -1, 0, 31.0)),
    ("layer_norm_epsilon", "x"),
    ("layer_norm_epsilon", -1.0),
    ("layer_norm_epsilon", float("nan")),
    ("tie_word_embeddings", "no"),
]


@pytest.mark.parametrize(("field", "value"), VALUES)
def test_values_that_a_field_does_not_take(folder: Path, field: str, value: Any) -> None:
    edit(folder, **{field: value})
    said = refused(folder)
    assert "config.json" in said
    assert str(folder) in said
    names = json.loads((folder / "config.json").read_text())
    assert any(re.search(rf"\b{name}\b", said) for name in names)
    assert repr(value) in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "zzz"}, "hidden_act 'zzz' is no activation of transformers"),
        ({"hidden_act": "slu"}, "did you mean silu"),
        ({"dtype": "zz"}, "zz"),
        ({"dtype": "int64"}, "dtype 'int64' is no dtype of weights"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"quantization_config": "abc"}, "MambaConfig rejects"),
        ({"id2label": 5}, "MambaConfig rejects"),
        ({"transformers_weights": 5}, "transformers_weights in the config of .* must name a file, found 5"),
        ({"transformers_weights": "x.safetensors"}, "has no x.safetensors, which its config names"),
        ({"transformers_weights": "../x.safetensors"}, "which is not in the folder"),
    ],
)
def test_hugging_face_configs_on_which_transformers_stumbles(tiny_hf, tmp_path, change, words) -> None:
    tiny_hf().save_pretrained(tmp_path)
    edit(tmp_path, **change)
    said = refused(tmp_path)
    assert re.search(words, said), said
    assert str(tmp_path) in said


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


def test_names_are_compared_before_anything_is_loaded(folder: Path) -> None:
    weights = load_file(folder / SAFE)
    save_file({name: t for name, t in weights.items() if "layers.1.mixer.D" not in name}, folder / SAFE)
    assert "they lack backbone.layers.1.mixer.D (1 in all)" in refused(folder)
    save_file(weights | {"surplus": torch.zeros(1)}, folder / SAFE)
    assert "they have besides surplus (1 in all)" in refused(folder)


# -- files beside the weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("generation_config.json", "[]", "generation_config.json must hold a JSON object"),
        ("generation_config.json", '{"max_new_tokens": "a"}', "generation_config.json holds no settings"),
        ("generation_config.json", '{"cache_implementation": "zz"}', "Invalid `cache_implementation`"),
        ("tokenizer.json", "", "tokenizer.json is not JSON: it is empty"),
        ("tokenizer.json", "{", "tokenizer.json is not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json must hold a JSON object"),
        ("tokenizer.json", "{}", "the tokenizer in"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "the tokenizer in"),
        ("vocab.json", "{", "vocab.json is not JSON"),
    ],
)
def test_broken_files_beside_the_weights(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    said = refused(folder)
    assert words in said
    assert str(folder) in said


def test_a_tokenizer_of_code_is_not_run_and_nobody_is_asked(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def ask(*words: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", ask)
    (folder / "config.json").write_text((folder / "config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.T", null]}, "tokenizer_class": "T"}'
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    assert "the tokenizer in" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_a_folder(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()
    assert f"{folder / 'tokenizer.json'} is a folder" in refused(folder)


# -- arguments ---------------------------------------------------------------------------------------------


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


def test_a_config_with_fewer_layers_takes_the_first(folder: Path, tokens: Tensor) -> None:
    whole = MambaTrace(folder, dispatch=True)
    config = convert_config(whole.config, "huggingface")
    config.num_hidden_layers = 2
    state = {k: v for k, v in whole._module.state_dict().items() if "layers.2." not in k}
    want = logits(MambaTrace.from_state_dict(config, state), tokens)
    for options in ({"config": config}, {"num_hidden_layers": 2}):
        model = MambaTrace(folder, **options)
        assert len(model.layers) == 2
        assert torch.equal(logits(model, tokens), want)
        assert len(model.layers) == 2


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


def test_a_config_helps_where_the_checkpoint_has_none(folder: Path, tokens: Tensor, tiny_config) -> None:
    want = logits(MambaTrace(folder, config=tiny_config), tokens)
    for spoil in (lambda file: file.write_text("{"), lambda file: file.unlink()):
        spoil(folder / "config.json")
        refused(folder)
        assert torch.equal(logits(MambaTrace(folder, config=tiny_config), tokens), want)


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


def test_good_checkpoints_load_as_before(folder: Path, tokens: Tensor, tiny_hf) -> None:
    want = logits(MambaTrace(tiny_hf()), tokens)
    torch.testing.assert_close(logits(MambaTrace(folder), tokens), want)
    assert MambaTrace(DEMO, dispatch=True).dispatched
    assert isinstance(MambaTrace.demo().config, MambaConfig)
