"""Files of a checkpoint, in a folder or on a hub that is replaced: found, fetched, refused with words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import ORIGINAL, fails, hub, load, loaded, response_error, tiny_model
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file
from torch import Tensor
from transformers import MambaForCausalLM

from mamba_trace.conversion.checkpoints import find_checkpoint, save_original
from mamba_trace.errors import CheckpointError

TOKENS = torch.arange(21)[None]


def logits_of(model: MambaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


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
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    assert f"names 2 files, of which {stem}-00002-of-00002.{suffix} is not there" in fails(lambda: loaded(tmp_path))


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_original(tiny_model(), tmp_path, safe_serialization=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    loaded(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "x" * 300])
def test_other_names_that_are_no_hub_ids_keep_the_hub_s_words(name: str) -> None:
    assert f"{name!r} is neither a folder that exists nor a hub id: " in fails(lambda: find_checkpoint(name))


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    assert f"{tmp_path} has no weights; it has config.json" in fails(lambda: loaded(tmp_path))


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
    weights = load(checkpoint).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [question["file"] for question in asked[1:]] == [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert all(question["revision"] == "v1" for question in asked)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "someone/mamba has no weights on the hub" in fails(lambda: load(checkpoint))


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
