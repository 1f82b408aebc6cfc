"""A plan has every cell once, and no more together than its budgets permit."""

from __future__ import annotations

import pytest
from transformers import MambaConfig

from mamba_trace.patching.plan import Budgets, Job, Limits, jobs_of
from mamba_trace.sites import BY_NAME


@pytest.mark.parametrize("most", [1, 5, 24, 100, 10_000])
@pytest.mark.parametrize("n_rows", [1, 24])
def test_a_plan_has_every_cell_once_and_no_more_of_them_together_than_fit(n_rows: int, most: int) -> None:
    jobs = jobs_of(n_rows, range(3, 40), 50, lambda length: max(1, most * 10 // length), overhead=30)
    cells = [(row, position) for job in jobs for row in job.rows for position in job.positions]
    assert sorted(cells) == [(row, position) for row in range(n_rows) for position in range(3, 40)]
    for job in jobs:
        assert job.n_cells <= max(1, most * 10 // (50 - job.positions.start))
    starts = [job.positions.start for job in jobs]
    assert starts == sorted(starts)


def test_a_footprint_counts_what_a_site_makes() -> None:
    config = MambaConfig(hidden_size=768, state_size=16)

    def rows(site: str, memory: int) -> int:
        budgets = Budgets(None, Limits(None, memory), config, itemsize=4, overhead=72)  # type: ignore[arg-type]
        return budgets.rows_of_a_forward(17, BY_NAME[site])

    assert rows("h", 2**29) > 5 * rows("A_bar", 2**29) >= 5
    assert rows("h", 1) == 1


def test_jobs_have_cells() -> None:
    assert Job(range(3), range(2, 4)).n_cells == 6
