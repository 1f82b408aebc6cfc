"""nnsight's ``tracer.cache``, whose values are what ``.output`` of each place is in a trace.

nnsight records what a module returns. Some modules of Hugging Face's return more than the value of their place: a block
or attention a tuple of which it is the first, and a router, whose value is the site of its logits, what it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnsight.intervention.cache import Cache
from nnsight.intervention.interleaver import Mediator
from torch import Tensor


class SiteCache(Cache):
    """nnsight's cache with the values of the places.

    Attributes:
        firsts: the paths of modules whose value is the first of the tuple that they return.
        routers: the path of the site of the logits -> that of the router.
    """

    firsts: set[str]
    routers: dict[str, str]

    def subscriptions(self) -> dict[str, tuple[str, str]]:
        found = super().subscriptions()
        for site, router in self.routers.items():
            if found.pop(f"{router}.output", None) is not None:
                found[f"{site}.output"] = (site, "output")
        return found

    def _record(self, path: str, key: str, value: Any) -> None:
        router = self.routers.get(path) if key == "output" else None
        if key == "output" and path in self.firsts and isinstance(value, tuple):
            value = value[0]
        if router is None or self.targets is None or path in self.targets:
            super()._record(path, key, value)
        if router is not None:
            super()._record(router, key, value)


def with_places(cache: Cache) -> None:
    """Make a new cache of nnsight's a `SiteCache`, which looks up what the places of its model are."""
    envoys = {envoy.path: envoy for envoy in cache.model.modules()}
    targets = [envoys[path] for path in (envoys if cache.targets is None else cache.targets) if path in envoys]
    cache.__class__ = SiteCache
    assert isinstance(cache, SiteCache)
    cache.firsts = {envoy.path for envoy in targets if is_first(envoy)}
    cache.routers = {site_of(envoy).path: envoy.path for envoy in targets if site_of(envoy) is not envoy}


def is_first(envoy: Any) -> bool:
    """Whether the value of a place is the first of a tuple that its module may return."""
    return getattr(type(envoy), "_first_of_tuple", False)


def site_of(envoy: Any) -> Any:
    """The envoy of the module that returns the value of a place: of a router that is the site of its logits."""
    return envoy._logits if hasattr(type(envoy), "_logits") else envoy


class Onlooker:
    """Takes the place of a cache of nnsight's: a function is called with the value of a place at each visit."""

    def __init__(self, keep: Callable[[Tensor], None], first: bool) -> None:
        self.keep, self.first = keep, first

    def observe_selected(self, selected: Any, value: Any) -> None:
        self.keep(value[0] if self.first and isinstance(value, tuple) else value)


def look_on(envoy: Any, keep: Callable[[Tensor], None]) -> None:
    """In a trace, call ``keep`` with the value of a place at each later visit, as everybody who may edit it leaves it.

    A worker that asks for a value stops the model and is started again; this does neither. Nobody is told if the run
    never comes to the place.

    Args:
        envoy: of the place.
        keep: must neither edit the value nor keep it where the run may edit it later.
    """
    mediator = Mediator.current(envoy.path)
    location, onlooker = f"{site_of(envoy).path}.output", Onlooker(keep, is_first(envoy))
    mediator.interleaver.observers.setdefault(location, []).append((mediator, onlooker, None))
