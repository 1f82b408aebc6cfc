"""Which kernels really ran: a note of every call, for those who record them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        function: the name of the function of `reference` that was computed, e.g. ``"gated_scan"``.
        backend: the name of the backend that computed it, e.g. ``"cpu"``.
        positions: how many positions the call ran over.
    """

    function: str
    backend: str
    positions: int


_listening: ContextVar[list[Call] | None] = ContextVar("mamba_trace_calls", default=None)


@contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    """Append a note to ``calls`` for every call made in the ``with`` block."""
    token = _listening.set(calls)
    try:
        yield
    finally:
        _listening.reset(token)


def note(function: str, backend: str, positions: int) -> None:
    """Note a call, if calls are being recorded."""
    calls = _listening.get()
    if calls is not None:
        calls.append(Call(function, backend, positions))
