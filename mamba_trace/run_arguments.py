"""What users give to a run: prompts, residual streams, and the arguments of other packages."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .errors import PromptError

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
