"""Functions of the libraries that PyTorch computes with, called by their addresses."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch


def loaded(function: str, *libraries: str) -> Any:
    """A function of one of the libraries, which are patterns beside the folder of PyTorch; ``None`` without any.

    A library that is not in memory is passed by: PyTorch would not compute with it.
    """
    beside = Path(torch.__file__).parent.parent
    for library in (path for pattern in libraries for path in beside.glob(pattern)):
        try:
            return getattr(ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW), function)
        except (OSError, AttributeError):
            continue
    return None


def address_of(function: Any) -> int:
    """Where a function stands; 0 for ``None``."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
