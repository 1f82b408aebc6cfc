"""What a module does with its input, in numbers: the weights it amounts to, whatever it is made of by now.

Analyses of the residual stream are linear algebra with the unembedding and the norms. Their ``.weight`` is
not to be trusted: of an adapted layer it is that of the layer below the adapter, of a quantised one it is
packed integers, of an offloaded one it holds no numbers, and a PyTorch hook may change what comes out. So a
weight is read only where the module is the plain one and nobody has changed it; otherwise the module is
called and its answers tell.

Contract: each of these functions gives what a call of the module in the model would, without its bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..tracing import is_itself
from ..tracing.placement import input_device
from .mixer import HookableRMSNorm

#: How many rows of logits [n,V] are made at a time.
ROWS = 64


def input_dtype(module: Any) -> torch.dtype:
    """The dtype that a module takes its input in: that of its weight, or of its first floating parameter."""
    weights = [getattr(module, "weight", None), *module.parameters()]
    for weight in weights:
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
            return weight.dtype
    return torch.get_default_dtype()


def n_outputs(head: Any, width: int) -> int:
    """How many numbers an unembedding makes of an input [D] of ``width`` numbers: V."""
    if is_itself(head, nn.Linear):
        return len(head.weight)
    with torch.no_grad():
        return int(head(_zeros(head, 1, width)).shape[-1])


def token_directions(head: Any, ids: Tensor, width: int) -> Tensor:
    """The direction of the normed stream that raises each token's logit: rows of the unembedding's weight.

    Args:
        head: the unembedding, a module from [...,D] to [...,V].
        ids: tokens, integers of any shape.
        width: D.

    Returns:
        The shape of ``ids`` and [D] behind it. Rows of the parameter itself where the unembedding is a plain
        ``Linear``, else new ones: the gradients of the logits.
    """
    if is_itself(head, nn.Linear):
        return head.weight[ids.to(head.weight.device)]
    unique, places = ids.flatten().unique(return_inverse=True)
    with torch.inference_mode(False), torch.enable_grad():
        parts = [_gradients(head, some, width) for some in unique.split(ROWS)]
    rows = torch.cat(parts) if parts else _zeros(head, 0, width)  # [n,D]
    return rows[places.to(rows.device)].view(*ids.shape, width)


def _gradients(head: Any, ids: Tensor, width: int) -> Tensor:
    normed = _zeros(head, len(ids), width).requires_grad_()  # [n,D]
    logits = head(normed)  # [n,V]
    chosen = logits.gather(-1, ids.to(logits.device)[:, None])
    return torch.autograd.grad(chosen.sum(), normed)[0]


def without_bias(head: Any, unembed: Any, normed: Tensor) -> Tensor:
    """The unembedding [...,V] of a term of the normed stream [...,D]: all but what it adds to any input.

    Args:
        head: the module.
        unembed: what calls it.
        normed: in the module's `input_dtype`.
    """
    logits: Tensor = unembed(normed)
    if is_itself(head, nn.Linear) and head.bias is None:
        return logits
    return logits - unembed(torch.zeros_like(normed[..., :1, :]))


def norm_weight(norm: Any, width: int) -> Tensor:
    """The weight [D] of an RMSNorm, detached.

    Raises:
        CheckpointError: if there is no RMSNorm in ``norm``, so that it is no weight times a scale.
    """
    epsilon_of(norm)
    if issubclass(type(norm), HookableRMSNorm) and is_itself(norm, type(norm)):
        return norm.weight.detach()
    # A stream of one large number is divided by it, which leaves the weight: its square swallows epsilon.
    dtype = input_dtype(norm)
    large = 2.0**30 if dtype == torch.float64 else 2.0**15
    with torch.no_grad():
        return norm(torch.full((1, width), large, dtype=dtype, device=input_device(norm)))[0]


def epsilon_of(norm: Any) -> float:
    """The epsilon of an RMSNorm, adapted or not. Raises `CheckpointError` if ``norm`` is none."""
    module: Any
    for module in norm.modules():
        if isinstance(module, HookableRMSNorm):
            return module.variance_epsilon  # type: ignore[attr-defined]
    raise CheckpointError(
        f"a {type(norm).__name__} stands in the place of an RMSNorm, and is not linear in the stream "
        f"with one scale for each position: the terms of the stream have no logits of their own"
    )


def _zeros(module: Any, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=input_dtype(module), device=input_device(module))
