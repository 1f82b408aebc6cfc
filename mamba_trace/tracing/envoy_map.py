"""Which class the envoy of a module has, where users bring classes of their own.

nnsight takes ``envoys={"mixer": Mine}``: the envoy of what is called that, or of a class of modules, is a
`Mine`. The sites need envoys of this package, so where both have a say the envoy is of a class that inherits
from both, the user's first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import nn

from ..errors import SiteValueError


class EnvoyMap(dict):
    """nnsight's ``envoys=`` of a whole tree: this package's classes and the user's, by path suffix or module
    class.

    Args:
        ours: this package's, by path suffix.
        users: the user's: one class for every module, a mapping as nnsight takes it, or ``None``.

    Raises:
        SiteValueError: if ``users`` is none of these.
    """

    def __init__(self, ours: Mapping[str, type[Envoy]], users: Any = None) -> None:
        classes = list(users.values()) if isinstance(users, Mapping) else [] if users is None else [users]
        for one in classes:
            if not (isinstance(one, type) and issubclass(one, Envoy)):
                raise SiteValueError(
                    f"envoys= takes a subclass of nnsight's Envoy, or a dictionary of such by the path "
                    f"suffix or the class of a module, such as {{'mixer.conv': MyEnvoy}}, not {one!r}"
                )
        super().__init__({**ours, **users} if isinstance(users, Mapping) else ours)
        self.ours, self.users = ours, users

    def __reduce__(self) -> Any:
        return EnvoyMap, (self.ours, self.users)

    def choose(self, rename: Any, module: nn.Module, path: str) -> type[Envoy]:
        """The class of the envoy of ``module`` at ``path``."""
        ours, users = (
            Envoy._resolve_envoy_class(SimpleNamespace(_envoys=envoys, _rename=rename), module, path)
            for envoys in (self.ours, self.users)
        )
        return composed(users, ours)


class Choosing(Envoy):
    """An envoy whose children are of the classes that an `EnvoyMap` says."""

    def _resolve_envoy_class(self, module: nn.Module, path: str) -> type[Envoy]:
        envoys: Any = self._envoys
        if isinstance(envoys, EnvoyMap):
            return envoys.choose(self._rename, module, path)
        return super()._resolve_envoy_class(module, path)


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
            f"envoys=: {users.__name__} cannot stand at a site, where the envoy is a {ours.__name__} too: "
            f"{error}"
        ) from error
