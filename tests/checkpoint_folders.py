"""Checkpoints that are changed or broken on purpose, and the words with which they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.conversion import checkpoint_files, convert_config
from mamba_trace.conversion.checkpoints import Checkpoint, find_checkpoint
from mamba_trace.conversion.initialization import initialize
from mamba_trace.conversion.loading import examine, load_model
from mamba_trace.errors import CheckpointError

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
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


def tiny_model(**changes: Any) -> MambaForCausalLM:
    model = MambaForCausalLM(convert_config(ORIGINAL | changes, "huggingface", trained=True)).eval()
    initialize(model, seed=5)
    return model


def load(checkpoint: Checkpoint) -> MambaForCausalLM:
    examine(checkpoint, {}, fetch=True)
    return load_model(checkpoint, {})


def loaded(folder: Path) -> MambaForCausalLM:
    """A model with the weights of a folder in the original format."""
    checkpoint = find_checkpoint(folder)
    assert checkpoint.format == "original"
    return load(checkpoint)


def fails(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def response_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub says no",)
    return error


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], Path | Exception]) -> list[dict[str, Any]]:
    """Replace fetching from the hub; returns the list of what will be asked of it."""
    asked: list[dict[str, Any]] = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append({"name": name, "file": file} | options)
        found = answer(name, file)
        if isinstance(found, Exception):
            raise found
        return str(found)

    def cached(name: str, file: str, **options: Any) -> str | None:
        found = answer(name, file)
        fetched = any(question["file"] == file for question in asked)
        return str(found) if fetched and isinstance(found, Path) else None

    monkeypatch.setattr(checkpoint_files, "try_to_load_from_cache", cached)
    monkeypatch.setattr(checkpoint_files, "hf_hub_download", download)
    return asked
