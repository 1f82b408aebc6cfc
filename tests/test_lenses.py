"""The lenses, against plain Hugging Face modules and the float64 forward of `reference`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import attach_align_device_hook
from conftest import N_LAYERS, ModuleFactory, agree, layers_that_ran, near, pair
from kinds import BACKENDS, DUAL, KINDS, make
from reference import forward
from torch import Tensor
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.errors import ArgumentError, LayerError, PromptError
from mamba_trace.lenses import LogitLens, StateLens, logit_lens, state_lens

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
TOKEN, V = 7, 31
#: Biases and an unembedding of its own: all that the lenses could mistake for something else.
RICH: dict[str, Any] = {"use_bias": True, "tie_word_embeddings": False}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def modules(tiny_hf: ModuleFactory, kind: str) -> tuple[MambaForCausalLM, MambaTrace]:
    return pair(tiny_hf, dtype=torch.float64, **RICH, **KINDS[kind])


@pytest.fixture(scope="module")
def plain(modules: tuple[MambaForCausalLM, MambaTrace]) -> MambaForCausalLM:
    return modules[0]


@pytest.fixture(scope="module")
def model(modules: tuple[MambaForCausalLM, MambaTrace]) -> MambaTrace:
    return modules[1]


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture
def prompt(tokens: Tensor) -> Tensor:
    return tokens[1:2]


def values_of(module: MambaForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """Every value of the reference by hook name."""
    found: dict[str, Tensor] = {}
    forward(module.state_dict(), module.config, tokens, lambda hook, value: found.setdefault(hook, value))
    return found


def stopped_early(module: MambaForCausalLM, tokens: Tensor) -> Tensor:
    """The logits [n_layers+1,L,V] of a model of the first 0, 1, ... layers, in float64."""
    values, config = values_of(module, tokens), module.config
    streams = [values["hook_embed"]] + [values[f"blocks.{i}.hook_resid_post"] for i in range(N_LAYERS)]
    rows = []
    for stream in streams:
        normed = stream / (stream.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        weights = module.backbone.norm_f.weight, module.lm_head.weight
        rows.append((normed * weights[0].double() @ weights[1].double().T)[0])
    return torch.stack(rows).detach()


def added_by_states(module: MambaForCausalLM, tokens: Tensor) -> Tensor:
    """What each state adds to the logits [n_layers,L,V]: the logits less those without it, norm frozen."""
    values, config = values_of(module, tokens), module.config
    final = values[f"blocks.{N_LAYERS - 1}.hook_resid_post"]
    scale = 1 / (final.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()  # [1,L,1]
    head, rows = module.lm_head.weight.double(), []
    for i, block in enumerate(module.backbone.layers):
        without = written_by(module, values, i, values[f"blocks.{i}.hook_ssm_output"] - values[f"blocks.{i}.hook_y"])
        bias = block.mixer.out_proj.bias
        written = values[f"blocks.{i}.hook_out_proj"] - without - (0 if bias is None else bias.double())
        rows.append((written * scale * module.backbone.norm_f.weight.double() @ head.T)[0])
    return torch.stack(rows).detach()


def written_by(module: MambaForCausalLM, values: dict[str, Tensor], layer: int, part: Tensor) -> Tensor:
    """What a part of ssm_output [1,L,E] writes into the stream [1,L,D], without the bias, norms frozen."""
    mixer = module.backbone.layers[layer].mixer
    part = part * F.silu(values[f"blocks.{layer}.hook_skip"])
    if module.config.model_type == "mamba2":
        gated = values[f"blocks.{layer}.hook_after_skip"].unflatten(-1, (module.config.n_groups, -1))
        scale = 1 / (gated.square().mean(-1, keepdim=True) + module.config.layer_norm_epsilon).sqrt()
        part = part * scale.expand_as(gated).flatten(-2) * mixer.norm.weight.double()
    return part @ mixer.out_proj.weight.double().T


# -- the logit lens ----------------------------------------------------------------------------------------


def test_the_logit_lens_is_a_model_of_fewer_layers(tiny_hf: ModuleFactory, prompt: Tensor, kind: str) -> None:
    plain, model = pair(tiny_hf, **RICH, **KINDS[kind])
    lens = logit_lens(model, prompt, token=TOKEN)
    assert lens.row_labels == ["embedding", "0", "1", "2"]
    layers = plain.backbone.layers
    for row in range(N_LAYERS + 1):
        plain.backbone.layers = layers[:row]
        with torch.no_grad():
            logits = plain(prompt, use_cache=False).logits[0]  # [L,V]
        agree(lens.logits[row], logits[:, TOKEN], 1e-5)
        agree(lens.probabilities[row], logits.softmax(-1)[:, TOKEN], 1e-5)


@pytest.mark.parametrize("top", [1, 3, V])
def test_the_most_probable_tokens_of_every_cell(
    plain: MambaForCausalLM, model: MambaTrace, prompt: Tensor, top: int
) -> None:
    lens = logit_lens(model, prompt, top=top)
    logits, ids = stopped_early(plain, prompt).sort(-1, descending=True)  # [C,L,V]
    assert torch.equal(lens.top_ids, ids[..., :top])
    assert lens.top_tokens == [str(one) for one in ids[..., :top].flatten().tolist()]
    agree(lens.top_logits, logits[..., :top], 1e-10)
    agree(lens.top_probabilities, logits.softmax(-1)[..., :top], 1e-10)
    assert lens.token is None
    assert torch.equal(lens.logits, lens.top_logits[..., 0])
    assert torch.equal(lens.probabilities, lens.top_probabilities[..., 0])


def test_a_token_that_was_asked_for_comes_beside_the_most_probable(
    plain: MambaForCausalLM, model: MambaTrace, prompt: Tensor
) -> None:
    lens = logit_lens(model, prompt, token=TOKEN, top=2)
    logits = stopped_early(plain, prompt)
    agree(lens.logits, logits[..., TOKEN], 1e-10)
    agree(lens.probabilities, logits.softmax(-1)[..., TOKEN], 1e-10)
    assert torch.equal(lens.top_ids, logits.topk(2).indices)
    assert lens.token == str(TOKEN)


def test_strings_are_those_of_the_tokenizer(demo: MambaTrace) -> None:
    lens = logit_lens(demo, PROMPT, token=" Shelby", top=2)
    assert lens.token == " Shelby"
    assert lens.tokens == demo.to_str_tokens(PROMPT)
    assert lens.top_tokens == [demo.to_string(one) for one in lens.top_ids.flatten()]
    assert lens.top_tokens[-2] == " Emma"
    with torch.no_grad(), demo.trace(PROMPT):
        logits = demo.lm_head.output[0].save()  # [L,V]
    agree(lens.probabilities[-1], logits.softmax(-1)[:, demo.to_single_token(" Shelby")], 1e-5)


# -- the state lens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [RICH, {}], ids=["with biases", "tied, without biases"])
def test_the_state_lens_is_what_the_layer_writes_but_for_d_and_bias(
    tiny_hf: ModuleFactory, prompt: Tensor, changes: dict[str, Any], kind: str
) -> None:
    plain, model = pair(tiny_hf, dtype=torch.float64, **changes, **KINDS[kind])
    expected = added_by_states(plain, prompt)
    agree(state_lens(model, prompt, token=TOKEN).logits, expected[..., TOKEN], 1e-10)
    lens = state_lens(model, prompt, top=3)
    values, ids = expected.topk(3)
    assert torch.equal(lens.top_ids, ids)
    agree(lens.top_logits, values, 1e-10)
    assert torch.equal(lens.logits, lens.top_logits[..., 0])


def test_the_states_of_all_layers_and_the_other_terms_add_up_to_the_logits(
    plain: MambaForCausalLM, model: MambaTrace, prompt: Tensor
) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
        others, values = [cache["embed"]], values_of(plain, prompt)
        for i, block in enumerate(plain.backbone.layers):
            by_D = values[f"blocks.{i}.hook_ssm_output"] - values[f"blocks.{i}.hook_y"]
            others.append(written_by(plain, values, i, by_D) + block.mixer.out_proj.bias)
        rest = cache.logit_attrs(torch.stack(others), TOKEN).sum(0)[0]  # [L]
    total = state_lens(model, prompt, token=TOKEN).logits.sum(0) + rest
    agree(total, stopped_early(plain, prompt)[-1, :, TOKEN], 1e-10)


def test_a_state_that_is_erased_adds_nothing_from_there_on(model: MambaTrace, prompt: Tensor) -> None:
    with model.edit() as (_, erased):
        erased.layers[1].ssm.h_read.output[:, 4] = 0
    before, after = (state_lens(one, prompt, token=TOKEN).logits for one in (model, erased))
    assert not after[1, 4]
    assert before[1, 4].abs() > 1e-3
    agree(after[0, :4], before[0, :4], 1e-10)


def test_a_hooked_norm_counts_as_it_is(tiny_hf: ModuleFactory, prompt: Tensor) -> None:
    """Its weight alone is changed by the hook, so that the lens is that of a model with this weight."""
    plain, model = pair(tiny_hf, dtype=torch.float64, **RICH, **KINDS[DUAL[1]])
    with torch.no_grad():
        plain.backbone.layers[1].mixer.norm.weight.mul_(3)
    model.layers[1].ssm._module.norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    agree(state_lens(model, prompt, token=TOKEN).logits, added_by_states(plain, prompt)[..., TOKEN], 1e-10)


@pytest.mark.parametrize(
    ("layer", "rows"), [(1, [1]), (-1, [2]), ([2, 0], [0, 2]), (range(2), [0, 1]), (None, [0, 1, 2])], ids=str
)
def test_some_layers_are_rows_of_all(model: MambaTrace, prompt: Tensor, layer: Any, rows: list[int]) -> None:
    every, some = state_lens(model, prompt, top=2), state_lens(model, prompt, layer, top=2)
    assert some.row_labels == [str(row) for row in rows]
    agree(some.logits, every.logits[rows], 1e-12)
    assert torch.equal(some.top_ids, every.top_ids[rows])
    assert some.top_tokens == [str(one) for one in every.top_ids[rows].flatten().tolist()]


# -- both --------------------------------------------------------------------------------------------------

LENSES: list[Callable[..., Any]] = [logit_lens, state_lens]
both = pytest.mark.parametrize("lens_of", LENSES, ids=["logit_lens", "state_lens"])


@both
def test_a_lens_is_of_the_model_as_it_is_edited(
    tiny_hf: ModuleFactory, prompt: Tensor, lens_of: Callable[..., Any], kind: str
) -> None:
    """An edit that amounts to other weights."""
    plain, model = pair(tiny_hf, dtype=torch.float64, **RICH, **KINDS[kind])
    with torch.no_grad():
        plain.backbone.layers[0].mixer.D.zero_()
    with model.edit() as (_, edited):
        ssm = edited.layers[0].ssm
        y = ssm.y.output.clone()
        ssm.ssm_output.output = y
    expected = (stopped_early if lens_of is logit_lens else added_by_states)(plain, prompt)
    agree(lens_of(edited, prompt, token=TOKEN).logits, expected[..., TOKEN], 1e-10)


@pytest.mark.parametrize(("kind", "each_backend"), BACKENDS, indirect=["each_backend"])
@both
def test_every_backend_gives_the_same_lens(
    tiny_hf: ModuleFactory, prompt: Tensor, each_backend: str, lens_of: Callable[..., Any], kind: str
) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers and steps of a run."""
    plain = tiny_hf(**RICH, **KINDS[kind])
    lens = lens_of(make(kind, each_backend, dtype=torch.float32, **RICH), prompt, token=TOKEN, top=3)
    expected = (stopped_early if lens_of is logit_lens else added_by_states)(plain, prompt)
    agree(lens.logits, expected[..., TOKEN].float(), 1e-5)
    values, ids = expected.topk(3)
    assert torch.equal(lens.top_ids, ids)
    agree(lens.top_logits, values.float(), 1e-5)
    if lens_of is logit_lens:
        agree(lens.probabilities, expected.softmax(-1)[..., TOKEN].float(), 1e-5)


#: The states of the others round further from those of their weights; the test after this one is of their runs.
IN_HALF = [*((logit_lens, kind) for kind in KINDS), (state_lens, "mamba")]


@pytest.mark.parametrize(("lens_of", "kind"), IN_HALF)
def test_half_precision_gives_float32_close_to_the_numbers_of_its_weights(
    tiny_hf: ModuleFactory, prompt: Tensor, lens_of: Callable[..., Any], kind: str
) -> None:
    plain, model = pair(tiny_hf, dtype=torch.bfloat16, **RICH, **KINDS[kind])
    lens = lens_of(model, prompt, token=TOKEN)
    expected = (stopped_early if lens_of is logit_lens else added_by_states)(plain, prompt)
    # bfloat16 rounds by 2^-9 of a number. This is ten such roundings; 3 and 6 are measured.
    agree(lens.logits, expected[..., TOKEN].float(), 2e-2)
    assert lens.top_logits.dtype == torch.float32


def test_in_half_precision_the_state_lens_is_that_of_the_run(tiny_hf: ModuleFactory, prompt: Tensor, kind: str) -> None:
    plain, model = pair(tiny_hf, dtype=torch.bfloat16, **RICH, **KINDS[kind])
    values = {}
    with torch.no_grad(), model.trace(prompt):
        for i, layer in enumerate(model.layers):
            for site in (layer.ssm.skip, layer.ssm.y, layer.ssm.after_skip):
                values[f"blocks.{i}.{site.site.hook}"] = site.output.double().save()
        stream = model.layers[-1].resid_post.output.double().save()
    scale = 1 / (stream.square().mean(-1, keepdim=True) + plain.config.layer_norm_epsilon).sqrt()
    to_logits = scale * plain.backbone.norm_f.weight.double()
    found = state_lens(model, prompt, token=TOKEN).logits
    assert found.dtype == torch.float32
    for i in range(N_LAYERS):
        written = written_by(plain, values, i, values[f"blocks.{i}.hook_y"])
        expected = (written * to_logits @ plain.lm_head.weight.double().T)[0, :, TOKEN].detach()
        near(found[i], expected, 2e-2)  # five roundings by 2^-9: y, the gate, the norm, out_proj, the logits


@both
def test_weights_that_are_offloaded(model: MambaTrace, prompt: Tensor, lens_of: Callable[..., Any], kind: str) -> None:
    offloaded = make(kind, **RICH)
    module = offloaded._module
    parts = [module.backbone.norm_f, module.lm_head, *(b.mixer.out_proj for b in module.backbone.layers)]
    parts += [b.mixer.norm for b in module.backbone.layers if kind in DUAL]
    for part in parts:
        attach_align_device_hook(part, execution_device=torch.device("cpu"), offload=True)
    assert all(part.weight.is_meta for part in parts)
    one, other = lens_of(offloaded, prompt, top=2), lens_of(model, prompt, top=2)
    agree(one.top_logits, other.top_logits, 1e-10)
    assert torch.equal(one.top_ids, other.top_ids)


@both
def test_results_hold_no_graph_and_one_row_of_the_vocabulary_is_kept_at_a_time(
    model: MambaTrace, prompt: Tensor, lens_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    rows: list[Any] = []
    most = 0
    topk = Tensor.topk

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        gc.collect()
        rows.append(weakref.ref(self))
        most = max(most, sum(row() is not None for row in rows))
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", watched)
    lens = lens_of(model, prompt)
    assert len(rows) == len(lens.row_labels)
    assert most <= 2  # the row at hand, and the one before while this was made
    assert not lens.logits.requires_grad


def test_the_model_s_own_head_is_not_run_again(model: MambaTrace, prompt: Tensor) -> None:
    heads: list[int] = []
    handle = model.lm_head._module.register_forward_hook(lambda *_: heads.append(1))
    logit_lens(model, prompt)
    handle.remove()
    assert len(heads) == N_LAYERS + 1
    assert layers_that_ran(model) == list(range(N_LAYERS))


@both
@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "words"),
    [
        ("", {}, PromptError, "prompt"),
        ([PROMPT, PROMPT], {}, PromptError, "one string"),
        (torch.ones(2, 4, dtype=torch.long), {}, PromptError, "one prompt"),
        (PROMPT, {"token": " Emma and"}, PromptError, "2 tokens"),
        (PROMPT, {"token": 344}, PromptError, "not in the vocabulary"),
        (PROMPT, {"top": 0}, ArgumentError, "top=0: a lens keeps from 1 to 344"),
        (PROMPT, {"top": 345}, ArgumentError, "top=345"),
    ],
    ids=["empty", "several", "batch", "two tokens", "no token", "no top", "wide top"],
)
def test_questions_that_make_no_sense_are_refused_before_anything_runs(
    demo: MambaTrace,
    lens_of: Callable[..., Any],
    prompt: Any,
    arguments: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    ran: list[int] = []
    handle = demo._module.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=words):
        lens_of(demo, prompt, **arguments)
    handle.remove()
    assert not ran


@both
def test_a_lens_inside_a_trace_is_refused_before_anything_runs(
    tiny_hf: ModuleFactory, lens_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = MambaTrace(tiny_hf())
    words = f"{lens_of.__name__} is a trace of its own, and this model is in one"
    with pytest.raises(RuntimeError, match=words), model.trace(prompt):
        lens_of(model, prompt)
    assert not len(model.last_run)


@pytest.mark.parametrize("layer", [3, -4, [0, 3], []], ids=str)
def test_a_layer_that_the_model_does_not_have(model: MambaTrace, prompt: Tensor, layer: Any) -> None:
    with pytest.raises(LayerError, match="layers 0 to 2"):
        state_lens(model, prompt, layer)


# -- the picture and the file ------------------------------------------------------------------------------


def test_cells_name_the_best_token_unless_one_was_asked_for(demo: MambaTrace) -> None:
    (free,) = logit_lens(demo, PROMPT, top=2).heatmaps()
    assert free.texts is not None
    assert free.texts[-1][-1] == " Emma"
    assert [len(row) for row in free.texts] == [15] * 9
    assert free.row_labels[:2] == ["embedding", "0"]
    assert free.column_labels[8] == " school_8"
    assert "most probable" in free.title
    assert not free.signed, "probabilities"
    assert free.hover is not None
    assert "' Emma' +0.99" in free.hover[-1][-1]
    assert len(free.hover[-1][-1].splitlines()) == len(free.hover[0][0].splitlines()) == 5
    (asked,) = logit_lens(demo, PROMPT, token=" Emma").heatmaps()
    assert asked.texts is None
    assert "' Emma'" in asked.title
    assert torch.equal(asked.values, logit_lens(demo, PROMPT, token=" Emma").probabilities)


def test_the_picture_of_the_state_lens_is_of_its_logits(demo: MambaTrace) -> None:
    lens = state_lens(demo, PROMPT, [1, 2], top=3)
    (heatmap,) = lens.heatmaps()
    assert torch.equal(heatmap.values, lens.logits)
    assert heatmap.row_labels == ["1", "2"]
    assert heatmap.texts is not None
    assert heatmap.texts[0][-1] == " Emma"
    assert heatmap.value_title == "logit"
    assert heatmap.signed
    (asked,) = state_lens(demo, PROMPT, token=" Emma").heatmaps()
    assert asked.texts is None
    assert "adds to the logit of ' Emma'" in asked.title


@both
@pytest.mark.parametrize("token", [" Emma", None], ids=["asked for", "best"])
def test_a_lens_is_drawn_saved_and_read_back(
    demo: MambaTrace, tmp_path: Path, lens_of: Callable[..., Any], token: str | None
) -> None:
    lens = lens_of(demo, PROMPT, token=token, top=2)
    assert "Emma" in lens.figure().to_json()
    for suffix in (".json", ".safetensors"):
        read: LogitLens | StateLens = type(lens).load(lens.save(tmp_path / f"lens{suffix}"))
        for name, value in vars(lens).items():
            again = getattr(read, name)
            assert torch.equal(again, value) if isinstance(value, Tensor) else again == value
    assert lens.save(tmp_path / "lens.html").stat().st_size > 10_000
    assert lens.save(tmp_path / "lens.png").stat().st_size > 1_000
