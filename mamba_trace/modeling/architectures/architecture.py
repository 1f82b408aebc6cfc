"""What the package asks of an architecture of Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...sites import Family

#: The size of every axis of a model's parameters. An axis is a letter, or several whose sizes are multiplied.
Sizes = Mapping[str, int]


def size_of(axis: str, sizes: Sizes) -> int:
    """The size of one axis, e.g. of ``"GN"``: G times N.

    >>> size_of("GN", {"G": 2, "N": 8})
    16
    """
    return sizes[axis] if axis in sizes else math.prod(sizes[letter] for letter in axis)


class Parameter(NamedTuple):
    """One parameter of a layer, whose rows may be several matrices on top of each other.

    Attributes:
        rows: the first axis of each of these matrices, from the top.
        others: the further axes.
        pieces: MambaLens's name of each of these matrices, and names in its style where it has none.
        flag: the field of the configuration that says whether the model has this parameter; empty if all do.
    """

    rows: tuple[str, ...]
    others: tuple[str, ...]
    pieces: tuple[str, ...]
    flag: str = ""

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Its shape in a model of these sizes."""
        return (sum(size_of(axis, sizes) for axis in self.rows), *(size_of(axis, sizes) for axis in self.others))


def parameter(rows: str, others: str, pieces: str, flag: str = "") -> Parameter:
    """A `Parameter` of which axes and names are written in one string each, separated by spaces."""
    return Parameter(tuple(rows.split()), tuple(others.split()), tuple(pieces.split()), flag)


class Shown(NamedTuple):
    """Where the shapes of the weights show the size of an axis.

    Attributes:
        axis: the axis.
        field: the field of the configuration that declares the size, or the formula for it.
        parameter: a parameter of a layer.
        dim: a dimension of that parameter. If it is the sum of several axes, the others are shown before.
    """

    axis: str
    field: str
    parameter: str
    dim: int


def sizes_of_stream(config: Any) -> dict[str, int]:
    """The sizes of a hybrid's parameters outside of its layers."""
    return {"V": config.vocab_size, "D": config.hidden_size, "1": 1}


@dataclass(frozen=True)
class Architecture:
    """What differs between one model type of Hugging Face's and another.

    Attributes:
        name: what people call it, e.g. ``"Mamba-2"``.
        family: how the states of its mixers move; it decides which sites there are, and their axes.
        model_class, config_class: of the causal language model.
        hookable: class of a module -> the hookable class it becomes.
        formats: the formats of configurations and weights that it comes in.
        base: the name of the module that holds the embedding, the layers and the final norm.
        parameters: the parameters of one layer, by their names within the layer, in the model's order; none for a
            hybrid, whose layers differ.
        sizes: gives the `Sizes` of a configuration, V, D and ``"1"`` included. It may be any object that has
            the fields of sizes.
        shown: where the weights show these sizes, V and D aside.
    """

    name: str
    family: Family
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    hookable: dict[type[nn.Module], type[nn.Module]]
    formats: tuple[str, ...] = ("huggingface",)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    sizes: Callable[[Any], dict[str, int]] = sizes_of_stream
    shown: tuple[Shown, ...] = ()
    base: str = "backbone"

    @property
    def hybrid(self) -> bool:
        """Whether its layers differ, or hold more than an SSM."""
        return not self.parameters

    @property
    def recorded(self) -> tuple[str, ...]:
        """What transformers records in a run that asks for it, e.g. ``"attentions"`` for ``output_attentions=True``."""
        return tuple(self.model_class._can_record_outputs or ())

    @property
    def model_type(self) -> str:
        """What a config.json calls it, e.g. ``"mamba2"``."""
        return self.config_class.model_type
