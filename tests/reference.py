"""Mamba once more, written out from the paper in float64, with a function that may edit every value.

The tests need a reference that is independent of the package and of Hugging Face's module and that can be
intervened on everywhere. `forward` is one: plain tensors, no modules, no cache, no padding, no fast path.
Each value passes through ``edit(hook name, value)``, which returns what the computation goes on with; so the
same interventions can be made here and in a trace, and autograd gives their gradients.

`Edit` is one such intervention, which can also be made in a trace.

Source: Mamba (arXiv 2312.00752), section 3 and figure 3; the Euler form of B as in its released code. For
Falcon-Mamba's norms: arXiv 2410.05355, section 3.2. Mamba-2 is in `reference_dual`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EditValue = Callable[[str, Tensor], Tensor]


def forward(weights: Mapping[str, Tensor], config: Any, tokens: Tensor, edit: EditValue | None = None) -> Tensor:
    """The logits [B,L,V] in float64.

    Args:
        weights: state dict under Hugging Face's names, any floating dtype.
        config: a ``MambaConfig``, ``FalconMambaConfig`` or ``Mamba2Config``.
        tokens: [B,L].
        edit: ``edit(hook name, value)`` is what the computation goes on with. Hook names are MambaLens's, in
            execution order, and TransformerLens 4's where it has none, as for the outputs of inner
            modules. ``blocks.l.hook_h`` is the whole trajectory [B,L,E,N], after every ``hook_h.p``.
    """
    if config.model_type == "mamba2":
        import reference_dual

        return reference_dual.forward(weights, config, tokens, edit)
    edit = edit or (lambda hook, value: value)
    w = {name: weight.double() for name, weight in weights.items()}
    resid = edit("hook_embed", w["backbone.embeddings.weight"][tokens])  # [B,L,D]
    for layer in range(config.num_hidden_layers):
        block = {n.removeprefix(f"backbone.layers.{layer}."): t for n, t in w.items() if f".layers.{layer}." in n}
        resid = _block(block, config, resid, lambda hook, v, layer=layer: edit(_hook_name(layer, hook), v))
    final = edit("hook_norm", _rms_norm(resid, w["backbone.norm_f.weight"], config))
    return edit("hook_logits", final @ w.get("lm_head.weight", w["backbone.embeddings.weight"]).T)


def _hook_name(layer: int, hook: str) -> str:
    return f"blocks.{layer}.{hook if hook.startswith('mixer.') else f'hook_{hook}'}"


def _block(w: Mapping[str, Tensor], config: Any, resid: Tensor, edit: EditValue) -> Tensor:
    resid = edit("resid_pre", resid)
    normalized = edit("normalized_input", _rms_norm(edit("layer_input", resid), w["norm.weight"], config))
    both = normalized @ w["mixer.in_proj.weight"].T + w.get("mixer.in_proj.bias", 0)
    both = edit("mixer.in_proj.hook_out", both)
    skip = edit("skip", both[..., config.intermediate_size :])  # [B,L,E]
    x_in = edit("in_proj", both[..., : config.intermediate_size])
    columns = _convolution(x_in, w["mixer.conv1d.weight"]) + w.get("mixer.conv1d.bias", 0)
    columns = edit("mixer.conv1d.hook_out", columns.transpose(1, 2))  # [B,E,L+K-1]: both ends are padded
    conv = edit("conv", columns.transpose(1, 2)[:, : x_in.shape[1]])
    x = edit("ssm_input", conv * torch.sigmoid(conv))
    y = edit("y", _ssm(w, config, x, edit))
    output = edit("ssm_output", y + w["mixer.D"] * x)
    gated = edit("after_skip", output * skip * torch.sigmoid(skip))
    out = edit("out_proj", gated @ w["mixer.out_proj.weight"].T + w.get("mixer.out_proj.bias", 0))
    return edit("resid_post", resid + out)


def _ssm(w: Mapping[str, Tensor], config: Any, x: Tensor, edit: EditValue) -> Tensor:
    R, N = w["mixer.dt_proj.weight"].shape[1], w["mixer.A_log"].shape[1]
    h = edit("h_start", x.new_zeros(x.shape[0], x.shape[2], N))  # [B,E,N]
    projected = edit("mixer.x_proj.hook_out", x @ w["mixer.x_proj.weight"].T)
    low_rank, B, C = projected.split([R, N, N], dim=-1)
    if config.model_type == "falcon_mamba":  # norms without weights
        low_rank, B, C = (
            value / (value.square().mean(-1, keepdim=True) + config.mixer_rms_eps).sqrt() for value in (low_rank, B, C)
        )
    delta_1 = edit("delta_1", low_rank)
    delta_2 = edit("delta_2", delta_1 @ w["mixer.dt_proj.weight"].T + w["mixer.dt_proj.bias"])
    delta = edit("delta", torch.logaddexp(delta_2, torch.zeros_like(delta_2)))
    A = edit("A", -w["mixer.A_log"].exp())
    A_bar = edit("A_bar", torch.exp(delta.unsqueeze(-1) * A))  # [B,L,E,N]
    B = edit("B", B)
    B_bar = edit("B_bar", delta.unsqueeze(-1) * B.unsqueeze(-2))  # [B,L,E,N]
    C = edit("C", C)
    write = edit("mixer.hook_ssm_write", B_bar * x.unsqueeze(-1))
    states = []
    for p in range(x.shape[1]):
        h = edit(f"h.{p}", A_bar[:, p] * h + write[:, p])
        states.append(h)
    read = edit("mixer.hook_ssm_state", edit("h", torch.stack(states, dim=1)))
    return (read * C.unsqueeze(-2)).sum(-1)


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    taps, length = weight.shape[-1], x.shape[1]
    nothing = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    padded = torch.cat((nothing, x, nothing), dim=1)
    return sum(padded[:, k : k + length + taps - 1] * weight[:, 0, k] for k in range(taps))


def _rms_norm(x: Tensor, weight: Tensor, config: Any) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()


@dataclass(frozen=True)
class Edit:
    """One intervention.

    Attributes:
        hook: the hook's name.
        op: ``scale``, ``add``, ``replace``, ``zero``, ``add_at_position`` (``value[:, position] += t``)
            or ``replace_first_row`` (``value[0] = t``), t the argument.
        argument: the factor of ``scale``, the tensor of the others.
        position: of ``add_at_position``, along the value's second axis, or its only one.
    """

    hook: str
    op: str
    argument: Any = None
    position: int = 0

    def __call__(self, value: Tensor) -> Tensor:
        """The edited value, a new tensor."""
        if self.op == "scale":
            return value * self.argument
        if self.op == "zero":
            return torch.zeros_like(value)
        argument = self.argument.to(value.dtype)
        if self.op == "add":
            return value + argument
        if self.op == "replace":
            return argument.clone()
        edited = value.clone()
        if self.op == "add_at_position":
            self._at_position(edited).add_(argument)
        elif self.op == "replace_first_row":
            edited[0] = argument
        else:
            raise ValueError(f"unknown operation {self.op!r}")
        return edited

    def _at_position(self, value: Tensor) -> Tensor:
        return value.select(min(1, value.dim() - 1), self.position)

    def assign(self, envoy: Any) -> None:
        """Make the edit in a trace, by assignment."""
        envoy.output = self(envoy.output)

    def in_place(self, envoy: Any) -> None:
        """Make the edit in a trace, in place."""
        value = envoy.output
        if self.op == "scale":
            value.mul_(self.argument)
        elif self.op == "zero":
            value[:] = 0
        elif self.op == "add":
            value += self.argument.to(value.dtype)
        elif self.op == "add_at_position":
            self._at_position(value).add_(self.argument.to(value.dtype))
        else:
            value[...] = self(value)


def editing(edits: Iterable[Edit]) -> EditValue:
    """The ``edit`` argument of `forward` that makes ``edits``."""
    by_hook: dict[str, list[Edit]] = {}
    for edit in edits:
        by_hook.setdefault(edit.hook, []).append(edit)

    def edit_value(hook: str, value: Tensor) -> Tensor:
        for edit in by_hook.get(hook, ()):
            value = edit(value)
        return value

    return edit_value
