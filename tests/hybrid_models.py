"""Tiny seeded hybrids of all seven architectures, with weights that make every part of them matter.

As `conftest` for the pure Mambas. B=3 and L=9 in the tests; D=24, V=31, an MLP of 18, attention of Hq=4 and Hkv=2
heads, K=3 taps and N=5 in all. Channels and heads, and what else differs:

    nemotron_h, bamba, zamba2   E=48, H=12, P=4; attention heads of 8, in Zamba2 of 12
    granitemoehybrid            E=48, H=12, P=4; attention heads of 6
    falcon_h1                   E=36, H=9, P=4; attention heads of 8
    jamba                       E=48, R=4; attention heads of 6
    zamba                       E=48, H=3, P=16, R=4; attention heads of 12

Experts are X=5 of width 40, or 6 in two groups; their sizes are multiples of 16 bytes in half precision, without which
the default ``experts_implementation="grouped_mm"`` raises. Jamba's MLPs have that width, too. Multipliers and limits
are exact in float32, since Hugging Face keeps Falcon-H1's in a float32 buffer.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from conftest import lively
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

M, A, HYBRID = "linear_attention", "full_attention", "hybrid"
#: Fields of all configurations. No token ends a sequence: generate never stops early.
COMMON: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": True,
    "attn_implementation": "sdpa",
    "experts_implementation": "eager",  # the default raises in float64
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
#: The fields of each architecture's Mamba.
DUAL = {"mamba_n_heads": 12, "mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_chunk_size": 4}
SELECTIVE = {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_dt_rank": 4}
ROPE = {"rope_type": "default", "rope_theta": 50.0}
PLAIN: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": [M, "moe", A, "mlp", M],
        "head_dim": 8,
        "mamba_num_heads": 12,
        "mamba_head_dim": 4,
        "n_groups": 1,
        "ssm_state_size": 5,
        "conv_kernel": 3,
        "chunk_size": 4,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 10,
        "routed_scaling_factor": 1.5,
        "layer_norm_epsilon": 1e-3,
        "time_step_min": 1e-30,  # Hugging Face clamps to it, which is wrong; so small that it clamps nothing
    },
    "falcon_h1": {
        **DUAL,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "mamba_n_heads": 9,
        "mamba_d_ssm": 36,
        "mamba_n_groups": 1,
        "rms_norm_eps": 1e-3,
        "rope_parameters": ROPE,
        "embedding_multiplier": 1.75,
        "lm_head_multiplier": 0.625,
        "mlp_multipliers": [1.25, 0.75],
        "key_multiplier": 1.5,
        "attention_in_multiplier": 0.875,
        "attention_out_multiplier": 1.375,
        "ssm_multipliers": [0.75, 1.25, 0.875, 1.125, 0.625],
        "ssm_in_multiplier": 1.5,
        "ssm_out_multiplier": 0.6875,
    },
    "granitemoehybrid": {
        **DUAL,
        "num_hidden_layers": 4,
        "layer_types": [M, A, M, M],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "shared_intermediate_size": 18,
        "rms_norm_eps": 1e-3,
        "position_embedding_type": "rope",
        "rope_parameters": ROPE,
        "embedding_multiplier": 1.75,
        "residual_multiplier": 0.625,
        "attention_multiplier": 0.3125,
        "logits_scaling": 1.5,
    },
    "jamba": {
        **SELECTIVE,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "rms_norm_eps": 1e-3,
    },
    "bamba": {
        **DUAL,
        "num_hidden_layers": 4,
        "attn_layer_indices": [1],
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "rope_parameters": ROPE,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [M, HYBRID, M, HYBRID],
        "n_mamba_heads": 12,
        "mamba_d_state": 5,
        "mamba_d_conv": 3,
        "chunk_size": 4,
        "adapter_rank": 3,
        "rms_norm_eps": 1e-3,
    },
    "zamba": {
        **SELECTIVE,
        "num_hidden_layers": 4,
        "layers_block_type": [M, HYBRID, M, HYBRID],  # a single hybrid layer cannot be built
        "n_mamba_heads": 3,
        "rms_norm_eps": 1e-3,
    },
}
#: What the variants change.
VARIANTS: dict[str, dict[str, Any]] = {
    "nemotron_h, groups": {"n_groups": 3, "use_bias": True, "mlp_bias": True, "norm_topk_prob": False},
    "nemotron_h, limits": {"n_groups": 2, "time_step_limit": (0.0625, 0.25), "time_step_min": 0.375},
    "nemotron_h, no experts": {"layers_block_type": [M, "mlp", A, M], "use_conv_bias": False},
    "nemotron_h, latent experts": {
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "moe_latent_size": 8,
        "mlp_bias": True,
    },
    "falcon_h1, norm before gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 3},
    "falcon_h1, norm after gate": {
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "mamba_n_groups": 3,
        "tie_word_embeddings": True,
    },
    "falcon_h1, limits": {
        "time_step_limit": (0.0625, 0.25),
        "mamba_proj_bias": True,
        "projectors_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "mamba_conv_bias": False,
    },
    "granitemoehybrid, groups": {
        "mamba_n_groups": 3,
        "time_step_limit": (0.0625, 0.25),
        "mamba_proj_bias": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid, dense": {"num_local_experts": 0, "position_embedding_type": "nope", "mamba_conv_bias": False},
    "granitemoehybrid, no SSM": {"num_hidden_layers": 2, "layer_types": [A, A], "position_embedding_type": None},
    "jamba, dense": {"num_experts": 1, "mamba_proj_bias": True, "tie_word_embeddings": True},
    "jamba, no conv bias": {"mamba_conv_bias": False, "mamba_d_conv": 4, "mamba_dt_rank": 1, "attn_layer_offset": 0},
    "bamba, groups": {
        "mamba_n_groups": 3,
        "time_step_limit": (0.0625, 0.25),
        "mamba_proj_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "bamba, whole RoPE": {
        "mamba_conv_bias": False,
        "attn_layer_indices": [0, 3],
        "mamba_d_conv": 4,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},  # of half of a head otherwise
    },
    "zamba2, groups": {"mamba_ngroups": 3, "add_bias_linear": True, "use_mem_rope": True, "rope_parameters": ROPE},
    "zamba2, adapters": {
        "layers_block_type": [M, HYBRID, HYBRID, HYBRID],
        "num_mem_blocks": 2,
        "num_key_value_heads": 4,  # adapters of keys and values have the size of the queries'
        "use_shared_attention_adapter": True,
    },
    "zamba2, limits": {"time_step_min": 0.125, "tie_word_embeddings": False},  # which unties the shared blocks, too
    "zamba, biases": {"mamba_proj_bias": True, "tie_word_embeddings": False, "n_mamba_heads": 4, "mamba_d_conv": 4},
    "zamba, no conv bias": {"mamba_conv_bias": False, "layers_block_type": [HYBRID, HYBRID], "num_hidden_layers": 2},
}
#: The model type and the fields of each kind: the plain ones under their model types first, then their variants.
HYBRIDS: dict[str, dict[str, Any]] = {
    model_type: {"model_type": model_type, **COMMON, **fields} for model_type, fields in PLAIN.items()
}
HYBRIDS |= {kind: HYBRIDS[kind.partition(",")[0]] | changes for kind, changes in VARIANTS.items()}

#: What ``from_pretrained`` keeps in float32 in a model of half precision, by the ends of the names.
SINGLE = {"nemotron_h": (".gate.weight", ".e_score_correction_bias"), "zamba": (".A_log",)}


def make_hybrid(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A new Hugging Face model in evaluation mode with `lively_hybrid` weights; equal arguments, equal weights.

    Args:
        kind: a key of `HYBRIDS`.
        seed: of the weights; torch's global generator is not touched.
        dtype: of the parameters, which are drawn in float64 and rounded, but for what ``from_pretrained`` keeps in
            float32: the frequencies of RoPE and, in half precision, `SINGLE`.
        **changes: fields of the configuration to change.
    """
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(**copy.deepcopy(HYBRIDS[kind] | changes))
        module = AutoModelForCausalLM.from_config(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in _weights(module):
            weight.copy_(lively_hybrid(name, weight, generator))
    single = ("inv_freq", *(SINGLE.get(module.config.model_type, ()) if dtype.itemsize < 4 else ()))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    kept = {name: tensor.float() for name, tensor in tensors if name.endswith(single)}
    module.to(dtype)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        tensor.data = kept.get(name, tensor.data)
    return module.eval()


def _weights(module: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """The parameters and the buffers that a checkpoint has, shared ones once."""
    saved = module.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in saved]
    return [*module.named_parameters(), *buffers]


def lively_hybrid(name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """`conftest.lively` for the names that only hybrids have: experts, routers, Zamba's heads."""
    if name.endswith(("dt_proj_bias", "e_score_correction_bias")):
        return lively("dt_bias" if name.endswith("dt_proj_bias") else "bias", old, generator)
    if name.endswith((".D", "embed_tokens.weight")):
        return lively("mixer.D", old, generator)
    drawn = lively(name, old, generator)
    stacked = old.dim() == 3 and not name.endswith(("conv1d.weight", "A_log"))  # [X,out,in] and [H,out,in]
    if "_adapter_list." in name:  # less than what they are added to
        return 0.6 * drawn
    return drawn * math.sqrt(old.shape[1]) if stacked else drawn
