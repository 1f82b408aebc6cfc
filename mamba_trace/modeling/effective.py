"""What a module does with its input, in numbers: the weights that it amounts to.

Analyses of the residual stream are linear algebra with the unembedding and the norms, whose ``.weight`` may
be wrong: an adapted layer shows the weight below the adapter, a quantised one packed integers, an offloaded
one no numbers, and a PyTorch hook may change the output. So a weight is read only from a plain module that
nobody has changed. Any other module is called, and the functions here work out from its answers what a call
in the model would give, without the module's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..scan.reference import accumulation_dtype
from ..tracing import is_itself
from ..tracing.placement import input_device
from .architectures import language_model, layout_of
from .block import HookableRMSNorm, ParallelBlock, times
from .dual import DualMixer, HookableGatedRMSNorm

#: How many rows of logits [n,V] are made at a time.
ROWS = 64


def input_dtype(module: Any) -> torch.dtype:
    """The dtype of a module's input: that of its weight, or of its first floating parameter."""
    weights = [getattr(module, "weight", None), *module.parameters()]
    for weight in weights:
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
            return weight.dtype
    return torch.get_default_dtype()


def n_outputs(head: Any, width: int) -> int:
    """V, the number of outputs of an unembedding whose input [D] has ``width`` numbers."""
    if is_itself(head, nn.Linear):
        return len(head.weight)
    with torch.no_grad():
        return int(head(_zeros(head, 1, width)).shape[-1])


def logits_factor(model: nn.Module) -> float:
    """What a model multiplies the output of its unembedding by to have its logits, 1 in most."""
    if not layout_of(model).logits:
        return 1.0
    whole = language_model(model)  # the two names are Falcon-H1's and Granite 4's
    return float(getattr(whole.model, "lm_head_multiplier", 1.0) / getattr(whole.config, "logits_scaling", 1.0))


def ssm_factor(block: Any) -> float:
    """What a block multiplies the output of its mixer by before it adds it to the residual stream, 1 in most."""
    name = "ssm_out_multiplier" if isinstance(block, ParallelBlock) else "residual_multiplier"
    return float(getattr(block, name, 1.0))


def token_directions(head: Any, ids: Tensor, width: int, factor: float = 1.0) -> Tensor:
    """The direction of the normed stream that raises each token's logit: rows of the unembedding's weight.

    Args:
        head: the unembedding, a module from [...,D] to [...,V].
        ids: tokens, integers of any shape.
        width: D.
        factor: the model's `logits_factor`.

    Returns:
        [..., D], ... the shape of ``ids``: rows of the parameter itself where the unembedding is a plain
        ``Linear`` whose output are the logits, else new tensors, the gradients of the logits.
    """
    return times(_directions(head, ids, width), factor)


def _directions(head: Any, ids: Tensor, width: int) -> Tensor:
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
    """The unembedding [...,V] of a term of the normed stream [...,D], without what it adds to any input.

    Args:
        head: the module.
        unembed: the function that calls it.
        normed: the term, in the module's `input_dtype`.
    """
    logits: Tensor = unembed(normed)
    if is_itself(head, nn.Linear) and head.bias is None:
        return logits
    return logits - unembed(torch.zeros_like(normed[..., :1, :]))


@dataclass(frozen=True)
class FrozenNorm:
    """An RMSNorm as the linear function that it is with its scales frozen at what they are in a run.

    Attributes:
        weight: [D], detached.
        epsilon: what it adds to the mean square.
        group_size: how many numbers share one scale: all D, or those of a group in a mixer of Mamba-2.
    """

    weight: Tensor
    epsilon: float
    group_size: int

    @classmethod
    def of(cls, norm: Any, width: int) -> FrozenNorm:
        """Those of a norm over ``width`` numbers, adapted or not.

        Raises:
            CheckpointError: if there is no RMSNorm in ``norm``, so that it is not a weight times a scale.
        """
        plain = rms_norm_in(norm)
        return cls(_norm_weight(norm, width), plain.variance_epsilon, getattr(plain, "group_size", width))

    @classmethod
    def inside(cls, mixer: Any) -> FrozenNorm | None:
        """That of a mixer's own norm between its scan and out_proj; ``None`` where it has none, as in Mamba-1.

        Its input is the site that `normed_in` names.
        """
        has_one = isinstance(mixer, DualMixer) and "inner_norm" not in mixer.lacks
        return cls.of(mixer.norm, mixer.sizes["E"]) if has_one else None

    def scale(self, value: Tensor) -> Tensor:
        """What the norm divides its input [...,D] by, inverted: one number for each group [...,D / group_size]."""
        groups = value.to(accumulation_dtype(value)).unflatten(-1, (-1, self.group_size))
        return (groups.square().mean(-1) + self.epsilon).rsqrt()

    def factors(self, value: Tensor) -> Tensor:
        """What the norm multiplies each number of an input [...,D] by, which is this input in the run."""
        return self.scale(value).repeat_interleave(self.group_size, -1) * self.weight.to(value.device)


def normed_in(mixer: Any) -> str:
    """The site that a mixer's own norm has as its input: a Falcon-H1 may have it before the gate."""
    return "ssm_output" if mixer.norm_first else "after_skip"


def _norm_weight(norm: Any, width: int) -> Tensor:
    if isinstance(norm, (HookableRMSNorm, HookableGatedRMSNorm)) and is_itself(norm, type(norm)):
        return norm.weight.detach()
    # A stream of one large number is divided by it, which leaves the weight: its square swallows epsilon.
    dtype = input_dtype(norm)
    large = 2.0**30 if dtype == torch.float64 else 2.0**15
    with torch.no_grad():
        return norm(torch.full((1, width), large, dtype=dtype, device=input_device(norm)))[0]


def rms_norm_in(norm: Any) -> HookableRMSNorm | HookableGatedRMSNorm:
    """The RMSNorm that ``norm`` is or adapts. Raises `CheckpointError` if there is none."""
    for module in norm.modules():
        if isinstance(module, (HookableRMSNorm, HookableGatedRMSNorm)):
            return module
    raise CheckpointError(
        f"a {type(norm).__name__} stands in the place of an RMSNorm, and is not linear in the stream "
        f"with one scale for each position: the terms of the stream have no logits of their own"
    )


def _zeros(module: Any, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=input_dtype(module), device=input_device(module))
