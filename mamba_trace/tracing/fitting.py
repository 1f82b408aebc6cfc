"""What a user gives for a place, checked against what the run has there, and brought to its device."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import Tensor

from ..errors import SiteValueError
from ..names import public_path
from ..sites import describe_axes
from . import skip_module


def skip(envoy: Envoy, replacement: Any, axes: str = "BLD") -> None:
    """Skip a module.

    Args:
        envoy: of the module.
        replacement: what stands for its output.
        axes: the axis letters of its input and its output, where these are of one shape; else ``""``.
    """

    def fitted(current: Tensor) -> Tensor:
        found: Any = type(replacement).__name__
        if isinstance(replacement, Tensor):
            same = replacement.shape == current.shape if axes else replacement.shape[:1] == current.shape[:1]
            if same and replacement.is_floating_point():
                return moved(public_path(envoy.path), replacement, current)
            found = f"{tuple(replacement.shape)} of {replacement.dtype}"
        path = public_path(envoy.path)
        shape = f"shape {tuple(current.shape)} {describe_axes(axes)}" if axes else f"{len(current)} rows"
        raise SiteValueError(
            f"{path}.skip(...) takes what stands for the output of {path}, a floating tensor of {shape}, "
            f"not {found}"
        )

    skip_module(envoy, fitted)


def fit(path: str, axes: str, value: Any, current: Any) -> Tensor:
    """An assigned value, checked against the one it replaces and cast to its dtype and device.

    Args:
        path: the site, for messages.
        axes: its axis letters; ``""`` where they have no names.
        value: what the user assigned.
        current: what the run has there.

    Raises:
        SiteValueError: if ``value`` is no tensor, has another shape, or is not floating while ``current`` is.
    """
    shape = f"{tuple(current.shape)}" + (f" {describe_axes(axes)}" if axes else "")
    if not isinstance(value, Tensor):
        raise SiteValueError(
            f"{path} takes a tensor of shape {shape}, not a {type(value).__name__}. To fill it with a "
            f"number, write {path}.output[:] = ...; of an array or a list make a tensor, torch.as_tensor(...)"
        )
    if value.shape != current.shape:
        raise SiteValueError(
            f"{path} takes shape {shape}, not {tuple(value.shape)}. "
            f"To replace a part of it, assign to a slice: {path}.output[:, ...] = ..."
        )
    if not value.is_floating_point():
        raise SiteValueError(
            f"{path} takes a floating tensor such as {current.dtype}, not {value.dtype}: use .float()"
        )
    # A copy: the run's value may be edited in place later, and this tensor is the user's own.
    return moved(path, value, current).to(dtype=current.dtype, copy=True)


def fit_input(path: str, value: Any, current: Any) -> Any:
    """A value assigned to an input, checked against the one it replaces.

    Its sizes may differ: a final norm that gets the last position alone computes no other.

    Args:
        path: the module, for messages.
        value: what the user assigned.
        current: what the run has there; what is no tensor is replaced as it is.

    Raises:
        SiteValueError: if ``value`` is no tensor, has another number of axes, or another kind of numbers.
    """
    if not isinstance(current, Tensor):
        return value
    kind = "floating" if current.is_floating_point() else "integer"
    fits = isinstance(value, Tensor) and value.dim() == current.dim()
    if not fits or value.is_floating_point() != current.is_floating_point():
        found = (
            f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise SiteValueError(
            f"{path}.input takes {'an' if kind == 'integer' else 'a'} {kind} tensor such as that of the run, "
            f"{tuple(current.shape)} of {current.dtype}, with as many axes, not {found}"
        )
    return moved(f"the input of {path}", value, current)


def moved(path: str, value: Any, current: Any) -> Any:
    """An assigned value on the device of the one it replaces.

    Args:
        path: the place, for messages.
        value: what the user assigned; what is no tensor is left to the model.
        current: what the run has there.

    Raises:
        SiteValueError: for a tensor that holds no numbers.
    """
    if not (isinstance(value, Tensor) and isinstance(current, Tensor)) or value.device == current.device:
        return value
    if value.is_meta:
        raise SiteValueError(
            f"{path} was given a tensor on the meta device, which holds no numbers; in this run it is on "
            f"{current.device}"
        )
    return value.to(current.device)
