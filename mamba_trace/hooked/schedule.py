"""One run with hooks and a cache, as a worker inside an ordinary trace.

There is no second mechanism: a `HookedRun` asks a trace for the places it needs, in execution order, so what
a layer computes is decided by demand as in every trace, and a run that caches residual streams keeps all its
kernels. Before the model computes anything it looks at the model's inputs, and so knows the prompt's length
and which places there are; whatever cannot be served is refused there.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import names
from ..errors import LayerError, PromptError, SiteValueError, UnknownSiteError
from ..names import Place, public_path
from ..sites import BY_NAME, STATE
from ..tracing import ask_every_position, reading
from ..tracing.edits import waiting_edits
from .hooks import Extent, Hook, HookFunction, NameOrFilter, Order, key_of, resolve

#: The place whose value a run returns.
LOGITS = BY_NAME["lm_head"].hook_name()


@dataclass
class Visit:
    """What happens at one place.

    Attributes:
        place: where.
        hook: what its functions are told about it.
        fwd, bwd: functions of (value, hook) and (gradient, hook), in the order they were given.
        cached: keep the value.
        named: somebody named this very place, and did not just take all that there are.
    """

    place: Place
    hook: Hook
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
    """A run of ``model`` through ``extent``; call `perform` in the body of a trace, and `close` after it.

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
        #: Whether a hook was given the logits.
        self.handed_out = False
        #: What holds a list of layers in place of the model's own, if anything does.
        self.shadowed: dict[str, Any] = {}

    def perform(self, tracer: Any) -> None:
        """The body of the trace. Raises, before anything is computed, for a place that cannot be served."""
        _, inputs = self.model.inputs
        self.tokens, self.mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.length = (inputs["inputs_embeds"] if self.tokens is None else self.tokens).shape[1]
        if not self.length:
            raise PromptError("the prompt has no tokens")
        todo = self.actions()
        self.check_edits()
        layers = self.extent.layers
        if layers != list(range(self.extent.n_layers)):
            backbone = self.model.backbone._module
            self.shadowed = backbone.__dict__
            # Its forward goes through what it finds under this name, which stands before the submodule.
            self.shadowed["layers"] = [self.model.layers[layer]._module for layer in layers]
        for time, action in todo:
            if time:
                for _ in tracer.iter[time]:
                    action()
            else:
                action()
        self.finish(tracer)

    def finish(self, tracer: Any) -> None:
        """Take the output, and leave the rest of the model uncomputed where nobody needs it."""
        if self.extent.stop is not None:
            self.output = self.model.norm_f.input.clone()  # [B,L,D]
        elif self.wanted.logits:
            self.output = self.model.lm_head.output  # [B,L,V]
            if self.handed_out:
                self.output = self.output.clone()  # a hook may have kept it
            self.check_edits()
            return
        tracer.stop()

    def close(self) -> None:
        """Leave the model as it was. To be called when the trace is over, however it ended."""
        self.shadowed.pop("layers", None)

    def check_edits(self) -> None:
        """Raises `LayerError` if a lasting edit of the model waits for what this run does not compute."""
        extent = self.extent
        for location in waiting_edits(self.model):
            path = public_path(location)
            found = re.search(r"\blayers\[(\d+)\]", path)
            layer = -1 if found is None else int(found[1])
            behind = extent.stop is not None and layer >= extent.stop
            passed = path.split(".")[0] == "embeddings" and extent.start is not None
            if passed or not (found is None or behind or layer in extent.layers):
                raise LayerError(
                    f"a lasting edit (model.edit) waits for {path}, which is never reached with {extent}, "
                    f"so what it does after that would be left out. Run all layers, make edits of what is "
                    f"reached in a block of their own, or take them off with model.clear_edits()"
                )

    # -- what there is to do ---------------------------------------------------------------------------

    def actions(self) -> list[tuple[int, Callable[[], None]]]:
        """Everything the run does, in execution order, with how often it has come to the place before."""
        todo: list[tuple[Order, int, Callable[[], None]]] = []

        def add(place: Place, action: Callable[[bool], None]) -> None:
            orders = self.extent.orders_of(place)
            for time, order in enumerate(orders):
                todo.append((order, time, functools.partial(action, time + 1 == len(orders))))

        visits = self.visits()
        for layer in self.whole_trajectories(visits):
            add(Place(BY_NAME[STATE], layer), functools.partial(self.keep_states, layer))
        for visit in visits.values():
            if visit.fwd or visit.bwd or visit.cached:
                add(visit.place, functools.partial(self.visit, visit))
        return [(time, action) for _, time, action in sorted(todo, key=lambda item: item[0])]

    def visits(self) -> dict[str, Visit]:
        """What happens where, by the name of the place."""
        visits: dict[str, Visit] = {}

        def visit_of(place: Place) -> Visit:
            key = key_of(place)
            return visits.setdefault(key, Visit(place, Hook(key, place.path)))

        def at(name: NameOrFilter) -> list[Visit]:
            places = resolve(name, lambda: self.known, self.length)
            if isinstance(name, str):
                for place in places:
                    visit_of(place).named = True
            return [visit_of(place) for place in places]

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

    def visit(self, visit: Visit, last: bool) -> None:
        """Serve one place: forward hooks, then the backward ones, then the cache.

        Of a place that the run comes to several times, the cache has what there was the ``last`` time.
        """
        key = key_of(visit.place)
        envoy = self.model.hook(self.path_of(visit))
        ask_every_position(not visit.named)
        with contextlib.nullcontext() if visit.fwd else reading():
            value = envoy.output
        for fn in visit.fwd:
            returned = fn(value, visit.hook)
            if returned is None or returned is value:
                continue
            try:
                envoy.output = returned
            except SiteValueError as error:
                raise SiteValueError(f"what the hook on {key} returned: {error}") from error
            value = envoy.output
        self.handed_out |= bool(visit.fwd) and key == LOGITS
        keeps = visit.cached and last
        if visit.bwd or (keeps and self.wanted.gradients):
            self.watch(value, visit, key, keeps and self.wanted.gradients)
        if keeps:
            self.values[key] = kept(value, self.wanted.device)

    def path_of(self, visit: Visit) -> str:
        """Where to ask for a place. Counted from the end, a position is the same token in padded rows, and
        asking for all of them is no reason to warn that it is not."""
        place = visit.place
        if place.position is None or visit.named:
            return place.path
        return f"{Place(place.site, place.layer).path}[{place.position - self.length}]"

    def keep_states(self, layer: int, last: bool) -> None:
        """Cache the states of a layer after every position, edits of them included."""
        if not last:
            return
        with reading():
            states = kept(self.model.layers[layer].ssm.h.output, self.wanted.device)  # [B,L,E,N]
        for position in range(self.length):
            self.values[key_of(Place(BY_NAME[STATE], layer, position))] = states[:, position]

    def watch(self, value: Tensor, visit: Visit, key: str, keep: bool) -> None:
        """Have the gradient of ``value`` go through hooks when there is one, and keep what comes out."""
        if not value.requires_grad:
            value.requires_grad_()  # with frozen weights there may be no other reason to
        gradients, device, fns, hook = self.gradients, self.wanted.device, list(visit.bwd), visit.hook

        def through(gradient: Tensor) -> Tensor:
            passed = gradient.clone()  # autograd's own must not be edited in place
            for fn in fns:
                returned = fn(passed, hook)
                passed = passed if returned is None else checked_gradient(returned, passed, hook)
            if keep:
                gradients[f"{key}_grad"] = kept(passed, device)
            return passed

        value.register_hook(through)


def kept(value: Tensor, device: Any) -> Tensor:
    """A copy for a cache, which nothing that happens to ``value`` reaches; on ``device``, if it is given."""
    return value.detach().to(value.device if device is None else device, copy=True)


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
    # A copy, as the next hook may edit it in place, and this tensor is the user's own.
    return returned if returned is gradient else returned.to(gradient, copy=True)
