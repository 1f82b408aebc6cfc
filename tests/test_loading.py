"""`MambaTrace(...)`: every way to get a model gives the same logits, or says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SAFE, logits, refused
from conftest import agree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
)

from mamba_trace import MambaTrace
from mamba_trace.conversion import FORMATS, convert_config, convert_state_dict
from mamba_trace.conversion.checkpoints import save_original
from mamba_trace.errors import CheckpointError, PromptError
from mamba_trace.model import DEMO

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")
PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"


@pytest.fixture
def plain(tiny_hf):
    return tiny_hf()


@pytest.fixture
def expected(plain, tokens):
    with torch.no_grad():
        return plain(tokens).logits


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_hugging_face_folder(plain, tokens, expected, tmp_path, safe):
    if safe:
        plain.save_pretrained(tmp_path)
    else:
        plain.config.save_pretrained(tmp_path)
        torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    agree(logits(MambaTrace(tmp_path), tokens), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("lm_head", [True, False])
def test_an_original_folder_gives_equal_logits(plain, tokens, tmp_path, safe, lm_head):
    want = logits(MambaTrace(plain), tokens)
    save_original(plain, tmp_path, safe_serialization=safe, lm_head=lm_head)
    model = MambaTrace(str(tmp_path))
    assert torch.equal(logits(model, tokens), want)
    assert {name for name, _ in model._module.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_weights_are_loaded_at_the_first_run(plain, tokens, tmp_path):
    plain.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path)
    assert not model.dispatched
    assert next(model._module.parameters()).is_meta
    assert isinstance(repr(model), str)
    logits(model, tokens)
    assert model.dispatched
    assert MambaTrace(tmp_path, dispatch=True).dispatched


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "bfloat16"])
def test_dtype(plain, tokens, tmp_path, dtype, original):
    save_original(plain, tmp_path) if original else plain.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, dtype=dtype)
    out = logits(model, tokens)
    assert out.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert model.device.type == "cpu"


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(plain, tokens, expected, tmp_path, device_map, original):
    save_original(plain, tmp_path) if original else plain.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, device_map=device_map)
    agree(logits(model, tokens), expected)


def test_layers_offloaded_to_disk(plain, tokens, expected, tmp_path):
    plain.save_pretrained(tmp_path / "model")
    device_map = {"backbone.embeddings": "cpu", "lm_head": "cpu", "backbone.norm_f": "cpu"}
    device_map |= {f"backbone.layers.{i}": "disk" for i in range(1, len(plain.backbone.layers))}
    device_map["backbone.layers.0"] = "cpu"
    model = MambaTrace(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    agree(logits(model, tokens), expected)
    with torch.no_grad(), model.trace(tokens):
        model.layers[1].ssm.h[2].output[:] = 0
        y = model.layers[1].ssm.y.output.save()
        out = model.lm_head.output.save()
    assert y.shape[:2] == tokens.shape
    assert not torch.allclose(out, expected)


def test_arguments_reach_from_pretrained(plain, tmp_path, monkeypatch):
    plain.save_pretrained(tmp_path)
    seen = {}

    def from_pretrained(name, **kwargs):
        seen.update(kwargs, name=name)
        return plain, {}

    monkeypatch.setattr(MambaForCausalLM, "from_pretrained", from_pretrained)
    quantization = object()
    MambaTrace(tmp_path, revision="v2", quantization_config=quantization, max_memory={0: "1GB"}, dispatch=True)
    assert seen["revision"] == "v2"
    assert seen["quantization_config"] is quantization
    assert seen["max_memory"] == {0: "1GB"}


def test_a_rescaled_config_does_not_rescale_loaded_weights(plain, tokens, expected, tmp_path):
    plain.config.rescale_prenorm_residual = True
    plain.save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, dispatch=True)
    assert torch.equal(model.layers[0].ssm.out_proj.weight, plain.backbone.layers[0].mixer.out_proj.weight)
    assert model.config.rescale_prenorm_residual
    agree(logits(model, tokens), expected)


def test_a_loaded_module_is_made_hookable_in_place(plain, tokens):
    parameters = dict(plain.named_parameters())
    model = MambaTrace(plain)
    assert model._module is plain
    assert all(parameter is parameters[name] for name, parameter in model._module.named_parameters())
    with model.trace(tokens):
        saved = model.layers[0].ssm.h[0].output.save()
    assert saved.shape[0] == len(tokens)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("config", FORMATS)
def test_from_state_dict_in_every_format(plain, tokens, config, weights):
    want = logits(MambaTrace(plain), tokens)
    converted = convert_state_dict(plain.state_dict(), weights)
    model = MambaTrace.from_state_dict(convert_config(plain.config, config), converted)
    assert torch.equal(logits(model, tokens), want)


def test_from_state_dict_says_what_is_missing(plain):
    weights = convert_state_dict(plain.state_dict(), "original")
    del weights["backbone.layers.0.mixer.A_log"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.A_log"):
        MambaTrace.from_state_dict(plain.config, weights)


def test_from_config_is_seeded_and_leaves_the_global_generator_alone(tiny_config, tokens):
    state = torch.get_rng_state()
    first, again, other = (MambaTrace.from_config(tiny_config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(first, tokens), logits(again, tokens))
    assert not torch.equal(logits(first, tokens), logits(other, tokens))


def test_from_config_takes_the_seeds_configuration():
    config = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 30,
        "ssm_cfg": {"d_state": 4, "d_conv": 2, "expand": 2},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    model = MambaTrace.from_config(config, dtype=torch.bfloat16)
    assert model.config.vocab_size == 32
    assert model.layers[0].ssm.A_log.dtype == torch.bfloat16
    assert logits(model, torch.arange(6)[None]).shape == (1, 6, 32)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, and no ``weight`` of its own to read."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapted_inner_layers_are_called(tiny_hf, tokens):
    adapted, merged = tiny_hf(), tiny_hf()
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        mixer = adapted.backbone.layers[1].mixer
        adapter = Adapter(getattr(mixer, name))
        setattr(mixer, name, adapter)
        weight = getattr(merged.backbone.layers[1].mixer, name).weight
        weight.data += (adapter.up @ adapter.down).detach()
    with torch.no_grad():
        agree(logits(MambaTrace(adapted), tokens), merged(tokens).logits)


def test_the_demo_model_answers():
    model = MambaTrace.demo()
    with model.trace(PROMPT):
        answer = model.lm_head.output[0, -1].argmax().save()
    assert model.to_string(answer) == " Emma"


def test_a_tokenizer_is_found_with_the_checkpoint_or_given(plain, tmp_path):
    assert MambaTrace(DEMO).tokenizer.decode([0]) == MambaTrace.demo().tokenizer.decode([0])
    given = AutoTokenizer.from_pretrained(DEMO, padding_side="right")
    given.pad_token = None
    ours = MambaTrace(plain, tokenizer=given).tokenizer
    assert ours.get_vocab() == given.get_vocab()
    assert (ours.pad_token, ours.padding_side) == (given.eos_token, "left")
    assert (given.pad_token, given.padding_side) == (
        None,
        "right",
    )  # a copy: nothing is done to the user's own


def test_without_a_tokenizer_tokens_work_and_strings_say_why_not(plain, tokens):
    model = MambaTrace(plain)
    logits(model, tokens)
    with pytest.raises(PromptError, match="no tokenizer"), model.trace("Hello"):
        model.lm_head.output.save()
    with pytest.raises(PromptError, match="tokenizer="):
        model.to_tokens("Hello")
    logits(model, tokens)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        MambaTrace(tmp_path)


def test_an_architecture_that_is_no_mamba(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        MambaTrace(tmp_path)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20))
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        MambaTrace(gpt2)
    with pytest.raises(CheckpointError, match="Linear"):
        MambaTrace(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weights: weights.pop("backbone.layers.1.mixer.x_proj.weight"),
            "1 missing: backbone.layers.1.mixer.x_proj",
        ),
        (lambda weights: weights.update({"surplus.weight": torch.zeros(2)}), "1 unexpected: surplus.weight"),
        (
            lambda weights: weights.update({"backbone.norm_f.weight": torch.zeros(2)}),
            r"1 of the wrong shape: backbone.norm_f.weight \[2\], expected \[12\]",
        ),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_hugging_face_weights_that_do_not_fit(plain, tmp_path, change, words):
    weights = plain.state_dict()
    change(weights)
    plain.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        MambaTrace(tmp_path, dispatch=True)


@pytest.mark.parametrize("original", [True, False])
def test_torch_dtype_is_understood(plain, tmp_path, original):
    save_original(plain, tmp_path) if original else plain.save_pretrained(tmp_path)
    assert MambaTrace(tmp_path, torch_dtype=torch.bfloat16, dispatch=True).lm_head.weight.dtype == torch.bfloat16


def test_weights_that_do_not_fit_the_config(plain, tmp_path):
    save_original(plain, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 64}))
    with pytest.raises(CheckpointError, match="64"):
        MambaTrace(tmp_path, dispatch=True)


def test_no_hub_names_the_demo_model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"MambaTrace\.demo\(\)"):
        MambaTrace("state-spaces/no-such-mamba", local_files_only=True)


def test_names_are_compared_before_anything_is_loaded(folder: Path) -> None:
    weights = load_file(folder / SAFE)
    save_file({name: t for name, t in weights.items() if "layers.1.mixer.D" not in name}, folder / SAFE)
    assert f"the weights of {folder} do not fit its config.json. 1 missing: backbone.layers.1.mixer.D" in refused(
        folder
    )
    save_file(weights | {"surplus": torch.zeros(1)}, folder / SAFE)
    assert "1 unexpected: surplus" in refused(folder)


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


def test_good_checkpoints_load_as_before(folder: Path, tokens: Tensor, tiny_hf) -> None:
    want = logits(MambaTrace(tiny_hf()), tokens)
    torch.testing.assert_close(logits(MambaTrace(folder), tokens), want)
    assert MambaTrace(DEMO, dispatch=True).dispatched
    assert isinstance(MambaTrace.demo().config, MambaConfig)


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


def test_an_original_folder_is_loaded_with_all_that_transformers_offers(folder, tokens, tmp_path) -> None:
    want = logits(MambaTrace(folder), tokens)
    (folder / "below").mkdir()
    (folder / SAFE).rename(folder / "below" / "model.fp16.safetensors")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3}')
    model = MambaTrace(folder, subfolder="below", variant="fp16")
    assert torch.equal(logits(model, tokens), want)
    (folder / "below" / "model.fp16.safetensors").rename(folder / SAFE)
    model = MambaTrace(folder, dispatch=True)
    assert model._module.generation_config.max_new_tokens == 3
    model._module.save_pretrained(tmp_path / "saved")
    again = MambaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(MambaTrace(again), tokens), want)
