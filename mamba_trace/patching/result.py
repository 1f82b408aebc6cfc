"""The result of a patching sweep: a number for every layer and position, with what is needed to read them.

A grid is data only: it holds no model, draws itself, and can be saved and loaded (see `results`). Cells that
were never computed are nan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import MetricError
from ..names import spans
from ..results.heatmap import Heatmap
from ..results.result import Result
from ..sites import BY_NAME

#: Differences smaller than this are rounding, on the scale from 0 (as prompt) to 1 (as source).
RESOLUTION = 0.005
#: How a grid may be made.
METHODS = ("patching", "attribution", "integrated gradients")


@dataclass(frozen=True, eq=False)
class PatchGrid(Result):
    """The result of `mamba_trace.patching.patch_grid` or `attribution_grid`.

    Attributes:
        values: [rows,L], float32 or float64: the metric of the run on ``prompt`` with the site's value at
            (row, position) taken from the run on ``source``, or an estimate of it. Rows are layers, those that
            have the site; a site of the whole model has one row. nan where a cell was never computed.
        prompt_metric: the metric of the run on ``prompt``, nothing patched.
        source_metric: the metric of the run on ``source``.
        site: the site's name.
        metric: the metric's name.
        row_labels: the numbers of the layers, or the site's name where it belongs to no layer.
        prompt_tokens, source_tokens: the string of the token at each position.
        window: how many layers of the model are patched together, as far as they have the site.
        method: ``"patching"``, or how values were estimated: ``"attribution"``, ``"integrated gradients"``.
        plan: how cells ran and why, in words: in batches from their own position on, or each in a forward of
            its own, as something that was done to the model may look at a whole run. Empty if not known.
        layers: the layer of each row, counted from 0; none for a site of the whole model.
        partial: whether the grid was interrupted: `patch_grid` goes on from it with ``resume``.
    """

    values: Tensor
    prompt_metric: float
    source_metric: float
    site: str
    metric: str
    row_labels: list[str]
    prompt_tokens: list[str]
    source_tokens: list[str]
    window: int = 1
    method: str = "patching"
    plan: str = ""
    layers: list[int] = field(default_factory=list)
    partial: bool = False

    def __post_init__(self) -> None:
        """Take the layers from the labels, where an older file does not have them."""
        if not self.layers and all(label.isdecimal() for label in self.row_labels):
            object.__setattr__(self, "layers", list(map(int, self.row_labels)))

    @property
    def labels(self) -> list[str]:
        """A label for each position: ``" school_8"``, or ``" Shelby -> Emma_10"`` where the prompts differ."""
        pairs = zip(self.prompt_tokens, self.source_tokens, strict=True)
        return [f"{p if p == s else f'{p} ->{s}'}_{position}" for position, (p, s) in enumerate(pairs)]

    @property
    def complete(self) -> bool:
        """Whether every cell was computed.

        Example::

            assert grid.complete
        """
        return not bool(self.values.isnan().any())

    def normalized(self) -> Tensor:
        """The values on a scale where the metric of the run on prompt is 0, and of the run on source 1.

        Returns:
            [rows,L] in the dtype of the values; nan where a cell was never computed.

        Raises:
            MetricError: if the two runs have the same metric.

        Example::

            grid.normalized().max()
        """
        if math.isclose(self.prompt_metric, self.source_metric, rel_tol=1e-6):
            raise MetricError(
                f"prompt and source have the same metric ({self.metric}: {self.prompt_metric:+.6g}), so "
                f"there is no scale between them. Use prompts that the model answers differently, or look at "
                f".values"
            )
        # 0.0 is added because a negative zero would be printed as -0.0000.
        return (self.values - self.prompt_metric) / (self.source_metric - self.prompt_metric) + 0.0

    def correlation(self, other: PatchGrid) -> float:
        """Pearson's correlation of two grids over the cells that are finite in both.

        Args:
            other: a grid with as many rows and positions, e.g. an estimate of this one.

        Returns:
            r, from -1 to 1, computed in float64.

        Raises:
            MetricError: if the grids are of different sites, windows, layers or shapes, or have fewer than two
                cells in common, or one of them has the same value in all of these.

        Example::

            assert grid.correlation(grid) == 1
        """
        if not isinstance(other, PatchGrid):
            raise MetricError(f"a grid is compared with another PatchGrid, not with a {type(other).__name__}")
        for name in ("site", "window", "layers"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise MetricError(
                    f"these grids answer different questions: {name} is {ours!r} in one and {theirs!r} in "
                    f"the other. Make both of the same"
                )
        if self.values.shape != other.values.shape:
            raise MetricError(
                f"a correlation compares grids cell by cell: {self.site} has {list(self.values.shape)} rows "
                f"and positions, {other.site} {list(other.values.shape)}. Make both with the same prompts' "
                f"lengths and layers"
            )
        both = self.values.isfinite() & other.values.isfinite()
        cells = [grid.values[both].double() for grid in (self, other)]
        if len(cells[0]) < 2:
            raise MetricError(
                f"the grids of {self.site} and {other.site} have {len(cells[0])} cells in common that are "
                f"computed and finite; a correlation needs two. Compute more of them"
            )
        for grid, values in zip((self, other), cells, strict=True):
            if values.max() == values.min():
                raise MetricError(
                    f"the grid of {grid.site} ({grid.method}) is {values[0]:+.6g} in all {len(values)} "
                    f"cells, so nothing can correlate with it. Patch a site that changes the metric"
                )
        first, second = (values - values.mean() for values in cells)
        together = float(first @ second) / math.sqrt(float(first @ first) * float(second @ second))
        return max(-1.0, min(1.0, together))

    def caption(self) -> str:
        """Both runs' metrics, the rows, and how many cells are missing: the line under the grid in a report.

        Example::

            print(grid.caption())
        """
        both = f"{self.prompt_metric:+.4f} on prompt, {self.source_metric:+.4f} on source"
        missing = int(self.values.isnan().sum())
        rest = f"; {missing} of {self.values.numel()} cells not computed" if missing else ""
        return f"{self.metric}: {both}{self._rows_in_words()}{rest}"

    def _rows_in_words(self) -> str:
        # What the numbers beside the rows do not say.
        words = f"; rows are the layers {spans(self.layers)}" if self.layers != list(range(len(self.layers))) else ""
        if self.window > 1:
            words += f"; a row patches {self.site} in those of {self.window} layers of the model that have it"
        return words

    def heatmaps(self) -> list[Heatmap]:
        """The normalised grid, alone. Raises `MetricError` as `normalized` does.

        Example::

            print(grid.heatmaps()[0].title)
        """
        return [self.heatmap()]

    def heatmap(self) -> Heatmap:
        """The normalised grid, as the figure, the PNG and the table of the command line draw it."""
        site = BY_NAME.get(self.site)
        name = f"{self.site} ({site.hook})" if site and site.hook else self.site
        together = f", {self.window} layers together" if self.window > 1 else ""
        estimate = f", estimated by {self.method}" if self.method != METHODS[0] else ""
        both = f"{self.prompt_metric:+.3f} on prompt (0), {self.source_metric:+.3f} on source (1)"
        return Heatmap(
            values=self.normalized(),
            title=f"Normalised metric after patching {name}{together}{estimate}\n{self.metric}: {both}",
            row_title="site" if site and site.scope == "model" else "layer",
            row_labels=self.row_labels,
            column_labels=self.labels,
            prompt_tokens=self.prompt_tokens,
            source_tokens=self.source_tokens,
            value_title="normalised metric",
            resolution=RESOLUTION,
            saturation=1.0,
        )
