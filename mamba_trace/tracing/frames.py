"""A warning or an error about what a user wrote belongs at the user's line.

A trace runs in two stacks: the worker's, which is the body of the ``with``, and the model's, which is below
the end of that ``with``. A body that a user wrote has the line in the first. Where this package wrote it, as
in `run_with_hooks`, the line is in the second: the call that came to that ``with``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from nnsight.schema.config import CONFIG

#: Packages, besides this one, whose frames are no user's.
INTERNAL = ("nnsight", "greenlet")
#: Packages whose frames may lie below the user's line when this one refuses what it says.
BELOW = (*INTERNAL, "torch", "transformers", "accelerate", "contextlib")
PACKAGE = Path(__file__).parents[1]


def users_frame(parked: FrameType) -> FrameType:
    """The user's line: where the worker is parked, or the call whose trace this package wrote itself.

    Args:
        parked: the innermost frame of a worker.
    """
    worker = list(outwards(parked))
    users = next((frame for frame in worker if not is_internal(frame)), None)
    if users is not None:
        return users
    # The model runs below the `with` of the worker's block, so further out than this is its file.
    block = next((frame for frame in reversed(worker) if is_ours(frame)), parked)
    file = block.f_code.co_filename
    below = itertools.dropwhile(lambda frame: frame.f_code.co_filename != file, outwards(sys._getframe()))
    return next((frame for frame in below if not is_internal(frame)), block)


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, the one that called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_ours(frame: FrameType) -> bool:
    """Whether a frame is of this package. The body of a trace knows its file, and no name of its module."""
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def is_internal(frame: FrameType) -> bool:
    """Whether a frame is of this package or of what runs its traces."""
    return frame.f_globals.get("__name__", "").split(".")[0] in INTERNAL or is_ours(frame)


def up_to_the_user(traceback: TracebackType | None, caller: FrameType) -> TracebackType | None:
    """A traceback without what lies below the last line that a user wrote; ``caller``'s where it has none.

    In nnsight's debug mode it is left as it is.

    Args:
        traceback: of an error of this package.
        caller: the frame that a trace ends in.
    """
    if CONFIG.APP.DEBUG:
        return traceback
    entries = []
    while traceback is not None:
        entries.append((traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno))
        traceback = traceback.tb_next
    while entries and _is_below(entries[-1][0]):
        entries.pop()
    if not entries and not is_internal(caller):
        entries = [(caller, caller.f_lasti, caller.f_lineno)]
    shortened = None
    for frame, instruction, line in reversed(entries):
        shortened = TracebackType(shortened, frame, instruction, line)
    return shortened


def _is_below(frame: FrameType) -> bool:
    return is_internal(frame) or frame.f_globals.get("__name__", "").split(".")[0] in BELOW
