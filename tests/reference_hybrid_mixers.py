"""The mixers of the hybrids written out in float64, with a function that may edit every value.

As `reference` and `reference_dual`: plain tensors, one position at a time, no modules, no cache, no padding.
`dual` is Mamba-2's mixer in all its dialects, `selective` is Jamba's and Zamba's, `attention` everybody's. Their values
pass through ``edit(site, value)`` in execution order.

Sources: Mamba (arXiv 2312.00752), Mamba-2 (2405.21060), Jamba (2403.19887) for the norms of dt, B and C, Zamba
(2405.16712) for Mamba-1 with heads and for attention's scale, Zamba2 (2411.15242) for the adapters of a shared block,
Falcon-H1 (2507.22448) for the multipliers, RoFormer (2104.09864) for RoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from reference import EditValue, _convolution
from reference_dual import _silu
from torch import Tensor

Weights = Mapping[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm over the last axis, or over each of its ``groups`` parts alone."""
    parts = x.unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A linear module's output, with its bias if it has one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def causal_conv(w: Weights, x: Tensor) -> Tensor:
    """The convolution over positions before SiLU."""
    return _convolution(x, w["conv1d.weight"])[:, : x.shape[1]] + w.get("conv1d.bias", 0)


def recurrence(A_bar: Tensor, write: Tensor, h: Tensor, edit: EditValue) -> Tensor:
    """The states as y reads them, from the decays (which broadcast) and what is written, [B,L,...,N] each."""
    states = []
    for p in range(write.shape[1]):
        h = edit(f"h[{p}]", A_bar[:, p] * h + write[:, p])
        states.append(h)
    return edit("h_read", edit("h", torch.stack(states, dim=1)))


def dual(w: Weights, config: Any, u: Tensor, edit: EditValue) -> Tensor:
    """The output [B,L,D] of a Mamba-2 mixer with input ``u`` [B,L,D], its out_proj included."""
    names = {"nemotron_h": ("n_groups", "ssm_state_size"), "zamba2": ("mamba_ngroups", "mamba_d_state")}
    G, N = (getattr(config, name) for name in names.get(config.model_type, ("mamba_n_groups", "mamba_d_state")))
    E, H = w["out_proj.weight"].shape[1], w["A_log"].shape[0]
    P, widths = E // H, [E, E, G * N, G * N, H]
    falcon = config.model_type == "falcon_h1"
    parts = linear(w, "in_proj", u * config.ssm_in_multiplier if falcon else u).split(widths, dim=-1)
    if falcon:
        parts = [part * factor for part, factor in zip(parts, config.ssm_multipliers, strict=True)]
    skip, x_in, B_in, C_in, delta_1 = parts
    skip, x_in = edit("skip", skip), edit("x_in", x_in)
    B_in, C_in = (edit(name, t.unflatten(-1, (G, N))) for name, t in (("B_in", B_in), ("C_in", C_in)))
    conv, B_conv, C_conv = causal_conv(w, torch.cat((x_in, B_in.flatten(2), C_in.flatten(2)), -1)).split(
        widths[1:4], -1
    )
    conv = edit("conv", conv)
    B_conv, C_conv = (edit(name, t.unflatten(-1, (G, N))) for name, t in (("B_conv", B_conv), ("C_conv", C_conv)))
    x = edit("ssm_input", _silu(conv))
    h = edit("h_start", x.new_zeros(x.shape[0], H, P, N))
    delta_2 = edit("delta_2", edit("delta_1", delta_1) + w["dt_bias"])
    delta = edit("delta", torch.logaddexp(delta_2, torch.zeros_like(delta_2)).clamp(*time_step_limit(config)))
    A = edit("A", -w["A_log"].exp())  # [H]
    A_bar = edit("A_bar", torch.exp(delta * A))  # [B,L,H]
    B = edit("B", _silu(B_conv))  # [B,L,G,N]
    B_bar = edit("B_bar", delta[..., None] * B.repeat_interleave(H // G, dim=2))  # [B,L,H,N]
    C = edit("C", _silu(C_conv)).repeat_interleave(H // G, dim=2)
    write = edit("write", B_bar[..., None, :] * x.unflatten(-1, (H, P))[..., None])  # [B,L,H,P,N]
    read = recurrence(A_bar[..., None, None], write, h, edit)
    y = edit("y", (read * C[..., None, :]).sum(-1).flatten(2))
    output = edit("ssm_output", y + w["D"].repeat_interleave(P) * x)
    return edit("out_proj", linear(w, "out_proj", _gated(w, config, output, skip, G, edit)))


def time_step_limit(config: Any) -> tuple[float, float]:
    """The least and the largest delta of a Mamba-2. Nemotron-H's is its configuration's, which Hugging Face ignores."""
    if config.model_type == "zamba2":
        return config.time_step_min, float("inf")
    return tuple(config.time_step_limit)


def _gated(w: Weights, config: Any, output: Tensor, skip: Tensor, groups: int, edit: EditValue) -> Tensor:
    """The gate and the norm, in the order of the model: what out_proj reads."""
    falcon = config.model_type == "falcon_h1"
    if falcon and not config.mamba_rms_norm:
        return edit("after_skip", output * _silu(skip))
    eps = {"nemotron_h": lambda: config.layer_norm_epsilon, "zamba2": lambda: 1e-5}.get(
        config.model_type, lambda: config.rms_norm_eps
    )()
    if falcon and config.mamba_norm_before_gate:
        return edit("after_skip", edit("inner_norm", rms(output, w["norm.weight"], eps, groups)) * _silu(skip))
    return edit("inner_norm", rms(edit("after_skip", output * _silu(skip)), w["norm.weight"], eps, groups))


def selective(w: Weights, config: Any, u: Tensor, edit: EditValue) -> Tensor:
    """The output [B,L,D] of a Mamba-1 mixer with input ``u`` [B,L,D], its out_proj included.

    Zamba's has heads, each with an x_proj and a dt_proj of its own: delta_1 is [B,L,H,R], B and C are [B,L,H,N], and
    the channels of the other values are those of all heads, one head after the other.
    """
    zamba = config.model_type == "zamba"
    E, N, R = w["out_proj.weight"].shape[1], w["A_log"].shape[-1], config.mamba_dt_rank
    rows = linear(w, "in_proj", u)
    x_in, skip = rows.unflatten(-1, (E, 2)).unbind(-1) if zamba else rows.split(E, dim=-1)  # Zamba's: x_0 z_0 x_1 z_1
    skip = edit("skip", skip)
    x = edit("ssm_input", _silu(edit("conv", causal_conv(w, edit("x_in", x_in)))))
    h = edit("h_start", x.new_zeros(x.shape[0], E, N))
    if zamba:
        H = config.n_mamba_heads
        low_rank, B, C = torch.einsum("blhp,hop->blho", x.unflatten(-1, (H, -1)), w["x_proj_weight"]).split(
            [R, N, N], -1
        )
        delta_1 = edit("delta_1", low_rank)
        delta_2 = torch.einsum("blhr,hpr->blhp", delta_1, w["dt_proj_weight"]).flatten(2) + w["dt_proj_bias"].flatten()
    else:
        H = 1
        low_rank, B, C = linear(w, "x_proj", x).split([R, N, N], dim=-1)
        low_rank, B, C = (
            rms(t, w[f"{name}_layernorm.weight"], config.rms_norm_eps)
            for name, t in (("dt", low_rank), ("b", B), ("c", C))
        )
        delta_2 = linear(w, "dt_proj", edit("delta_1", low_rank))

    def each(t: Tensor) -> Tensor:  # [B,L,N] or [B,L,H,N] -> [B,L,E,N]
        return t.reshape(*t.shape[:2], H, N).repeat_interleave(E // H, dim=2)

    delta_2 = edit("delta_2", delta_2)
    delta = edit("delta", torch.logaddexp(delta_2, torch.zeros_like(delta_2)))[..., None]
    A = edit("A", -w["A_log"].exp().reshape(E, N))
    A_bar = edit("A_bar", torch.exp(delta * A))  # [B,L,E,N]
    B_bar = edit("B_bar", delta * each(edit("B", B)))
    C = edit("C", C)
    read = recurrence(A_bar, edit("write", B_bar * x[..., None]), h, edit)  # [B,L,E,N]
    y = edit("y", (read * each(C)).sum(-1))
    output = edit("ssm_output", y + w["D"].flatten() * x)
    return edit("out_proj", linear(w, "out_proj", edit("after_skip", output * _silu(skip))))


def rotary(config: Any, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor] | None:
    """cos and sin [L,1,r] of the first r numbers of a head, or ``None`` in a model without RoPE.

    In ``dtype``: the model's own are float32 in a model of any dtype.
    """
    used = {
        "bamba": True,
        "falcon_h1": True,
        "granitemoehybrid": getattr(config, "position_embedding_type", None) == "rope",
        "zamba2": getattr(config, "use_mem_rope", False),
    }
    if not used.get(config.model_type):
        return None
    rope = config.rope_parameters
    assert rope["rope_type"] == "default", "the reference has no other RoPE"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "bamba":
        width = int(width * rope.get("partial_rotary_factor", 1.0))
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=dtype) / width)
    angles = (torch.arange(length, dtype=dtype)[:, None] * frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
    if cos_sin is None:
        return x
    cos, sin = (t.double() for t in cos_sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def attention(w: Weights, config: Any, x: Tensor, edit: EditValue, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
    """The output [B,L,D] of o_proj. In ``w`` the adapters of a Zamba2 layer are ``{q,k,v}_adapter.{0,1}.weight``."""
    Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
    d = w["q_proj.weight"].shape[0] // Hq
    q, k, v = (edit(name, _projected(w, name, x).unflatten(-1, (-1, d))) for name in "qkv")  # [B,L,Hq or Hkv,d]
    scales = {"granitemoehybrid": lambda: config.attention_multiplier}
    scales |= dict.fromkeys(("zamba", "zamba2"), lambda: (d / 2) ** -0.5)
    scale = scales.get(config.model_type, lambda: d**-0.5)()
    if config.model_type == "falcon_h1":
        k = k * config.key_multiplier
    q, k = (_rotated(t, cos_sin) for t in (q, k))
    k, v = (t.repeat_interleave(Hq // Hkv, dim=2) for t in (k, v))
    scores = torch.einsum("blhd,bshd->bhls", q, k) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = edit("pattern", scores.masked_fill(later, -torch.inf).softmax(-1))  # [B,Hq,L,S]
    z = edit("z", torch.einsum("bhls,bshd->blhd", pattern, v))
    return linear(w, "o_proj", z.flatten(2))


def _projected(w: Weights, name: str, x: Tensor) -> Tensor:
    value = linear(w, f"{name}_proj", x)
    down, up = (w.get(f"{name}_adapter.{part}.weight") for part in (0, 1))
    return value if down is None or up is None else value + x @ down.T @ up.T
