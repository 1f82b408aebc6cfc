"""Digests that tell one edit, one metric and one set of weights from another, the same in every process.

A folder of finished cells must never be taken for the answer to another question. Two metrics may have the
same name and the same value on both unpatched runs, as every normalised metric does, and so may two models.
So what a function does is part of the question: its instructions, its constants, and the numbers, strings and
tensors that it refers to.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.architectures import architecture_of, axis_sizes

PACKAGE = Path(__file__).parents[1]
#: Where folders say that this package's own metrics stand. It stays when the module moves, as folders do.
METRICS, METRICS_IN_FOLDERS = f"{__package__}.metrics", f"{PACKAGE.name}.metrics"
#: How many numbers of each weight are looked at, evenly spread.
SAMPLES = 4096
#: What a run depends on beside its weights: fields of a configuration, of those that have them.
SETTINGS = (
    "hidden_act",
    "layer_norm_epsilon",
    "mixer_rms_eps",
    "residual_in_fp32",
    "time_step_limit",
)
#: The fields of a configuration that no run of a hybrid depends on.
NO_SETTINGS = ("architectures", "dtype", "transformers_version", "use_cache", "_name_or_path")


def mark_of_code(code: CodeType, scope: Mapping[str, Any]) -> str:
    """A digest of a piece of code, and of what its names stand for in ``scope``."""
    return _digest(_Content().of_code(code, scope))


def mark_of_function(function: Any) -> str:
    """A digest of a function, or of any other object that can be called, such as a metric."""
    return _digest(_Content().of(function))


def mark_of_weights(model: nn.Module) -> str:
    """A digest of samples of each weight of a model; a weight on the meta device counts by its shape."""
    return _digest(_samples(model))


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another one that has weights of the same names and shapes, as JSON.

    Falcon-Mamba has the weights of a Mamba-1, and in Mamba-2 two groups of 5 numbers have as many as five of 2. What a
    hybrid computes depends on most fields of its configuration: multipliers, rotary embeddings, numbers of experts.
    """
    config: Any = model.config
    if architecture_of(model).hybrid:
        fields = {name: value for name, value in config.to_dict().items() if name not in NO_SETTINGS}
        return {name: str(value) for name, value in sorted(fields.items())}
    return axis_sizes(model) | {name: str(getattr(config, name)) for name in SETTINGS if hasattr(config, name)}


def qualified(function: Any) -> str:
    """The module and name of a function or class, or of the class of any other object."""
    named = hasattr(function, "__qualname__") and hasattr(function, "__module__")
    function = function if named else type(function)
    return f"{function.__module__}.{function.__qualname__}".replace(METRICS, METRICS_IN_FOLDERS)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _samples(model: nn.Module) -> Iterator[bytes]:
    for name, weight in model.named_parameters():
        yield f"{name} {tuple(weight.shape)} {weight.dtype}".encode()
        if not weight.is_meta and weight.numel():
            flat = weight.detach().flatten()
            yield _bytes(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES])


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class _Content:
    """What values hold, as bytes; each function and object once, since they may refer to themselves."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # by id, kept so that no id is given out again

    def of_code(self, code: CodeType, scope: Mapping[str, Any]) -> Iterator[bytes]:
        """The instructions and constants of code, and what its names stand for."""
        yield code.co_code
        yield " ".join(code.co_names).encode()
        for constant in code.co_consts:
            yield from self.of_code(constant, scope) if isinstance(constant, CodeType) else self.of(constant)
        for name in (*_looked_up(code), *code.co_freevars):
            try:
                value = scope[name]
            except KeyError:  # the code binds this name itself
                continue
            yield from self.of(value)

    def of(self, value: Any) -> Iterator[bytes]:
        """The contents of a value; the class of one that holds no numbers or strings."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            yield repr(value).encode()
        elif isinstance(value, Tensor):
            yield repr(tuple(value.shape)).encode() if value.is_meta else _bytes(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from self.of(part)
        elif isinstance(value, (set, frozenset)):
            yield repr(sorted(map(repr, value))).encode()
        elif isinstance(value, dict):
            for key, part in value.items():
                yield repr(key).encode()
                yield from self.of(part)
        else:
            yield from self._of_object(value)

    def _of_object(self, value: Any) -> Iterator[bytes]:
        yield qualified(value).encode() if not isinstance(value, FunctionType) else b"function"
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, FunctionType):
            yield from self.of_code(value.__code__, {**_referred(value), **_closure(value)})
            yield from self.of([value.__defaults__, value.__kwdefaults__])
        elif isinstance(value, MethodType):
            yield from self.of([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            yield from self.of([value.func, value.args, value.keywords])
        elif callable(value) and not isinstance(value, (type, nn.Module)):
            # An object's numbers may count its calls. What tells it from others is in its functions.
            own = {name: part for name, part in getattr(value, "__dict__", {}).items() if callable(part)}
            yield from self.of(own)
            yield from self.of(vars(type(value)).get("__call__"))


def _closure(function: FunctionType) -> dict[str, Any]:
    # The values of the names that a function takes from the function around it.
    values: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # the name is not bound yet
            values[name] = None
    return values


def _referred(function: FunctionType) -> dict[str, Any]:
    # The globals that a function of the user's refers to. Those of a library's function are its own affair.
    paths = sysconfig.get_paths()
    libraries = (paths["stdlib"], paths["purelib"], paths["platlib"])
    file = function.__code__.co_filename
    if Path(file).is_relative_to(PACKAGE) or file.startswith(libraries):
        return {}
    names = {name for code in _codes(function.__code__) for name in _looked_up(code)}
    return {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}


def _looked_up(code: CodeType) -> list[str]:
    # The names, in order, that code takes from around it. A name that it assigns there as well is its own
    # account, such as how often it was called.
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    own = {name for operation, name in steps if operation == "STORE_GLOBAL"}
    looked_up = [name for operation, name in steps if operation in ("LOAD_GLOBAL", "LOAD_NAME")]
    return [name for name in dict.fromkeys(looked_up) if name not in own]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
