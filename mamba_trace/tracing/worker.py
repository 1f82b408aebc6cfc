"""The worker's side of a trace: code that runs where the user wrote it, between two requests to the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.util import first_input
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import MambaTraceError, SiteOrderError, SiteValueError
from ..names import public_path
from .positions import CURSOR, EVERY_POSITION, rows_of
from .visit import CALL_MASK, FIRST_LENGTH, LOCATIONS, READING

#: The name under which a worker keeps the path that it asked for last.
LAST = "_mamba_trace_last"


#: The interleaver of the trace that is read or run here; a worker has a context of its own.
TRACE: ContextVar[Any] = ContextVar("TRACE", default=None)

# `errors` says why it cannot name this base itself.
SiteOrderError.__bases__ = (MambaTraceError, OutOfOrderError)


def worker_at(location: str) -> Mediator:
    """The worker that asks for a location. Raises `SiteValueError` if no worker is running."""
    path = public_path(location)
    why = f"Cannot access `{path}` outside of interleaving: it has a value only while the model runs, in the body of"
    return worker_for(path, f"{why} `with model.trace(...)`")


def need_a_trace(what: str) -> None:
    """Raises `SiteValueError` outside of a trace: ``what``, a function's name, edits the running trace."""
    worker_for(what, f"{what} edits a run: call it inside `with model.trace(...)`")


def worker_for(what: str, why: str) -> Mediator:
    """The worker that is running.

    Args:
        what: the user asks for or calls.
        why: the message where no trace is under way at all.

    Raises:
        SiteValueError: if no worker is running. In a trace without a prompt the body runs before the model does, to
            collect the invokes, so that only their bodies are workers.
    """
    try:
        return Mediator.current(what)
    except ValueError:
        trace = TRACE.get()
        if trace is not None and not trace.interleaving:
            raise SiteValueError(
                f"{what}: this trace has no prompt, so nothing runs here that could have a value. Give it one, "
                f"`with model.trace(prompt):`, or ask in the body of an invoke, `with tracer.invoke(prompt):`"
            ) from None
        raise SiteValueError(why) from None


# -- the order of requests -----------------------------------------------------------------------------------


def expect(location: str) -> None:
    """Refuse at once, at the user's line, a location that this run has already gone past.

    Raises:
        SiteOrderError: if it can no longer be served.
    """
    mediator = worker_at(location)
    path, last = public_path(location), mediator.__dict__.get(LAST)
    if _passed(mediator, location):
        if (skipped := _skipped_around(mediator, location)) is not None:
            raise SiteOrderError(within_skipped(path, skipped))
        after = f" before {last}, which this block has already asked for" if last else ""
        raise SiteOrderError(
            f"{path} was already computed in this run. Sites are served in execution order: ask for "
            f"{path}{after} (`print(model)` shows the order), or in an invoke of its own"
        )
    mediator.__dict__[LAST] = path


def _passed(mediator: Mediator, location: str) -> bool:
    # Inside a step of `tracer.iter`, a worker that was served something asks for the next visit of whatever
    # it names. If that visit is later than the one it was served at, this step's visit is over.
    occurrence, served = mediator.occurrence(location), mediator.pending
    if mediator.iteration == 0:
        return occurrence > 0
    if mediator.iteration is not None or served is None or served.iteration is None:
        return False
    return occurrence > served.iteration


def _skipped_around(mediator: Mediator, location: str) -> str | None:
    # The module around a location whose last visit was skipped.
    for above, visit in getattr(mediator.interleaver, "skipped", {}).items():
        inside = location.startswith(f"{above}.") and location != f"{above}.output"
        if inside and mediator.occurrence(f"{above}.input") == visit:
            return str(above)
    return None


def within_skipped(asked: str, skipped: str) -> str:
    """The message for a place inside a module that was skipped.

    Args:
        asked: the place's public path.
        skipped: the module's path as nnsight spells it.
    """
    return (
        f"{asked} was never computed in this run, in which {public_path(skipped)} was skipped: ask for "
        f"{public_path(skipped)}.output, or do not skip it"
    )


def expect_position(site: Any, position: int) -> None:
    """Set the visit count of ``h[position]`` as nnsight would have kept it, then `expect` the position.

    Args:
        site: the envoy of the site with positions.
        position: as the user wrote it; a negative position counts from the end.

    Raises:
        SiteOrderError: if the state has already moved past this position.
    """
    whole, location = f"{site.path}.output", f"{site.path}.{position}.output"
    mediator = worker_at(location)
    counts = site.interleaver.counts
    cursor = _cursor(site)
    passed = False
    if cursor is not None:
        reached, length = cursor
        passed = -length <= position < length and position % length < reached
    counts[location] = counts.get(whole, 0) + passed
    mediator.counts_at_start[location] = mediator.counts_at_start.get(whole, 0)
    expect(location)


def _cursor(site: Any) -> tuple[int, int] | None:
    # The next position and the number of positions of the pass over a site that is running, if there is one.
    cursor = site._module.__dict__.get(CURSOR)
    return None if cursor is None or cursor[0] is not site.interleaver else cursor[1:]


# -- the forward call that the worker is in ------------------------------------------------------------------


def mask_of_call(length: int) -> Tensor | None:
    """The attention mask [B,L] of the running forward call, for the rows of the running worker's invoke.

    Args:
        length: L of the call; a mask may also cover earlier tokens, which are in a cache.
    """
    mediator = Mediator.current("attention_mask")
    mask = getattr(mediator.interleaver, "__dict__", {}).get(CALL_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or isinstance(mask, FakeTensor) or mask.is_meta:
        return None
    return rows_of(mediator, mask)[:, -length:] != 0


def length_of_call(site: Any) -> int:
    """The number of positions of the forward call that the running worker is in.

    In a later step of ``tracer.iter`` the worker waits for the first state of that step to find out.

    Args:
        site: the envoy of the site with positions.

    Raises:
        SiteOrderError: if the run has gone past the first position of that step.
        SiteValueError: if the forward call is in another process.
    """
    mediator = worker_at(f"{site.path}.output")
    first = site.interleaver.__dict__.get(FIRST_LENGTH)
    if mediator.iteration == 0 and first is not None:
        return int(first)
    expect_position(site, 0)
    Mediator.value(f"{site.path}.0.output")
    cursor = _cursor(site)
    if cursor is None:
        path = public_path(site.path)
        raise SiteValueError(
            f"{path}: how many positions this call has is not known here; write `for p in range(n): ...{path}[p]`"
        )
    return cursor[1]


# -- how the worker uses what it asks for --------------------------------------------------------------------


def ask_every_position(asking: bool) -> None:
    """Say whether the running worker goes through every position of ``h``, padding included."""
    Mediator.current("h").__dict__[EVERY_POSITION] = asking


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Say that the running worker only reads what it asks for in this ``with``, and edits none of it."""
    mediator = Mediator.current("reading")
    mediator.__dict__[READING] = True
    try:
        yield
    finally:
        del mediator.__dict__[READING]


def skip_module(envoy: Any, replacement: Callable[[Any], Any]) -> None:
    """Skip the module of ``envoy``: nnsight's ``Envoy.skip``, even where a submodule hides that method.

    Args:
        envoy: the envoy of a block or a mixer.
        replacement: turns the module's input, once the run gets there, into a stand-in for its output.

    Raises:
        SiteOrderError: if the run has gone past the module.
    """
    path, location = public_path(envoy.path), f"{envoy.path}.input"
    mediator = worker_at(path)
    if _passed(mediator, location):
        raise SiteOrderError(
            f"{path} was already computed in this run, so it can no longer be skipped: skip it before "
            f"asking for anything that comes after its input"
        )
    args, kwargs = Mediator.value(location)
    Mediator.skip(f"{envoy.path}.skip", replacement(first_input(args, kwargs)))
    visits = mediator.occurrence(location)
    getattr(envoy.interleaver, "skipped", {})[envoy.path] = visits
    # Everything below a skipped module counts as visited, so that the next step is not taken for this one.
    counts = envoy.interleaver.counts
    for name, _ in envoy._module.named_modules(prefix=envoy.path):
        for below in (f"{name}.{key}" for key in LOCATIONS):
            if name != envoy.path:
                counts[below] = max(counts.get(below, 0), mediator.counts_at_start.get(below, 0) + visits)
