"""What is computed of each number by itself, compiled where a CPU can run that.

For one token an operation of PyTorch can take longer than all kernels of a layer. Each function here has the same
numbers whether anybody asks for gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .norm import computed_in_floats
from .recompute import recompute
from .reference import accumulation_dtype, in_dtype


def rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) in float32 or better, of any shape.

    Example::

        rates(torch.zeros(8, 16))  # -1 throughout
    """
    return _computed("rates", lambda A_log: -torch.exp(A_log), in_dtype(A_log, accumulation_dtype(A_log)))


def exponentials(x: Tensor) -> Tensor:
    """exp(x), of any shape."""
    return _computed("exponentials", torch.exp, x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), of any shape."""
    return _computed("softplus", F.softplus, x)


def _computed(kernel: str, defined: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not x.is_contiguous() or not computed_in_floats(x):
        return defined(x)
    computed: Tensor = recompute(lambda x: cpu.of_each(kernel, x), defined, x)
    return computed
