"""Which kernels really ran, and which were passed over: a note of it, for those who record them."""

from __future__ import annotations

from collections.abc import Iterable
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


_listening: ContextVar[tuple[list[Call], list[str]] | None] = ContextVar("mamba_trace_calls", default=None)


class recording:
    """Append a note to ``calls`` for every call made in the ``with`` block, to ``reasons`` why it was no faster one."""

    def __init__(self, calls: list[Call], reasons: list[str] | None = None) -> None:
        self._listening = (calls, [] if reasons is None else reasons)

    def __enter__(self) -> None:
        self._token = _listening.set(self._listening)

    def __exit__(self, *_: object) -> None:
        _listening.reset(self._token)


def note(function: str, backend: str, positions: int) -> None:
    """Note a call, if calls are being recorded."""
    listening = _listening.get()
    if listening is not None:
        listening[0].append(Call(function, backend, positions))


def pass_over(reasons: Iterable[str]) -> None:
    """Note why faster backends did not run, each reason once, if calls are being recorded."""
    listening = _listening.get()
    if listening is not None:
        listening[1].extend(reason for reason in reasons if reason not in listening[1])
