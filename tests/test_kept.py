"""Finished cells outlive an interrupt, in a folder that belongs to one grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, ModuleFactory
from grids import MINUS, OURS, PLUS, THEIRS, Interrupted, grid_of

from mamba_trace import MambaTrace
from mamba_trace.errors import FileError
from mamba_trace.patching import logit, logit_diff, patch_grid


@pytest.mark.parametrize("model_type", TINY)
def test_what_is_done_outlives_an_interrupt(tiny_hf: ModuleFactory, tmp_path: Path, model_type: str) -> None:
    tiny = MambaTrace(tiny_hf(model_type=model_type))
    metric, folder = logit_diff(tiny, PLUS, MINUS), tmp_path / "kept" / "h"
    whole = grid_of(tiny, batch_size=3)
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
