"""Agreement with Hugging Face's own Mamba, run from a copy taken before the module was made hookable."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHERS, VARIANTS, ModuleFactory, agree, pair
from reference import forward
from torch import Tensor, nn
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from mamba_trace import MambaTrace
from mamba_trace.modeling.architectures.mamba import MAMBA

# -- plain forwards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_every_layer(tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], batch: int) -> None:
    plain, model = pair(tiny_hf, **changes)
    tokens, residuals = tokens[:batch], []
    expected = plain(tokens, output_hidden_states=True)
    untraced = model._module(tokens, output_hidden_states=True)
    agree(untraced.logits, expected.logits)
    for actual, hidden in zip(untraced.hidden_states, expected.hidden_states, strict=True):
        agree(actual, hidden)
    with model.trace(tokens):
        for layer in model.layers:
            residuals.append(layer.resid_post.output.save())
        final = model.norm_f.output.save()
        logits = model.output.logits.save()
    agree(logits, expected.logits)
    for actual, hidden in zip([*residuals, final], expected.hidden_states, strict=True):
        agree(actual, hidden)


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_short_and_long_prompts(tiny_hf: ModuleFactory, length: int) -> None:
    plain, model = pair(tiny_hf)
    tokens = torch.randint(1, 31, (2, length), generator=torch.Generator().manual_seed(0))
    with model.trace(tokens):
        model.layers[1].ssm.h[-1].output.save()
        logits = model.lm_head.output.save()
    agree(logits, plain(tokens).logits)


def test_float64_is_as_near_as_hugging_face_computes(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    """Hugging Face rounds A, D and the norms to float32; tests/test_reference.py holds ours to 1e-12."""
    plain, model = pair(tiny_hf, dtype=torch.float64)
    agree(model._module(tokens).logits, plain(tokens).logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_half_precision_is_no_worse_than_hugging_face(
    tiny_hf: ModuleFactory, tokens: Tensor, dtype: torch.dtype, residual_in_fp32: bool
) -> None:
    plain, model = pair(tiny_hf, dtype=dtype, residual_in_fp32=residual_in_fp32)
    exact = forward(plain.state_dict(), plain.config, tokens)
    theirs = plain(tokens).logits
    with model.trace(tokens):
        A = model.layers[1].ssm.A.output.save()
        h = model.layers[1].ssm.h[4].output.save()
        ours = model.output.logits.save()
    assert ours.dtype == theirs.dtype
    assert h.dtype == A.dtype == torch.float32
    torch.testing.assert_close(A, -torch.exp(plain.backbone.layers[1].mixer.A_log.float()), rtol=2e-7, atol=0)
    size = exact.square().mean().sqrt()
    error, error_of_theirs = ((logits.double() - exact).square().mean().sqrt() / size for logits in (ours, theirs))
    assert error < 8 * torch.finfo(dtype).eps
    assert error < 1.25 * error_of_theirs
    assert (ours.double() - theirs.double()).square().mean().sqrt() / size < 8 * torch.finfo(dtype).eps


# -- generate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation(
    tiny_hf: ModuleFactory, tokens: Tensor, changes: dict[str, Any], batch: int, use_cache: bool
) -> None:
    plain, model = pair(tiny_hf, **changes)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    # Hugging Face's decode step leaves time_step_limit out.
    expected = plain.generate(
        tokens[:batch], **{**options, "use_cache": use_cache and "time_step_limit" not in changes}
    )
    assert expected.shape[1] == 15
    assert torch.equal(model._module.generate(tokens[:batch], **options), expected)
    with model.generate(tokens[:batch], **options) as tracer:
        states = [].save()
        for _ in tracer.iter[:6]:
            states.append(model.layers[1].ssm.h[-1].output)
        result = tracer.result.save()
    assert torch.equal(result, expected)
    with model.trace(expected[:, :-1]):
        trajectory = model.layers[1].ssm.h.output.save()
    assert len(states) == 6
    for step, state in enumerate(states):
        agree(state, trajectory[:, 8 + step])


def test_beam_search(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    assert torch.equal(model._module.generate(tokens, **options), plain.generate(tokens, **options))


# -- the module itself -------------------------------------------------------------------------------------


def test_wrapping_changes_no_parameter(tiny_hf: ModuleFactory) -> None:
    module = tiny_hf(use_bias=True)
    before = copy.deepcopy(module)
    MambaTrace(module)
    ours, theirs = module.state_dict(), before.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert [name for name, _ in module.named_buffers()] == [name for name, _ in before.named_buffers()]
    module.load_state_dict(before.state_dict(), strict=True)


def test_two_models_over_one_module(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    module = tiny_hf()
    expected = copy.deepcopy(module)(tokens).logits
    first, second = MambaTrace(module), MambaTrace(module)
    with first.trace(tokens):
        first.layers[0].ssm.h[2].output[:] = 0
        edited = first.lm_head.output.save()
    with second.trace(tokens):
        h = second.layers[0].ssm.h[2].output.save()
        logits = second.lm_head.output.save()
    with first.trace(tokens):
        h_of_first = first.layers[0].ssm.h[2].output.save()
        again = first.lm_head.output.save()
    agree(logits, expected)
    agree(again, expected)
    assert torch.equal(h, h_of_first)
    assert h.any()
    assert not torch.allclose(edited, expected)


def test_a_saved_checkpoint_is_plain_hugging_face(tiny_hf: ModuleFactory, tokens: Tensor, tmp_path: Path) -> None:
    model = MambaTrace(tiny_hf(use_bias=True))
    with model.trace(tokens):
        logits = model.lm_head.output.save()
    model._module.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.backbone.layers[0]).__name__ == "MambaBlock"
    agree(loaded(tokens).logits, logits)
    assert torch.equal(MambaTrace(str(tmp_path), dispatch=True)._module(tokens).logits, logits)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("traced", [False, True])
def test_training(tiny_hf: ModuleFactory, tokens: Tensor, checkpointing: dict[str, Any] | None, traced: bool) -> None:
    plain, model = pair(tiny_hf, use_bias=True)
    module = model._module
    plain.train()
    module.train()
    if checkpointing is not None:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    expected = plain(tokens, labels=tokens).loss
    if traced:
        with model.trace(tokens, labels=tokens):
            model.layers[1].ssm.h[3].output.save()
            loss = model.output.loss.save()
    else:
        loss = module(tokens, labels=tokens).loss
    agree(loss, expected)
    expected.backward()
    loss.backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        agree(ours.grad, theirs.grad, 1e-4)
    assert module.training


def test_inference_mode(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, model = pair(tiny_hf)
    with torch.inference_mode():
        with model.trace(tokens):
            model.layers[0].ssm.A_bar.output[:, 2] *= 1
            model.layers[1].ssm.h[2].output[:] *= 1
            model.layers[1].ssm.h[-1].output.save()
            logits = model.lm_head.output.save()
        agree(logits, plain(tokens).logits)


@pytest.mark.parametrize("theirs", [MambaBlock, MambaMixer], ids=lambda cls: cls.__name__)
def test_every_argument_of_hugging_face_s_forward_is_one_of_ours(theirs: type[nn.Module]) -> None:
    """One that was renamed would vanish in ``**kwargs``: a cache, for one, silently unused."""
    ours = MAMBA.hookable[theirs]
    wanted = inspect.signature(inspect.unwrap(theirs.forward)).parameters
    assert set(wanted) <= set(inspect.signature(inspect.unwrap(ours.forward)).parameters)
