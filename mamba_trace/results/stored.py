"""The data of a result as a file: ``.safetensors`` without loss, and ``.json`` for every other program.

A safetensors file holds the tensors, and in its metadata everything else as JSON. In a JSON file a tensor is
its dtype, its shape and nested lists of numbers; each number is written so that reading it gives the same
bits. JSON has no tensors, and strictly no nan and no infinity. What it lacks is written as an object with one
key that says what it is: a tensor, a dict, or such a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileError
from .files import replacing

#: The endings of the files that hold data.
SUFFIXES = (".json", ".safetensors")


def write_data(path: Path, content: dict[str, Any]) -> None:
    """Write values by name as the suffix says; `FileError` where one would not come back as it was."""
    if path.suffix == ".json":
        plain = {name: encoded(value, name, tensor_to_json) for name, value in content.items()}
        text = json.dumps(plain, allow_nan=False) + "\n"
        with replacing(path) as file:
            file.write_text(text, encoding="utf-8")
        return
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> str:
        tensors[name] = tensor.detach().cpu().clone().contiguous()  # the format allows no shared memory
        return name

    plain = {name: encoded(value, name, keep) for name, value in content.items()}
    with replacing(path) as file:
        try:
            save_file(tensors, file, {"result": json.dumps(plain, allow_nan=False)})
        except (SafetensorError, KeyError) as error:
            raise FileError(f"{path} cannot be written: {error}. Save the result as .json") from error


def read_data(path: Path) -> dict[str, Any]:
    """What `write_data` wrote, on the CPU; `FileError` for another file. It may be replaced afterwards."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return {name: decoded(value, tensor_from_json) for name, value in content.items()}
        path.open("rb").close()  # safetensors does not say why it cannot read a file; the system does
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["result"])
            return {name: decoded(value, lambda key: file.get_tensor(key).clone()) for name, value in content.items()}
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise FileError(f"{path} is no result that Result.save wrote: {error}") from error


def encoded(value: Any, name: str, tensor: Callable[[str, Tensor], Any]) -> Any:
    """A value as JSON; ``tensor`` takes a tensor's name and the tensor, and returns what stands for it.

    The entries of lists and dicts are called ``name.entry``. Raises `FileError` for a value of a type that
    would not come back as it was.
    """
    if isinstance(value, Tensor):
        return {"tensor": tensor(name, value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [encoded(item, f"{name}.{index}", tensor) for index, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encoded(item, f"{name}.{key}", tensor) for key, item in value.items()}}
    raise FileError(
        f"{name} is a {type(value).__name__}, which would not come back from a file as it was: a result "
        f"holds tensors, str, int, float, bool, None, and lists and dicts (with str keys) of these"
    )


def decoded(content: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """The value that `encoded` took; ``tensor`` makes a tensor of the JSON that stands for it."""
    if isinstance(content, list):
        return [decoded(item, tensor) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, inside),) = content.items()
    if kind == "dict":
        return {key: decoded(item, tensor) for key, item in inside.items()}
    if kind not in ("float", "tensor"):
        raise ValueError(f"{kind!r} is none of tensor, dict, float")
    return float(inside) if kind == "float" else tensor(inside)


def tensor_to_json(name: str, tensor: Tensor) -> dict[str, Any]:
    """``{"dtype": "float32", "shape": [2, 3], "values": [[...], [...]]}``.

    nan and the infinities become strings, a complex number the pair of its parts.
    """
    numbers = tensor.detach().cpu()
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    values = numbers.tolist()
    if numbers.is_floating_point():
        wide = numbers.double().numpy()  # exact, and defined for dtypes of 8 bits, too
        values = np.where(np.isfinite(wide), wide.astype(object), wide.astype(str)).tolist()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": [*tensor.shape], "values": values}


def tensor_from_json(content: Any) -> Tensor:
    """The tensor that `tensor_to_json` took, on the CPU."""
    dtype, shape = getattr(torch, content["dtype"]), content["shape"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{content['dtype']} is no dtype")
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.tensor(content["values"], dtype=dtype, device="cpu").reshape(shape)
    numbers = torch.from_numpy(np.array(content["values"], dtype=np.float64))
    if dtype.is_complex:
        return torch.view_as_complex(numbers.to(dtype.to_real()).reshape([*shape, 2]))
    return numbers.to(dtype).reshape(shape)
