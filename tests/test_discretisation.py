"""delta, A_bar, B_bar and write: made where they are wanted, and what the scan then runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import by_hand, change, same
from conftest import ModuleFactory, both_families
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.modeling import discretisation


@both_families
@pytest.mark.parametrize("pair", [("A_bar", "B_bar"), ("delta", "A_bar"), ("B", "B_bar")], ids=str)
def test_edits_of_several_discretised_matrices(tiny, hf, tokens, pair):
    paths = [f"layers[0].ssm.{name}" for name in pair]
    expected = by_hand(hf, tokens, dict.fromkeys(paths, change))
    with torch.no_grad(), tiny.trace(tokens):
        for path in paths:
            tiny.hook(path).output[:] = change(tiny.hook(path).output)
        logits = tiny.lm_head.output.save()
    same(logits, expected["lm_head"])


@both_families
@pytest.mark.parametrize("name", ["A_bar", "B_bar"])
def test_reading_a_discretised_matrix_keeps_the_selective_scan(tiny, tokens, name, monkeypatch):
    def never(*args: Any) -> None:
        raise AssertionError("the explicit recurrence ran")

    monkeypatch.setattr(discretisation, "Explicit", never)
    with torch.no_grad(), tiny.trace(tokens):
        value = getattr(tiny.layers[0].ssm, name).output.save()
    assert value.shape[1] == tokens.shape[1]


@both_families
@pytest.mark.parametrize("name", ["A_bar", "B_bar"])
def test_reading_a_discretised_matrix_twice_keeps_the_selective_scan(tiny, tokens, name, monkeypatch):
    monkeypatch.setattr("mamba_trace.modeling.discretisation.Explicit", None)  # calling it would raise
    with torch.no_grad(), tiny.trace(tokens):
        tiny.layers[0].ssm.get(name).output.sum()
        again = tiny.layers[0].ssm.get(name).output.save()
    assert again.shape[1] == tokens.shape[1]


@pytest.mark.parametrize("name", ["A_bar", "B_bar"])
def test_the_gradient_of_a_matrix_that_was_read_beside_the_whole_trajectory(tiny_hf, tokens, name) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64))
    grads = []
    for whole in (False, True):
        with model.trace(tokens):
            matrix = model.layers[0].ssm.get(name).output
            if whole:
                model.layers[0].ssm.h.output.sum()
            loss = model.lm_head.output.square().sum()
            with loss.backward():
                grads.append(matrix.grad.clone().save())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
def test_detached_matrices_let_no_gradient_through(tiny_hf: ModuleFactory, tokens: Tensor, frozen: bool) -> None:
    """Also where nothing else takes one: the matrices are all that lead from the state to A_log."""
    model = MambaTrace(tiny_hf(dtype=torch.float64))
    mixer = model._module.backbone.layers[0].mixer
    for parameter in model._module.parameters():
        parameter.requires_grad_(not frozen)
    mixer.A_log.requires_grad_()
    mixer.dt_proj.bias.requires_grad_()
    with model.trace(tokens):
        for name in ("A_bar", "B_bar"):
            place = model.layers[0].ssm.get(name)
            place.output = place.output.detach()
        y = model.layers[0].ssm.y.output.sum().save()
    if frozen:
        assert not y.requires_grad
    else:
        found = torch.autograd.grad(y, [mixer.A_log, mixer.dt_proj.bias], allow_unused=True)
        assert found == (None, None)
