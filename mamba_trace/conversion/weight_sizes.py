"""A configuration of a few bytes may declare a model of any size, which takes hours to build in vain.

So what is declared is compared with what the files hold before anything is built, and a model of which
nothing is there yet is bounded.

Contract: `check_weights` refuses a configuration whose sizes are not those of the shapes in the files;
`check_buildable` one that no machine builds; `check_memory` one whose parameters this machine has no room
for. Each `CheckpointError` names what is declared and what there is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import psutil
import torch
from transformers import MambaConfig

from ..errors import CheckpointError
from .config_fields import MOST_LAYERS

MOST_PARAMETERS = 10**12
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
EMBEDDING = re.compile(r"(?:^|\.)embeddings?\.weight$")

# In the names and shapes of Hugging Face's and of the original format, which differ in nothing that is used
# here.
AXES = {  # where a size is seen: the end of a parameter's name, and its axis
    "vocab_size": (EMBEDDING, 0),
    "hidden_size": (EMBEDDING, 1),
    "intermediate_size": (re.compile(r"\.mixer\.A_log$"), 0),
    "state_size": (re.compile(r"\.mixer\.A_log$"), 1),
    "conv_kernel": (re.compile(r"\.mixer\.conv1d\.weight$"), 2),
    "time_step_rank": (re.compile(r"\.mixer\.dt_proj\.weight$"), 1),
}
HINTS = {
    "vocab_size": "Hugging Face's vocab_size counts the padding of the vocabulary",
    "intermediate_size": "intermediate_size is expand * hidden_size",
}


def check_weights(
    name: str,
    config: MambaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    what: str = "its config.json",
    *,
    fewer_layers: bool = False,
) -> None:
    """Refuse a configuration that declares another number of layers, or other sizes, than the weights have.

    Args:
        name: of the checkpoint, for messages.
        config: what is to be built.
        shapes: of every tensor in the checkpoint's files.
        what: what the configuration is called in messages.
        fewer_layers: whether the configuration may leave out the last layers.

    Raises:
        CheckpointError: naming what is declared and what the weights have.
    """
    layers = layers_in(shapes)
    if not layers or not any(EMBEDDING.search(key) for key in shapes):
        some = ", ".join(list(shapes)[:4]) or "nothing"
        raise CheckpointError(
            f"the files of {name} do not hold the weights of a Mamba: they have {some}"
            f"{f' and {len(shapes) - 4} more' if len(shapes) > 4 else ''}; expected an embedding and layers"
        )
    problems = []
    declared = config.num_hidden_layers
    if declared != layers and not (declared < layers and fewer_layers):
        problems.append(f"declares num_hidden_layers {declared} and the weights have {layers} layers")
    if not config.tie_word_embeddings and not any(key.endswith("lm_head.weight") for key in shapes):
        problems.append("declares tie_word_embeddings false and the weights have no lm_head.weight")
    for field, size in sizes_in(shapes).items():
        if getattr(config, field) != size:
            hint = f" ({HINTS[field]})" if field in HINTS else ""
            problems.append(f"declares {field} {getattr(config, field)} and the weights have {size}{hint}")
    if problems:
        raise CheckpointError(
            f"the weights of {name} do not fit {what}: it {'; it '.join(problems)}. Use the config that "
            "belongs to the weights"
        )


def layers_in(shapes: Mapping[str, object]) -> int:
    """How many layers the names of parameters speak of.

    Raises:
        CheckpointError: for a layer so high that most below it must be missing.
    """
    numbers = {int(match[1]) for match in map(LAYER.search, shapes) if match}
    layers = max(numbers, default=-1) + 1
    if layers > 2 * len(numbers) + 1:
        raise CheckpointError(
            f"the weights name layer {layers - 1}, and hold only {len(numbers)} of the {layers} layers up to "
            "it"
        )
    return layers


def sizes_in(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes that are seen in the shapes, by the first parameter that shows them."""
    sizes = {}
    for field, (ending, axis) in AXES.items():
        shape = next((shape for key, shape in shapes.items() if ending.search(key)), ())
        if axis < len(shape):
            sizes[field] = shape[axis]
    return sizes


def parameters_of(config: MambaConfig) -> int:
    """How many numbers a model of this configuration has; a tied lm_head is counted once."""
    D, E, N = config.hidden_size, config.expand * config.hidden_size, config.state_size
    R, K, V = int(config.time_step_rank), config.conv_kernel, config.vocab_size
    # in_proj and out_proj, x_proj, A_log, dt_proj with its bias, the convolution with its bias and D, the
    # norm
    layer = 3 * D * E + (R + 2 * N) * E + E * N + (R + 1) * E + (K + 2) * E + D
    return config.num_hidden_layers * layer + V * D * (1 if config.tie_word_embeddings else 2) + D


def check_buildable(what: str, config: MambaConfig) -> None:
    """Refuse a model of which no weights tell the size, if no model of its size is built.

    Args:
        what: what declares it, for messages.
        config: what is to be built.

    Raises:
        CheckpointError: naming what is declared, and the most that is built.
    """
    numbers, layers = parameters_of(config), config.num_hidden_layers
    if layers > MOST_LAYERS:
        raise CheckpointError(f"{what} declares {layers} layers. At most {MOST_LAYERS} are built")
    if numbers > MOST_PARAMETERS:
        raise CheckpointError(
            f"{what} declares {numbers} parameters (hidden_size {config.hidden_size}, vocab_size "
            f"{config.vocab_size}, num_hidden_layers {layers}). At most {MOST_PARAMETERS} are built"
        )


def check_memory(config: MambaConfig, dtype: torch.dtype) -> None:
    """Refuse a model from scratch that does not fit into this machine's main memory.

    Raises:
        CheckpointError: naming what it needs and what there is.
    """
    check_buildable("the configuration", config)
    needed, there = parameters_of(config) * dtype.itemsize, psutil.virtual_memory().total
    if needed > there:
        raise CheckpointError(
            f"a model of {parameters_of(config)} parameters in {dtype} needs {needed / 2**30:.1f} GiB, and "
            f"this machine has {there / 2**30:.1f} GiB of memory. Take smaller sizes or another dtype"
        )
