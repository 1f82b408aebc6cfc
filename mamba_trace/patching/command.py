"""What ``mamba-trace patch`` does: the grids of several sites, printed, and saved as one file.

The command line itself reads options and nothing else; see `cli`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import FileError, MetricError, UnknownSiteError
from ..results.files import check_writable
from ..results.page import Report
from ..results.terminal import terminal_table
from .grid import attribution_grid, find_site, patch_grid
from .metrics import Metric, log_prob, logit, logit_diff, prob
from .processes import first_process, part
from .result import PatchGrid

if TYPE_CHECKING:
    from ..model import MambaTrace

#: The metrics by the names of the command line: of (model, answer, wrong).
METRICS: dict[str, Callable[[MambaTrace, str, str], Metric]] = {
    "logit-diff": logit_diff,
    "logit": lambda model, answer, wrong: logit(model, answer),
    "log-prob": lambda model, answer, wrong: log_prob(model, answer),
    "prob": lambda model, answer, wrong: prob(model, answer),
}


@dataclass(frozen=True)
class Asked:
    """What the options say, checked as far as it can be without a model.

    Attributes:
        prompt, source: the two runs.
        sites: names of sites.
        attribution: estimate every grid to first order, too.
        out: where the result is saved.
        options: the other arguments of `patch_grid`.
    """

    prompt: str
    source: str
    sites: list[str]
    attribution: bool
    out: Path | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Raises as `find_site` and `check_writable` do, before anything is loaded."""
        if not self.sites:
            raise UnknownSiteError("no site is named; `mamba-trace sites` lists them")
        for site in self.sites:
            find_site(site)
        if self.attribution and self.options.get("window", 1) > 1:
            raise MetricError(
                "--attribution estimates patches of one layer: where several are patched together, the "
                "effect of the first is overwritten by the next. Leave out --window or --attribution"
            )
        if self.out is not None:
            check_writable(self.out)
            if self.out.suffix != ".html" and len(self.sites) + self.attribution > 1:
                raise FileError(
                    f"{self.out}: several grids are saved as one page, .html; name one site, or print --json"
                )

    def grids(self, model: MambaTrace, metric: Metric) -> dict[str, PatchGrid]:
        """Every grid, under a heading."""
        found = {}
        keep = self.options.get("keep")
        for site in self.sites:
            options = self.options
            if keep is not None and len(self.sites) > 1:
                options = {**options, "keep": Path(keep) / find_site(site).name}
            found[site] = patch_grid(model, self.prompt, self.source, site, metric, **options)
            if self.attribution:
                estimate = attribution_grid(model, self.prompt, self.source, site, metric)
                found[f"{site}, to first order"] = estimate
        return found

    def save(self, grids: dict[str, PatchGrid]) -> Path | None:
        """Write what was asked for: one grid, or one page of several."""
        if self.out is None:
            return None
        if len(grids) == 1:
            return next(iter(grids.values())).save(self.out)
        return Report(grids, title=f"Patching {', '.join(self.sites)}").save(self.out)


@contextmanager
def in_the_first_process() -> Iterator[bool]:
    """Whether this one prints and writes. Afterwards the processes that a launcher started part."""
    try:
        yield first_process()
    finally:
        part()


def print_grids(grids: dict[str, PatchGrid], asked: Asked, model: str, screen: Console) -> None:
    """Print both runs' metrics, and every normalised grid."""
    first = next(iter(grids.values()))
    for name, value in (
        ("model", model),
        ("prompt", asked.prompt),
        ("source", asked.source),
        ("metric", first.metric),
        ("uncorrupted", f"{first.prompt_metric:+.4f} (prompt)"),
        ("corrupted", f"{first.source_metric:+.4f} (source)"),
    ):
        screen.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)
    screen.print("\nnormalised metric after patching: 0 as prompt, 1 as source", highlight=False)
    for heading, grid in grids.items():
        screen.print(f"\n{heading}", markup=False, highlight=False, style="bold")
        screen.print(terminal_table(grid.heatmap(), screen.width), soft_wrap=True)
        patched = grids.get(heading.removesuffix(", to first order"))
        if patched is not None and patched is not grid:
            screen.print(f"correlation with patching: {grid.correlation(patched):+.4f}", highlight=False)


def as_json(grids: dict[str, PatchGrid], asked: Asked, model: str) -> str:
    """The same for programs."""
    content = {
        "model": model,
        "prompt": asked.prompt,
        "source": asked.source,
        "grids": [
            {
                "site": grid.site,
                "method": grid.method,
                "window": grid.window,
                "metric": grid.metric,
                "prompt_metric": grid.prompt_metric,
                "source_metric": grid.source_metric,
                "rows": grid.row_labels,
                "positions": grid.labels,
                "values": grid.values.tolist(),
            }
            for grid in grids.values()
        ],
    }
    return json.dumps(content, indent=1)
