"""Finding the compiled kernels of mamba-ssm and causal-conv1d, and whether they work here.

Both are hard to install, and an installation can be broken in many ways: a package without its compiled
half, one built for another PyTorch, one without code for this GPU. None of them may stop a model that could
run without. So nothing here raises: a kernel is the callable, or a sentence that says why there is none and
what to do, and before its first use on a device it has to get a small example right there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference

#: Builds mamba-ssm with its Mamba-1 kernel, which recent versions leave out unless asked.
INSTALL_SCAN = "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm"
#: Builds causal-conv1d.
INSTALL_CONV = "pip install --no-build-isolation causal-conv1d"
#: Where the kernels run.
DEVICE_TYPES: tuple[str, ...] = ("cuda",)
#: What they are to be right to on the small example, of the largest value.
TOLERANCE = 1e-3

Kernel = Callable[..., Tensor | tuple[Tensor, Tensor]]


@functools.cache
def scan_kernel() -> Kernel | str:
    """mamba-ssm's ``selective_scan_fn``, or why there is none."""
    module = "mamba_ssm.ops.selective_scan_interface"
    return _find("mamba-ssm", module, "selective_scan_fn", "selective_scan_cuda", INSTALL_SCAN)


@functools.cache
def conv_kernel() -> Kernel | str:
    """causal-conv1d's ``causal_conv1d_fn``, or why there is none."""
    # Its module imports the compiled half or fails.
    return _find("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", "causal_conv1d_fn", INSTALL_CONV)


def _find(package: str, module: str, function: str, compiled: str, install: str) -> Kernel | str:
    # ``compiled`` is the attribute of ``module`` that is missing or None where the compiled half is.
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"it needs {package}: {install}"
    try:
        loaded = importlib.import_module(module)
        if getattr(loaded, compiled) is None:
            raise ImportError(f"{compiled} was not built")
        return getattr(loaded, function)
    except Exception as error:  # of compiled code, anything
        return f"{package} is installed without a working kernel ({_text(error)}): {install}"


def no_device() -> str | None:
    """That there is no device to run the kernels on; ``None`` where there is one."""
    if "cuda" not in DEVICE_TYPES or torch.cuda.is_available():
        return None
    return "PyTorch finds no CUDA device (torch.cuda.is_available() is False)"


def missing(reason: str, device: torch.device | None) -> str:
    """Why there is no kernel, after the lack of a device, which installing does not cure."""
    absent = no_device() if device is None else None
    return reason if absent is None else f"{absent}, and {reason}"


def misplaced(device: torch.device | None, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the kernels cannot run on ``device`` (``None``: on any) with values in ``dtype``."""
    if device is None:
        if (reason := no_device()) is not None:
            return reason
    elif device.type not in DEVICE_TYPES:
        return f"the model is on {device}, and it runs on a CUDA device alone: model.to('cuda')"
    if dtype not in dtypes:
        return f"it computes in {', '.join(str(one).removeprefix('torch.') for one in dtypes)}, not {dtype}"
    return None


@functools.cache
def scan_failure(device: torch.device) -> str | None:
    """How the scan kernel fails on ``device``; ``None`` if it gets a small example right."""
    from .. import cuda

    x, B, C = (_waves(1, 5, width, device=device) for width in (8, 3, 3))
    delta, A = x.abs() + 0.1, -_waves(8, 3, device=device).abs() - 0.5
    inputs = (x, delta, A, B, C, _waves(1, 8, 3, device=device))
    return _failure(lambda scan: torch.cat([part.flatten() for part in scan.selective_scan(*inputs)]), cuda)


@functools.cache
def conv_failure(device: torch.device) -> str | None:
    """How the convolution kernel fails on ``device``; ``None`` if it gets a small example right."""
    from .. import cuda

    shapes = ((1, 5, 8), (8, 4), (8,), (1, 8, 4))
    x, weight, bias, before = (_waves(*shape, device=device) for shape in shapes)
    return _failure(lambda scan: scan.causal_conv(x, weight, bias, before, activate=True), cuda)


def _waves(*shape: int, device: torch.device) -> Tensor:
    # Some numbers, without disturbing a generator.
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32, device=device).sin().reshape(shape)


@torch.no_grad()
def _failure(run: Callable[..., Tensor], scan: object) -> str | None:
    try:
        actual, expected = run(scan), run(reference)
        error = float((actual - expected).abs().max() / expected.abs().max())
    except Exception as problem:
        return f"its kernel fails here ({_text(problem)})"
    if not error <= TOLERANCE:  # NaN too
        return f"its kernel is wrong here, by {error:.0e} of the largest value of a small example"
    return None


def _text(error: Exception) -> str:
    # Of an error of CUDA the first line: more of them advise on debugging.
    return f"{type(error).__name__}: {error}".splitlines()[0]
