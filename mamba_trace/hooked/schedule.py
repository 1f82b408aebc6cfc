"""One run with hooks and a cache, as the body of an ordinary trace.

A `HookedRun` asks a trace for the places that it needs, in execution order. So what a layer computes is decided by
demand as in every trace, and a run that caches residual streams keeps all its kernels. Where there are no hooks and
no edits it need not ask: it looks on, as nnsight's caches do, and the demand is the same. Before the model computes
anything the run looks at the model's inputs, from which it knows the prompt's length and which places exist; whatever
cannot be served is refused there.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .. import names
from ..errors import LayerError, PromptError, SiteValueError, UnknownSiteError
from ..names import Place, public_path
from ..sites import BY_NAME, STATE
from ..tracing import ask_every_position, reading
from ..tracing.caches import look_on
from ..tracing.edits import is_edited, waiting_edits
from ..tracing.forwards import listened_to
from ..tracing.sandbox import in_sandbox
from .copies import checked_gradient, copied
from .extents import run_layers
from .hooks import Extent, Hook, HookFunction, NameOrFilter, Order, key_of, resolve

#: The place whose value a run returns.
LOGITS = BY_NAME["lm_head"].hook_name()
#: How far the values reach that no module is given: the last of them.
LAST_INSIDE = BY_NAME["y"].index


@dataclass
class PlaceActions:
    """What a run does at one place.

    Attributes:
        place: the place.
        fwd, bwd: functions of (value, hook) and (gradient, hook), in the order they were given.
        cached: whether the value is kept.
        named: whether the user named this very place, and not all places that a predicate accepts.
    """

    place: Place
    fwd: list[HookFunction] = field(default_factory=list)
    bwd: list[HookFunction] = field(default_factory=list)
    cached: bool = False
    named: bool = False

    @functools.cached_property
    def hook(self) -> Hook:
        """The second argument of the functions."""
        return Hook(key_of(self.place), self.place.path)


@dataclass
class Step:
    """One visit of a place.

    Attributes:
        order: where in the run.
        time: how often the run has been there before.
        place: the place.
        serve: asks for its value, and does with it what there is to do.
        alone: whether that can be done without asking: a value is to be kept, and no warning is to be given.
    """

    order: Order
    time: int
    place: Place
    serve: Callable[[], None]
    alone: bool


@dataclass(eq=False)
class HookedRun:
    """A run with hooks and a cache; call `perform` in the body of a trace, and `close` after it.

    Attributes:
        model: the `MambaTrace`.
        extent: the part of the model that runs.
        fwd, bwd: hooks as (name or predicate, function), with names already checked.
        cached: checked names or predicates; ``None`` for every hook name.
        device: where cached values go; ``None`` to leave them where they are.
        incl_bwd: whether the gradients of the cached values are kept, too.
        logits: whether the run goes on to the logits even if nothing else asks for them.
        output: the logits [B,L,V], the residual stream [B,L,D] where the run stops, or ``None``.
        values: the cached values, by hook name (or path) in execution order.
        gradients: the cached gradients, by hook name, filled when the backward pass happens.
        tokens, mask: the token ids and attention mask [B,L] as the model gets them, or ``None``.
        length: the number of positions.
        handed_out: whether a hook was given the logits.
        one_by_one: whether to ask for each value even where nobody can edit any.
        looked_on: the places whose values were kept without asking.
        shadowed: the dictionary that holds a list of layers in place of the model's own, if there is one.
    """

    model: Any
    extent: Extent
    fwd: list[tuple[NameOrFilter, HookFunction]]
    bwd: list[tuple[NameOrFilter, HookFunction]]
    cached: list[NameOrFilter] | None
    device: Any = None
    incl_bwd: bool = False
    logits: bool = True
    output: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    mask: Tensor | None = None
    length: int = 0
    handed_out: bool = False
    one_by_one: bool = False
    looked_on: list[Place] = field(default_factory=list)
    shadowed: dict[str, Any] = field(default_factory=dict)

    def perform(self, tracer: Any) -> None:
        """The body of the trace. Raises, before anything is computed, for a place that cannot be served."""
        _, inputs = self.model.inputs
        self.tokens, self.mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.length = (inputs["inputs_embeds"] if self.tokens is None else self.tokens).shape[1]
        if not self.length:
            raise PromptError("the prompt has no tokens")
        steps = self.schedule()
        self.check_edits()
        if self.extent.layers != list(range(self.extent.n_layers)) or self.extent.start is not None:
            # The base's forward reads its attribute `layers`, and finds this one before the submodule.
            self.shadowed = self.model.layers.parent._module.__dict__
            blocks = [block._module for block in self.model.layers]
            self.shadowed["layers"] = run_layers(blocks, self.extent, inputs.get("inputs_embeds"), self.model._layout)
        for step in steps if self.asks else self.look_on(steps):
            if step.time:
                for _ in tracer.iter[step.time]:
                    step.serve()
            else:
                step.serve()
        self.finish(tracer)

    def finish(self, tracer: Any) -> None:
        """Take the output, and leave the rest of the model uncomputed where nobody needs it."""
        if self.extent.stop is not None:
            self.output = self.model.norm_f.input.clone()  # [B,L,D]
        elif self.logits:
            self.output = self.model.logits.output  # [B,L,V]
            if self.handed_out:
                self.output = self.output.clone()  # a hook may have kept it
            self.check_edits()
            return
        tracer.stop()

    def close(self) -> None:
        """Leave the model as it was. To be called when the trace is over, however it ended."""
        self.shadowed.pop("layers", None)

    def check_edits(self) -> None:
        """Raises `LayerError` if a lasting edit of the model waits for a value that this run skips."""
        extent = self.extent
        for location in waiting_edits(self.model):
            path = public_path(location)
            in_layer = re.search(r"\blayers\[(\d+)\]", path)
            layer = -1 if in_layer is None else int(in_layer[1])
            behind = extent.stop is not None and layer >= extent.stop
            passed = path.split(".")[0] == "embeddings" and extent.start is not None
            if passed or not (in_layer is None or behind or layer in extent.layers):
                raise LayerError(
                    f"a lasting edit (model.edit) waits for {path}, which is never reached with {extent}, "
                    f"so what it does after that would be left out. Run all layers, make edits of what is "
                    f"reached in a block of their own, or take them off with model.clear_edits()"
                )

    # -- planning --------------------------------------------------------------------------------------

    def schedule(self) -> list[Step]:
        """The run's visits of places, in execution order."""
        steps: list[Step] = []

        def add(place: Place, serve: Callable[[bool], None], alone: bool) -> None:
            orders = self.extent.orders_of(place, self.model._layout)
            for time, order in enumerate(orders):
                steps.append(Step(order, time, place, functools.partial(serve, time + 1 == len(orders)), alone))

        places = self.places()
        for layer in self.whole_trajectories(places):
            place = Place(BY_NAME[STATE], layer)
            add(place, functools.partial(self.keep_states, place), True)
        for actions in places.values():
            if actions.fwd or actions.bwd or actions.cached:
                alone = not (actions.named and actions.place.position is not None)  # which may be padding
                add(actions.place, functools.partial(self.serve, actions), alone)
        return sorted(steps, key=lambda step: step.order)

    def places(self) -> dict[str, PlaceActions]:
        """What happens where, by the place's name. Raises `UnknownSiteError` for a hook that never fires."""
        places: dict[str, PlaceActions] = {}

        def at(name: NameOrFilter) -> list[PlaceActions]:
            there = []
            for place in resolve(name, lambda: self.known, self.length, self.model._place):
                key = key_of(place)
                if key not in places:
                    places[key] = PlaceActions(place)
                there.append(places[key])
                there[-1].named |= isinstance(name, str)
            return there

        for kind in ("fwd", "bwd"):
            for name, fn in getattr(self, kind):
                hooked = at(name)
                if not hooked:
                    raise UnknownSiteError(
                        f"the predicate {name!r} holds for none of the hook names that this run reaches"
                        + (f" with {self.extent}" if str(self.extent) else "")
                        + f"; model.hook_names({self.length}) lists all there are"
                    )
                for actions in hooked:
                    getattr(actions, kind).append(fn)
        for name in [lambda name: True] if self.cached is None else self.cached:
            for actions in at(every_position(name, self.model._place)):
                actions.cached = True
        return places

    @functools.cached_property
    def known(self) -> dict[str, Place]:
        """Every place that has a hook name and that the run reaches."""
        places = names.hook_places(self.model._layout, self.length)
        return {place.hook_name: place for place in places if self.extent.reaches(place)}

    def whole_trajectories(self, places: dict[str, PlaceActions]) -> list[int]:
        """The layers whose states are all cached. They are read at once, so their places keep nothing.

        None if gradients are wanted, since the gradient of the trajectory is not that of its states.
        """
        if self.incl_bwd:
            return []
        states: dict[int | None, list[PlaceActions]] = {}
        for actions in places.values():
            if actions.cached and actions.place.position is not None:
                states.setdefault(actions.place.layer, []).append(actions)
        whole = {layer: kept for layer, kept in states.items() if layer is not None and len(kept) == self.length}
        for kept in whole.values():
            for actions in kept:
                actions.cached = False
        return list(whole)

    # -- doing -----------------------------------------------------------------------------------------

    @property
    def asks(self) -> bool:
        """Whether each value is asked for: where nothing but the cache wants any, it is handed them without."""
        somebody = self.fwd or self.bwd or self.incl_bwd or is_edited(self.model)
        return bool(self.one_by_one or somebody or in_sandbox(self.model))

    def look_on(self, steps: list[Step]) -> list[Step]:
        """Keep values as the run comes to them; return the steps that are left to do one by one.

        Where nothing else waits for the end, the last step does.
        """
        ends, self.looked_on = self.logits or self.extent.stop is not None, []
        for step in steps if ends else steps[:-1]:
            if step.alone and not step.time:  # a later visit is looked on at, too
                envoy = self.model._envoy(self.from_end(step.place))
                look_on(envoy, functools.partial(self.keep, step.place, envoy))
                self.looked_on.append(step.place)
        return [step for step in steps if not step.alone or (step is steps[-1] and not ends)]

    @property
    def missed(self) -> bool:
        """Whether the run did not come to a place that was looked on at. Whoever asks for it is told why."""
        first = (Place(p.site, p.layer, 0) if p.whole_trajectory else p for p in self.looked_on)
        return any(key_of(place) not in self.values for place in first)

    def serve(self, actions: PlaceActions, last: bool) -> None:
        """Serve one place: forward hooks first, then the backward ones, then the cache.

        If the run comes to the place several times, the cache keeps the value of the ``last`` time.
        """
        hook, key = actions.hook, key_of(actions.place)
        envoy = self.model._envoy(actions.place if actions.named else self.from_end(actions.place))
        ask_every_position(not actions.named)
        with contextlib.nullcontext() if actions.fwd else reading():
            value = envoy.output
        for fn in actions.fwd:
            returned = fn(value, hook)
            if returned is None or returned is value:
                continue
            try:
                envoy.output = returned
            except SiteValueError as error:
                raise SiteValueError(f"what the hook on {key} returned: {error}") from None
            value = envoy.output
        self.handed_out |= bool(actions.fwd) and key == LOGITS
        keeps = actions.cached and last
        if actions.bwd or (keeps and self.incl_bwd):
            self.watch(value, actions, keeps and self.incl_bwd)
        if keeps:
            self.keep(actions.place, envoy, value)

    def from_end(self, place: Place) -> Place:
        """A place that a predicate accepts, with a position that is counted from the end: there it is the same token in
        rows padded on the left, so that no warning about padding is given for it."""
        return place if place.position is None else replace(place, position=place.position - self.length)

    def keep_states(self, place: Place, last: bool) -> None:
        """Cache the states of a layer after every position, edits of them included."""
        if last:
            envoy = self.model._envoy(place)
            with reading():
                states = envoy.output
            self.keep(place, envoy, states)

    def keep(self, place: Place, envoy: Any, value: Tensor) -> None:
        """Cache the value of a place; of the whole trajectory [B,L,...,N] each state under its own name."""
        kept = self.kept(value, place, envoy)
        found = {key_of(place): kept}
        if place.whole_trajectory:
            positions = enumerate(kept.unbind(1))
            found = {key_of(Place(place.site, place.layer, position)): state for position, state in positions}
        for key, value in found.items():
            self.values.pop(key, None)  # of an earlier visit: it comes where the last one does
            self.values[key] = value

    def kept(self, value: Tensor, place: Place, envoy: Any) -> Tensor:
        """A value for the cache: a copy, unless nobody can edit it in place.

        What lies inside of the scan, up to y, is made for whoever asks, and no module is given it.

        Args:
            value: what was served.
            place: where.
            envoy: of the site there.
        """
        site = place.site
        inside = site is not None and site.stage in ("scan", "states") and site.index <= LAST_INSIDE
        alone = inside and not (self.fwd or self.bwd or value.requires_grad or self.edited)
        if alone and not listened_to(envoy._module) and value.untyped_storage().nbytes() == value.nbytes:
            return value if self.device is None else value.to(self.device)
        return copied(value, self.device)

    @functools.cached_property
    def edited(self) -> bool:
        """Whether the model had lasting edits when the first value was kept, which may edit it later."""
        return is_edited(self.model)

    def watch(self, value: Tensor, actions: PlaceActions, keep: bool) -> None:
        """Pass the gradient of ``value`` through the hooks once it exists; ``keep`` the result."""
        if not value.requires_grad:
            value.requires_grad_()  # with frozen weights there may be no other reason to
        gradients, device, hook = self.gradients, self.device, actions.hook
        name = f"{key_of(actions.place)}_grad"

        def through(gradient: Tensor) -> Tensor:
            passed = gradient.clone()  # autograd's own must not be edited in place
            for fn in actions.bwd:
                returned = fn(passed, hook)
                passed = passed if returned is None else checked_gradient(returned, passed, hook)
            if keep:
                gradients[name] = copied(passed, device)
            return passed

        value.register_hook(through)


def every_position(name: NameOrFilter, place_of: Callable[[str], Place]) -> NameOrFilter:
    """``name``, or a predicate for the states of all positions where it is the whole trajectory's."""
    if callable(name):
        return name
    place = place_of(name)
    if not place.whole_trajectory:
        return name
    prefix = f"{BY_NAME[STATE].hook_name(place.layer)}."
    return lambda hook_name: hook_name.startswith(prefix)
