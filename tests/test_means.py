"""Means of activations, against those of the values that the float64 forward of `reference` keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BATCH, N_LAYERS, ModuleFactory, agree, layers_that_ran
from kinds import BACKENDS, DUAL, KINDS, made, make
from test_interventions import E, N, by_hand, logits_with, noise, put, values_of
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import ArgumentError, LayerError, PromptError, SiteValueError, UnknownSiteError
from mamba_trace.interventions import ablate
from mamba_trace.means import Sum, mean_activation
from mamba_trace.sites import BY_NAME, SITES


@pytest.fixture(scope="module")
def model(tiny_hf: ModuleFactory) -> MambaTrace:
    """In float64, so that what differs from the reference is wrong. Nothing a test does may outlive it."""
    return MambaTrace(tiny_hf(dtype=torch.float64))


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


def family_of(kind: str) -> str:
    return "dual" if kind in DUAL else "selective"


MEAN_SITES = [
    (kind, site.name)
    for kind in KINDS
    for site in SITES
    if "L" in site.axes and family_of(kind) in site.families and not site.part
]


@pytest.mark.parametrize(("kind", "name"), MEAN_SITES)
def test_means_over_all_tokens_and_at_each_position(tokens: Tensor, kind: str, name: str) -> None:
    model = made(kind)
    site, values = BY_NAME[name], values_of(model, tokens)
    over_all = mean_activation(model, tokens, name)
    at_each = mean_activation(model, tokens, site.hook, over="prompts")
    layers = [None] if site.scope == "model" else list(range(N_LAYERS))
    assert list(over_all) == list(at_each) == layers
    for layer in layers:
        value = values[site.hook_name(layer)]  # [B,L,...]
        agree(over_all[layer], value.mean((0, 1)), 1e-12)
        agree(at_each[layer], value.mean(0), 1e-12)


@pytest.mark.parametrize("name", ["conv", "B_bar", "h", "y", "resid_post"])
@pytest.mark.parametrize(("kind", "each_backend"), BACKENDS, indirect=["each_backend"])
def test_every_backend_gives_the_same_means(tokens: Tensor, kind: str, each_backend: str, name: str) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers and steps of a run."""
    model = make(kind, each_backend, dtype=torch.float32)
    value = values_of(model, tokens)[BY_NAME[name].hook_name(1)]
    agree(mean_activation(model, tokens, name, 1)[1], value.mean((0, 1)).float(), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_batch_size_changes_nothing(model: MambaTrace, tokens: Tensor, batch_size: int) -> None:
    value = values_of(model, tokens)["blocks.1.hook_y"]
    means = mean_activation(model, tokens, "y", [-2], batch_size=batch_size)
    assert list(means) == [1]
    agree(means[1], value.mean((0, 1)), 1e-12)


@pytest.mark.parametrize("over", ["positions", "prompts"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_without_positions_is_averaged_over_prompts(tokens: Tensor, over: str, kind: str) -> None:
    model, axes = made(kind), (6, 4, N) if kind in DUAL else (E, N)
    with model.edit() as (_, started):
        started.layers[1].ssm.h_start.output = noise(BATCH, *axes)
    means = mean_activation(started, tokens, "h_start", 1, over=over)
    agree(means[1], noise(BATCH, *axes).mean(0), 1e-12)


PROMPTS = [
    "Emma gave an apple to",
    "Lately, Emma and Shelby had fun at school. Shelby gave an apple to",
    "Emma and Shelby had fun",
]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("as_tokens", [False, True], ids=["strings", "token ids"])
def test_padding_is_left_out_and_every_token_weighs_the_same(
    demo: MambaTrace, batch_size: int, as_tokens: bool
) -> None:
    found = [values_of(demo, demo.to_tokens(prompt))["blocks.3.hook_h"] for prompt in PROMPTS]
    expected = torch.cat([one[0] for one in found]).mean(0)  # [E,N]
    if as_tokens:
        padded = demo.tokenizer(PROMPTS, return_tensors="pt", padding=True)
        assert not padded["attention_mask"].all()
        means = mean_activation(
            demo, padded["input_ids"], "h", 3, attention_mask=padded["attention_mask"], batch_size=batch_size
        )
    else:
        means = mean_activation(demo, PROMPTS, "h", 3, batch_size=batch_size)
    agree(means[3], expected.float(), 1e-5)


def test_the_mean_of_one_prompt_as_a_string_and_as_ids(demo: MambaTrace) -> None:
    tokens = demo.to_tokens(PROMPTS[1])
    expected = values_of(demo, tokens)["blocks.2.hook_out_proj"].mean((0, 1)).float()
    for prompts in (PROMPTS[1], [PROMPTS[1]], tokens, tokens[0]):
        agree(mean_activation(demo, prompts, "out_proj", 2)[2], expected, 1e-5)


def test_a_mean_in_half_precision_is_summed_in_float32(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    half = MambaTrace(tiny_hf(dtype=torch.bfloat16))
    with torch.no_grad(), half.trace(tokens):
        skip = half.layers[1].ssm.skip.output.save()
    assert skip.dtype == torch.bfloat16
    agree(mean_activation(half, tokens, "skip", 1)[1], skip.double().mean((0, 1)).float(), 1e-6)


def test_many_batches_add_up_to_what_float32_would_round_away() -> None:
    total = Sum()
    for value in [2.0**24] + [1.0] * 16:
        total.add(torch.tensor([[value]]))
    assert total.mean().dtype == torch.float32
    agree(total.mean(), torch.tensor([(2.0**24 + 16) / 17]), 1e-7)


def test_layers_after_the_last_one_asked_for_do_not_run(model: MambaTrace, tokens: Tensor) -> None:
    mean_activation(model, tokens, "conv", [0])
    assert layers_that_ran(model) == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_ablation_of_states_position_by_position(tokens: Tensor, kind: str) -> None:
    model = made(kind)
    means = mean_activation(model, tokens[1:], "h", over="prompts")

    def act() -> None:
        for position in (2, 5):
            ablate(model.layers[1].ssm.h[position], means[1][position])

    values = values_of(model, tokens[1:])
    edits = {f"blocks.1.hook_h.{p}": put(..., values[f"blocks.1.hook_h.{p}"].mean(0)) for p in (2, 5)}
    agree(logits_with(model, tokens, act), by_hand(model, tokens, edits), 1e-10)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "unknown site": (PROMPTS, {"site": "ssm_outptu"}, UnknownSiteError, "did you mean ssm_output"),
    "a place": (PROMPTS, {"site": "layers[1].ssm.y"}, UnknownSiteError, r"site='y', layers=\[1, 2\]"),
    "A": (PROMPTS, {"site": "A"}, SiteValueError, "the same for every prompt"),
    "layer": (PROMPTS, {"layers": [0, 8]}, LayerError, "layers 0 to 7"),
    "layers of the model": (PROMPTS, {"site": "embeddings", "layers": 0}, LayerError, "belongs to no layer"),
    "over": (PROMPTS, {"over": "tokens"}, ArgumentError, "neither 'positions' nor 'prompts'"),
    "batch size": (PROMPTS, {"batch_size": 0}, ArgumentError, "at least one prompt"),
    "no prompts": ([], {}, PromptError, "needs a prompt"),
    "lists of ids": ([[1, 2], [3, 4]], {}, PromptError, "strings or a tensor of token ids"),
    "several lengths": (PROMPTS, {"over": "prompts"}, PromptError, "5 to 15 tokens"),
    "padding": (
        torch.ones(2, 4, dtype=torch.long),
        {"over": "prompts", "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)},
        PromptError,
        "3 to 4 tokens: give prompts of one length without padding",
    ),
}


@pytest.mark.parametrize(("prompts", "arguments", "error", "words"), REFUSED.values(), ids=list(REFUSED))
def test_means_that_make_no_sense_are_refused_before_anything_runs(
    demo: MambaTrace, prompts: Any, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    ran: list[Any] = []
    handle = demo._module.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=words):
        mean_activation(demo, prompts, **{"site": "y", **arguments})
    handle.remove()
    assert not ran


@pytest.mark.parametrize(
    ("kind", "site", "error", "words"),
    [
        ("mamba", "B_conv", UnknownSiteError, "of this model, a Mamba-1 or Falcon-Mamba: it is a site of Mamba-2"),
        ("falcon_mamba", "hook_inner_norm", UnknownSiteError, "it is a site of Mamba-2"),
        (DUAL[1], "A", SiteValueError, r"A \[H heads\] is the same for every prompt"),
    ],
)  # fmt: skip
def test_a_mean_of_a_site_of_another_family_is_refused_before_anything_runs(
    tokens: Tensor, kind: str, site: str, error: type[Exception], words: str
) -> None:
    model = make(kind)
    with pytest.raises(error, match=words):
        mean_activation(model, tokens, site, 1)
    assert not len(model.last_run)


def test_a_mean_inside_a_trace_is_refused_before_anything_runs(tiny: MambaTrace, tokens: Tensor) -> None:
    with (
        pytest.raises(RuntimeError, match="mean_activation is a trace of its own, and this model is in one"),
        tiny.trace(tokens),
    ):
        mean_activation(tiny, tokens, "y")
    assert not len(tiny.last_run)
