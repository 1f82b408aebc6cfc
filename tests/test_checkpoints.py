"""Checkpoints on disk and, with the hub replaced, on the hub: found, recognised, read, refused with words."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import ORIGINAL, edit, fails, hub, loaded, logits, refused, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config, convert_state_dict
from mamba_trace.conversion.checkpoints import find_checkpoint, save_original

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
TOKENS = torch.arange(21)[None]


def logits_of(model: MambaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


# ---------------------------------------------------------------- reading the original format


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_original_folder_gives_equal_logits(tmp_path: Path, safe: bool, lm_head: bool, tied: bool) -> None:
    model = tiny_model(tie_embeddings=tied)
    save_original(model, tmp_path, safe_serialization=safe, lm_head=lm_head)
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    weights = load_file(file) if safe else torch.load(file, weights_only=True)
    assert ("lm_head.weight" in weights) is (lm_head or not tied)
    assert "backbone.embedding.weight" in weights
    assert json.loads((tmp_path / "config.json").read_text()) == ORIGINAL | {"tie_embeddings": tied}
    again = loaded(tmp_path)
    assert again.config.vocab_size == 24
    assert again.config.tie_word_embeddings is tied
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_the_file_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = torch.nn.Module.to(tiny_model(), dtype)
    save_original(model, tmp_path)
    found = loaded(tmp_path).state_dict()
    assert all(found[name].dtype == dtype and torch.equal(found[name], t) for name, t in model.state_dict().items())


def test_old_torch_files_without_zip_are_read(tmp_path: Path) -> None:
    model = tiny_model()
    save_original(model, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    save_original(tiny_model(), tmp_path)
    torch.save({"x": Malicious()}, tmp_path / "pytorch_model.bin")
    words = fails(lambda: loaded(tmp_path))
    assert "pytorch_model.bin is a pickle that holds more than tensors" in words
    assert "could run code" in words
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    assert "is a pickle that holds more than tensors" in fails(lambda: loaded(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_broken_weights_are_said(tmp_path: Path, file: str) -> None:
    save_original(tiny_model(), tmp_path, safe_serialization=file.startswith("model"))
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    assert f"{file} cannot be read; it may be incomplete" in fails(lambda: loaded(tmp_path))
    torch.save(torch.zeros(3), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert "must hold a dict of tensors, found a Tensor" in fails(lambda: loaded(tmp_path))


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    save_original(tiny_model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL | {"n_layer": 3, "vocab_size": 30}))
    words = fails(lambda: loaded(tmp_path))
    assert f"the weights of {tmp_path} do not fit its config.json: it declares num_hidden_layers 3 and" in words
    assert "it declares vocab_size 32 and the weights have 24" in words
    assert "vocab_size counts the padding" in words


@pytest.mark.parametrize("safe", [True, False])
def test_a_tied_head_that_differs(tmp_path: Path, safe: bool) -> None:
    model = tiny_model(tie_embeddings=False)
    save_original(model, tmp_path, safe_serialization=safe)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    assert "have another lm_head.weight; set tie_word_embeddings=False" in fails(lambda: loaded(tmp_path))


# ---------------------------------------------------------------- recognising a folder


def test_huggingface_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    checkpoint = find_checkpoint(str(tmp_path))
    assert (checkpoint.format, checkpoint.path, checkpoint.name) == ("huggingface", tmp_path, str(tmp_path))
    expected = MambaConfig.from_pretrained(tmp_path).to_dict()
    found = checkpoint.config.to_dict()
    differing = {key for key in expected if found.get(key) != expected[key]}
    assert found.keys() == expected.keys()
    assert differing <= {"_name_or_path"}


def test_original_checkpoints_are_not_rescaled_by_transformers(tmp_path: Path) -> None:
    """transformers 5 divides loaded out_proj weights where rescale_prenorm_residual is set."""
    model = tiny_model()
    save_original(model, tmp_path / "original")
    again = loaded(tmp_path / "original")
    again.save_pretrained(tmp_path / "ported")
    assert torch.equal(logits_of(MambaForCausalLM.from_pretrained(tmp_path / "ported").eval()), logits_of(model))
    assert convert_config(MambaConfig.from_pretrained(tmp_path / "ported"), "original") == ORIGINAL


def test_folders_that_are_neither_format(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    words = fails(lambda: find_checkpoint(tmp_path))
    assert "has no config.json; it has notes.txt" in words
    assert "model_type 'mamba'" in words
    assert "d_model, n_layer and vocab_size and no model_type" in words
    config = tmp_path / "config.json"
    config.write_text('{"layers": 3}')
    words = fails(lambda: find_checkpoint(tmp_path))
    assert "Found the keys layers." in words
    assert "The folder has config.json, notes.txt." in words
    for model_type in ("lfm2", "recurrent_gemma", "llama"):
        config.write_text(json.dumps({"model_type": model_type}))
        words = fails(lambda: find_checkpoint(tmp_path))
        assert f"model_type '{model_type}'; only 'mamba', 'falcon_mamba', 'mamba2', 'nemotron_h', " in words
    config.write_text(json.dumps(ORIGINAL | {"ssm_cfg": {"layer": "Mamba3"}}))
    assert "ssm_cfg.layer is 'Mamba3', and the layers that can be loaded are" in fails(
        lambda: find_checkpoint(tmp_path)
    )
    config.write_text(json.dumps({"d_model": 12, "n_layers": 2, "vocab_size": 24}))
    assert "has the config of a MambaLens model; convert it with convert_config" in fails(
        lambda: find_checkpoint(tmp_path)
    )
    config.write_text("{")
    assert "config.json is not JSON" in fails(lambda: find_checkpoint(tmp_path))
    config.write_text("[]")
    assert "must hold a JSON object, found a list" in fails(lambda: find_checkpoint(tmp_path))
    assert "is a file; give the folder" in fails(lambda: find_checkpoint(config))


NO_NAMES = (
    "./nope",
    "../nope",
    ".",
    "/no/such/folder",
    "~/nope/x",
    "~nobody-here/x",
    "C:\\models\\x",
    "my models",
    "a/b\n",
)


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = hub(monkeypatch, lambda name, file: AssertionError("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    said = ". has no config.json" if name == "." else f"no such folder: {name}. It is looked for at "
    assert fails(lambda: find_checkpoint(name)).startswith(said)
    assert not asked


@pytest.mark.parametrize("name", [None, 3, b"a/b", MambaConfig()], ids=lambda name: type(name).__name__)
def test_what_is_no_name_is_refused_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    asked = hub(monkeypatch, lambda name, file: AssertionError("the hub was asked"))
    words = "takes a hub id, a folder or a loaded model such as a MambaForCausalLM; for a configuration use MambaTrace"
    for take in (find_checkpoint, MambaTrace):
        assert words in fails(lambda take=take: take(name))  # type: ignore[misc]
    assert fails(lambda: find_checkpoint(name)).endswith(f"This is a {type(name).__name__}")
    assert not asked


# ---------------------------------------------------------------- writing


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MambaForCausalLM(convert_config(ORIGINAL, "huggingface"))
    said = fails(lambda: save_original(model, tmp_path / "a"))
    assert "parameters are on the meta device" in said
    assert "model.dispatch() or MambaTrace(..., dispatch=True)" in said
    model = tiny_model()
    model.config.hidden_act = "gelu"
    assert "has only silu" in fails(lambda: save_original(model, tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_weights_written_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    save_original(model, tmp_path)
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    expected = convert_state_dict(model.state_dict(), "original")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------- configurations

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


def test_a_config_helps_where_the_checkpoint_has_none(folder: Path, tokens: Tensor, tiny_config) -> None:
    want = logits(MambaTrace(folder, config=tiny_config), tokens)
    for spoil in (lambda file: file.write_text("{"), lambda file: file.unlink()):
        spoil(folder / "config.json")
        refused(folder)
        assert torch.equal(logits(MambaTrace(folder, config=tiny_config), tokens), want)
