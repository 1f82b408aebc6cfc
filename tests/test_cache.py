"""Caches and padding: what is known of the past must not depend on how the tokens were handed over.

Hugging Face is itself wrong where several new tokens meet a cache that is not empty, where a model with
biases is padded, and on a decode step after right padding. So the full, unpadded forward is what must be
equalled.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import VARIANTS, ModuleFactory, agree, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from mamba_trace import MambaTrace

BIASES = [{"use_bias": False}, {"use_bias": True}]


def empty_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


# -- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_cache_holds_what_hugging_face_caches(tiny_hf: ModuleFactory, tokens: Tensor, length: int) -> None:
    plain, model = pair(tiny_hf)
    expected = plain(tokens[:, :length], use_cache=True)
    states = []
    with model.trace(tokens[:, :length], use_cache=True):
        for layer in model.layers:
            states.append(layer.ssm.h[-1].output.save())
        output = model.output.save()
    agree(output.logits, expected.logits)
    assert model._module(tokens, use_cache=False).cache is None
    for actual, layer, state in zip(output.cache.layers, expected.cache.layers, states, strict=True):
        agree(actual.conv_states[0], layer.conv_states[0])
        agree(actual.recurrent_states[0], layer.recurrent_states[0])
        agree(state, layer.recurrent_states[0])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(cuts=st.sets(st.integers(1, 8)), variant=st.sampled_from(VARIANTS), batch=st.sampled_from([1, 3]))
def test_prefill_in_pieces(
    tiny_hf: ModuleFactory, tokens: Tensor, cuts: set[int], variant: dict[str, Any], batch: int
) -> None:
    plain, model = pair(tiny_hf, **variant)
    tokens, logits, traced = tokens[:batch], [], []
    expected, cache, traced_cache = plain(tokens).logits, empty_cache(model), empty_cache(model)
    edges = [0, *sorted(cuts), tokens.shape[1]]
    for start, stop in itertools.pairwise(edges):
        logits.append(model._module(tokens[:, start:stop], cache=cache).logits)
        with model.trace(tokens[:, start:stop], cache=traced_cache):
            model.layers[0].ssm.h[0].output.save()
            model.layers[2].ssm.h.output.save()
            piece = model.lm_head.output.save()
        traced.append(piece)
    agree(torch.cat(logits, dim=1), expected)
    agree(torch.cat(traced, dim=1), expected)


def test_prefill_then_single_steps(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf)
    full, cache, theirs = plain(tokens), empty_cache(model), empty_cache(model)
    with model.trace(tokens):
        trajectory = model.layers[1].ssm.h.output.save()
    held = torch.zeros_like(trajectory[:, 0])
    for start, stop in ((0, 4), *((p, p + 1) for p in range(4, 9))):
        with model.trace(tokens[:, start:stop], cache=cache):
            h_start = model.layers[1].ssm.h_start.output.save()
            h = model.layers[1].ssm.h[-1].output.save()
            logits = model.lm_head.output.save()
        agree(logits, plain(tokens[:, start:stop], cache=theirs).logits)
        agree(logits, full.logits[:, start:stop])
        agree(h, trajectory[:, stop - 1])
        assert torch.equal(h_start, held)
        held = h.clone()


def test_an_edit_reaches_the_next_piece_through_the_cache(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    _, model = pair(tiny_hf)
    with model.trace(tokens):
        model.layers[1].ssm.h[4].output[:] *= -1
        expected = model.lm_head.output.save()
    cache = empty_cache(model)
    with model.trace(tokens[:, :5], cache=cache):
        model.layers[1].ssm.h[-1].output[:] *= -1
        first = model.lm_head.output.save()
    with model.trace(tokens[:, 5:], cache=cache):
        second = model.lm_head.output.save()
    agree(torch.cat((first, second), dim=1), expected)


def test_an_edit_of_the_whole_h_does_not(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """It changes y at its position alone, wherever the prompt is cut."""
    _, model = pair(tiny_hf)
    with model.trace(tokens):
        model.layers[1].ssm.h.output[:, 4] *= -1
        expected = model.lm_head.output.save()
    cache = empty_cache(model)
    with model.trace(tokens[:, :5], cache=cache):
        model.layers[1].ssm.h.output[:, -1] *= -1
        first = model.lm_head.output.save()
    with model.trace(tokens[:, 5:], cache=cache):
        second = model.lm_head.output.save()
    agree(torch.cat((first, second), dim=1), expected)


@torch.no_grad()
def test_a_served_initial_state_is_not_the_cache(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """Editing h_start, or a saved h[-1] afterwards, leaves what the cache held alone."""
    _, model = pair(tiny_hf)
    cache = empty_cache(model)
    model._module(tokens[:, :5], cache=cache)
    held = cache.layers[1].recurrent_states[0]
    before = held.clone()
    with model.trace(tokens[:, 5:], cache=copy.deepcopy(cache)):
        expected = model.lm_head.output.save()
    with model.trace(tokens[:, 5:], cache=copy.deepcopy(cache)) as tracer:
        model.layers[1].ssm.h_start.output[:] = 0
        tracer.stop()
    assert torch.equal(held, before)
    with model.trace(tokens[:, 5:], cache=cache):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


# -- padding -----------------------------------------------------------------------------------------------

PADS = (3, 0, 5)


def padded_batch(tokens: Tensor, side: str, pads: tuple[int, ...] = PADS) -> tuple[Tensor, Tensor]:
    """tokens[row, pads[row]:] padded to one length with 7, which is not the padding token, and the mask."""
    padded, mask = torch.full_like(tokens, 7), torch.zeros_like(tokens)
    for row, n in enumerate(pads):
        span = slice(n, None) if side == "left" else slice(None, tokens.shape[1] - n)
        padded[row, span] = tokens[row, n:]
        mask[row, span] = 1
    return padded, mask


@pytest.mark.parametrize("changes", [*BIASES, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 4}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["one row", "three rows"])
@pytest.mark.parametrize("look", ["nothing", "states", "A_bar edited"])
def test_padding_changes_nothing(
    tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], side: str, rows: slice, look: str
) -> None:
    _, model = pair(tiny_hf, **changes)
    padded, mask = (value[rows] for value in padded_batch(tokens, side))
    logits, h_last = look_at(model, look, padded, attention_mask=mask)
    for row, pads in enumerate(PADS[rows]):
        alone, h = look_at(model, look, tokens[rows][row : row + 1, pads:])
        agree(logits[row][mask[row] == 1], alone[0])
        agree(h_last[row], h[0])


def look_at(model: MambaTrace, look: str, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The logits and the last state of layer 2, with nothing, a site or every state of layer 1 looked at."""
    with model.trace(tokens, **kwargs):
        if look == "A_bar edited":
            model.layers[1].ssm.A_bar.output[:] **= 2
        if look == "states":
            model.layers[1].ssm.h.output.save()
        h_last = model.layers[2].ssm.h[-1].output.save()
        logits = model.lm_head.output.save()
    return logits, h_last


def test_time_that_an_edit_gives_to_padding_writes_nothing(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """The input of the state space is zero on padding, whatever the biases: no step size can write it."""
    _, model = pair(tiny_hf, use_bias=True)
    padded, mask = padded_batch(tokens, "left")
    with model.trace(padded, attention_mask=mask):
        x = model.layers[1].ssm.ssm_input.output.save()
        model.layers[1].ssm.delta.output[:] += 0.3
        logits = model.lm_head.output.save()
    assert not x[mask == 0].any()
    for row, pads in enumerate(PADS):
        with model.trace(tokens[row : row + 1, pads:]):
            model.layers[1].ssm.delta.output[:] += 0.3
            alone = model.lm_head.output.save()
        agree(logits[row, pads:], alone[0])


@pytest.mark.parametrize("changes", BIASES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longer_mask", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["one row", "three rows"])
def test_decoding_after_a_padded_prefill(
    tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], side: str, longer_mask: bool, rows: slice
) -> None:
    """The cache after a padded prefill is that after the prompt: single steps, several tokens at once."""
    plain, model = pair(tiny_hf, **changes)
    padded, mask = (value[rows] for value in padded_batch(tokens, side))
    more = tokens.flip(0)[rows][:, :4]
    cache, steps = empty_cache(model), []
    model._module(padded, attention_mask=mask, cache=cache)
    for start, stop in ((0, 1), (1, 2), (2, 4)):
        mask = torch.cat((mask, torch.ones_like(more[:, start:stop])), dim=1)
        options = {"attention_mask": mask} if longer_mask else {}
        steps.append(model._module(more[:, start:stop], cache=cache, **options).logits)
    logits = torch.cat(steps, dim=1)
    for row, pads in enumerate(PADS[rows]):
        whole = torch.cat((tokens[rows][row : row + 1, pads:], more[row : row + 1]), dim=1)
        agree(logits[row], plain(whole).logits[0, -4:])


def test_a_prompt_of_fewer_tokens_than_the_convolution(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf, conv_kernel=4, use_bias=True)
    pads = (8, 7, 6)
    for side in ("left", "right"):
        padded, mask = padded_batch(tokens, side, pads)
        cache = empty_cache(model)
        model._module(padded, attention_mask=mask, cache=cache)
        logits = model._module(tokens[:, :1], cache=cache).logits
        for row, n in enumerate(pads):
            whole = torch.cat((tokens[row : row + 1, n:], tokens[row : row + 1, :1]), dim=1)
            agree(logits[row], plain(whole).logits[0, -1:])


@pytest.mark.parametrize("changes", BIASES, ids=str)
def test_generation_from_padded_prompts(tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any]) -> None:
    plain, model = pair(tiny_hf, **changes)
    padded, mask = padded_batch(tokens, side="left")
    result = model._module.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, pads in enumerate(PADS):
        alone = plain.generate(tokens[row : row + 1, pads:], max_new_tokens=6, do_sample=False)
        assert torch.equal(result[row, -6:], alone[0, -6:])
