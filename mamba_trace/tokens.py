"""Text and tokens, under TransformerLens's names.

`Tokens` is mixed into the model class; it needs ``self.tokenizer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import PromptError


class Tokens:
    """Conversions between strings, tokens and the strings of single tokens."""

    tokenizer: Any

    def to_tokens(self, text: str | list[str], prepend_bos: bool = False) -> Tensor:
        """Token ids [B,L] of one or several strings, as a trace of the same strings sees them.

        Args:
            text: a string, or a list of strings, padded on the tokenizer's side where lengths differ.
            prepend_bos: put the beginning-of-sequence token first.

        Example::

            model.to_tokens("Hello World")  # [1, L]
        """
        tokenizer = self._need_tokenizer()
        texts = [text] if isinstance(text, str) else list(text)
        if prepend_bos:
            texts = [tokenizer.bos_token + one for one in texts]
        return tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)["input_ids"]

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids: a string for one row [L] or one id, a list of strings for [B,L]."""
        tokens = torch.as_tensor(tokens)
        tokenizer = self._need_tokenizer()
        if tokens.dim() == 2:
            return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in tokens]
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(self, text: str | Tensor) -> list[str]:
        """The string of each token of one prompt: a string, or token ids [L] or [1,L]."""
        tokens = self.to_tokens(text)[0] if isinstance(text, str) else torch.as_tensor(text)
        if tokens.dim() == 2:
            if tokens.shape[0] != 1:
                raise PromptError(f"to_str_tokens takes one prompt, not a batch of {tokens.shape[0]}")
            tokens = tokens[0]
        tokenizer = self._need_tokenizer()
        return [tokenizer.decode(token, clean_up_tokenization_spaces=False) for token in tokens]

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token.

        Raises:
            PromptError: if it is several tokens, or one the tokenizer does not know.
        """
        tokenizer = self._need_tokenizer()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]
        hint = "" if text.startswith(" ") else f"; a word inside a sentence carries its space: {' ' + text!r}"
        if len(ids) != 1:
            raise PromptError(f"{text!r} is {len(ids)} tokens, {pieces}, not one{hint}")
        if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
            raise PromptError(f"{text!r} is not in the vocabulary of this tokenizer{hint}")
        return ids[0]

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise PromptError("this model has no tokenizer; give it one: MambaTrace(..., tokenizer=...)")
        return self.tokenizer
