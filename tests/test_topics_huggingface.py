"""Topics of Hugging Face's tests of models and of generation, one test for each topic and architecture.

What is expected is what Hugging Face's own model says with the same weights: of the same call, or, where its call is
wrong (several tokens on a cache, a step after padding), of a call without cache and padding. Where transformers
refuses, ours refuses in the same words.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import draw_tokens
from topics import both_of, each_architecture, fresh, refusal, same
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from mamba_trace import MambaTrace
from mamba_trace.errors import UnknownSiteError

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
#: Whose `generate` of transformers takes embeddings.
TAKE_EMBEDDINGS = ("mamba", "falcon_mamba", "mamba2", "granitemoehybrid", "jamba")

# -- generation --------------------------------------------------------------------------------------------


@each_architecture
def test_greedy(architecture: str) -> None:
    both = both_of(architecture)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    expected = both.plain.generate(both.tokens, **asked)
    for use_cache in (True, False):
        found = both.model.generate(both.tokens, use_cache=use_cache, **asked)
        assert torch.equal(found.sequences, expected.sequences)
        same(torch.stack(found.logits), torch.stack(expected.logits))


@each_architecture
def test_sampling_with_a_seed(architecture: str) -> None:
    both, found = both_of(architecture), []
    for generate in (both.plain.generate, both.module.generate, both.model.generate):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            asked = {"max_new_tokens": 4, "do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2}
            found.append(generate(both.tokens, **asked))
    assert found[0].shape == (4, 10)
    assert len({tuple(row[6:].tolist()) for row in found[0]}) > 2  # it has sampled
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@each_architecture
def test_beam_search(architecture: str) -> None:
    both = both_of(architecture)
    asked = {
        **GREEDY,
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected, found = (each.generate(both.tokens, **asked) for each in (both.plain, both.model))
    assert torch.equal(found.sequences, expected.sequences)
    same(found.sequences_scores, expected.sequences_scores)


@each_architecture
def test_assisted_generation_is_refused_as_transformers_does(architecture: str) -> None:
    """A recurrent state cannot go back to where the assistant was last right."""
    both = both_of(architecture)
    for asked in ({"assistant_model": both.plain}, {"prompt_lookup_num_tokens": 2}):
        said = refusal(lambda asked=asked: both.plain.generate(both.tokens, **GREEDY, **asked))
        assert said is not None
        assert f"not supported with stateful models, such as {type(both.plain).__name__}" in said
        assert refusal(lambda asked=asked: both.model.generate(both.tokens, **GREEDY, **asked)) == said
    assert torch.equal(both.model.generate(both.tokens, **GREEDY), both.plain.generate(both.tokens, **GREEDY))


# -- caches ------------------------------------------------------------------------------------------------


@each_architecture
def test_a_cache_is_continued(architecture: str) -> None:
    """By a call of several tokens, by a trace, and by generate; without one all tokens are run at once."""
    both, tokens = both_of(architecture), both_of(architecture).tokens
    with torch.no_grad():
        whole = both.plain(tokens).logits
        first = both.module(tokens[:, :3], use_cache=True)
        same(both.module(tokens[:, 3:], cache=copy.deepcopy(first.cache)).logits, whole[:, 3:])
        with both.model.trace(tokens[:, 3:], cache=first.cache):
            logits = both.model.logits.output.save()
    same(logits, whole[:, 3:])
    expected = both.plain.generate(tokens, **{**GREEDY, "max_new_tokens": 5}, use_cache=False)
    half = both.model.generate(tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    rest = both.model.generate(half.sequences, cache=half.cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(rest, expected)


@each_architecture
def test_a_static_cache(architecture: str) -> None:
    both, asked = both_of(architecture), {**GREEDY, "return_dict_in_generate": True}
    expected, found = (
        each.generate(both.tokens, cache_implementation="static", **asked) for each in (both.plain, both.model)
    )
    assert isinstance(found.cache, StaticCache)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences, both.plain.generate(both.tokens, **GREEDY, use_cache=False))


@each_architecture
def test_attention_on_a_static_cache(architecture: str) -> None:
    """The pattern is that on any cache, with nothing on the room for later tokens; without attention it says so."""
    both, patterns = both_of(architecture), []
    model, tokens = both.model, both.tokens
    if not model.attention_layers:
        with pytest.raises(UnknownSiteError, match="has no attention"):
            model.hook("layers[0].attn.pattern")
        return
    attention = model.layers[model.attention_layers[-1]].attn
    for asked in ({"cache_implementation": "static"}, {}):
        with torch.no_grad(), model.generate(tokens, **GREEDY, **asked) as tracer:
            found = [].save()
            for _ in tracer.iter[:4]:
                found.append(attention.pattern.output)
            ids = tracer.result.save()
        patterns.append(list(found))
        assert torch.equal(ids, both.plain.generate(tokens, **GREEDY))
    for step, (static, dynamic) in enumerate(zip(*patterns, strict=True)):
        assert static.shape == (2, 4, 6 if step == 0 else 1, 9)
        assert not static[..., 6 + step :].any()
        both.subject.same(static[..., : 6 + step], dynamic, f"the pattern of step {step}")


# -- padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@each_architecture
def test_padding(architecture: str, side: str) -> None:
    """Each row has the logits, and goes on with the tokens, that it has alone."""
    both, (padded, mask) = both_of(architecture), padded_row(both_of(architecture).tokens, side)
    real = mask.bool()
    with torch.no_grad():
        forward = both.module(padded, attention_mask=mask).logits
    generated = both.model.generate(padded, attention_mask=mask, **GREEDY)[:, 6:]
    for row in range(2):
        alone = padded[row, real[row]][None]
        with torch.no_grad():
            same(forward[row, real[row]], both.plain(alone).logits[0], f"row {row}")
        assert torch.equal(generated[row], both.plain.generate(alone, **GREEDY)[0, alone.shape[1] :])


def padded_row(tokens: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Tokens [2,6] of which the first row has two less, and their mask."""
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    return tokens * mask, mask


# -- embeddings --------------------------------------------------------------------------------------------


@each_architecture
def test_embeddings_go_in(architecture: str) -> None:
    both = both_of(architecture)
    with torch.no_grad():
        embeddings = -1.5 * both.plain.get_input_embeddings()(both.tokens)
        expected = both.plain(inputs_embeds=embeddings).logits
        same(both.module(inputs_embeds=embeddings).logits, expected)
        with both.model.trace(inputs_embeds=embeddings):
            logits = both.model.logits.output.save()
    same(logits, expected)


@each_architecture
def test_generation_from_embeddings(architecture: str) -> None:
    both = both_of(architecture)
    with torch.no_grad():
        embeddings = -1.5 * both.plain.get_input_embeddings()(both.tokens)
    said = refusal(lambda: both.plain.generate(inputs_embeds=embeddings, **GREEDY))
    if architecture in TAKE_EMBEDDINGS:
        assert said is None
        expected = both.plain.generate(inputs_embeds=embeddings, **GREEDY)
        assert expected.shape == (2, 4)
        assert torch.equal(both.model.generate(inputs_embeds=embeddings, **GREEDY), expected)
    else:
        assert said is not None
        assert "doesn't have its forwarding implemented" in said
        assert refusal(lambda: both.model.generate(inputs_embeds=embeddings, **GREEDY)) == said


@pytest.mark.parametrize("size", [20, 40])
@each_architecture
def test_resized_embeddings(architecture: str, size: int) -> None:
    (plain, model), tokens = fresh(architecture), draw_tokens(2, seed=7) % size
    for each in (plain, model._module):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            each.resize_token_embeddings(size, mean_resizing=False)
    tokens[0, 2] = size - 1
    with torch.no_grad():
        with model.trace(tokens):
            embeddings = model.embeddings.output.save()
            logits = model.logits.output.save()
        assert torch.equal(embeddings, plain.get_input_embeddings()(tokens))
        same(logits, plain(tokens).logits)
    assert logits.shape == (2, 6, size)
    assert torch.equal(model.generate(tokens, **GREEDY), plain.generate(tokens, **GREEDY))


# -- checkpoints -------------------------------------------------------------------------------------------


@each_architecture
def test_saved_and_loaded_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    """By Hugging Face's class from ours, and by ours from Hugging Face's: weights and logits."""
    (plain, model), tokens = fresh(architecture, torch.float32), draw_tokens(2, seed=7)
    model._module.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ours = MambaTrace(str(tmp_path / "theirs"), dispatch=True, dtype=torch.float32)
    assert type(theirs) is type(plain)
    assert theirs.state_dict().keys() == plain.state_dict().keys() == ours._module.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
        assert torch.equal(ours._module.state_dict()[name], weight), name
    with torch.no_grad():
        same(ours._module(tokens).logits, plain(tokens).logits)
        assert torch.equal(ours._module(tokens).logits, model._module(tokens).logits)


# -- training ----------------------------------------------------------------------------------------------


@each_architecture
def test_gradient_checkpointing(architecture: str) -> None:
    """The gradients are those without it, and those of Hugging Face's model."""
    (plain, model), tokens = fresh(architecture), draw_tokens(2, seed=7)
    expected = gradients(plain, tokens)
    found = gradients(model._module, tokens)
    runs: list[int] = []
    model._module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner = model.layers[0].norm._module
    inner.register_forward_pre_hook(lambda module, args: runs.append(1))
    again = gradients(model._module, tokens)
    assert len(runs) == 2  # in the backward pass once more
    assert expected.keys() == found.keys() == again.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert (again[name] - found[name]).abs().max() < 1e-12 * largest, name
        assert (found[name] - gradient).abs().max() < 1e-5 * largest, name


def gradients(module: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Of the loss, by the names of the parameters."""
    module.train()
    module.zero_grad()
    module(tokens, labels=tokens).loss.backward()
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


@each_architecture
def test_the_loss_of_labels(architecture: str) -> None:
    both, labels = both_of(architecture), both_of(architecture).tokens.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        expected = both.plain(both.tokens, labels=labels).loss
        same(both.module(both.tokens, labels=labels).loss, expected)
        with both.model.trace(both.tokens, labels=labels):
            loss = both.model.output.loss.save()
    same(loss, expected)


# -- what transformers records -----------------------------------------------------------------------------


@each_architecture
def test_hidden_states(architecture: str) -> None:
    both, module = both_of(architecture), both_of(architecture).module
    with torch.no_grad():
        expected = both.plain(both.tokens, output_hidden_states=True).hidden_states
        found = module(both.tokens, output_hidden_states=True).hidden_states
        with both.model.trace(both.tokens, output_hidden_states=True):
            traced = both.model.output.hidden_states.save()
    assert len(expected) == len(found) == len(traced) == len(both.model.layers) + 1
    for actual, again, value in zip(found, traced, expected, strict=True):
        same(actual, value)
        assert torch.equal(again, actual)
    asked = {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True}
    steps, theirs = (each.generate(both.tokens, **asked).hidden_states for each in (both.model, both.plain))
    same(torch.stack([step[-1][:, -1] for step in steps]), torch.stack([step[-1][:, -1] for step in theirs]))


@each_architecture
def test_attention_and_routers(architecture: str) -> None:
    """What there is of them; a model without attention refuses to choose how it is computed."""
    (plain, model), tokens = fresh(architecture), draw_tokens(2, seed=7)
    said = [refusal(lambda each=each: each.set_attn_implementation("sdpa")) for each in (plain, model._module)]
    assert said[0] == said[1]
    assert (said[0] is not None) == (not model.architecture.hybrid)
    found = []
    for each in (plain, model._module):
        if model.architecture.hybrid:
            each.set_attn_implementation("eager")
        with torch.no_grad():
            found.append(each(tokens, output_attentions=True, output_router_logits=True, labels=tokens))
    expected, actual = found
    parts = [part for kind in model._layout.layers for part in kind.parts]
    layers = {"attentions": parts.count("attn"), "router_logits": parts.count("moe")}
    assert actual.keys() == expected.keys()
    same(actual.loss, expected.loss)
    for name in {"attentions", "router_logits"} & expected.keys():
        assert len(actual[name]) == len(expected[name]) == layers[name]
        for value, theirs in zip(actual[name], expected[name], strict=True):
            same(value.double(), theirs.double(), name)


# -- torch.compile -----------------------------------------------------------------------------------------


@each_architecture
def test_a_compiled_model(architecture: str) -> None:
    """Its numbers are those of the model, and a trace of it is served and edited as ever."""
    both, (_, model) = both_of(architecture), fresh(architecture)
    with torch.no_grad():
        expected = both.plain(both.tokens).logits
        model._module.compile(backend="eager")
        same(model._module(both.tokens, use_cache=False).logits, expected)
        state, logits = edited(model, both.tokens)
        own, theirs = edited(both.model, both.tokens)
        same(model._module(both.tokens, use_cache=False).logits, expected)
    assert torch.equal(state, own)
    assert torch.equal(logits, theirs)
    torch._dynamo.reset()


def edited(model: MambaTrace, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A state and the logits of a run in which the stream and the state are changed."""
    layer = model.ssm_layers[0]
    with model.trace(tokens):
        model.embeddings.output[:] *= 1.5
        model.layers[layer].ssm.h[2].output[:] *= -2
        state = model.layers[layer].ssm.h[4].output.save()
        logits = model.logits.output.save()
    return state, logits
