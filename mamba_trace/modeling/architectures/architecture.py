"""What the package asks of an architecture of Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...sites import Scope


@dataclass(frozen=True)
class Architecture:
    """How one model type of Hugging Face's is made hookable.

    Attributes:
        model_class, config_class: of the causal language model.
        hookable: class of a module -> (the hookable class it becomes, the scope of its sites or ``None``).
        axis_sizes: the sizes of the axes that a configuration fixes, by their letters in `sites.AXES`.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    hookable: dict[type[nn.Module], tuple[type[nn.Module], Scope | None]]
    axis_sizes: Callable[[Any], dict[str, int]]
