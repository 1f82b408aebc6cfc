"""Runs leave no tensor behind, with Python's collector of reference cycles switched off, and repeat to the last bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ModuleFactory
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching import logit, patch_grid

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def edited(model: MambaTrace) -> list[Tensor]:
    with torch.no_grad(), model.trace(IDS):
        state = model.layers[1].ssm.h[2].output.save()
        model.layers[1].ssm.h[3].output[:] *= 2
        logits = model.lm_head.output.save()
    return [state, logits]


def stopped(model: MambaTrace) -> list[Tensor]:
    with torch.no_grad(), model.trace(IDS) as tracer:
        model.layers[1].ssm.h[2].output[:] *= 2
        y = model.layers[1].ssm.y.output.save()
        tracer.stop()
    return [y]


def stopped_between_sites(model: MambaTrace) -> list[Tensor]:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS):
            state = model.layers[1].ssm.h[2].output.save()
            tracer.stop()
        with tracer.invoke(IDS):
            stream = model.layers[0].resid_post.output.save()
    return [state, stream]


def refused(model: MambaTrace) -> list[Tensor]:
    with pytest.raises(ValueError, match="reshape a copy"), torch.no_grad(), model.trace(IDS):
        model.layers[1].ssm.y.output.unsqueeze_(0)
    return []


RUNS: dict[str, Callable[[MambaTrace], list[Tensor]]] = {
    "edits of h": edited,
    "stop": stopped,
    "stop at a state, in one invoke of two": stopped_between_sites,
    "run_with_cache": lambda model: [model.run_with_cache(IDS)[0].detach()],
    "generate": lambda model: [model.generate(IDS, max_new_tokens=2, do_sample=False)],
    "patch_grid": lambda m: [patch_grid(m, IDS, IDS + 1, metric=logit(m, 1), progress=False).values],
}


def tensors() -> int:
    """How many tensors are alive, counted by the collector, which collects nothing."""
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RUNS)
def test_runs_leave_no_tensors(tiny_hf: ModuleFactory, no_collector: None, kind: str) -> None:
    model = MambaTrace(tiny_hf())
    for _ in range(2):  # which kernels the second starts is noted
        RUNS[kind](model)
    gc.collect()
    before = tensors()
    for _ in range(4):
        RUNS[kind](model)
    assert tensors() == before


@pytest.mark.filterwarnings("ignore")
def test_a_refused_edit_leaves_no_tensors(tiny_hf: ModuleFactory) -> None:
    """What an exception holds on to ends with the exception, which the collector may have to find."""
    model = MambaTrace(tiny_hf())
    refused(model)
    gc.collect()
    before = tensors()
    for _ in range(4):
        refused(model)
    gc.collect()
    assert tensors() == before


def test_what_an_edit_was_served_does_not_stay(tiny_hf: ModuleFactory, no_collector: None) -> None:
    model = MambaTrace(tiny_hf())
    with model.edit(inplace=True):
        model.layers[1].ssm.y.output[:] *= 2
    run = model.run_with_hooks
    run(IDS)
    before = tensors()
    logits = run(IDS)
    del logits
    assert tensors() == before
    (edit,) = model._edits
    assert not any(name.startswith("_mamba_trace_served") for name in edit.__dict__)


@pytest.mark.parametrize("kind", RUNS)
def test_a_deleted_model_is_freed(tiny_hf: ModuleFactory, no_collector: None, kind: str) -> None:
    model = MambaTrace(tiny_hf())
    RUNS[kind](model)
    alive = [weakref.ref(model), weakref.ref(model._module)]
    parameters = [weakref.ref(parameter) for parameter in model._module.parameters()]
    del model
    assert [reference() for reference in alive] == [None, None]
    gc.collect()  # transformers' own modules are in reference cycles
    assert not any(reference() is not None for reference in parameters)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_the_same_run_twice_has_the_same_bits(tiny_hf: ModuleFactory, kernels: str, kind: str) -> None:
    model = MambaTrace(tiny_hf(), kernels=kernels)
    first, again = RUNS[kind](model), RUNS[kind](model)
    assert first
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
