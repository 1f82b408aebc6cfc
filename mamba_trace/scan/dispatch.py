"""Which backend runs a scan: chosen at each call from device, dtype, size and availability, or forced.

A backend is a module with the functions of `reference`, which say what they mean, and `unavailable`, which
says why it cannot run. One may lack the explicit scan or the convolution; Triton and PyTorch stand in for it.
What is the same for all of them is here: fake tensors get their shapes and no more, a call without any
element or of a single position needs no kernel, one under a transform of `torch.func` can have none, and rows
that have an A of their own are run one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BackendError
from . import cpu, cuda, outline, reference, triton
from .record import note
from .reference import accumulation_dtype
from .transforms import transformed

#: The backends by name.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
#: What ``kernels=`` takes.
KERNELS = ("auto", *BACKENDS)
#: Which of them suit a device, best first.
SUITABLE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def check(kernels: str) -> str:
    """``kernels``, if it is a backend that can run here at all.

    Raises:
        BackendError: if there is no such backend, or it cannot run, with the reason.
    """
    if kernels not in KERNELS:
        raise BackendError(f"no backend is called {kernels!r}; there are {', '.join(KERNELS)}")
    if kernels != "auto" and (reason := BACKENDS[kernels].unavailable()) is not None:
        raise BackendError(f"kernels={kernels!r} cannot run: {reason}")
    return kernels


def choose(kernels: str, device: torch.device, dtype: torch.dtype, d_state: int) -> str:
    """The name of the backend that runs a scan accumulated in ``dtype`` over states of ``d_state``.

    Raises:
        BackendError: if the forced one cannot run on these inputs, with the reason.
    """
    if transformed():
        if kernels in ("auto", "reference"):
            return "reference"
        raise BackendError(
            f"kernels={kernels!r} cannot run under torch.func or forward-mode differentiation, which know "
            "PyTorch's own operations alone: use kernels='auto' or kernels='reference'"
        )
    if kernels != "auto":
        if (reason := BACKENDS[kernels].unavailable(device, dtype, d_state)) is not None:
            raise BackendError(f"kernels={kernels!r} cannot run this scan: {reason}; use kernels='auto'")
        return kernels
    reasons = []
    for name in SUITABLE.get(device.type, ()):
        reason = BACKENDS[name].unavailable(device, dtype, d_state)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if reasons and dtype == torch.float32:
        warn_of_fallback("; ".join(reasons))
    return "reference"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine.

    Attributes:
        backend: its name.
        scan: why its scan cannot run, and what to do; ``None`` if it can.
        convolution: the same of its convolution.
    """

    backend: str
    scan: str | None
    convolution: str | None


def availability() -> list[Availability]:
    """What this machine has of every backend.

    Example::

        [one.backend for one in availability() if one.scan is None]
    """
    found = []
    for name, backend in BACKENDS.items():
        probe = getattr(backend, "conv_unavailable", lambda: "it has none of its own, and PyTorch's runs")
        found.append(Availability(name, backend.unavailable(), probe()))
    return found


_warned = False


def warn_of_fallback(reasons: str) -> None:
    """Say, once in a process, that no kernel can run and plain PyTorch does."""
    global _warned
    if not _warned:
        _warned = True
        message = f"no compiled scan can run here, so the slower plain PyTorch one does ({reasons})"
        warnings.warn(f"{message}. `mamba-trace info` says what to install", stacklevel=2)


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
    """`reference.selective_scan` on the backend ``kernels`` names or that suits the inputs best.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        y, h_last = selective_scan(x, delta, A, B, C=B)  # [2,9,4], [2,4,3]
    """
    return _run("selective_scan", (x, delta, A, B, C, h_start), kernels, A)


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
    """`reference.selective_states` on the backend ``kernels`` names or that suits the inputs best.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        y, states = selective_states(x, delta, A, B, C=B)  # [2,9,4], [2,9,4,3]
    """
    return _run("selective_states", (x, delta, A, B, C, h_start), kernels, A)


def gated_scan(
    x: Tensor,
    delta_2: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    skip: Tensor,
    h_start: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.gated_scan` on the backend ``kernels`` names or that suits the inputs best.

    Example::

        x, delta, A, B = torch.rand(2, 9, 4), torch.rand(2, 9, 4), -torch.rand(4, 3), torch.rand(2, 9, 3)
        out, h_last = gated_scan(x, delta, A, B, B, torch.ones(4), x)  # [2,9,4], [2,4,3]
    """
    return _run("gated_scan", (x, delta_2, A, B, C, D, skip, h_start), kernels, A)


def explicit_scan(
    A_bar: Tensor,
    B_bar: Tensor,
    x: Tensor,
    C: Tensor,
    h_start: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.explicit_scan` on the backend ``kernels`` names or that suits the inputs best.

    Example::

        A_bar, B_bar = torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 3)
        x, C = torch.rand(2, 9, 4), torch.rand(2, 9, 3)
        y, h_last = explicit_scan(A_bar, B_bar, x, C)  # [2,9,4], [2,4,3]
    """
    return _run("explicit_scan", (A_bar, B_bar, x, C, h_start), kernels)


def explicit_states(
    A_bar: Tensor,
    B_bar: Tensor,
    x: Tensor,
    C: Tensor,
    h_start: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference.explicit_states` on the backend ``kernels`` names or that suits the inputs best.

    Example::

        A_bar, B_bar = torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4, 3)
        x, C = torch.rand(2, 9, 4), torch.rand(2, 9, 3)
        y, states = explicit_states(A_bar, B_bar, x, C)  # [2,9,4], [2,9,4,3]
    """
    return _run("explicit_states", (A_bar, B_bar, x, C, h_start), kernels)


def convolution(kernels: str, device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    """The backend whose ``causal_conv`` is faster here than PyTorch's convolution, or ``None``.

    Args:
        kernels: as for the scan. A backend that has no convolution leaves it to PyTorch.
        device, dtype: of its inputs.
        width: how many positions it looks at.
    """
    if transformed():
        return None
    for name in SUITABLE.get(device.type, ()) if kernels == "auto" else (kernels,):
        backend = BACKENDS[name]
        if hasattr(backend, "conv_unavailable") and backend.conv_unavailable(device, dtype, width) is None:
            return backend
    return None


def causal_conv(
    x_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    *,
    activate: bool,
    backend: ModuleType,
) -> Tensor:
    """`reference.causal_conv` on a backend that `convolution` named."""
    note("conv_silu" if activate else "causal_conv", backend.__name__.rsplit(".", 1)[-1], x_in.shape[1])
    return backend.causal_conv(x_in, weight, bias, before, activate=activate)


def _run(
    name: str, inputs: tuple[Tensor | None, ...], kernels: str, A: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    first, C = inputs[0], inputs[4] if A is not None else inputs[3]
    assert isinstance(first, Tensor)
    assert isinstance(C, Tensor)
    if isinstance(first, FakeTensor) or first.is_meta:
        return getattr(outline, name)(*inputs)
    dtype, length = accumulation_dtype(*inputs), first.shape[1]
    chosen = choose(kernels, first.device, dtype, C.shape[-1])
    if not hasattr(BACKENDS[chosen], name):  # mamba-ssm's kernel takes no matrices
        chosen = "reference" if triton.unavailable(first.device, dtype, C.shape[-1]) else "triton"
    if first.numel() == 0 or (length == 1 and chosen != "cpu"):
        chosen = "reference"  # nothing to do, or one update of the state
    note(name, chosen, length)
    run = getattr(BACKENDS[chosen], name)
    return _by_rows(run, inputs, A) if A is not None and A.dim() == 3 else run(*inputs)


def _by_rows(run: Callable[..., Any], inputs: tuple[Tensor | None, ...], A: Tensor) -> tuple[Tensor, Tensor]:
    # Invokes that edited A have one each: A [B,E,N]. D [E] is the only other input without a batch axis.
    rows = [
        run(
            *(
                tensor if tensor is None or tensor.dim() == 1 else _row(tensor, row, tensor is A)
                for tensor in inputs
            )
        )
        for row in range(A.shape[0])
    ]
    first, second = zip(*rows, strict=True)
    return torch.cat(first), torch.cat(second)


def _row(tensor: Tensor, row: int, is_A: bool) -> Tensor:
    return tensor[row] if is_A else tensor[row : row + 1]
