"""Nemotron-H: each layer is one of Mamba-2, attention, an MLP and a mixture of experts.

Where this package differs from Hugging Face 5 on purpose: delta is held within ``config.time_step_limit``, as in
training. Hugging Face ignores that field, holds delta above ``time_step_min`` in a prompt, and not in a decode step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHBlock,
    NemotronHForCausalLM,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHModel,
    NemotronHMoE,
    NemotronHRMSNorm,
    NemotronHRMSNormGated,
    NemotronHTopkRouter,
)

from ...scan.reference import accumulation_dtype
from ...tracing import take_note_of_mask
from ..attention import HookableAttention
from ..block import HookableBlock, HookableRMSNorm
from ..dual import DualMixer, HookableGatedRMSNorm
from ..language_model import HookableBase
from ..mlp import HookableExperts, HookableMLP, HookableRouter
from ..offers import Offers
from .architecture import Architecture


class HookableNemotronHBlock(HookableBlock, NemotronHBlock):
    """A `NemotronHBlock` with its sites."""

    parts_named: ClassVar[dict[str, str]] = {
        "norm": "norm",
        "ssm": "mixer",
        "attn": "mixer",
        "mlp": "mixer",
        "moe": "mixer",
    }

    def term(
        self, offer: Offers, normalized: Tensor, cache: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        if self.part("ssm") is not None:
            take_note_of_mask(offer.visit.interleaver, attention_mask)
            return self.run(offer, "ssm", normalized, cache=cache, attention_mask=attention_mask)
        if self.part("attn") is not None:
            out, _ = self.run(offer, "attn", normalized, attention_mask=attention_mask, cache=cache, **kwargs)
            return offer("attn_out", out)
        return offer("mlp_out", self.run(offer, "moe" if self.part("mlp") is None else "mlp", normalized))


class HookableNemotronHMamba2Mixer(DualMixer, NemotronHMamba2Mixer):
    """A `NemotronHMamba2Mixer` with its sites."""

    def made_hookable(self) -> None:
        low, high = self.config.time_step_limit
        self.time_step_limit = (float(low), float(high))


class HookableNemotronHAttention(HookableAttention, NemotronHAttention):
    """A `NemotronHAttention` with its sites."""


class HookableNemotronHMLP(HookableMLP, NemotronHMLP):
    """A `NemotronHMLP`."""


class HookableNemotronHMoE(HookableExperts, NemotronHMoE):
    """A `NemotronHMoE` with its sites."""

    router_name = "gate"

    def routed(self, hidden_states: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        inner = self.combined(self.fc1_latent_proj(hidden_states.flatten(0, 1)), weights, numbers)
        return self.fc2_latent_proj(inner).view(hidden_states.shape) + self.shared_experts(hidden_states)


class HookableNemotronHTopkRouter(HookableRouter, NemotronHTopkRouter):
    """A `NemotronHTopkRouter`, which chooses among the best groups of experts."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        dtype = accumulation_dtype(hidden_states)
        return nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))

    def chosen(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ranked = scores + self.e_score_correction_bias
        grouped = ranked.unflatten(-1, (self.num_group, -1))  # [tokens,groups,X in a group]
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1, sorted=False)[1]
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
        ranked = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        numbers = ranked.topk(self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, numbers)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, numbers


class HookableNemotronHRMSNorm(HookableRMSNorm, NemotronHRMSNorm):
    """A `NemotronHRMSNorm` that keeps float64."""

    wide_weight = True


class HookableNemotronHRMSNormGated(HookableGatedRMSNorm, NemotronHRMSNormGated):
    """The `NemotronHRMSNormGated` of a mixer, which keeps float64."""


class HookableNemotronHModel(HookableBase, NemotronHModel):
    """A `NemotronHModel`."""


NEMOTRON_H = Architecture(
    name="Nemotron-H",
    family="dual",
    model_class=NemotronHForCausalLM,
    config_class=NemotronHConfig,
    base="model",
    hookable={
        NemotronHBlock: HookableNemotronHBlock,
        NemotronHMamba2Mixer: HookableNemotronHMamba2Mixer,
        NemotronHAttention: HookableNemotronHAttention,
        NemotronHMLP: HookableNemotronHMLP,
        NemotronHMoE: HookableNemotronHMoE,
        NemotronHTopkRouter: HookableNemotronHTopkRouter,
        NemotronHRMSNorm: HookableNemotronHRMSNorm,
        NemotronHRMSNormGated: HookableNemotronHRMSNormGated,
        NemotronHModel: HookableNemotronHModel,
    },
)
