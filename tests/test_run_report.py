"""The report of the last forward call: which layers ran, what each ran, and why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import layers_that_ran
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.errors import LayerError
from mamba_trace.modeling.run_report import LayerRun, RunReport
from mamba_trace.scan.record import Call
from mamba_trace.tracing import Visit


def test_a_layer_that_did_not_run_is_not_reported(tiny: MambaTrace, tokens: Tensor) -> None:
    assert str(tiny.last_run) == "nothing has run yet"
    with torch.no_grad():
        tiny._module(tokens)
        assert layers_that_ran(tiny) == [0, 1, 2]
        with tiny.trace(tokens) as tracer:
            tiny.layers[1].ssm.conv.output.save()
            tracer.stop()
        assert layers_that_ran(tiny) == [0, 1]
        with pytest.raises(LayerError, match="layer 2 did not run in the last forward call; these did: 0, 1"):
            _ = tiny.last_run[2]
        with tiny.trace(tokens):
            stream = tiny.layers[0].resid_pre.output
            tiny.layers[1].skip(stream)
        assert layers_that_ran(tiny) == [0, 2]
        stream, _ = tiny.run_with_cache(tokens, stop_at_layer=1)
        tiny.run_with_hooks(stream, start_at_layer=1)
        assert layers_that_ran(tiny) == [1, 2]


def test_two_traces_are_never_taken_for_one(tiny: MambaTrace, tokens: Tensor) -> None:
    """Not even where the objects of one come to stand in memory where those of another stood."""
    traces = []
    for _ in range(100):
        tiny.run_with_hooks(tokens, stop_at_layer=1)
        traces.append(tiny.last_run.trace)
    assert len(set(traces)) == len(traces)


def test_a_trace_whose_workers_are_in_another_process_has_a_number() -> None:
    """On NDIF's host the mediators of a run stand for the workers of a sandbox."""
    visit, numbers = Visit(nn.Identity()), []
    for _ in range(2):
        visit.interleaver = SimpleNamespace(mediators=[SimpleNamespace(worker=None)])
        numbers.append(visit.trace)
        assert visit.trace == numbers[-1]
    assert numbers[0] != numbers[1]


def test_a_layer_in_words() -> None:
    run = LayerRun(3, 9, [Call("causal_conv", "PyTorch", 9)], ["h is wanted", "conv is wanted"])
    run.calls += [Call("selective_scan", "cpu", 6), Call("selective_scan", "cpu", 3), Call("its_own", "cuda", 9)]
    kernels = "PyTorch conv; cpu scan 6 + 3 positions; cuda its_own"
    assert run.kernels() == kernels
    assert str(run) == f"{kernels} (h is wanted; conv is wanted)"


def test_layers_that_ran_the_same_are_one_line() -> None:
    report = RunReport()
    for layer, backend in enumerate(["cpu", "reference", "reference", "cpu"]):
        report.begin(layer, 5, None).calls.append(Call("gated_scan", backend, 5))
    scan = "scan with softplus, D and gate"
    lines = ["5 positions", f"layer 0: cpu {scan}", f"layers 1-2: reference {scan}", f"layer 3: cpu {scan}"]
    assert str(report).splitlines() == lines


@pytest.mark.parametrize(("layer", "trace", "left"), [(1, 7, [0, 1]), (0, 7, [0]), (1, 8, [1]), (1, None, [1])])
def test_a_report_is_of_one_call(layer: int, trace: int | None, left: list[int]) -> None:
    """A layer that comes no later than the last one, or another trace, begins another."""
    report = RunReport()
    report.begin(0, 5, 7)
    begun = report.begin(layer, 6, trace)
    assert [run.layer for run in report] == left
    assert report[layer] is begun
