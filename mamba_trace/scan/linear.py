"""A linear layer on a CPU, in float32: multiplied by oneDNN where that is faster than what PyTorch would choose.

PyTorch multiplies float32 by MKL wherever it has MKL. That is Intel's, and on a processor of AMD it can take more than
twice as long as oneDNN, which PyTorch also has and uses for the other dtypes. On Intel's own it can for some rows: a
short prompt, or a step of a small batch (`tests/benchmarks/linear.py`). Both compute in float32, and add the products
up in different orders.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .recompute import differentiated, in_memory, transformed


class Worth(NamedTuple):
    """What oneDNN multiplies in less time than MKL, the call included.

    Attributes:
        numbers: how many numbers a weight has at least.
        rows: how many vectors are multiplied by it.
    """

    numbers: int
    rows: range


ON_AMD = (Worth(2**17, range(1, 2**63 - 1)),)
ELSEWHERE = (Worth(2**21, range(7, 16)), Worth(2**22, range(4, 41)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` [...,M], as ``torch.nn.functional.linear``: for x [...,K], weight [M,K], bias [M].

    Example::

        linear(torch.rand(1, 9, 512), torch.rand(1024, 512))  # [1,9,1024]
    """
    if not takes(x, weight, bias):
        return F.linear(x, weight, bias)
    product: Tensor = (_Linear.apply if differentiated(x, weight, bias) else by_onednn)(x, weight, bias)
    return product


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write `linear` of ``x`` [L,K] into ``out`` [L,M]; not differentiable."""
    if takes(x, weight, bias):
        out.copy_(by_onednn(x, weight, bias))  # which makes its own memory
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, for tensors that have memory of their own, on a CPU; not differentiable."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight, bias, "none", [], "")
    # Not a view, which autograd would not let anybody edit in place.
    return product if x.dim() == 2 else torch.ops.aten._unsafe_view(product, (*x.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only what `backward` needs, as PyTorch does: the others may be edited in place before it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        # A gradient can be one of another kind: of a batch of gradients PyTorch cannot take flatten.
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` multiplies by oneDNN."""
    if not isinstance(weight, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    numbers = weight.numel()
    worth = [each.rows for each in worth_it() if numbers and numbers >= each.numbers]
    if not worth:
        return False
    rows = x.numel() // weight.shape[-1]
    if not isinstance(rows, int) or not any(rows in each for each in worth):  # a symbol stands for any number
        return False
    if any(t is not None and not (t.is_cpu and t.dtype is torch.float32) for t in (x, weight, bias)):
        return False
    if transformed() or not in_memory(x, weight, bias):
        return False
    # What does not fit is PyTorch's to refuse: oneDNN would not say so.
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    # Of a bias with gaps it would read what lies in the gaps, or behind the end.
    if not (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())):
        return False
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return False
    # Autocast would round, and oneDNN can be switched off.
    if torch.is_autocast_enabled("cpu") or recorded():
        return False
    return bool(torch.backends.mkldnn.enabled)


def recorded() -> bool:
    """Whether a mode looks at the operations that run, or replaces them."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


@functools.cache
def worth_it() -> tuple[Worth, ...]:
    """What oneDNN multiplies in less time than MKL on this processor: nothing where PyTorch has one of them alone."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return ()
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return ON_AMD if made_by_amd() else ELSEWHERE


def made_by_amd() -> bool:
    """Whether the processor says that AMD made it."""
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        told = platform.processor()
    return "AuthenticAMD" in told
