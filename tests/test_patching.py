"""A patching grid is right in every cell, by an independent slow computation, and refuses clearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OTHERS, ModuleFactory
from grids import MINUS, OURS, PATCHED, PLUS, THEIRS, slow_grid
from torch import Tensor
from transformers import AutoTokenizer, MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.arguments.prompts import aligned
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.errors import ArgumentError, MetricError, PositionError, PromptError, UnknownSiteError
from mamba_trace.model import DEMO
from mamba_trace.patching import Metric, PatchGrid, attribution_grid, logit, logit_diff, patch_grid
from mamba_trace.patching.question import positional
from mamba_trace.sites import PURE, SITES, Layout, site_named

NAME = 10  # where the seed's prompts differ: the name of who gives


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def metric(demo: MambaTrace) -> Metric:
    return logit_diff(demo, " Emma", " Shelby")


@pytest.fixture(scope="module")
def grid(demo: MambaTrace, metric: Metric) -> PatchGrid:
    return patch_grid(demo, PROMPT, SOURCE, metric=metric, progress=False)


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any trace fails the test."""

    def trace(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(MambaTrace, "trace", trace)


def refusal(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "site"), PATCHED)
def test_every_cell_of_every_site_is_what_a_forward_of_its_own_gives(
    tiny_hf: ModuleFactory, model_type: str, site: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type, dtype=torch.float64))
    metric = logit_diff(model, PLUS, MINUS)
    got = patch_grid(model, OURS, THEIRS, site, metric, batch_size=4, progress=False)
    expected = slow_grid(tiny_hf(model_type=model_type, dtype=torch.float64), site)
    assert got.values.dtype == torch.float64
    torch.testing.assert_close(got.values, expected, rtol=1e-10, atol=1e-10)
    assert (expected - got.prompt_metric).abs().max() > 1e-3, "the site matters, so the comparison means something"


def test_prompts_that_are_the_same_have_one_answer(tiny: MambaTrace) -> None:
    grid = patch_grid(tiny, OURS, OURS, metric=logit(tiny, 3), progress=False)
    assert (grid.values == grid.prompt_metric).all()
    assert grid.prompt_metric == pytest.approx(grid.source_metric)


def test_the_sites_of_a_grid_are_those_with_positions() -> None:
    assert {site.name for site in SITES} - set(positional()) == {"A", "h_start", "pattern"}
    selective, dual = (set(positional(Layout((PURE[family],)))) for family in ("selective", "dual"))
    assert dual - selective == {"B_in", "C_in", "B_conv", "C_conv", "inner_norm"}
    of_hybrids = {"ssm_out", "q", "k", "v", "z", "attn_out", "shared_out", "resid_mid", "mlp_input", "norm_2"}
    assert set(positional()) - dual == of_hybrids | {"router", "mlp_out", "logits", "delta_1"} - dual


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("make", [patch_grid, attribution_grid])
def test_sites_of_hybrids_are_refused_or_meant_by_another_name(tiny: MambaTrace, make: Callable[..., Any]) -> None:
    for site in ("attn.q", "resid_mid", "router"):
        said = refusal(UnknownSiteError, lambda site=site: make(tiny, OURS, THEIRS, site, logit(tiny, 3)))
        why = "a Mamba has no attention, no MLP and one norm in each block; MambaTrace.demo('hybrid') has"
        assert said == f"{site!r}: {why}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("h", "h"),
        ("hook_h", "h"),
        ("ssm.h", "h"),
        ("layers[l].ssm.h", "h"),
        ("layers.l.ssm.h", "h"),
        ("blocks.l.hook_h", "h"),
        ("layers[l].resid_post", "resid_post"),
        ("hook_z", "z"),
        ("attn.hook_z", "z"),
        ("blocks.l.attn.hook_z", "z"),
        ("layers[l].attn.z", "z"),
        ("attn.y", None),
        ("layers[1].ssm.h", None),
        ("nothing", None),
        (3, None),
    ],
)
def test_a_site_is_named_as_in_the_tables_of_sites(written: Any, meant: str | None) -> None:
    site = site_named(written)
    assert (None if site is None else site.name) == meant


def test_what_the_mixer_adds_is_its_output(tiny: MambaTrace) -> None:
    one, other = (
        patch_grid(tiny, OURS, THEIRS, site, logit(tiny, 3), progress=False) for site in ("ssm_out", "out_proj")
    )
    assert one.site == "out_proj"
    assert torch.equal(one.values, other.values)
    assert one.layers == [0, 1, 2]


@pytest.mark.parametrize("variant", OTHERS, ids=str)
def test_cells_of_every_variant_start_from_what_was_before_them(tiny_hf: ModuleFactory, variant: dict) -> None:
    """Biases, limits of delta, one group or a group for each head, other kernels of the convolution."""
    model = MambaTrace(tiny_hf(dtype=torch.float64, **variant))
    for site in ("h", "conv"):
        got = patch_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), memory=100_000, progress=False)
        expected = slow_grid(tiny_hf(dtype=torch.float64, **variant), site)
        torch.testing.assert_close(got.values, expected, rtol=1e-10, atol=1e-10)


def test_resid_pre_on_the_shipped_model_is_what_hooks_on_plain_transformers_give(
    demo: MambaTrace, metric: Metric
) -> None:
    plain = MambaForCausalLM.from_pretrained(DEMO, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    ours, theirs = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (PROMPT, SOURCE))
    plus, minus = (tokenizer(text)["input_ids"][0] for text in (" Emma", " Shelby"))
    kept: dict[int, Tensor] = {}

    def measure(tokens: Tensor) -> Tensor:
        logits = plain(tokens).logits[0, -1]
        return logits[plus] - logits[minus]

    def patched(layer: int, position: int) -> Tensor:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            resid = args[0].clone()
            resid[:, position] = kept[layer][:, position]
            return (resid, *args[1:])

        handle = plain.backbone.layers[layer].register_forward_pre_hook(hook)
        value = measure(ours)
        handle.remove()
        return value

    with torch.no_grad():
        handles = [
            block.register_forward_pre_hook(lambda module, args, layer=layer: kept.update({layer: args[0]}))
            for layer, block in enumerate(plain.backbone.layers)
        ]
        source_metric = measure(theirs)
        for handle in handles:
            handle.remove()
        layers, length = range(len(plain.backbone.layers)), ours.shape[1]
        expected = torch.stack([torch.stack([patched(layer, p) for p in range(length)]) for layer in layers])
        prompt_metric = measure(ours)
    got = patch_grid(demo, PROMPT, SOURCE, "resid_pre", metric, progress=False)
    torch.testing.assert_close(got.values, expected, rtol=1e-5, atol=1e-4)
    assert got.prompt_metric == pytest.approx(float(prompt_metric), rel=1e-5)
    assert got.source_metric == pytest.approx(float(source_metric), rel=1e-5)


def test_the_shipped_model_shows_the_real_thing(demo: MambaTrace, grid: PatchGrid) -> None:
    assert grid.prompt_metric > 2 > -2 > grid.source_metric, "it answers both prompts, differently"
    share = grid.normalized()
    assert share.shape == (len(demo.layers), 15)
    assert share[:, :NAME].abs().max() < 1e-5, "before the second name the two runs are the same"
    assert (share[:, NAME:].abs().amax(0) > 0.3).all(), "from the second name on, the state holds the answer"
    assert share[:, -1].amax() > 0.9


def test_the_shipped_mamba2_holds_the_answer_in_one_layer() -> None:
    model = MambaTrace.demo("mamba2")
    share = patch_grid(model, PROMPT, SOURCE, metric=logit_diff(model, " Emma", " Shelby"), progress=False).normalized()
    assert share.shape == (len(model.layers), 15)
    assert share[:, :NAME].abs().max() < 1e-4
    assert share[0, -3:].min() > 0.6
    assert share[1:].abs().max() < 0.05


def test_model_sites_give_one_row(demo: MambaTrace, metric: Metric) -> None:
    embeddings = patch_grid(demo, PROMPT, SOURCE, "hook_embed", metric, progress=False)
    assert embeddings.site == "embeddings"
    assert embeddings.row_labels == ["embeddings"]
    assert embeddings.values.shape == (1, 15)
    assert embeddings.normalized()[0, NAME] == pytest.approx(1, abs=1e-5)
    assert "site embeddings" in embeddings.figure().data[0].text[0][0]


def test_neither_the_batch_nor_a_second_run_changes_the_numbers(tiny: MambaTrace) -> None:
    metric = logit_diff(tiny, PLUS, MINUS)
    first, again, single = (
        patch_grid(tiny, OURS, THEIRS, metric=metric, batch_size=size, progress=False) for size in (32, 32, 1)
    )
    assert torch.equal(first.values, again.values)
    torch.testing.assert_close(first.values, single.values, rtol=1e-5, atol=1e-5)


def test_gradients_are_not_recorded_and_the_model_is_left_as_it_was(tiny: MambaTrace) -> None:
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits[:, PLUS]

    def logits() -> Tensor:
        with torch.no_grad(), tiny.trace(OURS):
            value = tiny.lm_head.output.save()
        return value

    before = logits()
    grid = patch_grid(tiny, OURS, THEIRS, "conv", metric, progress=False)
    assert grid.metric == "metric"
    assert all(not one.requires_grad and one.dim() == 2 for one in seen)
    assert torch.equal(before, logits())


def test_hook_names_name_sites(tiny: MambaTrace) -> None:
    metric = logit_diff(tiny, PLUS, MINUS)
    by_hook = patch_grid(tiny, OURS, THEIRS, "hook_in_proj", metric, progress=False)
    by_name = patch_grid(tiny, OURS, THEIRS, "x_in", metric, progress=False)
    assert by_hook.site == by_name.site == "x_in"
    assert torch.equal(by_hook.values, by_name.values)


def test_progress_goes_to_stderr_and_can_be_silenced(tiny: MambaTrace, capsys: pytest.CaptureFixture[str]) -> None:
    metric = logit_diff(tiny, PLUS, MINUS)
    patch_grid(tiny, OURS, THEIRS, metric=metric)
    shown = capsys.readouterr()
    assert "patching h" in shown.err
    assert "18/18" in shown.err
    assert not shown.out
    patch_grid(tiny, OURS, THEIRS, metric=metric, progress=False)
    assert capsys.readouterr() == ("", "")


# -- what comes back ---------------------------------------------------------------------------------------


def test_labels_show_tokens_and_where_they_differ(grid: PatchGrid, tiny: MambaTrace) -> None:
    assert grid.labels[:3] == ["Lately_0", ",_1", " Emma_2"]
    assert grid.labels[NAME] == " Shelby -> Emma_10"
    assert grid.row_labels == [str(layer) for layer in range(len(grid.values))]
    without_tokenizer = patch_grid(tiny, OURS, THEIRS, metric=logit_diff(tiny, PLUS, MINUS), progress=False)
    assert without_tokenizer.labels == ["3_0", "0_1", "7 ->8_2", "9_3", "4 ->1_4", "2_5"]


def test_prompts_answered_alike_have_no_scale(demo: MambaTrace, metric: Metric) -> None:
    same = patch_grid(demo, PROMPT, PROMPT, "resid_pre", metric, progress=False)
    message = refusal(MetricError, same.normalized)
    assert "prompt and source have the same metric (logit of ' Emma' minus logit of ' Shelby': +" in message
    assert "look at .values" in message
    assert refusal(MetricError, same.figure) == message


# -- what is refused, before anything runs -----------------------------------------------------------------


@pytest.mark.usefixtures("never_run")
def test_prompts_of_different_lengths_are_shown_aligned(demo: MambaTrace, metric: Metric) -> None:
    longer = SOURCE.replace("at school", "at the school")
    message = refusal(PromptError, lambda: patch_grid(demo, PROMPT, longer, metric=metric))
    first, ours, theirs = message.split("\n")
    assert "prompt has 15 tokens and source 16" in first
    assert ours.startswith("  prompt:  ... ' had'  ' fun'  ' at'          ' school'  '.'  ' Shelby'")
    assert theirs.startswith("  source:  ... ' had'  ' fun'  ' at'  ' the'  ' school'  '.'  ' Emma'  ")
    assert len(ours) < 200


def test_alignment_of_long_prompts_is_cut() -> None:
    ours, theirs = [str(i) for i in range(99)], ["x", *(str(i) for i in range(99))]
    first, second = aligned(ours, theirs).split("\n")
    assert first.startswith("  prompt:       '0'  '1'")
    assert second.startswith("  source:  'x'  '0'  '1'")
    assert second.endswith("'10' ...")


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt is empty: '' has no tokens"),
        (torch.ones(2, 5, dtype=torch.long), "prompt must be one prompt [1,L], not a tensor of shape [2, 5]"),
        (torch.ones(5, dtype=torch.long), "prompt must be one prompt [1,L], not a tensor of shape [5]"),
        (torch.ones(1, 5), "token ids [1,L], not a tensor of shape [1, 5] and dtype float32"),
        ([PROMPT], "prompt must be one string or a tensor of token ids [1,L], not a list"),
        (torch.tensor([[1, 99999]]), "token 99999 is not in the vocabulary, whose ids are 0 to"),
        (PROMPT.replace("Emma", "Zorro"), "prompt has words that this tokenizer does not know"),
    ],
)
def test_what_is_no_single_prompt_is_refused(demo: MambaTrace, metric: Metric, prompt: Any, said: str) -> None:
    assert said in refusal(PromptError, lambda: patch_grid(demo, prompt, SOURCE, metric=metric))
    assert said.replace("prompt", "source", 1) in refusal(
        PromptError, lambda: patch_grid(demo, PROMPT, prompt, metric=metric)
    )


@pytest.mark.usefixtures("never_run")
def test_unknown_sites_are_refused_with_the_nearest(demo: MambaTrace, metric: Metric) -> None:
    def message(site: str) -> str:
        return refusal(UnknownSiteError, lambda: patch_grid(demo, PROMPT, SOURCE, site, metric))

    assert "no site is called 'resid_prae'; did you mean resid_pre" in message("resid_prae")
    assert "did you mean hook_conv" in message("hook_convv")
    assert "A grid patches one of embeddings, resid_pre, " in message("qqq")
    for place, site in (
        ("h[5]", "h"),
        ("h[:, 5]", "h"),
        ("layers[1].ssm.h", "h"),
        ("blocks.1.hook_h.5", "h"),
        ("layers[1].resid_pre", "resid_pre"),
    ):
        refused = message(place)
        assert f"no site is called {place!r}: that is one place, and a grid takes a site" in refused
        assert f"{site} patches every layer and position" in refused
    assert "in_proj'; did you mean" in message("layers[0].ssm.in_proj")
    for site in ("A", "h_start", "hook_A"):
        with pytest.raises(PositionError) as caught:
            patch_grid(demo, PROMPT, SOURCE, site, metric)
        refused = str(caught.value)
        assert "has no positions to patch one by one. A grid patches one of embeddings, " in refused


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("make", [patch_grid, attribution_grid])
def test_sites_of_another_architecture_are_refused(tiny: MambaTrace, make: Callable[..., Any]) -> None:
    for site in ("B_in", "hook_C_conv", "inner_norm"):
        said = refusal(UnknownSiteError, lambda site=site: make(tiny, OURS, THEIRS, site, logit(tiny, 3)))
        model = "this model, a Mamba-1 or Falcon-Mamba"
        assert said.startswith(f"{site!r} is not a place of {model}: it is a site of Mamba-2; ")
    said = refusal(UnknownSiteError, lambda: make(tiny, OURS, THEIRS, "B_inn", logit(tiny, 3)))
    assert "did you mean" in said
    assert "B_in" not in said.replace("B_inn", "")


@pytest.mark.usefixtures("never_run")
def test_a_state_has_no_positions_to_patch_by_the_axes_of_its_model(tiny_hf: ModuleFactory) -> None:
    model = MambaTrace(tiny_hf(model_type="mamba2"))
    said = refusal(PositionError, lambda: patch_grid(model, OURS, THEIRS, "h_start", logit(model, 3)))
    assert "h_start [B batch, H heads, P head_dim, N d_state] has no positions" in said
    assert "C_conv, ssm_input" in said


@pytest.mark.usefixtures("never_run")
def test_answers_are_single_different_tokens(demo: MambaTrace) -> None:
    def message(answer: str | int, wrong: str | int = " Emma") -> str:
        return refusal(PromptError, lambda: logit_diff(demo, answer, wrong))

    assert "answer and wrong are both ' Emma'" in message(" Emma")
    assert "are both" in message(demo.to_single_token(" Emma"))
    assert "' Emma gave' is 2 tokens, [' Emma', ' gave'], not one" in message(" Emma gave")
    assert "a word inside a sentence carries its space: ' gave'" in message("gave")
    assert "token -1 is not in the vocabulary" in message(-1)


def test_metrics_give_one_number_for_each_row(demo: MambaTrace, metric: Metric) -> None:
    def message(metric: Any) -> str:
        return refusal(MetricError, lambda: patch_grid(demo, PROMPT, SOURCE, metric=metric, progress=False))

    assert "metric=logit_diff(model, answer, wrong) is one" in message(None)
    assert "returns one number for each row [B]" in message(lambda logits: logits.mean())
    assert "this one returned a float" in message(lambda logits: 1.0)
    assert "batch_size=0" in refusal(
        ArgumentError, lambda: patch_grid(demo, PROMPT, SOURCE, metric=metric, batch_size=0, progress=False)
    )
