"""The scan on a CPU in float32: compiled, over blocks of channels, on as many threads as PyTorch uses.

Registered with PyTorch as custom operators, so that they run under fake tensors (``model.scan``) and in
compiled graphs. Differentiable in every argument and every result; the second derivative is `reference`'s.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import gradients

__all__ = ["selective_scan", "selective_states", "unavailable"]

#: Fewer channel blocks x positions than this are not worth a second thread.
SMALL = 512


def unavailable(x: Tensor | None = None, dtype: torch.dtype = torch.float32) -> str | None:
    """Why this backend cannot run on inputs such as ``x`` accumulated in ``dtype``; ``None`` if it can."""
    if (reason := _broken()) is not None:
        return reason
    if x is not None and x.device.type != "cpu":
        return f"the model is on {x.device}, and it runs on the CPU alone"
    if dtype != torch.float32:
        return f"it computes in float32, not {dtype}"
    return None


@functools.cache
def _broken() -> str | None:
    # Importing compiled code can fail in many ways, and none of them may stop a model from running.
    if importlib.util.find_spec("numba") is None:
        reason = "it needs numba: pip install numba"
    else:
        try:
            importlib.import_module("._kernels", __package__)
            return None
        except Exception as error:
            reason = f"numba does not work here ({type(error).__name__}: {error})"
    warnings.warn(f"the compiled scan cannot run, so the slower reference does: {reason}", stacklevel=3)
    return reason


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, in float32."""
    y, h_last, _ = _scan(*_prepare(x, delta, A, B, C, h_start), False)
    return y, h_last


def selective_states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_states`, in float32."""
    y, _, states = _scan(*_prepare(x, delta, A, B, C, h_start), True)
    return y, states


def _prepare(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> list[Tensor]:
    if h is None:
        h = x.new_zeros(x.shape[0], x.shape[2], A.shape[1], dtype=torch.float32)
    return [tensor.to(torch.float32).contiguous() for tensor in (x, delta, A, B, C, h)]


def _run(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import _kernels

    results = _results(x, A, h, keep)
    arrays = [tensor.detach().numpy() for tensor in (x, delta, A, B, C, h, *results)]
    _in_pieces(x, lambda piece, first, last: _kernels.forward(*arrays, first, last))
    return results


def _results(x: Tensor, A: Tensor, h: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    states = x.new_empty(x.shape[0], x.shape[1] if keep else 0, x.shape[2], A.shape[1])
    return torch.empty_like(x), torch.empty_like(h), states


def _run_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    gy: Tensor,
    gh_last: Tensor,
    gstates: Tensor,
) -> list[Tensor]:
    from . import _kernels

    gx, gdelta, gh = torch.empty_like(x), torch.empty_like(x), torch.empty_like(h)
    gA = torch.empty_like(h)
    pieces = len(_pieces(x))
    gB, gC = B.new_zeros(pieces, *B.shape), C.new_zeros(pieces, *C.shape)
    given = [tensor.numpy() for tensor in (x, delta, A, B, C, h, gy, gh_last, gstates)]
    made = [tensor.numpy() for tensor in (gx, gdelta, gA)]
    sums = list(zip(gB.numpy(), gC.numpy(), strict=True))

    def run(piece: int, first: int, last: int) -> None:
        _kernels.backward(*given, *made, *sums[piece], gh.numpy(), first, last)

    _in_pieces(x, run)
    return [gx, gdelta, gA.sum(0), gB.sum(0), gC.sum(0), gh]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])


def _differentiate(ctx: Any, gy: Tensor, gh_last: Tensor, gstates: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative will be asked for
        results = [*reference.selective_scan(*inputs)]
        if gstates.shape[1]:
            results.append(reference.selective_states(*inputs)[1])
        return (*gradients(results, inputs, (gy, gh_last, gstates)), None)
    grads = (grad.contiguous() for grad in (gy, gh_last, gstates))
    return (*_scan_backward(*inputs, *grads), None)


_scan: Any = torch.library.custom_op("mamba_trace::selective_scan_cpu", _run, mutates_args=())
_scan.register_fake(lambda x, delta, A, B, C, h, keep: _results(x, A, h, keep))
_scan.register_autograd(_differentiate, setup_context=_keep_inputs)

_scan_backward: Any = torch.library.custom_op(
    "mamba_trace::selective_scan_cpu_backward", _run_backward, mutates_args=()
)
_scan_backward.register_fake(lambda *tensors: [torch.empty_like(tensor) for tensor in tensors[:6]])


# -- threads ---------------------------------------------------------------------------------------------


def _pieces(x: Tensor) -> list[tuple[int, int]]:
    # The blocks (batch x channel blocks) each thread runs.
    from ._kernels import WIDTH

    blocks = x.shape[0] * -(-x.shape[2] // WIDTH)
    threads = torch.get_num_threads()
    # PyTorch's own threads go on spinning for a while after each matmul: of two cores they leave one.
    worthwhile = threads > 2 and blocks * x.shape[1] >= SMALL
    threads = min(threads, blocks) if worthwhile else 1
    bounds = [blocks * piece // threads for piece in range(threads + 1)]
    return list(itertools.pairwise(bounds))


def _in_pieces(x: Tensor, run: Callable[[int, int, int], None]) -> None:
    *others, mine = list(enumerate(_pieces(x))) or [(0, (0, 0))]
    waiting = [_pool(len(others)).submit(run, piece, *span) for piece, span in others]
    run(mine[0], *mine[1])
    for future in waiting:
        future.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mamba_trace_scan")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
