"""Hybrids from folders, configurations and state dicts: bit for bit what Hugging Face loads, or a refusal in words."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import agree
from hybrid_models import HYBRIDS, PLAIN, SINGLE, make_hybrid
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, PreTrainedModel
from typer.testing import CliRunner

from mamba_trace import MambaTrace
from mamba_trace.cli import app
from mamba_trace.conversion import check_state_dict, convert_config
from mamba_trace.conversion.checkpoints import find_checkpoint, save_original
from mamba_trace.conversion.hybrid_weights import quiet
from mamba_trace.conversion.load_options import replaceable
from mamba_trace.conversion.loading import examine
from mamba_trace.errors import CheckpointError, SiteValueError, UnknownSiteError
from mamba_trace.mamba_lens import HookedMamba
from mamba_trace.modeling.architectures import BY_TYPE

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
KINDS = [kind for kind in PLAIN if kind in BY_TYPE]
each_kind = pytest.mark.parametrize("kind", KINDS)
TOKENS = torch.tensor([[5, 9, 14, 2, 30, 7, 7, 1, 22], [3, 1, 4, 1, 5, 9, 2, 6, 5]])
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    with quiet():
        make_hybrid(kind, **changes).save_pretrained(folder)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    changed = change(weights)
    save_file(changed if isinstance(changed, dict) else weights, folder / WEIGHTS, metadata={"format": "pt"})


def from_folder(folder: Path, **options: Any) -> MambaTrace:
    return MambaTrace(folder, experts_implementation="eager", **options)


def huggingface(folder: Path, **options: Any) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)


def logits(model: MambaTrace) -> Tensor:
    with torch.no_grad(), model.trace(TOKENS):
        value = (model.logits if model._layout.logits else model.lm_head).output.save()
    return value


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def refusal(action: Callable[[], Any], kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# -- the four ways in ----------------------------------------------------------------------------------------


@each_kind
def test_every_way_in_gives_the_logits_of_hugging_faces_model(kind: str, tmp_path: Path) -> None:
    theirs = huggingface(saved(kind, tmp_path))
    state_dict = {name: value.clone() for name, value in theirs.state_dict().items()}
    config = convert_config(theirs.config, "huggingface")
    expected = logits(MambaTrace(theirs))
    agree(expected, make_hybrid(kind)(TOKENS).logits, 1e-5)
    folder = from_folder(tmp_path)
    assert next(folder._module.parameters()).is_meta
    assert torch.equal(logits(folder), expected)
    same_state(folder._module.state_dict(), state_dict)
    for given in (config, config.to_dict()):
        other = MambaTrace.from_state_dict(given, state_dict)
        other._module.set_experts_implementation("eager")
        assert torch.equal(logits(other), expected)
    with torch.no_grad():
        next(other._module.parameters()).zero_()
    same_state(folder._module.state_dict(), state_dict)  # the given tensors are no part of the other model


@each_kind
def test_saved_and_loaded_again_bit_for_bit_under_hugging_faces_class(kind: str, tmp_path: Path) -> None:
    model = from_folder(saved(kind, tmp_path / "first"), dispatch=True)
    with quiet():
        model._module.save_pretrained(tmp_path / "second")
        MambaTrace(make_hybrid(kind))._module.save_pretrained(tmp_path / "wrapped")
    written = load_file(tmp_path / "first" / WEIGHTS)
    for folder in (tmp_path / "second", tmp_path / "wrapped"):
        assert json.loads((folder / CONFIG).read_text())["architectures"] == [BY_TYPE[kind].model_class.__name__]
        same_state(load_file(folder / WEIGHTS), written)
        same_state(huggingface(folder).state_dict(), model._module.state_dict())
    assert torch.equal(logits(from_folder(tmp_path / "second")), logits(model))


def test_the_class_of_a_model_is_pickled_and_named_as_hugging_faces() -> None:
    for architecture in BY_TYPE.values():
        for theirs, ours in architecture.hookable.items():
            assert pickle.loads(pickle.dumps(ours)) is ours
            if issubclass(theirs, PreTrainedModel):
                assert ours.__name__ == theirs.__name__
                assert not ours.is_custom_code()


@each_kind
def test_half_precision_keeps_what_hugging_face_keeps(kind: str, tmp_path: Path) -> None:
    theirs = huggingface(saved(kind, tmp_path), dtype=torch.bfloat16)
    model = from_folder(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(MambaTrace(theirs)))
    same_state(model._module.state_dict(), theirs.state_dict())
    scratch = MambaTrace.from_config(theirs.config, dtype=torch.bfloat16)._module
    for name, value in scratch.named_parameters():
        single = name.endswith(SINGLE.get(kind, ()) or "nothing")
        assert value.dtype == (torch.float32 if single else torch.bfloat16), name


def test_buffers_that_no_checkpoint_has_are_made_anew(tmp_path: Path) -> None:
    """Falcon-H1's factors, and RoPE's frequencies."""
    for kind in ("falcon_h1", "bamba"):
        module = make_hybrid(kind)
        expected = dict(module.named_buffers())
        assert any(name.endswith("mup_vector" if kind == "falcon_h1" else "inv_freq") for name in expected)
        saved(kind, tmp_path / kind)
        for model in (
            MambaTrace.from_config(module.config),
            MambaTrace.from_config(module.config, dtype=torch.float64),
            MambaTrace.from_state_dict(module.config, module.state_dict()),
            MambaTrace(tmp_path / kind, dispatch=True),
        ):
            found = dict(model._module.named_buffers())
            assert all(torch.equal(found[name].double(), value.double()) for name, value in expected.items())


# -- from a configuration ------------------------------------------------------------------------------------


@each_kind
def test_new_weights_are_those_of_transformers_from_a_seed_of_their_own(kind: str) -> None:
    config = AutoConfig.for_model(**HYBRIDS[kind])
    before = torch.random.get_rng_state()
    one, same, other = (MambaTrace.from_config(config, seed=seed)._module.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    same_state(one, same)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    same_state(one, expected)


def test_the_limits_of_delta_are_those_of_the_configuration() -> None:
    """Not Hugging Face's for Nemotron-H, which are (time_step_min, inf)."""
    config = AutoConfig.for_model(**HYBRIDS["nemotron_h, limits"])
    model = MambaTrace.from_config(config)
    mixers = [model.layers[layer].ssm._module for layer in model.ssm_layers]
    assert {mixer.time_step_limit for mixer in mixers} == {(0.0625, 0.25)}
    endless = MambaTrace.from_config(config.to_dict() | {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert endless.layers[0].ssm._module.time_step_limit == (0.0, math.inf)


def test_a_configuration_of_a_hybrid_keeps_every_field() -> None:
    """Where a default follows from another field, a value that is the default's must not be left out."""
    for kind in (kind for kind in HYBRIDS if kind.partition(",")[0] in BY_TYPE):
        config = AutoConfig.for_model(**HYBRIDS[kind])
        assert convert_config(config, "huggingface").to_dict() == config.to_dict()
        assert convert_config(config.to_dict(), "huggingface").to_dict() == config.to_dict()
    config = AutoConfig.for_model("jamba", hidden_size=8192, mamba_dt_rank=256)
    assert convert_config(config.to_dict(), "huggingface").mamba_dt_rank == 256


def test_configurations_that_cannot_be_built() -> None:
    good = HYBRIDS["jamba"]
    assert "did you mean" in refusal(lambda: MambaTrace.from_config(good | {"mamba_d_stat": 4}))
    assert "it is called hidden_size, which is 24 here" in refusal(
        lambda: MambaTrace.from_config(good | {"d_model": 8})
    )
    assert "rejects this configuration" in refusal(lambda: MambaTrace.from_config(good | {"hidden_size": "wide"}))
    assert "hidden_size must be a whole" in refusal(lambda: MambaTrace.from_config(good | {"hidden_size": 0}))
    assert "at most 4096 are built" in refusal(lambda: MambaTrace.from_config(good | {"num_hidden_layers": 10**6}))
    assert "At most 1000000000000 are built" in refusal(
        lambda: MambaTrace.from_config(good | {"num_experts": 10**10, "intermediate_size": 4096})
    )
    assert "GiB of memory" in refusal(lambda: MambaTrace.from_config(good | {"vocab_size": 2 * 10**10}))
    assert "cannot build the JambaConfig" in refusal(lambda: MambaTrace.from_config(good | {"hidden_size": 2**62}))
    assert "Jamba has no original format" in refusal(lambda: convert_config(good, "original"))
    assert "Jamba has no mamba_lens format" in refusal(lambda: convert_config(good, "mamba_lens"))
    assert "Bamba has no original format" in refusal(lambda: save_original(make_hybrid("bamba"), "nowhere"))


# -- state dicts ---------------------------------------------------------------------------------------------


def test_state_dicts_that_do_not_fit() -> None:
    module = make_hybrid("granitemoehybrid, groups")
    config, state_dict = module.config, module.state_dict()
    load = MambaTrace.from_state_dict
    del state_dict["model.layers.1.self_attn.q_proj.weight"]
    assert "1 missing: model.layers.1.self_attn.q_proj.weight" in refusal(lambda: load(config, state_dict))
    other = module.state_dict() | {"surplus": torch.zeros(2), "model.norm.weight": torch.zeros(3)}
    words = refusal(lambda: load(config, other))
    assert "1 unexpected: surplus" in words
    assert "model.norm.weight [3], expected [24]" in words
    untied = module.state_dict() | {"lm_head.weight": torch.zeros(31, 24)}
    assert "ties lm_head.weight to the embedding" in refusal(lambda: load(config, untied))
    without = {name: value for name, value in module.state_dict().items() if name != "lm_head.weight"}
    check_state_dict(without, config)
    assert torch.equal(logits(load(config, without)), logits(MambaTrace(module)))
    assert "unexpected" in refusal(lambda: load(make_hybrid("bamba").config, module.state_dict()))
    assert "maps names to tensors" in refusal(lambda: load(config, {"lm_head.weight": 3}))
    assert "no format" not in refusal(lambda: load(MambaConfig(), module.state_dict()))


# -- checkpoints as they are on the hub ----------------------------------------------------------------------


def test_the_names_of_the_hub_and_those_of_transformers(tmp_path: Path) -> None:
    """save_pretrained writes the names of the hub's files; a state dict has those of the modules."""
    on_hub = {
        "nemotron_h": ("backbone.layers.1.mixer.experts.4.up_proj.weight", "backbone.norm_f.weight"),
        "jamba": ("model.layers.1.feed_forward.experts.4.gate_proj.weight", "model.final_layernorm.weight"),
        "granitemoehybrid": ("model.layers.1.block_sparse_moe.input_linear.weight", "model.norm.weight"),
    }
    for kind, names in on_hub.items():
        expected = logits(from_folder(saved(kind, tmp_path / kind)))
        assert set(names) <= load_file(tmp_path / kind / WEIGHTS).keys()
        state_dict = load_file(tmp_path / kind / WEIGHTS)
        by_hub = MambaTrace.from_state_dict(make_hybrid(kind).config, state_dict)
        assert torch.equal(logits(by_hub), expected)
        edit_weights(tmp_path / kind, lambda _, kind=kind: make_hybrid(kind).state_dict())
        assert not set(names[:1]) & load_file(tmp_path / kind / WEIGHTS).keys()
        assert torch.equal(logits(from_folder(tmp_path / kind)), expected)


def test_nemotrons_on_the_hub(tmp_path: Path) -> None:
    """A pattern in place of the layers' kinds, code beside it, and the heads that predict more than one token."""
    expected = logits(from_folder(saved("nemotron_h", tmp_path)))

    def as_on_the_hub(config: dict[str, Any]) -> None:
        del config["layers_block_type"]
        config["hybrid_override_pattern"], config["num_hidden_layers"] = "ME*-M", 5
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}

    edit_config(tmp_path, as_on_the_hub)
    edit_weights(tmp_path, lambda weights: weights | {"mtp.layers.0.norm.weight": torch.ones(24)})
    model = from_folder(tmp_path)
    assert model.layer_kinds == ["SSM", "MoE", "attention", "MLP", "SSM"]
    assert torch.equal(logits(model), expected)


def test_older_configurations(tmp_path: Path) -> None:
    for kind, field in (("nemotron_h", "layers_block_type"), ("granitemoehybrid", "layer_types")):
        folder = tmp_path / kind
        expected = logits(from_folder(saved(kind, folder)))
        older = {"linear_attention": "mamba", "full_attention": "attention"}
        edit_config(folder, lambda c, field=field, older=older: c.update({field: [older.get(k, k) for k in c[field]]}))
        assert "mamba" in (folder / CONFIG).read_text()
        assert torch.equal(logits(from_folder(folder)), expected)
        text = (folder / CONFIG).read_text()
        assert '{"__float__": "Infinity"}' in text
        (folder / CONFIG).write_text(text.replace('{"__float__": "Infinity"}', "Infinity"))
        assert torch.equal(logits(from_folder(folder)), expected)


@each_kind
def test_shards_and_a_missing_one(kind: str, tmp_path: Path) -> None:
    expected = logits(from_folder(saved(kind, tmp_path / "whole")))
    with quiet():
        make_hybrid(kind).save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    shards = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(from_folder(tmp_path / "parts")), expected)
    shards[1].unlink()
    assert f"{shards[1].name} is not there" in refusal(lambda: MambaTrace(tmp_path / "parts"))


# -- fields that are replaced --------------------------------------------------------------------------------


@each_kind
def test_the_first_layers_alone(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **({"num_hidden_layers": 4} if kind == "falcon_h1" else {}))
    count = 1 if kind == "zamba" else 3  # transformers builds no Zamba with a single hybrid layer
    model = from_folder(tmp_path, num_hidden_layers=count)
    assert len(model.layers) == count
    with quiet():
        config = AutoConfig.from_pretrained(tmp_path)
        for field in ("layer_types", "layers_block_type"):
            if field in config.__dict__:
                setattr(config, field, getattr(config, field)[:count])
        config.num_hidden_layers = count
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, experts_implementation="eager")
    assert torch.equal(logits(model), logits(MambaTrace(theirs)))


def test_fields_by_keyword(tmp_path: Path) -> None:
    saved("granitemoehybrid", tmp_path)
    model = from_folder(tmp_path, logits_scaling=3.0)
    agree(logits(model) * 2, logits(from_folder(tmp_path)), 1e-6)
    assert "lists what stands in each of its 4 layers" in refusal(lambda: MambaTrace(tmp_path, num_hidden_layers=9))
    assert "of the wrong shape" in refusal(lambda: MambaTrace(tmp_path, shared_intermediate_size=20))
    assert "is a field of FalconH1Config" in refusal(lambda: MambaTrace(tmp_path, mamba_d_ssm=20))
    assert "layers_block_type" in replaceable(model.config)
    assert model.config.intermediate_size == 40  # experts' width, not that of the SSM


# -- placement -----------------------------------------------------------------------------------------------

#: Names of this package for parts, with Hugging Face's.
PLACED = {
    "nemotron_h": {
        "layers.0.ssm": "layers.0.mixer",
        "layers.2.attn": "layers.2.mixer",
        "layers.1.moe": "layers.1.mixer",
    },
    "falcon_h1": {"layers.0.ssm": "layers.0.mamba", "layers.1.attn": "layers.1.self_attn"},
    "granitemoehybrid": {"layers.0.moe": "layers.0.block_sparse_moe", "layers.0.mlp": "layers.0.shared_mlp"},
    "jamba": {"layers.1.moe.experts": "layers.1.feed_forward.experts", "layers.0.mlp": "layers.0.feed_forward"},
    "bamba": {"layers.2": "layers.2", "layers.0.norm_2": "layers.0.pre_ff_layernorm"},
    "zamba2": {"layers.0.ssm": "layers.0.mamba", "layers.2.norm": "layers.2.input_layernorm"},
    "zamba": {"layers.0.ssm": "layers.0.mamba", "layers.2.norm": "layers.2.input_layernorm"},
}


@each_kind
def test_parts_are_placed_under_either_name(kind: str, tmp_path: Path) -> None:
    expected = logits(from_folder(saved(kind, tmp_path)))
    ours = {"": "cpu", **dict.fromkeys(PLACED[kind], "disk")}
    theirs = {"": "cpu", **{f"model.{name}": "disk" for name in PLACED[kind].values()}}
    on_disk = []
    for device_map in (ours, theirs):
        model = from_folder(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "off"), dispatch=True)
        agree(logits(model), expected, 1e-5)
        on_disk.append({name for name, value in model._module.named_parameters() if value.is_meta})
    assert on_disk[0] == on_disk[1] != set()
    for device_map in (
        {"": "disk"},
        {"embeddings": "cpu", "layers": "disk", "norm_f": "cpu", "lm_head": "cpu"},
        "auto",
    ):
        model = from_folder(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "off"))
        agree(logits(model), expected, 1e-5)


def test_names_that_a_device_map_cannot_have(tmp_path: Path) -> None:
    saved("nemotron_h", tmp_path)
    for name in ("layers.0.attn", "layers.2.ssm", "layers.0.mlp", "layers.3.moe", "layers.9", "backbone.layers.0"):
        words = refusal(lambda name=name: MambaTrace(tmp_path, device_map={"": "cpu", name: "disk"}))
        assert f"{name!r}, which is not a part of the model. It has model.embeddings, model.layers.0" in words
    assert "no place for" in refusal(lambda: MambaTrace(tmp_path, device_map={"layers": "cpu"}))
    saved("jamba, dense", tmp_path / "tied")
    apart = {"": "cpu", "embeddings": "disk", "lm_head": "cpu"}
    words = refusal(lambda: MambaTrace(tmp_path / "tied", device_map=apart))
    assert "model.embed_tokens on disk and lm_head on cpu, which are one weight" in words


# -- what is refused -----------------------------------------------------------------------------------------


def test_remote_code_is_refused(tmp_path: Path) -> None:
    saved("jamba", tmp_path)
    words = refusal(lambda: MambaTrace(tmp_path, trust_remote_code=True))
    assert "load without trust_remote_code" in words
    MambaTrace(tmp_path, trust_remote_code=False)
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('this code was run')")
    mine = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_config(tmp_path, lambda config: config.update(auto_map=mine))
    words = refusal(lambda: MambaTrace(tmp_path))
    assert "modeling_mine.MineForCausalLM', code of the checkpoint's own" in words
    assert "without trust_remote_code" in words
    edit_config(tmp_path, lambda config: config.update(model_type="mine"))
    assert "its auto_map names code of its own" in refusal(lambda: MambaTrace(tmp_path))
    remote = type("JambaForCausalLM", (torch.nn.Module,), {"__module__": "transformers_modules.mine"})
    assert "load it without trust_remote_code" in refusal(lambda: MambaTrace(remote()))


def test_a_configuration_of_another_architecture(tmp_path: Path) -> None:
    saved("bamba", tmp_path / "bamba")
    jamba = {**HYBRIDS["jamba"], "num_hidden_layers": 4}
    (tmp_path / "bamba" / CONFIG).write_text(json.dumps(jamba))
    words = refusal(lambda: MambaTrace(tmp_path / "bamba"))
    assert re.search(
        r"the weights of .* do not fit its config.json\. \d+ missing: .*x_proj.*unexpected: .*dt_bias", words
    )
    saved("falcon_h1", tmp_path / "falcon")
    words = refusal(lambda: MambaTrace(tmp_path / "falcon", config=jamba))
    assert "is that of a Falcon-H1, and config= that of a Jamba" in words
    edit_config(tmp_path / "falcon", lambda config: config.update(architectures=["BambaForCausalLM"]))
    assert "BambaForCausalLM, which is a Bamba" in refusal(lambda: MambaTrace(tmp_path / "falcon"))
    (tmp_path / "falcon" / CONFIG).write_text(MambaConfig(vocab_size=31, hidden_size=24).to_json_string())
    assert "do not hold the weights of a Mamba" in refusal(lambda: MambaTrace(tmp_path / "falcon"))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("bamba", lambda w: w.pop("model.layers.0.mamba.D"), "1 missing: model.layers.0.mamba.D"),
        ("bamba", lambda w: w.update(surplus=torch.zeros(1)), "1 unexpected: surplus"),
        ("bamba", lambda w: w.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        ("bamba", lambda w: {k: v for k, v in w.items() if ".3." not in k}, "declares 4 layers and the weights have 3"),
        ("jamba", lambda w: {k: v for k, v in w.items() if ".experts.4." not in k}, "of the wrong shape"),
        (
            "jamba",
            lambda w: w.update(
                {n.replace(".2.", ".7."): w.pop(n) for n in list(w) if ".1.feed_forward.experts.2." in n}
            ),
            "missing: model.layers.1.feed_forward.experts.2.down_proj.weight",
        ),
        ("jamba", lambda w: w.pop("model.layers.1.feed_forward.experts.3.up_proj.weight"), "cannot put these weights"),
        ("falcon_h1", lambda w: {"a": torch.zeros(1)}, "declares 3 layers and the weights have 0"),
    ],
)
def test_weights_that_are_not_all_there(kind: str, change: Any, words: str, tmp_path: Path) -> None:
    edit_weights(saved(kind, tmp_path), change)
    said = refusal(lambda: MambaTrace(tmp_path))
    assert words in said
    assert f"the weights of {tmp_path} do not fit its config.json" in said


def test_quantised_weights_are_not_compared(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(saved("bamba", tmp_path))
    edit_weights(tmp_path, lambda weights: weights.update({"model.layers.0.mamba.D": torch.zeros(1, dtype=torch.int8)}))
    assert "of the wrong shape" in refusal(lambda: examine(checkpoint, {}))
    checkpoint.config.quantization_config = {"quant_method": "fp8"}
    examine(checkpoint, {})
    checkpoint = replace(checkpoint, config=AutoConfig.for_model(**HYBRIDS["bamba"]))
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert "model.safetensors" in refusal(lambda: examine(checkpoint, {}))


# -- MambaLens's names ---------------------------------------------------------------------------------------


def test_sizes_under_the_letters_of_the_sites() -> None:
    cfg = MambaTrace(make_hybrid("nemotron_h")).cfg
    sizes = {"D": 24, "V": 31, "E": 48, "N": 5, "H": 12, "P": 4, "G": 1, "Q": 4, "U": 2, "W": 8, "X": 5}
    assert {letter: getattr(cfg, letter) for letter in sizes} == sizes
    assert (cfg.d_model, cfg.n_layers, cfg.d_inner, cfg.d_state, cfg.d_conv, cfg.eps) == (24, 5, 48, 5, 3, 1e-3)
    assert (cfg.n_key_value_heads, cfg.n_experts, cfg.n_ctx) == (2, 5, 4096)
    jamba = MambaTrace(make_hybrid("jamba")).cfg
    assert (jamba.E, jamba.dt_rank, jamba.D_delta, "H" in jamba) == (48, 4, 4, False)
    attention = MambaTrace(make_hybrid("granitemoehybrid, no SSM")).cfg
    assert (attention.n_layers, attention.Q, "E" in attention) == (2, 4, False)
    for kind in KINDS:
        view = MambaTrace(make_hybrid(kind)).cfg
        assert list(view) == list(view.to_dict())
        assert "LensConfig" in repr(view)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n_heads", "heads of the SSM are model.cfg.H, and the query heads of attention model.cfg.Q"),
        ("d_head", "a head of the SSM has model.cfg.P channels"),
        ("d_mlp", "widths of their own"),
        ("initializer_cfg", "transformers initialises a hybrid"),
        ("bias", "a field of its own"),
        ("dt_rank", "no layer of it has such a part"),
        ("rms_norm_eps", "it is model.config.rms_norm_eps"),
        ("d_modl", "did you mean d_model"),
        ("inner_eps", "which only a Falcon-Mamba has: this is a Bamba"),
    ],
)
def test_names_of_cfg_that_could_mean_two_things(name: str, words: str) -> None:
    assert words in refusal(lambda: getattr(MambaTrace(make_hybrid("bamba")).cfg, name), AttributeError)
    pure = MambaTrace.demo().cfg
    assert "which only a hybrid has" in refusal(lambda: pure.Q, AttributeError)


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind != "zamba"])
def test_weights_of_the_ssm_are_views(kind: str) -> None:
    model = MambaTrace(make_hybrid(kind))
    layer, sizes = model.ssm_layers[0], model.cfg
    block, mixer = model.blocks[layer], model.layers[layer].ssm._module
    selective = kind == "jamba"
    assert block.W_B.weight.shape == ((sizes.N, sizes.E) if selective else (sizes.G * sizes.N, sizes.D))
    rows = mixer.x_proj.weight[sizes.dt_rank :] if selective else mixer.in_proj.weight[2 * sizes.E :]
    assert torch.equal(block.W_B.weight, rows[: len(block.W_B.weight)])
    gate = mixer.in_proj.weight[sizes.E :] if selective else mixer.in_proj.weight
    assert torch.equal(block.skip_proj.weight, gate[: sizes.E])
    x = torch.randn(2, sizes.D)
    agree(block.skip_proj(x), x @ gate[: sizes.E].T, 1e-5)
    before = logits(model)
    block.W_B = torch.zeros_like(block.W_B.weight)
    assert not rows[: len(block.W_B.weight)].any()
    assert not torch.equal(logits(model), before)
    assert torch.equal(block.norm.weight, block._owner.envoy("norm.weight")._module.weight)
    assert "shape" in refusal(lambda: setattr(block, "A_log", torch.zeros(2)), SiteValueError)
    assert torch.equal(model.W_E, model._module.get_input_embeddings().weight)
    assert torch.equal(model.W_U.T, model._module.lm_head.weight)
    assert model.norm.weight.shape == (sizes.D,)


def test_layers_without_an_ssm_have_their_norm() -> None:
    model = MambaTrace(make_hybrid("nemotron_h"))
    assert model.blocks[2].norm.weight.shape == (24,)
    words = refusal(lambda: model.blocks[2].W_B, UnknownSiteError)
    assert "what stands in this layer is attention. model.ssm_layers has the layers with an SSM" in words
    none = MambaTrace(make_hybrid("granitemoehybrid, no SSM"))
    assert "norm.weight: [24]" in repr(none.blocks[0])


def test_mamba_lens_has_no_hybrids(tmp_path: Path) -> None:
    words = refusal(lambda: HookedMamba(make_hybrid("jamba")))
    assert "this is a Jamba, and a HookedMamba" in words
    saved("jamba", tmp_path)
    assert "this is a Jamba" in refusal(lambda: HookedMamba.from_pretrained(tmp_path))
    assert "this is a Jamba" in refusal(lambda: HookedMamba(HYBRIDS["jamba"]))


# -- the command line ----------------------------------------------------------------------------------------


def test_sites_of_a_hybrid_from_a_shell(tmp_path: Path) -> None:
    saved("nemotron_h", tmp_path)
    result = CliRunner().invoke(app, ["sites", "--model", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: re.split(r"  +", line) for line in result.stdout.splitlines() if line.strip()}
    assert lines["path"][:3] == ["path", "Nemotron-H", "layers"]
    assert lines["layers[l].ssm.y"][1:3] == ["B L E", "0, 4"]
    assert lines["layers[l].attn.pattern"][1:3] == ["B Q L S", "2"]
    assert lines["layers[l].moe.router"][2] == "1"
    assert lines["layers[l].resid_post"][2] == "0 to 4"
    assert lines["embeddings"][2] == "hook_embed"
    assert "layers[l].resid_mid" not in lines
    result = CliRunner().invoke(app, ["sites", "--model", str(tmp_path), "--json"])
    rows = {row["path"]: row for row in json.loads(result.stdout)}
    assert rows["layers[l].attn.q"]["layers"] == [2]
    assert "layers" not in rows["embeddings"]
