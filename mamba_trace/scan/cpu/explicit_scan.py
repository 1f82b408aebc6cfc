"""The scan over given A_bar and B_bar on a CPU: PyTorch's side of the compiled loops.

Registered with PyTorch as a custom operator; the second derivative is `reference`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import gradients
from . import team
from .arrays import as_dense, as_floats, count_blocks, empty_results, starting_state


def explicit_scan(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_scan`, in float32."""
    y, h_last, _ = _explicit(*as_floats(A_bar, B_bar, x, C), starting_state(x, A_bar, h_start), False)
    return y, h_last


def explicit_states(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.explicit_states`, in float32."""
    y, _, states = _explicit(*as_floats(A_bar, B_bar, x, C), starting_state(x, A_bar, h_start), True)
    return y, states


def _run_explicit(
    A_bar: Tensor, B_bar: Tensor, x: Tensor, C: Tensor, h: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import explicit as compiled

    results = empty_results(x, A_bar, keep)
    matrices = [
        m if m.stride(-1) == 1 and m.stride(-2) == m.shape[-1] else as_dense(m) for m in (A_bar, B_bar)
    ]
    team.run(
        compiled.forward,
        team.pieces(count_blocks(x, compiled.WIDTH), x.shape[1]),
        keep=int(keep),
        A_bar=matrices[0],
        B_bar=matrices[1],
        x=as_dense(x),
        C=as_dense(C),
        h_start=as_dense(h),
        **dict(zip(("y", "h_last", "states"), results, strict=True)),
    )
    return results


def _run_explicit_backward(
    A_bar: Tensor,
    B_bar: Tensor,
    x: Tensor,
    C: Tensor,
    h: Tensor,
    gy: Tensor,
    gh_last: Tensor,
    gstates: Tensor,
) -> list[Tensor]:
    from . import explicit_backward as _explicit_backward
    from .explicit import WIDTH

    A_bar, B_bar, x, C, h, gy, gh_last, gstates = map(as_dense, (A_bar, B_bar, x, C, h, gy, gh_last, gstates))
    *_, states = _run_explicit(A_bar, B_bar, x, C, h, True)
    count = team.pieces(count_blocks(x, WIDTH), x.shape[1], shares=1)
    gA_bar, gB_bar, gx, gh = (torch.empty_like(tensor) for tensor in (A_bar, B_bar, x, h))
    gC = C.new_zeros(count, *C.shape)
    team.run(
        _explicit_backward.backward,
        count,
        keep=int(gstates.shape[1] > 0),
        A_bar=A_bar,
        B_bar=B_bar,
        x=x,
        C=C,
        h_start=h,
        states=states,
        gy=gy,
        gh_last=gh_last,
        gstates=gstates,
        gA_bar=gA_bar,
        gB_bar=gB_bar,
        gx=gx,
        gh_start=gh,
        gC=gC,
    )
    return [gA_bar, gB_bar, gx, gC.sum(0), gh]


def _keep_explicit_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate_explicit(ctx: Any, gy: Tensor, gh_last: Tensor, gstates: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():
        results = [*reference.explicit_scan(*inputs)]
        if gstates.shape[1]:
            results.append(reference.explicit_states(*inputs)[1])
        return (*gradients(results, inputs, (gy, gh_last, gstates)), None)
    return (*_explicit_scan_backward(*inputs, gy, gh_last, gstates), None)


_explicit: Any = torch.library.custom_op("mamba_trace::explicit_scan_cpu", _run_explicit, mutates_args=())
_explicit.register_fake(lambda A_bar, B_bar, x, C, h, keep: empty_results(x, A_bar, keep))
_explicit.register_autograd(_differentiate_explicit, setup_context=_keep_explicit_inputs)

_explicit_scan_backward: Any = torch.library.custom_op(
    "mamba_trace::explicit_scan_cpu_backward", _run_explicit_backward, mutates_args=()
)
_explicit_scan_backward.register_fake(
    lambda *tensors: [tensor.new_empty(tensor.shape) for tensor in tensors[:5]],
)
