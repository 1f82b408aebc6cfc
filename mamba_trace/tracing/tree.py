"""The tree of envoys as a thing that is copied, saved, and kept in step with the modules that it mirrors.

nnsight builds the tree once, and installs on each module the way to it. Two things come undone later. A copy
of a model, or one that was read from a file, has modules that know no way to any tree, and an interleaver
that still knows the original's envoys. And a module that somebody puts in the place of another after the
model was wrapped (an adapter, a new ``lm_head``) has no envoy, while the envoy of that place goes on standing
for the old module, which then runs inside the new one or not at all.

Contract: `SiteInterleaver` can be copied and pickled, without anything of a run; `reconnect` makes a copied
tree work; `is_current` says, in microseconds, whether a tree is still that of its modules, and `follow` makes
it so.

The facts about nnsight 0.8 that this file rests on, held by tests/test_copies.py and tests/test_adapters.py:
``Envoy._update(module)`` re-points the envoys below at the modules of the same names, drops and adds envoys
where there are fewer or more, and registers all of them; ``interleaver.envoys`` has the envoy of each module
by its ``id``; an envoy whose module is in the tree twice has one path, and the other name is an alias of it;
``rename=`` binds its aliases only when an envoy is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.modeling.tp import TPFragments
from torch import nn

from .one_run import OneThreadInterleaver
from .visit import CURSOR

#: The submodules of each module, as they are whenever one looks, and all of them as they were.
Known = tuple[list[Iterable[Any]], list[Any]]


class SiteInterleaver(OneThreadInterleaver):
    """nnsight's interleaver, of which a copy begins as a new one does: no workers, no visits, no envoys.

    Attributes:
        known: the modules that the tree was last brought up to date with.
        copied: whether this is a copy, or was read from a file.
    """

    def __init__(self) -> None:
        super().__init__(fragments=TPFragments())
        self.known: Known = ([], [None])  # of no tree
        self.copied = False

    def __reduce__(self) -> tuple:
        return copied_interleaver, ()


def copied_interleaver() -> SiteInterleaver:
    """The interleaver of a copied tree, which `reconnect` introduces to its envoys."""
    interleaver = SiteInterleaver()
    interleaver.copied = True
    return interleaver


def reconnect(root: Envoy) -> None:
    """Make a copied tree of envoys work: its modules get to know the way to its interleaver.

    Args:
        root: the model's envoy, whose whole tree is there already.
    """
    for envoy in root.modules():
        # Where a run that was going on when the copy was made stood.
        envoy._module.__dict__.pop(CURSOR, None)
        root.interleaver.instrument(envoy)
    register(root)


def register(root: Envoy) -> None:
    """Note in the tree's interleaver which envoy stands for which module."""
    envoys = root.interleaver.envoys
    envoys.clear()
    envoys.update({id(envoy._module): envoy for envoy in root.modules()})


def is_current(root: Envoy) -> bool:
    """Whether the modules of a tree are those that it was last brought up to date with.

    At every run, so nothing is looked at but which object is in which place.
    """
    places, modules = root.interleaver.known
    return [*chain.from_iterable(places)] == modules


def remember(root: Envoy, leaves: tuple[type[nn.Module], ...]) -> None:
    """Take note of the modules as they are, for `is_current`.

    Args:
        root: the model's envoy.
        leaves: modules of these classes are taken to have no submodules.
    """
    places: list[Iterable[Any]] = [(root._module,)]
    places += [
        module._modules.values() for module in root._module.modules() if not isinstance(module, leaves)
    ]
    root.interleaver.known = (places, [*chain.from_iterable(places)])


def follow(root: Envoy) -> None:
    """Bring a tree of envoys up to date with its modules.

    An envoy stays the envoy of its place, with its edits, its class and its other names, whatever module is
    there by now.
    """
    for envoy in root.modules():
        for name, child in list(envoy._child_map.items()):
            if child.path != f"{envoy.path}.{name}":  # a second name of a module, which it may no longer have
                envoy._drop_envoy(name)
    register(root)
    root._update(root._module)
    register(root)
    for envoy in root.modules():
        bind_names(envoy)


def bind_names(envoy: Envoy) -> None:
    """Point an envoy's other names (nnsight's ``rename=``) at the envoys that have the places now."""
    for place, names in (envoy._rename or {}).items():
        target = below(envoy, place.split(".")) if isinstance(place, str) else None
        for name in [names] if isinstance(names, str) else names:
            if target is not None and envoy.__dict__.get(name, target) is not target:
                object.__setattr__(envoy, name, target)


def below(envoy: Envoy | None, names: Iterable[str]) -> Envoy | None:
    """The envoy at a path below another, or ``None``."""
    for name in names:
        envoy = None if envoy is None else envoy._child_map.get(name)
    return envoy
