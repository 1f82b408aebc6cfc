"""A linear layer on a CPU, in float32: multiplied by what is fastest on the processor.

PyTorch multiplies float32 by MKL wherever it has MKL. That is Intel's, and on a processor of AMD it can take more than
twice as long as oneDNN, which PyTorch also has and uses for the other dtypes. For few vectors, the tokens of a short
prompt or a single one, either can take much longer than it takes to read the weight from memory: these are multiplied
by a compiled loop of this package (`tests/benchmarks/linear.py`). All compute in float32, and add the products up in
different orders. For somebody who takes note of the kernels that run, the library that PyTorch would take is called by
one.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .noting import notes, under_a_mode
from .recompute import differentiated, in_memory, transformed

Multiplier = Callable[[Tensor, Tensor, Tensor | None], Tensor]

#: What PyTorch calls the precision of float32 itself.
FULL = ("none", "ieee")
#: How many vectors the compiled loop multiplies in less time than MKL, on a processor of Intel with long registers.
FEW = 64
#: How many rows a weight has at least that the loop takes.
ROWS = 4
#: How many vectors are worth taking note of: with more of them the time of all but kernels does not matter.
MOST = 512
#: How many numbers a weight has that oneDNN multiplies in less time than MKL, on a processor of AMD.
MANY = 2**17


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` [...,M], as ``torch.nn.functional.linear``: for x [...,K], weight [M,K], bias [M].

    Example::

        linear(torch.rand(1, 9, 512), torch.rand(1024, 512))  # [1,9,1024]
    """
    if (by := multiplier(x, weight, bias)) is None:
        return F.linear(x, weight, bias)
    if not differentiated(x, weight, bias):
        return by(x, weight, bias)
    product: Tensor = _Linear.apply(by, x, weight, bias)
    return product


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write `linear` of ``x`` [L,K] into ``out`` [L,M]; not differentiable."""
    by = multiplier(x, weight, bias)
    if by is by_kernel and out.is_contiguous():
        cpu.linear(x, weight, bias, out)
    elif by is not None:
        out.copy_(by(x, weight, bias))  # which makes its own memory
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of few vectors by a compiled loop, for tensors that have memory of their own, on a CPU; not
    differentiable."""
    return cpu.linear(x, weight, bias)


def by_blas(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` as PyTorch computes it, by a kernel; not differentiable."""
    return cpu.linear_by_blas(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, for tensors that have memory of their own, on a CPU; not differentiable."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight, bias, "none", [], "")
    # Not a view, which autograd would not let anybody edit in place.
    return product if x.dim() == 2 else torch.ops.aten._unsafe_view(product, (*x.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by: Multiplier, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only what `backward` needs, as PyTorch does: the others may be edited in place before it.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[1] else None)
        return by(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        # A gradient can be one of another kind: of a batch of gradients PyTorch cannot take flatten.
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        return (
            None,
            linear(grad, weight.t()) if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def multiplier(x: Tensor, weight: Tensor, bias: Tensor | None) -> Multiplier | None:
    """What `linear` multiplies by; ``None`` for what PyTorch chooses."""
    if not isinstance(weight, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    numbers = weight.numel()
    rows = x.numel() // weight.shape[-1] if numbers else 0
    if not isinstance(rows, int) or rows == 0:  # a symbol stands for any number
        return None
    few, large = rows <= most_vectors() and len(weight) >= ROWS, numbers >= least_numbers()
    noted = notes.listener is not None
    if not (few or large or noted):
        return None
    if any(t is not None and not (t.is_cpu and t.dtype is torch.float32) for t in (x, weight, bias)):
        return None
    if transformed() or not in_memory(x, weight, bias):
        return None
    # What does not fit is PyTorch's to refuse: oneDNN would not say so.
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    # Of a bias with gaps it would read what lies in the gaps, or behind the end.
    if not (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())):
        return None
    dense = weight.is_contiguous()
    if not dense and not (large and weight.t().is_contiguous()):
        return None
    # Both would round what is multiplied.
    if torch.is_autocast_enabled("cpu") or precision() not in FULL:
        return None
    if under_a_mode():
        return None
    if few and dense and cpu.unavailable() is None:
        return by_kernel
    if large and torch.backends.mkldnn.enabled:
        return by_onednn
    return by_blas if noted and dense else None


def precision() -> str:
    """In what PyTorch multiplies tensors in float32 on a CPU, if it has been told."""
    onednn: Any = torch.backends.mkldnn
    told: str = onednn.matmul.fp32_precision
    return told


@functools.cache
def most_vectors() -> int:
    """How many vectors `by_kernel` multiplies in less time than PyTorch on this processor."""
    if made_by_amd() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 1  # nothing but memory decides how long one vector takes
    return FEW


@functools.cache
def most_noted() -> int:
    """How many vectors at most are multiplied by kernels for somebody who takes note of what is computed."""
    by_two = cpu.unavailable() is None and cpu.has_blas() and least_numbers() == math.inf
    return MOST if by_two else most_vectors()


@functools.cache
def least_numbers() -> float:
    """How many numbers a weight has at least that `by_onednn` multiplies in less time than PyTorch on this processor.

    None has so many where PyTorch has one of the two libraries alone.
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return MANY if both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and made_by_amd() else math.inf


def made_by_amd() -> bool:
    """Whether the processor says that AMD made it."""
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        told = platform.processor()
    return "AuthenticAMD" in told
