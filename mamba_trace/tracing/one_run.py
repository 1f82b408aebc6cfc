"""One run of a model at a time: a second thread waits, and a run inside a run is refused.

While a trace runs, nnsight keeps its workers, its batch and its visit counts on the interleaver of the model,
and the workers are greenlets, which belong to one thread. A second trace that began meanwhile would share all
of it. nnsight keeps nothing there before the end of the ``with``, when the captured body starts to run, so a
run claims its model (`only_run`) from there until it is over, however it ends.

* Models that have a module in common (two wrappers of one module, an edited copy) never run at the same time.
* A run in another thread waits for its turn. If it would wait for ever, since the other thread waits for a
  model that this thread is running, it is refused.
* A run that is started inside another run of the same model, from its body or from a hook, is refused before
  it has touched anything, and the outer run continues.
* What ``torch.compile`` has compiled runs as it was written.
* Only a run's own thread sees it (`OneThreadInterleaver`). A module that another thread calls meanwhile, as
  in ``model._module(tokens)``, computes what it computes outside of traces.

Sessions and edits do not claim a model: the traces in a session take turns like any others.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.interleaver import Interleaver, dangling_unwind
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.tracing.tracer import WithBlockNotFoundError

from ..errors import ArgumentError, SiteOrderError, TraceError
from ..names import public_path
from .forwards import as_written
from .frames import users_frame
from .served import SERVED
from .worker import LAST, TRACE, within_skipped

#: Seconds after which a thread that still waits for its turn says so.
PATIENCE = 60.0


class Run:
    """A run under way in the thread that makes this object.

    Attributes:
        envoy: what runs: a model, or a part of a model.
        thread: the thread that it runs in.
        over: whether it has ended.
    """

    def __init__(self, envoy: Any) -> None:
        self.envoy = envoy
        self.thread = threading.current_thread()
        self.over = False

    def excludes(self, envoy: Any) -> bool:
        """Whether a run of ``envoy`` cannot begin before this run has ended."""
        if self.over or not self.thread.is_alive():
            return False
        return self.envoy.interleaver is envoy.interleaver or not modules(self.envoy).isdisjoint(modules(envoy))


def modules(envoy: Any) -> set[int]:
    """The ids of the modules of the model that ``envoy`` belongs to."""
    return {id(module) for module in envoy.root._module.modules()}


#: Guards the two below, and is notified when a run ends.
_turn = threading.Condition()
#: The runs under way. The references are weak, so that a run whose end was interrupted blocks nobody.
_runs: weakref.WeakSet[Run] = weakref.WeakSet()
#: What each waiting thread waits to run.
_waiting: dict[threading.Thread, Any] = {}


@contextlib.contextmanager
def only_run(envoy: Any, what: str) -> Iterator[None]:
    """Claim the model of ``envoy`` for a run in this thread; wait while another thread has it.

    Args:
        envoy: what runs: the model, or a part of it.
        what: what is about to run, for messages.

    Raises:
        TraceError: if this thread is already inside a run of it, or if it would wait for ever.
    """
    run, claimed = Run(envoy), False
    try:
        with _turn:
            _take_turn(run, what)
        claimed = True
        _stand_down(envoy.interleaver)
        with as_written():
            yield
    finally:
        run.over = True
        if claimed:
            _stand_down(envoy.interleaver)
        with _turn:
            _runs.discard(run)
            _turn.notify_all()


def _stand_down(interleaver: Any) -> None:
    """End what a run has left behind: a refused prompt's batch, or more if Ctrl-C came in nnsight's bookkeeping."""
    if interleaver.interleaving or interleaver.mediators or interleaver.batcher is not None:
        interleaver.interleaving = False
        interleaver.cancel()


def _take_turn(run: Run, what: str) -> None:
    # Called with `_turn` held: add `run` to `_runs` as soon as no run under way excludes it.
    began, told = time.monotonic(), False
    try:
        while (other := _in_the_way(run.envoy)) is not None:
            if other.thread is run.thread:
                raise nested(what)
            if _waits_for(other.thread, run.thread):
                raise TraceError(
                    f"{what} would wait for ever: another thread is running a trace of this model, and "
                    f"waits for the model whose trace this one is in. Run the two models in the same order "
                    f"in both threads"
                )
            _waiting[run.thread] = run.envoy
            _turn.wait(1.0)
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                warnings.warn(
                    f"{what} has waited for {PATIENCE:.0f} s: another thread is running a trace of this "
                    f"model, and one model runs one trace at a time. If that thread waits for this one, "
                    f"neither goes on",
                    stacklevel=2,
                )
        _runs.add(run)
    finally:
        _waiting.pop(run.thread, None)


def _in_the_way(envoy: Any) -> Run | None:
    return next((run for run in _runs if run.excludes(envoy)), None)


def _waits_for(thread: threading.Thread, target: threading.Thread) -> bool:
    # Whether `thread` waits, directly or through others, for a run of `target`.
    seen: set[threading.Thread] = set()
    while thread in _waiting and thread not in seen:
        seen.add(thread)
        holder = _in_the_way(_waiting[thread])
        if holder is None:
            return False
        thread = holder.thread
        if thread is target:
            return True
    return False


def nested(what: str) -> TraceError:
    """The error for a run that is started inside another run of the same model."""
    return TraceError(
        f"{what} inside a trace of the same model, which runs one trace at a time: put it before or after "
        f"that `with`, or, for another prompt in the same run, give each its own `with "
        f"tracer.invoke(prompt):`"
    )


def in_a_run(envoy: Any) -> bool:
    """Whether this thread is inside a run that excludes a run of ``envoy``: in its body, or in a hook."""
    thread = threading.current_thread()
    with _turn:
        return any(run.thread is thread and run.excludes(envoy) for run in _runs)


def check_model(model: Any, what: str) -> None:
    """Raises `ArgumentError` if ``model`` is none of this package's; ``what`` is the name of the function it is for."""
    if not hasattr(model, "_layout"):
        raise ArgumentError(
            f"{what} takes a MambaTrace as its model, not a {type(model).__name__}; a loaded module is wrapped by "
            f"MambaTrace(module)"
        )


def refuse_inside_a_trace(envoy: Any, what: str) -> None:
    """Raises `TraceError` inside a trace of ``envoy``: ``what``, a function's name, starts its own.

    Raises `ArgumentError` if ``envoy`` is no model.
    """
    check_model(envoy, what)
    if in_a_run(envoy):
        raise TraceError(
            f"{what} is a trace of its own, and this model is in one: call it before or after it, or ask for "
            f"the sites in it"
        )


def in_the_body(interleaver: Any) -> bool:
    """Whether the caller runs in the body of a trace of ``interleaver``, not in the model that it runs."""
    worker = getcurrent()
    while worker is not None:
        mediator = getattr(worker, "mediator", None)
        if mediator is not None and mediator().interleaver is interleaver:
            return True
        worker = worker.parent
    return False


def run_method(method: Callable[..., Any], doc: str) -> Callable[..., Any]:
    """A method that runs the model: it is called, or traced in a ``with``. This is nnsight's ``traceable``.

    Inside a trace of the model nnsight calls the method at once. Here only the running model may call it, and
    the body of the trace may not.

    Args:
        method: the method as nnsight decorates it.
        doc: its docstring.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if in_the_body(self.interleaver):
            raise nested(f"model.{method.__name__}(...) is a run of its own and was called")
        if self.interleaver.interleaving:
            return method(self, *args, **kwargs)
        run = method.__get__(self, type(self))
        tracer = self.trace(*args, fn=run, **kwargs)
        try:
            tracer.capture()  # looks for a `with` at the line that called this method
        except WithBlockNotFoundError:
            with only_run(self, f"model.{method.__name__}(...) was called"):
                return self.interleave(run, *args, **kwargs)
        return tracer

    wrapper.__doc__ = doc
    return wrapper


class OneRun(InterleavingTracer):
    """A tracer whose block and run have the model to themselves."""

    def execute(self, code: Any) -> None:
        """Run the block as nnsight does, when it is its turn."""
        with only_run(self.envoy, "a trace was opened"):
            token = TRACE.set(self.envoy.interleaver)
            try:
                super().execute(code)
            finally:
                TRACE.reset(token)


class OneThreadInterleaver(Interleaver):
    """nnsight's interleaver; only the thread that runs it sees the run."""

    _thread: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: The paths of the modules that were skipped in this run, and at which of their visits last.
        self.skipped: dict[str, int] = {}

    @property
    def interleaving(self) -> bool:
        """Whether this thread has a run under way, which every module asks before it serves a worker."""
        return self._thread is not None and self._thread == threading.get_ident()

    @interleaving.setter
    def interleaving(self, under_way: bool) -> None:
        self._thread = threading.get_ident() if under_way else None

    def __enter__(self) -> Interleaver:
        self.skipped.clear()
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        """End the run as nnsight does, and let go of the frames of a stopped one.

        Those that pass a stop on hold it in a variable, so that they and their tensors would wait for the collector.
        """
        stopped = super().__exit__(kind, error, traceback)
        if stopped:
            error.__traceback__ = None
            error.__dict__.clear()
        return stopped

    def cancel(self) -> None:
        """Drop the workers as nnsight does, and with them what they were served: an edit's mediator lives on."""
        mediators = self.mediators
        try:
            super().cancel()
        finally:
            for mediator in mediators:
                mediator.pending = None
                for name in (SERVED, LAST, "flush"):
                    mediator.__dict__.pop(name, None)

    def check_dangling_mediators(self) -> None:
        """End the blocks that still wait when the run is over, each with an error in words at its own line.

        Raises:
            SiteOrderError: for a place that the run had gone past, or never came to.
        """
        for mediator in self.mediators:
            if not mediator.alive:
                continue
            error, expected = dangling_unwind(mediator)
            if expected is None and mediator.pending.provider is not None:
                error = never_reached(mediator.pending.provider, self.skipped)
            line = users_frame(mediator.worker.gr_frame) if mediator.worker.gr_frame else None
            try:
                mediator.worker.throw(error)
            except BaseException as thrown:
                if expected is None or thrown is not error:
                    raise
                if line is None:
                    warnings.warn(expected, stacklevel=2)
                else:
                    warnings.warn_explicit(expected, UserWarning, line.f_code.co_filename, line.f_lineno)


def never_reached(location: str, skipped: Iterable[str]) -> SiteOrderError:
    """The error for a location that a block still waits for when the run is over.

    Args:
        location: as nnsight spells it.
        skipped: the paths of the modules that were skipped in the run.
    """
    place, _, value = location.rpartition(".")
    path = public_path(place or location)
    asked = path if value in ("output", "skip") else f"{path}.{value}" if place else location
    inside = next((above for above in skipped if location.startswith(f"{above}.")), None)
    if inside is not None:
        return SiteOrderError(within_skipped(asked, inside))
    return SiteOrderError(
        f"{asked} was asked for when the run had gone past it, or is not part of this run. Places are "
        f"served in execution order (`print(model)` shows it): ask for it earlier, or in an invoke "
        f"of its own"
    )
