"""The mixer of Mamba-2 and most hybrids: each head decays as one, and the convolution runs over x, B and C together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..scan import DUAL
from ..scan.norm import rms_norm
from ..scan.reference import accumulation_dtype
from .discretisation import Discretisation, DualDiscretisation
from .mixer import HookableMixer
from .offers import Offers


class DualMixer(HookableMixer):
    """Completes Hugging Face's mixers of heads: x [B,L,H,P], states [B,H,P,N].

    The limits of delta hold in every call. Hugging Face's decode step leaves them out.
    """

    num_heads: Any  # H
    head_dim: Any  # P
    n_groups: Any  # G
    dt_bias: nn.Parameter  # [H]
    norm: Any  # a gated RMSNorm
    time_step_limit: Any  # two numbers

    family, scans = "dual", DUAL
    columns_in, columns_out = ("x_in", "B_in", "C_in"), ("conv", "B_conv", "C_conv")

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"E": self.intermediate_size, "H": self.num_heads, "P": self.head_dim, "G": self.n_groups}
        return sizes | {"N": self.ssm_state_size, "K": self.conv_kernel_size}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.num_heads, self.head_dim, self.ssm_state_size

    @property
    def n_channels(self) -> int:
        return self.intermediate_size + 2 * self.n_groups * self.ssm_state_size

    def divided(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.intermediate_size, self.n_channels, self.num_heads]
        skip, columns, delta_1 = rows.split_with_sizes(sizes, dim=-1)
        return skip, columns, delta_1

    def split(self, columns: Tensor) -> Sequence[Tensor]:
        G, N = self.n_groups, self.ssm_state_size
        x, B, C = columns.split_with_sizes([self.intermediate_size, G * N, G * N], dim=-1)
        heads = (*columns.shape[:2], G, N)
        return x, B.view(heads), C.view(heads)

    def discretisation(
        self, offer: Offers, x: Tensor, delta_1: Tensor | None, others: Sequence[Tensor]
    ) -> Discretisation:
        assert delta_1 is not None
        delta_2 = offer("delta_2", offer("delta_1", delta_1) + self.dt_bias)  # [B,L,H]
        (B, C), (low, high) = others, self.time_step_limit
        return DualDiscretisation(self.by_head(x), delta_2, offer.mask, self.A_log, B, C, limit=(low, high))

    def by_head(self, value: Tensor) -> Tensor:
        return value.view(*value.shape[:-1], self.num_heads, self.head_dim)

    def by_channel(self, value: Tensor) -> Tensor:
        return value.flatten(-2)

    def D_of_channels(self) -> Tensor:
        return self.D.repeat_interleave(self.head_dim)

    def finished(self, offer: Offers, output: Tensor, skip: Tensor) -> Tensor:
        return offer.through("norm", super().finished(offer, output, skip))


class HookableGatedRMSNorm(nn.Module):
    """Mixin over Hugging Face's gated RMSNorm, which rounds float64 to float32: this one does not.

    A mixer gives it values that are gated already.
    """

    weight: Tensor
    variance_epsilon: float
    group_size: int
    #: Whether it multiplies by its weight before it rounds to the model's dtype.
    wide_weight = False

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        x = hidden_states
        if gate is not None:
            x = x.to(accumulation_dtype(x))
            x = x * F.silu(gate.to(x.dtype))
        epsilon, size = self.variance_epsilon, self.group_size
        return rms_norm(x, self.weight, epsilon, size, hidden_states.dtype, self.wide_weight)
