"""Finished cells, in memory and, where the user names a folder, on disk: an interrupt does not lose them.

A folder holds ``question.json``, which says what was asked, and a small file for each finished job. A file is
written whole or not at all, and no process touches another's files, so several may write into one folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import FileError
from ..results.files import replacing
from .plan import Job
from .question import PROMPT, SOURCE

FolderPath = str | os.PathLike[str] | None
#: How far the metrics of the same unpatched run may differ between two occasions, relative to the larger.
SAME = 1e-3
#: What differs where a folder keeps no more than a digest of it.
DIGESTED = {
    "prompts": "its prompts are others",
    "weights": "it is of a model with other weights",
    "metric_functions": "it was measured by another metric",
    "settings": "its model has another configuration",
}
#: What older folders do not mention, and what that means.
UNMENTIONED: dict[str, Any] = {"changes": [], "architecture": "Mamba-1"}


class Kept:
    """The finished cells of one grid.

    Attributes:
        cells: the metrics [M,rows,k] of each job that is held here.
        jobs: the finished jobs, here or in another process.
        folder: where cells are kept on disk; ``None`` for nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.cells: dict[Job, Tensor] = {}
        self.jobs: set[Job] = set()

    @classmethod
    def open(cls, folder: FolderPath, question: dict[str, Any], both: Tensor) -> Kept:
        """Open a folder, or make a new one, and load its cells; ``None`` keeps cells in memory only.

        The folder belongs to ``question``, which says as JSON what is asked and of which model, and to
        ``both``, each metric of the unpatched runs on source and prompt [M,2].

        Raises:
            FileError: if the folder cannot be written, or holds the cells of another grid.
        """
        if folder is None:
            return cls(None)
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise FileError(f"keep={folder!r} names no folder: keep='cells', or None to keep cells in memory only")
        kept, path = cls(Path(folder)), Path(folder) / "question.json"
        metrics = {"source_metrics": both[:, SOURCE].tolist(), "prompt_metrics": both[:, PROMPT].tolist()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_same(path.parent, json.loads(path.read_text(encoding="utf-8")), question | metrics)
            else:
                with replacing(path) as file:
                    file.write_text(json.dumps(question | metrics, indent=1), encoding="utf-8")
            for cells in sorted(path.parent.glob("cells-*.safetensors")):
                kept.cells[job_of(cells)] = load_file(cells)["values"]
        except FileError:
            raise
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            words = f"{folder} cannot keep the cells of a grid: {error}. Name another folder"
            raise FileError(words) from error
        kept.jobs |= kept.cells.keys()
        return kept

    @property
    def fate(self) -> str:
        """What becomes of the cells after an interrupt."""
        if self.folder is None:
            return (
                "were done: the exception's attribute partial (in a notebook sys.last_value.partial) is the grid of "
                "them, nan in the rest; the same call with resume=that grid goes on from there. With keep=FOLDER they "
                "are also kept on disk"
            )
        return f"are kept in {self.folder}; the same call goes on from there"

    def has(self, job: Job) -> bool:
        """Whether every cell of a job is done, as part of any jobs."""
        cells = {(row, position) for row in job.rows for position in job.positions}
        for done in self.jobs:
            cells -= {(row, position) for row in done.rows for position in done.positions}
        return not cells

    def add(self, job: Job, values: Tensor) -> None:
        """Keep the metrics [M,rows,k] of a job."""
        self.cells[job] = values
        if self.folder is not None:
            with replacing(self.folder / name_of(job)) as file:
                save_file({"values": values.contiguous()}, file)

    def take(self, values: Tensor, jobs: list[Job]) -> None:
        """Keep what an interrupted grid has of these jobs: ``values`` [M,rows,L], nan where a cell is not done."""
        for job in jobs:
            cells = values[:, job.rows.start : job.rows.stop, job.positions.start : job.positions.stop]
            if not self.has(job) and not bool(cells.isnan().any()):
                self.add(job, cells.clone())
                self.jobs.add(job)

    def fill(self, values: Tensor) -> None:
        """Put all cells into ``values`` [M,rows,L]."""
        for job, metrics in self.cells.items():
            rows, positions = job.rows, job.positions
            values[:, rows.start : rows.stop, positions.start : positions.stop] = metrics


def name_of(job: Job) -> str:
    """The name of a job's file."""
    rows, positions = job.rows, job.positions
    return f"cells-{rows.start}-{rows.stop}-{positions.start}-{positions.stop}.safetensors"


def job_of(path: Path) -> Job:
    """The job of a file. Raises `ValueError` for a file with another kind of name."""
    _, first, last, start, stop = path.stem.split("-")
    return Job(range(int(first), int(last)), range(int(start), int(stop)))


def check_same(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises `FileError` if a folder holds the cells of another grid than the one asked for."""
    for name, value in asked.items():
        if name == "settings" and name not in kept:  # an older folder, which its weights tell apart
            continue
        other = kept.get(name, UNMENTIONED.get(name))
        if name.endswith("_metrics") and isinstance(other, list) and len(other) == len(value):
            mine, theirs = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (value, other))
            same = torch.allclose(mine, theirs, rtol=SAME, atol=SAME)
        else:
            same = other == value
        if not same:
            differs = DIGESTED.get(name) or f"its {name} is {other!r}, and this one's {value!r}"
            raise FileError(f"{folder} holds the cells of another grid: {differs}. Name another folder, or delete it")
