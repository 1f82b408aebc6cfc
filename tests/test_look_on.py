"""A cache is handed values as the run makes them: they are what asking for each of them gives, to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, ModuleFactory, functions, make_hf
from hybrid_models import PLAIN, make_hybrid
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import SiteOrderError
from mamba_trace.hooked.schedule import HookedRun
from mamba_trace.scan import Recurrence

MODELS: dict[str, Callable[[], Any]] = {name: lambda name=name: make_hf(model_type=name) for name in TINY}
MODELS |= {name: lambda name=name: make_hybrid(name, dtype=torch.float32) for name in PLAIN}
RUNS: dict[str, dict[str, Any]] = {
    "everything": {
        "names_filter": [lambda name: True, *(f"layers[{{ssm}}].ssm.{name}" for name in ("h_read", "write"))]
    },
    "no logits": {"return_type": None},
    "stopped": {"stop_at_layer": 2},
    "some layers": {"only_use_these_layers": [1, 2]},
    "two positions": {"names_filter": lambda name: "hook_h." in name and name.endswith((".1", ".4"))},
    "one position": {"names_filter": ["layers[{ssm}].ssm.h[2]", lambda name: name.endswith("resid_post")]},
    "states": {"names_filter": "layers[{ssm}].ssm.h", "return_type": None},
    "inner modules": {"names_filter": ["layers[{ssm}].ssm.conv1d", "layers[{ssm}].ssm.out_proj", "embeddings"]},
}


@functools.cache
def made(name: str) -> MambaTrace:
    """The model of that name: a run leaves it as it was."""
    return MambaTrace(MODELS[name]())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the places that were asked for."""
    names: list[str] = []
    run = HookedRun.serve

    def watched(self: HookedRun, actions: Any, last: bool) -> None:
        names.append(actions.place.path)
        run(self, actions, last)

    monkeypatch.setattr(HookedRun, "serve", watched)
    return names


def cached(model: MambaTrace, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    with torch.no_grad():
        output, cache = model.run_with_cache(*inputs, **options)
    return output, dict(cache)


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*padded by")
def test_values_are_those_that_a_trace_asks_for(
    name: str, run: str, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = made(name), dict(RUNS[run])
    if run == "some layers" and name in TINY:
        options["only_use_these_layers"] = [2, 1, 2]
    if isinstance(names := options.get("names_filter"), (str, list)):
        put_in = lambda name: name if callable(name) else name.format(ssm=model.ssm_layers[0])  # noqa: E731
        options["names_filter"] = put_in(names) if isinstance(names, str) else [*map(put_in, names)]
    tokens = torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    if padding:
        options["attention_mask"] = torch.ones_like(tokens)
        options["attention_mask"][0, :2] = 0
    output, values = cached(model, tokens, **options)
    monkeypatch.setattr(HookedRun, "asks", True)
    expected_output, expected = cached(model, tokens, **options)
    assert list(values) == list(expected)
    for key, value in expected.items():
        assert torch.equal(values[key], value), key
    assert (output is None) == (expected_output is None)
    assert output is None or torch.equal(output, expected_output)


def test_what_reads_the_state_is_not_computed_twice(tiny: MambaTrace, tokens: Tensor, monkeypatch: Any) -> None:
    def read(self: Recurrence, *args: Any) -> None:
        raise AssertionError

    expected = tiny._module(tokens, use_cache=False).logits
    monkeypatch.setattr(Recurrence, "read", read)
    logits, values = cached(tiny, tokens, names_filter=[lambda name: True, "layers[1].ssm.h_read"])
    torch.testing.assert_close(logits, expected)
    assert functions(tiny.last_run[1]) == ["causal_conv", "selective_states"]
    states = [values[f"blocks.1.hook_h.{position}"] for position in range(tokens.shape[1])]
    assert torch.equal(values["blocks.1.mixer.hook_ssm_state"], torch.stack(states, dim=1))


@pytest.mark.parametrize("return_type", ["logits", None])
def test_nothing_is_asked_for_but_where_the_run_ends(
    return_type: str | None, tiny: MambaTrace, tokens: Tensor, served: list[str]
) -> None:
    _, values = cached(tiny, tokens, return_type=return_type)
    assert len(values) > 50
    assert served == ([] if return_type else ["lm_head"])


def test_no_value_shares_memory_with_another(tiny: MambaTrace, tokens: Tensor) -> None:
    _, values = cached(tiny, tokens, names_filter=[lambda name: True, "layers[1].ssm.h_read"])
    states = {name for name in values if ".hook_h." in name}
    places = {name: value.untyped_storage().data_ptr() for name, value in values.items() if name not in states}
    assert len({*places.values()}) == len(places)
    whole = {values[name].untyped_storage().data_ptr() for name in states}
    assert len(whole) == len(tiny.layers)
    assert whole.isdisjoint(places.values())


@pytest.mark.parametrize(
    "options",
    [
        {"fwd_hooks": [("blocks.1.hook_y", lambda value, hook: None)]},
        {"bwd_hooks": [("blocks.1.hook_y", lambda gradient, hook: None)]},
        {"incl_bwd": True, "return_type": "loss"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_is_asked_for_where_somebody_may_edit_it(
    options: dict[str, Any], tiny: MambaTrace, tokens: Tensor, served: list[str]
) -> None:
    tiny.run_with_cache(tokens, **options)
    assert "layers[0].resid_pre" in served


def test_an_edit_of_the_model_comes_first(tiny: MambaTrace, tokens: Tensor, served: list[str]) -> None:
    with tiny.edit() as (_, edited):
        edited.layers[1].resid_pre.output[:] = 0
    _, values = cached(edited, tokens)
    assert served
    assert not values["blocks.1.hook_resid_pre"].any()


def test_a_place_that_the_run_never_comes_to_is_named(tiny: MambaTrace, tokens: Tensor) -> None:
    zero = torch.zeros(*tokens.shape, tiny.config.hidden_size)
    mixer = tiny.layers[1].ssm._module
    own = mixer.__dict__["forward"]
    mixer.__dict__["forward"] = lambda *args, **kwargs: zero
    try:
        with pytest.raises(SiteOrderError, match=r"layers\[1\]\.ssm\."):
            tiny.run_with_cache(tokens)
    finally:
        mixer.__dict__["forward"] = own
    _, values = cached(tiny, tokens)
    assert "blocks.1.hook_y" in values


def test_nobody_looks_on_after_a_run_that_was_interrupted(
    tiny: MambaTrace, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: HookedRun, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HookedRun, "kept", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.run_with_cache(tokens)
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.logits.output.save()
    assert torch.equal(logits, tiny._module(tokens, use_cache=False).logits)
    assert not tiny.interleaver.observers
    assert [functions(run) for run in tiny.last_run] == [["conv_silu", "gated_scan"]] * len(tiny.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tiny_hf: ModuleFactory, tokens: Tensor, monkeypatch: Any) -> None:
    model = MambaTrace(tiny_hf(dtype=dtype))
    _, values = cached(model, tokens)
    monkeypatch.setattr(HookedRun, "asks", True)
    _, expected = cached(model, tokens)
    for key, value in expected.items():
        assert torch.equal(values[key], value), key
        assert values[key].dtype == value.dtype, key
