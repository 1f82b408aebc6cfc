"""The shipped models must be what the package says they are, seen from plain `transformers` too.

Accuracy is measured on sentences whose pair of names never occurred in training; that claim is checked
against what the training generator yields, and the generator against the split stored beside the weights.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tutorial import TRAIN_DEMO, train_demo

from mamba_trace import MambaTrace

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "mamba": ROOT / "mamba_trace" / "demo_model",
    "mamba2": ROOT / "mamba_trace" / "demo_model_mamba2",
    "hybrid": ROOT / "mamba_trace" / "demo_model_hybrid",
}
CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "hybrid": "NemotronHForCausalLM"}
END = "<|endoftext|>"
PROMPTS = {
    "Lately, Emma and Shelby had fun at school. Shelby gave an apple to": (" Emma", " Shelby"),
    "Lately, Emma and Shelby had fun at school. Emma gave an apple to": (" Shelby", " Emma"),
}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return train_demo()


@pytest.fixture(scope="module", params=FOLDERS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(architecture: str) -> Path:
    return FOLDERS[architecture]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="module")
def quick(model: Any) -> Any:
    """The same model with this package's scans; Hugging Face's of a Mamba-2 takes eight times as long on a CPU."""
    return MambaTrace(copy.deepcopy(model))._module


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "splits.json").read_text())


def names_in(prompt: str, demo: ModuleType) -> set[str]:
    return set(re.findall(r"\w+", prompt)) & set(demo.NAMES)


@torch.no_grad()
def logits_after(model: Any, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Logits [len(prompts), V]; padded on the left, so the last column is every prompt's last token."""
    parts = []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(prompts[start : start + 100], padding=True, return_tensors="pt")
        parts.append(model(**batch, use_cache=False).logits[:, -1])
    return torch.cat(parts)


def test_the_folder_is_small_and_holds_data_only(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "splits.json",
    ):
        assert name in files
    assert not any(name.endswith((".py", ".bin", ".pt")) for name in files)
    assert sum(files.values()) <= 1_200_000


def test_config_is_that_of_a_small_real_mamba(architecture: str, folder: Path, model: Any, tokenizer: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [CLASSES[architecture]]
    assert not config.get("rescale_prenorm_residual"), "Hugging Face 5 would rescale loaded weights"
    state_size = config["ssm_state_size" if architecture == "hybrid" else "state_size"]
    assert (config["expand"], state_size, config["conv_kernel"]) == (2, 16, 4)
    assert config["vocab_size"] == len(tokenizer)
    tied = model.lm_head.weight is model.base_model.embeddings.weight
    assert tied == (architecture != "hybrid"), "a Nemotron-H has a head of its own, whatever its configuration says"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_plain_transformers_holds_no_delta_of_the_hybrid() -> None:
    """Hugging Face clamps delta in a prompt and not in a decode step: the two must not differ in what ships."""
    config = json.loads((FOLDERS["hybrid"] / "config.json").read_text())
    assert config["time_step_min"] == 1e-9
    model = AutoModelForCausalLM.from_pretrained(FOLDERS["hybrid"], local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["hybrid"], local_files_only=True)
    tokens = tokenizer(next(iter(PROMPTS)), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole, cache = model(tokens, use_cache=False).logits[0, -1], None
        for token in tokens.unbind(1):
            out = model(token[:, None], cache=cache, use_cache=True)
            cache = out.cache
    torch.testing.assert_close(out.logits[0, -1], whole, rtol=1e-4, atol=1e-4)


def test_loaded_weights_are_the_stored_ones(folder: Path, model: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    base = f"{model.base_model_prefix}."  # transformers stores a Nemotron-H under the names of those on the hub
    stored = {re.sub(r"^backbone\.", base, name): value for name, value in stored.items()}
    loaded = model.state_dict()
    assert set(loaded) - set(stored) <= {"lm_head.weight"}
    for name, value in stored.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("prefix", ["", END], ids=["without_bos", "with_bos"])
def test_held_out_pairs_are_answered(
    prefix: str, demo: ModuleType, splits: dict[str, Any], model: Any, quick: Any, tokenizer: Any
) -> None:
    sample = list(itertools.islice(demo.examples(splits["held_out"], "test"), 1000))
    prompts = [prefix + example.prompt for example in sample]
    logits = logits_after(quick, tokenizer, prompts)
    answers = torch.tensor([tokenizer.convert_tokens_to_ids(example.answer) for example in sample])
    assert (logits.argmax(-1) == answers).float().mean() >= 0.99
    torch.testing.assert_close(logits[:20], logits_after(model, tokenizer, prompts[:20]), rtol=1e-3, atol=1e-3)


#: In the Mamba-2 the state of the first layer alone holds the answer, and nothing stands in for it. The hybrid was
#: trained with all of its layers, and has spare ones behind those that it needs.
NEEDED = {"mamba": 0, "mamba2": 1, "hybrid": 3}
SPARE = [(name, layer) for name, first in NEEDED.items() for layer in range(first, 8)]


@pytest.mark.parametrize(("architecture", "left_out"), SPARE, indirect=["architecture"])
def test_any_one_layer_can_be_left_out(
    left_out: int, demo: ModuleType, splits: dict[str, Any], quick: Any, tokenizer: Any
) -> None:
    ablated = copy.deepcopy(quick)
    del ablated.base_model.layers[left_out]
    sample = list(itertools.islice(demo.examples(splits["held_out"], "ablation"), 100))
    answers = torch.tensor([tokenizer.convert_tokens_to_ids(example.answer) for example in sample])
    logits = logits_after(ablated, tokenizer, [example.prompt for example in sample])
    assert (logits.argmax(-1) == answers).float().mean() >= 0.95


@pytest.mark.parametrize("prefix", ["", END], ids=["without_bos", "with_bos"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_seed_prompts(prompt: str, prefix: str, model: Any, tokenizer: Any) -> None:
    right, wrong = tokenizer.convert_tokens_to_ids(list(PROMPTS[prompt]))
    logits = logits_after(model, tokenizer, [prefix + prompt])[0]
    assert logits.argmax() == right
    assert logits[right] - logits[wrong] > 5.0


@pytest.mark.parametrize("prefix", ["", END], ids=["without_bos", "with_bos"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_ends_the_sentence(prompt: str, prefix: str, model: Any, tokenizer: Any) -> None:
    batch = tokenizer(prefix + prompt, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == f"{PROMPTS[prompt][0]}.{END}"


def test_held_out_pairs_never_occur_in_training(demo: ModuleType, splits: dict[str, Any]) -> None:
    training, held_out = demo.split_pairs(splits["seed"])
    assert [list(pair) for pair in held_out] == splits["held_out"]
    assert ["Emma", "Shelby"] in splits["held_out"]
    forbidden = {frozenset(pair) for pair in held_out}
    assert len(forbidden) == len(held_out) >= 100
    assert len({frozenset(pair) for pair in [*training, *held_out]}) == math.comb(len(demo.NAMES), 2)
    for example in itertools.islice(demo.examples(training, splits["seed"]), 20_000):
        pairs = map(frozenset, itertools.combinations(names_in(example.prompt, demo), 2))
        assert forbidden.isdisjoint(pairs), example.prompt


def test_the_generator_yields_both_orders_both_givers_and_the_seed_sentences(demo: ModuleType) -> None:
    prompts = [example.prompt for example in itertools.islice(demo.examples([("Emma", "Shelby")], 0), 500)]
    for first, second in itertools.permutations(("Emma", "Shelby")):
        for giver in (first, second):
            assert any(re.search(rf"{first}.*{second}.*{giver}", prompt) for prompt in prompts)
    again = [example.prompt for example in itertools.islice(demo.examples([("Emma", "Shelby")], 0), 500)]
    assert prompts == again
    words = {"lead": "Lately", "first": "Emma", "second": "Shelby", "place": "school", "thing": "an apple"}
    filled = {
        template.format(giver=giver, verb="gave", **words)
        for template in demo.TEMPLATES
        for giver in ("Emma", "Shelby")
    }
    assert set(PROMPTS) <= filled
    assert "Lately" in demo.LEADS
    assert "school" in demo.PLACES
    assert "gave" in demo.VERBS
    assert "an apple" in demo.OBJECTS


def test_tokens_carry_their_space_and_join_to_the_text(
    demo: ModuleType, splits: dict[str, Any], tokenizer: Any
) -> None:
    text = "Lately, Emma and Shelby had fun at school."
    tokens = ["Lately", ",", " Emma", " and", " Shelby", " had", " fun", " at", " school", "."]
    assert tokenizer.tokenize(text) == tokens
    for example in itertools.islice(demo.examples(splits["held_out"], "tokens"), 1000):
        for text in (example.prompt, END + example.prompt + example.answer + "." + END):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text == "".join(tokenizer.convert_ids_to_tokens(ids))


def test_special_tokens(demo: ModuleType, tokenizer: Any) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.bos_token_id == 0
    assert tokenizer.padding_side == "left"
    assert tokenizer.encode("Emma") == tokenizer.encode("Emma", add_special_tokens=False)
    assert tokenizer.encode(" quokka", add_special_tokens=False) == [tokenizer.unk_token_id]
    for name in demo.NAMES:
        assert len({*tokenizer.encode(name), *tokenizer.encode(f" {name}")} - {tokenizer.unk_token_id}) == 2


def test_padding_changes_nothing(model: Any, tokenizer: Any) -> None:
    short, long = "Emma saw Shelby at home, so Emma gave an egg to", next(iter(PROMPTS))
    together = logits_after(model, tokenizer, [short, long])
    torch.testing.assert_close(together[0], logits_after(model, tokenizer, [short])[0], rtol=1e-4, atol=1e-4)


def test_the_training_forward_is_hugging_faces_forward(demo: ModuleType, model: Any, tokenizer: Any) -> None:
    tokens = tokenizer(next(iter(PROMPTS)), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(demo.fast_logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_training_scan_has_the_gradient_of_finite_differences(demo: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    L, B, E, N = 4, 2, 3, 5
    shapes = [(L, B, E), (L, B, E), (N, E), (L, B, N), (L, B, N)]
    x, delta, A, B_, C = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = tuple(v.requires_grad_() for v in (x, delta.abs(), -A.abs(), B_, C))
    assert torch.autograd.gradcheck(demo.SelectiveScan.apply, inputs)


def test_initialisation_is_mambas(demo: ModuleType) -> None:
    model = demo.build_model(vocab_size=20, n_layers=2, d_model=64, seed=3)
    for block in model.backbone.layers:
        mixer = block.mixer
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 17.0).log().expand(128, 16))
        dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
        assert 0.9e-3 < dt.min() < 2e-3
        assert 0.05 < dt.max() < 0.101
        assert dt.log().std().item() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.2)
        assert torch.equal(mixer.D, torch.ones(128))


def test_the_hybrid_is_initialised_as_mamba2_is(demo: ModuleType) -> None:
    model = demo.build_model(vocab_size=20, n_layers=8, d_model=64, seed=3, architecture="hybrid")
    mixers = [layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "A_log")]
    assert len(mixers) == 6
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 9.0).log())
        assert torch.equal(mixer.D, torch.ones(8))
    dt = torch.nn.functional.softplus(torch.cat([mixer.dt_bias for mixer in mixers]))
    assert 1e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1
    assert dt.log().std().item() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.2)
    again = demo.build_model(vocab_size=20, n_layers=8, d_model=64, seed=3, architecture="hybrid")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_tutorial_runs_from_the_command_line(architecture: str, tmp_path: Path) -> None:
    options = ["--architecture", architecture, "--steps", "2", "--batch-size", "4", "--layers", "1"]
    options += ["--eval-sentences", "4"]
    command = [sys.executable, TRAIN_DEMO, "--out", tmp_path / "model", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(written).__name__ == CLASSES[architecture]
    assert written.config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) > 100
