"""Python values as JSON and back, equal to the last bit.

JSON has no tensors, and strictly speaking no nan and no infinity, which other programs than Python refuse. So
what JSON lacks is an object with one key that says what it is: a tensor, a dict, or such a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError

TENSOR, DICT, FLOAT = "tensor", "dict", "float"


def encoded(value: Any, name: str, tensor: Callable[[str, Tensor], Any]) -> Any:
    """A field's value as JSON.

    Args:
        value: the value.
        name: the field's, for messages; entries of lists and dicts are called ``name.entry``.
        tensor: takes the name of a tensor and the tensor, and returns the JSON that stands for it.

    Raises:
        FileError: if a value is of another type than those that come back as they were.
    """
    if isinstance(value, Tensor):
        return {TENSOR: tensor(name, value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {FLOAT: repr(value)}
    if type(value) is list:
        return [encoded(one, f"{name}.{index}", tensor) for index, one in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {DICT: {key: encoded(one, f"{name}.{key}", tensor) for key, one in value.items()}}
    raise FileError(
        f"{name} is a {type(value).__name__}, which does not come back from a file as it was: a result holds "
        f"tensors, str, int, float, bool, None, and lists and dicts (with str keys) of these"
    )


def decoded(content: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """The value that `encoded` took.

    Args:
        content: JSON.
        tensor: takes the JSON that stands for a tensor.
    """
    if isinstance(content, list):
        return [decoded(one, tensor) for one in content]
    if not isinstance(content, dict):
        return content
    ((kind, inside),) = content.items()
    if kind == DICT:
        return {key: decoded(one, tensor) for key, one in inside.items()}
    if kind == FLOAT:
        return float(inside)
    if kind == TENSOR:
        return tensor(inside)
    raise ValueError(f"{kind!r} is none of {TENSOR}, {DICT}, {FLOAT}")


def tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    """``{"dtype": "float32", "shape": [2, 3], "values": [[...], [...]]}``.

    Every floating number is that of Python's that equals it, so that it comes back exactly; nan and the
    infinities are strings. A complex number is the pair of its parts.
    """
    values = tensor.detach().cpu()
    numbers = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    if numbers.is_floating_point():
        numbers = numbers.double()  # exact, and defined for the dtypes of 8 bits, too
    content = numbers.tolist()
    if numbers.is_floating_point() and not numbers.isfinite().all():
        content = strings_for_infinities(content)
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": [*tensor.shape], "values": content}


def tensor_from_json(content: Any) -> Tensor:
    """The tensor that `tensor_to_json` took, on the CPU."""
    dtype = getattr(torch, content["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{content['dtype']} is no dtype")
    shape = content["shape"]
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.tensor(content["values"], dtype=dtype, device="cpu").reshape(shape)
    numbers = torch.tensor(numbers_for_strings(content["values"]), dtype=torch.float64, device="cpu")
    if not dtype.is_complex:
        return numbers.to(dtype).reshape(shape)
    parts = numbers.to(dtype.to_real()).reshape([*shape, 2])
    return torch.view_as_complex(parts)


def strings_for_infinities(values: Any) -> Any:
    """Nested lists of numbers, with ``"nan"``, ``"inf"`` and ``"-inf"`` in place of what JSON lacks."""
    if isinstance(values, list):
        return [strings_for_infinities(one) for one in values]
    return values if math.isfinite(values) else repr(values)


def numbers_for_strings(values: Any) -> Any:
    """The inverse of `strings_for_infinities`."""
    if isinstance(values, list):
        return [numbers_for_strings(one) for one in values]
    return float(values)
