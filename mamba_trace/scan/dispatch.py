"""Which backend runs a scan: chosen at each call from device, dtype, size and availability, or forced.

A backend is a module that has the functions of `reference`, where they are defined, and `unavailable`, which
says why the backend cannot run. A backend may lack the explicit scan or the convolution; then Triton or
PyTorch runs them. Each family of scans (`family`) has a module for each backend. What is the same for all
families and backends is here. Fake tensors get results of the right shapes and
nothing is computed. A call without elements, or with a single position on a GPU, needs no kernel. A call
under a transform of `torch.func` cannot have one. Where each batch row has its own A, the rows are run one at
a time.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BackendError
from . import cpu, cuda, dual, outline, reference, triton
from .recompute import differentiated, transformed
from .record import note, pass_over
from .reference import accumulation_dtype
from .room import Room
from .rows import by_rows
from .runs import Runs, causal_conv_runs, gated_runs

#: The backends of the selective family by name, those of a GPU best first.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
#: The backends of each family of scans.
FAMILIES: dict[str, Mapping[str, ModuleType]] = {"selective": BACKENDS, "dual": dual.BACKENDS}
#: What ``kernels=`` takes.
KERNELS = ("auto", *BACKENDS)
#: The backends that suit a type of device. A family lists its backends best first.
SUITABLE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def check(kernels: str, family: str | None = None) -> str:
    """Return ``kernels`` if it is ``"auto"`` or a backend that can run a family on this machine at all.

    Args:
        kernels: the choice of backend.
        family: the family of scans, ``"selective"`` or ``"dual"``, whose kernels come in parts of their own;
            ``None`` if any family will do.

    Raises:
        BackendError: if there is no such backend, or if it cannot run, with the reason.
    """
    if kernels not in KERNELS:
        raise BackendError(f"no backend is called {kernels!r}; there are {', '.join(KERNELS)}")
    if kernels == "auto":
        return kernels
    families = FAMILIES if family is None else (family,)
    reasons = [FAMILIES[each][kernels].unavailable() for each in families]
    for reason in (None if None in reasons else reasons[0], _conv_misfit(kernels)):
        if reason is not None:
            raise BackendError(f"kernels={kernels!r} cannot run: {reason}")
    return kernels


def choose(
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
    d_state: int,
    backends: Mapping[str, ModuleType] = BACKENDS,
) -> str:
    """The name of the backend that runs a scan accumulated in ``dtype`` over states of ``d_state`` numbers.

    Args:
        kernels: ``"auto"`` or the name of a backend.
        device: where the inputs are.
        dtype: the dtype that the scan accumulates in.
        d_state: N.
        backends: the backends of the family of the scan.

    Raises:
        BackendError: if ``kernels`` names a backend that cannot run on these inputs, with the reason.
    """
    if transformed():
        if kernels in ("auto", "reference"):
            return "reference"
        raise BackendError(
            f"kernels={kernels!r} cannot run under torch.func or forward-mode differentiation, which know "
            "PyTorch's own operations alone: use kernels='auto' or kernels='reference'"
        )
    if kernels != "auto":
        if (reason := backends[kernels].unavailable(device, dtype, d_state)) is not None:
            raise BackendError(f"kernels={kernels!r} cannot run this scan: {reason}; use kernels='auto'")
        return kernels
    reasons: list[str] = []
    for name in (each for each in backends if each in SUITABLE.get(device.type, ())):
        reason = backends[name].unavailable(device, dtype, d_state)
        if reason is None:
            pass_over(reasons)
            return name
        reasons.append(f"{name}: {reason}")
    if dtype == torch.float32:
        pass_over(reasons)
        if reasons:
            warn_of_fallback("; ".join(reasons))
    return "reference"


def _conv_misfit(name: str) -> str | None:
    # Why the release that a backend's convolution would come from cannot be used.
    return getattr(BACKENDS[name], "conv_misfit", lambda: None)()


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine.

    Attributes:
        backend: its name.
        scan: why its scan cannot run, and what to do about it; ``None`` if it can run.
        convolution: the same for its convolution.
    """

    backend: str
    scan: str | None
    convolution: str | None


def availability(family: str = "selective") -> list[Availability]:
    """Whether each backend of a family of scans can run on this machine.

    Example::

        [each.backend for each in availability() if each.scan is None]
    """

    def no_convolution() -> str:
        return "it has none of its own, and PyTorch's runs"

    return [
        Availability(name, backend.unavailable(), getattr(backend, "conv_unavailable", no_convolution)())
        for name, backend in FAMILIES[family].items()
    ]


_warned = False


def warn_of_fallback(reasons: str) -> None:
    """Warn, once in a process, that no compiled kernel can run and that plain PyTorch runs instead."""
    global _warned
    if not _warned:
        _warned = True
        message = f"no compiled scan can run here, so the slower plain PyTorch one does ({reasons})"
        warnings.warn(f"{message}. `mamba-trace info` says what to install", stacklevel=2)


def dispatched(
    definition: Callable[..., tuple[Tensor, Tensor]],
    backends: Mapping[str, ModuleType] = BACKENDS,
    outlines: ModuleType = outline,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the function that runs a scan of a family on any of its backends.

    It takes the arguments of its definition, by position or by name, and ``kernels``: the backend to run on,
    or ``"auto"``, the default, for the best that can run on these inputs.

    Args:
        definition: the function in the ``reference`` module of the family.
        backends: the backends of the family.
        outlines: the module that runs the family's scans on fake tensors.
    """
    name, signature = definition.__name__, inspect.signature(definition)
    arguments = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
    signature = signature.replace(parameters=arguments)
    C_at = [*signature.parameters].index("C")
    A_at = 2 if "A" in signature.parameters else None

    def run(*inputs: Tensor | None, kernels: str = "auto", **named: Tensor | None) -> tuple[Tensor, Tensor]:
        if named:
            inputs = signature.bind(*inputs, **named).args
        # One that stands for the negative of another has its memory, which a kernel would read.
        inputs = tuple(None if each is None else each.resolve_neg() for each in inputs)
        first, C = inputs[0], inputs[C_at]
        assert isinstance(first, Tensor)
        assert isinstance(C, Tensor)
        if isinstance(first, FakeTensor) or first.is_meta:
            return getattr(outlines, name)(*inputs)
        chosen = choose(kernels, first.device, accumulation_dtype(*inputs), C.shape[-1], backends)
        backend = _backend(name, chosen, first, C.shape[-1], backends)
        note(name, backend, first.shape[1])
        function = getattr(backends[backend], name)
        A = None if A_at is None else inputs[A_at]
        return function(*inputs) if A is None or A.dim() < 3 else by_rows(function, inputs, A)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"On the backend ``kernels``, or on the best that can run: {inspect.getdoc(definition)}"
    option = inspect.Parameter("kernels", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation="str")
    run.__signature__ = signature.replace(parameters=[*arguments, option])  # type: ignore[attr-defined]
    return run


def _backend(name: str, chosen: str, first: Tensor, d_state: int, backends: Mapping[str, ModuleType]) -> str:
    # The name of the backend that runs the function ``name`` on inputs such as ``first`` [B,L,...], given the
    # one that was chosen for the scans of the family.
    if not hasattr(backends[chosen], name):  # mamba-ssm's kernels take no matrices
        impossible = backends["triton"].unavailable(first.device, torch.float32, d_state)
        chosen = "reference" if impossible else "triton"
    if first.numel() == 0 or (first.shape[1] == 1 and not getattr(backends[chosen], "TAKES_ONE_POSITION", False)):
        return "reference"  # there is nothing to do, or one update of the state
    return chosen


selective_scan = dispatched(reference.selective_scan)
selective_states = dispatched(reference.selective_states)
gated_scan = dispatched(reference.gated_scan)
explicit_scan = dispatched(reference.explicit_scan)
explicit_states = dispatched(reference.explicit_states)


def convolution(kernels: str, device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    """The backend whose ``causal_conv`` is faster here than PyTorch's convolution; ``None`` if there is none.

    Args:
        kernels: as for the scans. PyTorch runs the convolution of a backend that has none.
        device, dtype: of the inputs.
        width: how many positions the convolution looks at.
    """
    if transformed():
        return None
    for name in SUITABLE.get(device.type, ()) if kernels == "auto" else (kernels,):
        backend = BACKENDS[name]
        if hasattr(backend, "conv_unavailable") and backend.conv_unavailable(device, dtype, width) is None:
            return backend
        if kernels == "auto" and (reason := _conv_misfit(name)) is not None:
            pass_over([f"{name}: {reason}"])
    return None


def causal_conv(
    x_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    *,
    activate: bool,
    backend: ModuleType,
    runs: Runs | None = None,
) -> Tensor:
    """`reference.causal_conv` on a backend that `convolution` has returned.

    Where the rows are several ``runs``, ``before`` are the columns before each of them [runs,channels,K].
    """
    note("conv_silu" if activate else "causal_conv", backend.__name__.rsplit(".", 1)[-1], x_in.shape[1])
    if runs is None or before is None:
        return backend.causal_conv(x_in, weight, bias, before, activate=activate)
    return causal_conv_runs(backend, x_in, weight, bias, before, runs, activate)


def in_runs(
    scan: Callable[..., tuple[Tensor, Tensor]], backends: Mapping[str, ModuleType] = BACKENDS
) -> Callable[..., Tensor]:
    """Make the function that runs the gated scan of a family over rows that are several runs: see `ScanFamily`.

    Args:
        scan: the family's ``gated_scan``.
        backends: the backends of the family. One with ``gated_runs`` does all runs in one call, if none is longer
            than its ``LONGEST_RUN``.
    """

    def run(*inputs: Any, kernels: str = "auto", room: Room | None = None) -> Tensor:
        *tensors, runs = inputs
        x, _, A, _, C, *_ = tensors
        if not (isinstance(x, FakeTensor) or x.numel() == 0 or A.dim() == 3 or differentiated(*tensors)):
            chosen = choose(kernels, x.device, accumulation_dtype(*tensors), C.shape[-1], backends)
            if max(runs.lengths) <= getattr(backends[chosen], "LONGEST_RUN", 0):
                note("gated_scan", chosen, x.shape[1])
                return backends[chosen].gated_runs(*inputs, room)
        return gated_runs(scan, *inputs, kernels=kernels)

    return run
