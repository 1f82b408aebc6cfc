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
from collections.abc import Iterator
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor

from ..errors import LayerError, PositionError, SiteValueError, UnknownSiteError
from ..names import NATIVE_MODULES, public_path
from ..sites import BY_NAME, STATE, Site, in_scope
from . import assigned, current_value, expect, expect_position, keep_apart
from .attributes import Guarded, no_such_value, not_a_value, refuse_arithmetic, unknown
from .fitting import fit, fit_input, skip
from .one_run import only_run
from .tracer import PlaceTracer
from .worker import length_of_call


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


class Part(Guarded):
    """An envoy of this package below the model's."""

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's ``trace`` of this module alone.

        Raises:
            TraceError: inside another trace of the model. One in another thread is waited for.
        """
        if kwargs.get("trace", True):
            kwargs.setdefault("tracer_cls", PlaceTracer)
            return super().trace(*inputs, **kwargs)
        with only_run(self, "trace(..., trace=False) was called"):
            return super().trace(*inputs, **kwargs)

    def _meant(self, name: str) -> bool:
        return type(self).__module__ == __name__ or super()._meant(name)


class Located(Part):
    """An envoy whose output is guarded: blocks and mixers, and every site."""

    @property
    def _axes(self) -> str:
        return ""  # the axis letters of the value, where they are known

    def _expect(self) -> None:
        expect(f"{self.path}.output")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module that is here by now on an input of the caller's: nnsight's ``Envoy.__call__``."""
        if not self.interleaver.interleaving:
            getattr(self.root, "_follow", lambda: None)()
        return super().__call__(*args, **kwargs)

    def skip(self, replacement: Any) -> None:
        """nnsight's ``Envoy.skip``: the module is not run, and ``replacement`` is its output.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is no floating tensor with a row for each of the module's
                input.
        """
        skip(self, replacement, "")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise no_such_value(self, name) from error

    @SiteValue
    def output(self, value: Any) -> Any:
        """The value here: read it, assign to it, or edit it in place, inside a trace."""
        return keep_apart(f"{self.path}.output", value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        path, current = public_path(self.path), current_value(f"{self.path}.output")
        if isinstance(current, Tensor):
            return fit(path, self._axes, value, current)
        if not isinstance(value, type(current)):
            raise SiteValueError(
                f"{path}.output takes a {type(current).__name__}, not a {type(value).__name__}"
            )
        return value

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

    @inputs.postprocess  # type: ignore[no-redef]
    def inputs(self, value: Any) -> Any:
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        if (
            not pair
            or not isinstance(value[0], (tuple, list))
            or not isinstance(value[1], dict)
            or not any(value)
        ):
            path = public_path(self.path)
            raise SiteValueError(
                f"{path}.inputs takes all inputs as (args, kwargs), a tuple and a dictionary, not a "
                f"{type(value).__name__}; assign the first alone to {path}.input"
            )
        args, kwargs = current_value(f"{self.path}.input")
        first = fit_input(public_path(self.path), first_input(*value), first_input(args, kwargs))
        return replace_first_input(tuple(value[0]), value[1], first)

    @input.postprocess  # type: ignore[no-redef]
    def input(self, value: Any) -> Any:
        args, kwargs = current_value(f"{self.path}.input")
        value = fit_input(public_path(self.path), value, first_input(args, kwargs))
        return replace_first_input(args, kwargs, value)


@refuse_arithmetic
class SiteEnvoy(Located):
    """The envoy of one site."""

    @property
    def site(self) -> Site:
        """The row of the site table."""
        return BY_NAME[self.path.rsplit(".", 1)[-1]]

    @property
    def _axes(self) -> str:
        return self.site.axes

    def __getattr__(self, name: str) -> Any:
        if name == "shape":  # the module's, which says the sizes of the axes in words
            raise no_such_value(self, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        path = public_path(self.path)
        raise SiteValueError(
            f"{path} is a place, not a value: ask for the length of {path}.output, inside a trace"
        )

    def __iter__(self) -> Any:
        path = public_path(self.path)
        raise SiteValueError(f"{path} is a place, not a value: loop over {path}.output, inside a trace")

    def __getitem__(self, key: Any) -> Any:
        path = public_path(self.path)
        raise SiteValueError(f"{path} is a place, not a value: index its value, {path}.output[{key!r}]")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"{public_path(self.path)}[{key!r}]", f"{public_path(self.path)}.output[{key!r}]")

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
        path = public_path(self.path)
        if isinstance(position, (slice, tuple, list)):
            raise PositionError(
                f"{path}[{position!r}]: one position at a time, h[5] or h[-1]; "
                f"for several write a loop in ascending order, for all of them use "
                f"{path}.output [B,L,E,N]"
            )
        try:
            return PositionEnvoy(self, operator.index(_no_bool(position)))
        except TypeError:
            raise PositionError(
                f"{path}[{position!r}]: a position is an integer, {path}[5], or {path}[-1] from the end, "
                f"not a {type(position).__name__}"
            ) from None

    def __len__(self) -> int:
        """The number of positions of this forward call, inside a trace.

        In a later step of ``tracer.iter`` the block waits for the first state of that step to know.

        Raises:
            SiteOrderError: if the run has gone past that.
            SiteValueError: where the run is in another process.
        """
        return length_of_call(self)

    def __iter__(self) -> Iterator[PositionEnvoy]:
        """The places of all states of this forward call, in order: ``for h in model.layers[3].ssm.h:``."""
        return (PositionEnvoy(self, position) for position in range(len(self)))

    def __setitem__(self, position: Any, value: Any) -> None:
        raise not_a_value(f"{public_path(self.path)}[{position!r}]")

    def __getattr__(self, name: str) -> Any:
        if re.fullmatch(r"-?\d+", name):  # model.get("layers.3.ssm.h.5")
            return self[int(name)]
        return super().__getattr__(name)


@refuse_arithmetic
class PositionEnvoy(Guarded):
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

    @property
    def source(self) -> Any:
        """Not offered: there is no module at a position."""
        raise self._lacks("source")

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: there is no module at a position."""
        raise self._lacks("trace")

    def edit(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: ``model.edit`` holds edits of every place."""
        raise self._lacks("edit")

    def __getattr__(self, name: str) -> Any:
        raise self._lacks(name)

    def __iter__(self) -> Any:
        raise SiteValueError(
            f"{public_path(self.path)} is a place, not a value: loop over its .output [B,E,N]"
        )

    def __getitem__(self, key: Any) -> Any:
        path = public_path(self.path)
        raise SiteValueError(f"{path} is a place, not a value: index its value, {path}.output[{key!r}]")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"{public_path(self.path)}[{key!r}]", f"{public_path(self.path)}.output[{key!r}]")

    def _lacks(self, name: str) -> UnknownSiteError:
        return UnknownSiteError(f"{public_path(self.path)} has no {name!r}; it has .output")

    def _meant(self, name: str) -> bool:
        return name not in ("position",)

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

    def __getattr__(self, name: str) -> Any:
        try:
            return Envoy.__getattr__(self, name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise unknown(self, name) from error


class LayersEnvoy(Part):
    """The envoy of the list of blocks."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise UnknownSiteError(
                f"{public_path(self.path)} has no {name!r}: it has the layers [0] to [{len(self) - 1}]"
            ) from error

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return super().__getitem__(key)
        last = len(self) - 1
        try:
            index = operator.index(_no_bool(key))
        except TypeError:
            index = None
        if index is None or not -len(self) <= index <= last:
            raise LayerError(
                f"layers[{key!r}]: this model has layers 0 to {last}"
                + ("" if index is not None else ", named by an integer, -1 for the last, or a slice")
            )
        return super().__getitem__(index)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"layers[{key}]")


class BlockEnvoy(Suggesting):
    """The envoy of a block."""

    @property
    def _axes(self) -> str:
        return "BLD"

    def skip(self, replacement: Any) -> None:
        """Skip the block, with ``replacement`` [B,L,D] as its output: nnsight's ``Envoy.skip``.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is no floating tensor of the block's shape.
        """
        skip(self, replacement)


class MixerEnvoy(Suggesting):
    """The envoy of a mixer."""

    @property
    def _axes(self) -> str:
        return "BLD"


def _no_bool(key: Any) -> Any:
    # `key`, or what is no index where it is true or false, which Python takes for 1 or 0.
    return None if isinstance(key, bool) or str(getattr(key, "dtype", "")).endswith("bool") else key


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


__all__ = [
    "BlockEnvoy",
    "MixerEnvoy",
    "PositionEnvoy",
    "SiteEnvoy",
    "SkipEnvoy",
    "StateEnvoy",
    "envoy_classes",
]
