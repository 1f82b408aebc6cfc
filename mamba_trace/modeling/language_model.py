"""What runs around the layers of a hybrid, made hookable: positions and masks before them, the logits behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from ..errors import PromptError
from ..tracing import Visit, take_note_of_mask, uncompiled
from .offers import Offers
from .starting import Starting

#: Attribute of a cache: the attention mask of the columns in it [B,S], and its first keys when that was known.
REMEMBERED = "_mamba_trace_mask"


class HookableBase(nn.Module):
    """Mixin over the module of the embedding, the layers and the final norm.

    It gives each row the positions of its own tokens, however the row is padded and whatever a cache holds. Hugging
    Face counts the columns, from 0 again on a Bamba's cache. Where rows start in the middle of a prompt, positions are
    those of the whole prompt, of which attention takes each row's. Padding stays padding on a cache: the mask of a
    later call may cover that call alone, and what it leaves out of earlier ones the cache remembers. A model whose
    layers have no attention at all, such as the first layers of a Nemotron-H, needs neither positions nor attention's
    masks, and transformers' cache cannot count its tokens.
    """

    scope: ClassVar[None] = None
    layers: Any
    config: Any
    dtype: torch.dtype

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("cache")
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if given is not None and not args:
            length = given.shape[1]
            if isinstance(cache, Starting):
                kwargs["position_ids"] = torch.arange(cache.length, device=given.device)[None]
                kwargs["attention_mask"] = mask = {"full_attention": None, "linear_attention": None}
            elif all(layer.part("attn") is None for layer in self.layers):
                kwargs["position_ids"] = torch.arange(length, device=given.device)[None]
                if isinstance(mask, Tensor):
                    kwargs["attention_mask"] = {"full_attention": None, "linear_attention": mask}
                elif mask is None:
                    kwargs["attention_mask"] = {"full_attention": None, "linear_attention": None}
            else:
                kwargs["attention_mask"] = mask = whole_mask(given, mask, cache)
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = positions(length, mask, cache, given.device)
            if length == 1 and isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, -1] == 0).any()):
                kwargs["attention_mask"] = self._masks_of_one_column(given, mask, cache, kwargs["position_ids"])
            if isinstance(mask, Tensor) and mask.dim() == 2:
                take_note_of_mask(Visit(self).interleaver, mask[:, -length:])
        output = super().forward(*args, **kwargs)
        remember_mask(getattr(output, "cache", None), mask)
        return output

    def _masks_of_one_column(self, given: Tensor, mask: Tensor, cache: Any, position_ids: Any) -> dict[str, Any]:
        """The masks of attention and of SSMs for a call of one column, some of which is padding.

        transformers takes a single column for a token, and would let padding move the state.
        """
        embeds = torch.empty(*given.shape[:2], 1, dtype=self.dtype, device=given.device)  # for shape, dtype and device
        causal = create_causal_mask(
            config=self.config, inputs_embeds=embeds, attention_mask=mask, cache=cache, position_ids=position_ids
        )
        return {"full_attention": causal, "linear_attention": mask[:, -1:]}


class SharedBase(HookableBase):
    """`HookableBase` of a model with blocks inside of blocks, such as Zamba.

    transformers records the hidden states that the inner ones return; these are those of the layers, edits included.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_hidden_states", self.config.output_hidden_states) is not True:
            return super().forward(*args, **kwargs)
        states: list[Tensor] = []

        def record(layer: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            states.append(returned[0] if isinstance(returned, tuple) else returned)

        def record_first(layer: nn.Module, given: tuple[Any, ...]) -> None:
            states.append(given[0])

        handles = [self.layers[0].register_forward_pre_hook(record_first)]
        handles += [layer.register_forward_hook(record) for layer in self.layers]
        try:
            output = super().forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = (*states[:-1], output.hidden_states[-1])  # the last is behind the final norm
        return output


def remember_mask(cache: Any, mask: Any) -> None:
    """Let a cache know which of the columns in it are padding, and which keys it had when that was known."""
    if cache is not None and not isinstance(cache, Starting):
        known = isinstance(mask, Tensor) and mask.dim() == 2
        setattr(cache, REMEMBERED, (mask, first_keys(cache)) if known else None)


def first_keys(cache: Any) -> Tensor | None:
    """The keys of the first layer that has any."""
    return next((keys for layer in cache.layers if (keys := getattr(layer, "keys", None)) is not None), None)


def remembered_mask(cache: Any, rows: int, past: int) -> Tensor | None:
    """The mask [B,past] of what a cache holds; ``None`` if all are tokens.

    Raises:
        PromptError: if somebody has reordered or replaced what the cache holds since its padding was known.
    """
    mask, keys = getattr(cache, REMEMBERED, None) or (None, None)
    if mask is None:
        return None
    now = first_keys(cache)
    same = now is not None and keys is not None and now.data_ptr() == keys.data_ptr()
    if not same or mask.shape[0] != rows or mask.shape[1] < past:
        if bool(mask.all()):
            return None
        raise PromptError(
            f"this cache had padding in it, and its rows were reordered or replaced since: give the attention_mask of "
            f"all columns, the {past} in the cache included"
        )
    return mask[:, :past]


def whole_mask(given: Tensor, mask: Any, cache: Any) -> Any:
    """The attention mask of a call's columns and of those before them, [B,past+L]; ``None`` if all are tokens.

    Args:
        given: the tokens of the call [B,L,...].
        mask: of the call [B,L], or of all columns; attention's own [B,1,L,S] is left as it is.
        cache: the model's, or ``None``. What ``mask`` leaves out is what it remembers, or tokens.

    Raises:
        PromptError: if the mask has as many columns as neither the call nor the call with its past, or see
            `remembered_mask`.
    """
    past = int(cache.get_seq_length()) if cache is not None else 0
    if not past or (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)):
        return mask
    rows, length = given.shape[:2]
    if mask is not None and mask.shape[1] == past + length:
        return mask
    before = remembered_mask(cache, rows, past)
    if mask is None and before is None:
        return None
    now = torch.ones(rows, length, dtype=torch.long, device=given.device) if mask is None else mask.to(given.device)
    if now.shape[1] != length:
        raise PromptError(
            f"attention_mask is 1 on each token and 0 on padding, of the shape {[rows, length]} of the tokens or, with "
            f"the {past} in the cache, {[rows, past + length]}, not {list(now.shape)}"
        )
    before = now.new_ones(rows, past) if before is None else before.to(now)
    return torch.cat((before, now), dim=1)


def positions(length: int, mask: Any, cache: Any, device: torch.device) -> Tensor | None:
    """The positions of a call's tokens, [B,L] or [1,L]; ``None`` where Hugging Face's are right.

    Args:
        length: of the call.
        mask: 1 on tokens and 0 on padding, of this call's columns and those of the cache before them.
        cache: the model's, or ``None``.
        device: of the inputs.
    """
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + length:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
    return torch.arange(past, past + length, device=device)[None] if past else None


class HookableCausalLM(nn.Module):
    """Mixin over a language model whose logits are more than the output of its lm_head: they are a site.

    A class of it takes the signature of Hugging Face's forward from `with_signature`, which `generate` looks at.
    """

    scope = "model"
    loss_function: Callable[..., Tensor]

    def offered_logits(self, output: Any) -> Any:
        """The model's output with its logits offered [B,L,V]."""
        offer = Offers(self)
        output["logits"] = offer("logits", output["logits"])
        offer.close()
        return output


def with_signature(theirs: type[nn.Module]) -> Callable[..., Any]:
    """A forward with the signature of ``theirs``: the logits are offered, and the loss is that of what they become."""

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels, as_tuple = kwargs.pop("labels", None), kwargs.pop("return_dict", None) is False
        output = self.offered_logits(theirs.forward(self, *args, **kwargs))
        if labels is not None:
            output["loss"] = self.loss_function(output["logits"], labels, vocab_size=self.config.vocab_size)
            output = type(output)(**output)  # its fields are in order again, the loss first
            if (extra := getattr(output, "aux_loss", None)) is not None:
                output["loss"] = output["loss"] + self.router_aux_loss_coef * extra.to(output["loss"].device)
        return output.to_tuple() if as_tuple else output

    return forward
