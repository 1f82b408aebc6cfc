"""The block: what of an edit goes to the mixer, what to the residual stream, and what is computed again."""

from __future__ import annotations

import copy

import pytest
import torch
from by_hand import by_hand, change, same
from conftest import ModuleFactory, agree, near
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaRMSNorm

from mamba_trace import MambaTrace
from mamba_trace.modeling.architectures.mamba import HookableMambaRMSNorm


@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
def test_layer_input_never_reaches_the_residual(tiny, hf, tokens, in_place):
    with torch.no_grad(), tiny.trace(tokens):
        clean = tiny.layers[0].resid_pre.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        resid_pre = tiny.layers[0].resid_pre.output.save()
        if in_place:
            tiny.layers[0].layer_input.output[:] = change(tiny.layers[0].layer_input.output)
        else:
            tiny.layers[0].layer_input.output = change(tiny.layers[0].layer_input.output)
        out = tiny.layers[0].ssm.out_proj.output.save()
        resid_post = tiny.layers[0].resid_post.output.save()
    assert torch.equal(resid_pre, clean)
    assert torch.equal(resid_post, resid_pre + out)
    same(out, by_hand(hf, tokens, {"layers[0].layer_input": change})["layers[0].ssm.out_proj"])


def test_resid_pre_reaches_both_the_block_and_the_residual(tiny, hf, tokens):
    expected = by_hand(hf, tokens, {"layers[1].resid_pre": change})
    with torch.no_grad(), tiny.trace(tokens):
        tiny.layers[1].resid_pre.output = change(tiny.layers[1].resid_pre.output)
        layer_input = tiny.layers[1].layer_input.output.save()
        resid_post = tiny.layers[1].resid_post.output.save()
    same(layer_input, expected["layers[1].layer_input"])
    same(resid_post, expected["layers[1].resid_post"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_an_edit(tiny_hf: ModuleFactory, tokens: Tensor, reentrant: bool) -> None:
    """What checkpointing computes again in the backward pass has the edit too."""

    def gradient(checkpointing: bool) -> Tensor:
        model = MambaTrace(tiny_hf())
        model._module.train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model._module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with model.trace(tokens, labels=tokens):
            model.layers[1].ssm.h[3].output[:] *= -2
            loss = model.output.loss.save()
        loss.backward()
        return model._module.backbone.embeddings.weight.grad

    agree(gradient(checkpointing=True), gradient(checkpointing=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_norm_is_hugging_face_s_and_rounds_no_float64(dtype: torch.dtype) -> None:
    theirs = MambaRMSNorm(12, eps=1e-3).to(dtype)
    theirs.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 5, 12, dtype=dtype, generator=torch.Generator().manual_seed(3))
    ours = copy.deepcopy(theirs)
    ours.__class__ = HookableMambaRMSNorm
    found = ours(x)
    if dtype == torch.bfloat16:
        assert torch.equal(found, theirs(x))
        return
    x, weight = x.double(), theirs.weight.double()
    exact = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    near(found, exact, 1e-14 if dtype == torch.float64 else 3e-7)


def test_a_block_that_fails_in_a_trace_checkpoints_as_before(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf())
    model._module.train()
    model._module.gradient_checkpointing_enable()
    with pytest.raises(ZeroDivisionError), model.trace(tokens):
        model.layers[1].resid_post.output = 1 / 0
    assert all(block.gradient_checkpointing for block in model._module.backbone.layers)
