"""Tensors of a run that outlive it: the values of a cache, and the gradients that hooks return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import SiteValueError
from .hooks import Hook


def copied(value: Tensor, device: Any) -> Tensor:
    """A detached copy for a cache, on ``device`` if it is given, that no later edit of ``value`` reaches."""
    return value.detach().to(value.device if device is None else device, copy=True)


def checked_gradient(returned: Any, gradient: Tensor, hook: Hook) -> Tensor:
    """The gradient that a backward hook returned, alone or in a tuple of one. Raises `SiteValueError`."""
    if isinstance(returned, tuple) and len(returned) == 1:
        returned = returned[0]
    if not isinstance(returned, Tensor) or returned.shape != gradient.shape:
        got = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise SiteValueError(
            f"the backward hook on {hook.name} takes the place of a gradient of shape "
            f"{tuple(gradient.shape)}, and returned {got}"
        )
    # A copy, since the next hook may edit it in place, and this tensor is the user's own.
    return returned if returned is gradient else returned.to(gradient, copy=True)
