"""Which backend runs a scan: chosen at each call from device, dtype and length, or forced."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..errors import BackendError
from . import cpu, reference
from .reference import accumulation_dtype

#: What ``kernels=`` takes.
KERNELS = ("auto", "reference", "cpu")
_FORCED: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}


def check(kernels: str) -> str:
    """``kernels``, if it is a backend that can run here at all.

    Raises:
        BackendError: if there is no such backend, or it cannot run, with the reason.
    """
    if kernels not in KERNELS:
        raise BackendError(f"no backend is called {kernels!r}; there are {', '.join(KERNELS)}")
    if kernels == "cpu" and (reason := cpu.unavailable()) is not None:
        raise BackendError(f"kernels='cpu' cannot run: {reason}")
    return kernels


def backend(kernels: str, x: Tensor, A: Tensor, *others: Tensor | None) -> ModuleType:
    """The backend for inputs such as ``x`` [B,L,E] and ``A`` [E,N], or [B,E,N] where rows have their own.

    Raises:
        BackendError: if the forced one cannot run on these inputs, with the reason.
    """
    reason = cpu.unavailable(x, accumulation_dtype(x, A, *others))
    if A.dim() == 3:
        reason = "invokes of the batch have an A of their own"
    if kernels == "auto":
        return cpu if reason is None else reference
    if kernels == "cpu" and reason is not None:
        raise BackendError(f"kernels='cpu' cannot run this scan: {reason}; use kernels='auto'")
    return _FORCED[kernels]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h_start: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan` on the backend ``kernels`` names or that suits the inputs best."""
    return backend(kernels, x, A, delta, B, C, h_start).selective_scan(x, delta, A, B, C, h_start)


def selective_states(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h_start: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.selective_states` on the backend ``kernels`` names or that suits the inputs best."""
    return backend(kernels, x, A, delta, B, C, h_start).selective_states(x, delta, A, B, C, h_start)
