"""The mixer of Mamba-1, Falcon-Mamba and Jamba: each channel and state number decays at a rate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..scan import SELECTIVE
from .discretisation import Discretisation, SelectiveDiscretisation
from .mixer import HookableMixer
from .offers import Offers
from .past import masked


class SelectiveMixer(HookableMixer):
    """Completes Hugging Face's mixers with x_proj and dt_proj: x [B,L,E], states [B,E,N]."""

    time_step_rank: Any  # R
    x_proj: nn.Linear
    dt_proj: nn.Linear

    family, scans = "selective", SELECTIVE
    columns_in, columns_out = ("x_in",), ("conv",)

    @property
    def sizes(self) -> dict[str, int]:
        E, N, R = self.intermediate_size, self.ssm_state_size, self.time_step_rank
        return {"E": E, "N": N, "R": R, "K": self.conv_kernel_size}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.intermediate_size, self.ssm_state_size

    def divided(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        E = self.intermediate_size
        x_in, skip = rows.split_with_sizes([E, E], dim=-1)  # [B,L,E] each
        return skip, x_in, None

    def split(self, columns: Tensor) -> Sequence[Tensor]:
        return (columns,)

    def discretisation(
        self, offer: Offers, x: Tensor, delta_1: Tensor | None, others: Sequence[Tensor]
    ) -> Discretisation:
        delta_1, B, C = self.selective_parameters(offer, x)
        delta_1 = offer("delta_1", delta_1)  # [B,L,R]
        # The only reference to delta_2 [B,L,E], which is given up where delta takes its place.
        return SelectiveDiscretisation(
            x, offer("delta_2", offer.through("dt_proj", delta_1)), offer.mask, self.A_log, B, C
        )

    def selective_parameters(self, offer: Offers, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_proj, split: delta_1 [B,L,R], B [B,L,N] and C [B,L,N]."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        looked_at = offer.first_wanted("x_proj") is not None
        projected = offer.through("x_proj", x)  # [B,L,R+2N]
        delta_1, B, C = (masked(projected, offer.mask) if looked_at else projected).split_with_sizes(sizes, dim=-1)
        return delta_1, B, C


class NormedSelectiveMixer(SelectiveMixer):
    """Completes those with a norm on each of dt, B and C: delta_1, B and C are what the norms return."""

    def selective_parameters(self, offer: Offers, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta_1, B, C = super().selective_parameters(offer, x)
        return offer.through("dt_layernorm", delta_1), offer.through("b_layernorm", B), offer.through("c_layernorm", C)
