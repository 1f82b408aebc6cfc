"""What the package asks of an architecture of Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...sites import Family, Scope


@dataclass(frozen=True)
class Architecture:
    """How one model type of Hugging Face's is made hookable.

    Attributes:
        name: what people call it, e.g. ``"Mamba-2"``.
        family: how the states of its mixers move; it decides which sites there are, and their axes.
        model_class, config_class: of the causal language model.
        hookable: class of a module -> (the hookable class it becomes, the scope of its sites or ``None``).
    """

    name: str
    family: Family
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    hookable: dict[type[nn.Module], tuple[type[nn.Module], Scope | None]]
