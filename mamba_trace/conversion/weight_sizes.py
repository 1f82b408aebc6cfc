"""A configuration of a few bytes may declare a model of any size, which would be built for hours in vain.

So the sizes that a configuration declares are compared with the shapes of the weights before anything is
built, and a model for which there are no weights yet has an upper limit.

Contract: `expected_shapes` lists the parameters of a Hugging Face Mamba; `layers_in` and `sizes_in` take the
sizes of a model out of the shapes of its parameters; `check_weights` compares those with a configuration, and
`misfits` the parameters themselves, each in words. `check_buildable` refuses a configuration that cannot be
built. Each `CheckpointError` names what is declared and what there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from transformers import MambaConfig

from ..errors import CheckpointError
from .config_fields import MOST_LAYERS

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = {
    "original": "backbone.embedding.weight",
    "huggingface": "backbone.embeddings.weight",
    "mamba_lens": "embedding.weight",
}
LM_HEAD = "lm_head.weight"  # in every format
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d{1,9})\.(.+)")  # in every format
MOST_PARAMETERS = 10**12

# Where each size shows: the end of a parameter's name in any format, and an axis of its shape.
AXES = {
    "vocab_size": (re.compile(r"(?:^|\.)embeddings?\.weight$"), 0),
    "hidden_size": (re.compile(r"(?:^|\.)embeddings?\.weight$"), 1),
    "intermediate_size": (re.compile(r"\.A_log$"), 0),
    "state_size": (re.compile(r"\.A_log$"), 1),
    "conv_kernel": (re.compile(r"\.conv1d\.weight$"), 2),
    "time_step_rank": (re.compile(r"\.(?:dt_proj|W_delta_2)\.weight$"), 1),
}
HINTS = {
    "vocab_size": "Hugging Face's vocab_size counts the padding of the vocabulary",
    "intermediate_size": "intermediate_size is expand * hidden_size",
}


def layer_shapes(config: Any) -> Shapes:
    """The parameters of one layer of a Hugging Face Mamba, by their names within the layer."""
    D, E, N, K = config.hidden_size, config.intermediate_size, config.state_size, config.conv_kernel
    R = int(config.time_step_rank)
    shapes: Shapes = {
        "mixer.A_log": (E, N),
        "mixer.D": (E,),
        "mixer.conv1d.weight": (E, 1, K),
        "mixer.conv1d.bias": (E,),
        "mixer.in_proj.weight": (2 * E, D),
        "mixer.in_proj.bias": (2 * E,),
        "mixer.x_proj.weight": (R + 2 * N, E),
        "mixer.dt_proj.weight": (E, R),
        "mixer.dt_proj.bias": (E,),
        "mixer.out_proj.weight": (D, E),
        "mixer.out_proj.bias": (D,),
        "norm.weight": (D,),
    }
    absent = set() if config.use_bias else {"mixer.in_proj.bias", "mixer.out_proj.bias"}
    absent |= set() if config.use_conv_bias else {"mixer.conv1d.bias"}
    return {name: shape for name, shape in shapes.items() if name not in absent}


def expected_shapes(config: Any) -> Shapes:
    """Every parameter of a Hugging Face Mamba, by its name, lm_head included, in the model's order.

    The config may be anything that has a MambaConfig's fields of sizes.

    >>> expected_shapes(MambaConfig(num_hidden_layers=1))["backbone.norm_f.weight"]
    (768,)
    """
    V, D, layer = config.vocab_size, config.hidden_size, layer_shapes(config)
    shapes: Shapes = {EMBEDDING["huggingface"]: (V, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"backbone.norm_f.weight": (D,), LM_HEAD: (V, D)}


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


def sizes_in(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of a model, each from the first parameter that shows it; sizes that none shows are absent."""
    sizes = {}
    for field, (ending, axis) in AXES.items():
        shape = next((shape for name, shape in shapes.items() if ending.search(name)), ())
        if axis < len(shape):
            sizes[field] = shape[axis]
    return sizes


def check_weights(
    name: str,
    config: MambaConfig,
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
    layers, sizes = layers_in(shapes), sizes_in(shapes)
    if not layers or "vocab_size" not in sizes:
        raise CheckpointError(
            f"the files of {name} do not hold the weights of a Mamba: they have {some(shapes)}; "
            "expected an embedding and layers"
        )
    problems = []
    declared = config.num_hidden_layers
    if declared != layers and not (declared < layers and fewer_layers):
        problems.append(f"declares num_hidden_layers {declared} and the weights have {layers} layers")
    if not config.tie_word_embeddings and not any(key.endswith(LM_HEAD) for key in shapes):
        problems.append("declares tie_word_embeddings false and the weights have no lm_head.weight")
    for field, size in sizes.items():
        if getattr(config, field) != size:
            hint = f" ({HINTS[field]})" if field in HINTS else ""
            problems.append(f"declares {field} {getattr(config, field)} and the weights have {size}{hint}")
    if problems:
        raise CheckpointError(
            f"the weights of {name} do not fit {what}: it {'; it '.join(problems)}. Use the config that "
            "belongs to the weights"
        )


def misfits(missing: Iterable[str], extra: Iterable[str], wrong: Mapping[str, tuple[Any, Any]]) -> str:
    """What is wrong with a set of parameters, in words; empty if nothing is.

    ``missing`` and ``extra`` are names of parameters that should be there and that should not. ``wrong`` maps
    the names of others to the shape that they have and the one that they should have.
    """
    shapes = [f"{key} {list(shape)}, expected {list(right)}" for key, (shape, right) in wrong.items()]
    kinds = (("missing", list(missing)), ("unexpected", list(extra)), ("of the wrong shape", shapes))
    problems = [f"{len(names)} {what}: {some(names)}" for what, names in kinds if names]
    if any(key.endswith((".dt_bias", "mixer.norm.weight")) for key in kinds[1][1]):
        problems.append("the layers look like Mamba-2's; only Mamba-1 is supported so far")
    if not wrong.keys().isdisjoint(EMBEDDING.values()):
        problems.append("a Hugging Face vocab_size counts the padding of the vocabulary")
    return ". ".join(problems)


def some(names: Iterable[Any], most: int = 8, between: str = "; ") -> str:
    """The first of the names, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (between.join(names[:most]) or "nothing") + more


def parameters_of(config: MambaConfig) -> int:
    """How many numbers a model of this configuration has; a tied lm_head is counted once."""
    layer = sum(math.prod(shape) for shape in layer_shapes(config).values())
    V, D = config.vocab_size, config.hidden_size
    return config.num_hidden_layers * layer + V * D * (1 if config.tie_word_embeddings else 2) + D


def check_buildable(what: str, config: MambaConfig, dtype: torch.dtype | None = None) -> None:
    """Refuse a model that is too large for any machine or, if a dtype is given, for the memory of this one.

    Args:
        what: what declares its size, for messages.
        config: what is to be built.
        dtype: of the parameters of a model that is to be built from scratch, here and now.

    Raises:
        CheckpointError: naming what is declared or needed, and what is possible.
    """
    numbers, layers = parameters_of(config), config.num_hidden_layers
    if layers > MOST_LAYERS:
        raise CheckpointError(f"{what} declares {layers} layers. At most {MOST_LAYERS} are built")
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
