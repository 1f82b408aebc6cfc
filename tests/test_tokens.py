"""Text and tokens: what a prompt becomes, which strings its tokens are, and what predicting them costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamba_trace import MambaTrace
from mamba_trace.errors import PromptError

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SHORT = "Emma and Shelby had fun"


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture
def bos(demo: MambaTrace) -> int:
    return demo.tokenizer.bos_token_id


def encode(demo: MambaTrace, text: str) -> list[int]:
    """By the tokenizer's own library."""
    return demo.tokenizer.backend_tokenizer.encode(text).ids


# -- to tokens ---------------------------------------------------------------------------------------------


def test_one_string(demo: MambaTrace) -> None:
    tokens = demo.to_tokens(PROMPT)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [encode(demo, PROMPT)]


def test_tokens_are_what_a_trace_of_the_same_strings_sees(demo: MambaTrace) -> None:
    with torch.no_grad(), demo.trace([PROMPT, SHORT]):
        inputs = demo.inputs.save()
    assert torch.equal(demo.to_tokens([PROMPT, SHORT]), inputs[1]["input_ids"])


def test_several_strings_are_padded_on_either_side(demo: MambaTrace) -> None:
    long, short = encode(demo, PROMPT), encode(demo, SHORT)
    pad = [demo.tokenizer.pad_token_id] * (len(long) - len(short))
    assert demo.to_tokens([PROMPT, SHORT]).tolist() == [long, pad + short]
    assert demo.to_tokens([PROMPT, SHORT], padding_side="left").tolist() == [long, pad + short]
    assert demo.to_tokens([PROMPT, SHORT], padding_side="right").tolist() == [long, short + pad]
    assert demo.tokenizer.padding_side == "left"


def test_a_beginning_of_sequence_token_goes_before_the_text_not_the_padding(demo, bos) -> None:
    long, short = [bos, *encode(demo, PROMPT)], [bos, *encode(demo, SHORT)]
    pad = [demo.tokenizer.pad_token_id] * (len(long) - len(short))
    assert demo.to_tokens(PROMPT, prepend_bos=True).tolist() == [long]
    assert demo.to_tokens([PROMPT, SHORT], prepend_bos=True).tolist() == [long, pad + short]


def test_whether_to_prepend_has_a_default(demo, bos) -> None:
    model = MambaTrace(demo._module, tokenizer=demo.tokenizer)
    assert model.to_tokens(SHORT).tolist() == [encode(demo, SHORT)]
    model.default_prepend_bos = True
    assert model.cfg.default_prepend_bos is True
    assert model.to_tokens(SHORT).tolist() == [[bos, *encode(demo, SHORT)]]
    assert model.to_tokens(SHORT, prepend_bos=False).tolist() == [encode(demo, SHORT)]
    assert model.get_token_position(" and", SHORT) == 2
    assert demo.default_prepend_bos is False


class Prepending(PreTrainedTokenizerFast):
    """A tokenizer that begins every text with its BOS token."""

    def __call__(self, text, **kwargs):
        texts = text if isinstance(text, list) else self.bos_token + text
        return super().__call__([self.bos_token + one for one in texts] if texts is text else texts, **kwargs)


def test_a_tokenizer_that_prepends_by_itself_does_it_once(demo, bos) -> None:
    tokenizer = Prepending(tokenizer_object=demo.tokenizer.backend_tokenizer, bos_token=demo.tokenizer.bos_token)
    model = MambaTrace(demo._module, tokenizer=tokenizer)
    assert model.tokenizer_prepends_bos
    assert not demo.tokenizer_prepends_bos
    assert model.to_tokens(SHORT, prepend_bos=True).tolist() == [[bos, *encode(demo, SHORT)]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            torch.tensor([[1, 2]]),
            r"a string or a list of strings, not a tensor of shape \[1, 2\].*as they are",
        ),
        ([], "a list that is empty"),
        ([SHORT, 3], "not a list"),
        (None, "not a NoneType"),
    ],
    ids=["tokens", "empty", "mixed", "none"],
)
def test_what_is_no_text(demo: MambaTrace, text: object, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        demo.to_tokens(text)


def test_arguments_that_cannot_be_met(demo: MambaTrace) -> None:
    with pytest.raises(PromptError, match="'left' or 'right', not 'top'"):
        demo.to_tokens(SHORT, padding_side="top")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=demo.tokenizer.backend_tokenizer)
    model = MambaTrace(demo._module, tokenizer=tokenizer)
    with pytest.raises(PromptError, match=r"no beginning-of-sequence token.*prepend_bos=False"):
        model.to_tokens(SHORT, prepend_bos=True)
    assert model.to_tokens(SHORT, prepend_bos=False).tolist() == [encode(demo, SHORT)]


# -- and back ----------------------------------------------------------------------------------------------


def test_tokens_in_every_form_become_text(demo: MambaTrace) -> None:
    row = encode(demo, SHORT)
    for tokens in (row, torch.tensor(row), np.array(row)):
        assert demo.to_string(tokens) == SHORT
    assert demo.to_string(demo.to_tokens(SHORT)) == [SHORT]
    assert demo.to_string(torch.tensor([row, row])) == [SHORT, SHORT]
    assert demo.to_string(row[1]) == " and"
    assert demo.to_string(torch.tensor(row[1])) == " and"


def test_the_string_of_each_token(demo: MambaTrace) -> None:
    parts = ["Emma", " and", " Shelby", " had", " fun"]
    assert demo.to_str_tokens(SHORT) == parts
    assert demo.to_str_tokens(demo.to_tokens(SHORT)) == parts  # [1,L]
    assert demo.to_str_tokens(demo.to_tokens(SHORT)[0]) == parts  # [L]
    assert demo.to_str_tokens(encode(demo, SHORT)) == parts
    assert demo.to_str_tokens(demo.to_single_token(" fun")) == [" fun"]
    assert demo.to_str_tokens(SHORT, prepend_bos=True) == [demo.tokenizer.bos_token, *parts]
    assert "".join(demo.to_str_tokens(PROMPT)) == PROMPT


def test_several_prompts_give_a_list_for_each(demo: MambaTrace) -> None:
    parts = ["Emma", " and", " Shelby", " had", " fun"]
    assert demo.to_str_tokens([SHORT, " fun"]) == [parts, [" fun"]]  # not padded
    rows = demo.to_tokens([SHORT, SHORT])
    assert demo.to_str_tokens(rows) == [parts, parts]
    assert demo.to_str_tokens(list(rows)) == [parts, parts]
    assert demo.to_str_tokens([SHORT]) == [parts]


def test_single_tokens_there_and_back(demo: MambaTrace) -> None:
    token = demo.to_single_token(" Emma")
    assert [token] == encode(demo, " Emma")
    assert demo.to_single_str_token(token) == " Emma"
    assert demo.to_single_str_token(torch.tensor([token])) == " Emma"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.to_single_token("Emma and"), r"'Emma and' is 2 tokens, \['Emma', ' and'\].*' Emma and'"),
        (lambda m: m.to_single_token(3), "takes a string, not a int"),
        (lambda m: m.to_single_str_token(10**6), r"token 1000000 is none of this tokenizer's.*0 to \d+"),
        (lambda m: m.to_single_str_token(-1), "token -1 is none"),
        (lambda m: m.to_single_str_token([1, 2]), "takes one token id, not 2"),
        (lambda m: m.to_single_str_token("Emma"), "to_single_str_token takes token ids, not a str"),
        (lambda m: m.to_string(torch.zeros(1, 2, 3, dtype=torch.long)), r"\[L\] or \[B,L\], not \[1, 2, 3\]"),
        (lambda m: m.to_string(torch.zeros(2)), "integers, not torch.float32"),
        (lambda m: m.to_str_tokens(torch.zeros(1, 1, 2, dtype=torch.long)), r"not \[1, 1, 2\]"),
        (lambda m: m.to_str_tokens(None), "takes token ids, not a NoneType"),
    ],
)
def test_what_is_no_token(demo: MambaTrace, call, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        call(demo)


# -- positions ---------------------------------------------------------------------------------------------


def test_where_a_token_stands(demo: MambaTrace) -> None:
    parts = demo.to_str_tokens(PROMPT)
    first = parts.index(" Shelby")
    last = len(parts) - 1 - parts[::-1].index(" Shelby")
    assert first != last
    tokens = demo.to_tokens(PROMPT)
    for prompt in (PROMPT, tokens, tokens[0]):
        assert demo.get_token_position(" Shelby", prompt) == first
        assert demo.get_token_position(" Shelby", prompt, mode="last") == last
    assert demo.get_token_position(demo.to_single_token(" Shelby"), PROMPT) == first
    assert demo.get_token_position(tokens[0, first], PROMPT, "last") == last
    assert demo.get_token_position(" Shelby", PROMPT, prepend_bos=True) == first + 1


def test_positions_that_cannot_be_told(demo: MambaTrace) -> None:
    with pytest.raises(PromptError, match=r"' apple' \(token \d+\) does not occur.*'Emma', ' and'"):
        demo.get_token_position(" apple", SHORT)
    with pytest.raises(PromptError, match="'first' or 'last', not 'middle'"):
        demo.get_token_position(" and", SHORT, mode="middle")
    with pytest.raises(PromptError, match=r"one prompt.*not \[2, 5\]"):
        demo.get_token_position(" and", demo.to_tokens([SHORT, SHORT]))


def test_without_a_tokenizer_only_tokens_can_be_looked_for(tiny: MambaTrace) -> None:
    assert tiny.get_token_position(7, torch.tensor([3, 7, 7]), mode="last") == 2
    with pytest.raises(PromptError, match=r"does not occur in the prompt, which is \[3, 7\]"):
        tiny.get_token_position(5, torch.tensor([3, 7]))
    for call in (tiny.to_tokens, tiny.to_string, tiny.to_str_tokens, tiny.to_single_token):
        with pytest.raises(PromptError, match="tokenizer="):
            call("Emma")
    with pytest.raises(PromptError, match="tokenizer="):
        tiny.to_single_str_token(3)


# -- loss --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_next_tokens(tiny: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.lm_head.output.save()
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(tiny.loss_fn(logits, tokens, per_token=True), each)
    torch.testing.assert_close(tiny.loss_fn(logits, tokens), each.mean())
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    kept = torch.cat([each[0, 3:], each[1], each[2]])
    torch.testing.assert_close(tiny.loss_fn(logits, tokens, mask), kept.mean())
    hf = tiny._module(tokens, labels=tokens).loss
    torch.testing.assert_close(tiny.loss_fn(logits, tokens), hf.detach())
