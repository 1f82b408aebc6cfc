"""The worker's side: code that runs inside a trace, where the user wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.util import first_input
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import MambaTraceError, SiteValueError
from ..names import public_path
from .saving import assigned as note_assignment
from .visit import CALL_MASK, CURSOR, EVERY_POSITION, FIRST_LENGTH, LOCATIONS, READING, rows_of


class SiteOrderError(MambaTraceError, OutOfOrderError):
    """A site was asked for after the run had gone past it."""


def worker_at(location: str) -> Mediator:
    """The worker that asks for a location. Raises `SiteValueError` where none runs."""
    path = public_path(location)
    try:
        return Mediator.current(path)
    except ValueError as error:
        raise SiteValueError(
            f"{error}: it has a value only while the model runs, in the body of `with model.trace(...)`"
        ) from None


def expect(location: str) -> None:
    """Refuse at once, at the user's line, a location that this run has already gone past.

    Raises:
        SiteOrderError: if it can no longer be served.
    """
    mediator = worker_at(location)
    path, last = public_path(location), getattr(mediator, "_mamba_trace_last", None)
    if _passed(mediator, location):
        if (skipped := _skipped_around(mediator, location)) is not None:
            raise SiteOrderError(within_skipped(path, skipped))
        after = f" before {last}, which this block has already asked for" if last else ""
        raise SiteOrderError(
            f"{path} was already computed in this run. Sites are served in execution order: ask for "
            f"{path}{after} (`mamba-trace sites` prints the order), or in an invoke of its own"
        )
    mediator._mamba_trace_last = path


def _skipped_around(mediator: Mediator, location: str) -> str | None:
    # The module above a location whose last visit was skipped.
    for above, visit in getattr(mediator.interleaver, "skipped", {}).items():
        inside = location.startswith(f"{above}.") and location != f"{above}.output"
        if inside and mediator.occurrence(f"{above}.input") == visit:
            return str(above)
    return None


def within_skipped(asked: str, skipped: str) -> str:
    """What to say of a place, by its public path, inside of a module that was skipped, by its location."""
    return (
        f"{asked} was never computed in this run, in which {public_path(skipped)} was skipped: ask for "
        f"{public_path(skipped)}.output, or do not skip it"
    )


def _passed(mediator: Mediator, location: str) -> bool:
    # Inside a step of `tracer.iter` a worker that was served once asks for the next visit of whatever it
    # names: one later than the visit it was served at means that this step's is gone.
    occurrence, served = mediator.occurrence(location), mediator.pending
    if mediator.iteration == 0:
        return occurrence > 0
    if mediator.iteration is not None or served is None or served.iteration is None:
        return False
    return occurrence > served.iteration


def expect_position(site: Any, position: int) -> None:
    """Set the visit count of ``h[position]`` as nnsight would have kept it, then `expect` it.

    Args:
        site: the envoy of the site with positions.
        position: as the user wrote it; negative counts from the end.

    Raises:
        SiteOrderError: if the state has already moved past this position.
    """
    whole, location = f"{site.path}.output", f"{site.path}.{position}.output"
    mediator = worker_at(location)
    counts = site.interleaver.counts
    cursor = site._module.__dict__.get(CURSOR)
    passed = False
    if cursor is not None and cursor[0] is site.interleaver:
        _, reached, length = cursor
        passed = -length <= position < length and position % length < reached
    counts[location] = counts.get(whole, 0) + passed
    mediator.counts_at_start[location] = mediator.counts_at_start.get(whole, 0)
    expect(location)


def assigned(location: str) -> None:
    """Note that the running worker has assigned a value to a location that it may hold an earlier one of."""
    note_assignment(Mediator.current(location))


def mask_of_call(length: int) -> Tensor | None:
    """The attention mask [B,L] of the running forward call, of the rows of the running worker's invoke.

    Args:
        length: L of the call; a mask may cover tokens in a cache too, before these.
    """
    mediator = Mediator.current("attention_mask")
    mask = getattr(mediator.interleaver, "__dict__", {}).get(CALL_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or isinstance(mask, FakeTensor) or mask.is_meta:
        return None
    return rows_of(mediator, mask)[:, -length:] != 0


def ask_every_position(asking: bool) -> None:
    """Say whether the running worker goes through every position of ``h`` and means none in particular."""
    Mediator.current("h").__dict__[EVERY_POSITION] = asking


def length_of_call(site: Any) -> int:
    """The number of positions of the forward call that the running worker is in.

    In a later step of ``tracer.iter`` it waits for the first state of that step to know.

    Args:
        site: the envoy of the site with positions.

    Raises:
        SiteOrderError: if the run has gone past the first position of that step.
        SiteValueError: where the forward call is in another process.
    """
    mediator = worker_at(f"{site.path}.output")
    first = site.interleaver.__dict__.get(FIRST_LENGTH)
    if mediator.iteration == 0 and first is not None:
        return int(first)
    expect_position(site, 0)
    current_value(f"{site.path}.0.output")
    cursor = site._module.__dict__.get(CURSOR)
    if cursor is None or cursor[0] is not site.interleaver:
        raise SiteValueError(
            f"{public_path(site.path)}: how many positions this call has is not known here; write "
            f"`for p in range(n): ...{public_path(site.path)}[p]`"
        )
    return int(cursor[2])


def current_value(location: str) -> Any:
    """The value at a location, as the running worker sees it."""
    return Mediator.value(location)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What the running worker asks for in here it only reads, so that nothing looks for an edit of it."""
    mediator = Mediator.current("reading")
    mediator.__dict__[READING] = True
    try:
        yield
    finally:
        del mediator.__dict__[READING]


def skip_module(envoy: Any, replacement: Callable[[Any], Any]) -> None:
    """Skip the module of ``envoy``: nnsight's ``Envoy.skip``, also where a submodule hides the method.

    Args:
        envoy: of a block or a mixer.
        replacement: given the module's input when the run gets there, what stands for its output.

    Raises:
        SiteOrderError: if the run has gone past it.
    """
    path = public_path(envoy.path)
    if _passed(worker_at(path), f"{envoy.path}.input"):
        raise SiteOrderError(
            f"{path} was already computed in this run, so it can no longer be skipped: skip it before "
            f"asking for anything that comes after its input"
        )
    args, kwargs = Mediator.value(f"{envoy.path}.input")
    Mediator.skip(f"{envoy.path}.skip", replacement(first_input(args, kwargs)))
    getattr(envoy.interleaver, "skipped", {})[envoy.path] = Mediator.current(path).occurrence(
        f"{envoy.path}.input"
    )
    _count_below(envoy)


def _count_below(envoy: Any) -> None:
    # What lies below a module that is skipped has its visit, too, so that a later step is not taken for this.
    mediator = Mediator.current(envoy.path)
    counts, visits = envoy.interleaver.counts, mediator.occurrence(f"{envoy.path}.input")
    for name, _ in envoy._module.named_modules(prefix=envoy.path):
        for location in (f"{name}.{key}" for key in LOCATIONS):
            if name != envoy.path:
                start = mediator.counts_at_start.get(location, 0)
                counts[location] = max(counts.get(location, 0), start + visits)


def need_a_trace(what: str) -> None:
    """Raises `SiteValueError` where ``what``, a function's name, edits a run and there is none."""
    try:
        Mediator.current(what)
    except ValueError:
        raise SiteValueError(f"{what} edits a run: call it inside `with model.trace(...)`") from None
