"""Rows that are several runs: each run gets what the definition gives it by itself, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ModuleFactory, near
from grids import grid_of
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.scan import DUAL, HEADED, SELECTIVE, ScanFamily, convolution
from mamba_trace.scan import runs as scan_runs
from mamba_trace.scan.dispatch import causal_conv
from mamba_trace.scan.dual import cpu as dual_cpu
from mamba_trace.scan.record import Call, recording
from mamba_trace.scan.reference import causal_conv as conv_definition
from mamba_trace.scan.runs import Runs

FAMILIES = {"selective": SELECTIVE, "headed": HEADED, "dual": DUAL}
RUNS = {"falling": Runs((5, 4, 3, 2, 1)), "any": Runs((1, 7, 2)), "one": Runs((3,)), "long": Runs((40, 2))}


def inputs(family: str, runs: Runs, groups: int = 1, fast: float = 0.3) -> list[Tensor]:
    """x, delta, A, B, C, D, skip and the starts in float64: 3 rows; 6 heads of 20 channels, or 40 channels."""
    generator = torch.Generator().manual_seed(0)
    length = sum(runs.lengths)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    if family == "dual":
        x, skip = draw(2, 3, length, 6, 20)
        delta, A, D = draw(3, length, 6).exp() * fast, -draw(6).exp(), draw(6)
        B, C = draw(2, 3, length, groups, 5)
        return [x, delta, A, B, C, D, skip, draw(len(runs.lengths), 6, 20, 5)]
    x, skip, delta = draw(3, 3, length, 40)
    heads = (2,) if family == "headed" else ()
    B, C = draw(2, 3, length, *heads, 5)
    return [x, delta * fast, -draw(40, 5).exp(), B, C, draw(40), skip, draw(len(runs.lengths), 40, 5)]


def one_by_one(scans: ScanFamily, given: list[Tensor], runs: Runs) -> Tensor:
    """The gated scan of each run by itself, by the definition."""
    x, delta, A, B, C, D, skip, starts = given
    parts = []
    for span, start in zip(runs.spans, starts, strict=True):
        own = (x[:, span], delta[:, span], A, B[:, span], C[:, span], D, skip[:, span])
        parts.append(scans.gated_scan(*own, start.expand(len(x), *start.shape), kernels="reference")[0])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_run_is_what_it_is_by_itself(family: str, runs: Runs) -> None:
    scans: ScanFamily = FAMILIES[family]
    given = inputs(family, runs)
    expected = one_by_one(scans, given, runs)
    near(scans.gated_runs(*given, runs), expected, 1e-13)
    narrow = [tensor.float() for tensor in given]
    for kernels in ("auto", "cpu", "reference"):
        near(scans.gated_runs(*narrow, runs, kernels=kernels), expected, 5e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("fast", [0.1, 30.0])
def test_groups_and_decays_of_any_size(groups: int, fast: float) -> None:
    """Decays of e^-1000 and more included, next to which small ones keep their digits."""
    given = inputs("dual", RUNS["any"], groups, fast)
    expected = one_by_one(DUAL, given, RUNS["any"])
    near(DUAL.gated_runs(*[tensor.float() for tensor in given], RUNS["any"]), expected, 2e-6)


@pytest.mark.parametrize("family", ["selective", "dual"])
def test_half_precision_is_rounded_once(family: str) -> None:
    given = [tensor.bfloat16() for tensor in inputs(family, RUNS["any"])]
    got = FAMILIES[family].gated_runs(*given, RUNS["any"])
    wide = [tensor.double() for tensor in given]
    expected = one_by_one(FAMILIES[family], wide, RUNS["any"])
    assert got.dtype == torch.bfloat16
    near(got, expected, 2**-7)


@pytest.mark.parametrize("family", ["selective", "dual"])
def test_one_call_of_a_kernel_does_all_runs_where_it_can(family: str) -> None:
    def calls(*given: Any, **how: Any) -> list[Call]:
        seen: list[Call] = []
        with recording(seen):
            FAMILIES[family].gated_runs(*given, **how)
        return seen

    given = [tensor.float() for tensor in inputs(family, RUNS["falling"])]
    assert calls(*given, RUNS["falling"]) == [Call("gated_scan", "cpu", 15)]
    as_rows = [Call("gated_scan", "reference", 5)]  # the longest of them
    assert calls(*given, RUNS["falling"], kernels="reference") == as_rows
    with_gradient = calls(given[0].requires_grad_(), *given[1:], RUNS["falling"])
    assert with_gradient == [Call("gated_scan", "cpu", 5)]
    long = [tensor.float() for tensor in inputs(family, RUNS["long"])]
    assert calls(*long, RUNS["long"]) == [Call("gated_scan", "cpu", 40 if family == "dual" else 42)]


def test_runs_are_rows_in_groups_that_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_runs, "TOGETHER", 7)  # two runs of three rows
    given, seen = [tensor.float() for tensor in inputs("dual", RUNS["falling"])], []
    with recording(seen):
        got = DUAL.gated_runs(*given, RUNS["falling"], kernels="reference")
    assert [call.positions for call in seen] == [5, 3, 1]
    near(DUAL.gated_runs(*given, RUNS["falling"]), got.double(), 5e-6)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_the_convolution_of_a_run_begins_behind_its_own_columns(taps: int, activate: bool, runs: Runs) -> None:
    generator = torch.Generator().manual_seed(0)
    x_in, weight = torch.randn(3, sum(runs.lengths), 20, generator=generator), torch.randn(20, taps)
    starts, bias = torch.randn(len(runs.lengths), 20, taps), torch.randn(20)
    parts = [
        conv_definition(x_in[:, span], weight, bias, start.expand(3, -1, -1), activate=activate)
        for span, start in zip(runs.spans, starts, strict=True)
    ]
    backend = convolution("auto", x_in.device, x_in.dtype, taps)
    assert backend is not None
    got = causal_conv(x_in, weight, bias, starts, activate=activate, backend=backend, runs=runs)
    near(got, torch.cat(parts, dim=1).double(), 1e-6)
    wide = torch.cat((x_in, x_in), dim=-1)[..., :20]  # channels of which others follow
    assert torch.equal(causal_conv(wide, weight, bias, starts, activate=activate, backend=backend, runs=runs), got)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
@pytest.mark.parametrize("site", ["h", "resid_post"])
def test_a_grid_is_the_same_with_all_runs_in_one_kernel_and_one_by_one(
    tiny_hf: ModuleFactory, monkeypatch: pytest.MonkeyPatch, site: str, model_type: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type))
    together = grid_of(model, site).values
    model.kernels = "reference"
    near(grid_of(model, site).values, together.double(), 1e-5)
    model.kernels = "auto"
    monkeypatch.setattr(dual_cpu, "LONGEST_RUN", 4)
    near(grid_of(model, site).values, together.double(), 1e-5)
