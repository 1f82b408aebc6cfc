"""What a run may be started from: checked before anything is made of it.

nnsight takes strings, token ids, encodings and a model's own arguments, and hands on what it does not know.
So a prompt of no rows runs nothing, a misspelt argument is never looked at, and a second prompt is left out,
all without a word. Each function here refuses such a call with a `PromptError` that says what was given and
what there is.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from nnsight.modeling.processing import ROW_FIELDS, as_encoding, split
from torch import Tensor
from transformers import GenerationConfig

from ..errors import PromptError
from ..modeling.architectures import architecture_of
from ..names import nearest


def check_prompt(size: int, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a run cannot start from.

    Args:
        size: D, the width of the residual stream.
        inputs: what was given in front: nothing, or one prompt.
        kwargs: the arguments with names.

    Raises:
        PromptError: naming what was given, and what a prompt is.
    """
    if len(inputs) > 1:
        raise PromptError(
            f"a run takes one prompt, not {len(inputs)} arguments: give several prompts as a list, or each "
            f"to an invoke of its own, and everything else by name, such as attention_mask="
        )
    prompt = inputs[0] if inputs else None
    encoding = {**prompt, **kwargs} if isinstance(prompt, Mapping) else kwargs
    named = [name for name in ("input_ids", "inputs_embeds") if encoding.get(name) is not None]
    twice = isinstance(prompt, Mapping) and set(prompt).intersection(named, kwargs)
    given = ["a prompt"] if twice or not (prompt is None or isinstance(prompt, Mapping)) else []
    given += [f"{name}=" for name in named]
    if len(given) > 1:
        raise PromptError(f"a run takes one prompt, and was given {' and '.join(given)}: give one of them")
    if inputs and not named and (prompt is None or isinstance(prompt, Mapping)):
        raise PromptError(
            f"the prompt is {_described(prompt)}: a run needs a string, a list of strings, token ids [L] "
            f"or [B,L], or an encoding with input_ids"
        )
    if prompt is not None and not isinstance(prompt, Mapping):
        _check_ids("the prompt", prompt)
    if "input_ids" in named:
        _check_ids("input_ids=", encoding["input_ids"])
    if "inputs_embeds" in named:
        _check_embeds(size, encoding["inputs_embeds"])


def _check_embeds(size: int, embeds: Any) -> None:
    fits = isinstance(embeds, Tensor) and embeds.is_floating_point() and embeds.dim() in (2, 3)
    if not fits or embeds.shape[-1] != size or not embeds.shape[0]:
        raise PromptError(f"inputs_embeds= is a floating tensor [B,L,{size}], not {_described(embeds)}")


def _check_ids(what: str, prompt: Any) -> None:
    # Raises `PromptError` for what nnsight makes no token ids of.
    if isinstance(prompt, str):
        return
    if hasattr(prompt, "dtype") and hasattr(prompt, "shape"):
        ids = prompt if isinstance(prompt, Tensor) else torch.as_tensor(prompt, device="cpu")
        if not _are_ids(ids) or ids.dim() not in (1, 2):
            raise PromptError(
                f"{what} is a tensor of {ids.dtype} with shape {tuple(ids.shape)}; token ids are integers, "
                f"int64 or int32, [L] or [B,L]. A residual stream goes in as inputs_embeds= [B,L,D]"
            )
        if ids.dim() == 2 and not len(ids):
            raise PromptError(
                f"{what} has no rows: its shape is {tuple(ids.shape)}, and a run needs one at least"
            )
        return
    if not isinstance(prompt, (list, tuple)):
        raise PromptError(
            f"{what} must be a string, a list of strings or token ids [L] or [B,L], not {_described(prompt)}"
        )
    if not prompt:
        raise PromptError(f"{what} is {prompt!r}: a run needs one prompt at least")
    kinds = {_kind(one) for one in prompt}
    if len(kinds) > 1 or "other" in kinds:
        raise PromptError(
            f"{what} is {_described(prompt)}: a list holds strings, token ids of one prompt, or rows of "
            f"token ids, and one kind of these"
        )
    if kinds == {"ids"}:
        for row, ids in enumerate(prompt):
            if not _are_ids(ids) or getattr(ids, "ndim", 1) > 2:
                raise PromptError(f"row {row} of {what} is {_described(ids)}, and not integer token ids [L]")


def _kind(one: Any) -> str:
    if isinstance(one, str):
        return "text"
    if isinstance(one, (list, tuple)):
        return "message" if one and _is_message(one[0]) else "ids"
    if _is_message(one):
        return "message"
    if getattr(one, "ndim", 0):
        return "ids"
    if isinstance(one, bool):
        return "other"
    return "id" if isinstance(one, numbers.Integral) or _are_ids(one) else "other"


def _is_message(one: Any) -> bool:
    # Of a conversation, which a tokenizer's chat template makes a prompt of.
    return isinstance(one, Mapping) and "role" in one


def _are_ids(value: Any) -> bool:
    # Integers, in a tensor, an array or a list.
    if isinstance(value, (list, tuple)):
        return all(_kind(one) == "id" for one in value)
    if not hasattr(value, "dtype"):
        return False
    ids = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    return ids.dtype in (torch.int64, torch.int32)  # what an embedding takes


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"


def check_arguments(model: Any, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a trace that its forward would take and never look at.

    Raises:
        PromptError: naming the argument and those there are.
    """
    if not kwargs:
        return
    # The architecture's, which an adapter around the model hands them on to.
    parameters = inspect.signature(architecture_of(model._module).model_class.forward).parameters
    known = {name for name in parameters if name not in ("self", "kwargs", "args")} | set(ROW_FIELDS)
    known |= {"padding_side"} | {"past_key_values", "cache_params", "cache_position"} & set(kwargs)
    if inputs and not isinstance(inputs[0], Tensor):
        known |= set(inspect.signature(model.pipeline.preprocess).parameters) - {"generate_kwargs"}
        known |= {"truncation", "max_length", "padding"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        hint = nearest(unknown[0], sorted(known))
        generates = unknown[0] in GenerationConfig().to_dict()
        hint = hint or (f"; it is one of model.generate(prompt, {unknown[0]}=...)" if generates else "")
        raise PromptError(
            f"a trace has no argument {unknown[0]!r}{hint}. Beside the prompt it takes what the forward "
            f"does: {', '.join(name for name in parameters if name not in ('self', 'kwargs'))}"
        )


def check_lengths(model: Any, invokes: list) -> None:
    """Refuse token ids of several lengths where nothing says what to pad with. Raises `PromptError`."""
    if getattr(model.tokenizer, "pad_token_id", None) is not None:
        return
    lengths = set()
    for inputs, kwargs in invokes:
        encoding = as_encoding(inputs[0] if inputs else None, dict(kwargs))
        if encoding is not None and encoding.get("input_ids") is not None:
            lengths |= {row.shape[1] for row in split("input_ids", encoding["input_ids"])[0]}
    if len(lengths) > 1:
        lacks = "has no tokenizer" if model.tokenizer is None else "has a tokenizer without a pad token"
        raise PromptError(
            f"prompts of {' and '.join(map(str, sorted(lengths)))} tokens run together in rows of one "
            f"length, and this model {lacks} to pad them with: fill the shorter with any token and give "
            f"attention_mask= [B,L], 0 where you did, or run them one by one"
        )
