"""Zamba: Mamba-1 with heads, to whose input in some layers a shared transformer adds.

Each head has an x_proj and a dt_proj of its own, which are parameters of the mixer and no modules. Channels of all
heads stand one after the other, head by head, and states [B,E,N] do so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import ZambaConfig
from transformers.models.zamba.modeling_zamba import (
    ZambaAttention,
    ZambaForCausalLM,
    ZambaHybridLayer,
    ZambaMambaDecoderLayer,
    ZambaMambaMixer,
    ZambaMLP,
    ZambaModel,
    ZambaRMSNorm,
)

from ...scan import HEADED
from ..attention import HookableAttention
from ..block import HookableRMSNorm, SharedBlock, ZambaBlock
from ..discretisation import Discretisation, HeadedDiscretisation
from ..language_model import SharedBase
from ..mlp import HookableMLP
from ..offers import Offers
from ..selective import SelectiveMixer
from .architecture import Architecture


class HookableZambaMambaDecoderLayer(ZambaBlock, ZambaMambaDecoderLayer):
    """A `ZambaMambaDecoderLayer` with its sites."""


class HookableZambaHybridLayer(SharedBlock, ZambaHybridLayer):
    """A `ZambaHybridLayer` with its sites."""

    parts_named: ClassVar[dict[str, str]] = {
        "norm": "mamba_decoder.input_layernorm",
        "ssm": "mamba_decoder.mamba",
        "attn": "shared_transf.self_attn",
        "mlp": "shared_transf.feed_forward",
    }


class HookableZambaMambaMixer(SelectiveMixer, ZambaMambaMixer):
    """A `ZambaMambaMixer` with its sites."""

    scans = HEADED
    own_axes: ClassVar[dict[str, str]] = {"delta_1": "BLHR", "B": "BLHN", "C": "BLHN"}
    n_mamba_heads: int
    mamba_head_dim: int
    x_proj_weight: nn.Parameter  # [H,R+2N,P]
    dt_proj_weight: nn.Parameter  # [H,P,R]
    dt_proj_bias: nn.Parameter  # [H,P]

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"H": self.n_mamba_heads, "P": self.mamba_head_dim}

    def divided(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        x_in, skip = rows.unflatten(-1, (-1, 2)).unbind(-1)  # the rows of in_proj are x_0 z_0 x_1 z_1 ...
        return skip.contiguous(), x_in.contiguous(), None

    def discretisation(
        self, offer: Offers, x: Tensor, delta_1: Tensor | None, others: Sequence[Tensor]
    ) -> Discretisation:
        by_head = x.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))  # [B,L,H,P]
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        low_rank, B, C = torch.einsum("blhp,hop->blho", by_head, self.x_proj_weight).split(sizes, dim=-1)
        delta_1 = offer("delta_1", low_rank)  # [B,L,H,R]
        delta_2 = torch.einsum("blhr,hpr->blhp", delta_1, self.dt_proj_weight) + self.dt_proj_bias
        delta_2 = offer("delta_2", delta_2.flatten(2))  # [B,L,E]
        return HeadedDiscretisation(x, delta_2, offer.mask, self.A_log.flatten(0, 1), B, C)

    def D_of_scans(self) -> Tensor:
        return self.D.flatten()

    def to_cache(self, h: Tensor | None) -> Tensor | None:
        return None if h is None else h.unflatten(1, (self.n_mamba_heads, self.mamba_head_dim))

    def from_cache(self, h: Tensor | None) -> Tensor | None:
        return h.flatten(1, 2) if h is not None and h.dim() == 4 else h


class HookableZambaAttention(HookableAttention, ZambaAttention):
    """A `ZambaAttention` with its sites."""


class HookableZambaMLP(HookableMLP, ZambaMLP):
    """A `ZambaMLP`."""


class HookableZambaRMSNorm(HookableRMSNorm, ZambaRMSNorm):
    """A `ZambaRMSNorm` that keeps float64."""


class HookableZambaModel(SharedBase, ZambaModel):
    """A `ZambaModel`."""


ZAMBA = Architecture(
    name="Zamba",
    family="selective",
    model_class=ZambaForCausalLM,
    config_class=ZambaConfig,
    base="model",
    hookable={
        ZambaMambaDecoderLayer: HookableZambaMambaDecoderLayer,
        ZambaHybridLayer: HookableZambaHybridLayer,
        ZambaMambaMixer: HookableZambaMambaMixer,
        ZambaAttention: HookableZambaAttention,
        ZambaMLP: HookableZambaMLP,
        ZambaRMSNorm: HookableZambaRMSNorm,
        ZambaModel: HookableZambaModel,
    },
)
