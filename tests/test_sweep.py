"""A sweep computes what it must and no more, in bounded memory, and what is done outlives an interrupt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import PeakMemory
from conftest import ModuleFactory
from test_patching import MINUS, OURS, PLUS, THEIRS, difference, slow_grid
from torch import Tensor
from transformers import MambaConfig

from mamba_trace import MambaTrace
from mamba_trace.errors import (
    FileError,
    LayerError,
    MetricError,
    PositionError,
    PromptError,
    UnknownSiteError,
)
from mamba_trace.modeling.past import PastStates
from mamba_trace.patching import (
    PatchGrid,
    attribution_grid,
    log_prob,
    logit,
    logit_diff,
    patch_grid,
    prob,
    run,
)
from mamba_trace.patching.plan import Footprint, Job, jobs_of, windows
from mamba_trace.sites import BY_NAME

#: Prompts that differ from the first token on.
LONG = torch.randint(1, 31, (2, 13), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exact(tiny_hf: ModuleFactory) -> MambaTrace:
    return MambaTrace(tiny_hf(dtype=torch.float64))


def grid_of(model: MambaTrace, site: str = "h", **arguments: Any) -> Any:
    arguments.setdefault("metric", logit_diff(model, PLUS, MINUS))
    return patch_grid(model, LONG[:1], LONG[1:], site, progress=False, **arguments)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["h", "resid_pre", "conv", "B_bar", "resid_post", "write"])
@pytest.mark.parametrize("window", [2, 3])
def test_a_window_patches_layers_together(
    exact: MambaTrace, tiny_hf: ModuleFactory, site: str, window: int
) -> None:
    got = patch_grid(exact, OURS, THEIRS, site, logit_diff(exact, PLUS, MINUS), window=window, progress=False)
    offsets = {2: range(0, 2), 3: range(-1, 2)}[window]
    close(got.values, slow_grid(tiny_hf(dtype=torch.float64), site, window=offsets))
    assert got.window == window
    assert (got.values - slow_grid(tiny_hf(dtype=torch.float64), site)).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["h", "norm", "embeddings", "lm_head"])
def test_metrics_see_the_positions_that_are_named(
    exact: MambaTrace, tiny_hf: ModuleFactory, site: str
) -> None:
    """Of these, some come before a patch and one after it."""
    shapes = []

    def spread(logits: Tensor) -> Tensor:  # [B,3,V]
        shapes.append(logits.shape[1:])
        return logits[:, 0, PLUS] - 2 * logits[:, 1, MINUS] + logits[:, 2, 1]

    metrics = {"spread": spread, "first": lambda logits: logits[:, 0, 3]}
    got = patch_grid(exact, OURS, THEIRS, site, metrics, metric_positions=[-2, 1, 3], progress=False)
    module = tiny_hf(dtype=torch.float64)
    expected = slow_grid(module, site, lambda logits: logits[1, PLUS] - 2 * logits[3, MINUS] + logits[4, 1])
    assert list(got) == ["spread", "first"]
    close(got["spread"].values, expected)
    close(got["first"].values, slow_grid(module, site, lambda logits: logits[1, 3]))
    assert set(shapes) == {(3, 31)}
    one = patch_grid(exact, OURS, THEIRS, site, logit(exact, 4), metric_positions=-3, progress=False)
    close(one.values, slow_grid(module, site, lambda logits: logits[3, 4]))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (logit, lambda logits: logits[-1, 7]),
        (log_prob, lambda logits: logits[-1].log_softmax(-1)[7]),
        (prob, lambda logits: logits[-1].softmax(-1)[7]),
    ],
    ids=["logit", "log_prob", "prob"],
)
def test_metrics_are_what_their_names_say(
    exact: MambaTrace, tiny_hf: ModuleFactory, metric: Any, expected: Callable[[Tensor], Tensor]
) -> None:
    got = patch_grid(exact, OURS, THEIRS, "y", metric(exact, 7), progress=False)
    close(got.values, slow_grid(tiny_hf(dtype=torch.float64), "y", expected))
    assert got.metric == {logit: "logit", log_prob: "log probability", prob: "probability"}[metric] + " of 7"


@pytest.mark.parametrize("looked_at", [-1, [1, -1]], ids=str)
@pytest.mark.parametrize("site", ["h", "lm_head"])
def test_metrics_may_do_anything_to_their_logits(tiny: MambaTrace, site: str, looked_at: Any) -> None:
    """One that works in place changes neither what the others see nor what comes before a patch."""
    own = torch.empty(0)

    def first(logits: Tensor, token: int) -> Tensor:
        return logits.reshape(len(logits), -1, logits.shape[-1])[:, 0, token]

    def centred(logits: Tensor) -> Tensor:
        logits -= logits.mean(-1, keepdim=True)
        return first(logits, PLUS)

    def plain(logits: Tensor) -> Tensor:
        return first(logits, PLUS)

    def in_one_place(logits: Tensor) -> Tensor:
        own.resize_(len(logits)).copy_(first(logits, MINUS))
        logits.zero_()
        return own

    def grids(metrics: dict[str, Any]) -> dict[str, Tensor]:
        arguments: dict[str, Any] = {"metric_positions": looked_at, "progress": False}
        found = patch_grid(tiny, LONG[:1], LONG[1:], site, metrics, **arguments)
        return {name: grid.values for name, grid in found.items()}

    metrics = {"again": in_one_place, "centred": centred, "plain": plain, "once more": in_one_place}
    got = grids(metrics)
    for name, metric in metrics.items():
        assert torch.equal(got[name], grids({name: metric})[name])
    assert torch.equal(got["plain"], grids({"plain": plain})["plain"])
    assert torch.equal(got["again"], grids({"m": lambda logits: first(logits, MINUS)})["m"])


@pytest.mark.parametrize("site", ["h", "delta"])
def test_how_much_runs_at_once_changes_nothing(exact: MambaTrace, tiny_hf: ModuleFactory, site: str) -> None:
    """With little memory, states are made for a stretch of positions at a time, and layers run apart."""
    expected = slow_grid(tiny_hf(dtype=torch.float64), site, difference, prompt=LONG[:1], source=LONG[1:])
    for limits in ({}, {"batch_size": 1}, {"batch_size": 7}, {"memory": 1}, {"memory": 200_000}):
        close(grid_of(exact, site, **limits).values, expected)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_is_what_a_trace_of_its_own_gives(
    tiny_hf: ModuleFactory, kernels: str, dtype: torch.dtype
) -> None:
    model = MambaTrace(tiny_hf(dtype=dtype), kernels=kernels)
    got = grid_of(model).values
    with torch.no_grad(), model.trace(LONG[1:]):
        states = [layer.ssm.h.output for layer in model.layers].save()
    for layer, position in [(0, 0), (0, 12), (1, 5), (2, 0), (2, 11)]:
        with torch.no_grad(), model.trace(LONG[:1]):
            model.layers[layer].ssm.h[position].output = states[layer][:, position]
            logits = model.lm_head.output[0, -1].save()
        expected = (logits[PLUS] - logits[MINUS]).float()
        tolerance = 1e-5 if dtype == torch.float32 else 0.05  # less than the step of bfloat16 at these values
        assert got[layer, position] == pytest.approx(float(expected), abs=tolerance)


def test_prompts_that_are_the_same_have_one_answer(tiny: MambaTrace) -> None:
    grid = patch_grid(tiny, OURS, OURS, metric=logit(tiny, 3), progress=False)
    assert (grid.values == grid.prompt_metric).all()
    assert grid.prompt_metric == pytest.approx(grid.source_metric)


# -- what runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def rows_run(tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The shapes [B,l] that every layer runs, in order; PyTorch hooks would make cells run whole."""
    seen: list[list[tuple[int, ...]]] = [[] for _ in tiny.layers]
    convolution = PastStates.convolution

    def noted(self: PastStates, x_in: Tensor, *args: Any) -> Any:
        seen[self.mixer.layer_idx].append((*x_in.shape[:2],))
        return convolution(self, x_in, *args)

    monkeypatch.setattr(PastStates, "convolution", noted)
    return seen


def test_no_layer_and_no_position_before_a_patch_runs_again(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    """With a forward for each position nothing is padded: rows join behind their layer, from there on."""
    patch_grid(tiny, OURS, THEIRS, metric=logit(tiny, 3), batch_size=3, progress=False)
    differ = 2  # where the prompts first do
    for layer, shapes in enumerate(rows_run):
        assert shapes[0] == (2, 6), "the unpatched runs"
        patched, after = [(3, 4), (1, 1)], [(layer, 6 - position) for position in range(differ, 6)]
        after = after if layer else []
        assert shapes[1:] == [patched[0], *after[:3], patched[1], *after[3:]]


def test_nothing_runs_past_the_last_position_that_is_looked_at(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    grid = patch_grid(
        tiny, OURS, THEIRS, metric=logit(tiny, 3), metric_positions=3, batch_size=3, progress=False
    )
    assert rows_run[2][1:] == [(2, 2), (2, 2), (2, 1)], "patched together, and after each other to the end"
    assert (grid.values[:, 4:] == grid.prompt_metric).all()


def test_a_site_after_all_layers_costs_no_run(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    patch_grid(tiny, OURS, THEIRS, "norm_f", logit(tiny, 3), progress=False)
    assert rows_run[0] == [(2, 6)]


def test_the_kernels_stay_fused_but_where_the_patch_is(tiny: MambaTrace) -> None:
    patch_grid(tiny, OURS, THEIRS, "h", logit(tiny, 3), batch_size=1, progress=False)
    patched = [run.reasons != [] for run in tiny.last_run]
    assert patched == [True], "the last cell is in the last layer"


def test_windows_are_cut_at_the_ends() -> None:
    assert windows(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert windows(3, 2) == [range(0, 2), range(1, 3), range(2, 3)]
    assert windows(4, 4) == [range(0, 3), range(0, 4), range(1, 4), range(2, 4)]


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


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["h", "conv", "A_bar"])
@pytest.mark.parametrize("length", [40, 100])
def test_memory_is_bounded(site: str, length: int) -> None:
    """By the bound, for each of activations, states and streams, and what two runs take, at every length."""
    config = MambaConfig(num_hidden_layers=4, hidden_size=64, state_size=16, vocab_size=50)
    model = MambaTrace.from_config(config)
    tokens = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(0))
    memory = 4 * 2**20

    def sweep() -> PatchGrid:
        return patch_grid(model, tokens[:1], tokens[1:], site, logit(model, 3), memory=memory, progress=False)

    sweep()
    streams = 4 * length * 64 * 4
    both = 2 * length * (5 * 64 + 8 * 128) * 4  # what the unpatched runs of both prompts take
    peak = PeakMemory.of(sweep).peak
    assert peak < 3 * memory + streams + both
    assert peak > memory / 2, "the bound is used, so it means something"


def test_a_footprint_counts_what_a_site_makes() -> None:
    config = MambaConfig(hidden_size=768, state_size=16)
    state, matrices = (Footprint.of(config, BY_NAME[name], itemsize=4) for name in ("h", "A_bar"))
    assert state.rows(2**29, 17) > 5 * matrices.rows(2**29, 17) >= 5
    assert state.rows(1, 17) == 1


# -- interrupts --------------------------------------------------------------------------------------------


class Interrupted:
    """A metric that is interrupted the n-th time it is asked."""

    def __init__(self, metric: Any, after: int) -> None:
        self.metric, self.after, self.asked = metric, after, 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.asked += 1
        if self.asked > self.after:
            raise KeyboardInterrupt
        return self.metric(logits)


def test_what_is_done_outlives_an_interrupt(tiny: MambaTrace, tmp_path: Path) -> None:
    metric, folder = logit_diff(tiny, PLUS, MINUS), tmp_path / "kept" / "h"
    whole = grid_of(tiny, batch_size=3)
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(tiny, metric={"m": Interrupted(metric, after=10)}, batch_size=3, keep=folder)
    assert (
        f"27 of 39 cells are kept in {folder}; the same call goes on from there" in caught.value.__notes__[0]
    )
    again = Interrupted(metric, after=1 + 13 - 9)  # the unpatched runs, and what is left
    grid = grid_of(tiny, metric={"m": again}, batch_size=3, keep=folder)["m"]
    assert again.asked == again.after
    assert torch.equal(grid.values, whole.values)
    done = Interrupted(metric, after=1)
    assert torch.equal(grid_of(tiny, metric={"m": done}, keep=folder)["m"].values, whole.values)


def test_an_interrupt_says_how_to_keep_what_is_done(tiny: MambaTrace) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(tiny, metric=Interrupted(logit(tiny, 3), after=2))
    assert "keep=" in caught.value.__notes__[0]


def test_a_folder_is_of_one_grid(tiny: MambaTrace, tiny_hf: ModuleFactory, tmp_path: Path) -> None:
    metric = logit_diff(tiny, PLUS, MINUS)
    grid_of(tiny, keep=tmp_path)
    for other, said in (
        (lambda: grid_of(tiny, "conv", keep=tmp_path), "its site is 'h', and this one's 'conv'"),
        (lambda: grid_of(tiny, window=2, keep=tmp_path), "its window is 1, and this one's 2"),
        (
            lambda: patch_grid(tiny, OURS, THEIRS, metric=metric, keep=tmp_path, progress=False),
            "its length is 13",
        ),
        (lambda: grid_of(MambaTrace(tiny_hf(seed=1)), keep=tmp_path), "its weights is"),
        (lambda: grid_of(tiny, metric=logit(tiny, 2), keep=tmp_path), "its metrics is"),
    ):
        with pytest.raises(FileError, match="holds the cells of another grid") as caught:
            other()
        assert said in str(caught.value)
    damaged = next(tmp_path.glob("cells-*"))
    damaged.write_bytes(b"1234")
    with pytest.raises(FileError, match="cannot keep the cells of a grid"):
        grid_of(tiny, keep=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot keep the cells of a grid"):
        grid_of(tiny, keep=tmp_path / "file")


# -- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_runs(
    tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "InParts", None)
    with pytest.raises(LayerError, match=r"window=4: this model has 3 layers"):
        grid_of(tiny, window=4)
    for wrong in (None, 1.5, slice(2, 5), [1, 1], [True], "1"):
        with pytest.raises(PositionError, match="metric_positions="):
            grid_of(tiny, metric_positions=wrong)
    for name, value in (("window", 2.0), ("batch_size", 2.5), ("memory", -1), ("batch_size", True)):
        with pytest.raises(PromptError, match=f"{name}="):
            grid_of(tiny, **{name: value})
    with pytest.raises(UnknownSiteError, match="a grid is of one site"):
        grid_of(tiny, ["h", "conv"])
    with pytest.raises(PromptError, match="dtype bool"):
        patch_grid(tiny, LONG[:1] > 3, LONG[1:], "h", logit(tiny, 3))
    with pytest.raises(
        PositionError, match=r"metric_positions has 13, and the prompt has 13 positions: -13 to 12"
    ):
        grid_of(tiny, metric_positions=[0, 13])
    with pytest.raises(PositionError, match=r"metric_positions=\[\] is empty"):
        grid_of(tiny, metric_positions=[])
    with pytest.raises(MetricError, match="or a dict of several"):
        grid_of(tiny, metric={"m": 3})


@pytest.mark.parametrize("make", [patch_grid, attribution_grid], ids=["patch_grid", "attribution_grid"])
def test_a_grid_is_no_part_of_a_trace(tiny: MambaTrace, make: Callable[..., Any]) -> None:
    metric = logit(tiny, 3)

    def misplaced() -> None:
        with tiny.trace(LONG):
            tiny.layers[0].resid_pre.output.save()
            make(tiny, LONG[:1], LONG[1:], "h", metric)

    with pytest.raises(
        RuntimeError, match=f"{make.__name__} is a trace of its own, and this model is in one"
    ):
        misplaced()


def test_jobs_have_cells() -> None:
    assert Job(range(3), range(2, 4)).n_cells == 6
