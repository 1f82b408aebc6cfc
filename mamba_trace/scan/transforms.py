"""Whether a call runs under one of PyTorch's transforms of functions, where no compiled kernel can.

`torch.func.grad`, `jvp` and `vmap`, and forward-mode differentiation, work on PyTorch's own operations: they
hand out tensors without memory of their own. `reference` is written in such operations.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
