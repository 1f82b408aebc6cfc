"""The tracers that a ``with`` binds: nnsight's, which know the sites by all their names."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from nnsight.intervention.barrier import Barrier
from nnsight.intervention.cache import CacheView
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import Invoker
from torch.nn import ModuleList

from ..errors import PositionError, SiteValueError, TraceError, UnknownSiteError
from .caches import with_places
from .edits import let_edits_go
from .frames import UsersErrors
from .one_run import OneRun
from .placement import ShapeTracer
from .remote import SmallResults
from .sandbox import HeardOut
from .saving import GuardedTracer
from .worker import worker_for


class PlaceTracer(UsersErrors, OneRun, GuardedTracer):
    """A tracer that has the model to itself, and whose errors end at the user's line."""

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Add a prompt to this trace, as nnsight's ``tracer.invoke``: ``with tracer.invoke(prompt):``.

        Raises:
            TraceError: if the trace is over, or has a prompt and runs already.
        """
        if self.envoy is None:
            raise TraceError("tracer.invoke(...): this trace is over. Open another, `with model.trace() as tracer:`")
        if self.batcher is None:
            raise TraceError(
                "tracer.invoke(...) needs a line of its own in the body: `with model.trace() as tracer:`, and "
                "below it `with tracer.invoke(prompt):`"
            )
        if self.envoy.interleaver.interleaving:
            raise TraceError(
                "tracer.invoke(...): the model is already running. Give trace() no prompt, and one to each "
                "`with tracer.invoke(prompt):`; invokes stand side by side, not one in the other"
            )
        return super().invoke(*args, **kwargs)


class ScanTracer(PlaceTracer, ShapeTracer):
    """What ``with model.scan(...)`` binds."""


class RunResult(eproperty):
    """``tracer.result``, which only the body of a trace can ask for."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is not None:
            worker_for("tracer.result", "tracer.result is what a run returns: save it inside its `with`")
        return super().__get__(obj, owner)


class SiteTracer(SmallResults, HeardOut, PlaceTracer):
    """What ``with model.trace(...) as tracer`` binds."""

    @RunResult
    def result(self, value: Any) -> Any:
        """What the traced call returned, as nnsight's ``tracer.result``: of ``generate`` the token ids [B,L].

        Raises:
            SiteValueError: outside of a body that runs with the model.

        Example::

            with model.generate(prompt, max_new_tokens=3) as tracer:
                ids = tracer.result.save()
        """
        return value

    @property
    def iter(self) -> Iterations:
        """The steps of a generation, as nnsight's ``tracer.iter``: ``for step in tracer.iter[:3]:``.

        A loop over an open range, ``tracer.iter[:]``, ends with the run: nothing of the body that stands after it runs.

        Example::

            with model.generate(prompt, max_new_tokens=3) as tracer:
                for step in tracer.iter[:3]:
                    logits = model.lm_head.output[:, -1].save()  # [B,V]
        """
        return Steps()

    def cache(self, modules: list[Any] | None = None, *args: Any, **kwargs: Any) -> CacheView:
        """Record many places at once, as nnsight does; places may be given as strings.

        Args:
            modules: envoys, paths (``"layers[3].ssm.y"``, ``"layers.3.ssm.h.5"``) or hook names
                (``"blocks.3.hook_h.5"``); ``None`` for every module and site of the model.
            *args, **kwargs: as for nnsight's ``tracer.cache``.

        Raises:
            UnknownSiteError: for a string that names no place.

        Example::

            with model.trace(prompt) as tracer:
                cache = tracer.cache(modules=["blocks.1.hook_resid_post"])
            cache.model.layers[1].resid_post.output
        """
        if isinstance(modules, str) or not isinstance(modules, Iterable | None):
            raise UnknownSiteError(
                f"tracer.cache(modules=...) takes a list of envoys, paths or hook names, not {modules!r}"
            )
        if modules is not None:
            modules = [self._envoy_path(module) for module in modules]
        view = super().cache(modules, *args, **kwargs)
        with_places(Mediator.current("tracer.cache()").caches[-1])
        return view

    def stop(self) -> None:
        """End the run here, as nnsight's ``tracer.stop``; lasting edits of later places are let go.

        Example::

            with model.trace(prompt) as tracer:
                stream = model.layers[1].resid_post.output.save()
                tracer.stop()
        """
        let_edits_go(self.envoy)
        super().stop()

    def barrier(self, n: int) -> Barrier:
        """A meeting point for ``n`` of this trace's invokes, as nnsight's ``tracer.barrier``.

        Raises:
            SiteValueError: if ``n`` is not a number of invokes.

        Example::

            with model.trace() as tracer:
                barrier = tracer.barrier(2)
                with tracer.invoke(source):
                    state = model.layers[1].ssm.h[5].output
                    barrier()
                with tracer.invoke(prompt):
                    barrier()
                    model.layers[1].ssm.h[5].output = state
                    logits = model.lm_head.output.save()
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SiteValueError(f"tracer.barrier(n) takes the number of invokes that meet there, not {n!r}")
        return super().barrier(n)

    def _envoy_path(self, module: Any) -> Any:
        if isinstance(module, Envoy):
            if module.interleaver is not self.envoy.interleaver:
                raise UnknownSiteError(f"tracer.cache(modules=...): {module.path} is of another model than this trace")
            if isinstance(module._module, ModuleList):
                raise UnknownSiteError(
                    "tracer.cache(modules=...): the list of layers has no value; name its members, "
                    "modules=list(model.layers)"
                )
            return module
        if isinstance(module, str) and module in {path for path, _ in self.envoy.named_modules()}:
            return module
        return self.envoy.hook(module).path  # refuses what is not a string, too


class Steps(Iterations):
    """nnsight's steps of a run, which are checked as soon as they are asked for."""

    #: A loop without an end is refused after this many steps in a row in which it asked for nothing.
    IDLE = 100_000

    def __iter__(self) -> Iterator[int]:
        """The steps in turn.

        Raises:
            PositionError: for a loop without an end whose body no longer asks the run for anything.
        """
        mediator, idle = worker_for("tracer.iter", "tracer.iter counts the steps of a run: loop inside its `with`"), 0
        for step in super().__iter__():
            last = mediator.pending  # what the block was served last
            yield step
            idle = idle + 1 if mediator.pending is last else 0
            if idle == self.IDLE and self.stop is None and self.steps is None:
                raise PositionError(
                    f"a loop over tracer.iter without an end has asked the run for nothing in {idle} "
                    f"steps, and ends only where it asks for a step that the run does not make: name the "
                    f"end, tracer.iter[:n], or leave the loop with break"
                )

    def __getitem__(self, key: Any) -> Iterations:
        """Select steps: ``[:3]``, ``[2]``, ``[[0, 2]]``.

        Raises:
            PositionError: for steps that no run has, or not in this order.
        """
        if isinstance(key, slice):
            ends = ["" if end is None else repr(end) for end in (key.start, key.stop, key.step)]
            asked = f"tracer.iter[{':'.join(ends if key.step is not None else ends[:2])}]"
            _steps(asked, [end for end in (key.start, key.stop) if end is not None])
            if key.step in (None, 1):
                return Steps(key.start or 0, key.stop)
            _steps(asked, [key.step])
            if key.stop is None:
                raise PositionError(
                    f"{asked}: an open range has no step here; name its end, tracer.iter[:n:{key.step}], or "
                    f"pass over the other steps in the loop"
                )
            return Steps(steps=list(range(key.start or 0, key.stop, key.step)))
        asked = f"tracer.iter[{key!r}]"
        if isinstance(key, (list, tuple)):
            steps = _steps(asked, key)
            if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
                raise PositionError(f"{asked}: a run goes through its steps in order, so name each once and ascending")
            return Steps(steps=steps)
        (step,) = _steps(asked, [key])
        return Steps(step, step + 1)


def _steps(asked: str, steps: Any) -> list[int]:
    # The steps as integers from 0, which they must be.
    try:
        numbers = [-1 if isinstance(step, bool) else operator.index(step) for step in steps]
    except TypeError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise PositionError(
            f"{asked}: steps are integers counted from 0, tracer.iter[2], tracer.iter[:3] or "
            f"tracer.iter[[0, 2]]; how many there will be is not known before the run ends, so none counts "
            f"from the end"
        )
    return numbers
