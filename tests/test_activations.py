"""The activation cache: its keys, its errors, and its analyses of the residual stream.

The analyses are compared with the float64 forward of `reference`, with Hugging Face's own modules, and with
the logits, which direct logit attribution has to add up to.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from conftest import LENGTH, N_LAYERS, TINY, ModuleFactory, agree, module_path
from reference import forward
from torch import Tensor

from mamba_trace import MambaTrace, names
from mamba_trace.errors import LayerError, PromptError, UnknownSiteError
from mamba_trace.hooked.cache import ActivationCache
from mamba_trace.sites import SITES, STATE

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
LAST = N_LAYERS - 1


@pytest.fixture(scope="module", params=TINY)
def model(tiny_hf: ModuleFactory, request: pytest.FixtureRequest) -> MambaTrace:
    return MambaTrace(tiny_hf(model_type=request.param, dtype=torch.float64, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def run(model: MambaTrace, tokens: Tensor) -> tuple[Tensor, ActivationCache]:
    with torch.no_grad():
        return model.run_with_cache(tokens)


@pytest.fixture
def cache(run: tuple[Tensor, ActivationCache]) -> ActivationCache:
    return run[1]


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def values(model: MambaTrace, tokens: Tensor) -> dict[str, Tensor]:
    """Every value, from the reference."""
    found: dict[str, Tensor] = {}
    forward(model._module.state_dict(), model.config, tokens, lambda hook, value: found.setdefault(hook, value))
    return found


# -- keys -------------------------------------------------------------------------------------------------


def test_every_spelling_of_every_value(model: MambaTrace, cache: ActivationCache, values: Any) -> None:
    assert isinstance(cache, Mapping)
    assert list(cache.keys()) == list(cache) == model.hook_names(LENGTH)
    assert len(cache) == len(cache.items()) == len(cache.values()) == len(model.hook_names(LENGTH))
    for name, value in cache.items():
        agree(value, values[name], 1e-10)
        place = names.parse(name)
        position = "" if place.position is None else f".{place.position}"
        spellings: list[Any] = [
            place.path,
            f"model.{place.path}.output",
            module_path(place.site, place.layer) + position,
        ]
        assert place.site is not None
        if place.layer is None:
            spellings += [place.site.name, place.site.hook.removeprefix("hook_")]
        elif place.position is None:
            short = (place.site.name, place.site.hook, place.site.hook.removeprefix("hook_"))
            spellings += [(one, layer) for one in short for layer in (place.layer, place.layer - N_LAYERS)]
        else:
            spellings += [
                ("h", place.layer, place.position),
                ("hook_h", place.layer, place.position - LENGTH),
            ]
            spellings += [f"blocks.{place.layer}.hook_h.{place.position - LENGTH}"]
        for spelling in spellings:
            assert cache[spelling] is value, spelling
            assert spelling in cache


@pytest.mark.parametrize("key", ["blocks.1.hook_h", "layers[1].ssm.h", ("h", 1), ("hook_h", 1), ("h", -2)], ids=str)
def test_the_states_of_all_positions(cache: ActivationCache, values: dict[str, Tensor], key: Any) -> None:
    assert key in cache
    agree(cache[key], values["blocks.1.hook_h"], 1e-10)  # [B,L,E,N]


def test_a_site_of_every_layer_stacked(cache: ActivationCache, values: dict[str, Tensor]) -> None:
    streams = torch.stack([values[f"blocks.{layer}.hook_resid_post"] for layer in range(N_LAYERS)])
    agree(cache.stack_activation("resid_post"), streams, 1e-10)
    agree(cache.stack_activation("hook_resid_post", layer=2), streams[:2], 1e-10)
    states = torch.stack([values[f"blocks.{layer}.hook_h"] for layer in range(N_LAYERS)])
    agree(cache.stack_activation("h"), states, 1e-10)  # [n_layers,B,L,E,N]
    with pytest.raises(UnknownSiteError, match="layer=4"):
        cache.stack_activation("h", 4)


def test_every_site_has_a_shorthand(model: MambaTrace, tokens: Tensor) -> None:
    """Those that MambaLens has no hook for, too."""
    family = model.architecture.family
    others = [site.hook_name(0) for site in SITES if not site.in_mamba_lens and not site.part]
    assert "blocks.0.mixer.hook_ssm_state" in others
    _, cache = model.run_with_cache(tokens, [lambda name: True, *others])
    for site in (site for site in SITES if not site.part):
        key: Any = site.name if site.scope == "model" else (site.name, 0)
        if family in site.families:
            assert cache[key].dim() == len(site.axes_in(family)), site.name
        else:
            assert key not in cache
            with pytest.raises(UnknownSiteError, match=f"{site.name}' is not a place .* Falcon-Mamba: .* of Mamba-2; "):
                cache[key]


@pytest.mark.parametrize(
    "key",
    [("write", 1), ("h_read", 2), "blocks.1.mixer.in_proj.hook_out", "layers[0].ssm.conv1d"],
    ids=str,
)
def test_what_mamba_lens_has_no_hook_of_is_kept_when_asked_for(
    model: MambaTrace, tokens: Tensor, cache: ActivationCache, key: Any
) -> None:
    with pytest.raises(UnknownSiteError, match="MambaLens has no hook there") as error:
        cache[key]
    one, several = re.findall(r"names_filter=('[^']+'|\[.+\])", str(error.value))
    with torch.no_grad():
        _, alone = model.run_with_cache(tokens, ast.literal_eval(one))
        _, among = model.run_with_cache(tokens, [lambda name: True, ast.literal_eval(one)])
    assert several == f"[lambda name: True, {one}]"
    assert len(alone) == 1
    assert len(among) == len(cache) + 1
    agree(alone[key], among[key], 1e-10)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("blocks.1.hook_yy", r"did you mean .*blocks\.1\.hook_y"),
        ("blocks.3.hook_y", "layers 0 to 2"),
        ("blocks.1.hook_h.9", "has 9 positions"),
        ("blocks.1.hook_h.-10", "has 9 positions"),
        ("blocks.1.attn.hook_pattern", "hook_pattern': a Mamba has no attention"),
        (("pattern", 1), "'pattern': a Mamba has no attention"),
        (("attn_out", 1), "'attn_out': a Mamba has no attention"),
        (("resid_pst", 1), "did you mean resid_post"),
        (("resid_post", 3), "layers 0 to 2"),
        (("resid_post", 1, 2), "has positions of its own"),
        (("h", 1, 2, 3), "a site, its layer"),
        (("embed", 1), "no site 'embed' of a layer"),
        ("resid_post", "no site is called 'resid_post'"),
        (("h", "1"), "a site, its layer"),
        (3, "a site, its layer"),
        ((), "a site, its layer"),
        (
            "layers[1].ssm.in_proj",
            r"MambaLens has no hook there.*names_filter='layers\[1\].ssm.in_proj' keeps",
        ),
        ("blocks.1.hook_y_grad", "left it out"),
    ],
    ids=str,
)
def test_a_key_that_is_none(cache: ActivationCache, key: Any, match: str) -> None:
    assert key not in cache
    with pytest.raises(UnknownSiteError, match=match):
        cache[key]
    with pytest.raises(KeyError):
        cache[key]
    assert cache.get(key) is None


def test_what_was_left_out_says_so(model: MambaTrace, tokens: Tensor) -> None:
    wanted = ["blocks.1.hook_resid_pre", "blocks.1.hook_h.0", "blocks.1.hook_h.5"]
    _, cache = model.run_with_cache(tokens, wanted)
    with pytest.raises(UnknownSiteError, match=r"left it out.*did you mean blocks\.1\.hook_resid_pre"):
        cache["resid_post", 1]
    with pytest.raises(UnknownSiteError, match=r"all 9 positions.*hook_h\.1: names_filter='blocks\.1\.hook_h'"):
        cache["h", 1]
    assert ("h", 1) not in cache
    assert ("h", 1, 5) in cache
    with pytest.raises(UnknownSiteError, match="left it out"):
        cache.accumulated_resid()


def test_it_is_shown_in_a_line(cache: ActivationCache) -> None:
    assert repr(cache) == (
        f"ActivationCache of {len(cache)} values: hook_embed, blocks.0.hook_resid_pre, "
        "blocks.0.hook_layer_input, blocks.0.hook_normalized_input, ..."
    )


# -- moving and reshaping -----------------------------------------------------------------------------------


def test_to_a_device(tiny: MambaTrace, tokens: Tensor) -> None:
    _, cache = tiny.run_with_cache(tokens)
    assert cache.to("meta") is cache
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert cache["h", 1].device.type == "meta"
    assert tiny.device.type == "cpu"
    cache.to("meta", move_model=True)
    assert tiny.device.type == "meta"


def test_without_the_batch_axis(demo: MambaTrace) -> None:
    with torch.no_grad():
        _, cache = demo.run_with_cache(PROMPT)
        full = dict(cache)
        assert cache.has_batch_dim
        assert cache.remove_batch_dim() is cache
        assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    assert "without batch axis" in repr(cache)
    for name, value in cache.items():
        assert torch.equal(value, full[name] if name.endswith("hook_A") else full[name][0])
    h = cache["h", 3]
    assert torch.equal(h[5], cache["blocks.3.hook_h.5"])  # [L,E,N]
    agree(cache.decompose_resid().sum(0), cache["resid_post", -1])
    attributions = cache.logit_attrs(cache.decompose_resid(), " Emma").sum(0)
    agree(attributions.detach(), cache["logits"][:, demo.to_single_token(" Emma")])


def test_the_states_of_all_positions_without_the_batch_axis(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(model_type="mamba2"))
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    H, P, N = 6, 4, 5
    assert cache["h", 1].shape == (LENGTH, H, P, N)
    assert torch.equal(cache["h", 1][5], cache["blocks.1.hook_h.5"])
    assert cache["A", 1].shape == (H,)


def test_a_name_of_another_architecture_is_no_key(cache: ActivationCache, model: MambaTrace) -> None:
    dual = model.architecture.family == "dual"
    key = "blocks.0.mixer.x_proj.hook_out" if dual else "blocks.0.hook_B_conv"
    had = "Mamba-1 and Falcon-Mamba" if dual else "Mamba-2"
    assert key not in cache
    with pytest.raises(UnknownSiteError, match=f"'{key}' is not a place of this model, .* of {had}; "):
        cache[key]


def test_several_prompts_keep_their_axis(cache: ActivationCache) -> None:
    with pytest.raises(PromptError, match="3 prompts"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim


# -- the residual stream ------------------------------------------------------------------------------------


def test_the_stream_layer_by_layer(cache: ActivationCache, values: dict[str, Tensor]) -> None:
    streams, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    expected = [values[f"blocks.{layer}.hook_resid_pre"] for layer in range(N_LAYERS)]
    expected = torch.stack([*expected, values[f"blocks.{LAST}.hook_resid_post"]])
    agree(streams, expected, 1e-10)
    agree(cache.accumulated_resid(layer=1), expected[:2], 1e-10)
    agree(cache.accumulated_resid(layer=-1, pos_slice=-1), expected[:, :, -1], 1e-10)
    for some in ((2, 5), slice(2, 5), [2, 3, 4]):
        agree(cache.accumulated_resid(pos_slice=some), expected[:, :, 2:5], 1e-10)  # type: ignore[arg-type]
    with pytest.raises(UnknownSiteError, match="no resid_mid"):
        cache.accumulated_resid(incl_mid=True)
    with pytest.raises(LayerError, match="layer=4"):
        cache.accumulated_resid(4)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, None, -1])
def test_the_embedding_and_every_out_proj_add_up_to_the_stream(
    cache: ActivationCache, values: dict[str, Tensor], layer: int | None
) -> None:
    last = N_LAYERS if layer in (None, -1) else layer
    terms, labels = cache.decompose_resid(layer, return_labels=True)
    assert labels == ["embed", *(f"{one}_out_proj" for one in range(last))]
    assert terms.shape == (last + 1, 3, LENGTH, 12)
    expected = "resid_pre" if last < N_LAYERS else "resid_post"
    agree(terms.sum(0), values[f"blocks.{min(last, LAST)}.hook_{expected}"], 1e-10)
    if last:
        agree(cache.decompose_resid(layer, incl_embeds=False), terms[1:])
    else:
        with pytest.raises(LayerError, match="leaves nothing"):
            cache.decompose_resid(layer, incl_embeds=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_is_exact_to_rounding(tiny_hf: ModuleFactory, tokens: Tensor, dtype: torch.dtype) -> None:
    model = MambaTrace(tiny_hf(dtype=dtype))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, lambda name: "out_proj" in name or "resid" in name or "embed" in name)
    agree(cache.decompose_resid().sum(0), cache["resid_post", -1], 1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_norm_with_its_scale_frozen_is_linear_and_the_models_own(
    cache: ActivationCache, values: dict[str, Tensor], layer: int
) -> None:
    normed = values["hook_norm" if layer == N_LAYERS else f"blocks.{layer}.hook_normalized_input"]
    agree(cache.accumulated_resid(layer, apply_ln=True)[-1].detach(), normed, 1e-10)
    agree(cache.decompose_resid(layer, apply_ln=True).sum(0).detach(), normed, 1e-10)
    agree(cache.decompose_resid(layer, apply_ln=True, pos_slice=2).sum(0).detach(), normed[:, 2], 1e-10)


def test_attributions_add_up_to_the_logits(
    model: MambaTrace, run: tuple[Tensor, ActivationCache], tokens: Tensor
) -> None:
    logits, cache = run
    terms = cache.decompose_resid()
    for token in (0, 17, torch.tensor(30)):
        agree(cache.logit_attrs(terms, token).sum(0).detach(), logits[..., int(token)], 1e-10)
    own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # [B,L]
    agree(cache.logit_attrs(terms, tokens).sum(0).detach(), own, 1e-10)
    each = torch.tensor([3, 1, 4])  # one for each prompt
    found = cache.logit_attrs(terms, each).sum(0).detach()
    agree(found, torch.stack([logits[row, :, token] for row, token in enumerate(each)]), 1e-10)
    difference = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), each, 9, pos_slice=-1).sum(0).detach()
    agree(difference, logits[range(3), -1, each] - logits[:, -1, 9], 1e-10)


def test_an_attribution_is_what_its_layer_writes(
    cache: ActivationCache, values: dict[str, Tensor], model: MambaTrace
) -> None:
    """Against autograd: the derivative of the logit along one term, with the final scale held fixed."""
    weights = model._module.state_dict()
    stream = values[f"blocks.{LAST}.hook_resid_post"]
    scale = (stream.square().mean(-1, keepdim=True) + model.config.layer_norm_epsilon).sqrt()
    term = values["blocks.1.hook_out_proj"]
    expected = (term / scale * weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"][7]
    agree(cache.logit_attrs(cache.decompose_resid(), 7)[2].detach(), expected, 1e-10)


def test_weights_that_are_offloaded(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain, module = (tiny_hf(tie_word_embeddings=False) for _ in range(2))
    for part in (module.lm_head, module.backbone.norm_f):
        attach_align_device_hook(part, execution_device=torch.device("cpu"), offload=True)
    assert module.lm_head.weight.is_meta
    with torch.no_grad():
        logits, cache = MambaTrace(module).run_with_cache(tokens)
        found = cache.logit_attrs(cache.decompose_resid(), 7).sum(0)
        assert torch.equal(cache.model.tokens_to_residual_directions(7), plain.lm_head.weight[7])
        agree(cache.logit_lens()[-1], logits)
    agree(logits, plain(tokens).logits.detach())
    agree(found, logits[..., 7])
    assert module.lm_head.weight.is_meta


def test_tokens_and_terms_that_do_not_fit(cache: ActivationCache, tokens: Tensor) -> None:
    terms = cache.decompose_resid()
    with pytest.raises(PromptError, match=r"\(3, 9\), not \(2,\)"):
        cache.logit_attrs(terms, [1, 2])
    with pytest.raises(PromptError, match=r"\(3, 9\), not \(3, 4\)"):
        cache.logit_attrs(terms, tokens[:, :4])
    with pytest.raises(PromptError, match="give pos_slice"):
        cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 1)
    with pytest.raises(PromptError, match="from 0 to 30"):
        cache.logit_attrs(terms, 31)


def test_the_logit_lens(model: MambaTrace, run: tuple[Tensor, ActivationCache], values: dict[str, Tensor]) -> None:
    logits, cache = run
    seen, labels = cache.logit_lens(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert seen.shape == (N_LAYERS + 1, *logits.shape)
    agree(seen[-1].detach(), logits, 1e-10)
    agree(cache.logit_lens(pos_slice=-1)[-1].detach(), logits[:, -1], 1e-10)
    for layer in range(N_LAYERS):

        def nothing_more(hook: str, value: Tensor, layer: int = layer) -> Tensor:
            late = hook.endswith("out_proj") and int(hook.split(".")[1]) >= layer
            return torch.zeros_like(value) if late else value

        weights = model._module.state_dict()
        tokens = torch.randint(1, 31, (3, LENGTH), generator=torch.Generator().manual_seed(1))
        agree(seen[layer].detach(), forward(weights, model.config, tokens, nothing_more), 1e-10)


def test_directions_of_tokens(model: MambaTrace, demo: MambaTrace, tokens: Tensor) -> None:
    weight = model._module.lm_head.weight
    assert torch.equal(model.tokens_to_residual_directions(tokens), weight[tokens])
    assert torch.equal(model.tokens_to_residual_directions(5), weight[5])
    emma = demo.tokens_to_residual_directions(" Emma")
    assert torch.equal(emma, demo._module.lm_head.weight[demo.to_single_token(" Emma")])
    lazy = MambaTrace.demo(dispatch=False)
    assert torch.equal(lazy.tokens_to_residual_directions(" Emma"), emma)
    for wrong in (31, -1, 1.5, [0, 40]):
        with pytest.raises(PromptError, match="from 0 to 30"):
            model.tokens_to_residual_directions(wrong)
    with pytest.raises(PromptError):
        demo.tokens_to_residual_directions("Emma and Shelby")


def test_the_examples_of_the_docstrings(demo: MambaTrace) -> None:
    _, cache = demo.run_with_cache(PROMPT)
    cache.logit_attrs(cache.decompose_resid(pos_slice=-1), " Emma", " Shelby", pos_slice=-1)
    best = cache.logit_lens(pos_slice=-1).argmax(-1)  # [C,B]
    assert demo.to_string(best[-1]) == " Emma"
    assert STATE == "h"
    assert cache.stack_activation(STATE).shape[0] == len(demo.layers)
