"""The user's line: where a warning or an error about the user's code should point.

A trace runs on two stacks. The worker's stack runs the body of the ``with``; the model's stack runs below the
end of that ``with``. If the user wrote the body, the user's line is on the worker's stack. If this package
wrote the body, as in `run_with_hooks`, the user's line is on the model's stack: the call that led to the
``with``.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from nnsight.schema.config import CONFIG
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import filter_traceback

from ..errors import MambaTraceError

#: Packages, besides this one, whose frames never hold the user's line.
INTERNAL = ("nnsight", "greenlet")
#: Packages whose frames may lie below the user's line when this package raises an error about it.
BELOW = (*INTERNAL, "torch", "transformers", "accelerate", "contextlib")
PACKAGE = Path(__file__).parents[1]

P = ParamSpec("P")
T = TypeVar("T")


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


def warn_user(message: str, category: type[Warning] = UserWarning, frame: FrameType | None = None) -> None:
    """Warn at the user's line: that of ``frame``, or of the nearest frame that is the user's."""
    frame = frame or users_frame(sys._getframe())
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


def users_part(error: BaseException) -> TracebackType | None:
    """What the user should see of the traceback of an error that ends a trace, unless nnsight is in debug mode.

    Between the line at which the trace ends and the user's lines in its body lies everything that ran the model,
    and none of it says anything about the mistake. Below the user's last line lies what it called: of an error
    of this package, how the mistake was found, which the message says; of any other error, where it was raised.
    An error that no line of the user's led to, such as one of a kernel, keeps its whole traceback.
    """
    traceback = error.__traceback__
    if CONFIG.APP.DEBUG:
        return traceback
    frames = [frame for frame, _ in walk_tb(traceback)]
    users = [number for number, frame in enumerate(frames) if not _is_below(frame)]
    about_the_user = isinstance(error, MambaTraceError)
    if not users:
        return None if about_the_user else traceback
    kept = {frames[number] for number in users}
    if not about_the_user:
        kept.update(frames[users[-1] :])
    return filter_traceback(traceback, lambda frame: frame in kept)


def users_errors(function: Callable[P, T]) -> Callable[P, T]:
    """A function that is called outside of traces, whose errors have the traceback that the user should see.

    For functions that call what the user wrote, such as a hook or a metric.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            error.__traceback__ = users_part(error)
            raise  # which adds no frame to it, unlike `raise error`

    return wrapper


class UsersErrors(Tracer):
    """A tracer whose errors have the traceback that the user should see, in a script and in a notebook."""

    @users_errors
    def __exit__(self, *raised: Any) -> bool:
        return super().__exit__(*raised)


def _is_below(frame: FrameType) -> bool:
    return is_internal(frame) or _package(frame) in BELOW


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
