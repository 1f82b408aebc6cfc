"""The seven hybrids once more, written out in float64, with a function that may edit every value.

As `reference` for the pure Mambas: plain tensors, no modules, no cache, no padding, nothing of the package and nothing
of Hugging Face's. Here are the model, its blocks, MLPs and experts; `reference_hybrid_mixers` has what mixes positions.

A block of each kind, h being the residual stream, t a term, r a multiplier:

    nemotron_h                  h += t(norm(h))                        t: SSM, attention, MLP or experts
    jamba, bamba, granite       h += r t(norm(h));  h += r mlp(norm_2(h))     t: SSM or attention; r is Granite's
    falcon_h1                   h += r ssm(norm(h)) + r' attention(r'' norm(h));  h += mlp(norm_2(h))
    zamba, zamba2               h += ssm(norm(h)), and in hybrid layers
                                h += ssm(norm(h + linear(mlp(norm(attention(norm([h; embeddings]))))))

Where Hugging Face is wrong this is right: Nemotron-H's delta is clamped to ``config.time_step_limit``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from reference import EditValue
from reference_dual import _silu
from reference_hybrid_mixers import Weights, attention, dual, linear, rms, rotary, selective
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu2": lambda x: x.clamp(min=0).square(),
}


def forward(
    weights: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    edit: EditValue | None = None,
    *,
    rotary_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The logits [B,L,V] in float64.

    Args:
        weights: state dict under Hugging Face's names, any floating dtype.
        config: of one of the seven hybrids.
        tokens: [B,L].
        edit: ``edit(public path, value)`` is what the computation goes on with, for every site in execution order:
            ``layers[3].ssm.conv``, ``layers[3].ssm.h[5]`` and after the last of them ``layers[3].ssm.h``, the
            trajectory; ``layers[1].attn.pattern``, ``logits``.
        rotary_dtype: in which cos and sin of RoPE are computed; models do so in float32, whatever their dtype.
    """
    edit = edit or (lambda path, value: value)
    w = {name.removeprefix("model."): weight.double() for name, weight in weights.items()}
    embedding = w["embeddings.weight" if config.model_type == "nemotron_h" else "embed_tokens.weight"]
    embeddings = edit("embeddings", embedding[tokens])  # [B,L,D]
    resid = embeddings * getattr(config, "embedding_multiplier", 1.0)
    cos_sin = rotary(config, tokens.shape[1], rotary_dtype)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers[{layer}]."
        parts = Block(
            under(w, f"layers.{layer}."), config, layer, lambda site, v, at=prefix: edit(at + site, v), cos_sin
        )
        resid = BLOCKS[config.model_type](parts, resid, embeddings)
    final = {"nemotron_h": "norm_f", "granitemoehybrid": "norm"}.get(config.model_type, "final_layernorm")
    final = edit("norm_f", rms(resid, w[f"{final}.weight"], eps_of(config)))
    logits = edit("lm_head", final @ w.get("lm_head.weight", embedding).T)
    return edit("logits", logits * getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0))


def under(w: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights below a module."""
    return {name.removeprefix(prefix): weight for name, weight in w.items() if name.startswith(prefix)}


def eps_of(config: Any) -> float:
    """Of all norms but Zamba2's gated one, whose eps is fixed."""
    return config.layer_norm_epsilon if config.model_type == "nemotron_h" else config.rms_norm_eps


@dataclass(frozen=True)
class Block:
    """The weights of a layer, and its parts as functions.

    Attributes:
        w: its weights, under their names in the layer.
        config: the model's.
        layer: its number.
        edit: takes the sites of this layer.
        cos_sin: of RoPE.
    """

    w: Weights
    config: Any
    layer: int
    edit: EditValue
    cos_sin: tuple[Tensor, Tensor] | None

    @property
    def kind(self) -> str:
        return self.config.layer_types[self.layer]

    def normed(self, site: str, name: str, x: Tensor) -> Tensor:
        """A site after a norm of the layer."""
        return self.edit(site, rms(x, self.w[f"{name}.weight"], eps_of(self.config)))

    def ssm(self, name: str, u: Tensor) -> Tensor:
        mixer = selective if self.config.model_type in ("jamba", "zamba") else dual
        return mixer(under(self.w, f"{name}."), self.config, u, lambda site, v: self.edit(f"ssm.{site}", v))

    def attention(self, name: str, x: Tensor, adapter: int = 0) -> Tensor:
        """``adapter`` is the number of a Zamba2 layer's own adapters in the shared block."""
        w = under(self.w, f"{name}.")
        for part in "qkv":
            found = under(w, f"linear_{part}_adapter_list.{adapter}.")
            w |= {f"{part}_adapter.{inner}": weight for inner, weight in found.items()}
        return attention(w, self.config, x, lambda site, v: self.edit(f"attn.{site}", v), self.cos_sin)


def _one_branch(block: Block, resid: Tensor, embeddings: Tensor) -> Tensor:
    """Nemotron-H's."""
    resid = block.edit("resid_pre", resid)
    u = block.normed("norm", "norm", block.edit("layer_input", resid))
    w = under(block.w, "mixer.")
    if block.kind == "linear_attention":
        term = block.edit("ssm_out", block.ssm("mixer", u))
    elif block.kind == "full_attention":
        term = block.edit("attn_out", block.attention("mixer", u))
    else:
        mlp = _nemotron_experts if block.kind == "moe" else _mlp
        term = block.edit("mlp_out", mlp(w, block.config, u, block.edit))
    return block.edit("resid_post", resid + term)


def _two_step(block: Block, resid: Tensor, embeddings: Tensor) -> Tensor:
    """Jamba's, Bamba's and Granite's."""
    granite = block.config.model_type == "granitemoehybrid"
    factor = block.config.residual_multiplier if granite else 1.0
    resid = block.edit("resid_pre", resid)
    u = block.normed("norm", "input_layernorm", block.edit("layer_input", resid))
    if block.kind == "linear_attention":
        term = block.edit("ssm_out", block.ssm("mamba", u) * factor)
    else:
        term = block.edit("attn_out", block.attention("self_attn", u) * factor)
    resid = block.edit("resid_mid", resid + term)
    norm_2 = "post_attention_layernorm" if granite else "pre_ff_layernorm"
    u = block.normed("norm_2", norm_2, block.edit("mlp_input", resid))
    mlp = _granite_mlp if granite else _jamba_experts if "feed_forward.router.weight" in block.w else _mlp
    w = block.w if granite else under(block.w, "feed_forward.")
    return block.edit("resid_post", resid + block.edit("mlp_out", mlp(w, block.config, u, block.edit) * factor))


def _parallel(block: Block, resid: Tensor, embeddings: Tensor) -> Tensor:
    """Falcon-H1's."""
    config = block.config
    resid = block.edit("resid_pre", resid)
    u = block.normed("norm", "input_layernorm", block.edit("layer_input", resid))
    ssm = block.edit("ssm_out", block.ssm("mamba", u) * config.ssm_out_multiplier)
    attn = block.attention("self_attn", u * config.attention_in_multiplier)
    attn = block.edit("attn_out", attn * config.attention_out_multiplier)
    resid = block.edit("resid_mid", resid + ssm + attn)
    u = block.normed("norm_2", "pre_ff_layernorm", block.edit("mlp_input", resid))
    return block.edit("resid_post", resid + block.edit("mlp_out", _mlp(under(block.w, "feed_forward."), config, u)))


def _shared(block: Block, resid: Tensor, embeddings: Tensor) -> Tensor:
    """Zamba's and Zamba2's. The shared transformer's output is added to what the SSM reads, not to the stream."""
    resid = block.edit("resid_pre", resid)
    u, at = resid, ""
    if block.kind == "hybrid":
        u, at = resid + block.edit("shared_out", _shared_transformer(block, resid, embeddings)), "mamba_decoder."
    u = block.normed("norm", f"{at}input_layernorm", block.edit("layer_input", u))
    return block.edit("resid_post", resid + block.edit("ssm_out", block.ssm(f"{at}mamba", u)))


def _shared_transformer(block: Block, resid: Tensor, embeddings: Tensor) -> Tensor:
    config, eps = block.config, eps_of(block.config)
    name = "shared_transf" if config.model_type == "zamba" else "shared_transformer"
    w = under(block.w, f"{name}.")
    number = [layer for layer, kind in enumerate(config.layer_types) if kind == "hybrid"].index(block.layer)
    both = rms(torch.cat((resid, embeddings), dim=-1), w["input_layernorm.weight"], eps)  # [B,L,2D]
    u = rms(block.attention(f"{name}.self_attn", both, number), w["pre_ff_layernorm.weight"], eps)
    return linear(block.w, "linear", _mlp(under(w, "feed_forward."), config, u, adapter=number))


BLOCKS: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "nemotron_h": _one_branch,
    "jamba": _two_step,
    "bamba": _two_step,
    "granitemoehybrid": _two_step,
    "falcon_h1": _parallel,
    "zamba": _shared,
    "zamba2": _shared,
}


def _mlp(w: Weights, config: Any, x: Tensor, edit: EditValue | None = None, adapter: int = 0) -> Tensor:
    """Nemotron-H's without a gate, or a gated one; Zamba2's has an adapter of its own in each hybrid layer."""
    if config.model_type == "nemotron_h":
        return linear(w, "down_proj", ACTIVATIONS[config.mlp_hidden_act](linear(w, "up_proj", x)))
    act = ACTIVATIONS[config.hidden_act]
    if config.model_type == "zamba2":
        down, up = (w[f"gate_up_proj_adapter_list.{adapter}.{part}.weight"] for part in (0, 1))
        gate, value = (linear(w, "gate_up_proj", x) + x @ down.T @ up.T).chunk(2, dim=-1)
    else:
        gate, value = linear(w, "gate_proj", x), linear(w, "up_proj", x)
    gate_factor, down_factor = getattr(config, "mlp_multipliers", (1.0, 1.0))  # Falcon-H1's
    return linear(w, "down_proj", act(gate * gate_factor) * value) * down_factor


def _jamba_experts(w: Weights, config: Any, x: Tensor, edit: EditValue) -> Tensor:
    """The shares are those of all experts: the chosen ones do not sum to 1."""
    router = edit("moe.router", x @ w["router.weight"].T)  # [B,L,X]
    shares, chosen = router.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    return _experts(under(w, "experts."), x, torch.zeros_like(router).scatter(-1, chosen, shares), _silu)


def _granite_mlp(w: Weights, config: Any, x: Tensor, edit: EditValue) -> Tensor:
    """The chosen experts' shares are a softmax over them alone. A gated MLP is added; it is all without experts."""
    routed = 0.0
    if config.num_local_experts:
        router = edit("moe.router", x @ w["block_sparse_moe.router.weight"].T)  # [B,L,X]
        largest, chosen = router.topk(config.num_experts_per_tok, dim=-1)
        shares = torch.zeros_like(router).scatter(-1, chosen, largest.softmax(-1))
        routed = _experts(under(w, "block_sparse_moe.experts."), x, shares, _silu)
    gate, value = linear(w, "shared_mlp.input_linear", x).chunk(2, dim=-1)
    return routed + linear(w, "shared_mlp.output_linear", _silu(gate) * value)


def _nemotron_experts(w: Weights, config: Any, x: Tensor, edit: EditValue) -> Tensor:
    """Sigmoid scores, of which the correction bias changes the choice only: in the best groups, the best experts."""
    router = edit("moe.router", x @ w["gate.weight"].T)  # [B,L,X]
    scores = torch.sigmoid(router)
    by_group = (scores + w["gate.e_score_correction_bias"]).unflatten(-1, (config.n_group, -1))
    best = by_group.topk(2, dim=-1)[0].sum(-1).topk(config.topk_group, dim=-1)[1]  # a group's two best speak for it
    allowed = torch.zeros(by_group.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
    chosen = by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(-2).topk(config.num_experts_per_tok)[1]
    shares = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
    shares = torch.zeros_like(router).scatter(-1, chosen, shares * config.routed_scaling_factor)
    latent = config.moe_latent_size is not None
    inner = linear(w, "fc1_latent_proj", x) if latent else x
    routed = _experts(under(w, "experts."), inner, shares, ACTIVATIONS[config.mlp_hidden_act])
    routed = linear(w, "fc2_latent_proj", routed) if latent else routed
    return routed + _mlp(under(w, "shared_experts."), config, x)


def _experts(w: Weights, x: Tensor, shares: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of all experts' outputs by their ``shares`` [B,L,X], 0 for those that are not chosen."""
    if "gate_up_proj" in w:
        gate, value = torch.einsum("bld,xfd->blxf", x, w["gate_up_proj"]).chunk(2, dim=-1)
        inner = act(gate) * value
    else:
        inner = act(torch.einsum("bld,xfd->blxf", x, w["up_proj"]))
    return torch.einsum("blxf,xdf,blx->bld", inner, w["down_proj"], shares)
