"""Finding the kernels of mamba-ssm and causal-conv1d, and whether they work here.

Both are hard to install, and an installation can be broken in many ways: the package lacks its compiled half,
or was built for another PyTorch, or has no code for this GPU. None of this may stop a model that can run
without the kernels. So nothing here raises. A kernel is either the function to call or a sentence that says
why there is none and what to do about it, and before its first use on a device it has to get a small example
right there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Builds mamba-ssm with its Mamba-1 kernel, which recent versions leave out unless asked.
INSTALL_SCAN = "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm"
#: Builds mamba-ssm with the kernels of Mamba-2, which are Triton's.
INSTALL_DUAL = "pip install --no-build-isolation mamba-ssm"
#: Builds causal-conv1d.
INSTALL_CONV = "pip install --no-build-isolation causal-conv1d"
#: The types of device that the kernels run on.
DEVICE_TYPES: tuple[str, ...] = ("cuda",)
#: How exact they must be on the small example, as a part of the largest value.
TOLERANCE = 1e-3

Kernel = Callable[..., Tensor | tuple[Tensor, Tensor]]


@functools.cache
def scan_kernel() -> Kernel | str:
    """mamba-ssm's ``selective_scan_fn``, or why there is none."""
    module = "mamba_ssm.ops.selective_scan_interface"
    return _find("mamba-ssm", module, "selective_scan_fn", "selective_scan_cuda", INSTALL_SCAN)


@functools.cache
def chunk_scan_kernel() -> Kernel | str:
    """mamba-ssm's ``mamba_chunk_scan_combined``, or why there is none."""
    module, name = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"
    return _find("mamba-ssm", module, name, name, INSTALL_DUAL)


@functools.cache
def state_update_kernel() -> Kernel | str:
    """mamba-ssm's ``selective_state_update``, or why there is none."""
    module, name = "mamba_ssm.ops.triton.selective_state_update", "selective_state_update"
    return _find("mamba-ssm", module, name, name, INSTALL_DUAL)


@functools.cache
def conv_kernel() -> Kernel | str:
    """causal-conv1d's ``causal_conv1d_fn``, or why there is none."""
    # Its module imports the compiled half or fails.
    return _find("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", "causal_conv1d_fn", INSTALL_CONV)


def _find(package: str, module: str, function: str, compiled: str, install: str) -> Kernel | str:
    # ``compiled`` is an attribute of ``module`` that is missing or None where the compiled half is missing.
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"it needs {package}: {install}"
    try:
        loaded = importlib.import_module(module)
        if getattr(loaded, compiled) is None:
            raise ImportError(f"{compiled} was not built")
        return getattr(loaded, function)
    except Exception as error:  # compiled code may raise anything
        return f"{package} is installed without a working kernel ({_text(error)}): {install}"


def no_device() -> str | None:
    """Say that there is no device to run the kernels on; ``None`` where there is one."""
    if "cuda" not in DEVICE_TYPES or torch.cuda.is_available():
        return None
    return "PyTorch finds no CUDA device (torch.cuda.is_available() is False)"


def missing(reason: str, device: torch.device | None) -> str:
    """Why there is no kernel; where ``device`` is ``None``, also whether there is no device to run one on."""
    absent = no_device() if device is None else None
    return reason if absent is None else f"{absent}, and {reason}"


def misplaced(device: torch.device | None, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the kernels cannot run on ``device`` (on any device if ``None``) with values in ``dtype``."""
    if device is None:
        if (reason := no_device()) is not None:
            return reason
    elif device.type not in DEVICE_TYPES:
        return f"the model is on {device}, and it runs on a CUDA device alone: model.to('cuda')"
    if dtype not in dtypes:
        return f"it computes in {', '.join(str(each).removeprefix('torch.') for each in dtypes)}, not {dtype}"
    return None


def waves(*shape: int, device: torch.device) -> Tensor:
    """Some numbers that are made without a random generator, so that no generator's state changes."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32, device=device).sin().reshape(shape)


@torch.no_grad()
def failure(run: Callable[..., Any], define: Callable[..., Any], *inputs: Tensor) -> str | None:
    """How ``run(*inputs)`` fails or differs from ``define(*inputs)``; ``None`` if it does neither."""
    try:
        actual, expected = (
            torch.cat([part.flatten() for part in (results if isinstance(results, tuple) else (results,))])
            for results in (run(*inputs), define(*inputs))
        )
        error = float((actual - expected).abs().max() / expected.abs().max())
    except Exception as problem:
        return f"its kernel fails here ({_text(problem)})"
    if not error <= TOLERANCE:  # NaN too
        return f"its kernel is wrong here, by {error:.0e} of the largest value of a small example"
    return None


def _text(error: Exception) -> str:
    # The first line: the further lines of a CUDA error are advice on debugging.
    return f"{type(error).__name__}: {error}".splitlines()[0]
