"""What ``mamba-trace patch`` does: compute the grids of several sites, print them, and save them as one file.

The command line itself only reads options; see `cli`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import FileError, MetricError, UnknownSiteError
from ..results.files import check_writable
from ..results.page import Report
from ..results.terminal import terminal_table
from .grid import attribution_grid, patch_grid
from .metrics import Metric, log_prob, logit, logit_diff, prob
from .question import find_site
from .result import PatchGrid

if TYPE_CHECKING:
    from ..model import MambaTrace

#: The metrics by their names on the command line, made from (model, answer, wrong).
METRICS: dict[str, Callable[[MambaTrace, str, str], Metric]] = {
    "logit-diff": logit_diff,
    "logit": lambda model, answer, wrong: logit(model, answer),
    "log-prob": lambda model, answer, wrong: log_prob(model, answer),
    "prob": lambda model, answer, wrong: prob(model, answer),
}
#: The fields of a grid that programs get as they are.
FIELDS = ("site", "method", "window", "metric", "prompt_metric", "source_metric")


@dataclass(frozen=True)
class PatchCommand:
    """What the options ask for, checked as far as that is possible without a model.

    Attributes:
        model: the name of the model.
        prompt, source: the two runs.
        sites: the names of the sites to patch.
        attribution: whether to estimate every grid to first order, too.
        out: where to save the result.
        options: the other arguments of `patch_grid`.

    Raises:
        As `find_site` and `check_writable`; MetricError and FileError for options that exclude each other.
    """

    model: str
    prompt: str
    source: str
    sites: list[str]
    attribution: bool
    out: Path | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.sites:
            raise UnknownSiteError("no site is named; `mamba-trace sites` lists them")
        for site in self.sites:
            find_site(site)
        if self.attribution and self.options["window"] > 1:
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
        """Compute every grid; returns them under their headings. Raises as `find_site`, before any of them."""
        for site in self.sites:
            find_site(site, model._layout)
        grids, keep = {}, self.options["keep"]
        for site in self.sites:
            options: dict[str, Any] = dict(self.options)
            if keep is not None and len(self.sites) > 1:
                options["keep"] = keep / find_site(site).name
            grids[site] = patch_grid(model, self.prompt, self.source, site, metric, **options)
            if self.attribution:
                estimate = attribution_grid(model, self.prompt, self.source, site, metric)
                grids[f"{site}, to first order"] = estimate
        return grids

    def save(self, grids: dict[str, PatchGrid]) -> Path | None:
        """Save what the options ask for: one grid, or one page of several."""
        if self.out is None:
            return None
        if len(grids) == 1:
            return next(iter(grids.values())).save(self.out)
        return Report(grids, title=f"Patching {', '.join(self.sites)}").save(self.out)

    def print(self, grids: dict[str, PatchGrid], screen: Console) -> None:
        """Print both runs' metrics, and every normalised grid."""
        first = next(iter(grids.values()))
        for name, value in (
            ("model", self.model),
            ("prompt", self.prompt),
            ("source", self.source),
            ("metric", first.metric),
            ("of prompt", f"{first.prompt_metric:+.4f}"),
            ("of source", f"{first.source_metric:+.4f}"),
        ):
            screen.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)
        screen.print("\nnormalised metric after patching: 0 as prompt, 1 as source", highlight=False)
        for heading, grid in grids.items():
            screen.print(f"\n{heading}", markup=False, highlight=False, style="bold")
            screen.print(terminal_table(grid.heatmap(), screen.width), soft_wrap=True)
            patched = grids.get(heading.removesuffix(", to first order"), grid)
            if patched is not grid:
                correlation = grid.correlation(patched)
                screen.print(f"correlation with patching: {correlation:+.4f}", highlight=False)

    def as_json(self, grids: dict[str, PatchGrid]) -> str:
        """The grids for programs."""
        described = [
            {field: getattr(grid, field) for field in FIELDS}
            | {"rows": grid.row_labels, "layers": grid.layers, "positions": grid.labels, "values": grid.values.tolist()}
            for grid in grids.values()
        ]
        content = {"model": self.model, "prompt": self.prompt, "source": self.source, "grids": described}
        return json.dumps(content, indent=1)
