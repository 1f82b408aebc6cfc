"""The forms in which a trace takes a prompt, checked before anything is made of it.

nnsight takes strings, token ids, encodings and a model's own arguments, and passes on whatever it does not
know. So a prompt without rows runs nothing, a misspelt argument is ignored, and a second prompt is dropped,
all without a word. Each function here refuses such a call with a `PromptError` that quotes what was given and
says what is accepted.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GenerationConfig

from ..errors import PromptError
from ..modeling.architectures import architecture_of
from ..names import nearest
from ..tracing.prompts import ROW_FIELDS, as_encoding, split
from .model import ArgumentModel


def check_prompt(size: int, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse a prompt that a run cannot start from.

    Args:
        size: D, the width of the residual stream.
        inputs: the positional arguments: none, or one prompt.
        kwargs: the keyword arguments.

    Raises:
        PromptError: quoting what was given, and saying what a prompt is.
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
        embeds = encoding["inputs_embeds"]
        fits = isinstance(embeds, Tensor) and embeds.is_floating_point() and embeds.dim() in (2, 3)
        if not fits or embeds.shape[-1] != size or not embeds.shape[0]:
            raise PromptError(f"inputs_embeds= is a floating tensor [B,L,{size}], not {_described(embeds)}")


def _check_ids(what: str, prompt: Any) -> None:
    """Refuse everything that nnsight cannot turn into token ids. Raises `PromptError`."""
    if isinstance(prompt, str):
        return
    if hasattr(prompt, "dtype") and hasattr(prompt, "shape"):
        ids = _tensor(prompt)
        if not _are_ids(ids) or ids.dim() not in (1, 2):
            raise PromptError(
                f"{what} is a tensor of {ids.dtype} with shape {tuple(ids.shape)}; token ids are integers, "
                f"int64 or int32, [L] or [B,L]. A residual stream goes in as inputs_embeds= [B,L,D]"
            )
        if ids.dim() == 2 and not len(ids):
            raise PromptError(f"{what} has no rows: its shape is {tuple(ids.shape)}, and a run needs one at least")
        return
    if not isinstance(prompt, (list, tuple)):
        raise PromptError(
            f"{what} must be a string, a list of strings or token ids [L] or [B,L], not {_described(prompt)}"
        )
    if not prompt:
        raise PromptError(f"{what} is {prompt!r}: a run needs one prompt at least")
    kinds = {_kind(item) for item in prompt}
    if len(kinds) > 1 or "other" in kinds:
        raise PromptError(
            f"{what} is {_described(prompt)}: a list holds strings, token ids of one prompt, or rows of "
            f"token ids, and one kind of these"
        )
    if kinds == {"ids"}:
        for row, ids in enumerate(prompt):
            if not _are_ids(ids) or getattr(ids, "ndim", 1) > 2:
                raise PromptError(f"row {row} of {what} is {_described(ids)}, and not integer token ids [L]")


def _kind(item: Any) -> str:
    """What an item of a list of prompts is: "text", "message", "ids", "id" or "other"."""
    if isinstance(item, str):
        return "text"
    first = item[0] if isinstance(item, (list, tuple)) and item else item
    if isinstance(first, Mapping) and "role" in first:  # of a conversation, for a chat template
        return "message"
    if isinstance(item, (list, tuple)) or getattr(item, "ndim", None):
        return "ids"
    is_id = not isinstance(item, bool) and (isinstance(item, numbers.Integral) or _are_ids(item))
    return "id" if is_id else "other"


def _are_ids(value: Any) -> bool:
    """Whether a tensor, an array or a list holds integers that an embedding takes."""
    if isinstance(value, (list, tuple)):
        return all(_kind(item) == "id" for item in value)
    return hasattr(value, "dtype") and _tensor(value).dtype in (torch.int64, torch.int32)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"


def check_arguments(model: ArgumentModel, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a trace that its forward would accept and ignore.

    Raises:
        PromptError: naming the argument, and the arguments that exist.
    """
    if not kwargs:
        return
    # The architecture's forward, since an adapter around the model passes its arguments on to that.
    parameters = inspect.signature(architecture_of(model._module).model_class.forward).parameters
    known = {"use_cache"} | {name for name in parameters if name not in ("self", "kwargs", "args")} | set(ROW_FIELDS)
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


def check_lengths(model: ArgumentModel, invokes: list) -> None:
    """Refuse token ids of several lengths where the model has no padding token. Raises `PromptError`."""
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


def check_token_lists(invokes: list) -> None:
    """Refuse a list of prompts if one of them has no token ids. Raises `PromptError`."""
    for inputs, _ in invokes:
        prompts = inputs[0] if inputs and isinstance(inputs[0], (list, tuple)) else ()
        for row, prompt in enumerate(prompts):
            if isinstance(prompt, (list, tuple, Tensor)) and not len(prompt):
                raise _no_tokens(f"prompt {row} of {len(prompts)}")


def check_tokens(model: ArgumentModel, invokes: list, inputs: Mapping[str, Any]) -> None:
    """Refuse prompts without tokens, and ids outside the vocabulary.

    Args:
        model: the model that will run.
        invokes: (args, kwargs) of each invoke.
        inputs: the batch that the invokes become: ``input_ids`` and ``attention_mask`` [B,L], if it has them.

    Raises:
        PromptError: naming the prompt, or the id.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return
    if not ids.shape[1]:
        raise _no_tokens("the prompt")
    if isinstance(ids, FakeTensor) or not ids.numel():  # there are no numbers to look at
        return
    check_ids(ids, model.config.vocab_size)
    if mask is None or bool(mask.any(-1).all()):
        return
    start = 0
    for args, kwargs in invokes:
        texts = [args[0]] if args and isinstance(args[0], str) else args[0] if args else ()
        # A mask of the user's own may leave out whole rows.
        if isinstance(texts, (list, tuple)) and "attention_mask" not in kwargs:
            for row, text in enumerate(texts):
                if isinstance(text, str) and not mask[start + row].any():
                    raise _no_tokens(f"the prompt {text!r}")
        start += model._batch_size(*args, **kwargs)


def check_ids(ids: Tensor, size: int) -> None:
    """Refuse token ids, of any shape, that are not in a vocabulary of ``size``. Raises `PromptError`."""
    for extreme in ids.aminmax() if ids.numel() else ():
        check_id(int(extreme), size)


def check_id(token: int, size: int) -> int:
    """``token``. Raises `PromptError` if it is not in a vocabulary of ``size``."""
    if not 0 <= token < size:
        raise PromptError(f"token {token} is not in the vocabulary, whose ids are 0 to {size - 1}")
    return token


def _no_tokens(what: str) -> PromptError:
    return PromptError(f"{what} has no tokens, and every prompt of a run needs one at least")
