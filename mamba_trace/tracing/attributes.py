"""Attributes that an envoy does not have: what is said of them, and assignments that would mean nothing.

``ssm.y = value`` would hide the site and change nothing in the run, and ``ssm.y.outptu = value`` would be
kept by Python and never looked at. Both are refused here, with the name that was meant.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import Tensor, nn

from ..errors import SiteValueError, UnknownSiteError
from ..names import NATIVE_MODULES, lacked, nearest, public_path
from ..sites import BY_NAME, SITES
from .envoy_map import Choosing

#: Names that a user reads values at and never assigns to.
PLACES = {*BY_NAME, *NATIVE_MODULES, "layers", "ssm"}


class Guarded(Choosing):
    """An envoy that takes no values under names that mean nothing: the model's own, and every one below."""

    #: What a name of a value that is assigned to may have been meant as.
    ASSIGNED = ("output", "input", "inputs")

    def __setattr__(self, name: str, value: Any) -> None:
        being_made = "_child_map" not in self.__dict__
        if isinstance(value, (nn.Module, Envoy)) or name.startswith("_") or being_made:
            super().__setattr__(name, value)
            return
        if name in PLACES:
            raise not_a_value(f"{public_path(self.path)}.{name}".removeprefix("model."))
        if name not in self.__dict__ and not hasattr(type(self), name) and self._meant(name):
            raise UnknownSiteError(
                f"{public_path(self.path)} has no {name!r} to assign "
                f"to{nearest(name, list(self.ASSIGNED)) or '.'} "
                f"A value is assigned to {' or '.join('.' + one for one in self.ASSIGNED)}, inside a trace"
            )
        super().__setattr__(name, value)

    def get(self, path: str) -> Any:
        """What is at a dotted path from here, as nnsight's ``get``.

        Raises:
            UnknownSiteError: if nothing is.

        Example::

            model.get("layers.3.ssm.h.5")
        """
        if not isinstance(path, str) or not path:
            raise UnknownSiteError(f"get takes a dotted path such as 'layers.3.ssm.h.5', not {path!r}")
        return super().get(path)

    def _meant(self, name: str) -> bool:
        # On the model, and on an envoy of a class of the user's, other attributes may be their own.
        return bool(get_close_matches(name, self.ASSIGNED, cutoff=0.7))


def refuse_arithmetic(cls: type) -> type:
    """Have places of a class refuse arithmetic, as in ``layer.resid_post * 2``: a class decorator."""
    names = "add sub mul truediv matmul pow".split()

    def refuse(self: Any, *others: Any) -> Any:
        path = public_path(self.path)
        raise SiteValueError(f"{path} is a place, not a value: reckon with {path}.output, inside a trace")

    for name in (*names, *(f"i{name}" for name in names), *(f"r{name}" for name in names), "neg"):
        setattr(cls, f"__{name}__", refuse)
    return cls


def not_a_value(path: str, value: str | None = None) -> SiteValueError:
    """The error for an assignment to a place instead of to its ``value``."""
    return SiteValueError(
        f"{path} is a place, not a value: assign to {value or path + '.output'}, inside a trace"
    )


def no_such_value(envoy: Envoy, name: str) -> UnknownSiteError:
    """The error for an attribute that the envoy of a site or of an inner module does not have."""
    path, known = public_path(envoy.path), ["output", "input", "inputs", "skip", "source"]
    hint = f"; its value has one: {path}.output.{name}" if hasattr(Tensor, name) else nearest(name, known)
    return UnknownSiteError(
        f"{path} has no {name!r}{hint.rstrip('?')}. It has {', '.join('.' + one for one in known)}"
    )


def unknown(envoy: Envoy, name: str) -> UnknownSiteError:
    """The error for an attribute that an envoy does not have, naming what it does have."""
    known = [site.name for site in SITES] + list(NATIVE_MODULES) + ["layers", "ssm"]
    here = [child for child in known if child in envoy.__dict__ or child in envoy._child_map]
    return UnknownSiteError(
        f"{public_path(envoy.path)} has no {name!r}{lacked(f'{name}.') or nearest(name, here or known)}. "
        f"It has: {', '.join(here)}"
    )
