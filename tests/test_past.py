"""Padding stays padding: whatever an edit puts there, the tokens of its row have the values they have alone.

Right is always the same prompt by itself, without padding and without a batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import MODEL_TYPES, TINY, ModuleFactory, agree
from torch import Tensor
from transformers import DynamicCache

from mamba_trace import MambaTrace
from mamba_trace.errors import PromptError
from mamba_trace.flow import knockout, knockout_conv, zero_delta
from mamba_trace.interventions import ablate, steer
from mamba_trace.means import mean_activation
from mamba_trace.modeling.starting import StartingStates

SHORT, LONG, PREFIX = 4, 9, 3
#: Sites of a mixer with positions, inner modules on the way, and an offset that a value of each gets.
SITES = (
    "skip", "x_in", "conv", "ssm_input", "delta_1", "delta_2", "delta", "A_bar", "B", "B_bar", "C", "write",
    "h", "h_read", "y", "ssm_output", "after_skip",
)  # fmt: skip
INNER = ("conv1d.input", "conv1d.output", "in_proj.output", "x_proj.input", "x_proj.output", "dt_proj.output")
#: The same in Mamba-2, which has no x_proj and no dt_proj.
PLACES = {model_type: [*SITES, *INNER, "resid_pre", "norm"] for model_type in TINY}
PLACES["mamba2"] = [place for place in PLACES["mamba2"] if not place.startswith(("x_proj", "dt_proj"))]
PLACES["mamba2"] += ["B_in", "C_in", "B_conv", "C_conv", "inner_norm"]
everywhere = pytest.mark.parametrize("model", TINY, indirect=True)


@pytest.fixture
def model(tiny_hf: ModuleFactory, request: pytest.FixtureRequest) -> MambaTrace:
    model_type = getattr(request, "param", "mamba")
    limits = {"time_step_limit": (0.1, 0.5)} if model_type == "mamba2" else {}
    return MambaTrace(tiny_hf(use_bias=True, conv_kernel=4, dtype=torch.float64, model_type=model_type, **limits))


def padded(tokens: Tensor, side: str, order: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A long and a short row in either order, the short one padded with 7; and the mask."""
    rows, masks = [], []
    for row in order:
        n = (LONG, SHORT)[row]
        pads = torch.full((LONG - n,), 7)
        ones, zeros = torch.ones(n, dtype=torch.long), torch.zeros(LONG - n, dtype=torch.long)
        pair = [(pads, zeros), (tokens[row, :n], ones)]
        pair = pair if side == "left" else pair[::-1]
        rows.append(torch.cat([ids for ids, _ in pair]))
        masks.append(torch.cat([mask for _, mask in pair]))
    return torch.stack(rows), torch.stack(masks)


def prefilled(model: MambaTrace, tokens: Tensor, rows: tuple[int, ...]) -> DynamicCache:
    """A cache with a prefix of each of these rows."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model._module(tokens[list(rows), :PREFIX], cache=cache, use_cache=True)
    return cache


def held(cache: DynamicCache) -> list[Tensor]:
    """What a cache keeps: columns and states of each layer."""
    return [tensor for layer in cache.layers for tensor in (layer.conv_states[0], layer.recurrent_states[0])]


def run(
    model: MambaTrace, ids: Tensor, edit: Callable[[MambaTrace], None], cache: Any, **inputs: Any
) -> tuple[Tensor, list[Tensor]]:
    """The logits of a run with an edit, and what its cache then holds."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with model.trace(ids, cache=cache, use_cache=True, **inputs):
            edit(model)
            logits = model.lm_head.output.save()
    return logits, held(cache)


def compare(
    model: MambaTrace,
    tokens: Tensor,
    edit: Callable[[MambaTrace], None],
    side: str,
    cached: bool,
    orders: Sequence[tuple[int, int]] = ((0, 1), (1, 0)),
) -> None:
    """The same edit on the short prompt alone and in a padded batch of both, in one or both orders."""
    for order in orders:
        ids, mask = padded(tokens[:, PREFIX - 3 :], side, order)
        row = order.index(1)
        cache = prefilled(model, tokens.flip(1), order) if cached else DynamicCache(config=model.config)
        logits, kept = run(model, ids, edit, cache, attention_mask=mask)
        cache = prefilled(model, tokens.flip(1), (1,)) if cached else DynamicCache(config=model.config)
        right, kept_right = run(model, tokens[1:2, PREFIX - 3 :][:, :SHORT], edit, cache)
        agree(logits[row][mask[row] == 1], right[0], 1e-10)
        for ours, theirs in zip(kept, kept_right, strict=True):
            agree(ours[row], theirs[0], 1e-10)


CASES = [(side, cached) for side in ("left", "right") for cached in (False, True)]


@pytest.mark.parametrize(
    ("model", "place"), [(t, place) for t in MODEL_TYPES for place in PLACES[t]], indirect=["model"]
)
@pytest.mark.parametrize(
    ("how", "side", "cached"),
    [*(("in place", *case) for case in CASES), ("assigned", "left", True), ("nan", "left", True),
     ("nan", "right", True)],
)  # fmt: skip
def test_an_edit_everywhere_does_to_a_padded_prompt_what_it_does_to_it_alone(
    model: MambaTrace, tokens: Tensor, place: str, side: str, cached: bool, how: str
) -> None:
    def edit(model: MambaTrace) -> None:
        block = model.layers[1]
        envoy = block if place in ("resid_pre", "norm") else block.ssm
        for name in place.split(".")[:1]:
            envoy = getattr(envoy, name)
        what = "input" if place.endswith(".input") else "output"
        value = getattr(envoy, what)
        if how == "in place":
            value[:] = value * 1.3 + 0.3
        elif how == "assigned":
            setattr(envoy, what, value * 0.7 + 0.2)
        else:  # 0 / 0 where padding is zero, and a factor of 1 elsewhere
            setattr(envoy, what, value * (value / value))

    compare(model, tokens, edit, side, cached, [(0, 1)])


@everywhere
@pytest.mark.parametrize(("side", "cached"), CASES)
def test_several_edits_at_once(model: MambaTrace, tokens: Tensor, side: str, cached: bool) -> None:
    """Neither an input that padding gets, nor the time to write it, is enough; nor are both."""

    def edit(model: MambaTrace) -> None:
        for layer in model.layers[:2]:
            for name in ("x_in", "conv", "ssm_input", "delta", "A_bar", "B", "B_bar", "write"):
                getattr(layer.ssm, name).output[:] += 0.3

    compare(model, tokens, edit, side, cached)


@everywhere
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_state_at_padding_is_the_one_before_it(model: MambaTrace, tokens: Tensor, side: str, cached: bool) -> None:
    ids, mask = padded(tokens, side, (0, 1))
    column = 2 if side == "left" else -1
    started = prefilled(model, tokens, (0, 1)) if cached else DynamicCache(config=model.config)

    def nothing(model: MambaTrace) -> None: ...

    def edit(model: MambaTrace) -> None:
        model.layers[1].ssm.h[column].output[1:] += 1.0

    logits, kept = run(model, ids, nothing, copy.deepcopy(started), attention_mask=mask)
    edited, kept_edited = run(model, ids, edit, copy.deepcopy(started), attention_mask=mask)
    agree(edited[mask == 1], logits[mask == 1], 1e-12)
    for ours, theirs in zip(kept_edited, kept, strict=True):
        agree(ours, theirs, 1e-12)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=rf"{side}-padded by \[0, 5\].*an edit has no effect"),
        model.trace(ids, attention_mask=mask),
    ):
        edit(model)


VERBS = ("steer", "ablate", "zero_delta", "knockout", "cuts after edits", "conv")
ANALYSES = [(t, verb) for t in TINY for verb in (*VERBS, *(("heads",) if t == "mamba2" else ()))]


@pytest.mark.parametrize(("side", "cached"), CASES)
@pytest.mark.parametrize(("model", "verb"), ANALYSES, indirect=["model"])
def test_an_analysis_of_a_padded_prompt(model: MambaTrace, tokens: Tensor, verb: str, side: str, cached: bool) -> None:
    # The same tokens by columns: all, or of the short prompt, which stands at either end.
    some = slice(None)
    sizes = model.layers[1].ssm._module.sizes

    def edit(model: MambaTrace) -> None:
        ssm = model.layers[1].ssm
        direction = torch.linspace(0.1, 0.4, sizes["E"], dtype=torch.float64)
        if verb == "steer":
            steer(ssm.x_in, direction)
            of_states = direction[:, None].expand(-1, sizes["N"])
            steer(ssm.write, of_states.unflatten(0, (-1, sizes["P"])) if "P" in sizes else of_states)
        elif verb == "ablate":
            ablate(ssm.x_in, direction)
            ablate(ssm.ssm_input, direction)
            ablate(ssm.delta, 0.3)
        elif verb == "heads":
            zero_delta(model, some, 0, heads=3)
            steer(ssm.x_in, direction, heads=[0, 3])
            ablate(ssm.B_in, 0.3)
            ablate(ssm.C_conv, 0.2)
            ablate(ssm.delta, 0.3, heads=[1, 2])
            knockout(model, some, some, 2, heads=[1, 4], conv=True)
        elif verb == "zero_delta":
            zero_delta(model, some, 1)
        elif verb == "knockout":
            knockout(model, some, some, 1, conv=True)
        elif verb == "conv":
            ssm.x_in.output[:] += 0.3
            knockout_conv(model, some, some, 1)
        else:
            ssm.ssm_input.output[:] += 0.3
            ssm.delta.output[:] += 0.1
            ssm.delta.output = ssm.delta.output * 1.5
            zero_delta(model, some, 2)

    compare(model, tokens, edit, side, cached)


@everywhere
def test_means_are_over_tokens_alone_after_an_edit(model: MambaTrace, tokens: Tensor) -> None:
    with model.edit() as (_, edited):
        edited.layers[0].ssm.x_in.output[:] += 0.5
    for side in ("left", "right"):
        ids, mask = padded(tokens, side, (0, 1))
        means = mean_activation(edited, ids, "h", 1, attention_mask=mask)[1]
        alone = [mean_activation(edited, tokens[row : row + 1, :n], "h", 1)[1] for row, n in ((0, LONG), (1, SHORT))]
        agree(means, (alone[0] * LONG + alone[1] * SHORT) / (LONG + SHORT), 1e-10)


# -- between a cache and new tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("look", [None, "conv", "conv1d"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("model_type", TINY)
def test_new_tokens_of_several_lengths_after_a_cached_prefix(
    tiny_hf: ModuleFactory, tokens: Tensor, kernels: str, look: str | None, side: str, whole_mask: bool, model_type: str
) -> None:
    model = MambaTrace(tiny_hf(use_bias=True, conv_kernel=4, model_type=model_type), kernels=kernels)
    for n in (1, 2, 3, 5):  # fewer than the convolution is wide, and more
        cache = prefilled(model, tokens, (0, 1))
        suffix = torch.stack((tokens[2, :5], torch.full((5,), 7)))
        mask = torch.ones_like(suffix)
        span = slice(5 - n, None) if side == "left" else slice(None, n)
        suffix[1, span], mask[1] = tokens[2, :n], 0
        mask[1, span] = 1
        given = torch.cat((torch.ones(2, PREFIX, dtype=torch.long), mask), 1) if whole_mask else mask
        with torch.no_grad():
            with model.trace(suffix, cache=cache, attention_mask=given, use_cache=True):
                if look is not None:
                    getattr(model.layers[0].ssm, look).output.save()
                logits = model.lm_head.output.save()
            more = model._module(tokens[:2, -2:], cache=cache, use_cache=True).logits
            for row, length in ((0, 5), (1, n)):
                prompt = torch.cat((tokens[row, :PREFIX], tokens[2, :length], tokens[row, -2:]))
                right = model._module(prompt[None]).logits[0]
                agree(logits[row][mask[row] == 1], right[PREFIX : PREFIX + length])
                agree(more[row], right[-2:])


@everywhere
def test_starting_states_and_padding(model: MambaTrace, tokens: Tensor) -> None:
    cache = prefilled(model, tokens, (0, 1))
    started = StartingStates([], [], [])
    for layer in cache.layers:
        started.add(layer.conv_states[0].transpose(1, 2), layer.recurrent_states[0])
    for side in ("left", "right"):
        ids, mask = padded(tokens, side, (0, 1))
        with torch.no_grad():
            ours = model._module(ids, cache=started, attention_mask=mask, use_cache=False).logits
            theirs = model._module(ids, cache=copy.deepcopy(cache), attention_mask=mask).logits
        agree(ours[mask == 1], theirs[mask == 1], 1e-12)


# -- masks that are none -----------------------------------------------------------------------------------

MASKS: dict[str, tuple[Any, str]] = {
    "nan": ([1.0, float("nan"), 1.0, 1.0], "the value nan"),
    "half": ([1.0, 0.5, 1.0, 1.0], r"the value 0\.5"),
    "two": ([1, 2, 1, 1], "the value 2"),
    "negative": ([1, -1, 1, 1], "the value -1"),
    "between": ([1, 0, 1, 1], r"row 0 is 0 between tokens: \[1, 0, 1, 1\]"),
    "longer": ([0, 1, 1, 1, 1], r"\[1, 4\] of the tokens.*, not \[1, 5\]"),
    "shorter": ([1, 1, 1], r"\[1, 4\] of the tokens.*, not \[1, 3\]"),
    "rows": ([[1, 1, 1, 1]] * 2, r"\[1, 4\] of the tokens.*, not \[2, 4\]"),
    "axes": ([[[[1, 1, 1, 1]] * 4]], r"\[1, 4\] of the tokens.*, not \[1, 1, 4, 4\]"),
}


def two_invokes(model: MambaTrace, ids: Tensor, mask: Tensor) -> None:
    """A trace of two prompts, of which the second has a mask."""
    with model.trace() as tracer:
        with tracer.invoke(ids):
            model.lm_head.output.save()
        with tracer.invoke(input_ids=ids, attention_mask=mask):
            model.lm_head.output.save()


@pytest.mark.parametrize(("mask", "words"), MASKS.values(), ids=list(MASKS))
def test_a_mask_that_is_none_is_refused_before_anything_runs(
    model: MambaTrace, tokens: Tensor, mask: Any, words: str
) -> None:
    given = torch.tensor(mask) if isinstance(mask[0], list) else torch.tensor([mask])
    ids = tokens[:1, :4]
    with pytest.raises(PromptError, match=words):
        model._module(ids, attention_mask=given)
    calls: list[Callable[[], Any]] = [
        lambda: model.run_with_hooks(ids, attention_mask=given),
        lambda: model.run_with_cache(ids, attention_mask=given),
        lambda: model.generate(ids, attention_mask=given, max_new_tokens=1),
        lambda: mean_activation(model, ids, "y", attention_mask=given),
        lambda: model.loss_fn(torch.zeros(1, 4, 31), ids, given),
        lambda: two_invokes(model, ids, given),
    ]
    ran: list[Any] = []
    handle = model._module.register_forward_pre_hook(lambda *_: ran.append(1))
    for call in calls:
        with pytest.raises(PromptError, match=words):
            call()
    handle.remove()
    assert not ran


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float16])
def test_a_mask_of_zeros_and_ones_is_one_in_every_dtype(model: MambaTrace, tokens: Tensor, dtype: torch.dtype) -> None:
    ids, mask = padded(tokens, "left", (0, 1))
    with torch.no_grad():
        right = model.run_with_hooks(ids, attention_mask=mask)
        agree(model.run_with_hooks(ids, attention_mask=mask.to(dtype)), right, 1e-12)
        agree(model.run_with_hooks(ids, attention_mask=mask.tolist()), right, 1e-12)
        agree(model._module(ids, attention_mask=mask.to(dtype)).logits, right.float())


#: Where an edit at one token goes on to later ones, and where it does not.
CARRIED = ("ssm.x_in", "ssm.conv1d.input", "ssm.delta", "ssm.write", "ssm.A_bar", "ssm.h[-1]")
OF_ITS_TOKEN = ("ssm.h", "ssm.h_read", "ssm.conv", "ssm.y", "ssm.C")


@everywhere
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("path", [*CARRIED, *OF_ITS_TOKEN])
def test_an_edit_means_the_same_wherever_the_prompt_is_cut(
    model: MambaTrace, tokens: Tensor, path: str, side: str
) -> None:
    """The last token before a cache is cut off is edited, and so is that token in one call of the whole."""
    place, ids = f"layers[1].{path}", tokens[:1, :LONG]

    def edit(model: MambaTrace, at: int) -> None:
        if path == "ssm.h[-1]":
            state = model.layers[1].ssm.h[at].output
            state *= 0.5
        elif path.endswith(".input"):
            model.layers[1].ssm.conv1d.input[..., at] += 0.5
        else:
            model.hook(place).output[:, at] += 0.5

    with torch.no_grad(), model.trace(ids):
        edit(model, SHORT - 1)
        right = model.lm_head.output[:, SHORT:].save()
    first, mask, at = ids[:, :SHORT], torch.ones(1, SHORT, dtype=torch.long), SHORT - 1
    if side != "none":
        pads = torch.full((1, 2), 7)
        first = torch.cat((pads, first) if side == "left" else (first, pads), dim=1)
        mask = torch.cat((pads * 0, mask) if side == "left" else (mask, pads * 0), dim=1)
        at += 2 * (side == "left")
    cache = DynamicCache(config=model.config)
    run(model, first, lambda model: edit(model, at), cache, attention_mask=mask)
    logits, _ = run(model, ids[:, SHORT:], lambda model: None, cache)
    agree(logits, right, 1e-10)
