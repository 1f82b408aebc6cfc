"""Devices that are not there: tensors with real numbers that say they are on ``maia:0`` or ``maia:1``.

A model that is split over two GPUs fails where a value of one meets a value of the other, and a machine
without GPUs cannot show it. Here a tensor carries the name of its device, moves like any other, keeps it
through every operation and its gradient, and refuses to meet a tensor of another device, as CUDA's do. The
numbers are computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

#: A device type that PyTorch knows by name and has no support for.
KIND = "maia"
#: Operations whose tensors may be on several devices.
COPIES = ("aten.copy_.default",)
INDEXING = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")


class Placed(Tensor):
    """A tensor that is on ``place``, with its numbers in ``numbers``."""

    def __new__(cls, numbers: Tensor, place: torch.device | None = None, requires_grad: bool = False) -> Tensor:
        if place is None:  # accelerate makes a new parameter of the old one's class
            return nn.Parameter(numbers, requires_grad)
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=numbers.device,
        )

    def __init__(self, numbers: Tensor, place: torch.device | None = None, requires_grad: bool = False) -> None:
        if place is not None:
            self.numbers, self.place = numbers, place

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, Placed)}
        place = place_of(str(op), args, tensors)
        args, kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, Placed) else leaf, (args, kwargs))
        result = op(*args, **kwargs)
        target = kwargs.get("device")
        if place.type != KIND or (target is not None and torch.device(target).type == "meta"):
            return result

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return here[id(leaf)] if id(leaf) in here else Placed(leaf, place)

        return tree_map(placed, result)


def place_of(op: str, args: Any, tensors: list[Tensor]) -> torch.device:
    """Where the result of an operation is.

    Raises:
        RuntimeError: if its tensors are on several devices. Numbers without axes may be on the CPU.
    """
    if op in COPIES:
        return args[0].device
    if op in INDEXING:
        tensors = [tensor for tensor in tensors if tensor.dtype not in (torch.long, torch.bool)] or [args[0]]
    places = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, Placed)}
    if len(places) > 1:
        raise RuntimeError(f"{op}: tensors on {' and '.join(sorted(map(str, places)))}")
    return places.pop()


class Move(torch.autograd.Function):
    """A copy of a tensor on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, place: torch.device) -> Tensor:
        ctx.place = value.device
        numbers = (value.numbers if isinstance(value, Placed) else value).clone()
        return Placed(numbers, place) if place.type == KIND else numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Move.apply(grad, ctx.place), None


class StandInMode(TorchFunctionMode):
    """While it is entered, functions of PyTorch know the devices of this module."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class StandInDevices(StandInMode):
    """While it is entered, tensors can be made on and moved to the devices of this module."""

    def __enter__(self) -> StandInDevices:
        # PyTorch leaves a mode while it runs what the mode was asked about, such as a backward pass.
        self.run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        torch.autograd._engine_run_backward = self.in_this_mode  # type: ignore[attr-defined]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.autograd._engine_run_backward = self.run_backward  # type: ignore[attr-defined]

    def in_this_mode(self, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass, in which these devices are known too."""
        with StandInMode():
            return self.run_backward(*args, **kwargs)


def call(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function of PyTorch's, which may name one of these devices."""
    target = device_in(kwargs.get("device"))
    if func is Tensor.to:
        value, *rest = args
        if rest and isinstance(rest[0], Tensor):
            target, rest[0] = rest[0].device, rest[0].dtype
        elif rest and (named := device_in(rest[0])) is not None:
            target, rest = named, rest[1:]
        if target is not None and target.type != "meta" and KIND in (target.type, value.device.type):
            kwargs = {name: kwargs[name] for name in kwargs if name not in ("device", "non_blocking")}
            value = value if value.device == target else Move.apply(value, target)
            return value.to(*rest, **kwargs) if rest or kwargs else value
    elif func is Tensor.cpu and args[0].device.type == KIND:
        return Move.apply(args[0], torch.device("cpu"))
    elif func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], Placed):
        return func(args[0].numbers.detach(), *args[1:], **kwargs)
    elif target is not None and target.type == KIND:
        made = func(*args, **{**kwargs, "device": "cpu"})
        return Placed(made.numbers if isinstance(made, Placed) else made, target)
    return func(*args, **kwargs)


def move(module: nn.Module, place: str) -> nn.Module:
    """Move a module's parameters, tied ones together; ``module.to`` cannot, which swaps tensors in C++."""
    old = list(module.parameters())
    new = {id(parameter): nn.Parameter(parameter.detach().to(place)) for parameter in old}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else new[id(parameter)]
    return module


def device_in(argument: Any) -> torch.device | None:
    """The device that an argument names, if it names one."""
    return torch.device(argument) if isinstance(argument, (str, torch.device)) else None
