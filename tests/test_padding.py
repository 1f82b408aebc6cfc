"""Which tokens are padding: the same from strings, tokens, views, lists and encodings, on either side."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from conftest import agree
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamba_trace import MambaTrace
from mamba_trace.arguments.padding import likely_mask, remembered
from mamba_trace.errors import PromptError
from mamba_trace.hidden_attention import hidden_attention
from mamba_trace.mamba_lens import HookedMamba
from mamba_trace.means import mean_activation
from mamba_trace.patching import logit_diff, patch_grid

SHORT = "Shelby gave an apple to"
LONG = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SOURCE = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
PAD, N_SHORT, N_LONG = 0, 5, 15


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(autouse=True)
def _loud() -> Any:
    """What is right is said without a warning."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        yield


def columns(side: str) -> slice:
    """Where the short prompt stands in a batch with the long one."""
    return slice(-N_SHORT, None) if side == "left" else slice(None, N_SHORT)


def alone(model: MambaTrace) -> tuple[Tensor, Tensor]:
    """The logits of each prompt by itself."""
    return model.run_with_hooks(SHORT)[0], model.run_with_hooks(LONG)[0]


def mean_loss(demo: MambaTrace) -> Tensor:
    """The loss of both prompts, each by itself, over all pairs of tokens."""
    each = [demo.run_with_hooks(text, return_type="loss", loss_per_token=True)[0] for text in (SHORT, LONG)]
    return torch.cat(each).mean()


# -- tokens remember ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_strings_know_their_padding_everywhere(demo: MambaTrace, side: str) -> None:
    tokens = demo.to_tokens([SHORT, LONG], padding_side=side)
    assert type(tokens) is Tensor
    short, long = alone(demo)
    logits, loss = demo.run_with_hooks(tokens, return_type="both")
    agree(logits[0, columns(side)], short)
    agree(logits[1], long)
    agree(loss, mean_loss(demo))
    agree(demo.loss_fn(logits, tokens), mean_loss(demo))
    agree(demo.run_with_cache(tokens)[0][0, columns(side)], short)
    with demo.trace(tokens):
        traced = demo.lm_head.output.save()
    agree(traced[0, columns(side)], short)
    with demo.trace() as tracer:
        with tracer.invoke(tokens[1:]):
            first = demo.lm_head.output.save()
        with tracer.invoke(tokens[0]):
            second = demo.lm_head.output.save()
    agree(first[0], long)
    agree(second[0, columns(side)], short)
    for batch_size in (1, 2):
        means = mean_activation(demo, tokens, "y", batch_size=batch_size)
        for layer, mean in mean_activation(demo, [SHORT, LONG], "y").items():
            agree(means[layer], mean)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_view_of_tokens_remembers_and_a_copy_does_not(demo: MambaTrace, side: str) -> None:
    tokens = demo.to_tokens([SHORT, LONG], padding_side=side)
    mask = remembered(tokens)
    assert mask is not None
    assert mask.sum(-1).tolist() == [N_SHORT, N_LONG]
    for view in (
        tokens[:1],
        tokens[0],
        tokens[:, :-1],
        tokens[:, 3:],
        next(iter(tokens)),
        tokens.unbind()[1],
    ):
        assert remembered(view) is not None
    assert torch.equal(remembered(tokens[:, 3:]), mask[:, 3:])
    assert torch.equal(remembered(tokens[0]), mask[0])
    assert torch.equal(remembered(tokens.T), mask.T)
    for same in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert torch.equal(remembered(same), mask)
    for other in (tokens.clone(), torch.cat([tokens]), tokens + 0):
        assert remembered(other) is None
    tokens[1, 5] = 7
    assert remembered(tokens) is not None
    tokens[0, -1 if side == "right" else 0] = 7  # what was padding is text now
    assert remembered(tokens) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_goes_on_from_the_last_token_on_either_side(demo: MambaTrace, side: str) -> None:
    options = {"max_new_tokens": 2, "do_sample": False}
    right = [demo.generate(text, **options)[0, -2:].tolist() for text in (SHORT, LONG)]
    for use_cache in (True, False):
        ids = demo.generate(demo.to_tokens([SHORT, LONG], padding_side=side), use_cache=use_cache, **options)
        assert ids[:, -2:].tolist() == right
        ids = demo.generate([SHORT, LONG], padding_side=side, use_cache=use_cache, **options)
        assert ids[:, -2:].tolist() == right


def test_a_grid_of_a_padded_row_is_that_of_its_prompt(demo: MambaTrace) -> None:
    metric = logit_diff(demo, " Emma", " Shelby")
    right = patch_grid(demo, LONG, SOURCE, "h", metric)
    for side in ("left", "right"):
        rows = demo.to_tokens([LONG, SOURCE, LONG + " Emma and then", SHORT], padding_side=side)
        grid = patch_grid(demo, rows[:1], rows[1:2], "h", metric)
        assert grid.values.shape[1] == N_LONG
        agree(grid.values, right.values)
        attention = hidden_attention(demo, rows[3:], layer=1)
        agree(attention.values, hidden_attention(demo, SHORT, layer=1).values)
        with pytest.raises(PromptError, match="prompt has 15 tokens and source 5"):
            patch_grid(demo, rows[:1], rows[3:], "h", metric)


def test_tokens_without_a_prompt_are_refused(demo: MambaTrace) -> None:
    tokens = demo.to_tokens([SHORT, ""])
    with pytest.raises(PromptError, match="prompt 1 of 2 is padding alone"):
        demo.run_with_hooks(tokens)


# -- tokens of unknown origin ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [torch.clone, Tensor.tolist, Tensor.numpy], ids=["copy", "lists", "array"])
def test_a_row_with_more_padding_tokens_than_another_is_padded_with_a_warning(
    demo: MambaTrace, side: str, form: Any
) -> None:
    tokens = form(demo.to_tokens([SHORT, LONG], padding_side=side))
    verb = "begin" if side == "left" else "end"
    with pytest.warns(UserWarning, match=rf"{verb} with \[10, 0\] more.*attention_mask=") as said:
        loss = demo.run_with_hooks(tokens, return_type="loss")
    agree(loss, mean_loss(demo))
    assert {one.filename for one in said} == {__file__}
    rows = demo.to_tokens([SHORT, LONG], padding_side=side).clone()
    logits = demo.run_with_hooks(rows, attention_mask=(rows != PAD).long())
    with pytest.warns(UserWarning, match=r"taken for padding"):
        agree(demo.loss_fn(logits, rows), mean_loss(demo))
    with pytest.warns(UserWarning, match=r"taken for padding"):
        means = mean_activation(demo, rows, "y", 1, batch_size=1)
    agree(means[1], mean_activation(demo, [SHORT, LONG], "y", 1)[1])


def test_a_beginning_of_sequence_token_is_text_though_it_pads_as_well(demo: MambaTrace) -> None:
    """<|endoftext|> is BOS, EOS and padding of the tokenizer of every released Mamba."""
    both = demo.to_tokens([SHORT, LONG], prepend_bos=True)
    mask = remembered(both)
    assert mask is not None
    assert mask.sum(-1).tolist() == [N_SHORT + 1, N_LONG + 1]
    same_length = demo.to_tokens([LONG, SOURCE], prepend_bos=True).clone()
    assert likely_mask(same_length, demo.tokenizer) is None
    assert likely_mask(same_length[:1], demo.tokenizer) is None
    with pytest.warns(UserWarning, match=r"begin with \[10, 0\]"):
        guess = likely_mask(both.clone(), demo.tokenizer)
    assert torch.equal(guess != 0, mask)
    ended = torch.tensor([[5, 6, 7, PAD], [5, 6, 8, PAD]])
    assert likely_mask(ended, demo.tokenizer) is None
    with pytest.warns(UserWarning, match="every row begins with 3 tokens 0.*taken for text"):
        assert likely_mask(torch.tensor([[PAD, PAD, PAD, 5]]), demo.tokenizer) is None


def test_a_token_that_only_pads_is_padding_without_a_doubt(demo: MambaTrace) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=demo.tokenizer.backend_tokenizer)
    tokenizer.pad_token = demo.tokenizer.convert_ids_to_tokens(7)
    ids = torch.tensor([[7, 7, 5, 6], [7, 5, 6, 7]])
    assert likely_mask(ids, tokenizer).tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert likely_mask(ids[:1], tokenizer).tolist() == [[0, 0, 1, 1]]
    assert likely_mask(ids, None) is None


def test_encodings_and_masks_decide_before_anything_else(demo: MambaTrace) -> None:
    for side in ("left", "right"):
        demo.tokenizer.padding_side = side
        encoding = demo.tokenizer([SHORT, LONG], return_tensors="pt", padding=True)
        demo.tokenizer.padding_side = "left"
        short, _ = alone(demo)
        agree(demo.run_with_hooks(encoding)[0, columns(side)], short)
        agree(demo.run_with_hooks(dict(encoding))[0, columns(side)], short)
        with demo.trace(**encoding):
            logits = demo.lm_head.output.save()
        agree(logits[0, columns(side)], short)
        ids = demo.to_tokens([SHORT, LONG], padding_side=side)
        as_text = demo.run_with_hooks(ids, attention_mask=torch.ones_like(ids))
        agree(as_text, demo._module(ids).logits)
        if side == "left":
            assert not torch.allclose(as_text[0, columns(side)], short, atol=1e-2)


# -- the side ----------------------------------------------------------------------------------------------


def test_the_padding_side_is_that_asked_for(demo: MambaTrace) -> None:
    given = copy.deepcopy(demo.tokenizer)
    short, _ = alone(demo)
    for settings in ({"padding_side": "right"}, {"tokenizer_kwargs": {"padding_side": "right"}}):
        model = MambaTrace(demo._module, tokenizer=given, **settings)
        assert model.to_tokens([SHORT, LONG])[0, -1] == PAD
        agree(model.run_with_hooks([SHORT, LONG])[0, :N_SHORT], short)
    assert MambaTrace(demo._module, tokenizer=given).to_tokens([SHORT, LONG])[0, 0] == PAD
    assert MambaTrace.demo(padding_side="right").to_tokens([SHORT, LONG])[0, -1] == PAD
    for side in ("left", "right"):
        with demo.trace([SHORT, LONG], padding_side=side):
            logits = demo.lm_head.output.save()
        agree(logits[0, columns(side)], short)
        with demo.trace(padding_side=side) as tracer:
            with tracer.invoke(SHORT):
                logits = demo.lm_head.output.save()
            with tracer.invoke(LONG):
                demo.lm_head.output.save()
        agree(logits[0, columns(side)], short)
    assert given.padding_side == "left"
    assert demo.tokenizer.padding_side == "left"


def test_sides_that_are_none(demo: MambaTrace) -> None:
    with pytest.raises(PromptError, match="'left' or 'right', not 'top'"):
        MambaTrace(demo._module, tokenizer=demo.tokenizer, padding_side="top")
    with (
        pytest.raises(PromptError, match="'left' or 'right', not 'top'"),
        demo.trace(SHORT, padding_side="top"),
    ):
        demo.lm_head.output.save()


def test_a_side_set_on_the_tokenizer_survives_loading() -> None:
    model = MambaTrace.demo(dispatch=False)
    model.tokenizer.padding_side = "right"
    model.dispatch()
    assert model.tokenizer.padding_side == "right"


def test_a_script_of_mamba_lens_pads_on_the_right(demo: MambaTrace) -> None:
    model = HookedMamba(demo._module, tokenizer=demo.tokenizer, padding_side="right")
    lens = HookedMamba(demo._module, tokenizer=demo.tokenizer)
    for one in (model, lens):
        tokens = one.to_tokens([SHORT, LONG], prepend_bos=False)
        assert tokens[0, -1] == PAD
        short = one(SHORT, prepend_bos=False)[0]
        agree(one(tokens)[0, :N_SHORT], short)
        agree(one([SHORT, LONG], prepend_bos=False)[0, :N_SHORT], short)
        agree(one([SHORT, LONG], prepend_bos=False, padding_side="left")[0, -N_SHORT:], short)
        texts = one.generate([SHORT, LONG], max_new_tokens=1, do_sample=False)
        assert texts == [one.generate(text, max_new_tokens=1, do_sample=False) for text in (SHORT, LONG)]


# -- positions ---------------------------------------------------------------------------------------------


def test_a_position_in_padding_warns_and_caching_all_of_them_does_not(demo: MambaTrace) -> None:
    from mamba_trace.interventions import ablate

    for side, position in (("left", -14), ("right", 13), ("right", -1)):
        tokens = demo.to_tokens([SHORT, LONG], padding_side=side)
        with pytest.warns(UserWarning, match=f"{side}-padded by"), demo.trace(tokens):
            demo.layers[1].ssm.h[position].output.save()
        with pytest.warns(UserWarning, match=f"{side}-padded by"), demo.trace(tokens):
            ablate(demo.layers[1].ssm.y, positions=position)
        with pytest.warns(UserWarning, match=f"{side}-padded by"), demo.trace(tokens):
            ablate(demo.layers[1].resid_post, positions=[position])
        with pytest.warns(UserWarning, match=f"{side}-padded by"), demo.trace(tokens):
            ablate(demo.embeddings, positions=position)
        demo.run_with_cache(tokens)
        demo.run_with_hooks(tokens, fwd_hooks=[(lambda name: "hook_h." in name, lambda value, hook: None)])
    tokens = demo.to_tokens([SHORT, LONG])
    with demo.trace(tokens):
        demo.layers[1].ssm.h[-5].output.save()
        ablate(demo.layers[1].ssm.y, positions=slice(-5, None))
    with demo.trace() as tracer:
        with tracer.invoke(LONG):
            demo.layers[1].ssm.h[0].output.save()
            ablate(demo.layers[1].ssm.y, positions=0)
        with tracer.invoke(SHORT):
            ablate(demo.layers[1].ssm.y, positions=-5)
