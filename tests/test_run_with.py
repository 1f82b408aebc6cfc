"""run_with_cache and run_with_hooks: what they see, what they change, and what they leave behind.

The references are values recorded from MambaLens, the float64 forward of `reference`, plain traces,
PyTorch's autograd and Hugging Face's loss.
"""

from __future__ import annotations

import copy
import linecache
import warnings
from typing import Any

import pytest
import test_mamba_lens as recorded
import torch
from conftest import LENGTH, N_LAYERS, ModuleFactory, agree, layers_that_ran
from test_hooks import plain, referred
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError, LayerError, PromptError
from mamba_trace.hooked import run_with
from mamba_trace.mamba_lens import HookedMamba

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
FUSED = ["conv_silu", "gated_scan"]


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def lens() -> MambaTrace:
    """The model that MambaLens's values were recorded from."""
    return recorded.model_from("weights.", recorded.SPEC["config"])


def functions(model: MambaTrace) -> list[list[str]]:
    return [[call.function for call in run.calls] for run in model.last_run]


# -- inputs and outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [PROMPT, [PROMPT], [PROMPT, "Emma gave an apple to", "Shelby"]], ids=len)
def test_strings_run_as_a_trace_of_them_does(demo: MambaTrace, batch: Any) -> None:
    with torch.no_grad():
        logits, cache = demo.run_with_cache(batch)
        hooked = demo.run_with_hooks(batch)
    assert torch.equal(hooked, plain(demo, batch))
    agree(logits, hooked)
    assert torch.equal(cache["hook_logits"], logits)


def test_tokens_run_as_a_batch_or_alone(tiny: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(tiny.run_with_hooks(tokens), plain(tiny, tokens))
        assert torch.equal(tiny.run_with_hooks(tokens[0]), plain(tiny, tokens[:1]))
        assert torch.equal(tiny.run_with_cache(tokens[0], "hook_embed")[0], plain(tiny, tokens[:1]))


def test_a_token_goes_before_each_string(demo: MambaTrace) -> None:
    texts = [PROMPT, "Emma gave"]
    with torch.no_grad():
        logits = demo.run_with_hooks(texts, prepend_bos=True)
    assert torch.equal(logits, plain(demo, [demo.tokenizer.bos_token + text for text in texts]))
    assert logits.shape[1] == demo.to_tokens(PROMPT).shape[1] + 1


def test_the_loss_is_hugging_faces(tiny: MambaTrace, tokens: Tensor) -> None:
    expected = tiny._module(tokens, labels=tokens).loss
    agree(tiny.run_with_hooks(tokens, return_type="loss"), expected)
    both, _ = tiny.run_with_cache(tokens, "hook_embed", return_type="both")
    agree(both.loss, expected)
    assert torch.equal(both.logits.detach(), plain(tiny, tokens))
    each = tiny.run_with_hooks(tokens, return_type="loss", loss_per_token=True)
    assert each.shape == (3, LENGTH - 1)
    agree(each.mean(), expected)


def test_padding_does_not_enter_the_loss(demo: MambaTrace) -> None:
    texts = [PROMPT, "Emma gave an apple to"]
    with torch.no_grad():
        padded = demo.run_with_hooks(texts, return_type="loss")
        each = demo.run_with_hooks(texts, return_type="loss", loss_per_token=True)
        alone = [demo.run_with_hooks(text, return_type="loss", loss_per_token=True)[0] for text in texts]
    agree(padded, torch.cat(alone).mean())
    agree(each[1, -len(alone[1]) :], alone[1])
    assert not each[1, : -len(alone[1])].any()


def test_a_mask_of_ones_own(tiny: MambaTrace, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = tiny.run_with_hooks(tokens, attention_mask=mask)
        alone = tiny.run_with_hooks(tokens[:1, 4:])
    agree(logits[:1, 4:], alone)


# -- the cache --------------------------------------------------------------------------------------------


def test_every_value_is_mamba_lenss(lens: MambaTrace) -> None:
    logits, cache = lens.run_with_cache(recorded.TOKENS)
    assert list(cache) == lens.hook_names(LENGTH)
    for name, value in cache.items():
        recorded.agree(value, f"value.{name}")
        assert not value.requires_grad
    recorded.agree(logits, "logits")


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_the_states_read_at_once_are_those_read_one_by_one(
    tiny_hf: ModuleFactory, tokens: Tensor, kernels: str
) -> None:
    model = MambaTrace(tiny_hf(), kernels=kernels)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        assert functions(model)[0][-1] == "selective_states"
        with model.trace(tokens):
            values = {name: model.hook(name).output for name in model.hook_names(LENGTH)}.save()
    for name, value in cache.items():
        assert torch.equal(value, values[name]), name


def test_residual_streams_cost_no_kernel(tiny: MambaTrace, tokens: Tensor) -> None:
    def streams(name: str) -> bool:
        return "resid" in name

    _, cache = tiny.run_with_cache(tokens, streams)
    assert len(cache) == 2 * N_LAYERS
    assert functions(tiny) == [FUSED] * N_LAYERS
    tiny.run_with_cache(tokens, ["blocks.1.hook_h.4", "blocks.2.hook_resid_post"])
    assert functions(tiny) == [FUSED, ["conv_silu", "selective_scan", "selective_scan"], FUSED]


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.1.hook_y", ["blocks.1.hook_y"]),
        ("layers[1].ssm.y", ["blocks.1.hook_y"]),
        ("blocks.1.mixer.hook_out", ["blocks.1.hook_out_proj"]),
        ("layers[1].ssm.h[-1]", ["blocks.1.hook_h.8"]),
        (["hook_logits", "hook_embed"], ["hook_embed", "hook_logits"]),
        (["blocks.2.hook_y", lambda name: name == "hook_embed"], ["hook_embed", "blocks.2.hook_y"]),
        (lambda name: name.endswith("hook_A"), [f"blocks.{layer}.hook_A" for layer in range(N_LAYERS)]),
        ("blocks.1.hook_h", [f"blocks.1.hook_h.{p}" for p in range(LENGTH)]),
        ("layers[1].ssm.h", [f"blocks.1.hook_h.{p}" for p in range(LENGTH)]),
        ([], []),
    ],
)
def test_names_filter(tiny: MambaTrace, tokens: Tensor, names_filter: Any, expected: list[str]) -> None:
    with torch.no_grad():
        _, everything = tiny.run_with_cache(tokens)
        logits, cache = tiny.run_with_cache(tokens, names_filter)
    assert list(cache) == expected
    for name in expected:
        agree(cache[name], everything[name])
    agree(logits, plain(tiny, tokens))


def test_inner_modules_are_kept_under_their_paths(tiny: MambaTrace, tokens: Tensor) -> None:
    inner = ["in_proj", "conv1d", "x_proj", "dt_proj"]
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens, [f"layers[1].ssm.{name}" for name in inner] + ["blocks.1.hook_C"])
        with tiny.trace(tokens):
            values = [getattr(tiny.layers[1].ssm, name).output for name in inner].save()
    assert list(cache) == [*(f"layers[1].ssm.{name}" for name in inner), "blocks.1.hook_C"]
    for name, value in zip(inner, values, strict=True):
        agree(cache[f"layers[1].ssm.{name}"], value)
    assert torch.equal(cache["blocks.1.mixer.x_proj.hook_out"], cache["layers[1].ssm.x_proj"])


def test_where_the_values_go(demo: MambaTrace) -> None:
    _, cache = demo.run_with_cache(PROMPT, ["blocks.0.hook_y", "blocks.0.hook_h", "blocks.0.hook_A"], device="meta")
    assert {value.device.type for value in cache.values()} == {"meta"}
    _, with_batch = demo.run_with_cache(PROMPT)
    logits, cache = demo.run_with_cache(PROMPT, remove_batch_dim=True)
    assert logits.dim() == 3
    assert torch.equal(cache["blocks.0.hook_A"], with_batch["blocks.0.hook_A"])
    assert torch.equal(cache["blocks.0.hook_h.3"], with_batch["blocks.0.hook_h.3"][0])
    assert torch.equal(cache["h", 2], with_batch["h", 2][0])


def test_no_later_edit_reaches_the_cache(tiny: MambaTrace, tokens: Tensor) -> None:
    """Every hook edits its value in place after the one before it was cached."""

    def scale(value: Tensor, hook: Any) -> None:
        value *= 0.97

    _, cache = tiny.run_with_cache(tokens, fwd_hooks=[(lambda name: True, scale)])
    then = {name: value.clone() for name, value in cache.items()}
    seen = {}

    def see(value: Tensor, hook: Any) -> None:
        value *= 0.97
        seen[hook.name] = value.detach().clone()

    logits, again = tiny.run_with_cache(tokens, fwd_hooks=[(lambda name: True, see)])
    with torch.no_grad():
        logits.zero_()
    assert list(seen) == list(then) == tiny.hook_names(LENGTH)
    for name, value in again.items():
        agree(value, seen[name])
        agree(value, then[name])


def test_padded_rows_are_no_reason_to_warn_unless_a_position_is_named(demo: MambaTrace) -> None:
    texts = [PROMPT, "Emma gave an apple to"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, cache = demo.run_with_cache(texts)
        demo.run_with_hooks(texts, [(lambda name: "hook_h." in name, lambda h, hook: None)])
        _, alone = demo.run_with_cache(texts[1])
    agree(cache["h", 3][1:, -alone.n_positions :], alone["h", 3])
    with pytest.warns(UserWarning, match="left-padded"):
        demo.run_with_hooks(texts, [("blocks.0.hook_h.2", lambda h, hook: None)])


def test_the_warning_of_a_padded_row_is_at_the_users_line(demo: MambaTrace) -> None:
    texts = [PROMPT, "Emma gave an apple to"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        demo.run_with_hooks(texts, [("blocks.0.hook_h.2", lambda h, hook: None)])
        demo.run_with_cache(texts, "blocks.1.hook_h.2")
        hook = ("blocks.2.hook_h.2", lambda h, hook: None)
        HookedMamba.demo()(texts, padding_side="left", fwd_hooks=[hook])
        with demo.trace(texts):
            demo.hook("blocks.3.hook_h.2").output.save()
    padded = [one for one in caught if "left-padded" in str(one.message)]
    for one, call in zip(padded, ("run_with_hooks", "run_with_cache", "HookedMamba", "hook"), strict=True):
        assert one.filename == __file__
        assert call in linecache.getline(one.filename, one.lineno)


# -- parts of the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 3, -1, -3])
def test_stopping_computes_no_more(tiny: MambaTrace, tokens: Tensor, stop: int) -> None:
    _, everything = tiny.run_with_cache(tokens)
    logits, cache = tiny.run_with_cache(tokens, stop_at_layer=stop, return_type="loss")
    last = stop % N_LAYERS if stop < 0 else stop
    if last > 0:
        assert layers_that_ran(tiny) == list(range(last))
    expected = everything["resid_pre", last] if last < N_LAYERS else everything["resid_post", -1]
    agree(logits.detach(), expected)
    assert list(cache) == list(everything)[: len(cache)]
    assert len(cache) == 1 + last * (len(everything) - 3) // N_LAYERS
    agree(tiny.run_with_hooks(tokens, stop_at_layer=stop), logits)


def test_with_nothing_to_return_nothing_is_computed_past_the_last_hook(tiny: MambaTrace, tokens: Tensor) -> None:
    tiny.run_with_hooks(tokens)
    output, cache = tiny.run_with_cache(tokens, "blocks.1.hook_resid_pre", return_type=None)
    assert output is None
    assert list(cache) == ["blocks.1.hook_resid_pre"]
    assert layers_that_ran(tiny) == [0]
    assert tiny.run_with_cache(tokens, [], return_type=None)[0] is None
    agree(tiny.run_with_hooks(tokens).detach(), plain(tiny, tokens))


@pytest.mark.parametrize("start", [0, 1, -1])
def test_a_residual_stream_goes_into_a_layer(tiny: MambaTrace, tokens: Tensor, start: int) -> None:
    expected = plain(tiny, tokens)
    stream = tiny.run_with_hooks(tokens, stop_at_layer=start)
    logits, cache = tiny.run_with_cache(stream, start_at_layer=start)
    agree(logits.detach(), expected)
    assert "hook_embed" not in cache
    computed = list(range(start % N_LAYERS, N_LAYERS))
    assert [layer for layer in range(N_LAYERS) if f"blocks.{layer}.hook_y" in cache] == computed
    assert layers_that_ran(tiny) == computed
    assert torch.equal(tiny.run_with_hooks(stream, start_at_layer=start, stop_at_layer=start), stream)


@pytest.mark.parametrize("only", [[1], [0, -1], [], [0, 1, 2]], ids=str)
def test_other_layers_hand_the_stream_on(exact: MambaTrace, tokens: Tensor, only: list[int]) -> None:
    """Against the reference, whose other layers write nothing."""
    used = {layer % N_LAYERS for layer in only}

    def edit(hook: str, value: Tensor) -> Tensor:
        skipped = hook.endswith("out_proj") and int(hook.split(".")[1]) not in used
        return torch.zeros_like(value) if skipped else value

    logits, cache = exact.run_with_cache(tokens, only_use_these_layers=only)
    agree(logits.detach(), referred(exact, tokens, edit), 1e-10)
    assert {int(name.split(".")[1]) for name in cache if "." in name} == used
    stream = exact.run_with_hooks(tokens, only_use_these_layers=only, stop_at_layer=2)
    streams = {}
    referred(exact, tokens, lambda hook, value: streams.setdefault(hook, edit(hook, value)))
    agree(stream.detach(), streams["blocks.2.hook_resid_pre"], 1e-10)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"stop_at_layer": 4}, LayerError, "stop_at_layer=4: this model has layers 0 to 2"),
        ({"stop_at_layer": -4}, LayerError, "layers 0 to 2"),
        ({"start_at_layer": 3}, LayerError, "start_at_layer=3"),
        ({"start_at_layer": 2, "stop_at_layer": 1}, LayerError, "comes after"),
        ({"only_use_these_layers": [0, 7]}, LayerError, "only_use_these_layers=7"),
        ({"start_at_layer": 1}, PromptError, r"residual stream \[B,L,12\].*not \(3, 9\)"),
        ({"start_at_layer": 1, "return_type": "loss"}, PromptError, "needs tokens"),
        ({"return_type": "logit"}, ValueError, "'logit' is none of 'logits', 'loss', 'both', None"),
        ({"reset_hooks_end": False}, ValueError, r"model\.edit"),
        ({"fast": True}, TypeError, "no argument 'fast'"),
        ({"prepend_bos": True}, PromptError, "prepend_bos is for strings"),
        ({"fwd_hooks": ["hook_embed"]}, TypeError, r"pairs \(name or predicate, fn\), not 'hook_embed'"),
        ({"fwd_hooks": [("hook_embed", 3)]}, TypeError, r"functions fn\(value, hook\), not 3"),
        ({"bwd_hooks": [("hook_embed", lambda one: one)]}, TypeError, r"bwd_hooks: .*signature is \(one\)"),
    ],
)
def test_an_argument_that_does_not_fit(
    tiny: MambaTrace, tokens: Tensor, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        tiny.run_with_hooks(tokens, **arguments)
    with pytest.raises(error, match=match):
        tiny.run_with_cache(tokens, **arguments)


@pytest.mark.parametrize("asked", [[" Emma", " Peter"], None, [[1, 2], [3]]], ids=repr)
def test_directions_are_of_ids_or_of_one_string(demo: MambaTrace, asked: Any) -> None:
    with pytest.raises(PromptError, match=r"of several strings give the ids, \[model.to_single_token"):
        demo.tokens_to_residual_directions(asked)


def test_inputs_that_are_no_prompt(tiny: MambaTrace, tokens: Tensor) -> None:
    with pytest.raises(PromptError, match=r"float32 \(3, 9\).*start_at_layer"):
        tiny.run_with_hooks(tokens.float())
    with pytest.raises(PromptError, match=r"int64 \(1, 3, 9\)"):
        tiny.run_with_hooks(tokens[None])
    with pytest.raises(PromptError, match="no tokenizer"):
        tiny.run_with_hooks(PROMPT)
    for none in (None, [], tokens[:0]):
        with pytest.raises(PromptError, match="a run needs a prompt"):
            tiny.run_with_hooks(none)
    with pytest.raises(PromptError, match="has no tokens"):
        tiny.run_with_cache(tokens[:, :0])
    with pytest.raises(PromptError, match="has no tokens"):
        tiny.run_with_cache(torch.zeros(1, 0, 12), start_at_layer=1)
    with pytest.raises(PromptError, match="token 31 is not in the vocabulary, whose ids are 0 to 30"):
        tiny.run_with_hooks(torch.tensor([[1, 31]]))
    with pytest.raises(PromptError, match="beginning-of-sequence"):
        tiny.run_with_hooks(PROMPT, prepend_bos=True)


@pytest.mark.parametrize("texts", ["", [""], [PROMPT, ""], ["", PROMPT]], ids=str)
def test_a_prompt_without_tokens_is_refused_before_anything_runs(demo: MambaTrace, texts: Any) -> None:
    demo.run_with_hooks(PROMPT)
    before = list(demo.last_run)
    with pytest.raises(PromptError, match="has no tokens"):
        demo.run_with_cache(texts)
    with pytest.raises(PromptError, match="has no tokens"), demo.trace(texts):
        demo.lm_head.output.save()
    with pytest.raises(PromptError, match="has no tokens"), demo.trace() as tracer:  # noqa: PT012
        with tracer.invoke("Emma gave"):
            demo.lm_head.output.save()
        with tracer.invoke(texts):
            demo.lm_head.output.save()
    with pytest.raises(PromptError, match="has no tokens"):
        demo.generate(texts, max_new_tokens=2)
    assert all(run is old for run, old in zip(demo.last_run, before, strict=True))
    with torch.no_grad():  # the token before it is one
        logits = demo.run_with_hooks(texts, prepend_bos=True)
    agree(logits, plain(demo, [demo.tokenizer.bos_token + one for one in ([texts] if texts == "" else texts)]))


def test_a_row_that_the_users_own_mask_leaves_out_is_no_empty_prompt(tiny: MambaTrace, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1] = 0
    with torch.no_grad():
        logits = tiny.run_with_hooks(tokens, attention_mask=mask)
        agree(logits[::2], tiny.run_with_hooks(tokens)[::2])


def test_other_kernels_for_the_runs_that_follow(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(), kernels="reference")
    with torch.no_grad():
        logits = [model.run_with_hooks(tokens)]
        for kernels, backend in (("cpu", "cpu"), ("reference", "reference"), ("auto", "cpu")):
            model.kernels = kernels
            assert model.kernels == kernels
            logits.append(model.run_with_hooks(tokens))
            assert {run.calls[-1].backend for run in model.last_run} == {backend}
    assert not torch.equal(logits[0], logits[1])
    agree(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])
    with pytest.raises(BackendError, match="no backend is called 'fast'; there are auto, reference"):
        model.kernels = "fast"
    assert model.kernels == "auto"


def test_kernels_chosen_before_the_weights_are_loaded_run_afterwards() -> None:
    model = MambaTrace.demo(dispatch=False)
    model.kernels = "reference"
    model.run_with_hooks(PROMPT)
    assert {run.calls[-1].backend for run in model.last_run} == {"reference"}


def test_flags_that_choose_kernels_are_explained_away_once(
    tiny: MambaTrace, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_with, "_warned", False)
    with pytest.warns(DeprecationWarning, match="fast_conv, fast_ssm: not needed") as caught:
        logits = tiny.run_with_hooks(tokens, fast_ssm=True, fast_conv=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run_with_cache(tokens, "hook_embed", fast_ssm=True, warn_disabled_hooks=False)
    assert torch.equal(logits.detach(), plain(tiny, tokens))


def test_not_inside_another_trace(tiny: MambaTrace, tokens: Tensor) -> None:
    expected = plain(tiny, tokens)

    def inside() -> None:
        with tiny.trace(tokens):
            tiny.layers[0].resid_pre.output.save()
            tiny.run_with_hooks(tokens)

    def between_invokes() -> None:
        with tiny.trace() as tracer:
            with tracer.invoke(tokens):
                tiny.layers[0].resid_pre.output.save()
            tiny.run_with_cache(tokens)

    for nested in (inside, between_invokes):
        with pytest.raises(RuntimeError, match="run_with_hooks or run_with_cache is a trace of its own"):
            nested()
    assert torch.equal(plain(tiny, tokens), expected)
    with tiny.session():
        logits = tiny.run_with_hooks(tokens).save()
    assert torch.equal(logits.detach(), expected)


def test_an_edited_model_runs_with_its_edits(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.edit() as (_, edited):
        edited.layers[1].ssm.y.output[:] = 0
    logits, cache = edited.run_with_cache(tokens, ["blocks.1.hook_y", "hook_logits"])
    assert not cache["blocks.1.hook_y"].any()
    assert torch.equal(cache["hook_logits"], logits)
    zero = [("blocks.1.hook_y", lambda y, hook: torch.zeros_like(y))]
    agree(logits.detach(), tiny.run_with_hooks(tokens, zero).detach())


def test_weights_are_loaded_at_the_first_run() -> None:
    model = MambaTrace.demo(dispatch=False)
    assert torch.equal(model.run_with_hooks(PROMPT), MambaTrace.demo().run_with_hooks(PROMPT))


def test_half_precision(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.bfloat16))
    logits, cache = model.run_with_cache(tokens)
    assert logits.dtype == cache["hook_logits"].dtype == torch.bfloat16
    assert cache["blocks.0.hook_h.0"].dtype == torch.float32
    loss = model.run_with_hooks(tokens, return_type="loss")
    assert loss.dtype == torch.float32
    agree(loss, model._module(tokens, labels=tokens).loss, 1e-3)


def test_a_copy_of_the_model_runs_too(tiny: MambaTrace, tokens: Tensor) -> None:
    other = MambaTrace(copy.deepcopy(tiny._module))
    assert torch.equal(other.run_with_hooks(tokens), tiny.run_with_hooks(tokens))
