"""The reference's values under the paths of the sites, any of them replaced by a function of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from reference import forward
from torch import Tensor

from mamba_trace import names

Edit = Callable[[Tensor], Tensor]


@torch.no_grad()
def by_hand(hf: Any, tokens: Tensor, edits: dict[str, Edit] | None = None) -> dict[str, Tensor]:
    """The values of the reference in float32, each under its path after the edit of that path."""
    seen: dict[str, Tensor] = {}
    length = tokens.shape[1]

    def edit(hook: str, value: Tensor) -> Tensor:
        paths = [names.to_path(hook)]
        if state := re.fullmatch(r"(.+\.h)\[(\d+)\]", paths[0]):
            paths.append(f"{state[1]}[{int(state[2]) - length}]")
        if paths[0].endswith(".delta_2"):  # the output of dt_proj
            paths.append(paths[0].replace("delta_2", "dt_proj"))
        for path in paths:
            value = edits[path](value) if edits and path in edits else value
            seen[path] = (value[..., :length] if path.endswith("conv1d") else value).float()
        return value

    forward(hf.state_dict(), hf.config, tokens, edit)
    return seen


def change(value: Tensor) -> Tensor:
    """An edit that keeps the sign of A and moves every entry by its own amount."""
    ramp = torch.linspace(0.1, 0.9, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value * (0.4 + ramp) - 0.05 * ramp


def same(one: Tensor, other: Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
