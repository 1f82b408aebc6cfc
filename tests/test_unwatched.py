"""A mixer that nobody looks into: the same numbers, the same cache, and given up the moment somebody could tell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, agree, make_hf, near
from hybrid_models import PLAIN, make_hybrid
from long_prompts import in_stretches
from subjects import draw_tokens
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mamba_trace import MambaTrace
from mamba_trace.errors import PromptError
from mamba_trace.modeling import mixer as mixers
from mamba_trace.modeling import repeated
from mamba_trace.modeling import unwatched as unwatched_mixers
from mamba_trace.modeling.mixer import HookableMixer
from mamba_trace.scan import DUAL, SELECTIVE, cpu, reference

FAMILIES = {"selective": SELECTIVE, "dual": DUAL}


@pytest.fixture(autouse=True)
def code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run their code each time, which is looked at here; `test_repeated` holds to it what they do without."""
    monkeypatch.setattr(repeated, "how_called", lambda *_: None)


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
    B, C = draw(2, rows, length, 5)
    return [x, delta, -draw(40, 5).exp(), B, C, draw(40), skip, draw(rows, 40, 5)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_the_gated_scan_in_the_memory_of_its_state(family: str, rows: int, length: int) -> None:
    x, delta, A, *others, h = inputs(family, rows, length)
    scans: Any = FAMILIES[family]
    expected, last = scans.gated_scan(x, delta, A, *others, h, kernels="reference")
    given, state = [tensor.float() for tensor in (x, delta, A, *others)], h.float()
    memory = state.data_ptr()
    near(scans.gated_update(*given, state)[0].double(), expected, 1e-6)
    near(state.double(), last, 1e-6)
    assert state.data_ptr() == memory
    from_zero = scans.gated_scan(x, delta, A, *others, kernels="reference")
    for found, right in zip(scans.gated_update(*given, None), from_zero, strict=True):
        near(found.double(), right, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_takes_any_layout_of_its_inputs(family: str) -> None:
    *given, h = (tensor.float() for tensor in inputs(family, 3))
    apart = [t.new_zeros(*t.shape, 2)[..., 0].copy_(t) for t in given]
    first, second = h.clone(), h.clone()
    update: Any = FAMILIES[family].gated_update
    agree(update(*apart, second)[0], update(*given, first)[0])
    agree(second, first)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("started", [False, True])
def test_a_convolution_moves_the_columns_on(taps: int, bias: bool, length: int, started: bool) -> None:
    x, columns = torch.randn(3, length, 40)[..., :19], torch.randn(3, 19, taps)
    weight, own = torch.randn(19, taps), torch.randn(19) if bias else None
    before = columns.clone() if started else None
    wide = [None if t is None else t.double() for t in (own, before)]
    expected = reference.causal_conv(x.double(), weight.double(), *wide, activate=True)
    near(cpu.convolved(x, weight, own, before, True, columns).double(), expected, 1e-6)
    moved = torch.cat((torch.zeros_like(columns) if before is None else before, x.mT), dim=-1)[..., -taps:]
    assert torch.equal(columns, moved)
    if length == 1 and before is not None:
        near(cpu.conv_update(x, weight, own, before).double(), expected, 1e-6)
        assert torch.equal(before, moved)


# -- a whole model -----------------------------------------------------------------------------------------


@functools.cache
def model_of(kind: str) -> MambaTrace:
    """A tiny model in float32, made once for all tests."""
    return MambaTrace(make_hybrid(kind) if kind in PLAIN else make_hf(model_type=kind))


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A block in which each mixer runs as if somebody looked."""
    with monkeypatch.context() as patch:
        patch.setattr(mixers, "unwatched", lambda *_: None)
        yield


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A block that yields a list of the layers that ran unwatched in it."""
    own, layers = mixers.unwatched, list[int]()

    def run(mixer: HookableMixer, *args: Any) -> Any:
        out = own(mixer, *args)
        layers.extend([mixer.layer_idx] if out is not None else [])
        return out

    with monkeypatch.context() as patch:
        patch.setattr(mixers, "unwatched", run)
        yield layers


def decoded(model: MambaTrace, cache: Any, cuts: tuple[int, ...] = (3, 4, 5, 6, 7, 8)) -> list[Tensor]:
    """The logits of two rows of 9 tokens, cut into calls, and the columns and states in the cache then."""
    tokens, logits = draw_tokens(2, seed=0, length=9), []
    for start, stop in itertools.pairwise([0, *cuts, 9]):
        logits.append(model._module(tokens[:, start:stop], cache=cache, use_cache=True).logits)
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in layers]
    return [torch.cat(logits, dim=1), *itertools.chain.from_iterable(states)]


#: Those whose scans have kernels for it.
UNWATCHED = [kind for kind in (*TINY, *PLAIN) if kind != "zamba"]


@pytest.mark.parametrize("cuts", [(), (1,), (2, 4), (5,), (3, 4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("kind", [*TINY, *PLAIN])
def test_the_numbers_and_the_cache_are_those_of_a_watched_model(
    kind: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    with torch.no_grad():
        with counted(monkeypatch) as layers:
            actual = decoded(model, DynamicCache(config=model.config), cuts)
        with watched(monkeypatch):
            expected = decoded(model, DynamicCache(config=model.config), cuts)
        whole = model._module(draw_tokens(2, seed=0, length=9)).logits
    assert bool(layers) == (kind in UNWATCHED)
    for value, other in zip([*actual, actual[0]], [*expected, whole], strict=True):
        near(value, other, 1e-5)


@pytest.mark.parametrize(("cuts", "shortest"), [((), 2), ((), 4), ((5,), 2), ((1,), 3), ((4, 5), 1)], ids=str)
@pytest.mark.parametrize("kind", UNWATCHED)
def test_stretches_of_a_prompt_give_the_same(
    kind: str, cuts: tuple[int, ...], shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    with torch.no_grad():
        expected = decoded(model, DynamicCache(config=model.config), cuts)
        whole = model._module(draw_tokens(2, seed=0, length=9)).logits
        with in_stretches(monkeypatch, shortest) as lengths:
            actual = decoded(model, DynamicCache(config=model.config), cuts)
            without_cache = model._module(draw_tokens(2, seed=0, length=9)).logits
    assert 9 not in lengths
    assert -(-9 // (9 // shortest)) in lengths
    for value, other in zip([*actual, without_cache], [*expected, whole], strict=True):
        near(value, other, 1e-5)


def test_a_long_prompt_is_cut_where_in_proj_would_fill_more_than_is_used_again() -> None:
    def stretch(rows: int, length: int) -> int:
        return unwatched_mixers.per_stretch(mixer, torch.empty(1, 1, 1).expand(rows, length, -1))

    mixer: Any = nn.Module()
    mixer.in_proj = nn.Linear(1, 3072)  # as in mamba-130m
    assert stretch(1, 2047) == 2047
    assert stretch(1, 2048) == 1024
    assert stretch(1, 3071) == 1536
    assert stretch(1, 3072) == 1024
    assert stretch(2, 65536) == 512
    assert stretch(1000, 127) == 127  # each row is short
    assert stretch(1000, 128) == 64
    mixer.in_proj = nn.Sequential(mixer.in_proj)  # which does not say how wide it is
    assert stretch(1, 65536) == 65536


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_scan_that_fails_leaves_its_layer_of_a_new_cache_empty(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*inputs: Any) -> Any:
        raise KeyboardInterrupt

    model, cache = model_of(kind), DynamicCache(config=model_of(kind).config)
    mixer: Any = model.layers[1].ssm._module
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(mixer, "scans", dataclasses.replace(mixer.scans, gated_update=failing), raising=False)
        with pytest.raises(KeyboardInterrupt):
            model._module(draw_tokens(2, seed=0), cache=cache, use_cache=True)
    first, second = cache.layers[:2]
    assert first.has_previous_state[0]
    assert not second.has_previous_state[0]
    assert not second.is_conv_states_initialized[0]
    assert not second.is_recurrent_states_initialized[0]


def test_an_interrupt_while_a_new_cache_gets_its_memory_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(dict[int, bool]):
        def __setitem__(self, key: int, value: bool) -> None:
            super().__setitem__(key, value)
            if value:
                raise KeyboardInterrupt

    model = model_of("mamba")
    cache, tokens = DynamicCache(config=model.config), draw_tokens(2, seed=0)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(cache.layers[0], "is_recurrent_states_initialized", Interrupted({0: False}))
            with pytest.raises(KeyboardInterrupt):
                model._module(tokens, cache=cache, use_cache=True)
        assert torch.equal(model._module(tokens, cache=cache, use_cache=True).logits, model._module(tokens).logits)


def test_a_hook_that_another_hook_registers_in_the_same_call_is_called() -> None:
    model, called = model_of("mamba"), list[int]()
    mixer: Any = model.layers[1].ssm._module
    handles: list[Any] = []

    def hook(*_: Any) -> None:
        handles.append(mixer.out_proj.register_forward_hook(lambda *_: called.append(1)))

    handles.append(mixer.in_proj.register_forward_hook(hook))
    try:
        with torch.no_grad():
            model._module(draw_tokens(1, seed=0))
    finally:
        for handle in handles:
            handle.remove()
    assert called == [1]


def test_a_method_that_a_class_of_caches_gets_later_is_called() -> None:
    class Counting(DynamicCache):
        pass

    model, tokens, calls = model_of("mamba"), draw_tokens(1, seed=0), list[int]()
    own = DynamicCache.update_recurrent_state

    def counted(cache: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(cache, *args, **kwargs)

    with torch.no_grad():
        model._module(tokens, cache=Counting(config=model.config), use_cache=True)
        Counting.update_recurrent_state = counted  # type: ignore[method-assign]
        model._module(tokens, cache=Counting(config=model.config), use_cache=True)
    assert len(calls) == len(model.layers)


@pytest.mark.parametrize("kind", UNWATCHED)
def test_a_new_cache_is_as_transformers_makes_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(kind), draw_tokens(2, seed=0)
    with torch.no_grad():
        ours = model._module(tokens, use_cache=True).cache.layers
        with watched(monkeypatch):
            theirs = model._module(tokens, use_cache=True).cache.layers
    for layer, other in zip(ours, theirs, strict=True):
        made = vars(layer).keys() | vars(other).keys()
        kept = {"conv_states", "recurrent_states", "keys", "values"}
        assert {name: vars(layer)[name] for name in made - kept} == {name: vars(other)[name] for name in made - kept}


@pytest.mark.parametrize("kind", UNWATCHED)
def test_a_prompt_has_the_very_bits_of_a_watched_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(kind), draw_tokens(2, seed=0, length=40)
    with torch.no_grad():
        actual = model._module(tokens).logits
        with watched(monkeypatch):
            assert torch.equal(actual, model._module(tokens).logits)


@pytest.mark.parametrize("kind", UNWATCHED)
def test_all_layers_but_the_one_that_a_trace_looks_into_are_unwatched(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = model_of(kind), draw_tokens(1, seed=0)
    ssm = [each.layer_idx for each in model._module.modules() if isinstance(each, HookableMixer)]
    with torch.no_grad(), counted(monkeypatch) as layers:
        model._module(tokens)
        assert layers == ssm
        layers.clear()
        with model.trace(tokens):
            model.layers[ssm[-1]].ssm.y.output[:] *= 2
        assert layers == ssm[:-1]


class Doubled(nn.Linear):
    """A linear layer of another class."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * super().forward(value)


def another_module(parent: nn.Module, name: str) -> None:
    own: Any = getattr(parent, name)
    new = Doubled(own.in_features, own.out_features, bias=own.bias is not None)
    new.load_state_dict(own.state_dict())
    setattr(parent, name, new)


def another_forward(parent: nn.Module, name: str) -> None:
    module: Any = getattr(parent, name)
    own = type(module).forward
    module.forward = lambda value: 2 * own(module, value)


def hook(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(lambda module, given, output: 2 * output)


def hook_before(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_pre_hook(lambda module, given: (given[0] + 0.5,))


LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj")
#: The inner modules of a mixer, a norm and a mixer.
INNER = {
    "mamba": (*LINEAR, "conv1d", "act", "mixer", "norm"),
    "mamba2": ("in_proj", "out_proj", "conv1d", "act", "mixer.norm", "mixer", "norm"),
}
#: What makes an inner module another one, which is then called.
CHANGED = [
    pytest.param(kind, name, change, id=f"{kind}-{name}-{change.__name__}")
    for kind, names in INNER.items()
    for name in names
    for change in (another_module, another_forward, hook, hook_before)
    if change not in (another_module, another_forward) or name in LINEAR
]


@pytest.mark.parametrize(("kind", "name", "change"), CHANGED)
def test_what_was_changed_inside_is_what_runs(
    kind: str, name: str, change: Callable[[nn.Module, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MambaTrace(make_hf(model_type=kind))
    block: Any = model._module.backbone.layers[1]
    change(block if name in ("mixer", "norm") else block.mixer, name.removeprefix("mixer."))
    with torch.no_grad():
        actual = decoded(model, DynamicCache(config=model.config))
        with watched(monkeypatch):
            expected = decoded(model, DynamicCache(config=model.config))
        unchanged = decoded(model_of(kind), DynamicCache(config=model.config))
    for value, other in zip(actual, expected, strict=True):
        near(value, other, 1e-5)
    assert (actual[0] - unchanged[0]).abs().max() > 1e-3


@pytest.mark.parametrize("change", [another_module, another_forward, hook, hook_before])
@pytest.mark.parametrize(("kind", "name"), [("mamba", "x_proj"), ("mamba2", "out_proj")])
def test_a_module_that_is_not_plain_sees_all_positions_at_once(
    kind: str, name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = MambaTrace(make_hf(model_type=kind)), draw_tokens(2, seed=0, length=9)
    mixer: Any = model._module.backbone.layers[1].mixer
    change(mixer, name)
    with torch.no_grad(), in_stretches(monkeypatch) as lengths:
        model._module(tokens)
    assert lengths == [3, 3, 3, 9, *[3, 3, 3] * (len(model.layers) - 2)]


def in_double(model: MambaTrace) -> Any:
    model._module.double()
    return contextlib.nullcontext()


def by_reference(model: MambaTrace) -> Any:
    for module in model._module.modules():
        if isinstance(module, HookableMixer):
            module.kernels = "reference"
    return contextlib.nullcontext()


def autocast(model: MambaTrace) -> Any:
    return torch.autocast("cpu")


def with_gradients(model: MambaTrace) -> Any:
    return torch.enable_grad()


def everywhere(model: MambaTrace) -> Any:
    @contextlib.contextmanager
    def hooked() -> Any:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            yield
        finally:
            handle.remove()

    return hooked()


@pytest.mark.parametrize("circumstance", [in_double, by_reference, autocast, with_gradients, everywhere])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_other_circumstances_are_left_to_the_forward(
    kind: str, circumstance: Callable[[MambaTrace], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = MambaTrace(make_hf(model_type=kind)), draw_tokens(2, seed=0)
    with torch.no_grad(), counted(monkeypatch) as layers, circumstance(model):
        model._module(tokens)
    assert not layers


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_padding_is_left_to_the_forward_and_a_whole_mask_is_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, mask = model_of(kind), draw_tokens(2, seed=0, length=9), torch.ones(2, 9)
    with torch.no_grad(), counted(monkeypatch) as layers:
        model._module(tokens, attention_mask=mask)
        assert len(layers) == len(model.layers)
        mask[0, 0] = 0
        model._module(tokens, attention_mask=mask)
        assert len(layers) == len(model.layers)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_visits_are_counted_for_a_worker_that_asks_later(kind: str) -> None:
    """A block that looks at the third step alone: everything inside was visited twice before."""
    model, tokens = model_of(kind), draw_tokens(1, seed=0)
    for name in ("ssm.h.-1", "ssm.conv", "ssm.in_proj", "ssm.out_proj", "ssm.A_bar", "norm", "ssm"):
        with torch.no_grad(), model.generate(tokens, max_new_tokens=4, min_new_tokens=4) as tracer:
            for _ in tracer.iter[2:3]:
                late = model.layers[1].get(name).output.save()
            out = tracer.result.save()
        with torch.no_grad(), model.trace(out[:, : tokens.shape[1] + 2]):
            whole = model.layers[1].get(name).output.save()
        near(late, whole if name == "ssm.h.-1" else whole[:, -1:], 1e-5)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_the_default_dtype_does_not_matter(kind: str, default: torch.dtype) -> None:
    model, tokens = model_of(kind), draw_tokens(2, seed=0, length=40)

    def logits() -> list[Tensor]:
        ways = itertools.product((4, 40), (False, True))
        return [model._module(tokens[:, :length], use_cache=cached).logits for length, cached in ways]

    with torch.no_grad():
        expected = logits()
        torch.set_default_dtype(default)
        try:
            actual = [
                model._module(tokens[:, :n], use_cache=cached).logits for n in (4, 40) for cached in (False, True)
            ]
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_cache_of_other_rows_is_refused_in_words(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(kind), draw_tokens(3, seed=0)
    for context in (contextlib.nullcontext(), watched(monkeypatch)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), context:
            model._module(tokens[:1], cache=cache, use_cache=True)
            with pytest.raises(PromptError, match="the cache holds 1 rows, and this call has 3"):
                model._module(tokens[:, :length], cache=cache, use_cache=True)


def test_a_hook_is_seen_after_all_hooks_were_taken_off_by_a_new_dictionary() -> None:
    model, calls = MambaTrace(make_hf()), list[str]()
    for module in model._module.modules():
        module._forward_hooks = OrderedDict()
    for name in ("ssm.y", "ssm.in_proj", "resid_pre"):
        module = model.layers[1].get(name)._module
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model._module(draw_tokens(1, seed=0))
    assert sorted(calls) == ["resid_pre", "ssm.in_proj", "ssm.y"]


def counting(theirs: Any, updates: list[str]) -> Any:
    """A class of a cache, or of a layer of one, with updates of its own, which are counted."""

    class Counting(theirs):
        def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
            updates.append("columns")
            return super().update_conv_state(*args, **kwargs)

        def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
            updates.append("state")
            return super().update_recurrent_state(*args, **kwargs)

    return Counting


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_cache_with_updates_of_its_own_is_given_them(kind: str, whole: bool) -> None:
    model = model_of(kind)
    updates = list[str]()
    cache, own = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for each in (own,) if whole else own.layers:
        each.__class__ = counting(type(each), updates)
    with torch.no_grad():
        expected, actual = decoded(model, cache), decoded(model, own)
    assert len(updates) == 2 * 7 * len(own.layers)
    for value, other in zip(actual, expected, strict=True):
        near(value, other, 1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_step_in_place_is_noticed_by_autograd(kind: str) -> None:
    """A backward pass through the state before raises, and does not take the next one for it."""
    model, tokens = model_of(kind), draw_tokens(1, seed=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model._module(tokens, cache=cache, use_cache=True)
    versions = [
        tensor._version for layer in cache.layers for tensor in (layer.conv_states[0], layer.recurrent_states[0])
    ]
    with torch.no_grad():
        model._module(tokens[:, -1:], cache=cache, use_cache=True)
    after = [tensor._version for layer in cache.layers for tensor in (layer.conv_states[0], layer.recurrent_states[0])]
    assert all(new > old for old, new in zip(versions, after, strict=True))


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
