"""Processes that share a grid find what one finds, to the last bit; what a killed one had done is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ModuleFactory
from grids import MINUS, PLUS, Interrupted, grid_of

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.patching import PatchGrid, logit_diff, patch_grid
from mamba_trace.patching.processes import Processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
)
#: Every process saves its grid; with a number of calls as the last argument, process 1 dies after so many.
PROGRAM = """
import atexit, os, sys
import torch
from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.errors import ProcessesError
from mamba_trace.patching import logit_diff, patch_grid

folder, calls = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])
# What is registered first runs last.
atexit.register(lambda: print(f"<{rank} is connected at the end: {torch.distributed.is_initialized()}>", flush=True))
model = MambaTrace.demo()
plain = logit_diff(model, " Emma", " Shelby")

def metric(logits):
    global calls
    calls -= 1
    if calls == -1 and rank == 1:
        os._exit(9)
    return plain(logits)

options = {"batch_size": 8, "keep": f"{folder}/kept", "progress": True}
patch_grid(model, PROMPT, SOURCE, "h", {"m": metric}, **options)["m"].save(f"{folder}/{rank}.safetensors")
alone = patch_grid(model, PROMPT, SOURCE, ["y", "conv"][rank], plain, distribute=False, progress=False)
alone.save(f"{folder}/alone-{rank}.json")
try:
    patch_grid(model, PROMPT, SOURCE, ["y", "conv"][rank], plain, progress=False)
except ProcessesError as error:
    print(f"<{rank}: {error}>", flush=True)
"""


#: The same of a tiny model of the type that the third argument names.
TINY_PROGRAM = """
import os, sys
import torch
sys.path.insert(0, sys.argv[4])
from conftest import make_hf
from grids import LONG
from mamba_trace import MambaTrace
from mamba_trace.errors import ProcessesError
from mamba_trace.patching import logit_diff, patch_grid

folder, calls, rank = sys.argv[1], int(sys.argv[2]), int(os.environ["RANK"])
model = MambaTrace(make_hf(model_type=sys.argv[3]))
plain = logit_diff(model, 5, 6)

def metric(logits):
    global calls
    calls -= 1
    if calls == -1 and rank == 1:
        os._exit(9)
    return plain(logits)

options = {"batch_size": 3, "keep": f"{folder}/kept", "progress": False}
patch_grid(model, LONG[:1], LONG[1:], "h", {"m": metric}, **options)["m"].save(f"{folder}/{rank}.safetensors")
other = MambaTrace(make_hf(model_type=["mamba", "falcon_mamba"][rank]))
try:
    patch_grid(other, LONG[:1], LONG[1:], "h", plain, progress=False)
except ProcessesError as error:
    print(f"<{rank}: {error}>", flush=True)
"""


def launch(launcher: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def alone() -> PatchGrid:
    model = MambaTrace.demo()
    metric = logit_diff(model, " Emma", " Shelby")
    return patch_grid(model, PROMPT, SOURCE, "h", {"m": metric}, batch_size=8, progress=False)["m"]


def test_a_killed_process_loses_its_own_cells_and_the_next_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    run = (str(tmp_path / "program.py"), str(tmp_path))
    killed = launch(TORCHRUN, *run, "2")  # after the unpatched runs and one job
    assert killed.returncode != 0
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("cells-*")}
    assert 1 <= len(kept) < 5
    done = launch(TORCHRUN, *run, "1000")
    assert done.returncode == 0, done.stderr
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("cells-*")}
    assert len(again) == 5
    assert again.items() >= kept.items(), "what was kept is not computed again"
    model = MambaTrace.demo()
    metric = Interrupted(logit_diff(model, " Emma", " Shelby"))
    alone = patch_grid(model, PROMPT, SOURCE, "h", metric, batch_size=8, progress=False)
    for rank in (0, 1):
        assert torch.equal(PatchGrid.load(tmp_path / f"{rank}.safetensors").values, alone.values)
        assert PatchGrid.load(tmp_path / f"alone-{rank}.json").site == ["y", "conv"][rank]
        refused = f"<{rank}: 2 processes share this grid, but process 1 asks for site 'conv' and process 0 for 'y'"
        assert refused in done.stdout
        assert f"<{rank} is connected at the end: False>" in done.stdout
    assert "patching h on 2 processes: 100%" in done.stderr
    assert "120/120" in done.stderr


@pytest.mark.parametrize("model_type", ["falcon_mamba", "mamba2"])
def test_processes_share_a_grid_of_every_architecture(tmp_path: Path, tiny_hf: ModuleFactory, model_type: str) -> None:
    (tmp_path / "program.py").write_text(TINY_PROGRAM)
    run = (str(tmp_path / "program.py"), str(tmp_path))
    rest = (model_type, str(Path(__file__).parent))
    assert launch(TORCHRUN, *run, "3", *rest).returncode != 0
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("cells-*")}
    assert 2 <= len(kept) < 13
    done = launch(TORCHRUN, *run, "1000", *rest)
    assert done.returncode == 0, done.stderr
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("cells-*")}
    assert len(again) == 13
    assert again.items() >= kept.items()
    torch.set_num_threads(1)
    model = MambaTrace(tiny_hf(model_type=model_type))
    alone = grid_of(model, metric=Interrupted(logit_diff(model, PLUS, MINUS)), batch_size=3)
    for rank in (0, 1):
        assert torch.equal(PatchGrid.load(tmp_path / f"{rank}.safetensors").values, alone.values)
        assert (
            f"<{rank}: 2 processes share this grid, but process 1 asks for architecture 'Falcon-Mamba'" in done.stdout
        )


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_command_line_works_under_the_launchers(launcher: Sequence[str], alone: PatchGrid) -> None:
    program = ("-m", "mamba_trace") if launcher is TORCHRUN else ("--module", "mamba_trace")
    done = launch(launcher, *program, "patch", "--json", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    (grid,) = json.loads(done.stdout)["grids"]
    assert torch.equal(torch.tensor(grid["values"]), alone.values)
    assert "patching h on 2 processes" in done.stderr


def test_one_process_is_all_there_is_without_a_launcher() -> None:
    processes = Processes.here(torch.device("cpu"))
    assert (processes.rank, processes.size) == (0, 1)
    assert processes.share([1, 2, 3]) == processes.gather([1, 2, 3]) == [1, 2, 3]
    counter = processes.counter("cells")
    assert [counter(2), counter(0), counter(3)] == [2, 2, 5]


def test_parts_are_taken_in_turn() -> None:
    assert [Processes(rank, 3).share(range(7)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
