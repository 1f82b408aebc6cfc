"""A configuration of a few bytes may declare a model of any size, which would be built for hours in vain.

So the sizes that a configuration declares are compared with the shapes of the weights before anything is
built, and a model for which there are no weights yet has an upper limit.

Contract: `expected_shapes` lists the parameters of a model of Hugging Face's; `layers_in` and `sizes_in` take
the sizes of a model out of the shapes of its parameters; `check_weights` compares those with a configuration,
and `misfits` the parameters themselves, each in words. `check_buildable` refuses a configuration that cannot
be built. Which parameters there are, of which shapes, the architecture says. Each `CheckpointError` names what
is declared and what there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psutil
import torch

from ..errors import CheckpointError
from ..modeling.architectures import ARCHITECTURES, BY_TYPE, Architecture
from ..modeling.architectures.architecture import Shown, size_of
from .config_fields import MOST_LAYERS
from .hybrid_weights import empty_model

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = {
    "original": "backbone.embedding.weight",
    "huggingface": "backbone.embeddings.weight",
    "mamba_lens": "embedding.weight",
}
LM_HEAD = "lm_head.weight"  # in every format
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d{1,9})\.(.+)")  # in every format
MOST_PARAMETERS = 10**12

# Where the embedding shows sizes: the end of its name in any format. A layer's are in `Architecture.shown`.
_EMBEDDING = re.compile(r"(?:^|\.)embeddings?\.weight$")
_OF_EMBEDDING = {"V": ("vocab_size", 0), "D": ("hidden_size", 1)}
HINTS = {
    "vocab_size": "Hugging Face's vocab_size counts the padding of the vocabulary",
    "intermediate_size": "intermediate_size is expand * hidden_size",
}


def layer_shapes(architecture: Architecture, sizes: Mapping[str, int], flags: Any) -> Shapes:
    """The parameters of one layer, by their names within the layer; ``flags`` has the fields of the optional ones."""
    return {
        name: parameter.shape(sizes)
        for name, parameter in architecture.parameters.items()
        if not parameter.flag or getattr(flags, parameter.flag)
    }


def all_shapes(architecture: Architecture, sizes: Mapping[str, int], flags: Any, layers: int) -> Shapes:
    """Every parameter of a model of these sizes, by its Hugging Face name, in the model's order."""
    V, D, layer = sizes["V"], sizes["D"], layer_shapes(architecture, sizes, flags)
    shapes: Shapes = {EMBEDDING["huggingface"]: (V, D)}
    for i in range(layers):
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"backbone.norm_f.weight": (D,), LM_HEAD: (V, D)}


def expected_shapes(config: Any) -> Shapes:
    """Every parameter of the Mamba of a configuration, by its Hugging Face name, lm_head included.

    >>> from transformers import MambaConfig
    >>> expected_shapes(MambaConfig(num_hidden_layers=1))["backbone.norm_f.weight"]
    (768,)
    """
    architecture = BY_TYPE[config.model_type]
    return all_shapes(architecture, architecture.sizes(config), config, config.num_hidden_layers)


def layers_in(names: Iterable[str]) -> int:
    """The number of layers that the names of parameters speak of, in any format.

    A `CheckpointError` refuses a layer so high that most layers below it must be missing.
    """
    numbers = {int(match[1]) for match in map(LAYER.search, names) if match}
    layers = max(numbers, default=-1) + 1
    if layers > 2 * len(numbers) + 1:
        raise CheckpointError(
            f"the weights name layer {layers - 1}, and hold only {len(numbers)} of the {layers} layers up to it"
        )
    return layers


def sizes_in(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size of each axis of a model, from the first parameter that shows it; axes that none shows are absent."""
    sizes = {"1": 1}
    embedding = next((shape for name, shape in shapes.items() if _EMBEDDING.search(name)), ())
    sizes |= {axis: embedding[dim] for axis, (_, dim) in _OF_EMBEDDING.items() if dim < len(embedding)}
    for shown in architecture.shown:
        parameter = architecture.parameters[shown.parameter]
        shape = _first(architecture, shown, shapes)
        if shown.dim >= len(shape):
            continue
        axes = parameter.rows if shown.dim == 0 else (parameter.others[shown.dim - 1],)
        rest = [axis for axis in axes if axis != shown.axis]
        if all(axis in sizes for axis in rest):
            left = shape[shown.dim] - sum(sizes[axis] for axis in rest)
            sizes[shown.axis] = max(left // axes.count(shown.axis), 0)
    return sizes


def _first(architecture: Architecture, shown: Shown, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the first parameter of that kind, whatever format its name is of; empty if there is none."""
    pieces = architecture.parameters[shown.parameter].pieces
    names = {shown.parameter.removeprefix("mixer."), *(pieces if len(pieces) == 1 else ())}
    ending = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})$")
    return next((shape for name, shape in shapes.items() if ending.search(name)), ())


def others_in(architecture: Architecture, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names of weights that this architecture does not have and others have, each with the names of those."""
    for name in names:
        layer = LAYER.search(name)
        if layer is None or layer[2] in architecture.parameters:
            continue
        if theirs := [other.name for other in ARCHITECTURES if layer[2] in other.parameters]:
            yield name, " or a ".join(theirs)


def check_weights(
    name: str,
    config: Any,
    shapes: Shapes,
    what: str = "its config.json",
    *,
    fewer_layers: bool = False,
) -> None:
    """Refuse a configuration that declares other sizes, or another number of layers, than the weights have.

    Args:
        name, what: what the checkpoint and the configuration are called in messages.
        config: what is to be built.
        shapes: of every tensor in the checkpoint's files.
        fewer_layers: whether the configuration may leave out the last layers.

    Raises:
        CheckpointError: naming what is declared and what the weights have.
    """
    architecture = BY_TYPE[config.model_type]
    layers, sizes = layers_in(shapes), sizes_in(architecture, shapes)
    if not layers or "V" not in sizes:
        raise CheckpointError(
            f"the files of {name} do not hold the weights of a Mamba: they have {some(shapes)}; "
            "expected an embedding and layers"
        )
    if foreign := next(others_in(architecture, shapes), None):
        key, theirs = foreign
        raise CheckpointError(
            f"the weights of {name} do not fit {what}: it says model_type {architecture.model_type!r}, "
            f"{architecture.name}, and they have {key}, as a {theirs} has. Use the config that belongs to the weights"
        )
    problems = list(_differences(architecture, config, layers, sizes, fewer_layers))
    if not config.tie_word_embeddings and not any(key.endswith(LM_HEAD) for key in shapes):
        problems.insert(0, "declares tie_word_embeddings false and the weights have no lm_head.weight")
    if problems:
        raise CheckpointError(
            f"the weights of {name} do not fit {what}: it {'; it '.join(problems)}. Use the config that "
            "belongs to the weights"
        )


def _differences(
    architecture: Architecture, config: Any, layers: int, sizes: Mapping[str, int], fewer_layers: bool
) -> Iterator[str]:
    """Each size that a configuration declares differently from the weights, in words."""
    declared = config.num_hidden_layers
    if declared != layers and not (declared < layers and fewer_layers):
        yield f"declares num_hidden_layers {declared} and the weights have {layers} layers"
    fields = {axis: field for axis, (field, _) in _OF_EMBEDDING.items()}
    fields |= {shown.axis: shown.field for shown in architecture.shown}
    for axis, field in fields.items():
        said = size_of(axis, architecture.sizes(config))
        if axis in sizes and said != sizes[axis]:
            hint = f" ({HINTS[field]})" if field in HINTS else ""
            yield f"declares {field} {said} and the weights have {sizes[axis]}{hint}"


def misfits(missing: Iterable[str], extra: Iterable[str], wrong: Mapping[str, tuple[Any, Any]]) -> str:
    """What is wrong with a set of parameters, in words; empty if nothing is.

    ``missing`` and ``extra`` are names of parameters that should be there and that should not. ``wrong`` maps
    the names of others to the shape that they have and the one that they should have.
    """
    shapes = [f"{key} {list(shape)}, expected {list(right)}" for key, (shape, right) in wrong.items()]
    kinds = (("missing", list(missing)), ("unexpected", list(extra)), ("of the wrong shape", shapes))
    problems = [f"{len(names)} {what}: {some(names)}" for what, names in kinds if names]
    unexpected = {layer[2] for layer in map(LAYER.search, kinds[1][1]) if layer}
    if theirs := [other.name for other in ARCHITECTURES if not unexpected.isdisjoint(other.parameters)]:
        problems.append(f"the layers look like those of a {' or a '.join(theirs)}: give the configuration of one")
    if not wrong.keys().isdisjoint(EMBEDDING.values()):
        problems.append("a Hugging Face vocab_size counts the padding of the vocabulary")
    return ". ".join(problems)


def some(names: Iterable[Any], most: int = 8, between: str = "; ") -> str:
    """The first of the names, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (between.join(names[:most]) or "nothing") + more


def parameters_of(config: Any) -> int:
    """How many numbers a model of this configuration has; a tied lm_head is counted once."""
    architecture = BY_TYPE[config.model_type]
    if architecture.hybrid:
        return sum(parameter.numel() for parameter in empty_model(config).parameters())
    sizes = architecture.sizes(config)
    layer = sum(math.prod(shape) for shape in layer_shapes(architecture, sizes, config).values())
    head = math.prod((sizes["V"], sizes["D"])) * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + head + sizes["D"]


def check_buildable(what: str, config: Any, dtype: torch.dtype | None = None) -> None:
    """Refuse a model that is too large for any machine or, if a dtype is given, for the memory of this one.

    Args:
        what: what declares its size, for messages.
        config: what is to be built.
        dtype: of the parameters of a model that is to be built from scratch, here and now.

    Raises:
        CheckpointError: naming what is declared or needed, and what is possible.
    """
    layers = config.num_hidden_layers
    if layers > MOST_LAYERS:
        raise CheckpointError(f"{what} declares {layers} layers. At most {MOST_LAYERS} are built")
    numbers = parameters_of(config)
    if numbers > MOST_PARAMETERS:
        raise CheckpointError(
            f"{what} declares {numbers} parameters (hidden_size {config.hidden_size}, vocab_size "
            f"{config.vocab_size}, num_hidden_layers {layers}). At most {MOST_PARAMETERS} are built"
        )
    needed, there = numbers * (dtype.itemsize if dtype else 0), psutil.virtual_memory().total
    if needed > there:
        raise CheckpointError(
            f"a model of {numbers} parameters in {dtype} needs {needed / 2**30:.1f} GiB, and this machine "
            f"has {there / 2**30:.1f} GiB of memory. Take smaller sizes or another dtype"
        )
