"""A long prompt in a mixer of which single states are wanted: it goes on in stretches, and gives the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from allocations import PeakMemory
from conftest import agree, make_hf
from hybrid_models import make_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from long_prompts import in_stretches
from subjects import draw_tokens
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from mamba_trace import MambaTrace
from mamba_trace.errors import PositionError, SiteOrderError
from mamba_trace.modeling import repeated
from mamba_trace.modeling.mixer import HookableMixer
from mamba_trace.modeling.stopped import Stopped

LENGTH = 11
#: Of a layer with an SSM alone, a norm on each parameter, heads, a second half, attention beside it, shared weights.
KINDS = ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "falcon_h1", "nemotron_h", "zamba2"]
BOTH = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


@pytest.fixture(autouse=True)
def code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run their code each time, which is looked at here; `test_repeated` holds to it what they do without."""
    monkeypatch.setattr(repeated, "how_called", lambda *_: None)


@functools.cache
def model_of(kind: str) -> MambaTrace:
    """A tiny model in float32, made once for all tests."""
    pure = kind in ("mamba", "mamba2", "falcon_mamba")
    return MambaTrace(make_hf(model_type=kind) if pure else make_hybrid(kind))


def layer_of(model: MambaTrace) -> int:
    """The last layer with an SSM."""
    return max(module.layer_idx for module in model._module.modules() if isinstance(module, HookableMixer))


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of mixers that were stopped, and of those that ran once more, in order."""
    calls: list[str] = []
    init, whole = Stopped.__init__, Stopped.whole

    def began(self: Stopped, *args: Any) -> None:
        calls.append("stopped")
        init(self, *args)

    def again(self: Stopped, hidden_states: Tensor) -> Tensor:
        calls.append("again")
        return whole(self, hidden_states)

    monkeypatch.setattr(Stopped, "__init__", began)
    monkeypatch.setattr(Stopped, "whole", again)
    return calls


def change(value: Tensor, how: str) -> None:
    """Edit a value in place."""
    match how:
        case "zero":
            value[:] = 0
        case "scale":
            value *= 1.5
        case "add":
            value[..., 0] += 2
        case _:
            assert how == "read"


#: What one block does in a mixer, in order: the site or the position, and how it is changed.
Steps = list[tuple[int | str, str]]


def ran(model: MambaTrace, steps: Steps, rows: int = 2, **inputs: Any) -> list[Tensor]:
    """What each of the ``steps`` found, before and after its change, and the logits."""
    tokens, layer = draw_tokens(rows, seed=3, length=LENGTH), layer_of(model)
    found: list[Tensor] = []
    with torch.no_grad(), model.trace(tokens, **inputs):
        ssm = model.layers[layer].ssm
        values = nnsight.save([])
        for name, how in steps:
            value = ssm.h[name].output if isinstance(name, int) else ssm.get(name).output
            values.append(value.clone())
            change(value, how)
            values.append(value)
        logits = model.lm_head.output.save()
    found += [*values, logits]
    return found


def compare(
    kind: str, steps: Steps, monkeypatch: pytest.MonkeyPatch, shortest: int = 3, **inputs: Callable[[MambaTrace], Any]
) -> None:
    """Run ``steps`` on a prompt at once and in stretches."""
    model = model_of(kind)
    expected = ran(model, steps, **{name: make(model) for name, make in inputs.items()})
    with in_stretches(monkeypatch, shortest):
        actual = ran(model, steps, **{name: make(model) for name, make in inputs.items()})
    for value, other in zip(actual, expected, strict=True):
        agree(value, other)


ALONE: list[Steps] = [
    [(5, "zero")],
    [(-1, "scale")],
    [(0, "add"), (2, "read"), (3, "zero"), (-2, "scale"), (10, "zero")],
    [(position, "read") for position in range(LENGTH)],
    [(position, "scale") for position in range(LENGTH)],
]


@pytest.mark.parametrize("steps", ALONE, ids=["edit", "the last", "some", "read all", "edit all"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_a_prompt_run_at_once(
    kind: str, steps: Steps, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(kind, steps, monkeypatch)
    assert stopped == ["stopped"]


MORE: list[Steps] = [
    [(5, "zero"), ("y", "scale")],
    [(5, "read"), ("y", "read")],
    [(1, "zero"), (8, "add"), ("h", "add"), ("ssm_output", "scale")],
    [(1, "zero"), (2, "read"), ("h_read", "scale"), ("after_skip", "read")],
    [(-1, "zero"), ("after_skip", "add"), ("out_proj", "read")],
    [(4, "zero"), ("out_proj", "scale")],
    [*((position, "read") for position in range(8)), ("y", "zero")],
]


@pytest.mark.parametrize("steps", MORE, ids=lambda steps: f"{len(steps) - 1} and {steps[-1][0]}")
@pytest.mark.parametrize("kind", KINDS)
def test_more_may_be_wanted_after_a_state(
    kind: str, steps: Steps, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(kind, steps, monkeypatch)
    assert stopped == ["stopped", "again"]


@pytest.mark.parametrize("steps", [[("skip", "read"), (5, "zero")], [("y", "zero")], [("h", "add")]], ids=str)
@BOTH
def test_who_wants_more_from_the_start_has_it_at_once(
    kind: str, steps: Steps, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(kind, steps, monkeypatch)
    assert stopped == []


@settings(max_examples=60)
@given(data=st.data())
@BOTH
def test_any_positions_and_whatever_comes_after_them(kind: str, data: st.DataObject) -> None:
    positions = sorted(data.draw(st.sets(st.integers(0, LENGTH - 1), max_size=6)))
    hows = st.sampled_from(["read", "zero", "scale", "add"])
    steps: Steps = [(position - LENGTH * data.draw(st.booleans()), data.draw(hows)) for position in positions]
    late = data.draw(st.sets(st.sampled_from(["h", "y", "ssm_output", "after_skip", "out_proj"]), max_size=2))
    order = ["h", "y", "ssm_output", "after_skip", "out_proj"]
    steps += [(name, data.draw(hows)) for name in sorted(late, key=order.index)]
    with pytest.MonkeyPatch.context() as patch:
        compare(kind, steps, patch, data.draw(st.integers(1, 5)), cache=lambda model: DynamicCache(config=model.config))


@pytest.mark.parametrize("steps", [[(4, "zero")], [(4, "zero"), ("y", "scale")]], ids=["alone", "and y"])
@pytest.mark.parametrize("before", [0, 2])
@BOTH
def test_a_cache_goes_on_from_what_was_edited(
    kind: str, before: int, steps: Steps, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more = model_of(kind), draw_tokens(2, seed=5, length=3)

    def begun() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        if before:
            model._module(draw_tokens(2, seed=4, length=before), cache=cache, use_cache=True)
        return cache

    def after(cache: DynamicCache) -> list[Tensor]:
        found = ran(model, steps, cache=cache, use_cache=True)
        logits: Tensor = model._module(more, cache=cache, use_cache=True).logits
        return [*found, logits, cache.layers[1].conv_states[0], cache.layers[1].recurrent_states[0]]

    with torch.no_grad():
        expected = after(begun())
        with in_stretches(monkeypatch, 3):
            actual = after(begun())
    for value, other in zip(actual, expected, strict=True):
        agree(value, other)
    assert stopped == ["stopped", "again"][: len(steps)]


@BOTH
def test_a_saved_state_is_the_readers_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a stretch, where the next one starts from it, and wherever it is edited later on."""
    model, tokens = model_of(kind), draw_tokens(1, seed=0, length=LENGTH)
    for shortest in (2, 3, 5):
        with torch.no_grad(), in_stretches(monkeypatch, shortest):
            with model.trace(tokens):
                expected = model.lm_head.output.save()
            for at in range(LENGTH):
                with model.trace(tokens):
                    state = model.layers[1].ssm.h[at].output.save()
                    kept = state.clone().save()
                    _ = model.layers[1].ssm.output
                    state[:] = 9
                    logits = model.lm_head.output.save()
                assert bool((state == 9).all())
                agree(logits, expected)
                assert not bool((kept == 9).all())


@BOTH
def test_each_invoke_has_its_own(kind: str, stopped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    prompts = [draw_tokens(1, seed=seed, length=LENGTH) for seed in (1, 2, 3)]

    def run(late: bool) -> list[Tensor]:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(prompts[0]):
                model.layers[1].ssm.h[3].output[:] = 0
                first = model.lm_head.output.save()
            with tracer.invoke(prompts[1]):
                state = model.layers[1].ssm.h[-3].output.save()
                last = model.layers[1].ssm.h[-1].output.save()
                if late:
                    model.layers[1].ssm.y.output[:] *= 2
                second = model.lm_head.output.save()
            with tracer.invoke(prompts[2]):
                third = model.lm_head.output.save()
        return [first, state, last, second, third]

    for late in (False, True):
        expected = run(late)
        stopped.clear()
        with in_stretches(monkeypatch, 3):
            actual = run(late)
        assert stopped == ["stopped", "again"][: 1 + late]
        for value, other in zip(actual, expected, strict=True):
            agree(value, other)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_an_edit_of_the_prompt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(kind), draw_tokens(1, seed=0, length=LENGTH)
    layer = layer_of(model)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), model.generate(tokens, max_new_tokens=4, min_new_tokens=4) as tracer:
            model.layers[layer].ssm.h[4].output[:] = 1
            state = model.layers[layer].ssm.h[-1].output.save()
            for _ in tracer.iter[2:3]:
                later = model.layers[layer].ssm.y.output.save()
            out = tracer.result.save()
        return state, later, out

    expected = run()
    with in_stretches(monkeypatch, 3):
        actual = run()
    assert torch.equal(actual[2], expected[2])
    for value, other in zip(actual[:2], expected[:2], strict=True):
        agree(value, other)


@pytest.mark.parametrize("late", ["skip", "in_proj", "x_in", "conv", "conv1d", "x_proj", "dt_proj", 2])
def test_what_has_gone_by_is_refused(late: int | str, stopped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mamba")
    for stretches in (contextlib.nullcontext(), in_stretches(monkeypatch, 3)):
        with stretches, pytest.raises(SiteOrderError, match="before"):
            ran(model, [(5, "read"), (late, "read")])
    assert stopped == ["stopped"]
    compare("mamba", [(5, "zero")], monkeypatch)


@BOTH
def test_a_position_that_is_not_there_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    for steps in ([(LENGTH, "read")], [(5, "zero"), (-LENGTH - 1, "read")]):
        with in_stretches(monkeypatch, 3), pytest.raises(PositionError, match=f"{LENGTH} positions"):
            ran(model, steps)
    compare(kind, [(5, "zero")], monkeypatch)


@pytest.mark.parametrize("late", ["h", "y", "out_proj"])
@BOTH
def test_a_block_that_catches_a_refused_position_goes_on(kind: str, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(kind), draw_tokens(2, seed=3, length=LENGTH)

    def run(before: bool) -> Tensor:
        with torch.no_grad(), model.trace(tokens):
            ssm = model.layers[1].ssm
            if before:
                ssm.h[2].output[:] = 0
            try:
                _ = ssm.h[LENGTH].output
            except PositionError:
                value = ssm.get(late).output.save()
        return value

    for before in (False, True):
        expected = run(before)
        with in_stretches(monkeypatch, 3):
            agree(run(before), expected)


@pytest.mark.parametrize("name", ["x_proj", "dt_proj", "in_proj", "conv1d", "out_proj", "ssm_output"])
def test_visits_are_counted_once_where_a_mixer_runs_once_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("mamba"), draw_tokens(1, seed=0, length=LENGTH)

    def run() -> Tensor:
        with torch.no_grad(), model.generate(tokens, max_new_tokens=4, min_new_tokens=4) as tracer:
            model.layers[1].ssm.h[4].output[:] = 1
            model.layers[1].ssm.y.output[:] *= 1.5
            for _ in tracer.iter[2:3]:
                later = model.layers[1].ssm.get(name).output.save()
        return later

    expected = run()
    with in_stretches(monkeypatch, 3):
        agree(run(), expected)


@pytest.mark.parametrize("late", ["", "y", "after_skip", "out_proj"])
@pytest.mark.parametrize("before", [0, 2])
@BOTH
def test_an_error_leaves_the_cache_of_the_layer_as_it_was(
    kind: str, before: int, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = model_of(kind), draw_tokens(2, seed=3, length=LENGTH)

    def begun() -> tuple[DynamicCache, Any]:
        cache = DynamicCache(config=model.config)
        if before:
            model._module(draw_tokens(2, seed=4, length=before), cache=cache, use_cache=True)
        return cache, cache.layers[1]

    def fail(cache: DynamicCache) -> None:
        with model.trace(tokens, cache=cache, use_cache=True):
            model.layers[1].ssm.h[7].output[:] = 0
            if late:
                _ = model.layers[1].ssm.get(late).output
            _ = 1 / 0

    with torch.no_grad(), in_stretches(monkeypatch, 3):
        cache, layer = begun()
        with pytest.raises(ZeroDivisionError):
            fail(cache)
        _, other = begun()
        assert layer.has_previous_state == other.has_previous_state
        assert layer.is_conv_states_initialized == other.is_conv_states_initialized
        if before:
            assert torch.equal(layer.conv_states[0], other.conv_states[0])
            assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])


@BOTH
def test_a_hook_of_pytorch_on_a_site_has_it_at_once(
    kind: str, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    seen: list[Tensor] = []
    site: Any = model.layers[layer_of(model)].ssm._module.get_submodule("y")
    handle = site.register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        with in_stretches(monkeypatch, 3):
            ran(model, [(5, "zero")])
    finally:
        handle.remove()
    assert seen[0].shape[1] == LENGTH
    assert stopped == []


@BOTH
def test_the_report_names_the_scans_that_were_stopped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    with in_stretches(monkeypatch, 3) as lengths:
        ran(model, [(5, "zero")])
    assert lengths == [4, 4, 3] * len(model.layers)
    report = model.last_run[layer_of(model)]
    calls = [(call.function, call.positions) for call in report.calls]
    assert calls == [
        ("conv_silu", LENGTH),
        ("gated_scan", 4),
        ("selective_scan", 2),
        ("selective_scan", 2),
        ("gated_scan", 3),
    ]
    assert report.reasons == ["h is wanted"]


def test_nothing_is_stopped_where_gradients_are_recorded(stopped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("mamba"), draw_tokens(1, seed=0, length=LENGTH)
    with in_stretches(monkeypatch, 3) as lengths, model.trace(tokens):
        model.layers[1].ssm.h[5].output[:] = 0
    assert stopped == []
    assert lengths == []


@BOTH
def test_an_edit_takes_no_more_memory_than_nothing_does(kind: str) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "state_size": 16, "vocab_size": 64}
    heads = {"num_heads": 8, "head_dim": 64, "n_groups": 1} if kind == "mamba2" else {}
    model = MambaTrace.from_config(AutoConfig.for_model(kind, **sizes, **heads))
    tokens = draw_tokens(1, seed=0, length=1 << 14)

    def edit() -> None:
        with torch.no_grad(), model.trace(tokens, logits_to_keep=1):
            model.layers[1].ssm.h[1 << 13].output[:] = 0

    def read_y() -> None:
        with torch.no_grad(), model.trace(tokens, logits_to_keep=1):
            _ = model.layers[1].ssm.y.output

    with torch.no_grad():
        plain, edited, at_once = map(PeakMemory.of, (lambda: model._module(tokens, logits_to_keep=1), edit, read_y))
    assert edited.peak < 1.05 * plain.peak
    assert at_once.peak > 1.5 * plain.peak
