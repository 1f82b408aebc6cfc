"""Cells run in two phases, in bounded memory and no longer than they must, and are what traces give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import PeakMemory
from conftest import TINY, ModuleFactory, agree
from grids import LONG, MINUS, OURS, PLUS, THEIRS, difference, grid_of, slow_grid
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from mamba_trace import MambaTrace
from mamba_trace.modeling import mixer as mixers
from mamba_trace.modeling import unwatched
from mamba_trace.patching import PatchGrid, logit, logit_diff, patch_grid
from mamba_trace.scan.room import Room

WINDOWED = [("mamba", site) for site in ("h", "resid_pre", "conv", "B_bar", "resid_post", "write")]
WINDOWED += [("falcon_mamba", site) for site in ("h", "B")]
WINDOWED += [("mamba2", site) for site in ("h", "resid_pre", "B_in", "C_conv", "A_bar", "write", "inner_norm")]


@pytest.mark.parametrize(("model_type", "site"), WINDOWED)
@pytest.mark.parametrize("window", [2, 3])
def test_a_window_patches_layers_together(tiny_hf: ModuleFactory, model_type: str, site: str, window: int) -> None:
    of: dict[str, Any] = {"model_type": model_type, "dtype": torch.float64}
    model = MambaTrace(tiny_hf(**of))
    got = patch_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), window=window, progress=False)
    offsets = {2: range(0, 2), 3: range(-1, 2)}[window]
    agree(got.values, slow_grid(tiny_hf(**of), site, window=offsets), 1e-10)
    assert got.window == window
    assert (got.values - slow_grid(tiny_hf(**of), site)).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["h", "norm", "embeddings", "lm_head"])
def test_metrics_see_the_positions_that_are_named(exact: MambaTrace, tiny_hf: ModuleFactory, site: str) -> None:
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
    agree(got["spread"].values, expected, 1e-9)
    agree(got["first"].values, slow_grid(module, site, lambda logits: logits[1, 3]), 1e-9)
    assert set(shapes) == {(3, 31)}
    one = patch_grid(exact, OURS, THEIRS, site, logit(exact, 4), metric_positions=-3, progress=False)
    agree(one.values, slow_grid(module, site, lambda logits: logits[3, 4]), 1e-9)


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


@pytest.mark.parametrize(
    ("model_type", "site"),
    [
        ("mamba", "h"),
        ("mamba", "delta"),
        ("falcon_mamba", "h"),
        ("mamba2", "h"),
        ("mamba2", "C_in"),
        ("mamba2", "B_bar"),
    ],
)
def test_how_much_runs_at_once_changes_nothing(tiny_hf: ModuleFactory, model_type: str, site: str) -> None:
    """With little memory, states are made for a stretch of positions at a time, and layers run apart."""
    of: dict[str, Any] = {"model_type": model_type, "dtype": torch.float64}
    model = MambaTrace(tiny_hf(**of))
    expected = slow_grid(tiny_hf(**of), site, difference, prompt=LONG[:1], source=LONG[1:])
    for limits in ({}, {"batch_size": 1}, {"batch_size": 7}, {"memory": 1}, {"memory": 200_000}):
        agree(grid_of(model, site, **limits).values, expected, 1e-10)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_is_what_a_trace_of_its_own_gives(
    tiny_hf: ModuleFactory, kernels: str, dtype: torch.dtype, model_type: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type, dtype=dtype), kernels=kernels)
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


# -- what runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def rows_run(tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The shapes [B,l] that every layer runs, in order; PyTorch hooks would make cells run whole."""
    seen: list[list[tuple[int, ...]]] = [[] for _ in tiny.layers]
    own = mixers.unwatched

    def noted(mixer: Any, visit: Any, run: Any, hidden_states: Tensor, *others: Any) -> Any:
        seen[mixer.layer_idx].append((*hidden_states.shape[:2],))
        return own(mixer, visit, run, hidden_states, *others)

    monkeypatch.setattr(mixers, "unwatched", noted)
    return seen


def test_no_layer_and_no_position_before_a_patch_runs_again(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    """Rows join behind their layer, and run from each position on without anything between."""
    patch_grid(tiny, OURS, THEIRS, metric=logit(tiny, 3), progress=False)
    differ = 2  # where the prompts first do
    for layer, shapes in enumerate(rows_run):
        after = [(layer, sum(6 - position for position in range(differ, 6)))]
        assert shapes == [(2, 6), (4, 4), *(after if layer else [])], "unpatched, patched together, and to the end"


def test_layers_share_memory_and_the_last_one_projects_what_is_read(
    tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[int, list[tuple[int, ...]]] = {}
    taken: list[tuple[str, int]] = []
    output, take = unwatched.output, Room.take

    def noted(mixer: Any, nobody: Any, *others: Any) -> Tensor:
        out = output(mixer, nobody, *others)
        if nobody.room is not None:
            shapes.setdefault(mixer.layer_idx, []).append((*out.shape[:2],))
        return out

    def seen(self: Room, name: str, *others: Any) -> Tensor:
        value = take(self, name, *others)
        taken.append((name, value.data_ptr()))
        return value

    monkeypatch.setattr(unwatched, "output", noted)
    monkeypatch.setattr(Room, "take", seen)
    patch_grid(tiny, OURS, THEIRS, metric=logit(tiny, 3), progress=False)
    assert shapes == {1: [(1, 4 + 3 + 2 + 1)], 2: [(2, 4)]}, "four cells a row, each read at its last position"
    assert sorted(set(taken)) == sorted(dict(taken).items()), "one place for each value"
    assert {name for name, _ in taken} == {"in_proj", "conv", "x_proj", "dt_proj", "y"}


def test_a_forward_has_as_many_cells_as_the_user_permits(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    patch_grid(tiny, OURS, THEIRS, metric=logit(tiny, 3), batch_size=3, progress=False)
    for layer, shapes in enumerate(rows_run):
        of_jobs = [[(1, 6 - position), *([(layer, 6 - position)] if layer else [])] for position in range(2, 6)]
        assert shapes == [(2, 6), *[shape for job in of_jobs for shape in job]]


def test_nothing_runs_past_the_last_position_that_is_looked_at(
    tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]
) -> None:
    grid = patch_grid(tiny, OURS, THEIRS, metric=logit(tiny, 3), metric_positions=3, progress=False)
    assert rows_run[2][1:] == [(2, 2), (2, 2 + 1)], "patched together, and to the end"
    assert (grid.values[:, 4:] == grid.prompt_metric).all()


def test_a_site_after_all_layers_costs_no_run(tiny: MambaTrace, rows_run: list[list[tuple[int, ...]]]) -> None:
    patch_grid(tiny, OURS, THEIRS, "norm_f", logit(tiny, 3), progress=False)
    assert rows_run[0] == [(2, 6)]


def test_the_kernels_stay_fused_but_where_the_patch_is(tiny: MambaTrace) -> None:
    patch_grid(tiny, OURS, THEIRS, "h", logit(tiny, 3), batch_size=1, progress=False)
    patched = [run.reasons != [] for run in tiny.last_run]
    assert patched == [True], "the last cell is in the last layer"


@pytest.mark.parametrize("site", ["h", "B_conv", "resid_post"])
def test_no_cell_makes_the_state_of_every_position(tiny_hf: ModuleFactory, site: str) -> None:
    """The unpatched runs of source and prompt do, span by span, as their states are what cells start from."""
    model = MambaTrace(tiny_hf(model_type="mamba2"))
    state = model.layers[0].ssm._module.state_shape
    shapes = PeakMemory.of(lambda: grid_of(model, site)).shapes
    with_states = {shape for shape in shapes if len(shape) == 5 and shape[-3:] == state and shape[1] > 1}
    assert {shape[0] for shape in with_states} <= {2}
    assert any(len(shape) == 4 and shape[0] > 2 and shape[1:] == state for shape in shapes)  # cells have one


# -- memory --------------------------------------------------------------------------------------------------


BOUNDED = {
    "mamba": MambaConfig(num_hidden_layers=2, hidden_size=64, state_size=16, vocab_size=50),
    "mamba2": Mamba2Config(
        num_hidden_layers=2, hidden_size=64, state_size=16, vocab_size=50, num_heads=4, head_dim=32, n_groups=2
    ),
}


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("mamba", "h"), ("mamba", "conv"), ("mamba", "A_bar"), ("mamba2", "h"), ("mamba2", "B_in"), ("mamba2", "write")],
)
@pytest.mark.parametrize("length", [40, 100])
def test_memory_is_bounded(model_type: str, site: str, length: int) -> None:
    """By the bound, for each of activations and states, and what two runs take, at every length."""
    model = MambaTrace(AutoModelForCausalLM.from_config(BOUNDED[model_type]).eval())
    tokens = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(0))
    memory = 4 * 2**20

    def sweep() -> PatchGrid:
        return patch_grid(model, tokens[:1], tokens[1:], site, logit(model, 3), memory=memory, progress=False)

    streams = 2 * length * 64 * 4
    both = 2 * length * (5 * 64 + 8 * 128) * 4  # what the unpatched runs of both prompts take
    peak = PeakMemory.of(sweep).peak
    assert peak < 2 * memory + streams + both
    assert peak > memory / 2, "the bound is used, so it means something"
