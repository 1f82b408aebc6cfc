"""The tokenizer of a checkpoint: its own, the one the state-spaces models share, or none with a warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import refused
from family_models import family_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaForCausalLM, PreTrainedTokenizerFast

from mamba_trace.conversion import checkpoint_tokenizer, convert_config
from mamba_trace.conversion.checkpoint_tokenizer import load_tokenizer
from mamba_trace.conversion.checkpoints import find_checkpoint, save_original
from mamba_trace.errors import CheckpointError


def tiny_model() -> MambaForCausalLM:
    config = {"d_model": 12, "n_layer": 1, "vocab_size": 24, "ssm_cfg": {"d_state": 3}}
    return MambaForCausalLM(convert_config(config, "huggingface"))


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

    monkeypatch.setattr(checkpoint_tokenizer.AutoTokenizer, "from_pretrained", from_pretrained)
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
    checkpoint = find_checkpoint(tmp_path, revision="v1", token="secret")
    asked = default_tokenizer(monkeypatch, word_tokenizer(24))
    monkeypatch.setattr(checkpoint_tokenizer, "DEFAULT_TOKENIZER_SIZE", 24)
    tokenizer = load_tokenizer(checkpoint, use_fast=True)
    assert tokenizer is not None
    assert tokenizer.pad_token == "<end>"
    expected = {"token": "secret", "local_files_only": True, "use_fast": True}
    assert asked == [("EleutherAI/gpt-neox-20b", expected)]  # not the revision, which is the checkpoint's


def test_no_tokenizer_warns_once_and_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_original(tiny_model(), tmp_path)
    monkeypatch.setattr(checkpoint_tokenizer, "offline", lambda options: False)  # whatever HF_HUB_OFFLINE says
    for size, words, requests in (
        (24, "gpt-neox-20b is neither cached nor within reach", 2),
        (25, "gpt-neox-20b has 25 tokens, the model 24", 0),
    ):
        asked = default_tokenizer(monkeypatch, OSError("no"))
        monkeypatch.setattr(checkpoint_tokenizer, "DEFAULT_TOKENIZER_SIZE", size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_tokenizer(find_checkpoint(tmp_path)) is None
        assert len(caught) == 1
        message = str(caught[0].message)
        assert words in message
        assert "Strings cannot be used until tokenizer= is given; token tensors work" in message
        assert len(asked) == requests


def test_a_tokenizer_of_code_is_not_run_and_nobody_is_asked(folder: Path, tmp_path: Path, monkeypatch) -> None:
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


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_only_what_was_trained_with_the_default_tokenizer_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    family_config(model_type, vocab_size=65024).save_pretrained(tmp_path)
    asked = default_tokenizer(monkeypatch, word_tokenizer())
    if model_type != "falcon_mamba":
        assert load_tokenizer(find_checkpoint(tmp_path)) is not None
        return
    with pytest.warns(UserWarning, match="a Falcon-Mamba was not trained with EleutherAI/gpt-neox-20b"):
        assert load_tokenizer(find_checkpoint(tmp_path)) is None
    assert not asked
