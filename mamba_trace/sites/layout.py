"""Which sites there are in a model: what stands in each layer, in which order, and the table as people see it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .table import ATTENTION_TERM, BY_NAME, FAMILIES, SITES, STATE, STATE_MEANING, Family, Site, prefix_of


@dataclass(frozen=True)
class Row:
    """One line of the table as people are shown it; see `rows`.

    Attributes:
        path: what users write under ``model``, e.g. ``layers[l].ssm.h[p]``.
        axes: the axes of the value in each family that has it, as letters of `AXES`.
        hook: the MambaLens name, or ``None`` where MambaLens has none.
        meaning: one line for people.
    """

    path: str
    axes: dict[Family, str]
    hook: str | None
    meaning: str

    def shape(self, family: Family) -> str | None:
        """The axes in a family, spaced: ``"B L E N"``; ``None`` where the family lacks the site."""
        return " ".join(self.axes[family]) if family in self.axes else None


@dataclass(frozen=True)
class Kind:
    """What stands in one layer, and so which sites it has.

    Attributes:
        name: what people call it: ``"SSM"``, ``"attention"``, ``"MLP"``, ``"MoE"`` or ``"SSM and attention"``.
        parts: what it has beyond what every block has; each is a `Site.part`.
        family: of its SSM; ``None`` where it has none.
        lacks: the names of sites that it lacks though it has their part.
        early: the parts whose sites come first, before `layer_input`; the others come in the table's order.
        norm_first: whether the mixer's own norm comes before its gate, and so `inner_norm` before `after_skip`.
        own_axes: the axes of sites where they are not those of the family, by the names of the sites.
    """

    name: str
    parts: tuple[str, ...]
    family: Family | None
    lacks: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    norm_first: bool = False
    own_axes: tuple[tuple[str, str], ...] = ()

    @property
    def parallel(self) -> bool:
        """Whether it has an SSM and attention that both write to the residual stream."""
        return {"ssm_out", "attn_out"} <= {*self.parts}

    def has(self, site: Site) -> bool:
        """Whether a layer of this kind has a site of a layer."""
        if site.scope == "mixer":
            return self.family in site.families and site.name not in self.lacks
        return not site.part or site.part in self.parts

    def sites(self) -> list[Site]:
        """The sites of such a layer in execution order."""
        there = [site for site in SITES if site.scope != "model" and self.has(site)]
        return sorted(there, key=self.order)

    def order(self, site: Site) -> float:
        """Where a site comes in such a layer, as a number to sort by."""
        if site.part in self.early:
            return BY_NAME["resid_pre"].index + site.index / len(SITES)
        if self.norm_first and site.name == "inner_norm":
            return BY_NAME["after_skip"].index - 0.5
        return site.index


#: The layers of a Mamba.
PURE: dict[Family, Kind] = {family: Kind("SSM", (), family) for family in FAMILIES}


#: `lm_head` where its output is not the logits, which have MambaLens's name there.
LM_HEAD_APART = replace(BY_NAME["lm_head"], hook="unembed.hook_out")


@dataclass(frozen=True, eq=False)
class Layout:
    """The layers of a model, and so which sites it has.

    Attributes:
        layers: what stands in each.
        logits: whether the model does more than `lm_head` to give its logits.
    """

    layers: tuple[Kind, ...]
    logits: bool = False

    @property
    def hybrid(self) -> bool:
        """Whether the layers hold more than an SSM, or differ."""
        return self.logits or any(kind.parts or kind.family is None for kind in self.layers)

    def has(self, site: Site, layer: int | None = None) -> bool:
        """Whether a layer has a site; if none is given, whether the model or any layer has it."""
        if site.scope == "model":
            return not site.part or self.logits
        return any(kind.has(site) for kind in (self.layers if layer is None else [self.layers[layer]]))

    def own(self, site: Site) -> Site:
        """The row of a site as it is in this model."""
        return self._own.get(site.name, site)

    @functools.cached_property
    def _own(self) -> dict[str, Site]:
        own = {"lm_head": LM_HEAD_APART} if self.logits else {}
        for kind in self.layers:
            own |= {name: replace(BY_NAME[name], axes=axes, dual=None) for name, axes in kind.own_axes}
            if kind.parallel:  # TransformerLens's name has another meaning there
                own["attn_out"] = replace(BY_NAME["attn_out"], hook=ATTENTION_TERM)
        return own

    def order(self, site: Site, layer: int | None) -> float:
        """Where a site comes in its layer, or in the model, as a number to sort by."""
        return site.index if layer is None else self.layers[layer].order(site)

    def merged(self) -> list[Site]:
        """The sites of all layers and of the model, in an order in which each layer has its own."""

        def place(site: Site) -> float:
            kinds = [] if site.scope == "model" else [kind for kind in self.layers if kind.has(site)]
            return kinds[0].order(site) if kinds else site.index

        return sorted((self.own(site) for site in SITES if self.has(site)), key=place)

    def with_site(self, site: Site) -> list[int]:
        """The numbers of the layers that have a site."""
        return [number for number, kind in enumerate(self.layers) if kind.has(site)]

    def walk(self) -> Iterator[tuple[Site, int | None]]:
        """Every (site, layer) in execution order; layer is None for the model's own."""
        first = next(index for index, site in enumerate(SITES) if site.scope != "model")
        of_model = [self.own(site) for site in SITES if site.scope == "model" and self.has(site)]
        yield from ((site, None) for site in of_model if site.index < first)
        for layer, kind in enumerate(self.layers):
            yield from ((self.own(site), layer) for site in kind.sites())
        yield from ((site, None) for site in of_model if site.index >= first)


def walk(n_layers: int, family: Family = "selective") -> Iterator[tuple[Site, int | None]]:
    """`Layout.walk` of a Mamba of ``n_layers``.

    >>> [(site.name, layer) for site, layer in walk(1)][:2]
    [('embeddings', None), ('resid_pre', 0)]
    """
    return Layout((PURE[family],) * n_layers).walk()


def rows(family: Family | None = None, layout: Layout | None = None, *, hybrid: bool | None = False) -> Iterator[Row]:
    """The table as people are shown it, in execution order: the command line and the documentation print these.

    The state has two rows, as ``h[p]`` and the whole ``h`` are two things: an edit of the first is carried on
    to later positions, an edit of the second is not.

    Args:
        family: leave out the rows that this family lacks.
        layout: of a model: leave out what none of its layers has, and keep to the order of its layers.
        hybrid: without a ``layout``, the rows that only hybrids have, in place of all others; ``None`` for both.

    >>> states = [row for row in rows() if row.path.endswith((".h", ".h[p]"))]
    >>> [(row.path, row.shape("selective"), row.hook) for row in states]
    [('layers[l].ssm.h[p]', 'B E N', 'blocks.l.hook_h.p'), ('layers[l].ssm.h', 'B L E N', None)]
    """
    for site in SITES if layout is None else layout.merged():
        there = layout is not None or hybrid is None or bool(site.part) == hybrid
        if not there or (family is not None and family not in site.families):
            continue
        path = prefix_of(site.scope, "l") + site.name
        hook = site.hook if site.scope == "model" else f"blocks.l.{site.hook}"
        axes = {each: site.axes_in(each) for each in site.families}
        if site.name == STATE:
            at_one = {each: letters.replace("L", "") for each, letters in axes.items()}
            yield Row(f"{path}[p]", at_one, f"{hook}.p", STATE_MEANING)
        nameless = site.name == STATE or not (site.in_mamba_lens or site.part)
        yield Row(path, axes, None if nameless else hook, site.meaning)


def site_of(row: Row) -> Site:
    """The site that a row of the table shows; ``h[p]`` and ``h`` are one site.

    >>> site_of(next(rows())).name
    'embeddings'
    """
    return BY_NAME[row.path.rpartition(".")[2].removesuffix("[p]")]
