"""Files of weights that are broken or hold code: refused in words before anything is built."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PICKLE, SAFE, refused
from safetensors.torch import save

from mamba_trace.conversion import tensor_files

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


def pickled(value: Any, zipped: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


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
    assert f"{folder / SAFE} is a folder" in refused(folder)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("zipped", [True, False, None, 0, 4], ids=str)
def test_code_in_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, zipped: Any) -> None:
    (folder / SAFE).unlink()
    value = {"a": Malicious(tmp_path / "ran")}
    plain = None if isinstance(zipped, bool) else pickle.dumps(value, protocol=2 if zipped is None else zipped)
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


def test_a_pickle_too_large_to_be_examined_is_not_run_either(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (folder / SAFE).unlink()
    (folder / PICKLE).write_bytes(pickled({"a": Malicious(tmp_path / "ran")}, zipped=False))
    monkeypatch.setattr(tensor_files, "LARGE", 0)
    assert "Weights only load failed" in refused(folder, weights_only=False, dispatch=True)
    assert not (tmp_path / "ran").exists()
