"""Agreement with Hugging Face's own Mamba, run from a copy taken before the module was made hookable.

Where Hugging Face is itself wrong (several new tokens on a cache that is not empty, padding of a model with
biases, right padding before a decode step), the unpadded run or the full forward is what must be equalled.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModuleFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import forward
from torch import Tensor
from transformers import DynamicCache, MambaForCausalLM

from mamba_trace import MambaTrace

TOLERANCE = 1e-5  # float32, of the largest value
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_bias": True},
    {"use_conv_bias": False, "conv_kernel": 2},
    {"conv_kernel": 4, "time_step_rank": 1, "state_size": 16},
    {"time_step_rank": "auto", "state_size": 3, "expand": 3, "tie_word_embeddings": False},
    {"residual_in_fp32": False, "layer_norm_epsilon": 1e-2, "use_bias": True},
]
BIASES = [{"use_bias": False}, {"use_bias": True}]


def pair(tiny_hf: ModuleFactory, **changes: Any) -> tuple[MambaForCausalLM, MambaTrace]:
    """A plain module and a MambaTrace over another with the same weights."""
    module = tiny_hf(**changes)
    return copy.deepcopy(module), MambaTrace(module)


def agree(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


def empty_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


# -- plain forwards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_every_layer(tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], batch: int) -> None:
    plain, model = pair(tiny_hf, **changes)
    tokens, residuals = tokens[:batch], []
    expected = plain(tokens, output_hidden_states=True)
    untraced = model._module(tokens, output_hidden_states=True)
    agree(untraced.logits, expected.logits)
    for actual, hidden in zip(untraced.hidden_states, expected.hidden_states, strict=True):
        agree(actual, hidden)
    with model.trace(tokens):
        for layer in model.layers:
            residuals.append(layer.resid_post.output.save())
        final = model.norm_f.output.save()
        logits = model.output.logits.save()
    agree(logits, expected.logits)
    for actual, hidden in zip([*residuals, final], expected.hidden_states, strict=True):
        agree(actual, hidden)


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_short_and_long_prompts(tiny_hf: ModuleFactory, length: int) -> None:
    plain, model = pair(tiny_hf)
    tokens = torch.randint(1, 31, (2, length), generator=torch.Generator().manual_seed(0))
    with model.trace(tokens):
        model.layers[1].ssm.h[-1].output.save()
        logits = model.lm_head.output.save()
    agree(logits, plain(tokens).logits)


def test_float64_is_as_near_as_hugging_face_computes(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """Hugging Face rounds A, D and the norms to float32; tests/test_reference.py holds ours to 1e-12."""
    plain, model = pair(tiny_hf, dtype=torch.float64)
    agree(model._module(tokens).logits, plain(tokens).logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_half_precision_is_no_worse_than_hugging_face(
    tiny_hf: ModuleFactory, tokens: Tensor, dtype: torch.dtype, residual_in_fp32: bool
) -> None:
    plain, model = pair(tiny_hf, dtype=dtype, residual_in_fp32=residual_in_fp32)
    exact = forward(plain.state_dict(), plain.config, tokens)
    theirs = plain(tokens).logits
    with model.trace(tokens):
        A = model.layers[1].ssm.A.output.save()
        h = model.layers[1].ssm.h[4].output.save()
        ours = model.output.logits.save()
    assert ours.dtype == theirs.dtype
    assert h.dtype == A.dtype == torch.float32
    assert torch.equal(A, -torch.exp(plain.backbone.layers[1].mixer.A_log.float()))
    size = exact.square().mean().sqrt()
    error, error_of_theirs = ((logits.double() - exact).square().mean().sqrt() / size for logits in (ours, theirs))
    assert error < 8 * torch.finfo(dtype).eps
    assert error < 1.25 * error_of_theirs
    assert (ours.double() - theirs.double()).square().mean().sqrt() / size < 8 * torch.finfo(dtype).eps


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
    assert model._module(tokens, use_cache=False).cache_params is None
    for actual, layer, state in zip(output.cache_params.layers, expected.cache_params.layers, states, strict=True):
        agree(actual.conv_states[0], layer.conv_states[0])
        agree(actual.recurrent_states[0], layer.recurrent_states[0])
        agree(state, layer.recurrent_states[0])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(cuts=st.sets(st.integers(1, 8)), variant=st.sampled_from(VARIANTS), batch=st.sampled_from([1, 3]))
def test_prefill_in_pieces(tiny_hf: ModuleFactory, tokens: Tensor, cuts: set[int], variant: dict[str, Any], batch: int) -> None:  # fmt: skip
    plain, model = pair(tiny_hf, **variant)
    tokens, logits, traced = tokens[:batch], [], []
    expected, cache, traced_cache = plain(tokens).logits, empty_cache(model), empty_cache(model)
    edges = [0, *sorted(cuts), tokens.shape[1]]
    for start, stop in zip(edges, edges[1:], strict=False):
        logits.append(model._module(tokens[:, start:stop], cache_params=cache).logits)
        with model.trace(tokens[:, start:stop], cache_params=traced_cache):
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
    for start, stop in ((0, 4), *((p, p + 1) for p in range(4, 9))):
        with model.trace(tokens[:, start:stop], cache_params=cache):
            h_start = model.layers[1].ssm.h_start.output.save()
            h = model.layers[1].ssm.h[-1].output.save()
            logits = model.lm_head.output.save()
        agree(logits, plain(tokens[:, start:stop], cache_params=theirs).logits)
        agree(logits, full.logits[:, start:stop])
        agree(h, trajectory[:, stop - 1])
        assert torch.equal(h_start, h_before) if start else not h_start.any()  # noqa: F821
        h_before = h.clone()


def test_an_edit_reaches_the_next_piece_through_the_cache(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    _, model = pair(tiny_hf)
    with model.trace(tokens):
        model.layers[1].ssm.h[4].output[:] *= -1
        expected = model.lm_head.output.save()
    cache = empty_cache(model)
    with model.trace(tokens[:, :5], cache_params=cache):
        model.layers[1].ssm.h[-1].output[:] *= -1
        first = model.lm_head.output.save()
    with model.trace(tokens[:, 5:], cache_params=cache):
        second = model.lm_head.output.save()
    agree(torch.cat((first, second), dim=1), expected)


@torch.no_grad()
def test_a_served_initial_state_is_not_the_cache(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """Editing h_start, or a saved h[-1] afterwards, leaves what the cache held alone."""
    _, model = pair(tiny_hf)
    cache = empty_cache(model)
    model._module(tokens[:, :5], cache_params=cache)
    held = cache.layers[1].recurrent_states[0]
    before = held.clone()
    with model.trace(tokens[:, 5:], cache_params=copy.deepcopy(cache)):
        expected = model.lm_head.output.save()
    with model.trace(tokens[:, 5:], cache_params=copy.deepcopy(cache)) as tracer:
        model.layers[1].ssm.h_start.output[:] = 0
        tracer.stop()
    assert torch.equal(held, before)
    with model.trace(tokens[:, 5:], cache_params=cache):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


# -- generate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation(
    tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], batch: int, use_cache: bool
) -> None:
    plain, model = pair(tiny_hf, **changes)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    expected = plain.generate(tokens[:batch], **options)
    assert expected.shape[1] == 15
    assert torch.equal(model._module.generate(tokens[:batch], **options), expected)
    with model.generate(tokens[:batch], **options) as tracer:
        states = [].save()
        for _ in tracer.iter[:6]:
            states.append(model.layers[1].ssm.h[-1].output)
        result = tracer.result.save()
    assert torch.equal(result, expected)
    with model.trace(expected[:, :-1]):
        trajectory = model.layers[1].ssm.h.output.save()
    assert len(states) == 6
    for step, state in enumerate(states):
        agree(state, trajectory[:, 8 + step])


@pytest.mark.parametrize("changes", BIASES, ids=str)
def test_generation_from_padded_prompts(tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any]) -> None:
    plain, model = pair(tiny_hf, **changes)
    padded, mask = padded_batch(tokens, side="left")
    result = model._module.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, pads in enumerate(PADS):
        alone = plain.generate(tokens[row : row + 1, pads:], max_new_tokens=6, do_sample=False)
        assert torch.equal(result[row, -6:], alone[0, -6:])


def test_beam_search(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    assert torch.equal(model._module.generate(tokens, **options), plain.generate(tokens, **options))


# -- padding -----------------------------------------------------------------------------------------------

PADS = (3, 0, 5)


def padded_batch(tokens: Tensor, side: str, pads: tuple[int, ...] = PADS) -> tuple[Tensor, Tensor]:
    """tokens[row, pads[row]:] padded to one length with token 7, which is not the padding token, and the mask."""
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
    """The logits and the last state of layer 2, with nothing, every state or an edited A_bar of layer 1."""
    with model.trace(tokens, **kwargs):
        if look == "A_bar edited":
            model.layers[1].ssm.A_bar.output[:] **= 2
        if look == "states":
            model.layers[1].ssm.h.output.save()
        h_last = model.layers[2].ssm.h[-1].output.save()
        logits = model.lm_head.output.save()
    return logits, h_last


@pytest.mark.parametrize("changes", BIASES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longer_mask", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["one row", "three rows"])
def test_decoding_after_a_padded_prefill(
    tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], side: str, longer_mask: bool, rows: slice
) -> None:
    """The cache after a padded prefill is the cache after the prompt: single steps, and several tokens at once."""
    plain, model = pair(tiny_hf, **changes)
    padded, mask = (value[rows] for value in padded_batch(tokens, side))
    more = tokens.flip(0)[rows][:, :4]
    cache, steps = empty_cache(model), []
    model._module(padded, attention_mask=mask, cache_params=cache)
    for start, stop in ((0, 1), (1, 2), (2, 4)):
        mask = torch.cat((mask, torch.ones_like(more[:, start:stop])), dim=1)
        options = {"attention_mask": mask} if longer_mask else {}
        steps.append(model._module(more[:, start:stop], cache_params=cache, **options).logits)
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
        model._module(padded, attention_mask=mask, cache_params=cache)
        logits = model._module(tokens[:, :1], cache_params=cache).logits
        for row, n in enumerate(pads):
            whole = torch.cat((tokens[row : row + 1, n:], tokens[row : row + 1, :1]), dim=1)
            agree(logits[row], plain(whole).logits[0, -1:])


# -- the module itself -------------------------------------------------------------------------------------


def test_wrapping_changes_no_parameter(tiny_hf: ModuleFactory) -> None:
    module = tiny_hf(use_bias=True)
    before = copy.deepcopy(module)
    MambaTrace(module)
    ours, theirs = module.state_dict(), before.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert [name for name, _ in module.named_buffers()] == [name for name, _ in before.named_buffers()]
    module.load_state_dict(before.state_dict(), strict=True)


def test_two_models_over_one_module(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    module = tiny_hf()
    expected = copy.deepcopy(module)(tokens).logits
    first, second = MambaTrace(module), MambaTrace(module)
    with first.trace(tokens):
        first.layers[0].ssm.h[2].output[:] = 0
        edited = first.lm_head.output.save()
    with second.trace(tokens):
        h = second.layers[0].ssm.h[2].output.save()
        logits = second.lm_head.output.save()
    with first.trace(tokens):
        h_of_first = first.layers[0].ssm.h[2].output.save()
        again = first.lm_head.output.save()
    agree(logits, expected)
    agree(again, expected)
    assert torch.equal(h, h_of_first)
    assert h.any()
    assert not torch.allclose(edited, expected)


def test_a_saved_checkpoint_is_plain_hugging_face(tiny_hf: ModuleFactory, tokens: Tensor, tmp_path: Path) -> None:
    model = MambaTrace(tiny_hf(use_bias=True))
    with model.trace(tokens):
        logits = model.lm_head.output.save()
    model._module.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.backbone.layers[0]).__name__ == "MambaBlock"
    agree(loaded(tokens).logits, logits)
    assert torch.equal(MambaTrace(str(tmp_path), dispatch=True)._module(tokens).logits, logits)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("traced", [False, True])
def test_training(tiny_hf: ModuleFactory, tokens: Tensor, checkpointing: dict[str, Any] | None, traced: bool) -> None:
    plain, model = pair(tiny_hf, use_bias=True)
    module = model._module
    plain.train()
    module.train()
    if checkpointing is not None:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    expected = plain(tokens, labels=tokens).loss
    if traced:
        with model.trace(tokens, labels=tokens):
            model.layers[1].ssm.h[3].output.save()
            loss = model.output.loss.save()
    else:
        loss = module(tokens, labels=tokens).loss
    agree(loss, expected)
    expected.backward()
    loss.backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        agree(ours.grad, theirs.grad, 1e-4)
    assert module.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_an_edit(tiny_hf: ModuleFactory, tokens: Tensor, reentrant: bool) -> None:
    """What checkpointing computes again in the backward pass has the edit too."""

    def gradient(checkpointing: bool) -> Tensor:
        model = MambaTrace(tiny_hf())
        model._module.train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model._module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with model.trace(tokens, labels=tokens):
            model.layers[1].ssm.h[3].output[:] *= -2
            loss = model.output.loss.save()
        loss.backward()
        return model._module.backbone.embeddings.weight.grad

    agree(gradient(checkpointing=True), gradient(checkpointing=False))


def test_inference_mode(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf)
    with torch.inference_mode():
        with model.trace(tokens):
            model.layers[0].ssm.A_bar.output[:, 2] *= 1
            model.layers[1].ssm.h[2].output[:] *= 1
            model.layers[1].ssm.h[-1].output.save()
            logits = model.lm_head.output.save()
        agree(logits, plain(tokens).logits)
