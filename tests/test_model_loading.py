"""Folders of every architecture: loaded bit for bit with their own class, and refused where they are mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PICKLE, SAFE, edit, fails, logits, refused
from family_models import MODEL_TYPES, assert_same_weights, each_architecture, family_config, family_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_state_dict
from mamba_trace.conversion.checkpoints import find_checkpoint, save_original

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
INFINITE = {"__float__": "Infinity"}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "use_bias": True}, {"use_conv_bias": False}], ids=str
)
@each_architecture
def test_a_folder_is_loaded_bit_for_bit(tmp_path: Path, model_type: str, changes: dict[str, Any], shards: bool) -> None:
    module = family_model(model_type, rescale_prenorm_residual=True, **changes)
    module.save_pretrained(tmp_path, max_shard_size="3KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is shards
    model = MambaTrace(tmp_path)
    assert type(model._module.config) is type(module.config)
    assert {parameter.device.type for parameter in model._module.parameters()} == {"meta"}
    model.dispatch()
    assert_same_weights(model._module, module)
    assert model.config.rescale_prenorm_residual is True


@each_architecture
def test_the_loaded_model_computes_what_was_saved(tmp_path: Path, tokens: Tensor, model_type: str) -> None:
    module = family_model(model_type)
    module.save_pretrained(tmp_path)
    expected = module(tokens).logits
    assert (logits(MambaTrace(tmp_path), tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_mamba2_in_the_original_format(tmp_path: Path, safe: bool, lm_head: bool, tied: bool) -> None:
    module = family_model("mamba2", tie_word_embeddings=tied, vocab_size=32, num_hidden_layers=2)
    save_original(module, tmp_path, safe_serialization=safe, lm_head=lm_head)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "d_model": 12,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 32,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 5, "d_conv": 3, "headdim": 4, "ngroups": 2, "chunk_size": 4},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": tied,
    }
    file = tmp_path / (SAFE if safe else PICKLE)
    weights = load_file(file) if safe else torch.load(file, weights_only=True)
    assert ("lm_head.weight" in weights) is (lm_head or not tied)
    theirs = {name for name in module.state_dict() if name != "backbone.embeddings.weight"}
    assert weights.keys() | {"lm_head.weight"} == theirs | {"backbone.embedding.weight"}
    assert find_checkpoint(tmp_path).format == "original"
    model = MambaTrace(tmp_path, dispatch=True)
    assert_same_weights(model._module, module)
    again = tmp_path / "huggingface"
    model._module.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["model_type"] == "mamba2"
    assert_same_weights(MambaTrace(again, dispatch=True)._module, module)
    save_original(MambaTrace(again, dispatch=True)._module, tmp_path / "back", lm_head=lm_head)
    back, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", tmp_path))
    assert back == before


def test_a_folder_as_the_authors_wrote_it(tmp_path: Path, tokens: Tensor) -> None:
    """Of a config.json without a size of the mixer: 128 states, heads of 64, one group, vocabulary padded to 16."""
    config = {"d_model": 64, "d_intermediate": 0, "n_layer": 1, "vocab_size": 31, "ssm_cfg": {"layer": "Mamba2"}}
    config |= {"attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    config |= {"fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    D, E, H, GN, K = 64, 128, 2, 128, 4
    shapes = {"in_proj.weight": (2 * E + 2 * GN + H, D), "conv1d.weight": (E + 2 * GN, 1, K), "A_log": (H,)}
    shapes |= {"conv1d.bias": (E + 2 * GN,), "dt_bias": (H,), "D": (H,), "norm.weight": (E,), "out_proj.weight": (D, E)}
    torch.manual_seed(0)
    weights = {f"backbone.layers.0.mixer.{name}": torch.randn(shape) / 8 for name, shape in shapes.items()}
    weights |= {"backbone.layers.0.norm.weight": torch.ones(D), "backbone.norm_f.weight": torch.ones(D)}
    weights["backbone.embedding.weight"] = weights["lm_head.weight"] = torch.randn(32, D)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / PICKLE)
    model = MambaTrace(tmp_path, dispatch=True)
    assert (model.cfg.n_heads, model.cfg.d_head, model.cfg.n_groups, model.cfg.d_state) == (2, 64, 1, 128)
    found = convert_state_dict(model._module.state_dict(), "original")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert logits(model, tokens).shape == (*tokens.shape, 32)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("limit", [[0.0, INFINITE], [0.0, float("inf")], [0.01, INFINITE]], ids=str)
def test_a_folder_as_of_codestral(tmp_path: Path, limit: list[Any], shards: bool) -> None:
    """Eight groups, a head of its own, and a second copy of the weights under other names, which is not read."""
    module = family_model("mamba2", hidden_size=32, num_heads=8, head_dim=8, n_groups=8, tie_word_embeddings=False)
    module.save_pretrained(tmp_path, max_shard_size="30KB" if shards else "1GB")
    copy = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    save_file(copy, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text('{"dim": 32, "n_layers": 3}')
    legacy = {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 64, "time_step_scale": 1.0}
    edit(tmp_path, time_step_limit=limit, time_step_init_scheme="random", **legacy)
    for model in (MambaTrace(tmp_path), MambaTrace(tmp_path, config=tmp_path / "config.json")):
        model.dispatch()
        assert_same_weights(model._module, module)
        assert list(model.layers[0].ssm._module.time_step_limit) == [limit[0], float("inf")]
        assert model.cfg.n_groups == 8
    (tmp_path / "consolidated.safetensors").write_bytes(b"broken")
    MambaTrace(tmp_path, dispatch=True)


@each_architecture
def test_fields_replaced_by_keyword(tmp_path: Path, model_type: str) -> None:
    module = family_model(model_type)
    module.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, num_hidden_layers=2, layer_norm_epsilon=0.5, dispatch=True)
    assert (len(model.layers), model.config.layer_norm_epsilon) == (2, 0.5)
    expected = {name for name in module.state_dict() if ".layers.2." not in name}
    assert model._module.state_dict().keys() == expected
    foreign = {"mamba": "n_groups", "falcon_mamba": "time_step_limit", "mamba2": "mixer_rms_eps"}[model_type]
    assert f"{foreign}=2 cannot be set: {foreign} is a field of " in refused(tmp_path, **{foreign: 2})


def test_fields_of_mamba2_replaced_by_keyword(tmp_path: Path) -> None:
    family_model("mamba2").save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, time_step_limit=(0.01, 0.5), chunk_size=7, dispatch=True)
    assert tuple(model.layers[0].ssm._module.time_step_limit) == (0.01, 0.5)
    assert "must equal num_heads * head_dim" in refused(tmp_path, num_heads=3)
    assert "declares num_heads 12 and the weights have 6" in refused(tmp_path, num_heads=12, head_dim=2)


# ---------------------------------------------------------------- one architecture named as another


@pytest.mark.parametrize("given", MODEL_TYPES)
@pytest.mark.parametrize(
    ("model_type", "save"),
    [*((each, lambda model, folder: model.save_pretrained(folder)) for each in MODEL_TYPES)]
    + [(each, save_original) for each in ("mamba", "mamba2")],
)
def test_a_config_of_another_architecture(tmp_path: Path, model_type: str, save: Any, given: str) -> None:
    module = family_model(model_type)
    save(module, tmp_path)
    if model_type == given:
        assert_same_weights(MambaTrace(tmp_path, config=module.config, dispatch=True)._module, module)
        return
    words = refused(tmp_path, config=family_config(given))
    names = {"mamba": "Mamba-1", "falcon_mamba": "Falcon-Mamba", "mamba2": "Mamba-2"}
    assert (
        f"the config.json of {tmp_path} is that of a {names[model_type]}, and config= that of a {names[given]}" in words
    )
    assert f"give a config of model_type '{model_type}'" in words


def test_one_architecture_named_as_another(tmp_path: Path) -> None:
    """Said before transformers looks at fields that the one has and the other has not."""
    family_model("mamba").save_pretrained(tmp_path)
    edit(tmp_path, model_type="mamba2")
    assert "says model_type 'mamba2', and architectures MambaForCausalLM, which is a Mamba-1" in refused(tmp_path)


@pytest.mark.parametrize(("one", "other"), [("falcon_mamba", "mamba"), ("mamba", "falcon_mamba")])
def test_a_broken_config_still_says_which_architecture(tmp_path: Path, one: str, other: str) -> None:
    """config= takes the place of the broken one, and nothing in the weights tells the two apart."""
    module = family_model(one)
    module.save_pretrained(tmp_path)
    edit(tmp_path, hidden_size="x")
    assert_same_weights(MambaTrace(tmp_path, config=module.config, dispatch=True)._module, module)
    assert "The weights of one, loaded as the other" in refused(tmp_path, config=family_config(other))
    edit(tmp_path, model_type=other, architectures=[type(module).__name__], hidden_size=12)
    assert f"says model_type '{other}', and architectures {type(module).__name__}" in refused(tmp_path)


def test_the_config_of_a_falcon_mamba_for_weights_in_the_original_format(tmp_path: Path) -> None:
    save_original(family_model("mamba"), tmp_path)
    (tmp_path / "config.json").unlink()
    words = refused(tmp_path, config=family_config("falcon_mamba"))
    assert "in state-spaces' original format, in which there is no Falcon-Mamba" in words


@pytest.mark.parametrize(("one", "other"), [("mamba", "mamba2"), ("mamba2", "mamba"), ("mamba2", "falcon_mamba")])
def test_a_model_type_that_the_weights_contradict(tmp_path: Path, one: str, other: str) -> None:
    family_model(one).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(family_config(other).to_json_string())
    words = refused(tmp_path)
    assert f"do not fit its config.json: it says model_type '{other}'" in words
    assert ("as a Mamba-2 has" if one == "mamba2" else "as a Mamba-1 or a Falcon-Mamba has") in words
    save_original_of = {"mamba": {}, "mamba2": {"layer": "Mamba2", "headdim": 4}}
    original = {"d_model": 12, "n_layer": 3, "vocab_size": 31, "pad_vocab_size_multiple": 1}
    if other in save_original_of:
        (tmp_path / "config.json").write_text(json.dumps(original | {"ssm_cfg": save_original_of[other]}))
        assert f"it says model_type '{other}'" in refused(tmp_path)


# ---------------------------------------------------------------- weights that do not fit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_size": 7}, "declares n_groups * state_size 14 and the weights have 10"),
        ({"n_groups": 3}, "declares n_groups * state_size 15 and the weights have 10"),
        ({"num_heads": 12, "head_dim": 2}, "declares num_heads 12 and the weights have 6"),
        ({"expand": 4, "head_dim": 8}, "declares expand * hidden_size 48 and the weights have 24"),
        ({"conv_kernel": 4}, "declares conv_kernel 4 and the weights have 3"),
        ({"vocab_size": 64}, "declares vocab_size 64 and the weights have 31"),
        ({"num_hidden_layers": 5}, "declares num_hidden_layers 5 and the weights have 3 layers"),
    ],
)
def test_sizes_of_mamba2_that_are_not_those_of_the_weights(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    family_model("mamba2").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    assert words in refused(tmp_path)


@each_architecture
def test_half_a_checkpoint(tmp_path: Path, model_type: str) -> None:
    family_model(model_type).save_pretrained(tmp_path)
    weights = load_file(tmp_path / SAFE)
    half = {name: tensor for name, tensor in weights.items() if ".layers.1.mixer." not in name}
    save_file(half, tmp_path / SAFE, metadata={"format": "pt"})
    missing = len(weights) - len(half)
    assert f"{missing} missing: backbone.layers.1.mixer.A_log; " in refused(tmp_path)
    save_file({n: t for n, t in weights.items() if ".layers.2." not in n}, tmp_path / SAFE, metadata={"format": "pt"})
    assert "declares num_hidden_layers 3 and the weights have 2 layers" in refused(tmp_path)
    (tmp_path / SAFE).write_bytes((tmp_path / SAFE).read_bytes()[:-100])
    assert "it may be incomplete" in refused(tmp_path)
    (tmp_path / SAFE).unlink()
    (tmp_path / "consolidated.safetensors").touch()
    assert "has no weights; it has config.json, consolidated.safetensors" in refused(tmp_path, dispatch=True)


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "state_size"])
@each_architecture
def test_models_that_no_machine_holds(tmp_path: Path, model_type: str, field: str) -> None:
    config = family_config(model_type).to_dict() | {field: 10**12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = refused(tmp_path)
    assert "At most 4096" in words or "At most 1000000000000 are built" in words
    words = fails(lambda: MambaTrace.from_config(config))
    assert "t most 4096" in words or "At most 1000000000000 are built" in words


@pytest.mark.parametrize("model_type", ["falcon_mamba"])
def test_what_cannot_be_saved_in_the_original_format(tmp_path: Path, model_type: str) -> None:
    words = fails(lambda: save_original(family_model(model_type), tmp_path / "original"))
    assert "Falcon-Mamba has no original format" in words
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, {"embeddings": "cpu", "layers": "cpu", "norm_f": "cpu"}])
@each_architecture
def test_device_maps(tmp_path: Path, model_type: str, place: Any) -> None:
    module = family_model(model_type)
    module.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, device_map=place, dispatch=True)
    assert_same_weights(model._module, module)
    wrong = {"": "cpu", "backbone.layers.0.mixer.dt_bias": "cpu", "backbone.layers.0.mixer.x_proj": "cpu"}
    assert "which is not a part of the model" in refused(tmp_path, device_map=wrong)
