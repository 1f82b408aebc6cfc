"""Lasting edits (``model.edit``) in a run that does not come to all that they ask for.

nnsight runs each edit as a worker of every trace of its envoy, and a worker that still waits when the run is
over is an error. An edit was not written for this run, though: where a run stops early, what lies behind
does not concern it, and the edit is let go.
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


def let_edits_go(envoy: Any) -> None:
    """In a trace of ``envoy`` that is about to stop: end every edit of it that still waits for something."""
    for edit in envoy._edits:
        if edit.alive:
            edit.worker.parent = getcurrent()
            edit.worker.throw(GreenletExit)
            edit.pending = None
