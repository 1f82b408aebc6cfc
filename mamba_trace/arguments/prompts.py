"""Prompts and answers, checked before anything runs.

An experiment that compares two prompts position by position is meaningless if the positions do not
correspond, and one that measures an answer of several tokens measures its first. Both are refused here, with
the tokenisations that show why. Prompts are strings or token ids [1,L].
"""

from __future__ import annotations

import difflib
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PromptError
from .padding import mask_of

if TYPE_CHECKING:
    from ..model import MambaTrace


def single_token(model: MambaTrace, token: str | int) -> int:
    """The id of one token of the vocabulary. Raises `PromptError`."""
    if isinstance(token, str):
        return model.to_single_token(token)
    size = model.config.vocab_size
    try:
        index = operator.index(token)
    except TypeError:
        raise PromptError(
            f"a token is a string that is one token, or its id, 0 to {size - 1}, not {describe(token)}"
        ) from None
    if not 0 <= index < size:
        raise PromptError(f"token {index} is not in the vocabulary, whose ids are 0 to {size - 1}")
    return index


def matching_tokens(model: MambaTrace, prompt: str | Tensor, source: str | Tensor) -> tuple[Tensor, Tensor]:
    """Both prompts' token ids [1,L], if they have one length. Raises `PromptError`."""
    tokens, source_tokens = prompt_tokens(model, "prompt", prompt), prompt_tokens(model, "source", source)
    if tokens.shape != source_tokens.shape:
        ours, theirs = token_strings(model, tokens), token_strings(model, source_tokens)
        raise PromptError(
            f"prompt has {len(ours)} tokens and source {len(theirs)}, so their positions do not correspond. "
            f"Write both with the same number:\n{aligned(ours, theirs)}"
        )
    return tokens, source_tokens


def prompt_tokens(model: MambaTrace, role: str, prompt: str | Tensor) -> Tensor:
    """The token ids [1,L] of one prompt, on the CPU. Raises `PromptError`, which calls it by its ``role``."""
    if isinstance(prompt, str):
        tokens = model.to_tokens(prompt)
        unknown = getattr(model.tokenizer, "unk_token", None)
        if unknown and unknown not in prompt and (tokens == model.tokenizer.unk_token_id).any():
            raise PromptError(
                f"{role} has words that this tokenizer does not know: {prompt!r} is "
                f"{token_strings(model, tokens)}. Use words of its vocabulary, or pass token ids [1,L]"
            )
    elif isinstance(prompt, Tensor) and prompt.dtype != torch.bool and not prompt.is_floating_point():
        tokens = prompt.cpu()
        mask = mask_of(prompt, model.tokenizer) if prompt.dim() == 2 and len(prompt) == 1 else None
        if mask is not None:  # positions are those of the prompt
            tokens = tokens[:, mask[0] != 0]
    else:
        raise PromptError(f"{role} must be one string or a tensor of token ids [1,L], not {describe(prompt)}")
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise PromptError(f"{role} must be one prompt [1,L], not {describe(tokens)}; make a grid for each")
    if tokens.shape[1] == 0:
        raise PromptError(f"{role} is empty: {prompt!r} has no tokens")
    for token in (int(tokens.min()), int(tokens.max())):
        single_token(model, token)
    return tokens.long()


def token_strings(model: MambaTrace, tokens: Tensor) -> list[str]:
    """The string of each token of [1,L]; its id where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(token) for token in tokens[0].tolist()]
    return model.to_str_tokens(tokens)


def describe(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def aligned(ours: list[str], theirs: list[str], before: int = 3, columns: int = 12) -> str:
    """Two tokenisations above each other, from shortly before their first difference.

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
