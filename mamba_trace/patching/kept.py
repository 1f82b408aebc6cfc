"""Finished cells, in memory and, where a folder is named, on disk: what an interrupt does not lose.

A folder holds ``question.json``, which says what was asked, and a small file for each job that is done. Files
are written whole or not at all, and no process touches another's, so several may write into one folder.
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
from .unpatched import PROMPT, SOURCE

FolderPath = str | os.PathLike[str] | None
#: How far the metrics of the same unpatched run may be apart, of the larger one, on two occasions.
SAME = 1e-3


class Kept:
    """The cells of one grid that are done.

    Attributes:
        cells: of each job that is held here, its metrics [M,rows,k].
        jobs: those that are done, here or in another process.
        folder: where they are kept, too.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.cells: dict[Job, Tensor] = {}
        self.jobs: set[Job] = set()

    @classmethod
    def open(cls, folder: FolderPath, question: dict[str, Any], both: Tensor) -> Kept:
        """What a folder has of a grid, which is made where it does not exist.

        Args:
            folder: its path, or ``None`` to keep cells in memory alone.
            question: what is asked, and of what, as JSON.
            both: each metric of the unpatched runs on source and prompt [M,2].

        Raises:
            FileError: if the folder cannot be written, or holds the cells of another grid.
        """
        if folder is None:
            return cls(None)
        kept = cls(Path(folder))
        asked = question | {
            "source_metrics": both[:, SOURCE].tolist(),
            "prompt_metrics": both[:, PROMPT].tolist(),
        }
        assert kept.folder is not None
        try:
            kept.folder.mkdir(parents=True, exist_ok=True)
            path = kept.folder / "question.json"
            if path.exists():
                check_same(kept.folder, json.loads(path.read_text(encoding="utf-8")), asked)
            else:
                with replacing(path) as file:
                    file.write_text(json.dumps(asked, indent=1), encoding="utf-8")
            for path in sorted(kept.folder.glob("cells-*.safetensors")):
                kept.cells[job_of(path)] = load_file(path)["values"]
                kept.jobs.add(job_of(path))
        except FileError:
            raise
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise FileError(
                f"{folder} cannot keep the cells of a grid: {error}. Name another folder"
            ) from error
        return kept

    @property
    def fate(self) -> str:
        """What becomes of the cells after an interrupt."""
        if self.folder is None:
            return "were done, and are lost; with keep=FOLDER the next call goes on from there"
        return f"are kept in {self.folder}; the same call goes on from there"

    def has(self, job: Job) -> bool:
        """Whether every cell of a job is done, by whatever jobs."""
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

    def fill(self, values: Tensor) -> None:
        """Put all cells into ``values`` [M,rows,L]."""
        for job, found in self.cells.items():
            rows, positions = (
                slice(job.rows.start, job.rows.stop),
                slice(job.positions.start, job.positions.stop),
            )
            values[:, rows, positions] = found


def name_of(job: Job) -> str:
    """The file of a job."""
    rows, positions = job.rows, job.positions
    return f"cells-{rows.start}-{rows.stop}-{positions.start}-{positions.stop}.safetensors"


def job_of(path: Path) -> Job:
    """The job of a file. Raises `ValueError` for another file's name."""
    _, first, last, start, stop = path.stem.split("-")
    return Job(range(int(first), int(last)), range(int(start), int(stop)))


def check_same(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises `FileError` if a folder holds the cells of another grid than the one asked for."""
    for name, value in asked.items():
        other = kept.get(name, [] if name == "changes" else None)  # which older folders do not say
        if name.endswith("_metrics") and isinstance(other, list) and len(other) == len(value):
            mine, theirs = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in (value, other))
            same = torch.allclose(mine, theirs, rtol=SAME, atol=SAME)
        else:
            same = other == value
        if not same:
            raise FileError(
                f"{folder} holds the cells of another grid: its {name} is {other!r}, and this one's "
                f"{value!r}. Name another folder, or delete it"
            )
