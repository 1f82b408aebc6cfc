"""Hybrids: every site in float64 against tests/reference_hybrid.py, and Hugging Face's logits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from conftest import near
from hybrid_models import HYBRIDS, PLAIN, make_hybrid
from hybrid_oracle import lift_limit
from reference import Edit
from reference_hybrid import forward
from reference_hybrid_mixers import rotary
from subjects import L, Subject, distance, draw_tokens

from mamba_trace import MambaTrace
from mamba_trace.errors import PromptError, SiteValueError, UnknownSiteError
from mamba_trace.modeling import attention
from mamba_trace.names.layouts import SAME_AS

#: The kinds whose logits Hugging Face computes rightly; it holds Nemotron-H's delta within limits of its own.
RIGHT = [kind for kind in HYBRIDS if kind != "nemotron_h, limits"]
plain = pytest.mark.parametrize("kind", PLAIN)
every = pytest.mark.parametrize("kind", HYBRIDS)


@functools.cache
def made(kind: str) -> Subject:
    """Of a kind, made once for all tests, none of which may change it."""
    return Subject(make_hybrid(kind, dtype=torch.float64))


@every
def test_every_site_in_float64(kind: str) -> None:
    setup, tokens = made(kind), draw_tokens(2, seed=2)
    expected, actual = dict(setup.values(tokens)), {}
    with torch.no_grad(), setup.model.trace(tokens):
        for path in expected:
            if path.rsplit(".", 1)[-1] not in SAME_AS or path in setup.hooks:
                actual[path] = setup.model.hook(path).output.save()
    walked = {site.path(layer) for site, layer in setup.model._layout.walk()}
    assert walked == {path for path in actual if not path.endswith("]")}
    for path, value in actual.items():
        assert value.dtype == torch.float64
        near(value, expected[path], 1e-12, path)


@pytest.mark.parametrize("kind", RIGHT)
def test_logits_are_hugging_face_s(kind: str) -> None:
    module, tokens = make_hybrid(kind), draw_tokens(3, seed=3, length=9)
    with torch.no_grad():
        expected = copy.deepcopy(module)(tokens).logits
        exact = forward({k: v.double() for k, v in module.state_dict().items()}, module.config, tokens)
        actual = MambaTrace(module)._module(tokens).logits
    near(actual, expected, 6e-6 if kind.startswith("zamba2") else 3e-6)
    assert distance(actual, exact) < max(1e-6, 3 * distance(expected, exact))  # either rounds to float32


def test_the_limit_of_nemotron_h_is_the_configuration_s() -> None:
    module, tokens = make_hybrid("nemotron_h, limits", dtype=torch.float64), draw_tokens(2, seed=3)
    lifted = copy.deepcopy(module)
    with torch.no_grad():
        wrong = lifted(tokens).logits
        lift_limit(lifted)
        expected = lifted(tokens).logits
        actual = MambaTrace(module)._module(tokens).logits
    near(actual, expected, 1e-6)
    assert distance(actual, wrong) > 0.1


def rounding(kind: str) -> float:
    """How far equal logits may differ: transformers makes the cosines of rotary embeddings in float32."""
    return 1e-11 if rotary(made(kind).config, 1) is None else 1e-6


@every
def test_decoding_and_padding_change_nothing(kind: str) -> None:
    """Calls of several tokens on a cache, a mask in each, and rows that are padded on either side."""
    module, tokens = made(kind).module, draw_tokens(3, seed=4, length=9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[1, 6:] = 0, 0
    with torch.no_grad():
        whole = module(tokens).logits
        cache = None
        for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
            out = module(tokens[:, start:stop], cache=cache, use_cache=True)
            cache = out.cache
            near(out.logits, whole[:, start:stop], 1e-11)
        padded = module(tokens, attention_mask=mask, use_cache=True)
        left, right = module(tokens[:1, 4:]).logits, module(tokens[1:2, :6]).logits
        near(padded.logits[:1, 4:], left, rounding(kind))
        near(padded.logits[1:2, :6], right, rounding(kind))
        more = module(tokens[:, :1], cache=padded.cache, attention_mask=torch.cat((mask, mask[:, -1:] | 1), 1)).logits
        near(more[0], module(torch.cat((tokens[0, 4:], tokens[0, :1]))[None]).logits[0, -1:], rounding(kind))
        near(more[1], module(torch.cat((tokens[1, :6], tokens[1, :1]))[None]).logits[0, -1:], rounding(kind))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("kind", [*PLAIN, "granitemoehybrid, no SSM"])
def test_padding_in_a_cache_stays_padding(kind: str) -> None:
    """Whatever the mask of a later call says of the cache's columns, and whatever the cache is called."""
    setup, tokens, more = made(kind), draw_tokens(2, seed=12, length=7), draw_tokens(2, seed=13, length=3)
    rows = [torch.cat((tokens[0], more[0])), torch.cat((tokens[1, 3:], more[1]))]
    expected = torch.stack([setup.forward(row[None])[0, -3:].detach() for row in rows])
    own = torch.ones_like(more)
    for side in (-1, 1):
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0
        padded = tokens.clone()
        if side > 0:
            mask[1], padded[1] = mask[1].flip(0), tokens[1].roll(-3)
        whole = torch.cat((mask, own), dim=1)
        for name, given in (("cache", None), ("cache", own), ("cache", whole), ("past_key_values", whole)):
            with torch.no_grad(), setup.model.trace(padded, attention_mask=mask, use_cache=True) as tracer:
                first = tracer.result.save()
            cache = copy.deepcopy(first.cache)
            with torch.no_grad(), setup.model.trace(more, attention_mask=given, **{name: first.cache}):
                logits = setup.model.logits.output.save()
            near(logits, expected, rounding(kind))
        with pytest.raises(PromptError, match=r"on a cache of 7 tokens takes .* attention_mask= of all, \[2, 10"):
            setup.model.generate(more, cache=cache, max_new_tokens=1)
        ids = setup.model.generate(more, attention_mask=whole, cache=cache, max_new_tokens=1, do_sample=False)
        assert torch.equal(ids[:, -1], expected[:, -1].argmax(-1))
        with pytest.raises(PromptError, match=r"of the shape \[2, 1\].* or, with the 10 in the cache, \[2, 11\], not"):
            setup.module(more[:, :1], attention_mask=whole[:, :4], cache=cache)


@pytest.mark.parametrize("kind", [*PLAIN, "granitemoehybrid, no SSM"])
def test_generation_goes_on_from_padding_in_a_cache(kind: str) -> None:
    """With all ids, as transformers takes them, or the new ones; with the mask of all, or none but the cache's own."""
    setup, tokens, more = made(kind), draw_tokens(2, seed=12, length=7), draw_tokens(2, seed=13, length=3)
    settings = {"max_new_tokens": 3, "do_sample": False}
    rows = [torch.cat((tokens[0], more[0])), torch.cat((tokens[1, 3:], more[1, :2]))]
    expected = torch.stack([setup.model.generate(row[None], **settings)[0, -3:] for row in rows])
    for side in ("left", "right"):
        mask, last = torch.ones(2, 10, dtype=torch.long), more.clone()
        mask[1, :3], mask[1, -1] = 0, 0  # the second row has three tokens less before, and one less now
        padded = tokens.clone()
        if side == "right":
            mask[1, :7], padded[1] = mask[1, :7].flip(0), tokens[1].roll(-3)
        with torch.no_grad():
            cache = setup.module(padded, attention_mask=mask[:, :7], use_cache=True).cache
        ids = torch.cat((padded, last), dim=1)
        for given in (ids, last):
            found = setup.model.generate(given, attention_mask=mask, cache=copy.deepcopy(cache), **settings)
            assert torch.equal(found[:, -3:], expected), side
        full = torch.stack([setup.model.generate(row[None], **settings)[0, -3:] for row in (ids[0], rows[1])])
        ids[1, 7:] = torch.cat((more[1, :2], more[1, :1]))
        row = torch.cat((tokens[1, 3:], ids[1, 7:]))
        full[1] = setup.model.generate(row[None], **settings)[0, -3:]
        found = setup.model.generate(ids, cache=copy.deepcopy(cache), **settings)
        assert torch.equal(found[:, -3:], full), "the cache knows its padding"
        mask[0, 8] = 0
        with pytest.raises(PromptError, match="between"):
            setup.model.generate(ids, attention_mask=mask, cache=copy.deepcopy(cache), **settings)


@pytest.mark.parametrize("kind", [*PLAIN, "granitemoehybrid, no SSM"])
def test_a_cache_whose_rows_were_reordered_says_that_it_lost_its_padding(kind: str) -> None:
    module, tokens, more = made(kind).module, draw_tokens(2, seed=12, length=7), draw_tokens(2, seed=13, length=2)
    mask, own, swap = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 2, dtype=torch.long), torch.tensor([1, 0])
    mask[0, :3] = 0
    with torch.no_grad():
        first, second = module(torch.cat((tokens, more), 1)).logits[:, -2:]
        short = module(torch.cat((tokens[:1, 3:], more[:1]), 1)).logits[0, -2:]
        padded, full = (module(tokens, attention_mask=m, use_cache=True).cache for m in (mask[:, :7], None))
        for cache in (padded, full):
            cache.reorder_cache(swap)
        near(module(more[swap], cache=full).logits, torch.stack((second, first)), 1e-11)
        for given in (None, own):
            with pytest.raises(PromptError, match=r"rows were reordered.*: give the attention_mask of all columns"):
                module(more[swap], attention_mask=given, cache=copy.deepcopy(padded))
        logits = module(more[swap], attention_mask=mask[swap], cache=padded).logits
        near(logits, torch.stack((second, short)), rounding(kind))


@plain
def test_a_single_column_of_padding_moves_nothing(kind: str) -> None:
    """transformers takes it for a token, as it has no padding in its own decoding."""
    setup, tokens, more = made(kind), draw_tokens(2, seed=12, length=7), draw_tokens(2, seed=13, length=2)
    rows = [torch.cat((tokens[0], more[0])), torch.cat((tokens[1], more[1, 1:]))]
    expected = torch.stack([setup.forward(row[None])[0, -1].detach() for row in rows])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7] = 0
    for whole in (True, False):
        with torch.no_grad():
            cache = setup.module(tokens, use_cache=True).cache
            for start in (7, 8):
                column = mask[:, (0 if whole else start) : start + 1]
                with setup.model.trace(more[:, start - 7 : start - 6], attention_mask=column, cache=cache):
                    logits = setup.model.logits.output.save()
        near(logits[:, -1], expected, rounding(kind))


@every
def test_generate_is_greedy_decoding(kind: str) -> None:
    setup, tokens = made(kind), draw_tokens(2, seed=5)
    ids, steps = tokens, 4
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, setup.module(ids).logits[:, -1:].argmax(-1)), dim=1)
    layer = setup.model.layers[0]
    with torch.no_grad(), setup.model.generate(tokens, max_new_tokens=steps, do_sample=False) as tracer:
        seen = [].save()
        for _ in tracer.iter[:steps]:
            seen.append(layer.resid_post.output)
        generated = tracer.result.save()
    assert torch.equal(generated, ids)
    assert [value.shape[1] for value in seen] == [L] + [1] * (steps - 1)


@plain
def test_an_edit_of_the_state_is_carried_through_decoding(kind: str) -> None:
    setup, tokens = made(kind), draw_tokens(1, seed=6)
    layer, reference = setup.model.ssm_layers[0], draw_tokens(1, seed=6)
    with torch.no_grad(), setup.model.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
        logits = [].save()
        for step in tracer.iter[:3]:
            if step == 0:
                setup.model.layers[layer].ssm.h[2].output[:] *= -3
            logits.append(setup.model.logits.output[:, -1])
        reference = tracer.result.save()
    scaled = Edit(f"layers[{layer}].ssm.h[2]", "scale", -3.0)
    expected = forward(
        setup.weights, setup.config, reference[:, :-1], lambda path, v: scaled(v) if path == scaled.hook else v
    )
    near(torch.stack(logits, dim=1), expected[:, L - 1 :], rounding(kind))


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        *((kind, "eager") for kind in PLAIN),
        *((kind, "grouped_mm") for kind in ("nemotron_h", "granitemoehybrid", "jamba")),
    ],
)
def test_a_scan_has_every_shape(kind: str, experts: str) -> None:
    """Also behind experts, to which a fake tensor has no numbers to go by."""
    model, tokens = MambaTrace(make_hybrid(kind, experts_implementation=experts)), draw_tokens(2, seed=11)
    paths = [site.path(layer) for site, layer in model._layout.walk()]
    with model.scan(tokens):
        shapes = {path: model.hook(path).output.shape for path in paths}.save()
    with torch.no_grad(), model.trace(tokens):
        values = {path: model.hook(path).output.shape for path in paths}.save()
    assert shapes == values


@every
def test_a_layer_without_a_part_says_who_has_it(kind: str) -> None:
    model = made(kind).model
    assert len(model.layer_kinds) == len(model.layers)
    for layer in range(len(model.layers)):
        for part, having in (("ssm", model.ssm_layers), ("attn", model.attention_layers)):
            if layer in having:
                assert getattr(model.layers[layer], part) is not None
                continue
            there = "these have one: " if having else "no layer of this model has one"
            with pytest.raises(UnknownSiteError, match=rf"layers\[{layer}\] is .* and has no {part}; {there}"):
                getattr(model.layers[layer], part)
            path = f"layers[{layer}].ssm.y" if part == "ssm" else f"layers[{layer}].attn.z"
            with pytest.raises(UnknownSiteError, match=rf"{layer}\] is .* and has no {part}; {there}"):
                model.hook(path)


@plain
def test_the_output_of_a_block_is_a_tensor_whatever_its_module_returns(kind: str) -> None:
    model, tokens = made(kind).model, draw_tokens(2, seed=7)
    layer = len(model.layers) - 1
    with torch.no_grad(), model.trace(tokens):
        post = model.layers[layer].resid_post.output.save()
        output = model.layers[layer].output.save()
    assert torch.equal(post, output)
    new, results = torch.randn_like(post), []
    for how in ("site", "output", "in place", "skip"):
        with torch.no_grad(), model.trace(tokens):
            if how == "skip":
                model.layers[layer].skip(new)
            elif how == "site":
                model.layers[layer].resid_post.output = new
            elif how == "output":
                model.layers[layer].output = new
            else:
                model.layers[layer].output[:] = new
            results.append(model.logits.output.save())
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(SiteValueError, match="takes shape"), torch.no_grad(), model.trace(tokens):
        model.layers[layer].output = new[:, 1:]


@plain
def test_the_terms_add_up_to_the_stream(kind: str) -> None:
    model, tokens = made(kind).model, draw_tokens(2, seed=8)
    terms = ("ssm_out", "attn_out", "mlp_out")
    with torch.no_grad(), model.trace(tokens):
        total = model.layers[0].resid_pre.output.clone()
        for layer in range(len(model.layers)):
            for name in terms:
                if name == "ssm_out" and layer not in model.ssm_layers:
                    continue
                if name == "ssm_out" or name in model._layout.layers[layer].parts:
                    total += getattr(model.layers[layer], name).output
        last = model.layers[-1].resid_post.output.save()
        total.save()
    near(total, last, 1e-13)


@plain
def test_the_pattern_is_made_only_where_it_is_wanted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, patterns = made(kind).model, draw_tokens(1, seed=9), []
    layer = model.attention_layers[-1]
    own = attention.pattern_of
    monkeypatch.setattr(attention, "pattern_of", lambda *inputs: patterns.append(1) or own(*inputs))
    with torch.no_grad(), model.trace(tokens):
        pattern = model.layers[layer].attn.pattern.output.save()
        z = model.layers[layer].attn.z.output.save()
    assert len(patterns) == 1
    with torch.no_grad(), model.trace(tokens):
        plain = model.layers[layer].attn.z.output.save()
    assert len(patterns) == 1
    near(z, plain, 1e-13)
    near(pattern.sum(-1), torch.ones_like(pattern[..., 0]), 1e-13)
    assert not pattern.triu(1).any()


@plain
def test_a_loss_is_that_of_the_logits_as_they_were_edited(kind: str) -> None:
    model, tokens = made(kind).model, draw_tokens(2, seed=10)
    with torch.no_grad(), model.trace(tokens, labels=tokens):
        model.lm_head.output[:] *= 0.5
        logits, output = model.logits.output.save(), model.output.save()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    near(output.loss.double(), expected.double(), 1e-6)


@plain
def test_what_transformers_collects_is_what_the_trace_made_of_it(kind: str) -> None:
    model, tokens = MambaTrace(make_hybrid(kind, attn_implementation="eager")), draw_tokens(2, seed=14)
    refused = pytest.raises(PromptError, match="output_attentions= takes True or False, not 'all'")
    with refused, model.trace(tokens, output_attentions="all"):
        pass
    layer = model.attention_layers[0]
    with torch.no_grad(), model.trace(tokens, output_attentions=True, return_dict=False) as tracer:
        model.layers[layer].attn.pattern.output[:, 1] = 0.25
        edited = tracer.result.save()
    assert isinstance(edited, tuple)
    assert (edited[-1][0][:, 1] == 0.25).all()


@every
def test_every_hook_name_is_that_of_its_place(kind: str) -> None:
    model = made(kind).model
    hooks = model.hook_names(2)
    assert len(hooks) == len(set(hooks))
    for name in hooks:
        place = model._place(name)
        assert place.hook_name == name
        assert model._place(place.path) == place
        assert model.hook(name) is not None


def test_names_of_transformer_lens_mean_what_they_mean_there() -> None:
    granite, falcon = made("granitemoehybrid").model, made("falcon_h1").model
    same = {
        "blocks.1.ln1.hook_in": "layers[1].layer_input",
        "blocks.1.ln1.hook_out": "layers[1].norm",
        "blocks.1.attn.hook_q": "layers[1].attn.q",
        "blocks.1.attn.hook_pattern": "layers[1].attn.pattern",
        "blocks.1.hook_resid_mid": "layers[1].resid_mid",
        "blocks.1.ln2.hook_in": "layers[1].resid_mid",
        "blocks.1.ln2.hook_out": "layers[1].norm_2",
        "blocks.1.hook_mlp_out": "layers[1].mlp_out",
        "unembed.hook_out": "lm_head",
        "hook_logits": "logits",
    }
    for model in (granite, falcon):
        assert {name: model._place(name).path for name in same} == same
    assert granite._place("blocks.1.hook_attn_out").path == "layers[1].attn_out"
    assert falcon._place("blocks.1.hook_attn_term").path == "layers[1].attn_out"
    assert falcon._place("blocks.0.mamba.hook_out").path == "layers[0].ssm.out_proj"
    with pytest.raises(UnknownSiteError, match=r"before the model's factor: that is layers\[1\].attn.output"):
        falcon.hook("blocks.1.hook_attn_out")
    with pytest.raises(UnknownSiteError, match=r"times a factor of the model: that is layers\[1\].ssm.in_proj.input"):
        falcon.hook("blocks.1.mamba.in_proj.hook_in")
    assert granite._place("blocks.0.mixer.in_proj.hook_in").path == "layers[0].norm"
    assert granite._place("blocks.0.mixer.out_proj.hook_in").path == "layers[0].ssm.inner_norm"
    for kind in ("falcon_h1", "falcon_h1, norm before gate"):
        with pytest.raises(UnknownSiteError, match=r"no norm stands before: that is layers\[1\].ssm.after_skip"):
            made(kind).model.hook("blocks.1.mamba.out_proj.hook_in")
    after = made("falcon_h1, norm after gate").model
    assert after._place("blocks.1.mamba.out_proj.hook_in").path == "layers[1].ssm.inner_norm"


def test_logits_are_lm_head_s_where_the_model_returns_these() -> None:
    model = made("bamba").model
    assert model.logits is model.lm_head
    assert model.hook("logits") is model.lm_head
    assert model._place("hook_logits").path == "lm_head"


WITHOUT_ATTENTION: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp"]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": []},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 7, "attn_layer_offset": 6},
}


@pytest.mark.parametrize("kind", WITHOUT_ATTENTION)
def test_a_model_without_attention_decodes(kind: str) -> None:
    """transformers' cache cannot count its tokens, and Hugging Face's own model raises."""
    model = MambaTrace(make_hybrid(kind, dtype=torch.float64, **WITHOUT_ATTENTION[kind]))
    tokens, module = draw_tokens(2, seed=11, length=9), model._module
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        whole, padded = module(tokens).logits, module(tokens, attention_mask=mask).logits
        first = module(tokens[:, :5], use_cache=True)
        near(module(tokens[:, 5:], cache=first.cache).logits, whole[:, 5:], 1e-12)
        near(padded[:1, 3:], module(tokens[:1, 3:]).logits, 1e-12)
        first = module(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)
        near(module(tokens[:, 5:], attention_mask=mask, cache=first.cache).logits, padded[:, 5:], 1e-12)
    # transformers' generate counts the tokens of a cache in which any layer, an MLP too, is no linear attention.
    cached = {"use_cache": kind != "nemotron_h"}
    assert model.generate(tokens, max_new_tokens=2, do_sample=False, **cached).shape == (2, 11)


@pytest.mark.parametrize("before", [False, True], ids=["wrapped first", "recorded before"])
@pytest.mark.parametrize("kind", [*PLAIN, "zamba, no conv bias"])
def test_hidden_states_have_the_edits_of_the_layers(kind: str, before: bool) -> None:
    """However a layer's output is edited, and where transformers records a block inside of it."""
    module, tokens = make_hybrid(kind, dtype=torch.float64), draw_tokens(2, seed=1)
    if before:
        module(tokens, output_hidden_states=True)
    model = MambaTrace(module)
    with torch.no_grad():
        plain = module(tokens, output_hidden_states=True).hidden_states
    assert len(plain) == len(model.layers) + 1
    for number, layer in enumerate(model.layers[:-1]):
        new = plain[number + 1] * 1.5
        for way in ("resid_post", "output", "skip", "in place"):
            with torch.no_grad(), model.trace(tokens, output_hidden_states=True) as tracer:
                if way == "resid_post":
                    layer.resid_post.output = new
                elif way == "output":
                    layer.output = new
                elif way == "skip":
                    layer.skip(new)
                else:
                    layer.resid_post.output[:] = new
                result = tracer.result.save()
            states = result.hidden_states
            assert len(states) == len(plain)
            assert all(torch.equal(one, other) for one, other in zip(states[: number + 1], plain, strict=False))
            assert torch.equal(states[number + 1], new), way
