"""A plan has every cell once, and no more together than its budgets permit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import ModuleFactory
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching import logit
from mamba_trace.patching.grid import asked
from mamba_trace.patching.plan import Budgets, Footprint, Job, Limits, Plan, columns_of, jobs_of
from mamba_trace.sites import BY_NAME, PURE, Family

#: Of mamba-130m and of mamba2-130m.
SIZES: dict[Family, dict[str, int]] = {
    "selective": {"D": 768, "E": 1536, "N": 16, "R": 48, "K": 4, "V": 50280},
    "dual": {"D": 768, "E": 1536, "H": 24, "P": 64, "G": 1, "N": 128, "K": 4, "V": 50288},
}


@pytest.mark.parametrize("room", [1, 50, 500, 5000, 100_000])
@pytest.mark.parametrize("enough", [1, 60, 10_000])
@pytest.mark.parametrize("n_rows", [1, 24])
def test_a_plan_has_every_cell_once_and_no_more_of_them_together_than_fit(n_rows: int, enough: int, room: int) -> None:
    def rows_that_fit(positions: range) -> int:
        return room // columns_of(positions, 50)

    jobs = jobs_of(n_rows, range(3, 40), 50, rows_that_fit, enough, most=20)
    cells = [(row, position) for job in jobs for row in job.rows for position in job.positions]
    assert sorted(cells) == [(row, position) for row in range(n_rows) for position in range(3, 40)]
    for job in jobs:
        columns = columns_of(job.positions, 50)
        assert len(job.rows) * columns <= room or job.n_cells == 1
        assert len(job.positions) <= 20
        assert columns - (50 - job.positions[-1]) < enough, "it ends where it has enough"
    starts = [job.positions.start for job in jobs]
    assert starts == sorted(starts)


def test_a_job_has_no_more_logits_than_fit(tiny: MambaTrace, tokens: Tensor) -> None:
    room = 2**30
    for looked_at in (-1, [1, 2, -1]):
        question = asked("patch_grid", tiny, tokens[:1], tokens[1:2], "h", logit(tiny, 3), looked_at, 1)
        budgets = Plan.of(tiny, question, Limits(None, room)).budgets
        assert budgets.logits == 31 * 4
        wide = replace(budgets, logits=room // (3 * len(question.looked_at)))
        assert [wide.rows_of_a_job(range(1, 1 + n)) for n in (1, 2, 3, 4)] == [3, 1, 1, 0]


def test_every_process_has_a_job(tiny: MambaTrace, tokens: Tensor) -> None:
    question = asked("patch_grid", tiny, tokens[:1], tokens[1:2], "h", logit(tiny, 3), -1, 1)
    for processes in (1, 2, 3):
        plan = Plan.of(tiny, question, Limits(None, 2**30), processes)
        assert sum(len(span.jobs) for span in plan.spans) >= processes


def test_a_footprint_counts_what_a_site_makes() -> None:
    def rows(site: str, memory: int, family: Family = "selective") -> int:
        layer = Footprint.of(PURE[family], SIZES[family], BY_NAME[site], itemsize=4, length=17)
        question: Any = None
        budgets = Budgets(question, Limits(None, memory), [layer], logits=4 * 50280, overhead=72)
        return budgets.rows_of_a_forward(17, True)

    assert rows("h", 2**29) > 5 * rows("A_bar", 2**29) >= 5
    assert rows("h", 1) == 1
    # In Mamba-2 a decay is one number for each head, and only what is written is as large as a state.
    assert rows("A_bar", 2**29, "dual") == rows("B_bar", 2**29, "dual") > 5 * rows("write", 2**29, "dual") >= 5
    assert rows("h", 2**29, "dual") < rows("h", 2**29)  # a state is eight times as large


def test_sizes_are_those_of_the_mixer(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    for model_type, state in (("mamba", 24 * 5), ("falcon_mamba", 24 * 5), ("mamba2", 6 * 4 * 5)):
        model = MambaTrace(tiny_hf(model_type=model_type))
        question = asked("patch_grid", model, tokens[:1], tokens[1:2], "h", logit(model, 3), -1, 1)
        # State and value are kept in all three layers, and made in one after the other.
        position = (3 + 4) * 2 * state * 4
        plan = Plan.of(model, question, Limits(None, 4 * position))
        assert not plan.short
        assert max(len(span.positions) for span in plan.spans) <= 4
        assert Plan.of(model, question, Limits(None, 9 * position)).short


def test_jobs_have_cells() -> None:
    assert Job(range(3), range(2, 4)).n_cells == 6
