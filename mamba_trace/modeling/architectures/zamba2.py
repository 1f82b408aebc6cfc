"""Zamba2: Mamba-2, to whose input in some layers a shared transformer adds.

Where this package differs from Hugging Face 5 on purpose: delta is held above ``time_step_min`` in a decode step as
in a prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import Zamba2Config
from transformers.models.zamba2.modeling_zamba2 import (
    Zamba2Attention,
    Zamba2ForCausalLM,
    Zamba2HybridLayer,
    Zamba2MambaDecoderLayer,
    Zamba2MambaMixer,
    Zamba2MLP,
    Zamba2Model,
    Zamba2RMSNorm,
    Zamba2RMSNormGated,
    apply_rotary_pos_emb,
)

from ..attention import HookableAttention
from ..block import HookableRMSNorm, SharedBlock, ZambaBlock
from ..dual import DualMixer, HookableGatedRMSNorm
from ..language_model import SharedBase
from ..mlp import HookableMLP
from ..offers import Offers
from .architecture import Architecture


class HookableZamba2MambaDecoderLayer(ZambaBlock, Zamba2MambaDecoderLayer):
    """A `Zamba2MambaDecoderLayer` with its sites."""


class HookableZamba2HybridLayer(SharedBlock, Zamba2HybridLayer):
    """A `Zamba2HybridLayer` with its sites."""

    shared = "shared_transformer"
    parts_named: ClassVar[dict[str, str]] = {
        "norm": "mamba_decoder.input_layernorm",
        "ssm": "mamba_decoder.mamba",
        "attn": "shared_transformer.self_attn",
        "mlp": "shared_transformer.feed_forward",
    }


class HookableZamba2MambaMixer(DualMixer, Zamba2MambaMixer):
    """A `Zamba2MambaMixer` with its sites."""


class HookableZamba2Attention(HookableAttention, Zamba2Attention):
    """A `Zamba2Attention` with its sites. A layer may have adapters of its own beside the shared weights."""

    rotate = staticmethod(apply_rotary_pos_emb)
    layer_dic: dict[int, int]

    def projected(self, offer: Offers, hidden_states: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = super().projected(offer, hidden_states, layer)
        if not self.config.use_shared_attention_adapter:
            return flat
        adapters: list[Any] = [getattr(self, f"linear_{name}_adapter_list") for name in "qkv"]
        number = self.layer_dic[layer]
        q, k, v = (part + own[number](hidden_states) for part, own in zip(flat, adapters, strict=True))
        return q, k, v


class HookableZamba2MLP(HookableMLP, Zamba2MLP):
    """A `Zamba2MLP`."""


class HookableZamba2RMSNorm(HookableRMSNorm, Zamba2RMSNorm):
    """A `Zamba2RMSNorm` that keeps float64."""


class HookableZamba2RMSNormGated(HookableGatedRMSNorm, Zamba2RMSNormGated):
    """The `Zamba2RMSNormGated` of a mixer, which keeps float64."""


class HookableZamba2Model(SharedBase, Zamba2Model):
    """A `Zamba2Model`."""


ZAMBA2 = Architecture(
    name="Zamba2",
    family="dual",
    model_class=Zamba2ForCausalLM,
    config_class=Zamba2Config,
    base="model",
    hookable={
        Zamba2MambaDecoderLayer: HookableZamba2MambaDecoderLayer,
        Zamba2HybridLayer: HookableZamba2HybridLayer,
        Zamba2MambaMixer: HookableZamba2MambaMixer,
        Zamba2Attention: HookableZamba2Attention,
        Zamba2MLP: HookableZamba2MLP,
        Zamba2RMSNorm: HookableZamba2RMSNorm,
        Zamba2RMSNormGated: HookableZamba2RMSNormGated,
        Zamba2Model: HookableZamba2Model,
    },
)
