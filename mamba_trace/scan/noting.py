"""Who looks at what is computed in this thread: modes of PyTorch, and who notes the kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class _Notes(threading.local):
    """Who is told of each kernel that is about to run, of its block, its pieces and what it is given, if anybody is."""

    listener: Callable[..., None] | None = None


notes = _Notes()


def under_a_mode() -> bool:
    """Whether a mode looks at PyTorch's operations, or replaces them; that of who notes the kernels does not."""
    modes = torch._C._len_torch_dispatch_stack() - (notes.listener is not None)
    return bool(modes or torch._C._len_torch_function_stack())
