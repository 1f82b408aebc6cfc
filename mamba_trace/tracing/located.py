"""An envoy's values: what reading ``.output`` and ``.input`` and assigning to them does, inside a trace."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor, nn

from ..errors import SiteValueError
from .apart import keep_apart
from .attributes import Guarded, NoNumber, no_such_value
from .fitting import fit, fit_input, skip
from .one_run import only_run
from .saving import assigned
from .served import still_there
from .tracer import PlaceTracer
from .worker import expect, worker_at


class Value(eproperty):
    """A value that is served inside a trace, an assignment to which never changes what was saved."""

    def __set__(self, obj: Any, value: Any) -> None:
        super().__set__(obj, value)
        assigned(self._location(obj))


class InputValue(Value):
    """The ``input`` of a place, or its ``inputs``."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is not None:
            worker_at(f"{obj._public_path}.{self.name}")
        return super().__get__(obj, owner)


class SiteValue(Value):
    """The ``output`` of a place: it is refused at once if the run has gone past it."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is None:
            return self
        if (served := still_there(f"{obj.path}.output")) is not None:
            return served.value
        obj._expect()
        return super().__get__(obj, owner)

    def __set__(self, obj: Any, value: Any) -> None:
        obj._expect()
        super().__set__(obj, value)


class Traced(Guarded):
    """An envoy whose module can be traced."""

    _tracer: type[PlaceTracer] = PlaceTracer

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's ``trace`` of this module alone.

        Raises:
            TraceError: inside another trace of the model. A trace in another thread is waited for.
        """
        if kwargs.get("trace", True):
            kwargs.setdefault("tracer_cls", self._tracer)
            return super().trace(*inputs, **kwargs)
        with only_run(self, f"{self._public_path}.trace(..., trace=False) was called"):
            return super().trace(*inputs, **kwargs)


class Part(Traced):
    """An envoy of this package below the model's own envoy."""

    #: Whether names may mean something below it though its module has nothing inside.
    names_below = False

    def __init__(
        self,
        module: nn.Module,
        path: str = "model",
        interleaver: Any = None,
        rename: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # nnsight tries all names at each envoy, which takes longer than all else. They name what is below it.
        tried = rename if module._modules or self.names_below else None
        super().__init__(module, path, interleaver, tried, *args, **kwargs)
        self._rename = rename

    def _meant(self, name: str) -> bool:
        # A user's class may have attributes of its own; the classes of this package have none to assign to.
        return type(self).__module__.startswith(f"{__package__}.") or super()._meant(name)


class Located(NoNumber, Part):
    """An envoy that has a value: a block, a mixer, a site, and the modules inside a mixer."""

    #: The axis letters of the value, and of the input as well if it has the same shape; "" if not known.
    _axes = ""
    _shared_axes = ""

    def _expect(self) -> None:
        expect(f"{self.path}.output")

    def _lacks(self, name: str) -> Exception:
        return no_such_value(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module that is here now on an input of the caller's: nnsight's ``Envoy.__call__``."""
        if not self.interleaver.interleaving:
            getattr(self.root, "_follow", lambda: None)()
        return super().__call__(*args, **kwargs)

    def skip(self, replacement: Any) -> None:
        """nnsight's ``Envoy.skip``: the module does not run, and ``replacement`` is its output.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is not a floating tensor: of shape [B,L,D] for a block or a
                mixer, with a row for each row of the module's input for any other module.
        """
        skip(self, replacement, self._shared_axes)

    @SiteValue
    def output(self, value: Any) -> Any:
        """The value here: read it, assign to it, or edit it in place, inside a trace.

        Raises:
            SiteOrderError: if the run has gone past this place.
            PositionError: if this is ``h[p]`` and the forward call has no such position.
            SiteValueError: if an assigned value is not a floating tensor of the same shape.
        """
        return keep_apart(f"{self.path}.output", value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        path, current = self._public_path, Mediator.value(f"{self.path}.output")
        if isinstance(current, Tensor):
            return fit(path, self._axes, value, current)
        if not isinstance(value, type(current)):
            raise SiteValueError(f"{path}.output takes a {type(current).__name__}, not a {type(value).__name__}")
        return value

    @InputValue
    def input(self, value: Any) -> Any:
        """The first input of the module: read it, assign to it, or edit it in place, inside a trace."""
        args, kwargs = value
        return keep_apart(
            f"{self.path}.input",
            first_input(args, kwargs),
            lambda tensor: replace_first_input(args, kwargs, tensor),
            lambda inputs: first_input(*inputs),
        )

    @InputValue(key="input")
    def inputs(self, value: Any) -> Any:
        """All the inputs of the module, as ``(args, kwargs)``; the first of them is `input`."""
        return replace_first_input(*value, Located.input._preprocess(self, value))

    @inputs.postprocess  # type: ignore[no-redef]
    def inputs(self, value: Any) -> Any:
        pair = isinstance(value, (tuple, list)) and len(value) == 2 and any(value)
        if not pair or not isinstance(value[0], (tuple, list)) or not isinstance(value[1], dict):
            path = self._public_path
            raise SiteValueError(
                f"{path}.inputs takes all inputs as (args, kwargs), a tuple and a dictionary, not a "
                f"{type(value).__name__}; assign the first alone to {path}.input"
            )
        args, kwargs = Mediator.value(f"{self.path}.input")
        first = fit_input(self._public_path, first_input(*value), first_input(args, kwargs))
        return replace_first_input(tuple(value[0]), value[1], first)

    @input.postprocess  # type: ignore[no-redef]
    def input(self, value: Any) -> Any:
        args, kwargs = Mediator.value(f"{self.path}.input")
        value = fit_input(self._public_path, value, first_input(args, kwargs))
        return replace_first_input(args, kwargs, value)


class FirstOfTuple(Located):
    """A place whose module may return a tuple, of which the first is the value and the rest goes on as it is."""

    _first_of_tuple = True

    @SiteValue
    def output(self, value: Any) -> Any:
        """The value here, as `Located.output`; of a tuple that the module returns it is the first."""
        if not isinstance(value, tuple):
            return keep_apart(f"{self.path}.output", value)
        rest = value[1:]
        return keep_apart(f"{self.path}.output", value[0], lambda first: (first, *rest), lambda whole: whole[0])

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Any) -> Any:
        current = Mediator.value(f"{self.path}.output")
        if not isinstance(current, tuple):
            return fit(self._public_path, self._axes, value, current)
        return (fit(self._public_path, self._axes, value, current[0]), *current[1:])

    def skip(self, replacement: Any) -> None:
        """As `Located.skip`, where the module may return a tuple."""
        returned = getattr(self._module, "returned", 0)
        skip(self, replacement, self._shared_axes, returned)
