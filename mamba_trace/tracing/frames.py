"""The user's line: where a warning or an error about the user's code should point.

A trace runs on two stacks. The worker's stack runs the body of the ``with``; the model's stack runs below the
end of that ``with``. If the user wrote the body, the user's line is on the worker's stack. If this package
wrote the body, as in `run_with_hooks`, the user's line is on the model's stack: the call that led to the
``with``.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType

from nnsight.schema.config import CONFIG
from nnsight.tracing.util import filter_traceback

#: Packages, besides this one, whose frames never hold the user's line.
INTERNAL = ("nnsight", "greenlet")
#: Packages whose frames may lie below the user's line when this package raises an error about it.
BELOW = (*INTERNAL, "torch", "transformers", "accelerate", "contextlib")
PACKAGE = Path(__file__).parents[1]


def users_frame(parked: FrameType) -> FrameType:
    """The frame of the user's line, given the innermost frame of a worker that waits."""
    worker = list(outwards(parked))
    in_the_body = next((frame for frame in worker if not is_internal(frame)), None)
    if in_the_body is not None:
        return in_the_body
    # This package wrote the body. The model runs inside the file of that body, so the user is further out.
    block = next((frame for frame in reversed(worker) if is_ours(frame)), parked)
    file = block.f_code.co_filename
    callers = itertools.dropwhile(lambda frame: frame.f_code.co_filename != file, outwards(sys._getframe()))
    return next((frame for frame in callers if not is_internal(frame)), block)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line."""
    frame = users_frame(sys._getframe())
    # Python's own filters for deprecations go by the module, of which the body of a trace knows no name.
    module = frame.f_globals.get("__name__") or frame.f_code.co_filename
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module)


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, its caller, the caller's caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_ours(frame: FrameType) -> bool:
    """Whether this package wrote a frame's code. The body of a trace has a file name but no module name."""
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def is_internal(frame: FrameType) -> bool:
    """Whether a frame belongs to this package, or to the packages that run its traces."""
    return _package(frame) in INTERNAL or is_ours(frame)


def up_to_the_user(traceback: TracebackType | None, caller: FrameType) -> TracebackType | None:
    """A traceback cut off after the last line that the user wrote, unless nnsight is in debug mode.

    Args:
        traceback: the traceback of an error of this package.
        caller: the frame in which the trace ends: the user's line if the traceback has none.
    """
    if CONFIG.APP.DEBUG:
        return traceback
    frames = [frame for frame, _ in walk_tb(traceback)]
    below = set(itertools.takewhile(_is_below, frames[::-1]))
    if not below.issuperset(frames) or is_internal(caller):
        return filter_traceback(traceback, lambda frame: frame not in below)
    return TracebackType(None, caller, caller.f_lasti, caller.f_lineno)


def _is_below(frame: FrameType) -> bool:
    return is_internal(frame) or _package(frame) in BELOW


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
