"""Text and tokens, under TransformerLens's names, and the loss of predicting them.

Contract: a prompt becomes here what a trace of the same prompt sees, unless a beginning-of-sequence token is
asked for. The string of a token is decoded from that token alone. Wrong input raises `PromptError` before
anything is tokenised.

`Tokens` is mixed into the model class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments.padding import checked_side, mask_of, remember
from ..arguments.prompt_forms import check_ids
from ..arguments.prompts import describe
from ..errors import PromptError
from .losses import next_token_loss


class Tokens:
    """Conversions between strings, tokens and the strings of single tokens."""

    tokenizer: Any
    #: Whether `to_tokens` puts the beginning-of-sequence token first unless it is told otherwise.
    default_prepend_bos = False
    #: On which side a new model's tokenizer pads unless it is told otherwise.
    default_padding_side = "left"

    @property
    def tokenizer_prepends_bos(self) -> bool:
        """Whether the tokenizer begins every text with its BOS token by itself; ``False`` without one."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]

    def to_tokens(
        self, text: str | list[str], prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Tensor:
        """Token ids of one or several strings.

        Shorter prompts are padded, and the tensor remembers where, so every run, loss and mean of it leaves
        the padding out. Its views remember too, such as ``tokens[:1]``, ``tokens[:, :-1]`` or a row; copies
        (``tokens.clone()``, ``torch.cat``, a move to another device) do not. For a copy the ids decide: if a
        row has more padding tokens at an end than the row with the fewest, the excess is taken for padding,
        with a warning if the padding token may be text. Give a copy its ``attention_mask=``.

        Args:
            text: a string, or a list of strings, padded where lengths differ.
            prepend_bos: put the beginning-of-sequence token first, if the tokenizer does not do so already;
                ``None`` for ``model.default_prepend_bos``, which is ``False``: as a trace sees the same text.
            padding_side: ``"left"`` or ``"right"``; by default the tokenizer's.

        Returns:
            [B,L], int64, on the CPU: a plain tensor.

        Raises:
            PromptError: if there is no tokenizer, no text, or no beginning-of-sequence token to prepend.

        Example::

            MambaTrace.demo().to_tokens("Emma gave an apple to")  # [1,L]
        """
        tokenizer = self._need_tokenizer()
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
            raise PromptError(
                f"to_tokens takes a string or a list of strings, not {_described(text)}; token ids go to a "
                f"model as they are"
            )
        side = {} if padding_side is None else {"padding_side": checked_side(padding_side)}
        prepend_bos = self.default_prepend_bos if prepend_bos is None else prepend_bos
        if prepend_bos and not self.tokenizer_prepends_bos:
            if tokenizer.bos_token is None:
                raise PromptError(
                    "this tokenizer has no beginning-of-sequence token: set model.tokenizer.bos_token, or "
                    "pass prepend_bos=False"
                )
            texts = [tokenizer.bos_token + plain for plain in texts]
        with torch.device("cpu"):  # whatever the default device
            encoding = tokenizer(
                list(texts), return_tensors="pt", padding=len(texts) > 1, return_attention_mask=True, **side
            )
        return remember(encoding["input_ids"].long(), encoding["attention_mask"])

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids: a string for one row [L] or one id, a list of strings for [B,L].

        Args:
            tokens: an id, a list of ids or of rows, an array or a tensor, integers.

        Raises:
            PromptError: if these are no token ids, or of more than two axes.

        Example::

            model = MambaTrace.demo()
            model.to_string(model.to_tokens("Emma gave an apple to"))  # ['Emma gave an apple to']
        """
        ids = self._known(tokens, "to_string")
        return [self._decode(row) for row in ids] if ids.dim() == 2 else self._decode(ids)

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None, padding_side: str | None = None) -> Any:
        """The string of each token.

        Args:
            text: one prompt: a string, or token ids [L] or [1,L]; or several: a list of these, or ids [B,L].
            prepend_bos, padding_side: for strings, as in `to_tokens`. Strings of a list are not padded.

        Returns:
            A list of L strings for one prompt, and a list of such lists for several.

        Raises:
            PromptError: if ``text`` is neither text nor token ids.

        Example::

            MambaTrace.demo().to_str_tokens("Emma gave")  # ['Emma', ' gave']
        """
        self._need_tokenizer()
        if isinstance(text, str):
            text = self.to_tokens(text, prepend_bos, padding_side)
        elif isinstance(text, (list, tuple)) and any(isinstance(item, (str, list, Tensor)) for item in text):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in text]
        ids = self._known(text, "to_str_tokens")
        if ids.dim() == 2 and len(ids) != 1:
            return [self.to_str_tokens(row) for row in ids]
        return [self._decode(token) for token in ids.reshape(-1)]

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token.

        Raises:
            PromptError: if it is several tokens, or one the tokenizer does not know.

        Example::

            MambaTrace.demo().to_single_token(" Emma")
        """
        tokenizer = self._need_tokenizer()
        if not isinstance(text, str):
            raise PromptError(f"to_single_token takes a string, not {_described(text)}")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [self._decode(token) for token in ids]
        hint = "" if text.startswith(" ") else f"; a word inside a sentence carries its space: {' ' + text!r}"
        if len(ids) != 1:
            raise PromptError(f"{text!r} is {len(ids)} tokens, {pieces}, not one{hint}")
        if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
            raise PromptError(f"{text!r} is not among the {len(tokenizer)} tokens of model.tokenizer.get_vocab(){hint}")
        return ids[0]

    def to_single_str_token(self, token: Any) -> str:
        """The string of one token id; the inverse of `to_single_token`.

        Args:
            token: an integer, or a tensor that holds one.

        Raises:
            PromptError: if it is not a single id, or the tokenizer has no such token.

        Example::

            model = MambaTrace.demo()
            model.to_single_str_token(model.to_single_token(" Emma"))  # ' Emma'
        """
        size = len(self._need_tokenizer())
        ids = _ids(token, "to_single_str_token")
        if ids.numel() != 1:
            raise PromptError(f"to_single_str_token takes one token id, not {ids.numel()}")
        if not 0 <= int(ids) < size:
            raise PromptError(f"token {int(ids)} is none of this tokenizer's, whose ids are 0 to {size - 1}")
        return self._decode(ids.reshape(()))

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in a prompt, as the positions of a trace count.

        Args:
            single_token: a string that is one token, or a token id.
            input: one prompt: a string, or token ids [L] or [1,L].
            mode: ``"first"`` or ``"last"``, if it occurs more than once.
            prepend_bos, padding_side: for a string, as in `to_tokens`.

        Returns:
            Its position, 0 for the first.

        Raises:
            PromptError: if it does not occur, the input is several prompts, or ``mode`` is neither.

        Example::

            model = MambaTrace.demo()
            model.get_token_position(" Shelby", "Emma and Shelby saw Shelby", mode="last")  # 4
        """
        if mode not in ("first", "last"):
            raise PromptError(f"mode must be 'first' or 'last', not {mode!r}")
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side)
        ids = _ids(input, "get_token_position")
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1:
            raise PromptError(f"get_token_position takes one prompt, ids of shape [L] or [1,L], not {list(ids.shape)}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        positions = (ids == token).nonzero()[:, 0].tolist()
        if not positions:
            here = ids.tolist() if self.tokenizer is None else self.to_str_tokens(ids)
            raise PromptError(f"{single_token!r} (token {token}) does not occur in the prompt, which is {here}")
        return positions[0 if mode == "first" else -1]

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """The cross entropy of predicting each token from those before it, in nats.

        Args:
            logits: [B,L,V], of a run on ``tokens``.
            tokens: [B,L]. The logits at the last position predict none of them.
            attention_mask: [B,L], 0 on padding, which does not count. Tokens from `to_tokens` know theirs.
            per_token: the loss of each token instead of their mean.

        Returns:
            A scalar, or [B,L-1].

        Example::

            model = MambaTrace.demo()
            tokens = model.to_tokens("Emma gave an apple to")
            with model.trace(tokens):
                loss = model.loss_fn(model.lm_head.output, tokens).save()
        """
        if not isinstance(tokens, Tensor):
            raise PromptError(f"loss_fn takes the tokens [B,L] of the logits, not {_described(tokens)}: to_tokens(...)")
        mask = mask_of(tokens, self.tokenizer, attention_mask)
        return next_token_loss(logits, tokens.to(logits.device), mask=mask, per_token=per_token)

    def _known(self: Any, tokens: Any, asked: str) -> Tensor:
        """Token ids [L] or [B,L] that the model or its tokenizer knows. Raises `PromptError`."""
        self._need_tokenizer()
        ids = _ids(tokens, asked)
        check_ids(ids, max(len(self.tokenizer), self.config.vocab_size))
        if ids.dim() > 2:
            raise PromptError(f"{asked} takes ids of shape [L] or [B,L], not {list(ids.shape)}")
        return ids

    def _decode(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise PromptError("this model has no tokenizer; give it one: MambaTrace(..., tokenizer=...)")
        return self.tokenizer


def _ids(tokens: Any, asked: str) -> Tensor:
    """Token ids in any form as an integer tensor on the CPU. Raises `PromptError`."""
    try:
        ids = torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"{asked} takes token ids, not {_described(tokens)}: {error}") from error
    if (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool) and ids.numel():
        raise PromptError(f"{asked} takes token ids, which are integers, not {ids.dtype}")
    return ids


def _described(value: Any) -> str:
    return describe(value) + (" that is empty" if isinstance(value, list) and not value else "")
