"""One run with hooks and a cache, as a worker inside an ordinary trace.

There is no second mechanism: a `HookedRun` asks a trace for the places it needs, in execution order, so what
a layer computes is decided by demand as in every trace, and a run that caches residual streams keeps all its
kernels. Before the model computes anything it looks at the model's inputs, and so knows the prompt's length
and which places there are; whatever cannot be served is refused there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import names
from .errors import PromptError, SiteValueError, UnknownSiteError
from .hooks import Extent, Hook, HookFunction, NameOrFilter, Order, key_of, order_of, resolve
from .names import Place
from .sites import BY_NAME, STATE


@dataclass
class Visit:
    """What happens at one place.

    Attributes:
        place: where.
        fwd, bwd: functions of (value, hook) and (gradient, hook), in the order they were given.
        cached: keep the value.
        named: somebody named this very place, and did not just take all that there are.
    """

    place: Place
    fwd: list[HookFunction] = field(default_factory=list)
    bwd: list[HookFunction] = field(default_factory=list)
    cached: bool = False
    named: bool = False


@dataclass
class Wanted:
    """What a user wants of a run; names are checked.

    Attributes:
        fwd, bwd: hooks as (name or predicate, function).
        cached: names or predicates; ``None`` for every hook name.
        gradients: keep the gradients of what is cached, too.
        device: where cached values go; ``None`` to leave them.
        logits: whether the run goes on to the logits where nothing else asks for it.
    """

    fwd: list[tuple[NameOrFilter, HookFunction]] = field(default_factory=list)
    bwd: list[tuple[NameOrFilter, HookFunction]] = field(default_factory=list)
    cached: list[NameOrFilter] | None = field(default_factory=list)
    gradients: bool = False
    device: Any = None
    logits: bool = True


class HookedRun:
    """A run of ``model`` through ``extent``; call `perform` in the body of a trace.

    Attributes:
        output: the logits [B,L,V], the residual stream [B,L,D] where the run stops, or ``None``.
        values: what was cached, by hook name (or path) in execution order.
        gradients: what was cached of the backward pass, by hook name, filled when that happens.
        tokens, mask: the token ids and attention mask [B,L] as the model gets them, or ``None``.
        length: the number of positions.
    """

    def __init__(self, model: Any, extent: Extent, wanted: Wanted) -> None:
        self.model, self.extent, self.wanted = model, extent, wanted
        self.output: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self.length = 0

    def perform(self, tracer: Any) -> None:
        """The body of the trace. Raises, before anything is computed, for a place that cannot be served."""
        _, inputs = self.model.inputs
        self.tokens, self.mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.length = (inputs["inputs_embeds"] if self.tokens is None else self.tokens).shape[1]
        if not self.length:
            raise PromptError("the prompt has no tokens")
        for action in self.actions():
            action()
        self.finish(tracer)

    def finish(self, tracer: Any) -> None:
        """Take the output, and leave the rest of the model uncomputed where nobody needs it."""
        stop, layers = self.extent.stop, self.model.layers
        if stop is not None:
            self.output = (layers[stop] if stop < len(layers) else self.model.norm_f).input  # [B,L,D]
        elif self.wanted.logits:
            self.output = self.model.lm_head.output  # [B,L,V]
            return
        tracer.stop()

    # -- what there is to do ---------------------------------------------------------------------------

    def actions(self) -> list[Callable[[], None]]:
        """Everything the run does, in execution order."""
        n_layers = self.extent.n_layers
        todo: list[tuple[Order, Callable[[], None]]] = []
        visits = self.visits()
        for layer in self.whole_trajectories(visits):
            order = order_of(Place(BY_NAME[STATE], layer), n_layers)
            todo.append(((order[0], order[1], self.length), functools.partial(self.keep_states, layer)))
        for visit in visits.values():
            if visit.fwd or visit.bwd or visit.cached:
                todo.append((order_of(visit.place, n_layers), functools.partial(self.visit, visit)))
        for layer in self.extent.skipped():
            todo.append(((layer, -1, 0), functools.partial(self.skip, layer)))
        return [action for _, action in sorted(todo, key=lambda item: item[0])]

    def visits(self) -> dict[str, Visit]:
        """What happens where, by the name of the place."""
        visits: dict[str, Visit] = {}

        def at(name: NameOrFilter) -> list[Visit]:
            places = resolve(name, lambda: self.known, self.length)
            if isinstance(name, str):
                for place in places:
                    visits.setdefault(key_of(place), Visit(place)).named = True
            return [visits.setdefault(key_of(place), Visit(place)) for place in places]

        for name, fn in self.wanted.fwd:
            for visit in self.some(name, at(name)):
                visit.fwd.append(fn)
        for name, fn in self.wanted.bwd:
            for visit in self.some(name, at(name)):
                visit.bwd.append(fn)
        for name in [lambda name: True] if self.wanted.cached is None else self.wanted.cached:
            for visit in at(self.every_position(name)):
                visit.cached = True
        return visits

    def every_position(self, name: NameOrFilter) -> NameOrFilter:
        """The whole trajectory is cached as the states of its positions."""
        if callable(name):
            return name
        place = names.parse(name)
        if place.site is None or place.site.name != STATE or place.position is not None:
            return name
        prefix = f"{place.site.hook_name(place.layer)}."
        return lambda hook_name: hook_name.startswith(prefix)

    def some(self, name: NameOrFilter, visits: list[Visit]) -> list[Visit]:
        """``visits``. Raises `UnknownSiteError` if a hook would never fire."""
        if not visits:
            raise UnknownSiteError(
                f"the predicate {name!r} holds for none of the hook names that this run reaches"
                + (f" with {self.extent}" if str(self.extent) else "")
                + f"; model.hook_names({self.length}) lists all there are"
            )
        return visits

    @functools.cached_property
    def known(self) -> dict[str, Place]:
        """Every place that has a hook name and that the run reaches."""
        places = {name: names.parse(name) for name in self.model.hook_names(self.length)}
        return {name: place for name, place in places.items() if self.extent.reaches(place)}

    def whole_trajectories(self, visits: dict[str, Visit]) -> list[int]:
        """The layers whose states are all cached, to be read at once: their visits then keep nothing.

        Not where gradients are wanted, as that of the trajectory is another than that of the states.
        """
        if self.wanted.gradients:
            return []
        states: dict[int, list[Visit]] = {}
        for visit in visits.values():
            if visit.cached and visit.place.position is not None and visit.place.layer is not None:
                states.setdefault(visit.place.layer, []).append(visit)
        layers = [layer for layer, found in states.items() if len(found) == self.length]
        for layer in layers:
            for visit in states[layer]:
                visit.cached = False
        return layers

    # -- doing it --------------------------------------------------------------------------------------

    def skip(self, layer: int) -> None:
        """Hand the residual stream past a layer."""
        block = self.model.layers[layer]
        block.skip(block.input)

    def visit(self, visit: Visit) -> None:
        """Serve one place: forward hooks, then the backward ones, then the cache."""
        key = key_of(visit.place)
        hook = Hook(key, visit.place.path)
        envoy = self.model.hook(self.path_of(visit))
        value = envoy.output
        for fn in visit.fwd:
            returned = fn(value, hook)
            if returned is None or returned is value:
                continue
            try:
                envoy.output = returned
            except SiteValueError as error:
                raise SiteValueError(f"what the hook on {key} returned: {error}") from error
            value = envoy.output
        keeps_gradient = self.wanted.gradients and visit.cached
        if visit.bwd or keeps_gradient:
            self.watch(value, visit.bwd, hook, keeps_gradient)
        if visit.cached:
            self.values[key] = value.detach().to(self.wanted.device)

    def path_of(self, visit: Visit) -> str:
        """Where to ask for a place. Counted from the end, a position is the same token in padded rows, and
        asking for all of them is no reason to warn that it is not."""
        place = visit.place
        if place.position is None or visit.named:
            return place.path
        return f"{Place(place.site, place.layer).path}[{place.position - self.length}]"

    def keep_states(self, layer: int) -> None:
        """Cache the states of a layer after every position, edits of them included."""
        states = self.model.layers[layer].ssm.h.output.detach().to(self.wanted.device)  # [B,L,E,N]
        for position in range(self.length):
            self.values[key_of(Place(BY_NAME[STATE], layer, position))] = states[:, position]

    def watch(self, value: Tensor, fns: list[HookFunction], hook: Hook, keep: bool) -> None:
        """Have the gradient of ``value`` go through ``fns`` when there is one, and keep what comes out."""
        if not value.requires_grad:
            value.requires_grad_()  # with frozen weights there may be no other reason to
        gradients, device = self.gradients, self.wanted.device

        def through(gradient: Tensor) -> Tensor:
            passed = gradient.clone()  # autograd's own must not be edited in place
            for fn in fns:
                returned = fn(passed, hook)
                passed = passed if returned is None else checked_gradient(returned, passed, hook)
            if keep:
                gradients[f"{hook.name}_grad"] = passed.detach().to(device)
            return passed

        value.register_hook(through)


def checked_gradient(returned: Any, gradient: Tensor, hook: Hook) -> Tensor:
    """The gradient that a backward hook returned, alone or in a tuple of one. Raises `SiteValueError`."""
    if isinstance(returned, tuple) and len(returned) == 1:
        returned = returned[0]
    if not isinstance(returned, Tensor) or returned.shape != gradient.shape:
        found = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise SiteValueError(
            f"the backward hook on {hook.name} takes the place of a gradient of shape "
            f"{tuple(gradient.shape)}, and returned {found}"
        )
    return returned.to(gradient)
