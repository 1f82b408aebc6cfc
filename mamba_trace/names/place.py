"""A place: a site of a particular layer, and for the state of a particular position."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..errors import PositionError, UnknownSiteError
from ..sites import BY_NAME, NATIVE_MODULES, PURE, STATE, Family, Layout, Site


@dataclass(frozen=True)
class Place:
    """A site of a particular layer, and for the state of a particular position.

    Attributes:
        site: the row of the table, or ``None`` for one of `sites.NATIVE_MODULES`.
        layer: the layer, or ``None`` for the model's own sites.
        position: the position for ``h[p]``, or ``None``.
        native: the inner module's name where ``site`` is ``None``.
    """

    site: Site | None
    layer: int | None = None
    position: int | None = None
    native: str | None = None

    @property
    def whole_trajectory(self) -> bool:
        """Whether this is ``h`` itself, all positions at once, which has no hook name."""
        return self.site is not None and self.site.name == STATE and self.position is None

    def index(self, layout: Layout | None = None) -> float:
        """Where the place comes in its layer or its model: the order of execution, positions aside.

        An inner module comes half a step before the site that follows it, ``h[p]`` before the whole ``h``.

        Args:
            layout: of the model; without one the order is the table's.
        """
        site = self.site or BY_NAME[NATIVE_MODULES[str(self.native)]]
        order = site.index if layout is None else layout.order(site, self.layer)
        return order - (0.5 if self.site is None or self.position is not None else 0.0)

    @property
    def path(self) -> str:
        """The path users write."""
        if self.site is None:
            return f"layers[{self.layer}].ssm.{self.native}"
        return self.site.path(self.layer) + ("" if self.position is None else f"[{self.position}]")

    @functools.cached_property
    def hook_name(self) -> str:
        """The MambaLens name, or TransformerLens 4's. Raises `UnknownSiteError` where neither has one."""
        if self.site is None:
            raise UnknownSiteError(f"{self.path} has no MambaLens hook: {self.native} is a module, not a site")
        if self.whole_trajectory:
            raise UnknownSiteError(
                f"{self.path} (the whole trajectory) has no hook name: MambaLens has one hook for each "
                f"position, blocks.{self.layer}.hook_h.p, which is {self.path}[p] here"
            )
        return self.site.hook_name(self.layer) + ("" if self.position is None else f".{self.position}")


def hook_names(layers: int | Layout, n_positions: int, family: Family = "selective") -> list[str]:
    """Every MambaLens hook name of a model, in execution order.

    >>> hook_names(1, 2)[:2]
    ['hook_embed', 'blocks.0.hook_resid_pre']

    Args:
        layers: what the layers of the model are; for a Mamba their number is enough.
        n_positions: of the prompt.
        family: of the mixers, where ``layers`` is a number.

    Raises:
        PositionError: if ``n_positions`` is not an integer of at least one.
    """
    if isinstance(n_positions, bool) or not isinstance(n_positions, int) or n_positions < 1:
        raise PositionError(
            f"hook names are those of a prompt of so many tokens, an integer of at least one position, not "
            f"{n_positions!r}"
        )
    layout = Layout((PURE[family],) * layers) if isinstance(layers, int) else layers
    return [place.hook_name for place in hook_places(layout, n_positions)]


@functools.lru_cache(maxsize=2)  # with all their names
def hook_places(layout: Layout, n_positions: int) -> tuple[Place, ...]:
    """The places of `hook_names`, in the same order.

    >>> from mamba_trace.sites import PURE, Layout
    >>> [place.path for place in hook_places(Layout((PURE["selective"],)), 2)][:2]
    ['embeddings', 'layers[0].resid_pre']
    """
    return tuple(
        Place(site, layer, position)
        for site, layer in layout.walk()
        if site.in_mamba_lens or site.part
        for position in (range(n_positions) if site.name == STATE else (None,))
    )
