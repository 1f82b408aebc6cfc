"""tests/reference_hybrid.py and tests/hybrid_models.py against Hugging Face's own hybrids, without the package.

`hybrid_oracle` lifts Hugging Face's evaluation to float64 throughout.
"""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path

import pytest
import torch
from conftest import near
from hybrid_models import HYBRIDS, PLAIN, make_hybrid
from hybrid_oracle import in_float64, lift_limit, places
from reference_hybrid import forward
from reference_hybrid_mixers import rotary, time_step_limit
from torch import Tensor
from transformers import PreTrainedModel

FLOAT64, ROUNDED = 1e-11, 1e-5  # of the largest value
LEAST = 1e-3  # of the largest logit: what matters changes it by more
TOKENS = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(1))

each_kind = pytest.mark.parametrize("kind", HYBRIDS)


@functools.cache
def made(kind: str) -> PreTrainedModel:
    """The float64 model of a kind, which no test may change, with the right limit of delta."""
    module = make_hybrid(kind, dtype=torch.float64)
    lift_limit(module)
    return module


@functools.cache
def values(kind: str) -> dict[str, Tensor]:
    """Every value of the reference by its path, in execution order, with exact RoPE."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, value: Tensor) -> Tensor:
        assert path not in seen
        seen[path] = value
        return value

    with torch.no_grad():
        forward(made(kind).state_dict(), made(kind).config, TOKENS, keep, rotary_dtype=torch.float64)
    return seen


@each_kind
def test_every_value_that_a_module_has_is_the_modules(kind: str) -> None:
    module, found = made(kind), {}
    with torch.no_grad(), in_float64(module), contextlib.ExitStack() as hooks:
        for place in places(module):
            hooks.callback(place.change(found.setdefault, TOKENS.shape).remove)
        found["logits"] = module(TOKENS).logits
    parts = {path.rpartition("]")[2] for path in found}
    assert {"embeddings", ".resid_post", ".norm", ".attn.z", "lm_head", "logits"} <= parts
    for path, value in found.items():
        near(values(kind)[path], value, FLOAT64, path)


@each_kind
def test_edits_of_all_of_them_at_once_are_the_modules(kind: str) -> None:
    """Each value is scaled by factors of its own. A router's output is a copy of what has chosen the experts."""
    module = made(kind)
    edited = {place.path for place in places(module)} - {p for p in values(kind) if p.endswith("moe.router")}

    def edit(path: str, value: Tensor) -> Tensor:
        if path not in edited:
            return value
        generator = torch.Generator().manual_seed(len(path) + sum(map(ord, path)))
        return value * (0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))

    with torch.no_grad(), in_float64(module), contextlib.ExitStack() as hooks:
        for place in places(module):
            hooks.callback(place.change(edit, TOKENS.shape).remove)
        expected = module(TOKENS).logits
    with torch.no_grad():
        logits = forward(module.state_dict(), module.config, TOKENS, edit, rotary_dtype=torch.float64)
    near(logits, expected, FLOAT64)
    assert float((logits - values(kind)["logits"]).abs().max()) > 0.1 * float(logits.abs().max())


@each_kind
def test_the_stream_is_the_sum_of_the_terms(kind: str) -> None:
    """Whatever the norms read: an edit of their own copies does not reach the stream but through the terms."""
    seen: dict[str, Tensor] = {}

    def edit(path: str, value: Tensor) -> Tensor:
        seen[path] = value
        return 1.5 - value if path.endswith(("layer_input", "mlp_input")) else value

    module = made(kind)
    with torch.no_grad():
        forward(module.state_dict(), module.config, TOKENS, edit)
    terms = [value for path, value in seen.items() if path.endswith(("].ssm_out", "].attn_out", "].mlp_out"))]
    last = [value for path, value in seen.items() if path.endswith("].resid_post")][-1]
    near(seen["layers[0].resid_pre"] + sum(terms), last, FLOAT64)


SSM = "skip x_in conv ssm_input h_start delta_1 delta_2 delta A A_bar B B_bar C write h[0] h h_read y ssm_output"
SSM += " after_skip out_proj"
DUAL = SSM.replace("x_in conv", "x_in B_in C_in conv B_conv C_conv").replace("after_skip", "after_skip inner_norm")
ATTENTION = "attn.q attn.k attn.v attn.pattern attn.z"
#: The sites of a layer in execution order; ssm is all of the mixer's.
ORDERS = {
    ("nemotron_h", 0): "resid_pre layer_input norm ssm ssm_out resid_post",
    ("nemotron_h", 1): "resid_pre layer_input norm moe.router mlp_out resid_post",
    ("nemotron_h", 2): f"resid_pre layer_input norm {ATTENTION} attn_out resid_post",
    ("nemotron_h", 3): "resid_pre layer_input norm mlp_out resid_post",
    ("falcon_h1", 0): f"resid_pre layer_input norm ssm ssm_out {ATTENTION} attn_out resid_mid mlp_input norm_2 mlp_out"
    " resid_post",
    ("granitemoehybrid", 0): "resid_pre layer_input norm ssm ssm_out resid_mid mlp_input norm_2 moe.router mlp_out"
    " resid_post",
    ("jamba", 0): "resid_pre layer_input norm ssm ssm_out resid_mid mlp_input norm_2 mlp_out resid_post",
    ("jamba", 1): f"resid_pre layer_input norm {ATTENTION} attn_out resid_mid mlp_input norm_2 moe.router mlp_out"
    " resid_post",
    ("bamba", 0): "resid_pre layer_input norm ssm ssm_out resid_mid mlp_input norm_2 mlp_out resid_post",
    ("zamba", 0): "resid_pre layer_input norm ssm ssm_out resid_post",
    ("zamba", 1): f"resid_pre {ATTENTION} shared_out layer_input norm ssm ssm_out resid_post",
    ("zamba2", 1): f"resid_pre {ATTENTION} shared_out layer_input norm ssm ssm_out resid_post",
}


@pytest.mark.parametrize(("kind", "layer"), ORDERS)
def test_the_order_of_a_layer(kind: str, layer: int) -> None:
    mixer = (
        SSM if kind in ("jamba", "zamba") else DUAL.replace(" inner_norm", "" if kind == "falcon_h1" else " inner_norm")
    )
    mixer = mixer.replace("h[0]", " ".join(f"h[{p}]" for p in range(TOKENS.shape[1])))
    expected = ORDERS[kind, layer].replace(" ssm ", "".join(f" ssm.{site}" for site in mixer.split()) + " ")
    at = f"layers[{layer}]."
    assert [path.removeprefix(at) for path in values(kind) if path.startswith(at)] == expected.split()


def test_a_norm_before_the_gate_comes_before_after_skip() -> None:
    paths = [path for path in values("falcon_h1, norm before gate") if path.startswith("layers[2].ssm.")]
    assert [path.rpartition(".")[2] for path in paths[-4:]] == ["ssm_output", "inner_norm", "after_skip", "out_proj"]


@each_kind
def test_as_hugging_face_rounds(kind: str) -> None:
    """Without `in_float64`: the forward that everybody gets."""
    module = made(kind)
    with torch.no_grad():
        near(forward(module.state_dict(), module.config, TOKENS), module(TOKENS).logits, ROUNDED)


@each_kind
def test_the_pattern_is_that_of_eager_attention(kind: str) -> None:
    module = make_hybrid(kind, dtype=torch.float64, attn_implementation="eager")
    lift_limit(module)
    with torch.no_grad(), in_float64(module):
        patterns = [p for p in module(TOKENS, output_attentions=True).attentions or () if p is not None]
    expected = [value for path, value in values(kind).items() if path.endswith("attn.pattern")]
    assert len(patterns) == len(expected) > 0
    for pattern, value in zip(patterns, expected, strict=True):
        near(pattern, value, FLOAT64)


@each_kind
def test_the_last_state_is_the_cached_one(kind: str) -> None:
    module = made(kind)
    with torch.no_grad(), in_float64(module):
        cache = module(TOKENS, use_cache=True).cache
    paths = [path for path in values(kind) if path.endswith(f"ssm.h[{TOKENS.shape[1] - 1}]")]
    assert paths or kind.endswith("no SSM")
    for path in paths:
        state = cache.get_recurrent_state(int(path[len("layers[") : path.index("]")]))
        near(values(kind)[path], state.reshape(values(kind)[path].shape), FLOAT64, path)  # Zamba's is by head


def test_the_limit_of_nemotron_h_is_its_configurations() -> None:
    """Both ends of it clamp something, and Hugging Face's own clamp is far off."""
    kind = "nemotron_h, limits"
    delta = torch.stack([value for path, value in values(kind).items() if path.endswith("ssm.delta")])
    low, high = made(kind).config.time_step_limit
    assert (float(delta.min()), float(delta.max())) == (low, high)
    theirs = make_hybrid(kind, dtype=torch.float64)
    with torch.no_grad():
        wrong = theirs(TOKENS).logits
    assert float((wrong - values(kind)["logits"]).abs().max()) > 0.1 * float(wrong.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in HYBRIDS if kind.endswith(("limits", "groups"))])
def test_limits_clamp_some_values_of_delta_and_not_others(kind: str) -> None:
    low, high = time_step_limit(made(kind).config)
    delta = torch.stack([value for path, value in values(kind).items() if path.endswith("ssm.delta")])
    assert bool(((delta > low) & (delta < high)).any())
    if kind.endswith("limits"):
        assert bool((delta == low).any())
    assert bool((delta == high).any()) == math.isfinite(high)


@pytest.mark.parametrize("kind", ["bamba", "bamba, whole RoPE", "falcon_h1", "granitemoehybrid", "zamba2, groups"])
def test_rotary_is_the_models_to_the_last_bit(kind: str) -> None:
    module, length = made(kind), TOKENS.shape[1]
    expected = module.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])
    for value, other in zip(rotary(module.config, length) or (), expected, strict=True):
        assert torch.equal(value[:, 0].double(), other[0])


@each_kind
def test_every_site_matters(kind: str) -> None:
    """Noise of half of its size, added to any value, changes the logits visibly."""
    weights, config, wanted = made(kind).state_dict(), made(kind).config, values(kind)["logits"]
    generator = torch.Generator().manual_seed(2)

    def changed(path: str) -> Tensor:
        def edit(at: str, value: Tensor) -> Tensor:
            if at != path:
                return value
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return value + 0.5 * noise * (value.square().mean().sqrt() if value.any() else 1.0)

        return forward(weights, config, TOKENS, edit, rotary_dtype=torch.float64)

    with torch.no_grad():
        for path in values(kind):
            effect = float((changed(path) - wanted).abs().max() / wanted.abs().max())
            assert effect > LEAST, f"{path}: {effect:.1e}"


@each_kind
def test_every_weight_matters(kind: str) -> None:
    """To first order, a change of one number of it by its own size changes the logits visibly."""
    module = made(kind)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in module.named_parameters()}
    first = {t.data_ptr(): leaves[name] for name, t in module.named_parameters()}
    weights = {name: first.get(t.data_ptr(), t) for name, t in module.state_dict().items()}  # shared ones once
    logits = forward(weights, module.config, TOKENS)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * direction).sum().backward()
    for name, weight in leaves.items():
        if "_adapter_list." in name and weight.grad is None:  # each shared block has the adapters of all hybrid layers
            assert not module.config.tie_word_embeddings, name  # which unties the shared blocks as well
            continue
        assert weight.grad is not None, name
        effect = float((weight.grad * weight.detach()).abs().max() / logits.detach().abs().max())
        assert effect > LEAST, f"{name}: {effect:.1e}"


@pytest.mark.parametrize("kind", [kind for kind in HYBRIDS if "moe.router" in str(values(kind).keys())])
def test_tokens_go_to_different_experts(kind: str) -> None:
    for path, router in values(kind).items():
        if path.endswith("moe.router"):
            assert len(router.argmax(-1).unique()) > 2, path


@pytest.mark.parametrize("kind", ["jamba", "granitemoehybrid", "nemotron_h", "nemotron_h, latent experts"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, ROUNDED), (torch.bfloat16, 0.1)])
def test_the_default_experts_run_where_they_can(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    eager = make_hybrid(kind, dtype=dtype)
    grouped = make_hybrid(kind, dtype=dtype, experts_implementation="grouped_mm")
    assert grouped.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        near(grouped(TOKENS).logits, eager(TOKENS).logits, tolerance)


@pytest.mark.parametrize("kind", [kind for kind in HYBRIDS if kind.startswith("nemotron_h") and "no" not in kind[10:]])
def test_the_correction_bias_of_nemotron_h_chooses_experts(kind: str) -> None:
    weights = made(kind).state_dict()
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.zeros_like(weight)
    with torch.no_grad():
        without = forward(weights, made(kind).config, TOKENS)
    assert float((without - values(kind)["logits"]).abs().max()) > LEAST * float(without.abs().max())


@each_kind
def test_equal_arguments_make_equal_models(kind: str) -> None:
    before = torch.get_rng_state()
    first, second = make_hybrid(kind, seed=1).state_dict(), make_hybrid(kind, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = make_hybrid(kind, seed=2).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert not torch.equal(weight, other[name]), name


@pytest.mark.parametrize("kind", PLAIN)
def test_half_precision_is_that_of_from_pretrained(kind: str, tmp_path: Path) -> None:
    module = make_hybrid(kind, dtype=torch.bfloat16)
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(module, of)()), dict(getattr(loaded, of)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    with torch.no_grad():
        assert bool(module(TOKENS).logits.isfinite().all())
