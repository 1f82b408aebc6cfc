"""A weight times vectors, as PyTorch multiplies them, by a kernel: PyTorch's BLAS, called by its address.

So a linear layer is noted and done again like all else (`captured`), and its numbers are those of PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..buffers import BlockLayout
from . import few_vectors
from .compiled import arguments_at, kernel
from .libraries import address_of, loaded
from .vectors import FLOAT, addresses, apart

FORWARD = BlockLayout("sgemm biased", **few_vectors.FORWARD.buffers)
LETTER = ir.IntType(8)
#: When a bias is added: it is what products are added to, or added to their sum.
FIRST, LAST = 1, 2


@intrinsic
def multiply(typingctx, sgemm, x, weight, out, lines, inner, width, added):  # type: ignore[no-untyped-def]
    """out [lines,width] = x weight^T, with ``added`` to what stands there, by the function at ``sgemm``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sgemm, x, _, _, lines, inner, width, added = args
        kinds = signature.args[1:4]
        vectors, weights, into = addresses(context, builder, kinds, args[1:4])
        place = functools.partial(cgutils.alloca_once_value, builder)
        transposed, as_it_is = (place(LETTER(ord(letter))) for letter in "TN")
        one, factor = place(FLOAT(1)), place(builder.uitofp(added, FLOAT))
        # Numbers of 64 bits are right for a BLAS that takes 32 as well: the lower half stands first.
        m, n, k, ldb = map(place, (width, lines, inner, apart(context, builder, kinds[0], x)))
        given = (transposed, as_it_is, m, n, k, one, weights, k, vectors, ldb, factor, into, m)
        kind = ir.FunctionType(ir.VoidType(), [each.type for each in given])
        builder.call(builder.inttoptr(sgemm, kind.as_pointer()), given)
        return context.get_dummy_value()

    index = types.int64
    return types.void(index, x, weight, out, index, index, index, types.boolean), codegen


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Multiply all vectors x by the weight. Result: out, to which the bias is added `FIRST` or `LAST`."""
    p = arguments_at(data)
    if p.biased == FIRST:
        for line in range(p.lines):
            for row in range(p.width):
                p.out[line, row] = p.bias[row]
    multiply(p.sgemm, p.x, p.weight, p.out, p.lines, p.inner, p.width, p.biased == FIRST)
    if p.biased == LAST:
        for line in range(p.lines):
            for row in range(p.width):
                p.out[line, row] += p.bias[row]


def when_biased(x: Tensor, bias: Tensor | None) -> int:
    """Whether PyTorch adds a bias to what it multiplies, and when, which decides how sums are rounded."""
    if bias is None:
        return 0
    return FIRST if x.dim() == 2 or x.is_contiguous() else LAST


@functools.cache
def sgemm() -> int:
    """Where the function stands that PyTorch multiplies matrices in float32 by; 0 if it is not found."""
    library = "torch/lib/libtorch_cpu.so"
    return address_of(loaded("sgemm_", library)) if torch.backends.mkl.is_available() else 0
