"""Attributes that an envoy does not have: the error for reading one, and for an assignment without meaning.

``ssm.y = value`` would hide the site and change nothing in the run, and Python would keep ``ssm.y.outptu =
value`` without anybody ever looking at it. Both are refused here, with the name that was probably meant.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import Tensor, nn

from ..errors import SiteValueError, UnknownSiteError
from ..names import NATIVE_MODULES, lacked, nearest, of_another_family, public_path
from ..names.modules import BASES, OF_LAYER
from ..sites import BY_MODULE, BY_NAME, SITES
from .envoy_map import EnvoyMap

#: Names of places: a user reads values there, and never assigns to the name itself.
PLACES = {*BY_NAME, *NATIVE_MODULES, *OF_LAYER, "layers"}

#: What nnsight looks for at every envoy of a tree to give it another name: the error needs no suggestion.
LOOKED_FOR = {*BASES, "mixer", "mamba"}


class Guarded(Envoy):
    """An envoy that knows which names it has: the model's own envoy, and every envoy below it."""

    #: The names to which a value is assigned.
    ASSIGNED = ("output", "input", "inputs")

    @property
    def _public_path(self) -> str:
        path, scope = public_path(self.path), getattr(self._module, "scope", None)
        if scope in ("attn", "moe", "mlp") and path.endswith(".ssm"):  # Nemotron-H has one name for all of them
            return path.removesuffix("ssm") + scope
        return path

    def _resolve_envoy_class(self, module: nn.Module, path: str) -> type[Envoy]:
        envoys: Any = self._envoys
        if isinstance(envoys, EnvoyMap):
            return envoys.choose(self._rename, module, path)
        return super()._resolve_envoy_class(module, path)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            if name in LOOKED_FOR:
                raise UnknownSiteError(f"{self._public_path} has no {name!r}") from None
            raise self._lacks(name) from None

    def _lacks(self, name: str) -> Exception:
        # The error for an attribute that this envoy does not have.
        known = [site.name for site in SITES] + list(NATIVE_MODULES) + ["layers", "ssm"]
        here = [child for child in known if self._has(child)]
        hint = sentence(lacked(f"{name}.") or of_another_family(name) or nearest(name, here or known))
        return UnknownSiteError(f"{self._public_path} has no {name!r}{hint} It has: {', '.join(here)}")

    def _has(self, name: str) -> bool:
        # Whether this envoy has a site or an inner module of this name. A mixer's own modules have other names.
        site = BY_NAME.get(name)
        of_mixer = getattr(self._module, "scope", None) == "mixer"
        module = site.module if of_mixer and site is not None and site.module in BY_MODULE else name
        return module in self.__dict__ or module in self._child_map

    def __setattr__(self, name: str, value: Any) -> None:
        being_made = "_child_map" not in self.__dict__
        if isinstance(value, (nn.Module, Envoy)) or name.startswith("_") or being_made:
            super().__setattr__(name, value)
            return
        only_in_hybrids = name in BY_NAME and bool(BY_NAME[name].part) and not self._has(name)
        if name in PLACES and not only_in_hybrids:
            raise not_a_value(f"{self._public_path}.{name}".removeprefix("model."))
        if name not in self.__dict__ and not hasattr(type(self), name) and self._meant(name):
            raise UnknownSiteError(
                f"{self._public_path} has no {name!r} to assign to"
                f"{sentence(nearest(name, list(self.ASSIGNED)))} A value is assigned to "
                f"{' or '.join('.' + key for key in self.ASSIGNED)}, inside a trace"
            )
        super().__setattr__(name, value)

    def _meant(self, name: str) -> bool:
        # Whether an unknown name probably means one in ASSIGNED; others may be the user's own attributes.
        return bool(get_close_matches(name, self.ASSIGNED, cutoff=0.7))

    def get(self, path: str) -> Any:
        """What is at a dotted path below this envoy, as nnsight's ``get``.

        Raises:
            UnknownSiteError: if nothing is.

        Example::

            model.get("layers.3.ssm.h.5")
        """
        if not isinstance(path, str) or not path:
            raise UnknownSiteError(f"get takes a dotted path such as 'layers.3.ssm.h.5', not {path!r}")
        try:
            return super().get(path)
        except UnknownSiteError:
            raise
        except AttributeError as error:
            raise UnknownSiteError(
                f"nothing is at {path!r}: get takes a dotted path such as 'layers.3.ssm.h.5'; for a hook name write "
                f"model.hook({path!r})"
            ) from error


class NoNumber(Guarded):
    """An envoy that users may take for its value: it refuses arithmetic, comparisons and PyTorch's functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse a call of PyTorch with an envoy among its arguments, which PyTorch passes on to here."""
        given: list[Any] = [*args, *(kwargs or {}).values()]
        given += [item for several in given if isinstance(several, (list, tuple)) for item in several]
        place = next((item._public_path for item in given if isinstance(item, NoNumber)), "an envoy")
        raise not_a_value(place, f"give {getattr(func, '__name__', 'the function')}(...) {place}.output")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise not_a_value(self._public_path, f"make an array of {self._public_path}.output")


class NotAValue(NoNumber):
    """An envoy that stands for nothing but its value: it refuses indexing and loops, too."""

    def __len__(self) -> int:
        raise not_a_value(self._public_path, f"ask for the length of {self._public_path}.output")

    def __iter__(self) -> Any:
        raise not_a_value(self._public_path, f"loop over {self._public_path}.output")

    def __getitem__(self, key: Any) -> Any:
        raise not_a_value(self._public_path, f"index its value, {self._public_path}.output[{key!r}]")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"{self._public_path}[{key!r}]", f"assign to {self._public_path}.output[{key!r}]")


def _refuse_arithmetic(self: NoNumber, *others: Any) -> Any:
    raise not_a_value(self._public_path, f"compute with {self._public_path}.output")


for _name in "add sub mul truediv floordiv mod matmul pow and or xor".split():
    for _operator in (_name, f"i{_name}", f"r{_name}"):
        setattr(NoNumber, f"__{_operator}__", _refuse_arithmetic)
for _operator in "neg abs invert lt le gt ge float int index complex".split():
    setattr(NoNumber, f"__{_operator}__", _refuse_arithmetic)


def not_a_value(path: str, instead: str | None = None) -> SiteValueError:
    """The error for using a place as if it were its value; what to do ``instead`` is by default to assign."""
    instead = instead or f"assign to {path}.output"
    return SiteValueError(f"{path} is a place, not a value: {instead}, inside a trace")


def no_such_value(envoy: Envoy, name: str) -> UnknownSiteError:
    """The error for an attribute that the envoy of a site or of an inner module does not have."""
    path, known = public_path(envoy.path), ["output", "input", "inputs", "skip", "source"]
    hint = f"; its value has one: {path}.output.{name}" if hasattr(Tensor, name) else nearest(name, known)
    return UnknownSiteError(f"{path} has no {name!r}{sentence(hint)} It has {', '.join('.' + key for key in known)}")


def sentence(text: str) -> str:
    """A text with the mark that ends it: a question has its own, everything else gets a full stop."""
    return text if text.endswith("?") else f"{text}."
