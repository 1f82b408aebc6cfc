"""What a grid asks: of which runs, which site, which layers and positions, and how answers are measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import LayerError, PositionError, UnknownSiteError
from ..names.layouts import SAME_AS, absent, site_in
from ..sites import BY_NAME, SITES, Layout, Site, describe_axes, site_named
from .metrics import Metric, measured

#: Rows of `Question.tokens`, and so of every batch that runs both prompts.
SOURCE, PROMPT = 0, 1


@dataclass(frozen=True)
class Question:
    """A grid before it is computed.

    Attributes:
        tokens: the token ids of source and prompt [2,L].
        site: the site that is patched.
        layout: what stands in the layers of the model.
        layers: the layer of each row of the grid, ascending: some that have the site; none for a site of the model.
        window: how many layers are patched together.
        metrics: what is measured, by name.
        looked_at: the positions whose logits the metrics get, ascending.
        single: whether a metric gets the logits of one position [B,V]; otherwise it gets [B,m,V].
    """

    tokens: Tensor
    site: Site
    layout: Layout
    layers: list[int]
    window: int
    metrics: Mapping[str, Metric]
    looked_at: list[int]
    single: bool

    @property
    def length(self) -> int:
        """The number of positions L."""
        return self.tokens.shape[1]

    @property
    def stop(self) -> int:
        """Where every run can end: one past the last position that a metric looks at."""
        return self.looked_at[-1] + 1

    @property
    def positions(self) -> range:
        """The positions where a patch can change an answer.

        Before the first token in which the prompts differ, both runs are the same. After the last position
        that a metric looks at, nothing is measured.
        """
        differ = (self.tokens[SOURCE] != self.tokens[PROMPT]).nonzero()[:, 0].tolist()
        return range(min([*differ, self.stop]), self.stop)

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return len(self.layout.layers)

    @cached_property
    def windows(self) -> list[range]:
        """The layers that each row of the grid runs while it patches.

        They are those of its window, from the first that has the site to the last. Between these may be others.
        """
        if self.site.scope == "model":
            return [range(1)]
        around = windows(self.n_layers, self.window)
        own = [[layer for layer in around[row] if self.layout.has(self.site, layer)] for row in self.layers]
        return [range(layers[0], layers[-1] + 1) for layers in own]

    def patched_layers(self, row: int) -> list[int | None]:
        """The layers that a row of the grid patches; ``None`` for a site of the whole model."""
        if self.site.scope == "model":
            return [None]
        return [layer for layer in self.windows[row] if self.layout.has(self.site, layer)]

    @property
    def patched(self) -> Site:
        """The site to patch in a layer: the embeddings are the residual stream into the first layer."""
        return BY_NAME["resid_pre"] if self.site.name == "embeddings" else self.site

    @property
    def after_layers(self) -> bool:
        """Whether the site comes after all layers, where each position affects its own logits only."""
        return self.site.scope == "model" and self.site.name != "embeddings"

    def described(self) -> dict[str, Any]:
        """What tells this grid from another one, as JSON."""
        return {
            "site": self.site.name,
            "n_layers": self.n_layers,
            "length": self.length,
            "window": self.window,
            "layers": None if self.site.scope == "model" or len(self.layers) == self.n_layers else self.layers,
            "metrics": list(self.metrics),
            "metric_positions": self.looked_at,
            "prompts": hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest(),
        }

    def measure(self, logits: Tensor) -> Tensor:
        """Compute every metric of logits [B,m,V], which may be overwritten: [M,B], on the CPU.

        Raises:
            MetricError: if a metric does not return one number for each row.
        """
        logits = logits[:, 0] if self.single else logits
        last, values = len(self.metrics) - 1, []
        for number, metric in enumerate(self.metrics.values()):
            own = logits if number == last else logits.clone()  # a metric may overwrite its logits
            # A metric may return the same tensor each time, with new numbers in it.
            values.append(measured(metric, own).detach().cpu().clone())
        return torch.stack(values)


def windows(n_layers: int, window: int) -> list[range]:
    """The layers that each row of a grid patches: ``window`` layers around its own, cut off at both ends.

    >>> windows(4, 3)
    [range(0, 2), range(0, 3), range(1, 4), range(2, 4)]
    """
    starts = [layer - (window - 1) // 2 for layer in range(n_layers)]
    return [range(max(start, 0), min(start + window, n_layers)) for start in starts]


# -- arguments ---------------------------------------------------------------------------------------------


def metric_positions_of(positions: int | Sequence[int], length: int) -> list[int]:
    """The positions that a metric looks at, counted from 0 and ascending. Raises `PositionError`."""
    several = [positions] if isinstance(positions, int) else positions
    if not isinstance(several, Sequence) or not all(type(position) is int for position in several):
        raise PositionError(f"metric_positions={positions!r}: give an integer, or a list of several")
    for position in several:
        if not -length <= position < length:
            raise PositionError(
                f"metric_positions has {position}, and the prompt has {length} positions: {-length} to {length - 1}"
            )
    different = sorted({position % length for position in several})
    if not different or len(different) < len(several):
        raise PositionError(
            f"metric_positions={positions!r} {'names one twice' if different else 'is empty'}: a metric "
            f"looks at the logits of one position or of several"
        )
    return different


def layers_of_rows(layout: Layout, site: Site, layers: Sequence[int] | None, asked: str) -> list[int]:
    """The layer of each row of a grid: those that have the site, or those of them that are named.

    Args:
        layout: of the model.
        site: the site that is patched.
        layers: layers of the model, ascending, or ``None`` for all.
        asked: what the user wrote.

    Raises:
        UnknownSiteError: for a layer without the site.
        LayerError: if layers are named for a site of the model.
    """
    if site.scope == "model":
        if layers is not None:
            raise LayerError(f"{asked}: {site.name} belongs to the model and not to a layer. Leave layers out")
        return []
    there = layout.with_site(site)
    for layer in layers or ():
        if layer not in there:
            raise absent(layout, site, layer, asked)
    return there if layers is None else list(layers)


def positional(layout: Layout | None = None) -> list[str]:
    """The sites that a grid can patch: those with positions, in a model of some layout or in any.

    A pattern has two kinds of positions, those that read and those that are read, so it is none of them.
    """
    return [site.name for site in SITES if has_positions(site) and (layout is None or layout.has(site))]


def has_positions(site: Site) -> bool:
    """Whether a site has a value at each position."""
    return "L" in site.axes and "S" not in site.axes


def find_site(name: str, layout: Layout | None = None) -> Site:
    """The site that a name or a hook name means, in a model of some layout if it is given.

    Raises:
        UnknownSiteError: if no site has that name, or no layer of the model has it.
        PositionError: if the site has no positions.
    """
    if not isinstance(name, str):
        raise UnknownSiteError(
            f"site={name!r}: a grid is of one site, named by a string such as 'h'. Make a grid for each"
        )
    there = positional(layout)
    possible = f"A grid patches one of {', '.join(there)}"
    site = site_named(name)
    if site is None:
        meant = site_of_place(name, layout)
        if meant is not None and meant.name in there:
            takes = f"{meant.name} patches every layer and position."
            hint = f": that is one place, and a grid takes a site. {takes}"
        else:
            hooks = [BY_NAME[one].hook for one in there]
            hint = names.nearest(name, [*there, *hooks]) + "."
        raise UnknownSiteError(f"no site is called {name!r}{hint} {possible}")
    site = site if layout is None else in_model(layout, site, name)
    if not has_positions(site):
        axes = describe_axes(site.axes if layout is None else site.axes_in(family_of(layout)))
        why = "has no positions to patch one by one"
        if "L" in site.axes:
            why = "belongs to two positions at once, the one that reads and the one that is read; patch q, k, v or z"
        raise PositionError(f"{site.name} {axes} {why}. {possible}")
    return site


def in_model(layout: Layout, site: Site, name: str) -> Site:
    """The site that a model has under the name of ``site``. Raises `UnknownSiteError` if it has none.

    Where the model adds the mixer's output to the stream as it is, `ssm_out` is `out_proj`.
    """
    if site.name == "lm_head" and name == site.hook:  # MambaLens's name of the logits
        site = BY_NAME["logits"]
    own = site_in(layout, site, None)
    if own is not None:
        return own
    if not layout.hybrid:
        names.check_family(names.Place(site), family_of(layout), name)
        raise absent(layout, site, None, repr(name))
    there = ", ".join([*positional(layout), *(name for name, same in SAME_AS.items() if layout.has(BY_NAME[same]))])
    why = names.of_another_family(site.name)
    raise UnknownSiteError(f"{name!r}: no layer of this model has a place of that name{why}. There are {there}")


def family_of(layout: Layout) -> Any:
    """The family of a model's mixers; that of attention's sites where it has none."""
    return next((kind.family for kind in layout.layers if kind.family is not None), "dual")


def site_of_place(name: str, layout: Layout | None = None) -> Site | None:
    """The site of ``"h[5]"``, ``"layers[1].ssm.h"`` or ``"blocks.1.hook_h.5"``; else ``None``."""
    indexed = re.fullmatch(r"(\w+)\[.*\]", name)
    if indexed:
        return site_named(indexed[1])
    try:
        return names.parse(name, None if layout is None else family_of(layout)).site
    except UnknownSiteError:
        return None
