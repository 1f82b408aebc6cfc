"""Running the compiled loops, and the scans as operators that PyTorch can differentiate and compile.

The loops of a scan are a module with ``FORWARD`` and ``BACKWARD`` (`BlockLayout`), ``forward`` and ``backward``
(kernels) and ``WIDTH``, the channels in a block: `selective` and `explicit` here, and those of `scan.dual`. It may have
``ENDS``: how many positions' time a block takes besides those that it runs.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..recompute import differentiated, gradients_of, in_memory
from . import team


@functools.cache
def kernels_in(module: str) -> Any:
    """A module of loops by its name, relative to this package. Importing it imports numba, which only a scan needs."""
    return importlib.import_module(module, __package__)


# -- what the kernels take and return ------------------------------------------------------------------------


def as_floats(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, with the last axis dense."""
    return [t if t.dtype == torch.float32 and t.stride(-1) == 1 else as_dense(t) for t in tensors]


def as_dense(tensor: Tensor) -> Tensor:
    """The tensor in float32 without gaps."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor  # without a call of PyTorch's dispatcher
    return tensor.to(torch.float32).contiguous()


def starting_state(x: Tensor, d_state: int, h: Tensor | None = None) -> Tensor:
    """The state to begin at [B,...,N], dense in float32: ``h``, or zeros, for x [B,L,...]."""
    if h is None:
        return x.new_zeros(x.shape[0], *x.shape[2:], d_state, dtype=torch.float32)
    return as_dense(h)


def ended_state(x: Tensor, d_state: int) -> Tensor:
    """Memory for the state after the last position [B,...,N], dense in float32, for x [B,L,...]."""
    return x.new_empty(x.shape[0], *x.shape[2:], d_state, dtype=torch.float32)


def _empty_results(x: Tensor, h: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    # Room for y [B,L,...], h_last [B,...,N] and the states: [B,L,...,N], or [B,0,...,N] if they are not kept.
    y, h_last = x.new_empty(x.shape), torch.empty_like(h, memory_format=torch.contiguous_format)
    return y, h_last, x.new_empty(x.shape[0], x.shape[1] if keep else 0, *h.shape[1:])


def _pieces(kernels: Any, inputs: dict[str, Tensor], **shares: int) -> int:
    batch, length, *heads, width = inputs["x"].shape
    blocks = batch * math.prod(heads) * -(-width // kernels.WIDTH)
    steps = (length + getattr(kernels, "ENDS", 0)) * -(-inputs["C"].shape[-1] // team.D_STATE)
    return team.pieces(blocks, steps, **shares)


# -- the scans as operators ----------------------------------------------------------------------------------


def run_forward(module: str, inputs: dict[str, Tensor], kernel: str = "forward", **others: Any) -> None:
    """Run a forward kernel of a module of loops.

    Args:
        module: its name, relative to this package.
        inputs: the arrays that it reads, by name.
        kernel: the kernel's name.
        **others: the numbers that it takes, and the arrays that it writes, by name.
    """
    kernels = kernels_in(module)
    run = getattr(kernels, kernel)
    buffers = run.layout.buffers
    for name, tensor in inputs.items():
        others[name] = tensor if tensor.is_contiguous() or buffers[name].without_gaps(tensor) else tensor.contiguous()
    team.run(run, _pieces(kernels, inputs), **others)


def _backward(module: str, inputs: dict[str, Tensor], **grads: Tensor) -> list[Tensor]:
    # The gradient of each input. The kernel leaves some of them to be summed over a further first axis.
    kernels = kernels_in(module)
    buffers = kernels.BACKWARD.buffers
    inputs = {name: as_dense(tensor) for name, tensor in inputs.items()}
    given = inputs | {name: as_dense(grad) for name, grad in grads.items()}
    if "states" in buffers:
        y, h_last, given["states"] = _empty_results(inputs["x"], inputs["h_start"], True)
        run_forward(module, inputs, keep=1, y=y, h_last=h_last, states=given["states"])
    x, count = inputs["x"], _pieces(kernels, inputs, shares=1)
    sizes = {"pieces": count}
    for name, tensor in inputs.items():
        sizes.update(zip(buffers[name].names, tensor.shape, strict=True))
    if hasattr(kernels, "summed"):
        sizes |= kernels.summed(sizes)
    results = {}
    for name, tensor in inputs.items():
        axes = buffers[f"g{name}"].names
        make = x.new_zeros if len(axes) > tensor.dim() else x.new_empty
        results[f"g{name}"] = make([sizes[axis] for axis in axes])
    team.run(kernels.backward, count, keep=int(grads["gstates"].shape[1] > 0), **given, **results)
    pairs = zip(results.values(), inputs.values(), strict=True)
    return [summed(grad) if grad.dim() > tensor.dim() else grad for grad, tensor in pairs]


def summed(parts: Tensor) -> Tensor:
    """The sum over the first axis."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def operator(
    module: str, names: tuple[str, ...], scan: Callable[..., Any], states: Callable[..., Any], **others: Any
) -> Any:
    """Register a scan with PyTorch, as ``torch.ops.mamba_trace.{name of its definition}_cpu``.

    Args:
        module: the module with its loops, relative to this package.
        names: what the inputs are called; ``x`` and ``h_start`` are among them.
        scan: its definition, ``(*inputs) -> (y, h_last)``.
        states: the definition with all states in place of h_last.
        **others: what else the forward kernel takes.

    Returns:
        A function ``(*inputs, keep) -> (y, h_last, states)``, whose ``states`` are empty unless ``keep``: the operator,
        or the same without it where nothing but gradients can be asked for.
    """
    name = f"mamba_trace::{scan.__qualname__}_cpu"
    gradient_names = ("gy", "gh_last", "gstates")

    def run(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, keep = dict(zip(names, given[:-1], strict=True)), given[-1]
        y, h_last, states = results = _empty_results(inputs["x"], inputs["h_start"], keep)
        run_forward(module, inputs, keep=int(keep), y=y, h_last=h_last, states=states, **others)
        return results

    def run_backward(*given: Tensor) -> list[Tensor]:
        inputs, grads = given[: len(names)], given[len(names) :]
        return _backward(module, dict(zip(names, inputs, strict=True)), **dict(zip(gradient_names, grads, strict=True)))

    def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        given = (*ctx.saved_tensors, *grads)
        if not torch.is_grad_enabled():
            if at_once(*given):
                return (*run_backward(*given), None)
            if for_a_graph(*given):
                return (*backward(*given), None)
        if grads[-1].shape[1]:  # there are gradients of the states
            return (*gradients_of(lambda *i: (*scan(*i), states(*i)[1]), ctx.saved_tensors, grads), None)
        return (*gradients_of(scan, ctx.saved_tensors, grads), None)

    arguments = ", ".join(f"Tensor {name}" for name in names)
    more = ", ".join(f"Tensor {name}" for name in gradient_names)
    operator: Any = torch.library.custom_op(
        name,
        run,
        mutates_args=(),
        schema=f"({arguments}, bool keep) -> (Tensor, Tensor, Tensor)",
    )
    backward: Any = torch.library.custom_op(
        f"{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"({arguments}, {more}) -> Tensor[]",
    )
    x, h = names.index("x"), names.index("h_start")
    operator.register_fake(lambda *given: _empty_results(given[x], given[h], given[-1]))
    operator.register_autograd(differentiate, setup_context=keep_inputs)
    backward.register_fake(lambda *given: [tensor.new_empty(tensor.shape) for tensor in given[: len(names)]])

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
            keep_inputs(ctx, given, None)
            return run(*given)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return differentiate(ctx, *grads)

    def quick(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not at_once(*given[:-1]):
            return operator(*given)
        return Scan.apply(*given) if differentiated(*given[:-1]) else run(*given)

    return quick


def for_a_graph(*tensors: Tensor) -> bool:
    """Whether a graph is made of what is computed from tensors, or there are others than PyTorch's own among them."""
    return torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


def at_once(*tensors: Tensor) -> bool:
    """Whether kernels may run on tensors without PyTorch's dispatcher, which takes longer than a short scan.

    It is there for compiled graphs and for tensors of other kinds.
    """
    return not torch.compiler.is_compiling() and all(tensor.is_cpu for tensor in tensors) and in_memory(*tensors)
