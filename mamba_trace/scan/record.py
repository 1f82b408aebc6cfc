"""What a scan really ran on: a note of every call, for whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        function: what was computed: a function of `reference`, e.g. ``"gated_scan"``.
        backend: what computed it, e.g. ``"cpu"``.
        positions: how many positions it ran over.
    """

    function: str
    backend: str
    positions: int


_listening: ContextVar[list[Call] | None] = ContextVar("mamba_trace_calls", default=None)


@contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    """Append a note of every call made within to ``calls``."""
    token = _listening.set(calls)
    try:
        yield
    finally:
        _listening.reset(token)


def note(function: str, backend: str, positions: int) -> None:
    """Take note of a call, if somebody listens."""
    calls = _listening.get()
    if calls is not None:
        calls.append(Call(function, backend, positions))
