"""Finding the kernels of mamba-ssm and causal-conv1d, and whether they work here.

Both are hard to install, and an installation can be broken in many ways: the package lacks its compiled half,
or was built for another PyTorch, or has no code for this GPU, or is a release whose functions are others. None
of this may stop a model that can run without the kernels. So nothing here raises. A kernel is either the
function to call or a sentence that says why there is none and what to do about it, and before its first use on
a device it has to get a small example right there.

Every kernel is called by the names of its parameters, all of which stand here. A function that cannot be called
with them is not called at all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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


class Misfit(str):
    """Why there is no kernel, where that is because another release of its package is installed."""

    __slots__ = ()


@dataclass(frozen=True)
class Package:
    """A package of kernels.

    Attributes:
        name: what it is installed by.
        oldest: the first release that can be used, as the extra ``cuda`` declares it. Earlier ones of mamba-ssm
            import what Hugging Face's transformers no longer has.
        newest: the last release that the tests have run.
    """

    name: str
    oldest: str
    newest: str

    @property
    def installed(self) -> str | None:
        """The release that is installed; ``None`` where nothing says which."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None

    def __str__(self) -> str:
        return self.name if self.installed is None else f"{self.name} {self.installed}"


@dataclass(frozen=True)
class Function:
    """A function of a package that runs a kernel.

    Attributes:
        package: where it comes from.
        module, name: where it is in the package.
        parameters: the names by which it is called; all of them are given at every call.
        compiled: an attribute of the module that is missing or ``None`` where the compiled half is missing.
        install: what installs the package with the kernel.
    """

    package: Package
    module: str
    name: str
    parameters: tuple[str, ...]
    compiled: str
    install: str

    def find(self) -> Kernel | str:
        """The function, or why there is none and what to do about it."""
        package = self.package
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"it needs {package.name}: {self.install}"
        release = package.installed
        if release is not None and _numbers(release) < _numbers(package.oldest):
            return Misfit(f"{package} is too old, {package.oldest} is the first release to use: {self._tested()}")
        try:
            loaded = importlib.import_module(self.module)
            if getattr(loaded, self.compiled) is None:
                raise ImportError(f"{self.compiled} was not built")
            function = getattr(loaded, self.name)
        except Exception as error:  # compiled code may raise anything
            return f"{package} is installed without a working kernel ({_text(error)}): {self.install}"
        try:
            inspect.signature(function).bind(**dict.fromkeys(self.parameters))
        except (TypeError, ValueError) as error:  # ValueError: it has no signature
            differs = f"{package} has another {self.name} than the one that is called here ({error})"
            return Misfit(f"{differs}; {package.newest} has been tested: {self._tested()}")
        return function

    def _tested(self) -> str:
        return f"{self.install}=={self.package.newest}"  # the command ends with the package's name


MAMBA = Package("mamba-ssm", oldest="2.3", newest="2.3.2.post1")
CONV = Package("causal-conv1d", oldest="1.5", newest="1.7.0")

SELECTIVE_SCAN = Function(
    MAMBA, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn",
    ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"),
    "selective_scan_cuda", INSTALL_SCAN,
)  # fmt: skip
CHUNK_SCAN = Function(
    MAMBA, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined",
    ("x", "dt", "A", "B", "C", "chunk_size", "D", "z", "initial_states", "return_final_states"),
    "mamba_chunk_scan_combined", INSTALL_DUAL,
)  # fmt: skip
STATE_UPDATE = Function(
    MAMBA, "mamba_ssm.ops.triton.selective_state_update", "selective_state_update",
    ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus"),
    "selective_state_update", INSTALL_DUAL,
)  # fmt: skip
#: Its module imports the compiled half or fails.
CAUSAL_CONV = Function(
    CONV, "causal_conv1d", "causal_conv1d_fn", ("x", "weight", "bias", "activation"),
    "causal_conv1d_fn", INSTALL_CONV,
)  # fmt: skip


@functools.cache
def scan_kernel() -> Kernel | str:
    """mamba-ssm's ``selective_scan_fn``, or why there is none."""
    return SELECTIVE_SCAN.find()


@functools.cache
def chunk_scan_kernel() -> Kernel | str:
    """mamba-ssm's ``mamba_chunk_scan_combined``, or why there is none."""
    return CHUNK_SCAN.find()


@functools.cache
def state_update_kernel() -> Kernel | str:
    """mamba-ssm's ``selective_state_update``, or why there is none."""
    return STATE_UPDATE.find()


@functools.cache
def conv_kernel() -> Kernel | str:
    """causal-conv1d's ``causal_conv1d_fn``, or why there is none."""
    return CAUSAL_CONV.find()


def _numbers(release: str) -> list[int]:
    # The numbers that releases are ordered by; what is behind the third never decides.
    return [int(number) for number in re.findall(r"\d+", release)[:3]]


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
