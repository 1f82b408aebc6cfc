"""What users give to a run: prompts, residual streams, and the arguments of other packages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import PromptError, TraceError
from ..tracing.one_run import in_a_run

#: Arguments of MambaLens that choose kernels.
KERNEL_FLAGS = ("fast_conv", "fast_ssm", "warn_disabled_hooks")

_warned = False


def prompt_of(model: Any, input: Any, prepend_bos: bool | None) -> Any:
    """What to give the trace for a user's input. Raises `PromptError`."""
    if isinstance(input, Tensor) and (input.is_floating_point() or input.dim() not in (1, 2)):
        raise PromptError(
            f"token ids are an integer tensor [B,L] or [L], not {input.dtype} {tuple(input.shape)}. "
            f"A residual stream [B,L,D] goes in with start_at_layer"
        )
    if input is None or (isinstance(input, (Tensor, list, tuple)) and not len(input)):
        raise PromptError(f"a run needs a prompt: a string, a list of strings or token ids, not {input!r}")
    texts = [input] if isinstance(input, str) else input
    are_texts = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
    if prepend_bos is None:
        prepend_bos = are_texts and model.default_prepend_bos
    if not prepend_bos or (are_texts and model.tokenizer_prepends_bos):
        return input
    if not are_texts:
        raise PromptError("prepend_bos is for strings: put the token before the others yourself")
    bos = model.tokenizer.bos_token if model.tokenizer is not None else None
    if bos is None:
        raise PromptError("prepend_bos=True, but this model's tokenizer has no beginning-of-sequence token")
    return [bos + text for text in texts]


def check_token_lists(invokes: list) -> None:
    """Refuse a list of prompts one of which has no token ids. Raises `PromptError`."""
    for inputs, _ in invokes:
        prompts = inputs[0] if inputs and isinstance(inputs[0], (list, tuple)) else ()
        for row, one in enumerate(prompts):
            if isinstance(one, (list, tuple, Tensor)) and not len(one):
                raise no_tokens(f"prompt {row} of {len(prompts)}")


def check_tokens(model: Any, invokes: list, inputs: Mapping[str, Any]) -> None:
    """Refuse prompts without tokens, and ids that are none of the vocabulary's.

    Args:
        model: the model they go to.
        invokes: (args, kwargs) of each invoke.
        inputs: what they become together: ``input_ids`` and ``attention_mask`` [B,L], if it has them.

    Raises:
        PromptError: naming the prompt, or the id.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return
    if not ids.shape[1]:
        raise no_tokens("the prompt")
    if isinstance(ids, FakeTensor) or not ids.numel():  # has no numbers to look at
        return
    size = model.config.vocab_size
    for extreme in ids.aminmax():
        if not 0 <= int(extreme) < size:
            raise PromptError(f"token {int(extreme)} is not in the vocabulary, whose ids are 0 to {size - 1}")
    if mask is None or bool(mask.any(-1).all()):
        return
    start = 0
    for args, kwargs in invokes:
        texts = [args[0]] if args and isinstance(args[0], str) else args[0] if args else ()
        # A mask of the user's own may leave out whole rows.
        if isinstance(texts, (list, tuple)) and "attention_mask" not in kwargs:
            for row, text in enumerate(texts):
                if isinstance(text, str) and not mask[start + row].any():
                    raise no_tokens(f"the prompt {text!r}")
        start += model._batch_size(*args, **kwargs)


def no_tokens(what: str) -> PromptError:
    """The error for an empty prompt."""
    return PromptError(f"{what} has no tokens, and every prompt of a run needs one at least")


def residual_of(model: Any, input: Any) -> Tensor:
    """A residual stream [B,L,D]. Raises `PromptError`."""
    size = model.config.hidden_size
    if not isinstance(input, Tensor) or not input.is_floating_point() or input.shape[2:] != (size,):
        found = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise PromptError(
            f"with start_at_layer the input is a residual stream [B,L,{size}], as stop_at_layer returns it, "
            f"not {found}"
        )
    return input


def generation_options(
    model: Any,
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of TransformerLens's ``generate`` as those of Hugging Face's, with the same defaults.

    Raises:
        ValueError: for a ``freq_penalty``, which Hugging Face's has not.
    """
    if freq_penalty:
        raise ValueError(
            f"freq_penalty={freq_penalty}: Hugging Face's generate, which runs here, has none; pass "
            f"logits_processor=[...] with one, or repetition_penalty=, which is another thing"
        )
    if eos_token_id is None:
        eos_token_id = getattr(model.tokenizer, "eos_token_id", None)
    options |= {"max_new_tokens": max_new_tokens, "use_cache": use_past_kv_cache}
    if not stop_at_eos:
        options["eos_token_id"] = None
    elif eos_token_id is not None:
        options["eos_token_id"] = eos_token_id
        first = eos_token_id if isinstance(eos_token_id, int) else eos_token_id[0]
        options.setdefault("pad_token_id", first)  # what a prompt that has ended goes on with
    options["do_sample"] = do_sample and temperature != 0
    if options["do_sample"]:
        top_k, top_p = top_k or 0, 1.0 if top_p is None else top_p  # all there are
        options |= {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    return options


def refuse_inside_a_trace(model: Any, what: str) -> None:
    """Raises `TraceError` where a model is in a trace and ``what``, a function's name, starts its own."""
    if in_a_run(model):
        raise TraceError(
            f"{what} is a trace of its own, and this model is in one: call it before or after it, or ask for "
            f"the sites in it"
        )


def need_gradients(what: str) -> None:
    """Raises `ValueError` where PyTorch records no gradients."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError(f"{what}: gradients are turned off here; run under torch.enable_grad()")


def explain_away(flags: dict[str, Any]) -> None:
    """Accept MambaLens's flags, and warn once in the life of the process. Raises `TypeError` for others."""
    global _warned
    unknown = sorted(set(flags) - set(KERNEL_FLAGS))
    if unknown:
        raise TypeError(f"run_with_cache and run_with_hooks have no argument {unknown[0]!r}")
    if flags and not _warned:
        _warned = True
        warnings.warn(
            f"{', '.join(sorted(flags))}: not needed and without effect. Every run uses the fast kernels "
            f"wherever no hook and no cache looks inside, and every hook works with them; model.last_run "
            f"says what ran",
            DeprecationWarning,
            stacklevel=4,
        )
