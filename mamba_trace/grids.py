"""The result of a patching sweep: numbers for every layer and position, with what is needed to read them.

A grid is data alone: it holds no model, draws itself (see plotting.py), and survives a trip through a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FileError, MetricError
from .plotting import Heatmap, check_writable, plotly_figure, write_png
from .sites import BY_NAME

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The result of `mamba_trace.patching.patch_grid`.

    Attributes:
        values: [rows, L] float32: the metric of the run on ``prompt`` with the site's value at (row,
            position) taken from the run on ``source``. Rows are layers, or one for a site of the whole model.
        prompt_metric: the metric of the run on ``prompt``, nothing patched.
        source_metric: the metric of the run on ``source``.
        site: the site's name.
        metric: the metric's name.
        row_labels: the layers, or the site's name where it belongs to no layer.
        prompt_tokens, source_tokens: the string of the token at each position.
    """

    values: Tensor
    prompt_metric: float
    source_metric: float
    site: str
    metric: str
    row_labels: list[str]
    prompt_tokens: list[str]
    source_tokens: list[str]

    @property
    def labels(self) -> list[str]:
        """A label for each position: ``" school_8"``, or ``" Shelby-> Emma_10"`` where the prompts differ."""
        pairs = zip(self.prompt_tokens, self.source_tokens, strict=True)
        return [f"{p if p == s else f'{p}->{s}'}_{position}" for position, (p, s) in enumerate(pairs)]

    def normalized(self) -> Tensor:
        """The values on the scale where 0 is the metric of the run on prompt, 1 that of the run on source.

        Returns:
            [rows, L] float32.

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
        return (self.values - self.prompt_metric) / (self.source_metric - self.prompt_metric)

    def figure(self) -> Figure:
        """The normalised grid as a plotly figure; ``grid.figure().write_html("h.html")`` keeps it.

        Raises:
            MissingExtraError: if plotly is not installed.
            MetricError: as `normalized`.

        Example::

            grid.figure().write_html("h.html")
        """
        return plotly_figure(self.heatmap())

    def heatmap(self) -> Heatmap:
        """What the figure, the PNG and the table of the command line are drawn from."""
        site = BY_NAME[self.site]
        title = (
            f"Normalised metric after patching {site.name} ({site.hook})\n"
            f"{self.metric}: {self.prompt_metric:+.3f} on prompt (0), {self.source_metric:+.3f} on source (1)"
        )
        return Heatmap(
            values=self.normalized(),
            title=title,
            row_title="site" if site.scope == "model" else "layer",
            row_labels=self.row_labels,
            labels=self.labels,
            prompt_tokens=self.prompt_tokens,
            source_tokens=self.source_tokens,
        )

    def save(self, path: str | Path) -> Path:
        """Write ``.html`` (interactive, self-contained), ``.png``, or ``.json``, which `load` reads back.

        Raises:
            FileError: for another suffix, or where the file cannot be written.
            MissingExtraError: if the library that draws it is not installed.

        Example::

            grid.save("h.json")
        """
        path = check_writable(path)
        try:
            if path.suffix == ".html":
                self.figure().write_html(path, include_plotlyjs=True)
            elif path.suffix == ".png":
                write_png(self.heatmap(), path)
            else:
                content = {**asdict(self), "labels": self.labels, "values": self.values.tolist()}
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> PatchGrid:
        """The grid that `save` wrote as ``.json``, equal to the last bit.

        Raises:
            FileError: if there is no such file, or it holds no grid.

        Example::

            grid.save("h.json")
            grid = PatchGrid.load("h.json")
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            content.pop("labels")
            return cls(**{**content, "values": torch.tensor(content["values"], dtype=torch.float32)})
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is no grid saved as .json by PatchGrid.save: {error}") from error
