"""A scan in which each batch row has its own A, run row by row: for kernels that take one A for all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_rows(run: Callable[..., Any], inputs: tuple[Tensor | None, ...], A: Tensor) -> tuple[Tensor, Tensor]:
    """Run a scan once for each row, and join the results.

    Args:
        run: the scan.
        inputs: its arguments. A tensor with one axis, which can only be D, is the same for all rows.
        A: the one of ``inputs`` that is A, with an axis of rows in front: invokes have edited it.
    """

    def row(tensor: Tensor | None, at: int) -> Tensor | None:
        if tensor is None or tensor.dim() == 1:
            return tensor
        return tensor[at] if tensor is A else tensor[at : at + 1]

    rows = [run(*(row(tensor, at) for tensor in inputs)) for at in range(A.shape[0])]
    first, second = zip(*rows, strict=True)
    return torch.cat(first), torch.cat(second)
