"""A warning where a block of a trace gives a name that stands outside of it another value, and does not save that.

Only saved values leave a block, so after it the name has its old value again. In

    logits = clean_logits
    with model.trace(prompt):
        logits = model.lm_head.output

the second ``save()`` was forgotten, and what follows would go on with the clean logits. A name that is new in the
block needs no warning: Python raises NameError where it is read.

nnsight hands the values of a block over in ``push_result``; this module puts its own function in that place. It
changes nothing for models other than this package's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nnsight.intervention import tracer as nnsight_intervention
from nnsight.tracing import tracer as nnsight_tracer

from .frames import warn_user
from .served import local
from .views import tensors_of

_nnsight_push_result = nnsight_tracer.push_result


@contextmanager
def watched() -> Iterator[None]:
    """Warn of what the blocks of a trace that runs here leave behind."""
    before, local.watched = local.watched, True
    try:
        yield
    finally:
        local.watched = before


def push_result(frame: FrameType, variables: Mapping[str, Any]) -> None:
    """nnsight's ``push_result``, which hands over the values that a block has bound, with the warning."""
    if local.watched and getattr(nnsight_tracer._local, "depth", 0) == 1:
        outside, saved = frame.f_locals, nnsight_tracer._saves()
        lost = (name for name, value in variables.items() if id(value) not in saved)
        if names := sorted(name for name in lost if replaced(outside.get(name), variables[name])):
            warn(frame, names)
    _nnsight_push_result(frame, dict(variables))


def replaced(old: Any, new: Any) -> bool:
    """Whether a name that had one value of tensors has got another."""
    return old is not None and old is not new and bool(tensors_of(old)) and bool(tensors_of(new))


def warn(frame: FrameType, names: list[str]) -> None:
    """Warn at the line of the user's block."""
    what, whose = ", ".join(map(repr, names)), "their" if names[1:] else "its"
    message = (
        f"{what}: assigned in this trace and not saved, so after the trace {whose} old value is still there. To take "
        f"the new one out, write {names[0]} = ....save(); for a value that only the trace needs, use a name of its own"
    )
    warn_user(message, frame=frame)


nnsight_intervention.push_result = push_result
