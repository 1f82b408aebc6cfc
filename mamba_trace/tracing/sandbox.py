"""NDIF's sandbox, where a block runs in a process of its own and asks that of the model for every value.

There ndif 0.1.2 puts its own functions in the place of some of nnsight's. What is then missing is added here. A
worker makes a request without `Mediator.flush`, by which nnsight and `saving` finish what belongs to the value
before. After ``tracer.stop()`` the last word on the stopped run remains unread, and is taken for the end of the next
one; after an error in a block the other process waits for a request. A place that is asked for too late has an error
without its name. And values arrive without the graph that they come from, so that a gradient would be missing, or
zero: it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CodeType
from typing import Any

from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer

from ..errors import SiteValueError
from .one_run import never_reached

NO_GRADIENT = (
    "this server runs the request in a sandbox, where values have no gradients: ask it with a key that it trusts, or "
    "run this without remote="
)


def in_sandbox(model: Any) -> bool:
    """Whether this process has the block and another one the model."""
    return hasattr(model.interleaver, "connection")


def flushed(event: Any) -> Any:
    """A worker's request, as the sandbox makes it, after what nnsight does before each.

    Args:
        event: the function of the class method ``Mediator.event``. The request raises `SiteValueError` for a
            gradient, and `SiteOrderError` for a place that the run had gone past.
    """

    def request(cls: type[Mediator], kind: Any, location: str, *rest: Any) -> Any:
        cls.current(location).flush()
        if location.partition(".")[0].isdigit():  # a tensor, of which only the gradient is asked for
            raise SiteValueError(f"a gradient was asked for, and {NO_GRADIENT}")
        try:
            return event(cls, kind, location, *rest)
        except OutOfOrderError:
            raise never_reached(location, ()) from None

    return request


_event = Mediator.event.__func__
if _event.__module__ != Mediator.__module__:  # ndif is imported first where it runs a block
    Mediator.event = classmethod(flushed(_event))


class HeardOut(InterleavingTracer):
    """A tracer after whose run the sandbox can begin another one, however it ended."""

    def execute(self, code: CodeType) -> None:
        """Run the block as nnsight does."""
        with heard_out(self.envoy.interleaver):
            super().execute(code)


@contextlib.contextmanager
def heard_out(interleaver: Any) -> Iterator[None]:
    """Read all that the model's process says of the runs that it is asked for in the ``with``.

    Each run is asked for by INTERLEAVE, and the last word on it is DONE. Where the block ends in an error, the run is
    stopped first.

    Args:
        interleaver: the model's; in the sandbox it has a ``connection`` to the other process.
    """
    connection = getattr(interleaver, "connection", None)
    if connection is None:
        yield
        return
    send, receive, owed = connection.send, connection.recv, 0

    def sending(event: str, *values: Any, **named: Any) -> None:
        nonlocal owed
        send(event, *values, **named)
        owed += event == "INTERLEAVE"

    def receiving(*args: Any) -> Any:
        nonlocal owed
        message = receive(*args)
        owed -= message[0] == "DONE"
        return message

    connection.send, connection.recv = sending, receiving

    def hear() -> None:
        while owed:
            receiving()

    try:
        yield
        hear()
    except Exception:
        with contextlib.suppress(OSError):  # the other process has ended
            if owed:
                send("STOP")
            hear()
        raise
    finally:
        connection.send, connection.recv = send, receive
