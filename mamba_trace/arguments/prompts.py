"""Prompts, tokens and answers given to this package's own functions, checked before anything runs.

An experiment that compares two prompts position by position is meaningless if the positions do not
correspond, and an experiment that measures an answer of several tokens measures its first. Both are refused
here, and the message shows the tokenisations. Prompts are strings or token ids.
"""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError
from ..tracing.one_run import check_model
from .model import ArgumentModel
from .padding import mask_of
from .prompt_forms import check_id, check_ids


def prompt_of(model: ArgumentModel, input: Any, prepend_bos: bool | None) -> Any:
    """The prompt to give to a trace: ``input``, with BOS tokens before its strings where they are wanted.

    Args:
        model: the model that will run.
        input: a string, a list of strings, or token ids [B,L] or [L].
        prepend_bos: ``None`` for ``model.default_prepend_bos``.

    Raises:
        PromptError: if ``input`` is no prompt, or there is no BOS token to prepend.
    """
    if isinstance(input, Tensor) and (input.is_floating_point() or input.dim() not in (1, 2)):
        raise PromptError(
            f"token ids are an integer tensor [B,L] or [L], not {input.dtype} {tuple(input.shape)}. "
            f"A residual stream [B,L,D] goes in with start_at_layer"
        )
    if input is None or (isinstance(input, (Tensor, list, tuple)) and not len(input)):
        raise PromptError(f"a run needs a prompt: a string, a list of strings or token ids, not {input!r}")
    texts = [input] if isinstance(input, str) else input
    are_texts = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
    if prepend_bos is None:
        prepend_bos = are_texts and model.default_prepend_bos
    if not prepend_bos or (are_texts and model.tokenizer_prepends_bos):
        return input
    if not are_texts:
        raise PromptError("prepend_bos is for strings: put the token before the others yourself")
    bos = model.tokenizer.bos_token if model.tokenizer is not None else None
    if bos is None:
        raise PromptError("prepend_bos=True, but this model's tokenizer has no beginning-of-sequence token")
    return [bos + text for text in texts]


def single_token(model: ArgumentModel, token: str | int) -> int:
    """The id of one token of the vocabulary. Raises `PromptError`."""
    check_model(model, "this function")
    if isinstance(token, str):
        return model.to_single_token(token)
    size = model.config.vocab_size
    try:
        return check_id(operator.index(None if isinstance(token, bool) else token), size)  # type: ignore[arg-type]
    except TypeError:
        raise PromptError(
            f"a token is a string that is one token, or its id, 0 to {size - 1}, not {describe(token)}"
        ) from None


def matching_tokens(model: ArgumentModel, prompt: str | Tensor, source: str | Tensor) -> tuple[Tensor, Tensor]:
    """The token ids [1,L] of two prompts of one length. Raises `PromptError` where the lengths differ."""
    tokens, source_tokens = prompt_tokens(model, "prompt", prompt), prompt_tokens(model, "source", source)
    if tokens.shape != source_tokens.shape:
        ours, theirs = token_strings(model, tokens), token_strings(model, source_tokens)
        raise PromptError(
            f"prompt has {len(ours)} tokens and source {len(theirs)}, so their positions do not correspond. "
            f"Write both with the same number:\n{aligned(ours, theirs)}"
        )
    return tokens, source_tokens


def prompt_tokens(model: ArgumentModel, role: str, prompt: str | Tensor) -> Tensor:
    """The token ids [1,L] of one prompt, on the CPU. Raises `PromptError`, naming the argument ``role``."""
    if isinstance(prompt, str):
        tokens = model.to_tokens(prompt)
        unknown = getattr(model.tokenizer, "unk_token", None)
        if unknown and unknown not in prompt and (tokens == model.tokenizer.unk_token_id).any():
            raise PromptError(
                f"{role} has words that this tokenizer does not know: {prompt!r} is "
                f"{token_strings(model, tokens)}. Use words of its vocabulary, or pass token ids [1,L]"
            )
    elif isinstance(prompt, Tensor) and prompt.dtype != torch.bool and not prompt.is_floating_point():
        if prompt.is_meta or prompt.layout != torch.strided:
            raise PromptError(f"{role} is on {prompt.device} in the layout {prompt.layout}: give a dense tensor of ids")
        tokens = prompt.cpu()
        mask = mask_of(prompt, model.tokenizer) if prompt.dim() == 2 and len(prompt) == 1 else None
        if mask is not None:  # without its padding, so that positions count the prompt's own tokens
            tokens = tokens[:, mask[0] != 0]
    else:
        raise PromptError(f"{role} must be one string or a tensor of token ids [1,L], not {describe(prompt)}")
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise PromptError(f"{role} must be one prompt [1,L], not {describe(tokens)}; make a grid for each")
    if tokens.shape[1] == 0:
        raise PromptError(f"{role} is empty: {prompt!r} has no tokens")
    check_ids(tokens, model.config.vocab_size)
    return tokens.long()


def token_strings(model: ArgumentModel, tokens: Tensor) -> list[str]:
    """The string of each token of [1,L]; its id where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(token) for token in tokens[0].tolist()]
    return model.to_str_tokens(tokens)


def describe(value: Any) -> str:
    """The kind of a value, for messages: ``"a float"``, or a tensor with its shape and dtype."""
    if isinstance(value, Tensor):
        how = "a tensor" if value.layout == torch.strided else f"a tensor of layout {value.layout}"
        how += " on the meta device" if value.is_meta else ""
        return f"{how} of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def aligned(ours: list[str], theirs: list[str], before: int = 3, columns: int = 12) -> str:
    """Two tokenisations, one above the other, from shortly before their first difference.

    >>> print(aligned(["a", " b", " c"], ["a", " c"]))
      prompt:  'a'  ' b'  ' c'
      source:  'a'        ' c'
    """
    pairs: list[tuple[str, str]] = []
    for _, start, stop, other, end in difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False).get_opcodes():
        width = max(stop - start, end - other)
        left = [repr(token) for token in ours[start:stop]] + [""] * (width - stop + start)
        right = [repr(token) for token in theirs[other:end]] + [""] * (width - end + other)
        pairs += zip(left, right, strict=True)
    first = max(next(i for i, (left, right) in enumerate(pairs) if left != right) - before, 0)
    shown = pairs[first : first + columns]
    widths = [max(len(left), len(right)) for left, right in shown]
    dots = ("... " if first else "", " ..." if first + columns < len(pairs) else "")
    lines = []
    for role, row in zip(("prompt", "source"), zip(*shown, strict=True), strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {role}:  {dots[0]}{cells}{dots[1]}".rstrip())
    return "\n".join(lines)
