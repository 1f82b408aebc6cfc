"""The tree of envoys: copied, saved, and kept in step with the modules that it mirrors.

nnsight builds the tree once, and puts into each module the way to the tree. Two things go wrong later. A copy
of a model, or a model read from a file, has modules that know no tree, and an interleaver that still knows
the original's envoys. And when somebody replaces a module of a wrapped model (by an adapter, a new
``lm_head``), the new module has no envoy, and the envoy of that place goes on standing for the old module,
which then runs inside the new one or not at all.

`SiteInterleaver` can be copied and pickled, and takes nothing of a run along; `reconnect` makes a copied tree
work; `is_current` says, in microseconds, whether a tree still mirrors its modules, and `follow` makes it so.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.modeling.tp import TPFragments
from torch import nn

from .forwards import quicken
from .one_run import OneThreadInterleaver
from .positions import CURSOR


class SiteInterleaver(OneThreadInterleaver):
    """nnsight's interleaver; a copy of it begins without workers, visits or envoys, as if it were new.

    Attributes:
        known: the modules that the tree mirrored when it was last brought up to date: the submodules of each
            module, as collections that change with the module, and all of them as they were then.
        branches: those of them that are not known to be leaves, such as sites.
        copied: whether this is a copy, or was read from a file.
    """

    def __init__(self) -> None:
        super().__init__(fragments=TPFragments())
        self.known: tuple[list[Iterable[Any]], list[Any]] = ([], [None])  # of no tree
        self.branches: list[nn.Module] = []
        self.copied = False

    def __reduce__(self) -> tuple:
        return copied_interleaver, ()


def copied_interleaver() -> SiteInterleaver:
    """The interleaver of a copied tree, which `reconnect` introduces to its envoys."""
    interleaver = SiteInterleaver()
    interleaver.copied = True
    return interleaver


def reconnect(root: Envoy) -> None:
    """Make a copied tree of envoys work: show its modules the way to its interleaver."""
    for envoy in root.modules():
        envoy._module.__dict__.pop(CURSOR, None)  # of a run that was going on when the copy was made
        root.interleaver.instrument(envoy)
    register(root)


def register(root: Envoy) -> None:
    """Note in the tree's interleaver which envoy stands for which module."""
    envoys = root.interleaver.envoys
    envoys.clear()
    envoys.update({id(envoy._module): envoy for envoy in root.modules()})


def is_current(root: Envoy) -> bool:
    """Whether a tree mirrors its modules as they are now.

    This runs before every run, so it only compares which object is in which place. In NDIF's sandbox, where the
    model is in another process and its interleaver not this package's, it does.
    """
    if not isinstance(root.interleaver, SiteInterleaver):
        return True
    places, modules = root.interleaver.known
    return [*chain.from_iterable(places)] == modules


def branches_of(root: Envoy) -> list[nn.Module]:
    """The modules of a tree that is current, without those that are known to be leaves: sites have no weights."""
    if isinstance(root.interleaver, SiteInterleaver):
        return root.interleaver.branches
    return [envoy._module for envoy in root.modules()]


def remember(root: Envoy, leaves: tuple[type[nn.Module], ...]) -> None:
    """Take note of the modules as they are, for `is_current`.

    Args:
        root: the model's envoy.
        leaves: classes of modules that are known to have no submodules.
    """
    branches = [module for module in root._module.modules() if not isinstance(module, leaves)]
    places: list[Iterable[Any]] = [(root._module,), *(module._modules.values() for module in branches)]
    quicken(branches)
    root.interleaver.branches = branches
    root.interleaver.known = (places, [*chain.from_iterable(places)])


def follow(root: Envoy) -> None:
    """Bring a tree of envoys up to date with its modules.

    An envoy remains the envoy of its place, with its edits, its class and its other names, whatever module is
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
        _bind_names(envoy)


def _bind_names(envoy: Envoy) -> None:
    # Point an envoy's other names (nnsight's `rename=`) at the envoys that have the places now.
    for place, names in (envoy._rename or {}).items():
        target: Envoy | None = envoy if isinstance(place, str) else None
        for part in place.split(".") if isinstance(place, str) else ():
            target = None if target is None else target._child_map.get(part)
        for name in [names] if isinstance(names, str) else names:
            if target is not None and envoy.__dict__.get(name, target) is not target:
                object.__setattr__(envoy, name, target)
