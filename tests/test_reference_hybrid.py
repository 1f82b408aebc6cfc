"""tests/reference_hybrid.py and tests/hybrid_models.py against Hugging Face's own hybrids, without the package.

Hugging Face computes scans, norms, routers and RoPE in float32 in a float64 model, too. `in_float64` lifts that, so
that two evaluations of one formula agree to rounding in float64.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import near
from hybrid_models import HYBRIDS, PLAIN, make_hybrid
from reference_hybrid import forward
from reference_hybrid_mixers import rotary, time_step_limit
from torch import Tensor
from transformers import PreTrainedModel

FLOAT64, ROUNDED = 1e-11, 1e-5  # of the largest value
LEAST = 1e-3  # of the largest logit: what matters changes it by more
TOKENS = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(1))

each_kind = pytest.mark.parametrize("kind", HYBRIDS)


class _Lifted:
    """`torch` as a modeling file sees it, where float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def in_float64(module: PreTrainedModel) -> Iterator[None]:
    """Let the modeling file of a float64 model upcast to float64 where it says float32, RoPE's frequencies included."""
    file = sys.modules[type(module).__module__]
    rotary_module = getattr(module.model, "rotary_emb", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(file, "torch", _Lifted())
        if rotary_module is not None:
            frequencies, _ = rotary_module.compute_default_rope_parameters(module.config)
            patch.setitem(rotary_module._buffers, "inv_freq", frequencies)
        yield


def lift_limit(module: PreTrainedModel) -> None:
    """Give Nemotron-H's mixers the limit of delta that the configuration has, which Hugging Face ignores."""
    for mixer in module.modules():
        if hasattr(mixer, "time_step_limit"):
            mixer.time_step_limit = time_step_limit(module.config)


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


def module_values(kind: str) -> dict[str, Tensor]:
    """The values of the reference that are the input or the output of one of Hugging Face's modules, by path."""
    module, found = made(kind), {}
    handles = []

    def keep(path: str, inner: torch.nn.Module, shape: tuple[int, ...] = (-1,), reads: bool = False) -> None:
        def hook(_: Any, args: Any, output: Any) -> None:
            value = args[0] if reads else output[0] if isinstance(output, tuple) else output
            found[path] = value.reshape(*TOKENS.shape, *shape)

        handles.append(inner.register_forward_hook(hook))

    config = module.config
    keep("lm_head", module.lm_head)
    keep("embeddings", module.get_input_embeddings())
    for layer, block in enumerate(module.model.layers):
        at = f"layers[{layer}]."
        keep(f"{at}resid_post", block)
        for name, inner in block.named_modules():
            last, kind_of = name.rpartition(".")[2], type(inner).__name__
            if last in ("q_proj", "k_proj", "v_proj") and not config_has_adapters(config):
                heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
                keep(f"{at}attn.{last[0]}", inner, (heads, -1))
            elif last == "o_proj":
                keep(f"{at}attn.z", inner, (config.num_attention_heads, -1), reads=True)
            elif last == "out_proj":
                keep(f"{at}ssm.out_proj", inner)
            elif kind_of.endswith(("RMSNormGated",)):
                if not getattr(inner, "norm_before_gate", False):  # its output is after the gate, then
                    keep(f"{at}ssm.inner_norm", inner)
            elif name in ("norm", "input_layernorm", "mamba_decoder.input_layernorm"):
                keep(f"{at}norm", inner)
            elif name in ("pre_ff_layernorm", "post_attention_layernorm"):
                keep(f"{at}norm_2", inner)
                keep(f"{at}mlp_input", inner, reads=True)
            elif name == "linear":
                keep(f"{at}shared_out", inner)
            elif last in ("router", "gate"):
                keep(f"{at}moe.router", inner)
            elif name == "feed_forward":
                keep(f"{at}mlp_out", inner)
            elif name == "dt_layernorm":
                keep(f"{at}ssm.delta_1", inner)
    try:
        with torch.no_grad(), in_float64(module):
            found["logits"] = module(TOKENS).logits
    finally:
        for handle in handles:
            handle.remove()
    return found


def config_has_adapters(config: Any) -> bool:
    """Whether the projections of a shared block are not all there is of q, k and v."""
    return getattr(config, "use_shared_attention_adapter", False)


@each_kind
def test_every_value_that_a_module_has_is_the_modules(kind: str) -> None:
    expected = module_values(kind)
    assert {"embeddings", "layers[1].resid_post", "lm_head", "logits"} <= expected.keys()
    for path, value in expected.items():
        near(values(kind)[path], value, FLOAT64, path)


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
def test_half_precision_keeps_what_from_pretrained_keeps(kind: str) -> None:
    module = make_hybrid(kind, dtype=torch.bfloat16)
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        single = name.endswith(("inv_freq", ".gate.weight", "e_score_correction_bias"))
        assert weight.dtype == (torch.float32 if single else torch.bfloat16), name
    with torch.no_grad():
        assert bool(module(TOKENS).logits.isfinite().all())
