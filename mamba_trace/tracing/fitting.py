"""What a user gives for a value: checked against the run's own value, and brought to its device."""

from __future__ import annotations

from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from ..errors import SiteValueError
from ..names import public_path
from ..sites import describe_axes
from .worker import skip_module


def skip(envoy: Envoy, replacement: Any, axes: str = "", returned: int = 0) -> None:
    """Skip a module.

    Args:
        envoy: the module's.
        replacement: what stands in for its output.
        axes: the axis letters of its output, if its input has the same shape; else ``""``.
        returned: how many values the module returns in a tuple, of which the first is replaced; 0 for no tuple.
    """
    path = public_path(envoy.path)

    def fitted(current: Tensor) -> Any:
        check_dense(path, replacement)
        if isinstance(replacement, Tensor) and replacement.is_floating_point():
            same = replacement.shape == current.shape if axes else replacement.shape[:1] == current.shape[:1]
            if same:
                value = moved(path, replacement, current)
                if axes:  # an output like the input: of its dtype, and a copy, as an assigned value is
                    value = value.to(dtype=current.dtype, copy=True)
                return (value, *[None] * (returned - 1)) if returned else value
        shape = f"shape {tuple(current.shape)} {describe_axes(axes)}" if axes else f"{len(current)} rows"
        raise SiteValueError(
            f"{path}.skip(...) takes what stands for the output of {path}, a floating tensor of {shape}, "
            f"not {_described(replacement)}"
        )

    skip_module(envoy, fitted)


def fit(path: str, axes: str, value: Any, current: Any) -> Tensor:
    """An assigned value, checked against the value it replaces and cast to its dtype and device.

    Args:
        path: the site, for messages.
        axes: its axis letters; ``""`` if its axes have no names.
        value: what the user assigned.
        current: what the run has there.

    Raises:
        SiteValueError: if ``value`` is not a floating tensor of the same shape.
    """
    shape = f"{tuple(current.shape)}" + (f" {describe_axes(axes)}" if axes else "")
    if not isinstance(value, Tensor):
        raise SiteValueError(
            f"{path} takes a tensor of shape {shape}, not a {type(value).__name__}. To fill it with a "
            f"number, write {path}.output[:] = ...; of an array or a list make a tensor, torch.as_tensor(...)"
        )
    check_dense(path, value)
    if value.shape != current.shape:
        raise SiteValueError(
            f"{path} takes shape {shape}, not {tuple(value.shape)}. "
            f"To replace a part of it, assign to a slice: {path}.output[:, ...] = ..."
        )
    if not value.is_floating_point():
        raise SiteValueError(f"{path} takes a floating tensor such as {current.dtype}, not {value.dtype}: use .float()")
    # A copy: the run's value may be edited in place later, and this tensor is the user's own.
    return moved(path, value, current).to(dtype=current.dtype, copy=True)


def fit_input(path: str, value: Any, current: Any) -> Any:
    """A value assigned to an input, checked against the value it replaces.

    Its sizes may differ: a final norm that gets only the last position computes only that position.

    Args:
        path: the module, for messages.
        value: what the user assigned.
        current: what the run has there; if it is not a tensor, any value may replace it.

    Raises:
        SiteValueError: if ``value`` is no tensor, has another number of axes, or another kind of numbers.
    """
    if not isinstance(current, Tensor):
        return value
    check_dense(f"{path}.input", value)
    floating = current.is_floating_point()
    fits = isinstance(value, Tensor) and value.dim() == current.dim()
    if not fits or value.is_floating_point() != floating:
        raise SiteValueError(
            f"{path}.input takes {'a floating' if floating else 'an integer'} tensor such as that of the "
            f"run, {_described(current)}, with as many axes, not {_described(value)}"
        )
    return moved(f"the input of {path}", value, current)


def check_dense(path: str, value: Any) -> None:
    """Refuse a tensor whose numbers are not laid out one by one. Raises `SiteValueError`; ``path`` is its place."""
    if not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_nested):
        return
    how = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")
    dense = "torch.nested.to_padded_tensor(...)" if value.is_nested else ".to_dense()"
    raise SiteValueError(f"{path} takes a dense tensor, not one whose layout is {how}: use {dense}")


def moved(path: str, value: Any, current: Any) -> Any:
    """An assigned value on the device of the value it replaces; anything that is not a tensor as it is.

    A tensor of 8 bits, with which PyTorch does not compute, is given the dtype of the value it replaces.

    Raises:
        SiteValueError: for a tensor that holds no numbers; ``path`` is its place.
    """
    if not (isinstance(value, Tensor) and isinstance(current, Tensor)):
        return value
    if value.is_floating_point() and value.itemsize == 1:
        value = value.to(current.dtype)
    if value.device == current.device:
        return value
    if value.is_meta:
        raise SiteValueError(
            f"{path} was given a tensor on the meta device, which holds no numbers; in this run it is on "
            f"{current.device}"
        )
    return value.to(current.device)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
