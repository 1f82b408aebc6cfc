"""Lasting edits (``model.edit``) in a run that does not reach everything that they ask for.

nnsight runs each edit as a worker of every trace of its envoy, and a worker that still waits when the run is
over is an error. But an edit was not written for this run: where a run stops early, what would have come
later does not concern it, and the edit is ended without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from greenlet import GreenletExit, getcurrent


def waiting_edits(envoy: Any) -> Iterator[str]:
    """In a trace of ``envoy``: the location that each of its edits waits for."""
    for edit in envoy._edits:
        if edit.alive and edit.pending is not None and edit.pending.provider is not None:
            yield edit.pending.provider


def is_edited(envoy: Any) -> bool:
    """In a trace of ``envoy``: whether an edit of it is not over yet."""
    return any(edit.alive for edit in envoy._edits)


def let_edits_go(envoy: Any) -> None:
    """In a trace of ``envoy`` that is about to stop: end every edit of it that still waits for something."""
    for edit in envoy._edits:
        if edit.alive:
            edit.worker.parent = getcurrent()
            edit.worker.throw(GreenletExit)
            edit.pending = None
