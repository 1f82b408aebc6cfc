"""The analyses over layers of several kinds, against `reference_hybrid`, in float64.

A Nemotron-H with experts is compared to within float32's rounding, since its router computes in float32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import near
from hybrid_models import HYBRIDS, PLAIN, make_hybrid
from peft import LoraConfig, get_peft_model
from reference_hybrid import forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.arguments.channels import mixer_sizes
from mamba_trace.errors import (
    ArgumentError,
    LayerError,
    PositionError,
    SiteValueError,
    UnknownSiteError,
)
from mamba_trace.flow import Cut, ZeroDelta, apply, decay_groups, decay_rate, knockout, knockout_conv, zero_delta
from mamba_trace.hidden_attention import AttentionMaps, attention_maps, contributions, hidden_attention
from mamba_trace.interventions import ablate, steer
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.means import mean_activation
from mamba_trace.modeling.architectures import BY_TYPE
from mamba_trace.names.layouts import site_in
from mamba_trace.results import Result
from mamba_trace.sites import BY_NAME

BATCH, LENGTH = 3, 7
TOKENS = torch.randint(1, 31, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
PROMPT = TOKENS[:1]
#: The architectures that the package has.
SERVED = [kind for kind in HYBRIDS if HYBRIDS[kind]["model_type"] in BY_TYPE]
each_kind = pytest.mark.parametrize("kind", SERVED)
#: One kind of each architecture, and two in which the mixer's own norm stands elsewhere or is not there.
MAIN = [kind for kind in SERVED if kind in PLAIN] + ["falcon_h1, norm before gate", "nemotron_h, no experts"]
each_main = pytest.mark.parametrize("kind", MAIN)
WITH_SSM = [kind for kind in SERVED if kind != "granitemoehybrid, no SSM"]

Edit = Callable[[str, Tensor], Tensor]


def tolerance(kind: str) -> float:
    return 1e-5 if kind.startswith("nemotron_h") and "no experts" not in kind else 1e-11


@functools.cache
def made(kind: str) -> MambaTrace:
    """The float64 model of a kind, which no test may change."""
    return MambaTrace(make_hybrid(kind, dtype=torch.float64))


@functools.cache
def config_of(kind: str) -> Any:
    return copy.deepcopy(make_hybrid(kind).config)


@functools.cache
def weights_of(kind: str) -> dict[str, Tensor]:
    return make_hybrid(kind, dtype=torch.float64).state_dict()


def by_hand(kind: str, edit: Edit | None = None, tokens: Tensor = TOKENS) -> Tensor:
    """The logits of the reference [B,L,V]."""
    return forward(weights_of(kind), config_of(kind), tokens, edit)


@functools.cache
def values(kind: str) -> dict[str, Tensor]:
    """Every value of the reference by its path."""
    found: dict[str, Tensor] = {}
    by_hand(kind, found.setdefault)
    return found


def of_prompt(kind: str, path: str) -> Tensor:
    """A value of the reference for `PROMPT`, which is its first row."""
    return values(kind)[path][0]


def agrees(kind: str, actual: Tensor, expected: Tensor, what: str = "the value") -> None:
    near(actual, expected, tolerance(kind), what)


def paths_of(model: MambaTrace) -> list[str]:
    """The paths of all hook names, in execution order."""
    return [model._place(name).path for name in model.hook_names(LENGTH)]


def without(model: MambaTrace, path: str) -> list[int]:
    """The layers that lack a site."""
    return [layer for layer in range(len(model.layers)) if site_in(model._layout, BY_NAME[path], layer) is None]


def logits_of(kind: str, act: Callable[[MambaTrace], None], tokens: Tensor = TOKENS, **changes: Any) -> Tensor:
    """The logits of a trace of a kind in which ``act`` is called first."""
    model = made(kind)
    with torch.no_grad(), model.trace(tokens, **changes):
        act(model)
        logits = model.logits.output.save()
    return logits


@contextlib.contextmanager
def nothing_runs(model: MambaTrace) -> Iterator[None]:
    """Fail if a layer of the model is called."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a layer ran")

    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer._module.register_forward_pre_hook(refuse).remove)
        yield


# -- runs with hooks and caches ----------------------------------------------------------------------------


@each_kind
def test_a_cache_has_every_value_of_the_reference(kind: str) -> None:
    model = made(kind)
    logits, cache = model.run_with_cache(TOKENS)
    assert list(cache) == model.hook_names(LENGTH)
    for name, path in zip(cache, paths_of(model), strict=True):
        agrees(kind, cache[name], values(kind)[path], name)
        assert torch.equal(cache[path], cache[name])
    agrees(kind, logits, values(kind)["logits"])


@each_main
def test_places_without_a_name_in_mamba_lens_are_cached_by_path(kind: str) -> None:
    model = made(kind)
    paths = [path for path in values(kind) if not path.endswith("]")]  # not h[p], which are in h
    cache = model.run_with_cache(TOKENS, paths)[1]
    for path in paths:
        agrees(kind, cache[path], values(kind)[path], path)


@each_kind
def test_a_hook_at_every_place_changes_what_the_reference_changes(kind: str) -> None:
    model, seen = made(kind), []
    hooked = set(paths_of(model))

    def change(value: Tensor, hook: Any) -> Tensor:
        seen.append(hook.path)
        return value * 1.02

    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, change)])
    expected = by_hand(kind, lambda path, value: value * 1.02 if path in hooked else value)
    assert seen == paths_of(model)
    agrees(kind, logits, expected)


@each_main
def test_gradients_in_a_cache_are_those_of_the_reference(kind: str) -> None:
    model, found = made(kind), {}
    loss, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    model._module.zero_grad()

    def watched(path: str, value: Tensor) -> Tensor:
        found[path] = value.clone().requires_grad_() if not value.requires_grad else value.clone()
        found[path].retain_grad()
        return found[path]

    logits = by_hand(kind, watched)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    expected.backward()
    near(loss, expected, tolerance(kind))
    largest = max(float(value.grad.abs().max()) for value in found.values() if value.grad is not None)
    for name in model.hook_names(LENGTH):
        gradient = found[model._place(name).path].grad
        near(cache[f"{name}_grad"], gradient, tolerance(kind) * 100, name, tolerance(kind) * largest)


@each_main
def test_a_backward_hook_on_attention_is_given_its_gradient_and_may_replace_it(kind: str) -> None:
    model, seen = made(kind), {}
    name = f"blocks.{model.attention_layers[0]}.attn.hook_pattern"
    embed = "hook_embed"

    def run(*hooks: Any) -> Tensor:
        _, cache = model.run_with_cache(TOKENS, [name, embed], "loss", bwd_hooks=hooks, incl_bwd=True)
        model._module.zero_grad()
        return cache

    cache = run((name, lambda gradient, hook: seen.update({hook.name: gradient.clone()})))
    near(seen[name], cache[f"{name}_grad"], 1e-12)
    cut = run((name, lambda gradient, hook: torch.zeros_like(gradient)))
    assert not cut[f"{name}_grad"].any()
    assert (cut[f"{embed}_grad"] - cache[f"{embed}_grad"]).abs().max() > 1e-6


def shared(model: MambaTrace, layers: list[int]) -> bool:
    """Whether one of the layers reads the embeddings as well."""
    return any(model._layout.has(BY_NAME["shared_out"], layer) for layer in layers)


@each_kind
def test_a_run_starts_and_stops_at_any_layer(kind: str) -> None:
    model = made(kind)
    n_layers = len(model.layers)
    streams = [values(kind)[f"layers[{layer}].resid_pre"] for layer in range(n_layers)]
    streams.append(values(kind)[f"layers[{n_layers - 1}].resid_post"])
    for layer in range(n_layers):
        agrees(kind, model.run_with_hooks(TOKENS, stop_at_layer=layer), streams[layer], f"stop at {layer}")
        if shared(model, list(range(layer, n_layers))):
            with nothing_runs(model), pytest.raises(LayerError, match="embeddings of the tokens"):
                model.run_with_hooks(streams[layer], start_at_layer=layer)
            continue
        logits, cache = model.run_with_cache(streams[layer], start_at_layer=layer)
        agrees(kind, logits, values(kind)["logits"], f"start at {layer}")
        assert {model._place(name).layer for name in cache} == {None, *range(layer, n_layers)}
        agrees(kind, cache["norm", layer], values(kind)[f"layers[{layer}].norm"])
        after = model.run_with_hooks(streams[layer], start_at_layer=layer, stop_at_layer=layer + 1)
        agrees(kind, after, streams[layer + 1])
        assert torch.equal(
            model.run_with_hooks(streams[layer], start_at_layer=layer, stop_at_layer=layer), streams[layer]
        )
    assert "layers" not in model.layers.parent._module.__dict__


@each_kind
def test_some_layers_run_in_the_models_order(kind: str) -> None:
    model = made(kind)
    n_layers = len(model.layers)
    used = [0, n_layers - 1]
    before: dict[str, Tensor] = {}

    def passed(path: str, value: Tensor) -> Tensor:
        before[path] = value
        layer = int(path[7 : path.index("]")]) if path.startswith("layers[") else None
        if layer not in (None, *used) and path.endswith(".resid_post"):
            return before[f"layers[{layer}].resid_pre"]
        return value

    expected = by_hand(kind, passed)
    agrees(kind, model.run_with_hooks(TOKENS, only_use_these_layers=used), expected)
    if n_layers > 2 and not shared(model, used):
        stream = before["layers[0].resid_pre"]
        agrees(kind, model.run_with_hooks(stream, start_at_layer=0, only_use_these_layers=used), expected)
    for order in ([1, 0], [0, 0]):
        with nothing_runs(model), pytest.raises(LayerError, match=r"model's own order"):
            model.run_with_hooks(TOKENS, only_use_these_layers=order)
    agrees(kind, model.run_with_hooks(TOKENS), values(kind)["logits"])


def test_a_stream_that_is_given_is_not_multiplied() -> None:
    """Granite 4 multiplies what it is given as embeddings, also where all of its layers run."""
    model = made("granitemoehybrid")
    stream = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cache = model.run_with_cache(stream, start_at_layer=0)[1]
    assert torch.equal(cache["resid_pre", 0], stream)


@each_main
def test_a_key_of_a_layer_without_the_site_says_which_layers_have_it(kind: str) -> None:
    model = made(kind)
    cache = model.run_with_cache(TOKENS)[1]
    for layer in model.ssm_layers:
        states = [values(kind)[f"layers[{layer}].ssm.h[{p}]"] for p in range(LENGTH)]
        agrees(kind, cache["h", layer], torch.stack(states, dim=1))
    for site, there in (("y", model.ssm_layers), ("h", model.ssm_layers), ("z", model.attention_layers)):
        part = "attn" if site == "z" else "ssm"
        for layer in set(range(len(model.layers))) - set(there):
            for key in ((site, layer), f"layers[{layer}].{part}.{site}"):
                with pytest.raises(UnknownSiteError, match=rf"layers\[{layer}\] is .* has no {part}; these have one"):
                    cache[key]
                assert key not in cache


@each_main
def test_a_site_is_stacked_over_the_layers_that_have_it(kind: str) -> None:
    model = made(kind)
    cache = model.run_with_cache(TOKENS)[1]
    every = list(range(len(model.layers)))
    named = {"y": model.ssm_layers, "attn.z": model.attention_layers, "resid_post": every}
    for path, layers in named.items():
        site = path.rpartition(".")[2]
        part = {"y": "ssm.", "attn.z": "attn."}.get(path, "")
        expected = torch.stack([values(kind)[f"layers[{layer}].{part}{site}"] for layer in layers])
        agrees(kind, cache.stack_activation(site), expected, site)
    outs = [layer for layer in every if layer not in without(model, "ssm_out")]
    agrees(kind, cache.stack_activation("ssm_out"), torch.stack([cache["ssm_out", layer] for layer in outs]))
    last = model.attention_layers[0]
    if last and not set(range(last)) & set(model.attention_layers):
        with pytest.raises(UnknownSiteError, match="these have one"):
            cache.stack_activation("z", last)


def test_a_cache_of_one_prompt_loses_its_batch_axis() -> None:
    cache = made("falcon_h1").run_with_cache(PROMPT, remove_batch_dim=True)[1]
    assert cache["pattern", 0].shape == (4, LENGTH, LENGTH)
    assert cache["A", 0].shape == (9,)
    assert cache["hook_logits"].shape == (LENGTH, 31)
    assert cache.decompose_resid().shape == (1 + 3 * 3, LENGTH, 24)


# -- the residual stream -----------------------------------------------------------------------------------


@each_kind
def test_the_terms_add_up_to_the_stream(kind: str) -> None:
    model = made(kind)
    cache = model.run_with_cache(TOKENS)[1]
    n_layers = len(model.layers)
    for layer in range(1, n_layers + 1):
        terms = cache.decompose_resid(layer)
        agrees(kind, terms.sum(0), values(kind)[f"layers[{layer - 1}].resid_post"], f"before layer {layer}")
        near(terms.sum(0), cache._stream(layer), 1e-13)
    terms, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "embed"
    assert torch.equal(terms[0], cache["resid_pre", 0])
    for term, label in zip(terms[1:], labels[1:], strict=True):
        layer, _, part = label.partition("_")
        agrees(kind, term, values(kind)[f"layers[{layer}].{part}"], label)
    without_embedding = cache.decompose_resid(incl_embeds=False)
    assert torch.equal(without_embedding, terms[1:])


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("nemotron_h", "embed 0_ssm_out 1_mlp_out 2_attn_out 3_mlp_out 4_ssm_out"),
        ("granitemoehybrid, no SSM", "embed 0_attn_out 0_mlp_out 1_attn_out 1_mlp_out"),
        ("jamba", "embed 0_ssm_out 0_mlp_out 1_attn_out 1_mlp_out 2_ssm_out 2_mlp_out 3_ssm_out 3_mlp_out"),
        (
            "falcon_h1",
            "embed 0_ssm_out 0_attn_out 0_mlp_out 1_ssm_out 1_attn_out 1_mlp_out 2_ssm_out 2_attn_out 2_mlp_out",
        ),
    ],
)
def test_terms_are_labelled_by_layer_and_part(kind: str, labels: str) -> None:
    cache = made(kind).run_with_cache(TOKENS)[1]
    assert cache.decompose_resid(return_labels=True)[1] == labels.split()


@each_main
def test_the_stream_in_the_middle_of_blocks_is_accumulated(kind: str) -> None:
    model = made(kind)
    cache = model.run_with_cache(TOKENS)[1]
    mid = [layer for layer in range(len(model.layers)) if f"layers[{layer}].resid_mid" in values(kind)]
    if not mid:
        with pytest.raises(UnknownSiteError, match="adds to the residual stream once"):
            cache.accumulated_resid(incl_mid=True)
        return
    stack, labels = cache.accumulated_resid(2, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre"]
    for value, label in zip(stack, labels, strict=True):
        layer, _, part = label.partition("_")
        agrees(kind, value, values(kind)[f"layers[{layer}].resid_{part}"], label)
    whole = cache.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert whole == [f"{layer}_{part}" for layer in mid for part in ("pre", "mid")] + ["final_post"]


@each_kind
def test_norms_are_applied_to_terms_and_logits_are_attributed(kind: str) -> None:
    model = made(kind)
    logits, cache = model.run_with_cache(TOKENS)
    for layer in range(1, len(model.layers)):
        if shared(model, [layer]):
            continue  # its norm reads more than the stream
        agrees(kind, cache.decompose_resid(layer, apply_ln=True).sum(0), values(kind)[f"layers[{layer}].norm"])
    agrees(kind, cache.decompose_resid(apply_ln=True).sum(0), values(kind)["norm_f"])
    attributed = cache.logit_attrs(cache.decompose_resid(), TOKENS)
    right = logits.gather(-1, TOKENS[..., None])[..., 0]
    near(attributed.sum(0), right, 1e-12)
    agrees(kind, attributed.sum(0), values(kind)["logits"].gather(-1, TOKENS[..., None])[..., 0])
    difference = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 7, 8, pos_slice=-1).sum(0)
    near(difference, logits[:, -1, 7] - logits[:, -1, 8], 1e-11)


@each_main
def test_the_norm_before_a_layer_has_the_scale_of_the_run(kind: str) -> None:
    """Where a shared transformer adds to its input, the scale is that of the sum."""
    model = made(kind)
    cache = model.run_with_cache(TOKENS)[1]
    for layer in range(len(model.layers)):
        applied = cache.apply_ln_to_stack(values(kind)[f"layers[{layer}].layer_input"][None], layer)[0]
        agrees(kind, applied, values(kind)[f"layers[{layer}].norm"])


def lens_by_hand(kind: str, stream: Tensor) -> Tensor:
    """The logits of a stream [B,L,D], by the weights and what the reference multiplies lm_head's output by."""
    found = {}

    def put(path: str, value: Tensor) -> Tensor:
        found[path] = value
        return stream if path == f"layers[{config_of(kind).num_hidden_layers - 1}].resid_post" else value

    return by_hand(kind, put)


@each_kind
def test_the_logit_lens_reads_every_stream_as_the_last(kind: str) -> None:
    model = made(kind)
    logits, cache = model.run_with_cache(TOKENS)
    lens, labels = cache.logit_lens(return_labels=True)
    near(lens[-1], logits, 1e-12)
    assert len(labels) == len(model.layers) + 1
    shown = logit_lens(model, PROMPT, token=5, top=31)
    assert shown.row_labels == ["embedding", *map(str, range(len(model.layers)))]
    for row in range(len(labels)):
        agrees(kind, lens[row], lens_by_hand(kind, cache._stream(row)), labels[row])
        near(shown.logits[row], lens[row, 0, :, 5], 1e-11)
        near(shown.top_probabilities[row], lens[row, 0].softmax(-1).sort(descending=True)[0], 1e-10)


# -- tokens, losses, generation ----------------------------------------------------------------------------


@each_kind
def test_directions_of_tokens_and_losses_are_those_of_the_logits(kind: str) -> None:
    model = made(kind)
    directions = model.tokens_to_residual_directions(torch.arange(31))
    agrees(kind, values(kind)["norm_f"] @ directions.T, values(kind)["logits"])
    expected = F.cross_entropy(values(kind)["logits"][:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    both = model.run_with_hooks(TOKENS, return_type="both")
    near(both.loss, expected.mean(), tolerance(kind))
    near(model.loss_fn(both.logits, TOKENS, per_token=True), expected.view(BATCH, -1), tolerance(kind))


@each_main
def test_generation_with_a_lasting_edit_goes_on_from_the_edited_logits(kind: str) -> None:
    model = made(kind)
    layer = model.attention_layers[0]
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edited.layers[layer].attn.z.output[:] = 0
    ids = edited.generate(PROMPT, max_new_tokens=3, do_sample=False)
    tokens = PROMPT
    for _ in range(3):
        logits = by_hand(kind, lambda p, v: v * 0 if p == f"layers[{layer}].attn.z" else v, tokens)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(torch.as_tensor(ids), tokens)


# -- what the state writes ---------------------------------------------------------------------------------


def written(kind: str, layer: int) -> Tensor:
    """What the state of a layer writes to the stream [L,D], by the reference's values of `PROMPT`."""
    at = f"layers[{layer}].ssm."
    y, skip, after, ssm_output = (of_prompt(kind, at + name) for name in ("y", "skip", "after_skip", "ssm_output"))
    gate = F.silu(skip)
    if f"{at}inner_norm" not in values(kind):
        entering = y * gate
    else:
        normed = of_prompt(kind, f"{at}inner_norm")
        first = torch.allclose(normed * gate, after)
        entering = y * gate * (normed / ssm_output if first else normed / after)
    weights = weights_of(kind)
    ends = [f"layers.{layer}.{path}out_proj.weight" for path in ("mixer.", "mamba.", "mamba_decoder.mamba.")]
    weight = next(weight for name, weight in weights.items() if name.endswith(tuple(ends)))
    out, term = of_prompt(kind, f"{at}out_proj"), of_prompt(kind, f"layers[{layer}].ssm_out")
    return entering @ weight.T * (term / out).median()


@pytest.mark.parametrize("kind", WITH_SSM)
def test_the_state_lens_is_what_the_states_add_to_the_logits(kind: str) -> None:
    model = made(kind)
    lens = state_lens(model, PROMPT, token=5)
    assert lens.row_labels == [str(layer) for layer in model.ssm_layers]
    last = len(model.layers) - 1
    scale = of_prompt(kind, "norm_f") / of_prompt(kind, f"layers[{last}].resid_post")
    directions = model.tokens_to_residual_directions(5)
    for row, layer in enumerate(model.ssm_layers):
        expected = (written(kind, layer) * scale) @ directions
        agrees(kind, lens.logits[row], expected, f"layer {layer}")
    one = state_lens(model, PROMPT, model.ssm_layers[-1], token=5)
    near(one.logits[0], lens.logits[-1], 1e-12)


@pytest.mark.parametrize("kind", WITH_SSM)
def test_contributions_add_up_to_y_and_to_what_it_writes(kind: str) -> None:
    model = made(kind)
    generator = torch.Generator().manual_seed(2)
    for layer in model.ssm_layers:
        sizes = mixer_sizes(model, layer)
        direction = torch.randn(24, generator=generator, dtype=torch.float64)
        found = contributions(model, PROMPT, layer, residual_direction=direction)
        agrees(kind, found.values.sum(-1), written(kind, layer) @ direction, f"layer {layer}")
        along = torch.randn(sizes["E"], generator=generator, dtype=torch.float64)
        found = contributions(model, PROMPT, layer, y_direction=along)
        agrees(kind, found.values.sum(-1), of_prompt(kind, f"layers[{layer}].ssm.y") @ along)
        alpha = hidden_attention(model, PROMPT, layer, reduce=None).values  # [L,L,E] or [L,L,H]
        x = of_prompt(kind, f"layers[{layer}].ssm.ssm_input")
        alpha = alpha.repeat_interleave(sizes["E"] // alpha.shape[-1], dim=-1)
        agrees(kind, torch.einsum("ije,je->ie", alpha, x), of_prompt(kind, f"layers[{layer}].ssm.y"))


@each_kind
def test_maps_of_all_layers_show_ssms_and_attention(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    maps = attention_maps(model, PROMPT)
    assert sorted(set(maps.layers)) == sorted({*model.ssm_layers, *model.attention_layers})
    assert len(maps.layers) == len(model.ssm_layers) + len(model.attention_layers)
    for values_of_map, layer, of in zip(maps.values, maps.layers, maps.kinds, strict=True):
        if of == "SSM":
            expected = hidden_attention(model, PROMPT, layer).values
            near(values_of_map, expected, 1e-12)
        else:
            agrees(kind, values_of_map, of_prompt(kind, f"layers[{layer}].attn.pattern").mean(0))
    titles = [heatmap.title.split("\n")[0] for heatmap in maps.heatmaps()]
    assert titles == [f"Layer {layer}, {of}" for layer, of in zip(maps.layers, maps.kinds, strict=True)]
    loaded = Result.load(maps.save(tmp_path / "maps.safetensors"))
    assert isinstance(loaded, AttentionMaps)
    assert torch.equal(loaded.values, maps.values)


def test_maps_of_some_layers_and_positions() -> None:
    model = made("nemotron_h")
    maps = attention_maps(model, PROMPT, [2, 0], rows=[-1, 3], columns=slice(0, 4), reduce="abs_mean")
    assert (maps.layers, maps.kinds, maps.rows, maps.columns) == ([0, 2], ["SSM", "attention"], [3, 6], [0, 1, 2, 3])
    assert maps.measures == ["mean of |alpha|", "mean of the pattern"]
    assert [heatmap.signed for heatmap in maps.heatmaps()] == [False, False]
    expected = hidden_attention(model, PROMPT, 0, rows=[-1, 3], columns=slice(0, 4), reduce="abs_mean").values
    near(maps.values[0], expected, 1e-12)
    pattern = of_prompt("nemotron_h", "layers[2].attn.pattern").mean(0)
    near(maps.values[1], pattern[[3, 6]][:, :4], 1e-5)
    with pytest.raises(ArgumentError, match="neither 'mean' nor 'abs_mean'"):
        attention_maps(model, PROMPT, reduce="max")
    wrong = r"layers=\[0, 3\]: layers\[3\] is MLP and has no ssm"
    with nothing_runs(model), pytest.raises(UnknownSiteError, match=wrong):
        attention_maps(model, PROMPT, [0, 3])


# -- means and interventions -------------------------------------------------------------------------------


#: Sites of which means are taken, by their paths in a layer.
AVERAGED = ["ssm.y", "ssm.B", "attn_out", "ssm_out", "mlp_out", "attn.k", "moe.router", "resid_mid", "shared_out"]


@each_main
@pytest.mark.parametrize("path", AVERAGED)
def test_means_are_of_the_layers_that_have_the_site(kind: str, path: str) -> None:
    model, name = made(kind), path.rpartition(".")[2]
    lacking = without(model, name)
    layers = [layer for layer in range(len(model.layers)) if layer not in lacking]
    if not layers:
        with nothing_runs(model), pytest.raises(UnknownSiteError, match="no layer of this model has"):
            mean_activation(model, TOKENS, name)
        return
    means = mean_activation(model, TOKENS, name, batch_size=2)
    assert list(means) == layers
    for layer in layers:
        agrees(kind, means[layer], values(kind)[f"layers[{layer}].{path}"].mean((0, 1)))
    for layer in lacking[:1]:
        with nothing_runs(model), pytest.raises(UnknownSiteError, match=rf"layers\[{layer}\] is .*these have one"):
            mean_activation(model, TOKENS, name, [layers[0], layer])


@each_main
def test_means_of_logits_are_those_of_the_model(kind: str) -> None:
    agrees(kind, mean_activation(made(kind), TOKENS, "logits")[None], values(kind)["logits"].mean((0, 1)))


def test_a_pattern_is_averaged_over_prompts_alone() -> None:
    model, layer = made("jamba"), 1
    means = mean_activation(model, TOKENS, "pattern", over="prompts")
    assert list(means) == [layer]
    agrees("jamba", means[layer], values("jamba")["layers[1].attn.pattern"].mean(0))
    with nothing_runs(model), pytest.raises(ArgumentError, match="over='prompts'"):
        mean_activation(model, TOKENS, "pattern")
    logits = logits_of("jamba", lambda m: ablate(m.layers[layer].attn.pattern, means[layer]))
    expected = by_hand("jamba", lambda p, v: means[layer].expand(v.shape) if p == "layers[1].attn.pattern" else v)
    agrees("jamba", logits, expected)


#: The arguments of `ablate` at a site, and the index of what it sets to 0.
ABLATED: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "attn.z": ({"heads": 1}, (slice(None), slice(None), 1)),
    "attn.q": ({"heads": [0, -1], "positions": [2, 4]}, (slice(None), torch.tensor([[2], [4]]), torch.tensor([0, 3]))),
    "attn.k": ({"heads": 1, "positions": -1}, (slice(None), -1, 1)),
    "attn.v": ({"channels": [0, 2]}, (..., [0, 2])),
    "attn.pattern": ({"heads": slice(0, 2), "positions": -1}, (slice(None), slice(0, 2), -1)),
    "moe.router": ({"channels": 2, "value": -100.0}, (..., 2)),
    "resid_mid": ({"channels": slice(0, 5), "positions": 3}, (slice(None), 3, slice(0, 5))),
    "mlp_out": ({"positions": [1, -1]}, (slice(None), [1, -1])),
    "norm_2": ({}, (...,)),
    "attn_out": ({}, (...,)),
    "ssm_out": ({"channels": 3}, (..., 3)),
    "shared_out": ({}, (...,)),
}


@each_main
def test_ablation_at_every_kind_of_site(kind: str) -> None:
    model, tried = made(kind), 0
    for site, (arguments, index) in ABLATED.items():
        lacking = without(model, site.rpartition(".")[2])
        layers = [layer for layer in range(len(model.layers)) if layer not in lacking]
        if layers:
            check_ablation(kind, f"layers[{layers[-1]}].{site}", arguments, index)
            tried += 1
    assert tried >= 7


def check_ablation(kind: str, path: str, arguments: dict[str, Any], index: tuple[Any, ...]) -> None:
    def zero(at: str, value: Tensor) -> Tensor:
        if at != path:
            return value
        value = value.clone()
        value[index] = arguments.get("value", 0.0)
        return value

    expected = by_hand(kind, zero)
    assert (expected - values(kind)["logits"]).abs().max() > 1e-4 * expected.abs().max(), f"{path} matters"
    agrees(kind, logits_of(kind, lambda m: ablate(m.hook(path), **arguments)), expected, path)


@each_main
def test_steering_a_head_and_a_stream(kind: str) -> None:
    model = made(kind)
    layer, W = model.attention_layers[0], model.layers[model.attention_layers[0]].attn._module.head_dim
    direction = torch.randn(4, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stream = torch.randn(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def added(at: str, value: Tensor) -> Tensor:
        if at == f"layers[{layer}].attn.z":
            value = value.clone()
            value[:, :, 2] += 2 * direction[2]
        if at == f"layers[{layer}].resid_post":
            value = value.clone()
            value[:, -1] += stream
        return value

    def act(m: MambaTrace) -> None:
        steer(m.layers[layer].attn.z, direction, 2.0, heads=2)
        steer(m.layers[layer].resid_post, stream, positions=-1)

    agrees(kind, logits_of(kind, act), by_hand(kind, added))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a head too many": ("z", {"heads": 4}, r"heads=4, but there are 4.*Heads count along Q \(query heads\), of size 4"),
    "a key head too many": ("k", {"heads": [0, 2]}, r"heads=2, but there are 2.*along U \(key heads\), of size 2"),
    "channels of a pattern": ("pattern", {"channels": 0}, "this site has no channels: give heads="),
    "a channel of a head too many": ("v", {"channels": 8}, r"Channels count along W \(head width\)"),
    "both": ("q", {"channels": 0, "heads": 0}, "give one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_and_channels_that_attention_does_not_have_are_refused(case: str) -> None:
    site, arguments, message = REFUSED[case]
    with pytest.raises(SiteValueError, match=message):
        logits_of("falcon_h1", lambda m: ablate(getattr(m.layers[1].attn, site), **arguments))
    agrees("falcon_h1", logits_of("falcon_h1", lambda m: None), values("falcon_h1")["logits"])


def test_heads_of_a_block_or_a_router_are_refused() -> None:
    for path in ("layers[1].attn_out", "layers[1].moe.router", "layers[1].mlp_out"):
        with pytest.raises(SiteValueError, match="no axis of heads"):
            logits_of("granitemoehybrid", lambda m, path=path: ablate(m.hook(path), heads=0))


# -- layers as arguments -----------------------------------------------------------------------------------


LAYERLESS: dict[str, Callable[[MambaTrace, int], Any]] = {
    "state_lens": lambda m, layer: state_lens(m, PROMPT, [layer]),
    "hidden_attention": lambda m, layer: hidden_attention(m, PROMPT, layer),
    "contributions": lambda m, layer: contributions(m, PROMPT, layer),
    "decay_rate": lambda m, layer: decay_rate(m, layer),
    "decay_groups": lambda m, layer: decay_groups(m, layer, PROMPT),
    "mean_activation": lambda m, layer: mean_activation(m, TOKENS, "y", layer),
}
TRACED: dict[str, Callable[[MambaTrace, Any], Any]] = {
    "knockout": lambda m, layers: knockout(m, 1, 3, layers, attention=False),
    "knockout_conv": lambda m, layers: knockout_conv(m, 1, 2, layers),
    "zero_delta": lambda m, layers: zero_delta(m, 1, layers),
}


@pytest.mark.parametrize("function", LAYERLESS)
def test_a_layer_without_an_ssm_is_refused_before_anything_runs(function: str) -> None:
    model = made("jamba")
    wanted = r"layers\[1\] is attention and has no ssm; these have one: 0, 2, 3. model.ssm_layers lists them"
    for layer in (1, -3):
        with nothing_runs(model), pytest.raises(UnknownSiteError, match=wanted):
            LAYERLESS[function](model, layer)


@pytest.mark.parametrize("function", TRACED)
def test_a_cut_in_a_layer_without_an_ssm_is_refused_before_anything_runs(function: str) -> None:
    model = made("nemotron_h")
    wrong = pytest.raises(UnknownSiteError, match=r"layers=\[0, 2\]: layers\[2\] is attention and has no ssm")
    with nothing_runs(model), wrong, model.trace(TOKENS):
        TRACED[function](model, [0, 2])


def test_a_model_without_an_ssm_says_so() -> None:
    model = made("granitemoehybrid, no SSM")
    for act in (lambda: state_lens(model, PROMPT), lambda: mean_activation(model, TOKENS, "y")):
        with nothing_runs(model), pytest.raises(UnknownSiteError, match=r"no layer of this model has 'ssm'.*attention"):
            act()
    wrong = pytest.raises(UnknownSiteError, match="no layer of this model has 'ssm'")
    with nothing_runs(model), wrong, model.trace(TOKENS):
        zero_delta(model, 1)


@pytest.mark.parametrize("kind", WITH_SSM)
def test_groups_by_decay_are_of_the_layers_own_mixer(kind: str) -> None:
    model = made(kind)
    for layer in model.ssm_layers:
        sizes = mixer_sizes(model, layer)
        rates = -(
            of_prompt(kind, f"layers[{layer}].ssm.delta").mean(0)[..., None]
            * values(kind)[f"layers[{layer}].ssm.A"].reshape(
                of_prompt(kind, f"layers[{layer}].ssm.delta").shape[-1], -1
            )
        ).mean(-1)
        expected = rates.repeat_interleave(sizes["E"] // len(rates))
        agrees(kind, decay_rate(model, layer, PROMPT), expected)
        groups = decay_groups(model, layer)
        assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(sizes["E"]))


# -- cuts --------------------------------------------------------------------------------------------------


class CutByHand:
    """What a cut from some tokens to others leaves, as edits of the reference: the flow is added up token by token."""

    def __init__(self, sources: list[int], targets: list[int], ssm: list[int], attention: list[int] | None = None):
        self.sources, self.targets, self.ssm, self.attention = sources, targets, ssm, attention or []
        self.seen: dict[str, Tensor] = {}

    def __call__(self, path: str, value: Tensor) -> Tensor:
        self.seen[path] = value
        layer = int(path[7 : path.index("]")]) if path.startswith("layers[") else None
        if path.endswith(".ssm.y") and layer in self.ssm:
            return value - self.flow(f"layers[{layer}].ssm.")
        if path.endswith(".attn.pattern") and layer in self.attention:
            value = value.clone()
            for target in self.targets:
                value[:, :, target, self.sources] = 0
        return value

    def flow(self, at: str) -> Tensor:
        write, A_bar, C = (self.seen[at + name] for name in ("write", "A_bar", "C"))
        if write.dim() == 5:  # of heads
            A_bar, C = A_bar[..., None, None], C.repeat_interleave(write.shape[2] // C.shape[2], dim=2)[..., None, :]
        elif C.dim() == 3:
            C = C[:, :, None]
        else:
            C = C.repeat_interleave(write.shape[2] // C.shape[2], dim=2)
        state, flow = torch.zeros_like(write[:, 0]), torch.zeros(write.shape[:-1], dtype=write.dtype)
        for position in range(write.shape[1]):
            state = A_bar[:, position] * state + write[:, position] * (position in self.sources)
            if position in self.targets:
                flow[:, position] = (state * C[:, position]).sum(-1)
        return flow.flatten(2)


@pytest.mark.parametrize("kind", WITH_SSM)
def test_a_knockout_takes_the_ssms_flow_alone_or_attentions_too(kind: str) -> None:
    model = made(kind)
    cut = {"source_positions": [1, 2], "target_positions": [2, 5, 6]}
    expected = by_hand(kind, CutByHand([1, 2], [2, 5, 6], model.ssm_layers))
    agrees(kind, logits_of(kind, lambda m: knockout(m, **cut, attention=False)), expected)
    both = by_hand(kind, CutByHand([1, 2], [2, 5, 6], model.ssm_layers, model.attention_layers))
    assert (both - expected).abs().max() > 1e-4 * expected.abs().max()
    agrees(kind, logits_of(kind, lambda m: knockout(m, **cut, attention=True)), both)
    alone = by_hand(kind, CutByHand([1, 2], [2, 5, 6], [], model.attention_layers))
    agrees(kind, logits_of(kind, lambda m: knockout(m, **cut, scan=False, attention=True)), alone)


def test_attention_is_cut_on_a_cache_at_the_tokens_of_the_call() -> None:
    """Position 0 of a decode step is its token, which no longer reads itself; what the cache holds is read."""
    model, found = made("jamba"), []
    layer = model.attention_layers[0]
    with torch.no_grad(), model.generate(PROMPT, max_new_tokens=2, min_new_tokens=2, do_sample=False) as tracer:
        for step in tracer.iter[:2]:
            if step == 1:
                knockout(model, 0, 0, layer, scan=False, attention=True)
            found.append(model.logits.output[0, -1].save())
    tokens = torch.cat((PROMPT, found[0].argmax()[None, None]), dim=1)

    def cut(path: str, value: Tensor) -> Tensor:
        return CutByHand([LENGTH], [LENGTH], [], [layer])(path, value)

    expected = by_hand("jamba", cut, tokens)[0, -1]
    assert (expected - by_hand("jamba", None, tokens)[0, -1]).abs().max() > 1e-3
    near(found[1], expected, 1e-11)


def test_cuts_in_named_layers_and_with_zeroed_deltas() -> None:
    kind = "nemotron_h, no experts"
    model = made(kind)
    ssm, attention = model.ssm_layers, model.attention_layers
    expected = by_hand(kind, CutByHand([1], [4], [ssm[1]], attention))
    logits = logits_of(kind, lambda m: knockout(m, 1, 4, [ssm[1], attention[0]], attention=True))
    agrees(kind, logits, expected)

    def zeroed(path: str, value: Tensor) -> Tensor:
        if path.endswith(".ssm.delta"):
            value = value.clone()
            value[:, 2] = 0
        return value

    agrees(kind, logits_of(kind, lambda m: zero_delta(m, 2)), by_hand(kind, zeroed))
    hand = CutByHand([1], [4], ssm, attention)
    logits = logits_of(kind, lambda m: apply(m, [Cut(1, 4, attention=True), ZeroDelta(2)]))
    agrees(kind, logits, by_hand(kind, lambda p, v: hand(p, zeroed(p, v))))
    with pytest.raises(UnknownSiteError, match=r"layers\[\d\] is attention and has no ssm"):
        logits_of(kind, lambda m: apply(m, [Cut(1, 4, attention=True), ZeroDelta(2)], attention))


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind in SERVED])
def test_taps_are_cut_in_the_ssm_layers(kind: str) -> None:
    """A cut of a token from itself and the next leaves what the reference has without these taps."""
    weights = weights_of(kind)

    def cut(path: str, value: Tensor) -> Tensor:
        seen[path] = value
        name = path.rpartition(".")[2]
        if name not in ("conv", "B_conv", "C_conv"):
            return value
        layer = int(path[7 : path.index("]")])
        taps = next(w for n, w in weights.items() if f"layers.{layer}." in n and n.endswith("conv1d.weight"))[:, 0]
        E = seen[f"layers[{layer}].ssm.x_in"].shape[-1]
        GN = (taps.shape[0] - E) // 2
        start = {"conv": 0, "B_conv": E, "C_conv": E + GN}[name]
        column = seen[path.replace("conv", "in") if name != "conv" else f"layers[{layer}].ssm.x_in"]
        flat = column.flatten(2)
        value = value.clone()
        part = taps[start : start + flat.shape[-1]]
        for target, lag in ((2, 0), (3, 1)):
            value[:, target] -= (flat[:, 2] * part[:, -1 - lag]).view_as(value[:, target])
        return value

    seen: dict[str, Tensor] = {}
    expected = by_hand(kind, cut)
    agrees(kind, logits_of(kind, lambda m: knockout_conv(m, 2, [2, 3])), expected)


def test_a_cut_that_leaves_attention_alone_warns_unless_it_says_so() -> None:
    model = made("jamba")
    with pytest.warns(UserWarning, match=r"attention, in layers 1, still carries.*attention=True"):
        logits_of("jamba", lambda m: knockout(m, 1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of("jamba", lambda m: knockout(m, 1, 4, attention=False))
        logits_of("jamba", lambda m: knockout(m, 1, 4, attention=True))
        logits_of("jamba", lambda m: knockout_conv(m, 1, 2))
        logits_of("jamba", lambda m: apply(m, ZeroDelta(1)))
        demo = MambaTrace.demo()
        with demo.trace("Emma gave an apple to"):
            knockout(demo, 1, 3)
    assert model.attention_layers == [1]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ArgumentError, match="only attention is cut"):
        Cut(1, 4, heads=0, scan=False, attention=True)
    with pytest.raises(ArgumentError, match="nothing would be cut"):
        Cut(1, 4, scan=False, attention=False)
    for layers, arguments in ((None, {}), (1, {"scan": False})):
        with pytest.raises(PositionError, match="every source comes after every target"):
            logits_of("jamba", lambda m, a=arguments, at=layers: knockout(m, 4, 1, at, attention=True, **a))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["falcon_h1", "granitemoehybrid"])
def test_padding_is_known_to_a_cut_whatever_layer_comes_first(kind: str, side: str) -> None:
    """The mask that a block is given may be attention's, of pairs; the positions on padding are refused by the mask."""
    model = made(kind)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[:, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    source, target = (-7, -1) if side == "left" else (6, 6)
    for layer in model.ssm_layers:
        wrong = pytest.raises(PositionError, match="its longest prompt has 5 tokens")
        with wrong, torch.no_grad(), model.trace(TOKENS[:2], attention_mask=mask):
            model.embeddings.output.save()  # the run is past the model's own inputs
            knockout(model, source, target, layer, attention=False)


# -- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind in SERVED and not kind.startswith("zamba")])
def test_a_trace_of_an_adapted_hybrid_is_that_of_the_merged_one(kind: str) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=["q_proj", "in_proj", "lm_head"], init_lora_weights=False)
        return get_peft_model(make_hybrid(kind, dtype=torch.float64), settings)

    model, merged = MambaTrace(adapted()), MambaTrace(adapted().merge_and_unload())
    logits, cache = model.run_with_cache(TOKENS)
    expected, other = merged.run_with_cache(TOKENS)
    near(logits, expected, max(tolerance(kind), 1e-10))
    with torch.no_grad(), model.trace(TOKENS):
        read = model.logits.output.save()
    near(read, logits, max(tolerance(kind), 1e-10))  # attention without its pattern is another kernel
    assert torch.equal(cache["hook_logits"], logits)
    assert (logits - values(kind)["logits"]).abs().max() > 1e-2
    layer = model.attention_layers[0]
    near(cache["q", layer], other["q", layer], 1e-5)
    attributed = cache.logit_attrs(cache.decompose_resid(), TOKENS).sum(0)
    near(attributed, logits.gather(-1, TOKENS[..., None])[..., 0], 1e-10)
    assert state_lens(model, PROMPT).row_labels == [str(number) for number in merged.ssm_layers]


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind in SERVED])
def test_a_hybrid_that_was_traced_is_adapted_and_resized(kind: str) -> None:
    """Its parts have their sites already, those of layers without an SSM too."""
    traced, model = (MambaTrace(make_hybrid(kind, dtype=torch.float64)) for _ in range(2))
    before = traced.run_with_hooks(TOKENS)
    traced._module.resize_token_embeddings(40, mean_resizing=False)
    near(traced.run_with_hooks(TOKENS)[..., :31], before, 1e-12)
    settings = LoraConfig(r=2, target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    for module in (traced._module, model._module):
        torch.manual_seed(0)
        get_peft_model(module, settings)
    expected = MambaTrace(model._module).run_with_hooks(TOKENS)
    near(traced.run_with_hooks(TOKENS)[..., :31], expected, 1e-12)
    assert not torch.allclose(expected, before, atol=1e-2)
