"""The envoys: what ``model.layers[3].ssm.h[5]`` is, and what reading and assigning there does.

nnsight mirrors every module with an `Envoy`. A site's envoy adds three things to it: a request for a site
that the run has already gone past fails at the user's line, an assigned value is checked against the one it
replaces (and cast where that is harmless), and a saved value is never changed by a later edit in place.
`StateEnvoy` is the site with a place for each position; ``h[p]`` is a `PositionEnvoy`. `MixerEnvoy` makes
``ssm.skip`` both the gate site and the method it hides.
"""

from __future__ import annotations

import operator
import re
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor, nn

from .demand import assigned, current_value, expect, expect_position, keep_apart, skip_module
from .errors import LayerError, PositionError, SiteValueError, UnknownSiteError
from .names import NATIVE_MODULES, lacked, nearest, public_path
from .sites import BY_NAME, SITES, STATE, Site, describe_axes, in_scope

#: Names that a user reads values at and never assigns to.
PLACES = {*BY_NAME, *NATIVE_MODULES, "layers", "ssm"}


class Value(eproperty):
    """An `eproperty` of which saved values stay what they were."""

    def __set__(self, obj: Any, value: Any) -> None:
        super().__set__(obj, value)
        assigned(self._location(obj))


class SiteValue(Value):
    """The ``output`` of a site: it refuses what can no longer be served."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is None:
            return self
        obj._expect()
        return super().__get__(obj, owner)

    def __set__(self, obj: Any, value: Any) -> None:
        obj._expect()
        super().__set__(obj, value)


class Located(Envoy):
    """An envoy whose output is guarded: blocks and mixers, and every site."""

    def _expect(self) -> None:
        expect(f"{self.path}.output")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module that is here by now on an input of the caller's: nnsight's ``Envoy.__call__``."""
        if not self.interleaver.interleaving:
            getattr(self.root, "_follow", lambda: None)()
        return super().__call__(*args, **kwargs)

    @SiteValue
    def output(self, value: Any) -> Any:
        """The value here: read it, assign to it, or edit it in place, inside a trace."""
        return keep_apart(f"{self.path}.output", value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        return moved(public_path(self.path), value, current_value(f"{self.path}.output"))

    @Value
    def input(self, value: Any) -> Any:
        """The first input of the module: read it, assign to it, or edit it in place, inside a trace."""
        args, kwargs = value
        return keep_apart(
            f"{self.path}.input",
            first_input(args, kwargs),
            lambda tensor: replace_first_input(args, kwargs, tensor),
            lambda inputs: first_input(*inputs),
        )

    @Value(key="input")
    def inputs(self, value: Any) -> Any:
        """All the inputs of the module, as ``(args, kwargs)``; the first is `input`."""
        args, kwargs = value
        return replace_first_input(args, kwargs, Located.input._preprocess(self, value))

    @input.postprocess  # type: ignore[no-redef]
    def input(self, value: Any) -> Any:
        args, kwargs = current_value(f"{self.path}.input")
        value = moved(f"the input of {public_path(self.path)}", value, first_input(args, kwargs))
        return replace_first_input(args, kwargs, value)


class SiteEnvoy(Located):
    """The envoy of one site."""

    @property
    def site(self) -> Site:
        """The row of the site table."""
        return BY_NAME[self.path.rsplit(".", 1)[-1]]

    @property
    def _axes(self) -> str:
        return self.site.axes

    @SiteValue
    def output(self, value: Any) -> Any:
        """The value of the site: read it, assign to it, or edit it in place, inside a trace.

        Raises:
            SiteOrderError: if the run has gone past this site.
            SiteValueError: if an assigned value is no tensor, or has another shape or an integer dtype.
        """
        return keep_apart(f"{self.path}.output", value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        return fit(public_path(self.path), self._axes, value, current_value(f"{self.path}.output"))


class StateEnvoy(SiteEnvoy):
    """The site with positions: ``h`` is the whole trajectory, ``h[p]`` the state carried after token p."""

    def __getitem__(self, position: Any) -> PositionEnvoy:
        """The place of the state after token ``position`` of this forward call; negative counts from the end.

        Args:
            position: an integer.

        Example::

            with model.trace(prompt):
                model.layers[3].ssm.h[5].output[:] = 0
        """
        if isinstance(position, (slice, tuple, list)):
            raise PositionError(
                f"{public_path(self.path)}[{position!r}]: one position at a time, h[5] or h[-1]; "
                f"for several write a loop in ascending order, for all of them use "
                f"{public_path(self.path)}.output [B,L,E,N]"
            )
        return PositionEnvoy(self, operator.index(position))

    def __setitem__(self, position: Any, value: Any) -> None:
        raise not_a_value(f"{public_path(self.path)}[{position}]")

    def __getattr__(self, name: str) -> Any:
        if re.fullmatch(r"-?\d+", name):  # model.get("layers.3.ssm.h.5")
            return self[int(name)]
        return super().__getattr__(name)


class PositionEnvoy(Envoy):
    """``h[p]``: the state [B,E,N] carried after token p.

    It has a location of its own and no module. Only `output` is served.
    """

    def __init__(self, state: StateEnvoy, position: int) -> None:
        # Not Envoy.__init__, which would install a controller and register this as the envoy of the module.
        self._parent = None
        self._site, self.position = state, position
        self._edits: list[Any] = []
        self._children: list[Envoy] = []
        self._child_map: dict[str, Envoy] = {}
        self._aliases: dict[str, str] = {}

    @property
    def path(self) -> str:
        return f"{self._site.path}.{self.position}"

    @property
    def interleaver(self) -> Any:
        return self._site.interleaver

    @property
    def _module(self) -> Any:
        return self._site._module

    def _expect(self) -> None:
        expect_position(self._site, self.position)

    @SiteValue
    def output(self, value: Any) -> Any:
        """The state [B,E,N] after this token: an edit changes y here and everything after it.

        Raises:
            PositionError: if the forward call has no such position.
            SiteOrderError: if the run has gone past it.
            SiteValueError: if an assigned value is no tensor, or has another shape or an integer dtype.
        """
        return keep_apart(f"{self.path}.output", value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        return fit(public_path(self.path), "BEN", value, current_value(f"{self.path}.output"))

    @property
    def input(self) -> Any:
        """Not served: the state before token p is ``h[p - 1].output``, or ``h_start.output``."""
        raise SiteValueError(
            f"{public_path(self.path)} has no input; read h[p - 1].output, or h_start.output"
        )

    inputs = input

    def skip(self, replacement: Any) -> None:
        """Not offered: assign to ``output``."""
        raise SiteValueError(f"{public_path(self.path)} cannot be skipped; assign to its output")

    def __getattr__(self, name: str) -> Any:
        raise UnknownSiteError(f"{public_path(self.path)} has no {name!r}; it has .output")

    def __reduce__(self) -> Any:
        return operator.getitem, (self._site, self.position)

    def __repr__(self) -> str:
        return f"{public_path(self.path)}: state [B,E,N] after token {self.position}"


class SkipEnvoy(SiteEnvoy):
    """``ssm.skip``: the gate site, and when called, the method of the mixer that it hides."""

    def __call__(self, replacement: Any, **kwargs: Any) -> None:
        """Skip the mixer, with ``replacement`` [B,L,D] as its output: nnsight's ``Envoy.skip``.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is no floating tensor of the mixer's shape.
        """
        skip(self.parent, replacement)


class Suggesting(Located):
    """An envoy with sites below it: it suggests the nearest name for an unknown one, and is not a value."""

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_value(self, name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise unknown(self, name) from error


class LayersEnvoy(Envoy):
    """The envoy of the list of blocks."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and not -len(self) <= key < len(self):
            raise LayerError(f"layers[{key}]: this model has layers 0 to {len(self) - 1}")
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"layers[{key}]")


class BlockEnvoy(Suggesting):
    """The envoy of a block."""

    def skip(self, replacement: Any) -> None:
        """Skip the block, with ``replacement`` [B,L,D] as its output: nnsight's ``Envoy.skip``.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is no floating tensor of the block's shape.
        """
        skip(self, replacement)


class MixerEnvoy(Suggesting):
    """The envoy of a mixer."""


def refuse_value(envoy: Envoy, name: str, value: Any) -> None:
    """Refuse ``ssm.y = value``, which would hide the site and change nothing in the run."""
    if name in PLACES and not isinstance(value, (nn.Module, Envoy)):
        raise not_a_value(f"{public_path(envoy.path)}.{name}".removeprefix("model."))


def not_a_value(path: str) -> SiteValueError:
    """The error for an assignment to a place instead of to its value."""
    return SiteValueError(f"{path} is a place, not a value: assign to {path}.output, inside a trace")


def unknown(envoy: Envoy, name: str) -> UnknownSiteError:
    """The error for an attribute that an envoy does not have, naming what it does have."""
    known = [site.name for site in SITES] + list(NATIVE_MODULES) + ["layers", "ssm"]
    here = [child for child in known if child in envoy.__dict__ or child in envoy._child_map]
    return UnknownSiteError(
        f"{public_path(envoy.path)} has no {name!r}{lacked(f'{name}.') or nearest(name, here or known)}. "
        f"It has: {', '.join(here)}"
    )


def envoy_classes() -> dict[str, type[Envoy]]:
    """nnsight's ``envoys=`` map, read off the site table: path suffix -> envoy class."""
    special = {STATE: StateEnvoy, "skip": SkipEnvoy}
    prefixes = {"model": "", "block": "layers.*.", "mixer": "mixer."}
    classes: dict[str, type[Envoy]] = {
        prefixes[site.scope] + site.module_name: special.get(site.name, SiteEnvoy)
        for scope in prefixes
        for site in in_scope(scope)  # type: ignore[arg-type]
    }
    native: dict[str, type[Envoy]] = {f"mixer.{name}": Located for name in NATIVE_MODULES}
    native |= {"backbone": Located, "backbone.layers": LayersEnvoy}
    return {**classes, **native, "layers.*": BlockEnvoy, "layers.*.mixer": MixerEnvoy}


def skip(envoy: Envoy, replacement: Any) -> None:
    """Skip a block or a mixer, whose output has the shape of its input."""

    def fitted(current: Tensor) -> Tensor:
        found: Any = type(replacement).__name__
        if isinstance(replacement, Tensor):
            if replacement.shape == current.shape and replacement.is_floating_point():
                return moved(public_path(envoy.path), replacement, current)
            found = f"{tuple(replacement.shape)} of {replacement.dtype}"
        path = public_path(envoy.path)
        raise SiteValueError(
            f"{path}.skip(...) takes what stands for the output of {path}, a floating tensor of shape "
            f"{tuple(current.shape)} {describe_axes('BLD')}, not {found}"
        )

    skip_module(envoy, fitted)


def fit(path: str, axes: str, value: Any, current: Any) -> Tensor:
    """An assigned value, checked against the one it replaces and cast to its dtype and device.

    Args:
        path: the site, for messages.
        axes: its axis letters.
        value: what the user assigned.
        current: what the run has there.

    Raises:
        SiteValueError: if ``value`` is no tensor, has another shape, or is not floating while ``current`` is.
    """
    if not isinstance(value, Tensor):
        raise SiteValueError(
            f"{path} takes a tensor of shape {tuple(current.shape)} {describe_axes(axes)}, not a "
            f"{type(value).__name__}. To fill it with a number, write {path}.output[:] = ..."
        )
    if value.shape != current.shape:
        raise SiteValueError(
            f"{path} takes shape {tuple(current.shape)} {describe_axes(axes)}, not {tuple(value.shape)}. "
            f"To replace a part of it, assign to a slice: {path}.output[:, ...] = ..."
        )
    if not value.is_floating_point():
        raise SiteValueError(
            f"{path} takes a floating tensor such as {current.dtype}, not {value.dtype}: use .float()"
        )
    # A copy: the run's value may be edited in place later, and this tensor is the user's own.
    return moved(path, value, current).to(dtype=current.dtype, copy=True)


def moved(path: str, value: Any, current: Any) -> Any:
    """An assigned value on the device of the one it replaces.

    Args:
        path: the place, for messages.
        value: what the user assigned; what is no tensor is left to the model.
        current: what the run has there.

    Raises:
        SiteValueError: for a tensor that holds no numbers.
    """
    if not (isinstance(value, Tensor) and isinstance(current, Tensor)) or value.device == current.device:
        return value
    if value.is_meta:
        raise SiteValueError(
            f"{path} was given a tensor on the meta device, which holds no numbers; in this run it is on "
            f"{current.device}"
        )
    return value.to(current.device)


__all__ = [
    "BlockEnvoy",
    "MixerEnvoy",
    "PositionEnvoy",
    "SiteEnvoy",
    "SkipEnvoy",
    "StateEnvoy",
    "envoy_classes",
]
