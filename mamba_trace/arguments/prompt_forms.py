"""The forms in which a trace takes a prompt, checked before anything is made of it.

nnsight takes strings, token ids, encodings and a model's own arguments, and passes on whatever it does not
know. So a prompt without rows runs nothing, a misspelt argument is ignored, and a second prompt is dropped,
all without a word. Each function here refuses such a call with a `PromptError` that quotes what was given and
says what is accepted.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GenerationConfig

from ..errors import PromptError
from ..modeling.architectures import architecture_of
from ..modeling.starting import Starting
from ..names import nearest
from ..tracing.prompts import ROW_FIELDS, as_encoding, split
from .model import ArgumentModel

#: The only argument that may be text.
PROMPT = "the prompt"
#: The arguments of generate that count something.
COUNTS = ("max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_beams", "num_return_sequences")
#: The names under which a forward takes the cache of an earlier run.
CACHES = ("cache", "past_key_values", "cache_params")
#: The label of a position that does not count in a loss.
IGNORED = -100


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
        _check_ids(PROMPT, prompt)
    if "input_ids" in named:
        _check_ids("input_ids=", encoding["input_ids"])
    if "inputs_embeds" in named:
        embeds = encoding["inputs_embeds"]
        fits = isinstance(embeds, Tensor) and embeds.is_floating_point() and embeds.dim() in (2, 3)
        if not fits or embeds.shape[-1] != size:
            raise PromptError(f"inputs_embeds= is a floating tensor [B,L,{size}], not {_described(embeds)}")
        if not embeds.numel():
            raise PromptError(f"inputs_embeds= has no tokens: its shape is {tuple(embeds.shape)}, for [B,L,{size}]")
        _check_numbers("inputs_embeds=", embeds)


def _check_ids(what: str, prompt: Any) -> None:
    """Refuse everything that nnsight cannot turn into token ids. Raises `PromptError`."""
    if isinstance(prompt, str) and what == PROMPT:
        return
    if hasattr(prompt, "dtype") and hasattr(prompt, "shape"):
        ids = _tensor(prompt, what)
        if not _are_ids(ids) or ids.dim() not in (1, 2):
            raise PromptError(
                f"{what} is a tensor of {ids.dtype} with shape {tuple(ids.shape)}; token ids are integers, "
                f"int64 or int32, [L] or [B,L]. A residual stream goes in as inputs_embeds= [B,L,D]"
            )
        if ids.dim() == 2 and not len(ids):
            raise PromptError(f"{what} has no rows: its shape is {tuple(ids.shape)}, and a run needs one at least")
        _check_numbers(what, ids)
        return
    if not isinstance(prompt, (list, tuple)):
        text = "a string, a list of strings or " if what == PROMPT else ""
        raise PromptError(f"{what} must be {text}token ids [L] or [B,L], not {_described(prompt)}")
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
    if is_id and isinstance(item, int) and not -(2**63) <= item < 2**63:
        raise PromptError(f"token {item} is in no vocabulary")  # which no tensor could hold
    return "id" if is_id else "other"


def _are_ids(value: Any) -> bool:
    """Whether a tensor, an array or a list holds integers that an embedding takes."""
    if isinstance(value, (list, tuple)):
        return all(_kind(item) == "id" for item in value)
    return hasattr(value, "dtype") and _tensor(value).dtype in (torch.int64, torch.int32)


def _tensor(value: Any, what: str = "the prompt") -> Tensor:
    """A tensor, or an array as a tensor. Raises `PromptError` for an array of objects or of text."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"{what} is {_described(value)}, and not an array of integers: {error}") from error


def _check_numbers(what: str, value: Tensor) -> None:
    """Refuse a tensor whose numbers a run cannot read. Raises `PromptError`; ``what`` is its name."""
    if value.layout != torch.strided or value.is_nested:
        raise PromptError(f"{what} is {_described(value)} of layout {value.layout}: use .to_dense()")
    if value.is_meta and not isinstance(value, FakeTensor) and detect_fake_mode() is None:
        raise PromptError(f"{what} is on the meta device, which holds no numbers: give a tensor that has some")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a {type(value).__name__})"


#: What tokenizers put into an encoding beside what the forward takes; nnsight leaves it out.
OF_ENCODINGS = {
    *("token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"),
    *("overflowing_tokens", "num_truncated_tokens"),
}


def check_arguments(model: ArgumentModel, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a trace that its forward would accept and ignore, or that are of another type.

    Raises:
        PromptError: naming the argument, and the arguments that exist.
    """
    encoding = inputs[0] if inputs and isinstance(inputs[0], Mapping) else {}
    if not kwargs and not encoding:
        return
    # The architecture's forward, since an adapter around the model passes its arguments on to that.
    architecture = architecture_of(model._module)
    parameters = inspect.signature(architecture.model_class.forward).parameters
    known = (
        {"use_cache", "return_dict"}
        | {name for name in parameters if name not in ("self", "kwargs", "args")}
        | set(ROW_FIELDS)
    )
    # The older name of cache=, which transformers still reads; it ignores the other's.
    known |= {"padding_side", "cache_position", "past_key_values" if architecture.hybrid else "cache_params"}
    known |= {f"output_{values}" for values in architecture.recorded}
    known |= {name for name in CACHES if kwargs.get(name) is None}
    _refuse_unknown("an encoding", set(encoding) - known - OF_ENCODINGS, known, parameters)
    if inputs and not isinstance(inputs[0], Tensor):
        known |= set(inspect.signature(model.pipeline.preprocess).parameters) - {"generate_kwargs"}
        known |= {"truncation", "max_length", "padding"}
    _refuse_unknown("a trace", set(kwargs) - known, known, parameters)
    for name, value in {**encoding, **kwargs}.items():
        check_value(name, value, model.config.vocab_size)


def _refuse_unknown(what: str, unknown: set[str], known: set[str], parameters: Iterable[str]) -> None:
    for name in sorted(unknown, key=str):
        hint = nearest(name, sorted(known)) if isinstance(name, str) else ""
        if name in ("past_key_values", "cache_params"):
            hint = "; the cache of an earlier run goes in as cache="
        elif not hint and name in GenerationConfig().to_dict():
            hint = f"; it is one of model.generate(prompt, {name}=...)"
        raise PromptError(
            f"{what} has no argument {name!r}{hint}. Beside the prompt it takes what the forward "
            f"does: {', '.join(name for name in parameters if name not in ('self', 'kwargs'))}"
        )


def check_value(name: str, value: Any, size: int) -> None:
    """Refuse a value of a forward's argument that is of another type than it takes.

    Args:
        name: the argument.
        value: what was given; ``None`` is the same as nothing.
        size: of the vocabulary.

    Raises:
        PromptError: saying what the argument takes.
    """
    takes = ""
    if value is None:
        return
    if name in ("use_cache", "return_dict") or name.startswith("output_"):
        takes = "" if isinstance(value, (bool, int)) and value in (0, 1) else "True or False"
    elif name in CACHES:
        takes = "" if hasattr(value, "layers") or isinstance(value, Starting) else "the cache of an earlier run"
    elif name == "logits_to_keep":
        counts = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
        takes = "" if counts or _are_integers(value) else "how many of the last positions, 0 for all, or their indices"
    elif name in ("labels", "position_ids"):
        takes = "" if _are_integers(value) else "an integer tensor [B,L]"
    if takes:
        raise PromptError(f"{name}= takes {takes}, not {_described(value)}")
    if name == "labels":
        labels = _tensor(value, "labels=")
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= size))]
        if wrong.numel():
            raise PromptError(
                f"labels= has {int(wrong[0])}, which is not in the vocabulary, whose ids are 0 to {size - 1}; "
                f"{IGNORED} is for positions that do not count"
            )


def check_counts(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of generate that count something and are no integers. Raises `PromptError`."""
    for name in COUNTS:
        value = kwargs.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise PromptError(f"{name}= takes an integer, not {_described(value)}")


def _are_integers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        value = _tensor(value)
    integral = hasattr(value, "dtype") and _tensor(value).dtype in (torch.int64, torch.int32)
    return integral and _tensor(value).dim() <= 2


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
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape != ids.shape:
        raise PromptError(
            f"labels= is one token id for each of the prompt's, of shape {list(ids.shape)}, not {list(labels.shape)}"
        )
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
