"""Models whose weights are quantised as they are loaded: every site, as in a model of the rounded weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, agree, make_hf
from hybrid_models import PLAIN, make_hybrid
from torch import Tensor
from transformers import BitsAndBytesConfig

from mamba_trace import MambaTrace

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises")
pytestmark = [
    pytest.mark.filterwarnings("ignore:no tokenizer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TOKENS = torch.tensor([[5, 9, 14, 2, 30, 7, 7, 1, 22], [3, 1, 4, 1, 5, 9, 2, 6, 5]])


def rounded(plain: Any, quantised: Any) -> Any:
    """``plain`` with the weights that the linear layers of ``quantised`` stand for."""
    plain = copy.deepcopy(plain)
    modules = dict(plain.named_modules())
    found = {name: part for name, part in quantised.named_modules() if isinstance(part, bnb.nn.Linear4bit)}
    assert any(name.endswith("in_proj") for name in found)
    for name, part in found.items():
        exact = bnb.functional.dequantize_4bit(part.weight, part.weight.quant_state)
        modules[name].weight.data = exact.reshape(modules[name].weight.shape)
    return plain


@torch.no_grad()
def traced(model: MambaTrace) -> list[Tensor]:
    """A state, delta and the logits of a trace that edits an earlier state."""
    ssm = model.layers[model.ssm_layers[-1]].ssm
    with model.trace(TOKENS):
        delta = ssm.delta.output.save()
        ssm.h[2].output[:] *= -1.5
        state = ssm.h[-1].output.save()
        logits = model.logits.output.save()
    return [delta, state, logits]


@pytest.mark.parametrize("kind", [*TINY, *PLAIN])
def test_a_model_in_four_bits_is_that_of_the_rounded_weights(kind: str, tmp_path: Path) -> None:
    plain = make_hybrid(kind) if kind in PLAIN else make_hf(model_type=kind)
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = MambaTrace(tmp_path, quantization_config=config, dispatch=True)
    for part in model._module.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            # On processors with bfloat16 instructions its format is another, in half precision, of multiples of 32.
            part.support_avx512bf16_for_cpu = False
    for one, other in zip(traced(model), traced(MambaTrace(rounded(plain, model._module))), strict=True):
        agree(one.float(), other, 2e-5)
