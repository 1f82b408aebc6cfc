"""Mamba-2's scan by matmuls: rows that start from one state get what the definition gives each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ModuleFactory, near
from grids import grid_of
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.scan.dual import reference, short


def inputs(groups: int, length: int, fast: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, delta, A, B, C, D and skip of 5 rows, 6 heads of 4 channels, states of 3 numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x, skip = draw(2, 5, length, 6, 4)
    delta, A = draw(5, length, 6).exp() * fast, -draw(6).exp()
    B, C = draw(2, 5, length, groups, 3)
    return tuple(tensor.to(dtype) for tensor in (x, delta, A, B, C, draw(6), skip))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 9, 32])
@pytest.mark.parametrize("fast", [0.1, 30.0])
def test_it_is_the_definition(groups: int, length: int, fast: float) -> None:
    """Decays of e^-1000 and more included, next to which small ones keep their digits."""
    state = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = inputs(groups, length, fast, torch.float64)
    expected, _ = reference.gated_scan(*given, state.expand(5, -1, -1, -1))
    near(short.gated_scan(*given, state), expected, 1e-13)
    narrow = inputs(groups, length, fast, torch.float32)
    got = short.gated_scan(*narrow, state.float())
    assert got.dtype == torch.float32
    near(got, expected, 2e-6)


def test_half_precision_is_rounded_once() -> None:
    state = torch.randn(6, 4, 3)
    given = inputs(2, 9, 0.3, torch.bfloat16)
    got = short.gated_scan(*given, state)
    expected, _ = reference.gated_scan(*given, state.expand(5, -1, -1, -1))
    assert got.dtype == torch.bfloat16
    near(got, expected.double(), 2**-7)


def test_it_takes_few_positions_on_a_cpu_without_gradients() -> None:
    x = torch.zeros(1, short.MOST_POSITIONS, 2, 2)
    assert short.takes(x, x)
    assert not short.takes(torch.zeros(1, short.MOST_POSITIONS + 1, 2, 2))
    assert not short.takes(torch.zeros(1, 0, 2, 2))
    assert not short.takes(x.to("meta"))
    assert not short.takes(x, torch.zeros(1, requires_grad=True))
    with torch.no_grad():
        assert short.takes(x, torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize("site", ["h", "resid_post"])
def test_cells_run_by_it_and_by_the_kernel_alike(
    tiny_hf: ModuleFactory, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    model = MambaTrace(tiny_hf(model_type="mamba2", dtype=torch.float64))
    lengths: list[int] = []
    run: Any = short.gated_scan
    monkeypatch.setattr(short, "gated_scan", lambda x, *rest: lengths.append(x.shape[1]) or run(x, *rest))
    by_matmuls = grid_of(model, site).values
    assert lengths
    assert "matmuls" in str(model.last_run)
    lengths.clear()
    model.kernels = "reference"
    near(grid_of(model, site).values, by_matmuls, 1e-12)
    model.kernels = "auto"
    monkeypatch.setattr(short, "MOST_POSITIONS", 4)
    near(grid_of(model, site).values, by_matmuls, 1e-12)
    assert lengths
    assert max(lengths) <= 4
