"""Whether weights are those of a hybrid: there is no table of its parameters, since its layers differ.

A checkpoint's names may be older than transformers' too: it renames them when it loads, and puts experts together that
are stored one by one. So transformers itself loads the shapes alone, on the meta device, and says what does not fit.

Contract: `empty_model` builds a model without numbers, `misfits_of` compares names and shapes with it, and
`model_of` makes a model of a state dict, with its non-persistent buffers and in the dtypes that `from_pretrained` gives
it. None of them prints, and none draws random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError
from ..modeling.architectures import BY_TYPE

#: The name of a weight of one expert among several: what stands before its number, the number, and the rest.
EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(.+)")
#: Missing names, unexpected names, and wrong shapes: a name, its shape and the right one.
Misfits = tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device.

    Raises:
        CheckpointError: if transformers cannot build it.
    """
    try:
        with quiet(), torch.device("meta"):
            return BY_TYPE[config.model_type].model_class(copy.deepcopy(config))
    except Exception as error:  # the values of a configuration may contradict each other in any way
        raise CheckpointError(
            f"transformers cannot build the {type(config).__name__} that is declared: {_in_short(error)}"
        ) from error


def misfits_of(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Misfits:
    """What transformers would find missing, unexpected and of the wrong shape if it loaded weights of these shapes.

    Raises:
        CheckpointError: if it cannot put the experts together at all.
    """
    absent, left_over = _gaps(shapes)
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        _, report = _from_tensors(config, state_dict, device_map={"": "meta"})
    except Exception as error:
        raise CheckpointError(f"transformers cannot put these weights together: {_in_short(error)}") from error
    wrong = [(name, tuple(shape), tuple(right)) for name, shape, right in report["mismatched_keys"]]
    missing, extra = absent | report["missing_keys"], left_over | report["unexpected_keys"]
    return sorted(missing), sorted(extra), sorted(wrong)


def _gaps(names: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The experts without a number among those that are stored one by one, as missing, and those numbered beyond.

    transformers puts together what there is, in order, whatever the numbers are.
    """
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for match in filter(None, map(EXPERT.fullmatch, names)):
        numbers[match[1], match[3]].add(int(match[2]))
    absent, left_over = set(), set()
    for (before, after), there in numbers.items():
        wanted = set(range(len(there)))
        absent |= {f"{before}.{number}.{after}" for number in wanted - there}
        left_over |= {f"{before}.{number}.{after}" for number in there - wanted}
    return absent, left_over


def check_tied(config: PreTrainedConfig, state_dict: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse a state dict with an lm_head of its own for a configuration that ties it to the embedding."""
    embedding = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    values = [state_dict.get(name) for name in (embedding, "lm_head.weight")]
    there = [value for value in values if value is not None and not value.is_meta]
    if config.tie_word_embeddings and len(there) == 2 and not torch.equal(there[0].to(there[1]), there[1]):
        raise CheckpointError(
            "the config ties lm_head.weight to the embedding, but the state dict has another lm_head.weight; "
            "set tie_word_embeddings=False"
        )


def model_of(config: PreTrainedConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model with the values of a state dict that fits it, on the CPU; the tensors themselves may become its own."""
    return _from_tensors(config, state_dict, dtype=dtype)[0]


def _from_tensors(config: PreTrainedConfig, state_dict: Mapping[str, Tensor], **options: Any) -> tuple[Any, Any]:
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model_class: Any = BY_TYPE[config.model_type].model_class
    with quiet(), torch.random.fork_rng(devices=[]):
        return model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict=dict(state_dict), **options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing progress bars and reports."""
    shown, level, hidden = logging.is_progress_bar_enabled(), logging.get_verbosity(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        if hidden:
            disable_progress_bars()


def _in_short(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
