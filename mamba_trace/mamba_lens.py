"""What a script written for MambaLens imports instead: ``from mamba_trace import mamba_lens``.

Its loading, conversion, patching and port-back code then runs as it is, and everything of `MambaTrace` is
there beside it, on the same object: `HookedMamba` is one.

    from mamba_trace import mamba_lens

    model = mamba_lens.HookedMamba.from_pretrained("state-spaces/mamba-370m")
    logits, activations = model.run_with_cache("Hello World")

Contract: calls, argument names and hook names are those of MambaLens 0.0.4 and its README; where these two
differ, both are taken. As there, a string gets a beginning-of-sequence token unless ``prepend_bos=False`` or
``model.default_prepend_bos = False`` says otherwise; a string given to the contexts ``with model.trace(...)``
and ``with model.generate(...)``, which are nnsight's, does not. ``generate`` without a ``with`` is
TransformerLens's. Conversions lose nothing (`mamba_trace.conversion`).

MambaLens has Mamba-1. A Falcon-Mamba, whose hook names are the same, is accepted as well; a Mamba-2 is not, since
the names and shapes of its weights are none of MambaLens's: `MambaTrace` has all of this for it but those.

What is different: ``fast_conv`` and ``fast_ssm`` choose nothing, as no kernel disables a hook; ``model.cfg``
is read-only; the embedding and lm_head are one parameter where the checkpoint ties them; and there is no
InputDependentHookPoint. MambaLens makes a hook for each position before each run, because a hook is an object
that must exist to be found. Here ``blocks.3.hook_h.5`` is an address: whatever the length of the prompt, the
run asks what is wanted when it comes by, so there is nothing to set up and nothing to take down.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .arguments.padding import remember, remembered
from .arguments.prompts import prompt_of
from .conversion import check_state_dict, convert_state_dict
from .conversion.building import from_scratch
from .conversion.checkpoints import Checkpoint
from .errors import CheckpointError, PromptError
from .hooked.generation import generation_options
from .hooked.mamba_cfg import (
    MambaCfg,
    MambaInitCfg,
    convert_hooked_mamba_config_to_original_config,
    convert_hooked_state_dict_to_original_state_dict,
    convert_original_config_to_hooked_mamba_config,
    convert_original_state_dict_to_hooked_state_dict,
    plain,
)
from .hooked.run_with import KERNEL_FLAGS, explain_away
from .model import MambaTrace
from .modeling.architectures import ARCHITECTURES, Architecture, architecture_of
from .tracing.one_run import WithBlockNotFoundError

__all__ = [
    "HookedMamba",
    "MambaCfg",
    "MambaInitCfg",
    "convert_hooked_mamba_config_to_original_config",
    "convert_hooked_state_dict_to_original_state_dict",
    "convert_original_config_to_hooked_mamba_config",
    "convert_original_state_dict_to_hooked_state_dict",
]


#: The arguments of TransformerLens's ``generate``, in its order.
GENERATE = (
    *("input", "max_new_tokens", "stop_at_eos", "eos_token_id", "do_sample", "top_k", "top_p", "temperature"),
    *("freq_penalty", "use_past_kv_cache", "prepend_bos", "padding_side", "return_type", "verbose"),
)
#: The ``return_type`` of `HookedMamba.generate`.
GENERATED = ("input", "str", "tokens", "tensor")


class HookedMamba(MambaTrace):
    """A `MambaTrace` that also answers to MambaLens's calls.

    Args:
        cfg: a `MambaCfg`, or a configuration in any format, for a model from scratch; or what `MambaTrace`
            takes: a hub id, a folder, a loaded module.
        tokenizer: needed for prompts that are strings.
        initialize_params: has no effect: parameters are always initialised as Mamba's authors do.
        device: where the model goes; ``cfg.device`` if not given.
        seed: of the initialisation; torch's global generator is not touched.
        **kwargs: as for `MambaTrace`.

    Raises:
        CheckpointError: if ``cfg`` is no configuration of a Mamba-1 or a Falcon-Mamba.

    Example::

        model = HookedMamba(cfg=MambaCfg(d_model=64, n_layers=2, vocab_size=100), initialize_params=True)
        logits = model(torch.tensor([[1, 2, 3]]))  # [B,L,V]
    """

    default_prepend_bos = True
    default_padding_side = "right"

    def __init__(
        self,
        cfg: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        initialize_params: bool = False,
        device: Any = None,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(cfg, (str, Path, nn.Module)):
            device = device or _get(cfg, "device", None)
            prepend = _get(cfg, "default_prepend_bos", True)
            cfg = from_scratch(plain(cfg), torch.float32, seed).to(device)
            device = None  # a module stays where it is
            if not prepend:
                self.default_prepend_bos = False
        if isinstance(cfg, nn.Module):
            _check_architecture(architecture_of(cfg))
        if device is not None:
            kwargs["device"] = device
        super().__init__(cfg, tokenizer=tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> HookedMamba:
        """Load a checkpoint, weights and all.

        Args:
            pretrained_model_name: a hub id or a local folder, in the original or Hugging Face's format.
            device: where it goes; a GPU where there is one.
            tokenizer: found with the checkpoint if not given.
            **kwargs: as for `MambaTrace`: ``dtype``, ``revision``, ``device_map``, ``kernels``, ...

        Raises:
            CheckpointError: if there is no such checkpoint, or it is no Mamba-1 and no Falcon-Mamba.

        Example::

            model = HookedMamba.from_pretrained("state-spaces/mamba-370m")
        """
        return cls(pretrained_model_name, tokenizer, device=device, **{"dispatch": True, **kwargs})

    def _find(self, *args: Any, **kwargs: Any) -> Checkpoint:
        checkpoint = super()._find(*args, **kwargs)
        for architecture in ARCHITECTURES:
            if isinstance(checkpoint.config, architecture.config_class):
                _check_architecture(architecture)
        return checkpoint

    # -- running ---------------------------------------------------------------------------------------

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Run: `forward`. Inside a trace, and with Hugging Face's own arguments, the module's own call."""
        if self.interleaver.interleaving or hook or not (args or "input" in kwargs):
            return super().__call__(*args, hook=hook, **kwargs)
        _explain(kwargs)
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input: a string, a list of strings, or token ids [B,L].
            return_type: ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
            loss_per_token: losses [B,L-1], not their mean.
            prepend_bos: for strings; ``model.default_prepend_bos`` if not given.
            padding_side: of strings, ``"left"`` or ``"right"``; the tokenizer's where it is not given, which
                pads on the right as MambaLens does. It says where positions are, and changes no result.
            **kwargs: as for `run_with_hooks`: ``start_at_layer``, ``stop_at_layer``, ``fast_ssm``, ...

        Returns:
            Logits [B,L,V], or as ``return_type`` and ``stop_at_layer`` say.

        Raises:
            PromptError: if the input is no prompt.

        Example::

            model("Hello World").shape  # [1,L,V]
        """
        _explain(kwargs)
        texts = isinstance(input, (list, tuple)) and all(isinstance(text, str) for text in input)
        if padding_side is not None and texts and len(input):
            input, prepend_bos = self.to_tokens(list(input), prepend_bos, padding_side), None
        return self.run_with_hooks(
            input, return_type=return_type, loss_per_token=loss_per_token, prepend_bos=prepend_bos, **kwargs
        )

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Token ids [B,L] as `MambaTrace.to_tokens` gives them, on the model's device.

        Args:
            input: a string, or a list of strings.
            prepend_bos: ``model.default_prepend_bos`` if not given, which is ``True`` here.
            padding_side: ``"left"`` or ``"right"``; the tokenizer's where it is not given.
            move_to_device: ``False`` to leave them on the CPU.
            truncate: has no effect: a Mamba has no longest prompt.

        Example::

            model.to_tokens("Hello World", prepend_bos=False)
        """
        tokens = super().to_tokens(input, prepend_bos, padding_side)
        if not (move_to_device and self.dispatched):
            return tokens
        mask = remembered(tokens)
        assert mask is not None
        return remember(tokens.to(self.device), mask)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts, as TransformerLens 2 does; with ``with`` before it, nnsight's ``generate``.

        Args:
            input: a string, a list of strings, or token ids [B,L] or [L]; ``""`` if not given.
            max_new_tokens: how many tokens to add at most; 10 if not given.
            stop_at_eos: end a prompt at ``eos_token_id``, the tokenizer's if not given, with which it then
                goes on until all of them have ended.
            do_sample: ``False`` to take the likeliest token each time; by default one is drawn, of the
                ``top_k`` or ``top_p`` likeliest where these are given, at a ``temperature``.
            use_past_kv_cache: keep the states between steps, as is done if not given.
            prepend_bos: for strings; ``model.default_prepend_bos`` if not given.
            return_type: ``"str"``, ``"tokens"`` (or ``"tensor"``), or ``"input"`` for what the input is.
            padding_side, verbose: have no effect. Prompts are padded on the left, as they go on at the end.
            **kwargs: anything else that Hugging Face's ``generate`` takes.

        Returns:
            The prompts and what was added: token ids [B,L], or without special tokens a string, for
            several prompts a list of strings.

        Raises:
            PromptError: if the input is no prompt.
            ValueError: for another ``return_type``, or a ``freq_penalty``.

        Example::

            model.generate("Hello World", max_new_tokens=3, do_sample=False)  # a string
        """
        if self.interleaver.interleaving:
            return super().generate(*args, **kwargs)
        tracer = self.trace(*args, fn=super().generate, **kwargs)
        try:
            tracer.capture()  # looks for a `with` at the line that called this method
        except WithBlockNotFoundError:
            return self._continued(**dict(zip(GENERATE, args, strict=False)), **kwargs)
        return tracer

    def _continued(
        self,
        input: Any = "",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
        **kwargs: Any,
    ) -> Any:
        if return_type not in GENERATED:
            raise ValueError(f"return_type={return_type!r} is none of {', '.join(map(repr, GENERATED))}")
        if isinstance(input, Tensor) and input.is_floating_point():
            raise PromptError(f"generate goes on from strings or token ids, not from {input.dtype} embeddings")
        prompt = prompt_of(self, input, prepend_bos)
        ids = super().generate(prompt, **generation_options(self, **kwargs))  # [B,L]
        one = input if isinstance(input, str) or not isinstance(input, (list, tuple)) else input[0]
        if return_type in ("tokens", "tensor") or (return_type == "input" and not isinstance(one, str)):
            return ids
        decode = self._need_tokenizer().decode
        texts = [decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids]
        return texts[0] if len(texts) == 1 else texts

    # -- weights ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter under MambaLens's names, as views that share the model's memory.

        Raises:
            CheckpointError: if the weights are not loaded, offloaded or quantised.

        Example::

            model.state_dict()["blocks.0.W_delta_1.weight"]  # [R,E]
        """
        weights = {"embedding.weight": self.W_E}
        for layer, block in enumerate(self.blocks):
            weights |= {f"blocks.{layer}.{name}": view for name, view in block.named_weights().items()}
        return weights | {"norm.weight": self.norm.weight, "lm_head.weight": self.W_U.T}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Take over the values of a state dict: under MambaLens's, the original or Hugging Face's names.

        Raises:
            CheckpointError: if keys or shapes do not fit the model, whose weights are then as they were.

        Example::

            model.load_state_dict(convert_original_state_dict_to_hooked_state_dict(original))
        """
        self.dispatch()
        weights = convert_state_dict(state_dict, "huggingface")
        check_state_dict(weights, self.config)
        self._module.load_state_dict(weights, strict=False)  # strict but for a tied lm_head

    def _remoteable_class(self) -> type:
        return MambaTrace  # the model that servers know


def _check_architecture(architecture: Architecture) -> None:
    """Refuse an architecture that MambaLens has no names for. Raises `CheckpointError`."""
    if architecture.hybrid or architecture.family != "selective":
        raise CheckpointError(
            f"this is a {architecture.name}, and a HookedMamba, as in MambaLens, is a Mamba-1 or a Falcon-Mamba: "
            f"mamba_trace.MambaTrace takes it, and has the same hook names, run_with_cache and run_with_hooks"
        )


def _get(cfg: Any, name: str, default: Any) -> Any:
    return cfg.get(name, default) if isinstance(cfg, Mapping) else getattr(cfg, name, default)


def _explain(kwargs: dict[str, Any]) -> None:
    """Take MambaLens's flags out of the arguments of a run, with the warning at the user's line."""
    explain_away({name: kwargs.pop(name) for name in KERNEL_FLAGS if name in kwargs})


def __getattr__(name: str) -> Any:
    if name in ("InputDependentHookPoint", "InputDependentHookedRootModule"):
        raise AttributeError(
            f"{name} has no counterpart here, and needs none: blocks.3.hook_h.5 is an address that a run "
            f"serves when it comes by, so no hooks are made for the length of an input"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
