"""Which files a checkpoint may say are its own: those in its folder, and the blobs of the hub's cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.conversion.checkpoint_index import read_json
from mamba_trace.conversion.checkpoints import save_original
from mamba_trace.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
FORMATS = ("original", "huggingface")
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def write(module: MambaForCausalLM, folder: Path, format: str, ending: str = "safetensors") -> Path:
    """A checkpoint in one file; its path."""
    if format == "original":
        save_original(module, folder, safe_serialization=ending == "safetensors")
    elif ending == "safetensors":
        module.save_pretrained(folder)
    else:
        module.config.save_pretrained(folder)
        torch.save(module.state_dict(), folder / "pytorch_model.bin")
    return folder / ("model.safetensors" if ending == "safetensors" else "pytorch_model.bin")


def index(folder: Path, file: str, ending: str = "safetensors") -> None:
    content = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
    (folder / INDEX[ending]).write_text(json.dumps(content))


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = MambaTrace(folder)
    with torch.no_grad(), model.trace(tokens):
        out = model.lm_head.output.save()
    return out


@pytest.mark.parametrize("ending", INDEX)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("where", ["above", "absolute", "over another folder", "behind a link", "in a linked folder"])
def test_an_index_names_no_files_outside_of_its_folder(tiny_hf, tmp_path, format, ending, where) -> None:
    folder = tmp_path / "checkpoint"
    outside = write(tiny_hf(), folder, format, ending).rename(tmp_path / f"outside.{ending}")
    (folder / "below").mkdir()
    (folder / f"link.{ending}").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    names = {
        "above": f"../outside.{ending}",
        "absolute": str(outside),
        "over another folder": f"below/../../outside.{ending}",
        "behind a link": f"link.{ending}",
        "in a linked folder": f"linked/outside.{ending}",
    }
    index(folder, names[where], ending)
    with pytest.raises(CheckpointError, match="which is not in the folder of the checkpoint") as caught:
        MambaTrace(folder)
    assert names[where] in str(caught.value)
    assert "move it there" in str(caught.value) or "copy it there" in str(caught.value)
    with pytest.raises(CheckpointError, match="which is not in the folder of the checkpoint"):
        MambaTrace(folder, dispatch=True)


@pytest.mark.parametrize("ending", INDEX)
@pytest.mark.parametrize("format", FORMATS)
def test_weights_and_indexes_that_are_links_out_of_the_folder(tiny_hf, tmp_path, format, ending) -> None:
    folder = tmp_path / "checkpoint"
    file = write(tiny_hf(), folder, format, ending)
    outside = file.rename(tmp_path / "outside")
    file.symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{file.name} leads to .*outside, which is not in the folder"):
        MambaTrace(folder)
    file.unlink()
    index(tmp_path, file.name, ending)
    (folder / INDEX[ending]).symlink_to(tmp_path / INDEX[ending])
    with pytest.raises(CheckpointError, match=r"index\.json leads to .*, which is not in the folder"):
        MambaTrace(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_links_and_folders_within_the_checkpoint_are_followed(tiny_hf, tokens, tmp_path, format) -> None:
    folder = tmp_path / "checkpoint"
    file = write(tiny_hf(), folder, format)
    want = logits(folder, tokens)
    (folder / "below").mkdir()
    file.rename(folder / "below" / "shard.safetensors")
    (folder / "link.safetensors").symlink_to(Path("below") / "shard.safetensors")
    for name in ("below/shard.safetensors", "link.safetensors"):
        index(folder, name)
        assert torch.equal(logits(folder, tokens), want)
    (tmp_path / "linked").symlink_to(folder)  # the checkpoint's folder may be a link itself
    assert torch.equal(logits(tmp_path / "linked", tokens), want)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_snapshot_in_the_hub_cache_consists_of_links(tiny_hf, tokens, tmp_path, format, shared) -> None:
    write(tiny_hf(), tmp_path / "checkpoint", format)
    want = logits(tmp_path / "checkpoint", tokens)
    repository = tmp_path / "hub" / "models--someone--mamba"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "checkpoint").iterdir())):
        blob = file.rename(blobs / f"{number:040}")
        if shared:  # as huggingface_hub shares files between repositories
            store = tmp_path / "hub" / "blobs" / "00"
            store.mkdir(parents=True, exist_ok=True)
            (store.parent / ".huggingface-shared-blobs").touch()
            blob.rename(store / blob.name)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert torch.equal(logits(snapshot, tokens), want)
    index(snapshot, "model-1-of-1.safetensors")
    (snapshot / "model.safetensors").rename(snapshot / "model-1-of-1.safetensors")
    assert torch.equal(logits(snapshot, tokens), want)
    (snapshot / "model-1-of-1.safetensors").unlink()
    (tmp_path / "outside").write_bytes(b"x")
    (snapshot / "model-1-of-1.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="which is not in the folder of the checkpoint"):
        MambaTrace(snapshot)
    index(snapshot, f"../../blobs/{0:040}")
    with pytest.raises(CheckpointError, match="which is not in the folder of the checkpoint"):
        MambaTrace(snapshot)


def test_the_index_of_a_hub_id_fetches_no_files_of_other_names(tiny_hf, tmp_path, monkeypatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    from mamba_trace.conversion import checkpoint_files

    module = tiny_hf()
    write(module, tmp_path, "huggingface").unlink()
    index(tmp_path, "../other/model.safetensors")
    asked = []

    def download(name: str, file: str, **options: object) -> str:
        asked.append(file)
        if not (tmp_path / file).exists():
            raise EntryNotFoundError("no")
        return str(tmp_path / file)

    monkeypatch.setattr(checkpoint_files, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match="which is not in the folder of the checkpoint"):
        MambaTrace("someone/mamba", tokenizer=MambaTrace.demo().tokenizer, dispatch=True)
    assert asked == ["config.json", "model.safetensors", "model.safetensors.index.json"]


BROKEN = {
    "no JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON: it is empty"),
    "a list": ("[]", "must hold a JSON object, found a list"),
    "no weight_map": (
        "{}",
        "has no weight_map, an object that names the file of each weight; found the keys nothing",
    ),
    "a list of files": ('{"weight_map": ["a"]}', "has no weight_map, .*found \\['a'\\]"),
    "no files": ('{"metadata": {}, "weight_map": {}}', "has no weight_map"),
    "numbers": ('{"weight_map": {"a": 5}}', "must name the file of a with a string, found 5"),
    "nothing": ('{"weight_map": {"a": null}}', "must name the file of a with a string, found None"),
    "absent": (
        '{"metadata": {}, "weight_map": {"a": "x"}}',
        "names 1 files, of which x is not there. Download",
    ),
    "a folder": ('{"metadata": {}, "weight_map": {"a": "."}}', "is a folder or a device; put the file"),
    "a zero byte": ('{"metadata": {}, "weight_map": {"a": "x\\u0000y"}}', "leads to no file"),
    "too long": ('{"metadata": {}, "weight_map": {"a": "%s"}}' % ("a" * 5000), "leads to no file"),
}


@pytest.mark.parametrize("ending", INDEX)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_indexes(tiny_hf, tmp_path, fault, format, ending) -> None:
    text, words = BROKEN[fault]
    write(tiny_hf(), tmp_path, format, ending).unlink()
    (tmp_path / INDEX[ending]).write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        MambaTrace(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_index_without_what_transformers_asks_for(tiny_hf, tokens, tmp_path) -> None:
    for format in FORMATS:
        file = write(tiny_hf(), tmp_path / format, format)
        want = logits(tmp_path / format, tokens)
        file.rename(tmp_path / format / "shard.safetensors")
        content = {"weight_map": {"lm_head.weight": "shard.safetensors"}}
        index_file = tmp_path / format / INDEX["safetensors"]
        index_file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r'has no metadata.*Add "metadata": \{\} to it'):
            MambaTrace(tmp_path / format)
        index_file.write_text(json.dumps(content | {"metadata": {}}))
        assert torch.equal(logits(tmp_path / format, tokens), want)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [0.0, {"__float__": "Infinity"}]}', {"a": [0.0, math.inf]}),
        ('{"a": {"b": {"__float__": "-Infinity"}}}', {"a": {"b": -math.inf}}),
        ('{"a": [0.0, Infinity]}', {"a": [0.0, math.inf]}),
        ('{"a": {"__float__": "x"}, "b": {"__float__": 1}}', {"a": {"__float__": "x"}, "b": {"__float__": 1}}),
        ('{"a": {"__float__": "Infinity", "b": 1}}', {"a": {"__float__": "Infinity", "b": 1}}),
        ('{"a": {"__float__": ["Infinity"]}}', {"a": {"__float__": ["Infinity"]}}),
    ],
)
def test_endless_numbers_as_transformers_writes_them(tmp_path: Path, text: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(text)
    assert read_json(tmp_path / "config.json") == value
