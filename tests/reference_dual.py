"""Mamba-2 written out from the paper in float64, with a function that may edit every value.

As `reference` for Mamba-1: plain tensors, one position at a time, no modules, no cache, no padding.

Source: Mamba-2 (arXiv 2405.21060), section 7 and figure 6; the order of in_proj's rows as in its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from reference import EditValue, _convolution, _hook_name
from torch import Tensor


def forward(weights: Mapping[str, Tensor], config: Any, tokens: Tensor, edit: EditValue | None = None) -> Tensor:
    """The logits [B,L,V] in float64; arguments as for `reference.forward`, with a ``Mamba2Config``."""
    edit = edit or (lambda hook, value: value)
    w = {name: weight.double() for name, weight in weights.items()}
    resid = edit("hook_embed", w["backbone.embeddings.weight"][tokens])  # [B,L,D]
    for layer in range(config.num_hidden_layers):
        prefix = f"backbone.layers.{layer}."
        block = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
        resid = _block(block, config, resid, lambda hook, v, layer=layer: edit(_hook_name(layer, hook), v))
    final = edit("hook_norm", _rms(resid, config.layer_norm_epsilon) * w["backbone.norm_f.weight"])
    return edit("hook_logits", final @ w.get("lm_head.weight", w["backbone.embeddings.weight"]).T)


def _block(w: Mapping[str, Tensor], config: Any, resid: Tensor, edit: EditValue) -> Tensor:
    H, P, G, N = config.num_heads, config.head_dim, config.n_groups, config.state_size
    E, eps = H * P, config.layer_norm_epsilon
    resid = edit("resid_pre", resid)
    u = edit("normalized_input", _rms(edit("layer_input", resid), eps) * w["norm.weight"])
    rows = edit("mixer.in_proj.hook_out", u @ w["mixer.in_proj.weight"].T + w.get("mixer.in_proj.bias", 0))
    skip, x_in, B_in, C_in, delta_1 = rows.split([E, E, G * N, G * N, H], dim=-1)
    skip, x_in = edit("skip", skip), edit("in_proj", x_in)
    B_in, C_in = (edit(name, t.unflatten(-1, (G, N))) for name, t in (("B_in", B_in), ("C_in", C_in)))
    joined = torch.cat((x_in, B_in.flatten(2), C_in.flatten(2)), dim=-1)
    columns = _convolution(joined, w["mixer.conv1d.weight"]) + w.get("mixer.conv1d.bias", 0)
    columns = edit("mixer.conv1d.hook_out", columns.transpose(1, 2))  # [B,E+2GN,L+K-1]: both ends are padded
    conv, B_conv, C_conv = columns.transpose(1, 2)[:, : u.shape[1]].split([E, G * N, G * N], dim=-1)
    conv = edit("conv", conv)
    B_conv, C_conv = (edit(name, t.unflatten(-1, (G, N))) for name, t in (("B_conv", B_conv), ("C_conv", C_conv)))
    x = edit("ssm_input", _silu(conv))
    h = edit("h_start", x.new_zeros(x.shape[0], H, P, N))
    delta_1 = edit("delta_1", delta_1)
    delta_2 = edit("delta_2", delta_1 + w["mixer.dt_bias"])
    delta = edit("delta", torch.logaddexp(delta_2, torch.zeros_like(delta_2)).clamp(*config.time_step_limit))
    A = edit("A", -w["mixer.A_log"].exp())  # [H]
    A_bar = edit("A_bar", torch.exp(delta * A))  # [B,L,H]
    B = edit("B", _silu(B_conv))  # [B,L,G,N]
    B_bar = edit("B_bar", delta[..., None] * B.repeat_interleave(H // G, dim=2))  # [B,L,H,N]
    C = edit("C", _silu(C_conv))
    write = edit("mixer.hook_ssm_write", B_bar[..., None, :] * x.unflatten(-1, (H, P))[..., None])
    states = []
    for p in range(x.shape[1]):
        h = edit(f"h.{p}", A_bar[:, p, :, None, None] * h + write[:, p])
        states.append(h)
    read = edit("mixer.hook_ssm_state", edit("h", torch.stack(states, dim=1)))  # [B,L,H,P,N]
    each = C.repeat_interleave(H // G, dim=2)[..., None, :]
    y = edit("y", (read * each).sum(-1).flatten(2))
    output = edit("ssm_output", y + w["mixer.D"].repeat_interleave(P) * x)
    gated = edit("after_skip", output * _silu(skip))
    normed = edit("inner_norm", _rms(gated.unflatten(-1, (G, -1)), eps).flatten(-2) * w["mixer.norm.weight"])
    out = edit("out_proj", normed @ w["mixer.out_proj.weight"].T + w.get("mixer.out_proj.bias", 0))
    return edit("resid_post", resid + out)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
