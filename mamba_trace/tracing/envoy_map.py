"""The classes and names that a user gives the envoys, beside those of this package.

nnsight takes ``envoys={"mixer": Mine}``: the envoy of a module of that name, or of a class of modules, is a
`Mine`. The sites need envoys of this package, so where both name a class, the envoy has a class that inherits
from both, the user's first. ``rename=`` likewise adds names beside this package's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import nn

from ..errors import SiteValueError, UnknownSiteError

#: The most components that a path suffix of this package's has.
LONGEST = 4


class EnvoyMap(dict):
    """nnsight's ``envoys=`` of a whole tree: this package's classes and the user's, by path suffix or module
    class.

    Args:
        ours: this package's classes, by path suffix.
        by_scope: this package's classes for modules with sites, by the scope of these.
        users: the user's: one class for every module, a mapping as nnsight takes it, or ``None``.

    Raises:
        SiteValueError: if ``users`` is none of these.
    """

    def __init__(self, ours: Mapping[str, type[Envoy]], by_scope: Mapping[Any, type[Envoy]], users: Any = None) -> None:
        classes = list(users.values()) if isinstance(users, Mapping) else [] if users is None else [users]
        for given in classes:
            if not (isinstance(given, type) and issubclass(given, Envoy)):
                raise SiteValueError(
                    f"envoys= takes a subclass of nnsight's Envoy, or a dictionary of such by the path "
                    f"suffix or the class of a module, such as {{'mixer.conv': MyEnvoy}}, not {given!r}"
                )
        super().__init__({**ours, **users} if isinstance(users, Mapping) else ours)
        self.ours, self.by_scope, self.users = ours, by_scope, users

    def __reduce__(self) -> Any:
        return EnvoyMap, (self.ours, self.by_scope, self.users)

    def choose(self, rename: Any, module: nn.Module, path: str) -> type[Envoy]:
        """The class for the envoy of ``module`` at ``path``."""
        ours: Any = self.by_scope.get(getattr(module, "scope", None)) or self._named(path)
        if self.users is None:
            return ours
        nodes = SimpleNamespace(_envoys=self.users, _rename=rename)
        return composed(Envoy._resolve_envoy_class(nodes, module, path), ours)

    def _named(self, path: str) -> type[Envoy]:
        # As nnsight finds it, by the longest suffix, but by a look-up: a tree has thousands of modules.
        parts = ["*" if part.isdigit() else part for part in path.split(".")]
        suffixes = (".".join(parts[start:]) for start in range(max(0, len(parts) - LONGEST), len(parts)))
        return next((self.ours[suffix] for suffix in suffixes if suffix in self.ours), Envoy)


@functools.cache
def composed(users: type[Envoy], ours: type[Envoy]) -> type[Envoy]:
    """A class that is both: the user's first."""
    if issubclass(users, ours):
        return users
    if issubclass(ours, users):
        return ours
    try:
        return type(users.__name__, (users, ours), {"__doc__": users.__doc__, "__module__": users.__module__})
    except TypeError as error:
        raise SiteValueError(
            f"envoys=: {users.__name__} cannot stand at a site, where the envoy is a {ours.__name__} too: {error}"
        ) from error


def names_besides(ours: Mapping[str, str], users: Any, served: type) -> dict[Any, list[str]]:
    """nnsight's ``rename=``: this package's names of modules, and the names that a user adds to them.

    Args:
        ours: this package's name of each module, by path.
        users: the user's, as nnsight takes it.
        served: the class of the model, whose attributes no name may hide.

    Raises:
        UnknownSiteError: if a user's name is one that the model has for something else.
    """
    if users is not None and not isinstance(users, Mapping):
        raise UnknownSiteError(
            f"rename= takes a dictionary of a module's path and its further name, such as "
            f"{{'backbone.layers': 'stack'}}, not {users!r}"
        )
    merged: dict[Any, list[str]] = {path: [alias] for path, alias in ours.items()}
    for path, aliases in (users or {}).items():
        for alias in aliases if isinstance(aliases, (list, tuple)) else [aliases]:
            asked = f"rename={{{path!r}: {alias!r}}}"
            if not isinstance(alias, str) or not all(part.isidentifier() for part in alias.split(".")):
                raise UnknownSiteError(f"{asked}: a name is a string that can stand after a dot")
            owner = next((path for path, name in ours.items() if name == alias), None)
            if hasattr(served, alias) or owner not in (None, path):
                taken = owner if owner is not None else f"{served.__name__}.{alias}"
                raise UnknownSiteError(
                    f"{asked}: {alias!r} is the name of {taken} already; choose another one. Sites keep "
                    f"their own names, and a rename adds one beside it"
                )
            merged.setdefault(path, []).append(alias)
    return {path: list(dict.fromkeys(aliases)) for path, aliases in merged.items()}
