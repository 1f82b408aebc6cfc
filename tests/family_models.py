"""A tiny model of each architecture, with weights that make every part of it matter.

E=24 and V=31 as in conftest.py; a Mamba-2 has H=6 heads of P=4, G=2 groups and N=5. The sizes all differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SIZES, lively
from transformers import PreTrainedModel

from mamba_trace.modeling.architectures import BY_TYPE

MODEL_TYPES = ("mamba", "falcon_mamba", "mamba2")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HEADS = {"num_heads": 6, "head_dim": 4, "n_groups": 2, "chunk_size": 4}

each_architecture = pytest.mark.parametrize("model_type", MODEL_TYPES)


def family_config(model_type: str, **changes: Any) -> Any:
    """The tiny configuration of an architecture, with fields changed."""
    sizes = {name: size for name, size in SIZES.items() if name != "time_step_rank"} | HEADS
    fields = sizes if model_type == "mamba2" else SIZES
    return BY_TYPE[model_type].config_class(**fields | TOKENS | {"tie_word_embeddings": True} | changes)


def family_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A new model with `lively` weights; equal arguments, equal weights. torch's generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        module: PreTrainedModel = BY_TYPE[model_type].model_class(family_config(model_type, **changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(lively(name, parameter, generator))
    return torch.nn.Module.to(module, dtype).eval()


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, non-persistent buffers included."""
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
