"""Hugging Face's attention made hookable: queries, keys, values, the pattern and what each head read are sites.

Where nobody wants the pattern, the attention function of the model's configuration runs (sdpa by default), which
never makes it. In a layer where it is wanted it is made, and an edit of it is what the values are read with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..scan.reference import accumulation_dtype
from .offers import Offers
from .starting import StartingRuns, StartingStates


class HookableAttention(nn.Module):
    """Mixin over Hugging Face's attention, which has the attributes below.

    Attributes:
        rotate: applies the rotary embedding (cos, sin) to queries and keys; ``None`` in models without it.
        key_multiplier: a factor of the keys.
        returned: how many values it returns in a tuple.
    """

    scope = "attn"
    returned = 2
    config: Any
    layer_idx: Any
    head_dim: Any
    num_key_value_groups: int
    scaling: Any
    attention_dropout: Any
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None
    key_multiplier: Any = 1.0

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter that attention fixes."""
        queries = self.config.num_attention_heads
        return {"Q": queries, "U": queries // self.num_key_value_groups, "W": self.head_dim}

    def projected(self, offer: Offers, hidden_states: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of q_proj, k_proj and v_proj, flat: [B,L,heads times width] each."""
        q, k, v = (getattr(self, name)(offer.into(name, hidden_states)) for name in ("q_proj", "k_proj", "v_proj"))
        return q, k, v

    def forward(
        self,
        hidden_states: Tensor,
        layer_idx: int | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        offer, layer = Offers(self), self.layer_idx if layer_idx is None else layer_idx
        flat = self.projected(offer, hidden_states, layer)
        heads = (part.unflatten(-1, (-1, self.head_dim)) for part in flat)  # [B,L,heads,W]
        q, k, v = (offer(name, part).transpose(1, 2) for name, part in zip("qkv", heads, strict=True))
        if isinstance(cache, StartingRuns):
            parts = []
            for span, start in cache.parts:
                own = (q[:, :, span], k[:, :, span], v[:, :, span])
                parts.append(self.read(offer, own, start, layer, attention_mask, position_embeddings, kwargs)[0])
            z, weights = torch.cat(parts, dim=1), None
        else:
            z, weights = self.read(offer, (q, k, v), cache, layer, attention_mask, position_embeddings, kwargs)
        z = offer("z", z)  # [B,L,Q,W]
        out = self.o_proj(offer.into("o_proj", z.flatten(2)))  # [B,L,D]
        offer.close()
        return offer.result(out), weights

    def read(
        self,
        offer: Offers,
        projected: tuple[Tensor, Tensor, Tensor],
        cache: Any,
        layer: int,
        mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """What each head reads [B,L,Q,W], and the pattern if it was made.

        Args:
            offer: of the call.
            projected: queries [B,Q,L,W], keys and values [B,U,L,W] of the call, not rotated yet.
            cache, layer, mask, position_embeddings, kwargs: as Hugging Face's attention takes them.
        """
        q, k, v = projected
        given = isinstance(cache, StartingStates)
        if given:
            mask = cache.readable(layer, q.shape[2])
            if position_embeddings is not None:
                position_embeddings = cache.rotary(layer, q.shape[2], position_embeddings)
        if self.key_multiplier != 1:
            k = k * self.key_multiplier
        if self.rotate is not None and position_embeddings is not None:
            q, k = self.rotate(q, k, *position_embeddings)
        wanted = offer.wants("pattern")
        before = int(cache.get_seq_length(layer)) if wanted and hasattr(cache, "get_seq_length") else 0
        if cache is not None:
            k, v = cache.update(k, v, layer, kwargs=kwargs)
        if wanted:
            return self.by_pattern(offer, q, k, v, mask, before)
        offer.pass_over("pattern")
        return self.by_function(q, k, v, mask, kwargs, given)

    def by_function(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any], given: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What each head reads [B,L,Q,W], by the attention function of the configuration, and what else it returns.

        Where ``given``, the mask is one of booleans for each row, which not every such function takes, but sdpa does.
        """
        name = "sdpa" if given else self.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        dropout = self.attention_dropout if self.training else 0.0
        z, weights = function(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return z, weights

    def by_pattern(
        self, offer: Offers, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: int
    ) -> tuple[Tensor, Tensor]:
        """The same by way of the pattern [B,Q,L,S], which is offered. Of the keys, ``before`` are of earlier calls."""
        pattern = offer("pattern", pattern_of(q, k, mask, self.scaling, self.num_key_value_groups, before))
        weights = nn.functional.dropout(pattern, self.attention_dropout, self.training)
        return (weights @ v.repeat_interleave(self.num_key_value_groups, dim=1)).transpose(1, 2), pattern


def pattern_of(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, groups: int, before: int | None = None
) -> Tensor:
    """The attention pattern [B,Q,L,S]: softmax of the scores, over the positions that the mask allows.

    Args:
        q: queries [B,Q,L,W].
        k: keys [B,U,S,W].
        mask: as transformers makes it for an attention function: ``None`` for each position up to its own, true
            where a position may be read, or numbers to add to the scores [B,1,L,S]; or 1 on tokens [B,S].
        scaling: of the scores.
        groups: how many query heads share a key head.
        before: how many keys come before those of the call; a static cache has room behind them. All others if
            not given.
    """
    scores = (q @ k.repeat_interleave(groups, dim=1).transpose(2, 3)) * scaling
    length, past = scores.shape[-2:]
    if mask is None or mask.dim() == 2:
        before = past - length if before is None else before
        allowed = torch.ones(length, past, dtype=torch.bool, device=q.device).tril(before)
        if mask is not None:
            allowed = allowed & (mask[:, None, None, -past:] != 0)
    elif mask.dtype == torch.bool:
        allowed = mask[..., :past]
    else:
        scores = scores + mask[..., :past]
        # Numbers as low as the dtype has them stand for positions that may not be read.
        allowed = mask[..., :past] > torch.finfo(mask.dtype).min / 2
    scores = scores.masked_fill(~allowed, float("-inf"))
    pattern = torch.softmax(scores, dim=-1, dtype=accumulation_dtype(scores))
    # A row of padding, which may read nothing.
    return pattern.masked_fill(~allowed.any(-1, keepdim=True), 0).to(q.dtype)


def eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention without a fused kernel, with the signature of transformers' attention functions."""
    pattern = pattern_of(q, k, mask, scaling, module.num_key_value_groups)
    weights = nn.functional.dropout(pattern, dropout, module.training)
    return (weights @ v.repeat_interleave(module.num_key_value_groups, dim=1)).transpose(1, 2), pattern
