"""Hugging Face's hybrids as an oracle for every value that is the input or the output of one of their modules.

Hugging Face computes scans, norms, routers and RoPE in float32 in a float64 model, too. `in_float64` lifts that, so
that two evaluations of one formula agree to rounding in float64. `places` says which of its modules have which sites.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import EditValue
from reference_hybrid_mixers import time_step_limit
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class _Lifted:
    """`torch` as a modeling file sees it, where float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def in_float64(module: PreTrainedModel) -> Iterator[None]:
    """Let the modeling file of a float64 model upcast to float64 where it says float32, RoPE's frequencies included."""
    file = sys.modules[type(module).__module__]
    rotary_module = getattr(module.model, "rotary_emb", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(file, "torch", _Lifted())
        if rotary_module is not None:
            frequencies, _ = rotary_module.compute_default_rope_parameters(module.config)
            patch.setitem(rotary_module._buffers, "inv_freq", frequencies)
        yield


def lift_limit(module: PreTrainedModel) -> None:
    """Give Nemotron-H's mixers the limit of delta that the configuration has, which Hugging Face ignores."""
    for mixer in module.modules():
        if hasattr(mixer, "time_step_limit"):
            mixer.time_step_limit = time_step_limit(module.config)


@dataclass(frozen=True)
class Place:
    """A site that is the input or the output of one of Hugging Face's modules.

    Attributes:
        path: the site's.
        module: the module.
        split: the last axes of the site where the module has one.
        reads: whether it is the input.
    """

    path: str
    module: torch.nn.Module
    split: tuple[int, ...] = (-1,)
    reads: bool = False

    def change(self, edit: EditValue, shape: torch.Size) -> RemovableHandle:
        """Let the module's value pass through ``edit``, until the handle is removed. ``shape`` is the tokens'."""

        def edited(value: Tensor) -> Tensor:  # a router's has one axis for rows and positions
            return edit(self.path, value.reshape(*shape, *self.split)).reshape(value.shape)

        def before(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (edited(args[0]), *args[1:])

        def after(_: torch.nn.Module, args: Any, output: Any) -> Any:
            return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

        return self.module.register_forward_pre_hook(before) if self.reads else self.module.register_forward_hook(after)


#: The sites that are outputs of modules, by the names of these in a block.
OUTPUTS = {
    "norm": "norm",
    "input_layernorm": "norm",
    "mamba_decoder.input_layernorm": "norm",
    "pre_ff_layernorm": "norm_2",
    "post_attention_layernorm": "norm_2",
    "linear": "shared_out",
    "feed_forward": "mlp_out",
}
#: And by the last part of their names.
INNER_OUTPUTS = {
    "out_proj": "ssm.out_proj",
    "dt_layernorm": "ssm.delta_1",
    "router": "moe.router",
    "gate": "moe.router",
}
#: The terms that are a module's output where they have no multiplier, by the kind of layer.
TERMS = {"linear_attention": "ssm_out", "full_attention": "attn_out", "mlp": "mlp_out", "moe": "mlp_out"}


def places(module: PreTrainedModel) -> Iterator[Place]:
    """Those of a model, by the names that the modules have in the seven architectures."""
    config = module.config
    yield Place("embeddings", module.get_input_embeddings())
    yield Place("lm_head", module.lm_head)
    for layer, block in enumerate(module.model.layers):
        at = f"layers[{layer}]."
        yield Place(f"{at}resid_post", block)
        for name, inner in block.named_modules():
            last = name.rpartition(".")[2]
            if last in ("q_proj", "k_proj", "v_proj") and not getattr(config, "use_shared_attention_adapter", False):
                heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
                yield Place(f"{at}attn.{last[0]}", inner, (heads, -1))
            elif last == "o_proj":
                yield Place(f"{at}attn.z", inner, (config.num_attention_heads, -1), reads=True)
            elif name in ("mixer.norm", "mamba.norm", "mamba_decoder.mamba.norm"):
                if hasattr(inner, "weight") and not getattr(inner, "norm_before_gate", False):
                    yield Place(f"{at}ssm.inner_norm", inner)  # before the gate its output is that of the gate
            elif name in ("mixer", "mamba", "self_attn", "mamba_decoder.mamba"):
                if config.model_type not in ("falcon_h1", "granitemoehybrid"):
                    kind = config.layer_types[layer]
                    yield Place(at + TERMS.get(kind, "ssm_out"), inner)
            elif found := OUTPUTS.get(name, INNER_OUTPUTS.get(last)):
                if found == "norm_2":
                    yield Place(f"{at}mlp_input", inner, reads=True)
                if found != "mlp_out" or config.model_type != "granitemoehybrid":
                    yield Place(at + found, inner)
