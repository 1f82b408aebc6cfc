"""The facts about nnsight's internals that `mamba_trace.tracing` rests on, each held on nnsight alone.

They use a module of two linear layers and no code of this package, so a failure here says that nnsight has
changed, and where.
"""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import nnsight
import pytest
import torch
from nnsight import NNsight
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Event, Interleaver, Mediator, OutOfOrderError
from nnsight.intervention.source import STATE, Controller
from torch import nn

from mamba_trace.errors import SiteOrderError


class Probe(nn.Module):
    """Two layers, and whatever ``look`` wants to see between them, while a trace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.seen: list[Any] = []
        self.look: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.look is not None:
            self.seen.append(self.look(self.__dict__[STATE].active()))
        return self.second(x)


@pytest.fixture
def probe():
    torch.manual_seed(0)
    return NNsight(Probe())


X = torch.ones(2, 3)


def test_nnsight_is_of_the_series_these_facts_were_read_from():
    assert version("nnsight").startswith("0.8."), "read mamba_trace/tracing anew against this nnsight"


def test_a_worker_is_parked_on_one_location_and_one_visit_of_it(probe):
    probe._module.look = lambda active: [mediator.pending for mediator in active[0].mediators]
    with probe.trace(X):
        _ = probe.first.output
        _ = probe.second.output
    (pending,) = probe._module.seen[0]
    assert pending.provider == "model.second.output"
    assert pending.iteration == 0
    assert pending.event is Event.VALUE


def test_a_worker_that_has_ended_is_parked_on_nothing(probe):
    probe._module.look = lambda active: [mediator.pending for mediator in active[0].mediators]
    with probe.trace(X):
        _ = probe.first.output
    assert probe._module.seen == [[None]]


def test_the_locations_of_a_module_are_input_skip_and_output(probe):
    wanted = []

    def look(active: Any) -> None:
        wanted.append((active[1], active[2]))

    probe._module.look = look
    with probe.trace(X):
        _ = probe.output
    assert wanted == [("model", ("model.input", "model.skip", "model.output"))]


def test_the_set_of_locations_parked_on(probe):
    probe._module.look = lambda active: set(active[0].parked)
    with probe.trace(X):
        probe.second.input = probe.second.input * 2
    assert probe._module.seen == [{"model.second.input"}]


def test_a_barrier_is_a_park_without_a_location():
    pending = []
    mediator = Mediator(compile("wait()", "x", "exec"), {"wait": Mediator.barrier}, {})
    interleaver = Interleaver()
    interleaver.mediators = [mediator]
    with interleaver:
        pending.append(mediator.pending)
    interleaver.cancel()
    assert pending[0].provider is None


def test_observers_are_the_locations_that_caches_subscribe_to(probe):
    probe._module.look = lambda active: set(active[0].observers)
    with probe.trace(X) as tracer:
        _ = tracer.cache(modules=[probe.second, "model.a.place.of.our.own"])
    assert probe._module.seen == [{"model.second.output", "model.a.place.of.our.own.output"}]


def test_an_observer_may_come_while_the_run_goes_on_and_sees_what_workers_leave(probe):
    seen = []

    class Observer:
        def observe_selected(self, selected: Any, value: Any) -> None:
            seen.append((selected, value.clone()))

    with probe.trace(X):
        _ = probe.first.output
        mediator = Mediator.current("here")
        mediator.interleaver.observers["model.second.output"] = [(mediator, Observer(), "mine")]
        probe.second.output[:] = 5
    assert [selected for selected, _ in seen] == ["mine"]
    assert bool((seen[0][1] == 5).all())


def test_observers_are_a_new_object_in_every_run(probe):
    kept = []
    probe._module.look = lambda active: kept.append(active[0].observers)
    for _ in range(2):
        with probe.trace(X):
            _ = probe.second.output
    assert kept[0] is not kept[1]


def test_handle_serves_any_location_and_returns_the_replacement(probe):
    def look(active: Any) -> torch.Tensor:
        return active[0].handle("model.first.7.output", torch.full((2, 3), 7.0))

    class Place:
        path, interleaver = "model.first.7", probe.interleaver
        output = Envoy.output

    probe._module.look = look
    with probe.trace(X):
        place = Place()
        value = place.output.clone().save()
        place.output = value * 2
    assert (value == 7).all()
    assert (probe._module.seen[0] == 14).all()


def test_handle_feeds_a_cache_at_any_location(probe):
    probe._module.look = lambda active: active[0].handle("model.first.7.output", torch.full((2, 3), 7.0))
    with probe.trace(X) as tracer:
        cache = tracer.cache(modules=["model.first.7"])
    assert (cache["model.first.7"].output == 7).all()


def test_counts_say_how_often_a_location_was_offered(probe):
    counts = probe.interleaver.counts
    for run in range(3):
        assert counts.get("model.first.output", 0) == run
        with probe.trace(X):
            _ = probe.second.output
        assert counts["model.first.input"] == counts["model.first.skip"] == counts["model.first.output"] == run + 1
    probe._module(X)
    assert counts["model.first.output"] == 3, "a run without workers is not counted"


def test_a_worker_counts_from_where_it_began(probe):
    probe._module.look = lambda active: [
        (mediator.counts_at_start.get("model.first.output", 0), mediator.occurrence("model.first.output"))
        for mediator in active[0].mediators
    ]
    for _ in range(2):
        with probe.trace(X):
            _ = probe.second.output
    assert probe._module.seen == [[(0, 1)], [(1, 1)]]


def test_a_visit_is_counted_after_its_workers_were_served(probe):
    """So a worker may read a location twice, and read then write it, in one visit."""
    with probe.trace(X):
        _ = probe.first.output
        during = nnsight.save([Mediator.current("").occurrence("model.first.output")])
        _ = probe.second.input
        during.append(Mediator.current("").occurrence("model.first.output"))
    assert during == [0, 1]


def test_save_returns_what_mark_returns(probe, monkeypatch):
    monkeypatch.setattr("nnsight.tracing.tracer.mark", lambda value: ("marked", value))
    with probe.trace(X):
        kept = nnsight.save([])
        same = [1].save()
        nnsight.tracing.tracer._saves().update({id(kept), id(same)})
    assert (kept, same) == (("marked", []), ("marked", [1]))


def test_a_worker_flushes_before_each_request_and_at_the_end_of_its_block(probe):
    with probe.trace(X):
        mediator = Mediator.current("")
        calls = nnsight.save([])

        def flush() -> None:
            calls.append(mediator.pending and mediator.pending.provider)
            type(mediator).flush(mediator)

        mediator.flush = flush
        _ = probe.first.output
        probe.second.input = probe.first.output
        _ = probe.second.output.sum()
    assert len(calls) == 6  # an assigned input is read first; five requests, and the end
    assert calls[-1] == "model.second.output"


def test_an_unserved_request_ends_in_an_out_of_order_error(probe):
    with pytest.raises(OutOfOrderError), probe.trace(X):
        _ = probe.second.output
        _ = probe.first.output


def test_iter_pins_a_worker_to_a_visit_and_relaxes_when_served(probe):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Probe()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.step(x)
            return x

    model = NNsight(Twice())
    model._module.step.look = lambda active: [m.pending and m.pending.iteration for m in active[0].mediators]
    with model.trace(X) as tracer:
        for _ in tracer.iter[2]:
            before = nnsight.save([Mediator.current("").iteration])
            _ = model.step.second.output
            before.append(Mediator.current("").iteration)
    assert before == [2, None]
    assert model._module.step.seen == [[2], [2], [2]]


class Rows(NNsight):
    """A model whose invokes can be batched."""

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return inputs[0].shape[0] if inputs else 0

    def _batch(self, invokes: list, fn: Any) -> tuple:
        return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}


@pytest.mark.parametrize("whole", [False, True])
def test_the_batcher_cuts_what_has_as_many_rows_and_nothing_where_it_is_none(whole):
    model = Rows(Probe())

    def look(active: Any) -> None:
        interleaver = active[0]
        assert isinstance(interleaver.batcher, Batcher)
        assert interleaver.batcher.batching
        batcher = interleaver.batcher
        if whole:
            interleaver.batcher = None
        interleaver.handle("model.place.output", torch.zeros(3, 2))
        interleaver.batcher = batcher

    class Place:
        path, interleaver = "model.place", model.interleaver
        output = Envoy.output

    place = Place()
    model._module.look = look
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            one = nnsight.save(list(place.output.shape))
        with tracer.invoke(torch.ones(2, 3)):
            other = nnsight.save(list(place.output.shape))
    assert (one, other) == (([3, 2], [3, 2]) if whole else ([1, 2], [2, 2]))


def test_the_batch_group_is_first_row_and_number_of_rows():
    model = Rows(Probe())
    model._module.look = lambda active: [mediator.batch_group for mediator in active[0].mediators]
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            _ = model.second.output
        with tracer.invoke(torch.ones(2, 3)):
            _ = model.second.output
        with tracer.invoke():
            _ = model.second.output
    assert [list(group) if group else None for group in model._module.seen[0]] == [[0, 1], [1, 2], None]


def test_a_write_back_is_swapped_in_when_the_worker_moves_on(probe):
    from nnsight.intervention.eproperty import WriteBack

    with torch.no_grad(), probe.trace(X):
        value = probe.first.output
        mediator = Mediator.current("")
        new = torch.zeros_like(value)
        mediator.transform = WriteBack(
            lambda: new, new, None, "model.first.output", mediator.wanted("model.first.output")
        )
        taken = probe.second.input.save()
    assert not taken.any()


def test_a_write_back_is_swapped_in_at_the_end_of_a_block(probe):
    from nnsight.intervention.eproperty import WriteBack

    with torch.no_grad(), probe.trace(X) as tracer:
        cache = tracer.cache(modules=[probe.first])
        value = probe.first.output
        mediator = Mediator.current("")
        new = torch.zeros_like(value)
        mediator.transform = WriteBack(
            lambda: new, new, None, "model.first.output", mediator.wanted("model.first.output")
        )
    assert not cache["model.first"].output.any()


def test_the_route_from_a_module_to_the_running_trace(probe):
    probe._module.look = lambda active: active[:2]
    state = probe._module.__dict__[STATE]
    assert state.active()[0] is None
    probe._module(X)
    with probe.trace(X):
        _ = probe.first.output
    assert state.active()[0] is None
    assert probe._module.seen == [(None, None), (probe.interleaver, "model")]


def test_an_error_thrown_into_a_worker_is_raised_where_it_waits(probe):
    def look(active: Any) -> None:
        mediator = active[0].mediators[0]
        mediator.pending = mediator.worker.throw(KeyError("at your line"))
        active[0]._reindex_parked()

    probe._module.look = look
    with probe.trace(X):
        caught = nnsight.save([])
        try:
            _ = probe.second.output
        except KeyError as error:
            caught.append(str(error))
    assert caught == ["'at your line'"]


def test_the_forward_of_a_wrapped_module_is_a_controller_over_its_own(probe):
    first = probe._module.first
    assert isinstance(first.__dict__["forward"], Controller)
    assert first.__dict__["forward"].state.body is nn.Linear.forward
    assert str(probe.first.source) is not None
    assert first.__dict__["forward"].state.body is not nn.Linear.forward  # the instrumented one


def test_source_and_copies_begin_from_the_original_and_not_from_the_body(probe):
    first = probe._module.first
    first.__dict__[STATE].body = lambda module, x: torch.zeros_like(x)
    assert not first(X).any()
    assert copy.deepcopy(probe._module).first(X).any()
    with probe.trace(X):
        product = probe.first.source.F_linear_0.output.save()
    assert product.any()


def test_names_of_nnsight_that_are_used():
    for owner, names in {
        Interleaver: ("handle", "_reindex_parked", "cancel"),
        Mediator: ("current", "value", "swap", "skip", "occurrence", "wanted", "switch"),
        Envoy: ("_wrap_envoy", "_update", "parent", "skip"),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"nnsight has no {owner.__name__}.{name} any more"
    assert issubclass(SiteOrderError, OutOfOrderError)
