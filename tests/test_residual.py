"""Analyses of the residual stream from a cache, on every kind of model; `test_activations` has more of Mamba-1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import N_LAYERS, agree
from kinds import KINDS, make
from reference import forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.hooked.cache import ActivationCache

D, V = 12, 31


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> MambaTrace:
    return make(request.param, tie_word_embeddings=False, use_bias=True)


@pytest.fixture(scope="module")
def cache(model: MambaTrace, tokens: Tensor) -> ActivationCache:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


@pytest.fixture(scope="module")
def values(model: MambaTrace, tokens: Tensor) -> dict[str, Tensor]:
    """Every value of the reference by hook name."""
    found: dict[str, Tensor] = {}
    forward(model._module.state_dict(), model.config, tokens, lambda hook, value: found.setdefault(hook, value))
    return found


def test_streams_and_terms_are_those_of_the_reference(cache: ActivationCache, values: dict[str, Any]) -> None:
    streams = [values[f"blocks.{layer}.hook_resid_pre"] for layer in range(N_LAYERS)]
    streams.append(values[f"blocks.{N_LAYERS - 1}.hook_resid_post"])
    agree(cache.accumulated_resid(), torch.stack(streams), 1e-10)
    outs = [values[f"blocks.{layer}.hook_out_proj"] for layer in range(N_LAYERS)]
    agree(cache.decompose_resid(), torch.stack([values["hook_embed"], *outs]), 1e-10)
    agree(cache.stack_activation("out_proj"), torch.stack(outs), 1e-10)
    agree(
        cache.stack_activation("after_skip", 2).sum(0),
        sum(values[f"blocks.{n}.hook_after_skip"] for n in (0, 1)),
        1e-10,
    )


def test_the_norm_before_each_layer_is_linear_with_its_scale_frozen(
    cache: ActivationCache, values: dict[str, Any]
) -> None:
    for layer in range(N_LAYERS + 1):
        normed = values["hook_norm" if layer == N_LAYERS else f"blocks.{layer}.hook_normalized_input"]
        agree(cache.decompose_resid(layer, apply_ln=True).sum(0).detach(), normed, 1e-10)
        agree(cache.accumulated_resid(layer, apply_ln=True, pos_slice=2)[-1].detach(), normed[:, 2], 1e-10)


def test_attributions_add_up_to_the_logits_and_the_lens_ends_in_them(
    cache: ActivationCache, values: dict[str, Any], tokens: Tensor
) -> None:
    logits = values["hook_logits"]
    attributions = cache.logit_attrs(cache.decompose_resid(), tokens).sum(0).detach()
    agree(attributions, logits.gather(-1, tokens[..., None])[..., 0], 1e-10)
    agree(cache.logit_lens()[-1].detach(), logits, 1e-10)


def test_all_states_of_a_layer_stand_behind_the_batch(cache: ActivationCache, values: dict[str, Any]) -> None:
    states = torch.stack([values[f"blocks.{layer}.hook_h"] for layer in range(N_LAYERS)])
    agree(cache.stack_activation("h"), states, 1e-10)  # [n_layers,B,L,E,N], in Mamba-2 [n_layers,B,L,H,P,N]


def test_without_its_batch_axis_a_cache_keeps_the_axes_of_a_state(model: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad():
        _, one = model.run_with_cache(tokens[:1])
    with_batch = one["h", 1]
    agree(one.remove_batch_dim()["h", 1], with_batch[0], 0)
    agree(one.decompose_resid().sum(0), one["resid_post", -1], 1e-10)
