"""The places of single positions, ``h[p]``: their locations, and what a user who asks for one is told.

``h[p]`` has a location of its own, ``<path of h>.<p>.output``, but no module. nnsight counts how often each
location was visited; to count the visit of each position in every pass would cost a loop over all tokens. So
no count is kept of a position: it is set to the count of its site ``h`` at the moment when somebody asks for
the position (`worker.expect_position`) or is served it (`Visit.next_position`).
"""

from __future__ import annotations

import functools
import re
import warnings

from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from ..errors import PositionError
from ..names import public_path
from ..sites import STATE
from .frames import users_frame
from .mask import told_of_padding

#: The name under which the module of ``h`` keeps how far the running pass over the positions has come:
#: (interleaver, next position, number of positions).
CURSOR = "_mamba_trace_cursor"

#: Set on a worker that reads every position, and so is not warned that some are padding.
EVERY_POSITION = "_mamba_trace_every_position"

#: The name under which a worker keeps the lines at which it has warned.
WARNED = "_mamba_trace_warned"


@functools.lru_cache(maxsize=4096)
def position_of(location: str, prefix: str) -> int | None:
    """The p of ``"<prefix><p>.output"``, or ``None`` for any other location."""
    if not location.startswith(prefix):
        return None
    match = re.fullmatch(r"(-?\d+)\.output", location[len(prefix) :])
    return None if match is None else int(match[1])


@functools.lru_cache(maxsize=4096)
def site_of_position(location: str) -> str | None:
    """The location of the site that a position belongs to, or ``None`` for any other location."""
    match = re.fullmatch(rf"(.+\.{STATE})\.-?\d+\.output", location)
    return None if match is None else f"{match[1]}.output"


def position_error(path: str, length: int) -> PositionError:
    """The error for a position outside a call of ``length`` positions."""
    return PositionError(
        f"{path}: this forward call has {length} position{'s' * (length != 1)}, so h[p] needs "
        f"{-length} <= p < {length}. Positions count the tokens of one call: every decode step of "
        f"generate has 1, which is h[0] or h[-1]"
    )


def warn_if_padded(mediator: Mediator, location: str, position: int, mask: Tensor | None) -> None:
    """Warn at the user's line, once for each line, if the position that a worker asks for may be padding.

    Args:
        mediator: the worker's.
        location: what it asks for.
        position: the column that it asks for.
        mask: the attention mask [B,L] of the call, if it has one.
    """
    if mask is None or mediator.__dict__.get(EVERY_POSITION):
        return
    told = told_of_padding(public_path(location), position, rows_of(mediator, mask))
    if told is None:
        return
    message = f"{told}. Where it is padding, the state is the one before it, and an edit has no effect"
    warned = mediator.__dict__.setdefault(WARNED, set())
    if mediator.worker is None:  # the worker is in NDIF's sandbox, another process
        if location not in warned:
            warned.add(location)
            to_sandbox(mediator, message)
        return
    frame = users_frame(mediator.worker.gr_frame)
    line = (frame.f_code.co_filename, frame.f_lineno)
    if line not in warned:
        warned.add(line)
        warnings.warn_explicit(message, UserWarning, *line)


def to_sandbox(mediator: Mediator, message: str) -> None:
    """Show a message to the user whose worker is in NDIF's sandbox, as a line of what the request prints."""
    tell = getattr(getattr(mediator, "driver", None), "_on_log", None)
    if tell is None:
        warnings.warn(message, UserWarning, stacklevel=3)
    else:
        tell(f"UserWarning: {message}")


def rows_of(mediator: Mediator, mask: Tensor) -> Tensor:
    """The rows of a mask [B,L] of the whole batch that belong to the invoke of a worker."""
    batcher = mediator.interleaver.batcher
    if batcher is None or not batcher.batching or mediator.batch_group is None or len(mask) != batcher.total:
        return mask
    first, size = mediator.batch_group
    return mask[first : first + size]
