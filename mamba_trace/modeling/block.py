"""Hugging Face's block and its norm, made hookable: residual stream -> norm -> mixer -> residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..scan.norm import rms_norm
from ..scan.reference import accumulation_dtype
from ..tracing import Visit, take_note_of_mask
from .offers import Offers


class HookableRMSNorm(nn.Module):
    """Mixin over Hugging Face's RMSNorm, which rounds float64 to float32: this one does not."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class HookableBlock(nn.Module):
    """Mixin over Hugging Face's block, which has the attributes below."""

    norm: HookableRMSNorm
    mixer: nn.Module
    residual_in_fp32: bool
    gradient_checkpointing: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        checkpointing = self.gradient_checkpointing
        # It would run the block again in the backward pass, without the edits of the trace.
        self.gradient_checkpointing = checkpointing and not Visit(self).tracing
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.gradient_checkpointing = checkpointing

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        offer = Offers(self, "block")
        take_note_of_mask(offer.visit.interleaver, attention_mask)
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        layer_input = offer("layer_input", resid)  # [B,L,D]
        normalized = self.norm(offer.into("norm", layer_input.to(self.norm.weight.dtype)))  # [B,L,D]
        if self.residual_in_fp32:
            resid = resid.to(accumulation_dtype(resid))
        out = self.mixer(offer.into("mixer", normalized), cache=cache, attention_mask=attention_mask)
        resid = offer("resid_post", resid + out)  # [B,L,D]
        offer.close()
        return offer.result(resid)
