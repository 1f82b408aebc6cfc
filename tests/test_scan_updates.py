"""Decoding in the cache's own memory: the same numbers, the same cache, and only where nobody could tell."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from conftest import TINY, agree, make_hf, near
from hybrid_models import PLAIN, make_hybrid
from subjects import draw_tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mamba_trace import MambaTrace
from mamba_trace.modeling.past import PastStates
from mamba_trace.scan import DUAL, HEADED, SELECTIVE, cpu, reference
from mamba_trace.scan.dispatch import conv_update
from mamba_trace.scan.record import Call, recording

FAMILIES = {"selective": SELECTIVE, "headed": HEADED, "dual": DUAL}


def inputs(family: str, rows: int, length: int = 1) -> list[Tensor]:
    """x, delta, A, B, C, D, skip and h in float64: 6 heads of 20 channels, or 40 channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    if family == "dual":
        x, skip = draw(2, rows, length, 6, 20)
        B, C = draw(2, rows, length, 2, 5)
        return [x, draw(rows, length, 6).exp(), -draw(6).exp(), B, C, draw(6), skip, draw(rows, 6, 20, 5)]
    x, skip, delta = draw(3, rows, length, 40)
    heads = (2,) if family == "headed" else ()
    B, C = draw(2, rows, length, *heads, 5)
    return [x, delta, -draw(40, 5).exp(), B, C, draw(40), skip, draw(rows, 40, 5)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 40])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_update_is_the_gated_scan_in_the_memory_of_its_state(
    family: str, rows: int, length: int, dtype: torch.dtype
) -> None:
    x, delta, A, *others, h = given = inputs(family, rows, length)
    expected, last = FAMILIES[family].gated_scan(x, delta, A, *others, h, kernels="reference")
    *given, state = [tensor.to(dtype) for tensor in given]
    state = h.to(torch.promote_types(dtype, torch.float32))
    version, memory = state._version, state.data_ptr()
    actual = FAMILIES[family].gated_update(*given, state)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    near(actual.double(), expected, tolerance)
    near(state.double(), last, tolerance)
    assert (state.data_ptr(), actual.dtype) == (memory, dtype)
    assert state._version > version  # so that autograd refuses a backward pass through the state before
    from_zero, _ = FAMILIES[family].gated_scan(x, delta, A, *others, kernels="reference")
    near(FAMILIES[family].gated_update(*given, None).double(), from_zero, tolerance)


@pytest.mark.parametrize("family", ["selective", "dual"])
def test_an_update_is_one_call_of_a_kernel_and_takes_any_layout(family: str) -> None:
    given = [tensor.float() for tensor in inputs(family, 3)]
    calls: list[Call] = []
    apart = [t.new_zeros(*t.shape, 2)[..., 0].copy_(t) for t in given[:-1]]
    with recording(calls):
        first, second = given[-1].clone(), given[-1].mT.contiguous().mT
        expected = FAMILIES[family].gated_update(*given[:-1], first)
        assert calls == [Call("gated_scan", "cpu", 1)]
        agree(FAMILIES[family].gated_update(*apart, second), expected)  # h, too, has no layout of the kernel's
    agree(second, first)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", [cpu, reference])  # the second has no kernel for it
def test_the_convolution_of_one_position_moves_the_columns_on(taps: int, bias: bool, backend: Any) -> None:
    x, columns = torch.randn(3, 1, 40)[..., :19], torch.randn(3, 19, taps)
    weight, own = torch.randn(19, taps), torch.randn(19) if bias else None
    before = columns.clone()
    actual = conv_update(x, weight, own, columns, backend=backend)
    wide = None if own is None else own.double()
    expected = reference.causal_conv(x.double(), weight.double(), wide, before.double(), activate=True)
    near(actual.double(), expected, 1e-6)
    assert torch.equal(columns, torch.cat((before[..., 1:], x.mT), dim=-1))


# -- a whole model -----------------------------------------------------------------------------------------


@functools.cache
def model_of(kind: str) -> MambaTrace:
    """A tiny model in float32, made once for all tests."""
    return MambaTrace(make_hybrid(kind) if kind in PLAIN else make_hf(model_type=kind))


def decoded(model: MambaTrace, cache: Any, length: int = 9) -> list[Tensor]:
    """The logits of two rows of tokens, all but three one by one, and the columns and states in the cache then."""
    tokens, logits = draw_tokens(2, seed=0, length=length), []
    for start, stop in itertools.pairwise([0, *range(3, length + 1)]):
        logits.append(model._module(tokens[:, start:stop], cache=cache, use_cache=True).logits)
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in layers]
    return [torch.cat(logits, dim=1), *itertools.chain.from_iterable(states)]


@pytest.mark.parametrize("kind", [*TINY, *PLAIN])
def test_decoding_in_place_changes_no_number(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    with torch.no_grad():
        actual = decoded(model, DynamicCache(config=model.config))
    for name in ("lent_columns", "lent_state"):
        monkeypatch.setattr(PastStates, name, lambda *_: None)
    with torch.no_grad():
        expected = decoded(model, DynamicCache(config=model.config))
        whole = model._module(draw_tokens(2, seed=0, length=9)).logits
    for value, other in zip([*actual, actual[0]], [*expected, whole], strict=True):
        near(value, other, 1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "zamba"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_without_gradients_is_in_place(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stored in the cache then: it is written where it lies. With gradients, or for a worker, it is."""
    model = model_of(kind)
    tokens, cache = draw_tokens(rows, seed=0), DynamicCache(config=model.config)
    stored: list[str] = []

    def counted(own: Any) -> Any:
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            stored.append(own.__name__)
            return own(self, *args, **kwargs)

        return update

    for name in ("update_conv_state", "update_recurrent_state"):
        monkeypatch.setattr(LinearAttentionLayer, name, counted(getattr(LinearAttentionLayer, name)))

    def step() -> int:
        stored.clear()
        model._module(tokens[:, -1:], cache=cache, use_cache=True)
        return len(stored)

    with torch.no_grad():
        model._module(tokens, cache=cache, use_cache=True)
        assert step() == 0
    assert step() > 0


class Counting(LinearAttentionLayer):
    """A layer of a cache with updates of its own."""

    updates = 0

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        Counting.updates += 1
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        Counting.updates += 1
        return super().update_recurrent_state(*args, **kwargs)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_cache_with_updates_of_its_own_is_given_them(kind: str) -> None:
    model = model_of(kind)
    cache, own = (DynamicCache(config=model.config) for _ in range(2))
    for layer in own.layers:
        layer.__class__ = Counting
    with torch.no_grad():
        expected, before = decoded(model, cache), Counting.updates
        actual = decoded(model, own)
    assert Counting.updates - before == 2 * 7 * len(own.layers)
    for value, other in zip(actual, expected, strict=True):
        near(value, other, 1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_cache_that_was_reset_starts_again(kind: str) -> None:
    model, cache = model_of(kind), None
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        decoded(model, cache)
        cache.reset()
        one = draw_tokens(2, seed=1, length=2)
        logits = [model._module(one[:, at : at + 1], cache=cache, use_cache=True).logits for at in range(2)]
        near(torch.cat(logits, dim=1), model._module(one).logits, 1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_gradients_through_a_cache_stay_right(kind: str) -> None:
    """A step with gradients does not write into what an earlier one needs, and one in place is noticed."""
    model, tokens = model_of(kind), draw_tokens(1, seed=0)
    start = model._module.get_input_embeddings()(tokens).detach()
    gradients = []
    for cut in (None, 3):
        embeddings = start.clone().requires_grad_()
        if cut is None:
            logits = model._module(inputs_embeds=embeddings).logits
        else:
            cache = DynamicCache(config=model.config)
            parts = [embeddings[:, :cut], *embeddings[:, cut:].split(1, dim=1)]
            logits = torch.cat([model._module(inputs_embeds=e, cache=cache, use_cache=True).logits for e in parts], 1)
        gradients.append(torch.autograd.grad(logits[0, -1, 3], embeddings)[0])
    near(gradients[1], gradients[0], 1e-4)
