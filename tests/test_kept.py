"""Finished cells outlive an interrupt, in a folder that belongs to one grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, ModuleFactory
from grids import MINUS, OURS, PLUS, THEIRS, Interrupted, grid_of

from mamba_trace import MambaTrace
from mamba_trace.errors import ArgumentError, FileError
from mamba_trace.patching import PatchGrid, logit, logit_diff, patch_grid


@pytest.mark.parametrize("model_type", TINY)
def test_what_is_done_outlives_an_interrupt(tiny_hf: ModuleFactory, tmp_path: Path, model_type: str) -> None:
    tiny = MambaTrace(tiny_hf(model_type=model_type))
    metric, folder = logit_diff(tiny, PLUS, MINUS), tmp_path / "kept" / "h"
    whole = grid_of(tiny, metric=Interrupted(metric), batch_size=3)
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(tiny, metric={"m": Interrupted(metric, after=10)}, batch_size=3, keep=folder)
    assert f"27 of 39 cells are kept in {folder}; the same call goes on from there" in caught.value.__notes__[0]
    again = Interrupted(metric, after=1 + 13 - 9)  # the unpatched runs, and what is left
    grid = grid_of(tiny, metric={"m": again}, batch_size=3, keep=folder)["m"]
    assert again.asked == again.after
    assert torch.equal(grid.values, whole.values)
    done = Interrupted(metric, after=1)
    assert torch.equal(grid_of(tiny, metric={"m": done}, keep=folder)["m"].values, whole.values)


def test_an_interrupt_says_how_to_keep_what_is_done(tiny: MambaTrace) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(tiny, metric=Interrupted(logit(tiny, 3), after=2), batch_size=3)
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
        (lambda: grid_of(MambaTrace(tiny_hf(seed=1)), keep=tmp_path), "of a model with other weights"),
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


def interrupted(model: MambaTrace, metric: dict[str, Any], after: int = 10, **arguments: Any) -> KeyboardInterrupt:
    """The exception of a grid of 39 cells that is interrupted in its ninth forward of cells."""
    asked = {name: Interrupted(one, after=after) for name, one in metric.items()}
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(model, metric=asked, batch_size=3, **arguments)
    return caught.value


@pytest.mark.parametrize("model_type", TINY)
def test_an_interrupt_gives_what_was_done(tiny_hf: ModuleFactory, tmp_path: Path, model_type: str) -> None:
    tiny = MambaTrace(tiny_hf(model_type=model_type))
    metric = {"m": logit_diff(tiny, PLUS, MINUS)}
    whole = grid_of(tiny, metric=Interrupted(metric["m"]), batch_size=3)
    error = interrupted(tiny, metric)
    assert "27 of 39 cells were done" in error.__notes__[0]
    assert "resume=" in error.__notes__[0]
    partial = error.partial["m"]
    done = ~partial.values.isnan()
    assert partial.partial
    assert not partial.complete
    assert not whole.partial
    assert int(done.sum()) == 27
    assert torch.equal(partial.values[done], whole.values[done])
    assert "12 of 39 cells not computed" in partial.caption()
    loaded = PatchGrid.load(partial.save(tmp_path / "h.safetensors"))
    assert loaded.partial
    again = Interrupted(metric["m"], after=1 + 13 - 9)  # the unpatched runs, and what is left
    grid = grid_of(tiny, metric={"m": again}, batch_size=3, resume={"m": loaded})["m"]
    assert again.asked == again.after
    assert torch.equal(grid.values, whole.values)
    assert not grid.partial


def test_an_interrupt_before_the_first_cell_and_after_the_last(tiny: MambaTrace) -> None:
    metric = {"m": logit(tiny, 3)}
    assert not hasattr(interrupted(tiny, metric, after=0), "partial")
    nothing = interrupted(tiny, metric, after=1).partial["m"]
    assert nothing.values.isnan().all()
    assert torch.equal(
        grid_of(tiny, metric=metric, resume={"m": nothing})["m"].values, grid_of(tiny, metric=metric)["m"].values
    )


def test_an_interrupt_gives_one_grid_for_one_metric(tiny: MambaTrace) -> None:
    metric = logit(tiny, 3)
    slow = Interrupted(metric, after=3)
    slow.name = metric.name  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt) as caught:
        grid_of(tiny, metric=slow, batch_size=3)
    partial = caught.value.partial  # type: ignore[attr-defined]
    assert isinstance(partial, PatchGrid)
    assert torch.equal(grid_of(tiny, metric=metric, resume=partial).values, grid_of(tiny, metric=metric).values)


def test_only_a_grid_of_the_same_question_is_gone_on_from(tiny: MambaTrace, tiny_hf: ModuleFactory) -> None:
    metric = logit(tiny, 3)
    partial = interrupted(tiny, {metric.name: metric}).partial
    for call, said in (
        (lambda: grid_of(tiny, "conv", metric=metric, resume=partial), "its site is 'h', and this call's 'conv'"),
        (lambda: grid_of(tiny, metric=metric, window=2, resume=partial), "its window is 1"),
        (lambda: grid_of(tiny, metric=metric, layers=0, resume=partial), r"its layers is \[0, 1, 2\]"),
        (lambda: grid_of(tiny, metric=logit(tiny, 4), resume=partial), "has no grid of the metric"),
        (lambda: grid_of(tiny, metric=metric, resume=5), "takes the grid of a call .* not 5"),
        (lambda: grid_of(tiny, metric=metric, resume=[partial]), r"takes the grid of a call .* not \[\{"),
        (lambda: grid_of(tiny, metric=metric, resume={}), r"takes the grid of a call .* not \{\}"),
        (lambda: patch_grid(tiny, OURS, THEIRS, metric=metric, resume=partial), "its prompt_tokens is"),
        (lambda: grid_of(MambaTrace(tiny_hf(seed=1)), metric=metric, resume=partial), "of another model or metric"),
        (lambda: grid_of(tiny, metric=metric, resume=partial, remote=True), "resume= with remote="),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()


def test_a_grid_goes_on_whatever_the_default_dtype_is(tiny: MambaTrace) -> None:
    metric = logit(tiny, 3)
    grid = grid_of(tiny, metric=metric)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = grid_of(tiny, metric=metric, resume=grid)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (again.source_metric, again.prompt_metric) == (grid.source_metric, grid.prompt_metric)
