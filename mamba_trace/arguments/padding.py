"""Which tokens are padding: decided here for every way in which tokens reach a model.

A tensor of token ids does not say which of them are padding. Where the padding token also ends texts, as it
does for every Mamba with the tokenizer of gpt-neox-20b, the ids alone cannot tell. If padding is read as
text, every number of that row is wrong and nothing fails. So, in this order:

1. An attention mask that the user gives decides. It is checked first: one row for each prompt, one column for
   each token, 1 on tokens and 0 on padding before or after them.
2. Tokens made by ``to_tokens`` remember their mask, and so do their views: rows, slices of columns, reshapes.
3. For other tokens the ids decide. A padding token that is never text (not the BOS, EOS or unknown token) is
   padding at either end of a row. If it may be text, the row with the fewest of them at an end is taken to
   have no padding there, and what the other rows have more is padding. Since that is a guess, a warning says
   how to tell for sure.

Strings, encodings and masks of strings come with their own mask and need none of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ..errors import PromptError
from ..modeling.language_model import remembered_mask
from ..modeling.past import check_gaps, check_values, ends
from ..modeling.starting import Starting
from ..tracing.frames import warn_user
from ..tracing.prompts import as_encoding, input_key, split
from .prompt_forms import CACHES

#: Attribute of a tensor of tokens: (mask [B,L], the ids that padding had when it was made).
REMEMBERED = "_mamba_trace_mask"
SIDES = ("left", "right")


# -- remembering -------------------------------------------------------------------------------------------


def remember(tokens: Tensor, mask: Tensor) -> Tensor:
    """``tokens`` [B,L,...], which from now on know their attention mask [B,L]; a copy if they are a view."""
    if tokens._base is not None or not tokens.is_contiguous():
        tokens = tokens.clone(memory_format=torch.contiguous_format)
    real = mask.detach().to("cpu", torch.bool).contiguous()
    setattr(tokens, REMEMBERED, (real, tokens.detach().cpu()[~real]))
    return tokens


def remembered(tokens: Any) -> Tensor | None:
    """The attention mask that tokens remember, or the tensor that they are a view of: booleans on the CPU.

    It is forgotten once somebody has overwritten padding in place, since it may be text now.
    """
    if not isinstance(tokens, Tensor) or isinstance(tokens, FakeTensor):
        return None
    base = tokens if hasattr(tokens, REMEMBERED) else tokens._base
    if base is None or not hasattr(base, REMEMBERED) or base.dtype != tokens.dtype:
        return None
    mask, padding = getattr(base, REMEMBERED)
    with unset_fake_temporarily():
        if base.shape[:2] != mask.shape or not torch.equal(base.detach().cpu()[~mask], padding):
            return None
        if tokens is base:
            return mask
        return None if base.dim() > 2 else mask.as_strided(tokens.shape, tokens.stride(), tokens.storage_offset())


# -- deciding ----------------------------------------------------------------------------------------------


def mask_of(tokens: Any, tokenizer: Any, attention_mask: Any = None) -> Tensor | None:
    """The attention mask of token ids: the one given, the one they remember, or the one their ids suggest.

    Args:
        tokens: ids [B,L] or [L].
        tokenizer: of the model, or ``None``.
        attention_mask: what the user gave, checked here; ``None`` for nothing.

    Returns:
        Of the shape of ``tokens``, or ``None`` where no token is known to be padding.

    Raises:
        PromptError: if the given mask does not fit, or a row of remembered tokens is nothing but padding.
    """
    if attention_mask is not None:
        return checked_mask(attention_mask, tuple(tokens.shape))
    mask = remembered(tokens)
    if mask is None:
        return likely_mask(tokens, tokenizer)
    empty = (~mask.reshape(-1, mask.shape[-1]).any(-1)).nonzero()[:, 0].tolist() if mask.numel() else []
    if empty:
        raise PromptError(
            f"prompt {empty[0]} of {len(mask) if mask.dim() > 1 else 1} is padding alone: it has no tokens, "
            f"and every prompt of a run needs one at least"
        )
    return None if bool(mask.all()) else mask.long()


def likely_mask(tokens: Any, tokenizer: Any) -> Tensor | None:
    """The mask of token ids [B,L] that come without one, or ``None``; warns where it is a guess."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or isinstance(tokens, FakeTensor) or (isinstance(tokens, Tensor) and tokens.is_meta):
        return None
    with unset_fake_temporarily():
        try:
            ids = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
            ids = ids.detach().cpu()
        except (TypeError, ValueError, RuntimeError):  # lists of several lengths, which are not padded
            return None
        if ids.dim() not in (1, 2):
            return None
        rows = ids if ids.dim() == 2 else ids[None]
        length = rows.shape[1]
        if pad not in rows[:, :: max(1, length - 1)].flatten().tolist():  # the first column and the last
            return None
        is_pad = rows == pad
        sides = ends(is_pad)
        whole = sides[0] == length
        if bool(whole.all()):
            return None
        text = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
        shared = [int(side[~whole].min()) if pad in text else 0 for side in sides]
        before, after = ((side - least).masked_fill(whole, 0) for side, least in zip(sides, shared, strict=True))
        named = f"tokens {pad} ({tokenizer.decode([pad])!r})"
        if not bool(before.any() or after.any()):
            if max(shared) > 1:
                verb = "begins" if shared[0] > 1 else "ends"
                _warn(f"every row {verb} with {max(shared)} {named}, which pad as well; they are taken for text")
            return None
        if pad in text:
            both = (("begin", before), ("end", after))
            told = " and ".join(f"{verb} with {side.tolist()}" for verb, side in both if side.any())
            _warn(f"the rows {told} more {named} than the row with the fewest; these are taken for padding")
        columns = torch.arange(length)
        mask = ((columns >= before[:, None]) & (columns < length - after[:, None])).long()
        return mask if ids.dim() == 2 else mask[0]


def _warn(what: str) -> None:
    warn_user(
        f"these tokens come without an attention mask, and {what}. Say which are padding with "
        f"attention_mask=[B,L], torch.ones_like(tokens) if none is; what to_tokens returns knows it by itself"
    )


# -- checking ----------------------------------------------------------------------------------------------


def checked_mask(mask: Any, shape: tuple[int, ...], cached: bool = False, repeated: int = 0) -> Tensor:
    """An attention mask of tokens of ``shape`` [B,L] or [L], as integers of that shape, or as wide as it was given.

    Args:
        mask: booleans or numbers 0 and 1, in a tensor, an array or lists.
        shape: the shape of the tokens.
        cached: whether a cache holds tokens before these, which the mask may cover too.
        repeated: how many of the tokens, the first ones, are in the cache already; padding may stand behind them.

    Raises:
        PromptError: for a mask of another shape or with other values, or padding between tokens.
    """
    wanted = f"1 on each token and 0 on padding, of the shape {list(shape)} of the tokens"
    try:
        # A default device would move a tensor, too.
        mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"attention_mask is {wanted}, not a {type(mask).__name__}: {error}") from error
    if mask.is_complex() or mask.layout != torch.strided:
        raise PromptError(f"attention_mask is {wanted}, not {mask.dtype} of layout {mask.layout}")
    if mask.is_meta and not isinstance(mask, FakeTensor) and detect_fake_mode() is None:
        raise PromptError(f"attention_mask is {wanted}, and a tensor on the meta device holds no numbers")
    if mask.dim() == 1 and len(shape) == 2 and shape[0] == 1:
        mask = mask[None]
    longer = cached and mask.dim() == len(shape) and mask.shape[-1] > shape[-1]
    if tuple(mask.shape[:-1]) != shape[:-1] or (mask.shape[-1:] != shape[-1:] and not longer):
        before = "; with a cache it may cover the tokens in it too" if cached else ""
        long = len(mask.shape) == len(shape) and mask.shape[-1] > shape[-1] and not cached
        hint = ". Columns for tokens before these need the cache that has them" if long else before
        raise PromptError(f"attention_mask is {wanted}, not {list(mask.shape)}{hint}")
    if isinstance(mask, FakeTensor) or mask.is_meta or mask.device.type != "cpu":
        return mask
    with unset_fake_temporarily():
        if not bool((mask == 1).all()):
            check_values(mask)
            new = shape[-1] - (repeated if repeated < shape[-1] else 0)
            check_gaps((mask if mask.dim() == 2 else mask[None])[:, mask.shape[-1] - new :])
        return mask.long()


def checked_side(side: Any) -> str:
    """``side`` if it is ``"left"`` or ``"right"``. Raises `PromptError` otherwise."""
    if side not in SIDES:
        raise PromptError(f"padding_side must be 'left' or 'right', not {side!r}")
    return side


# -- the call of a trace -----------------------------------------------------------------------------------


class Batch:
    """The invokes of one trace as the batch that they become: its masks, and the side it is padded on.

    Args:
        tokenizer: the model's own, or ``None``.
        invokes: (args, kwargs) of each invoke.
        extra: the arguments of the trace itself, which override the arguments of its invokes.
        fn: what the trace calls.

    Attributes:
        invokes: (args, kwargs) of each invoke, with the attention mask of token ids where it is known.

    Raises:
        PromptError: for a mask that does not fit its tokens, or a side that is neither left nor right.
    """

    def __init__(self, tokenizer: Any, invokes: Sequence[tuple[Any, Any]], extra: dict[str, Any], fn: Any) -> None:
        self.tokenizer, self.extra = tokenizer, extra
        # Generation continues after the last column, so every prompt must end there.
        self.generates = getattr(fn, "__name__", None) in ("generate", "pipe")
        invokes = [(inputs, dict(kwargs)) for inputs, kwargs in invokes]
        arguments = [*(kwargs for _, kwargs in invokes), extra]
        self.side = side_asked_for(arguments)
        caches = [kwargs[name] for kwargs in arguments for name in CACHES if kwargs.get(name) is not None]
        self.cached = any(map(is_cached, caches))
        self.cache = max(caches, key=columns_of, default=None)
        self.past = columns_of(self.cache)
        self.repeated = self.past if self.generates else 0  # generation takes all tokens
        encodings = [as_encoding(inputs[0] if inputs else None, kwargs) or kwargs for inputs, kwargs in invokes]
        self.given = any(given.get("attention_mask") is not None for given in (*encodings, extra))
        self.invokes = [_with_mask(tokenizer, *invoke, self.cached, len(invokes), self.repeated) for invoke in invokes]

    @contextlib.contextmanager
    def padded(self) -> Iterator[None]:
        """A context in which the tokenizer (the model's own copy) pads on the side the trace asks for."""
        side = "left" if self.generates else self.side
        if self.tokenizer is None or side is None:
            yield
            return
        before, self.tokenizer.padding_side = self.tokenizer.padding_side, side
        try:
            yield
        finally:
            self.tokenizer.padding_side = before

    def masked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs with the attention mask to use, checked. Raises `PromptError`."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return inputs
        shape = (tokens.shape[0], tokens.shape[1])
        holder = self.extra if self.extra.get("attention_mask") is not None else inputs
        mask = holder.get("attention_mask")
        self._check_continued(shape, mask)
        if not self.given:
            mask = self._remembered(shape, mask)
        if mask is None:
            return inputs
        mask = checked_mask(mask, shape, self.cached, self.repeated)
        self.extra.pop("attention_mask", None)
        if self.generates:
            return aligned_right({**inputs, "attention_mask": mask}, self.repeated)
        known = not isinstance(mask, FakeTensor) and mask.device.type == "cpu"
        # A layer on a GPU could not look at the mask, and would have to assume that there is padding.
        no_padding = self.cached and known and bool(mask.all())
        return {**inputs, "attention_mask": None if no_padding else mask}

    def _remembered(self, shape: tuple[int, int], mask: Any) -> Any:
        """The ``mask`` of all tokens that nobody gave, with the padding that generation's cache knows of."""
        if not 0 < self.repeated < shape[1] or (before := remembered_mask(self.cache, shape[0], self.past)) is None:
            return mask
        new = before.new_ones(shape[0], shape[1] - self.past) if mask is None else mask[:, self.past :].to(before)
        return torch.cat((before, new), dim=1)

    def _check_continued(self, shape: tuple[int, int], mask: Any) -> None:
        """Refuse new tokens alone in generation on a cache, which takes them for all tokens and drops as many."""
        rows, length = shape
        if self.generates and 0 < length <= self.past and (mask is None or len(mask[0]) == length):
            raise PromptError(
                f"generate on a cache of {self.past} tokens takes these {self.past} and the new ones, and was given "
                f"{length}. Give all of them, or the new ones with the attention_mask= of all, "
                f"[{rows}, {self.past + length}]"
            )


def is_cached(cache: Any) -> bool:
    """Whether a cache has tokens in it."""
    if cache is None or isinstance(cache, Starting):
        return cache is not None
    return columns_of(cache) > 0 or any(getattr(layer, "has_previous_state", {}).get(0) for layer in cache.layers)


def columns_of(cache: Any) -> int:
    """How many columns attention has in a cache; 0 in that of a model without attention, which counts none."""
    layers = getattr(cache, "layers", ())
    return max((int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def _with_mask(
    tokenizer: Any, inputs: Any, kwargs: Any, cached: bool, n_invokes: int, repeated: int
) -> tuple[Any, Any]:
    encoding = as_encoding(inputs[0] if inputs else None, kwargs)
    key = None if encoding is None else input_key(encoding)
    if encoding is None or key is None:
        if kwargs.get("attention_mask") is not None and n_invokes > 1:
            raise PromptError(
                "attention_mask= beside strings in one of several invokes: strings bring their own mask, "
                "and token ids can be given one"
            )
        return inputs, kwargs
    tokens, given = encoding[key], encoding.get("attention_mask")
    if given is None:
        mask = mask_of(tokens, tokenizer) if key == "input_ids" else remembered(tokens)
        return inputs, kwargs if mask is None else {**kwargs, "attention_mask": mask}
    rows, batched = split(key, tokens)  # [1,L] each, as nnsight has them
    try:
        masks, _ = split("attention_mask", given, batched, rows[0].shape[1])
    except (TypeError, ValueError, RuntimeError, IndexError):
        masks = [given]
    ragged = isinstance(tokens, (list, tuple)) and len({row.shape[1] for row in rows}) > 1
    if not ragged or len(masks) != len(rows):
        shape = (len(rows), rows[0].shape[1])
        if isinstance(given, Tensor) and given.dim() == 1 and not batched:
            given = given[None]
        return inputs, {**kwargs, "attention_mask": checked_mask(given, shape, cached, repeated)}
    pairs = zip(masks, rows, strict=True)
    return inputs, {
        **kwargs,
        "attention_mask": [checked_mask(m, tuple(r.shape[:2]), cached, repeated)[0] for m, r in pairs],
    }


def side_asked_for(arguments: Sequence[dict[str, Any]]) -> str | None:
    """The ``padding_side`` of a trace and its invokes, removed from their arguments. Raises `PromptError`."""
    asked = [kwargs.pop("padding_side", None) for kwargs in arguments]
    sides = {checked_side(side) for side in asked if side is not None}
    if len(sides) > 1:
        raise PromptError("padding_side='left' and 'right' in one batch, which is padded on one side")
    return next(iter(sides), None)


def aligned_right(inputs: dict[str, Any], repeated: int = 0) -> dict[str, Any]:
    """The model's inputs with all padding moved to the left: generation continues the last token.

    Args:
        inputs: of the call.
        repeated: how many of the tokens, the first ones, are in a cache already and stay where they are.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or isinstance(mask, FakeTensor) or mask.dim() != 2 or not mask.shape[1]:
        return inputs
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(tokens, Tensor) and tokens.shape[:2] != mask.shape:  # it covers the tokens in a cache, too
        own = aligned_right({**inputs, "attention_mask": mask[:, -tokens.shape[1] :]})
        return {**own, "attention_mask": torch.cat((mask[:, : -tokens.shape[1]], own["attention_mask"]), dim=1)}
    if 0 < repeated < mask.shape[1]:
        names = [name for name in ("attention_mask", "input_ids", "inputs_embeds") if inputs.get(name) is not None]
        new = aligned_right({**inputs, **{name: inputs[name][:, repeated:] for name in names}})
        return {**new, **{name: torch.cat((inputs[name][:, :repeated], new[name]), dim=1) for name in names}}
    _, after = ends(mask == 0)
    after = after.masked_fill(after == mask.shape[1], 0)
    if not bool(after.any()):
        return inputs
    index = (torch.arange(mask.shape[1], device=mask.device) - after[:, None]) % mask.shape[1]  # [B,L]
    moved = {"attention_mask": mask.gather(1, index)}
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            moved[name] = value[torch.arange(len(value))[:, None], index]
    return {**{name: value for name, value in inputs.items() if name != "position_ids"}, **moved}
