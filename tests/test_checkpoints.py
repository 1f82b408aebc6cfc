"""Checkpoints on disk and, with the hub replaced, on the hub: found, recognised, read, refused with words."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from mamba_trace import MambaTrace
from mamba_trace.conversion import checkpoint_files, checkpoints, convert_config, convert_state_dict
from mamba_trace.conversion.checkpoints import (
    find_checkpoint,
    load_tokenizer,
    read_state_dict,
    save_original,
)
from mamba_trace.conversion.initialization import initialize
from mamba_trace.errors import CheckpointError

ORIGINAL = {  # a vocabulary of 21 is padded to 24
    "d_model": 12,
    "n_layer": 2,
    "vocab_size": 21,
    "ssm_cfg": {"d_state": 3, "dt_rank": 2},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
TOKENS = torch.arange(21)[None]


def tiny_model(**changes: Any) -> MambaForCausalLM:
    model = MambaForCausalLM(convert_config(ORIGINAL | changes, "huggingface", trained=True)).eval()
    initialize(model, seed=5)
    return model


def logits_of(model: MambaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(folder: Path) -> MambaForCausalLM:
    """A model with the weights of a folder in the original format."""
    checkpoint = find_checkpoint(folder)
    assert checkpoint.format == "original"
    model = MambaForCausalLM(checkpoint.config).eval()
    model.load_state_dict(read_state_dict(checkpoint), strict=False)
    return model


def fails(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


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
    found = read_state_dict(find_checkpoint(tmp_path))
    assert all(
        found[name].dtype == dtype and torch.equal(found[name], t) for name, t in model.state_dict().items()
    )


@pytest.mark.parametrize("safe", [True, False])
def test_shards(tmp_path: Path, safe: bool) -> None:
    model = tiny_model()
    save_original(model, tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights.pop("lm_head.weight")
    (tmp_path / "pytorch_model.bin").unlink()
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    files = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: weights[name] for name in files if files[name] == file}
        (save_file if safe else torch.save)(part, tmp_path / file)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    assert f"names 2 files, of which {stem}-00002-of-00002.{suffix} is not there" in fails(
        lambda: loaded(tmp_path)
    )


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_original(tiny_model(), tmp_path, safe_serialization=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    loaded(tmp_path)


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
    assert (
        f"cannot load the weights of {tmp_path}: the state dict does not fit. 10 missing: backbone.layers.2."
        in words
    )
    assert "backbone.embeddings.weight [24, 12], expected [32, 12]" in words


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
    assert torch.equal(
        logits_of(MambaForCausalLM.from_pretrained(tmp_path / "ported").eval()), logits_of(model)
    )
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
    for model_type in ("falcon_mamba", "mamba2", "llama"):
        config.write_text(json.dumps({"model_type": model_type}))
        words = fails(lambda: find_checkpoint(tmp_path))
        assert f"model_type '{model_type}'; only Mamba-1 is supported so far" in words
    config.write_text(json.dumps(ORIGINAL | {"ssm_cfg": {"layer": "Mamba2"}}))
    assert "ssm_cfg.layer is 'Mamba2'; only Mamba-1" in fails(lambda: find_checkpoint(tmp_path))
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


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "x" * 300])
def test_other_names_that_are_no_hub_ids_keep_the_hub_s_words(name: str) -> None:
    assert f"{name!r} is neither a folder that exists nor a hub id: " in fails(lambda: find_checkpoint(name))


@pytest.mark.parametrize("name", [None, 3, b"a/b", MambaConfig()], ids=lambda name: type(name).__name__)
def test_what_is_no_name_is_refused_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    asked = hub(monkeypatch, lambda name, file: AssertionError("the hub was asked"))
    words = (
        "takes a hub id, a folder or a loaded MambaForCausalLM; "
        "for a configuration use MambaTrace.from_config"
    )
    for take in (find_checkpoint, MambaTrace):
        assert words in fails(lambda take=take: take(name))  # type: ignore[misc]
    assert fails(lambda: find_checkpoint(name)).endswith(f"This is a {type(name).__name__}")
    assert not asked


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    assert f"{tmp_path} has no weights; it has config.json" in fails(lambda: loaded(tmp_path))


# ---------------------------------------------------------------- the hub, replaced


def response_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub says no",)
    return error


def hub(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], Path | Exception]
) -> list[dict[str, Any]]:
    """Replace fetching from the hub; returns the list of what will be asked of it."""
    asked: list[dict[str, Any]] = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append({"name": name, "file": file} | options)
        found = answer(name, file)
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr(checkpoint_files, "hf_hub_download", download)
    return asked


def test_original_checkpoint_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    save_original(model, tmp_path)
    absent = response_error(hub_errors.RemoteEntryNotFoundError)

    def answer(name: str, file: str) -> Path | Exception:
        return tmp_path / file if (tmp_path / file).exists() else absent

    asked = hub(monkeypatch, answer)
    options = {
        "revision": "v1",
        "cache_dir": tmp_path / "cache",
        "token": "secret",
        "local_files_only": False,
    }
    checkpoint = find_checkpoint("someone/mamba", **options)  # type: ignore[arg-type]
    assert (checkpoint.format, checkpoint.path) == ("original", None)
    assert asked == [{"name": "someone/mamba", "file": "config.json"} | options]
    assert "secret" not in repr(checkpoint)
    weights = read_state_dict(checkpoint)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [question["file"] for question in asked[1:]] == [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert all(question["revision"] == "v1" for question in asked)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "someone/mamba has no weights on the hub" in fails(lambda: read_state_dict(checkpoint))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            hub_errors.LocalEntryNotFoundError,
            r"the hub was not reached .*MambaTrace.demo\(\) needs no network",
        ),
        (hub_errors.RepositoryNotFoundError, "'a/b' is neither a folder that exists nor a model on the hub"),
        (hub_errors.GatedRepoError, "a/b is gated: ask for access"),
        (hub_errors.RevisionNotFoundError, "a/b has no revision 'v1' on the hub"),
        (hub_errors.RemoteEntryNotFoundError, "a/b has no config.json on the hub at revision 'v1'"),
        (ConnectionError, r"config.json of a/b at revision 'v1' could not be fetched .*MambaTrace.demo\(\)"),
    ],
)
def test_failures_of_the_hub(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str) -> None:
    hub(monkeypatch, lambda name, file: response_error(kind))
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint("a/b", revision="v1")


def test_offline_and_not_cached(tmp_path: Path) -> None:
    words = fails(lambda: find_checkpoint("someone/mamba", cache_dir=tmp_path, local_files_only=True))
    assert "'someone/mamba' is no local folder, its config.json is not in the local cache" in words
    assert "local_files_only or HF_HUB_OFFLINE is set" in words
    assert "MambaTrace.demo()" in words


# ---------------------------------------------------------------- tokenizers


def word_tokenizer(n_words: int = 4, **special: Any) -> PreTrainedTokenizerFast:
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, n_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **special)


def default_tokenizer(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[str, dict[str, Any]]]:
    """Replace fetching the default tokenizer; returns the list of what will be asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", from_pretrained)
    return asked


@pytest.mark.parametrize("padding", [{}, {"pad_token": "w1"}])
def test_own_tokenizer_with_padding(tmp_path: Path, padding: dict[str, Any]) -> None:
    save_original(tiny_model(), tmp_path)
    word_tokenizer(**padding).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(find_checkpoint(tmp_path))
    assert tokenizer is not None
    assert tokenizer("w2 w3")["input_ids"] == [2, 3]
    assert tokenizer.pad_token == padding.get("pad_token", "<end>")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(find_checkpoint(tmp_path))


def test_default_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_original(tiny_model(), tmp_path)
    checkpoint = find_checkpoint(tmp_path, revision="v1")
    asked = default_tokenizer(monkeypatch, word_tokenizer(24))
    monkeypatch.setattr(checkpoints, "DEFAULT_TOKENIZER_SIZE", 24)
    tokenizer = load_tokenizer(checkpoint, use_fast=True)
    assert tokenizer is not None
    assert tokenizer.pad_token == "<end>"
    expected = {"cache_dir": None, "token": None, "local_files_only": True, "use_fast": True}
    assert asked == [("EleutherAI/gpt-neox-20b", expected)]  # not the revision, which is the checkpoint's


def test_no_tokenizer_warns_once_and_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_original(tiny_model(), tmp_path)
    monkeypatch.setattr(checkpoints, "offline", lambda options: False)  # whatever HF_HUB_OFFLINE says
    for size, words, requests in (
        (24, "gpt-neox-20b is neither cached nor within reach", 2),
        (25, "gpt-neox-20b has 25 tokens, the model 24", 0),
    ):
        asked = default_tokenizer(monkeypatch, OSError("no"))
        monkeypatch.setattr(checkpoints, "DEFAULT_TOKENIZER_SIZE", size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_tokenizer(find_checkpoint(tmp_path)) is None
        assert len(caught) == 1
        message = str(caught[0].message)
        assert words in message
        assert "Strings cannot be used until tokenizer= is given; token tensors work" in message
        assert len(asked) == requests


# ---------------------------------------------------------------- writing


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MambaForCausalLM(convert_config(ORIGINAL, "huggingface"))
    assert "parameters are on the meta device" in fails(lambda: save_original(model, tmp_path / "a"))
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
