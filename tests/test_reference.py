"""Every value and the logits of the pure Mambas against tests/reference.py. `test_programs` has interventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import OTHERS, VARIANTS, ModuleFactory
from reference import forward
from subjects import L, distance, draw_tokens
from torch import Tensor

from mamba_trace import MambaTrace

N_LAYERS = 3
FLOAT64, FLOAT32 = 1e-12, 1e-5  # of the largest value


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_value_in_float64(tiny_hf: ModuleFactory, changes: dict[str, Any], batch: int) -> None:
    module = tiny_hf(dtype=torch.float64, **changes)
    expected: dict[str, Tensor] = {}

    def keep(hook: str, value: Tensor) -> Tensor:
        expected[hook] = value.detach()
        return value

    tokens = draw_tokens(batch, seed=2)
    forward(module.state_dict(), module.config, tokens, keep)
    model, actual = MambaTrace(module), {}
    with model.trace(tokens):
        for hook in expected:
            actual[hook] = model.hook(hook).output.save()
    in_mamba_lens = {hook for hook in expected if ".mixer." not in hook and not hook.endswith("hook_h")}
    assert set(model.hook_names(L)) == in_mamba_lens
    for hook, value in actual.items():
        assert value.dtype == torch.float64
        if value.any():
            assert distance(value, expected[hook]) < FLOAT64, hook
        else:
            assert not expected[hook].any()


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
def test_logits_in_float32(tiny_hf: ModuleFactory, changes: dict[str, Any]) -> None:
    module, tokens = tiny_hf(**changes), draw_tokens(3, seed=2)
    expected = forward(module.state_dict(), module.config, tokens)
    model = MambaTrace(module)
    with model.trace(tokens):
        logits = model.lm_head.output.save()
    assert logits.dtype == torch.float32
    assert distance(logits, expected) < FLOAT32
