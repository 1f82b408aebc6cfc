"""Hooks as TransformerLens has them: which function runs at which place, and how it is called.

A hook is a pair of a name and a function. The name is a hook name, a path, or a predicate over hook names.
Before anything is computed, `resolve` turns names into places of the model and `Extent` says whether the run
gets there, so a hook that could never fire is an error instead of silently doing nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import names
from ..errors import LayerError, UnknownSiteError
from ..names import Place
from ..sites import SITES, STATE, Layout
from ..tracing.visit import position_error

#: A name, or a predicate over hook names.
NameOrFilter = str | Callable[[str], bool]
#: ``fn(value, hook)``.
HookFunction = Callable[..., Any]
#: The attributes with which TransformerLens's models keep hooks.
KEEPING_HOOKS = frozenset(
    "hooks hook_dict hook_points add_hook add_perma_hook add_caching_hooks get_caching_hooks cache_all "
    "cache_some check_and_add_hook remove_all_hook_fns".split()
)
#: Where a place stands in a run: the number of the layer among those that run, the site, the position.
Order = tuple[int, float, int]
#: The first site of a layer: a model's own site comes before all layers or after them.
_FIRST_INNER = next(site.index for site in SITES if site.scope != "model")


@dataclass
class Hook:
    """What a hook function is told about its place: the second argument of ``fn(value, hook)``.

    Attributes:
        name: the hook name, e.g. ``"blocks.3.hook_h.5"``; the path if the place has no hook name.
        path: the same place under the model, e.g. ``"layers[3].ssm.h[5]"``.
        ctx: a dict that the forward and backward functions of this name share; new in every run.
    """

    name: str
    path: str
    ctx: dict[Any, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """The index of the layer. Raises `LayerError` for a place outside of the layers."""
        layer = names.parse(self.path).layer
        if layer is None:
            raise LayerError(f"{self.name} is a place of the whole model and belongs to no layer")
        return layer


@dataclass(frozen=True)
class Extent:
    """Which part of the model a run goes through.

    Attributes:
        n_layers: how many layers the model has.
        start: the layer that the input, a residual stream, goes into; ``None`` for tokens.
        stop: the layer before which the run ends; ``None`` to run to the logits.
        only: the layers that are computed, in this order and perhaps more than once; ``None`` for all, in the
            model's own order.
    """

    n_layers: int
    start: int | None = None
    stop: int | None = None
    only: tuple[int, ...] | None = None

    @classmethod
    def of(cls, n_layers: int, start: int | None, stop: int | None, only: Sequence[int] | None) -> Extent:
        """From a user's arguments, whose negative layers count from the end. Raises `LayerError`."""

        def index(argument: str, layer: Any, last: int) -> int:
            allowed = range(-n_layers, last + 1)
            return names.layer_index(layer, n_layers, f"{argument}={layer!r}", allowed)

        if not isinstance(only, Iterable | None):
            raise LayerError(f"only_use_these_layers={only!r}: it takes a list of layers")
        start = None if start is None else index("start_at_layer", start, n_layers - 1)
        stop = None if stop is None else index("stop_at_layer", stop, n_layers)
        if only is not None:
            only = tuple(index("only_use_these_layers", layer, n_layers - 1) for layer in only)
        if start is not None and stop is not None and stop < start:
            raise LayerError(f"start_at_layer={start} comes after stop_at_layer={stop}")
        return cls(n_layers, start, stop, only)

    @functools.cached_property
    def layers(self) -> list[int]:
        """The layers that the run goes through, in order: the layers of ``only`` that are in its range."""
        inside = range(self.start or 0, self.n_layers if self.stop is None else self.stop)
        return [layer for layer in (inside if self.only is None else self.only) if layer in inside]

    @functools.cached_property
    def visits(self) -> dict[int, list[int]]:
        """Of each layer that the run goes through, where it stands in `layers`, perhaps several times."""
        visits: dict[int, list[int]] = {}
        for number, layer in enumerate(self.layers):
            visits.setdefault(layer, []).append(number)
        return visits

    def reaches(self, place: Place) -> bool:
        """Whether the run computes the value at a place."""
        if place.layer is not None:
            return place.layer in self.visits
        assert place.site is not None
        return self.start is None if place.index() < _FIRST_INNER else self.stop is None

    def orders_of(self, place: Place, layout: Layout) -> list[Order]:
        """Where a place of a model stands in the run, once for each time that the run comes to it.

        The whole trajectory comes after its positions.
        """
        if place.layer is None:
            numbers = [-1 if place.index() < _FIRST_INNER else len(self.layers)]
        else:
            numbers = self.visits.get(place.layer, [])
        return [(number, place.index(layout), place.position or 0) for number in numbers]

    def __str__(self) -> str:
        only = None if self.only is None else list(self.only)
        given = {"start_at_layer": self.start, "stop_at_layer": self.stop, "only_use_these_layers": only}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def none_kept(name: str) -> UnknownSiteError:
    """The error for one of `KEEPING_HOOKS`."""
    return UnknownSiteError(
        f"model has no {name!r}: hooks are not kept on a model, they are given to a run and end with it. "
        f"Write model.run_with_hooks(input, fwd_hooks=[(name, fn)]); `mamba-trace port script.py` says what "
        f"each hook of a script becomes, model.hook_names(n_positions) lists the names, and "
        f"`with model.edit(inplace=True):` is for changes that stay"
    )


# -- names to places ---------------------------------------------------------------------------------------


def key_of(place: Place) -> str:
    """The name of a place in a cache and for a hook: its hook name, or its path if it has none."""
    return place.path if place.site is None or place.whole_trajectory else place.hook_name


def check_name(model: Any, name: NameOrFilter, extent: Extent) -> None:
    """Refuse a name without a place in this run, as far as that can be told without the prompt's length.

    Raises:
        UnknownSiteError: if the model has no such place.
        LayerError: if the model has no such layer, or the run does not reach the place.
        TypeError: if it is neither a string nor a predicate.
    """
    if callable(name):
        return
    if not isinstance(name, str):
        raise TypeError(f"a hook is named by a string or by a predicate over hook names, not by {name!r}")
    if not extent.reaches(model._place(name)):
        raise LayerError(f"{name!r} is never reached with {extent}")


def resolve(
    name: NameOrFilter, known: Callable[[], dict[str, Place]], length: int, place_of: Callable[[str], Place]
) -> list[Place]:
    """The place of a name, or the places whose hook names a predicate accepts.

    Args:
        name: checked by `check_name`.
        known: the places that the run reaches, by hook name, in execution order.
        length: the number of positions; negative positions are counted from it.
        place_of: gives the place of the model that a name means.

    Raises:
        PositionError: if the prompt is too short for the position.
    """
    if callable(name):
        return [place for hook_name, place in known().items() if name(hook_name)]
    place = place_of(name)
    if place.position is None:
        return [place]
    if not -length <= place.position < length:
        raise position_error(name, length)
    return [dataclasses.replace(place, position=place.position % length)]


# -- functions ---------------------------------------------------------------------------------------------


def checked_hooks(model: Any, hooks: Any, extent: Extent, argument: str) -> list[tuple[Any, HookFunction]]:
    """A user's list of hooks, with functions that are called as ``fn(value, hook)``.

    Raises:
        TypeError: if it is not a list of pairs, or a function cannot be called like that.
        UnknownSiteError, LayerError: as `check_name`.
    """
    checked = []
    if not isinstance(hooks, Iterable):
        raise TypeError(f"{argument} takes a list of pairs (name or predicate, fn), not {hooks!r}")
    for pair in hooks:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{argument} takes pairs (name or predicate, fn), not {pair!r}")
        name, fn = pair
        check_name(model, name, extent)
        path = names.parse(name, model.architecture.family).path if isinstance(name, str) else ""
        if "hook" in str(name) and path.endswith(f".ssm.{STATE}"):
            raise UnknownSiteError(
                f"{name!r} is no hook: there is one for each position, {name}.p. For all of them give a "
                f"predicate, lambda name: name.startswith({name + '.'!r}); the whole trajectory, whose edits "
                f"are not carried on, is {path!r}"
            )
        checked.append((name, callable_by_position(fn, argument)))
    return checked


def callable_by_position(fn: Any, argument: str) -> HookFunction:
    """``fn`` as a function of (value, hook). TransformerLens passes the second by name, so both ways work.

    Raises:
        TypeError: if it can be called in neither way.
    """
    if not callable(fn):
        raise TypeError(f"{argument} takes functions fn(value, hook), not {fn!r}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin
        return fn
    for args, kwargs in (((None,), {"hook": None}), ((None, None), {})):
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        return (lambda value, hook: fn(value, hook=hook)) if kwargs else fn
    raise TypeError(f"{argument}: {fn!r} cannot be called as fn(value, hook); its signature is {signature}")
