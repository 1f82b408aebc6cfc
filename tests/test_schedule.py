"""One run with hooks: through its layers in the order given, and with values that nobody else has a hand in.

The reference of an order is the float64 forward of `reference` on weights that are numbered anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, ModuleFactory, agree
from reference import forward
from test_hooks import plain
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import LayerError
from mamba_trace.hidden_attention import hidden_attention
from mamba_trace.hooked import schedule
from mamba_trace.hooked.losses import next_token_loss
from mamba_trace.lenses import state_lens
from mamba_trace.mamba_lens import HookedMamba

ORDERS = [[2, 1], [1, 1], [2, 0, 2, 1], [-1, 0], [0, 1, 2, 2], [1], []]


class Reordered:
    """The reference on a model of the layers in ``order``."""

    def __init__(self, model: MambaTrace, order: list[int]) -> None:
        self.config = copy.deepcopy(model.config)
        self.config.num_hidden_layers = len(order)
        state = model._module.state_dict()
        old = {name: weight.detach().clone().requires_grad_() for name, weight in state.items()}
        self.weights = {name: weight for name, weight in old.items() if ".layers." not in name}
        for number, layer in enumerate(order):
            prefix = f"backbone.layers.{layer % N_LAYERS}."
            for name, weight in old.items():
                if name.startswith(prefix):
                    self.weights[f"backbone.layers.{number}.{name.removeprefix(prefix)}"] = weight

    def logits(self, tokens: Tensor, edit: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        return forward(self.weights, self.config, tokens, edit)


def zero(value: Tensor) -> None:
    value.zero_()


# -- the order of layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_layers_run_in_the_order_given(
    exact: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor, order: list[int]
) -> None:
    expected = Reordered(exact, order).logits(tokens)
    whole = plain(exact, tokens)
    agree(exact.run_with_hooks(tokens, only_use_these_layers=order), expected, 1e-10)
    loss = exact.run_with_hooks(tokens, only_use_these_layers=tuple(order), return_type="loss")
    agree(loss, next_token_loss(expected, tokens), 1e-10)
    lens = HookedMamba(tiny_hf(dtype=torch.float64))
    agree(lens(tokens, only_use_these_layers=order), expected, 1e-10)
    assert torch.equal(plain(exact, tokens), whole), "the model is as it was"


@pytest.mark.parametrize("order", [[2, 1], [2, 0, 2, 1], [1, 1, 0]], ids=str)
def test_hooks_run_each_time_and_a_cache_has_the_last(exact: MambaTrace, tokens: Tensor, order: list[int]) -> None:
    streams: list[Tensor] = []

    def halve(hook: str, value: Tensor) -> Tensor:
        if not hook.endswith("hook_resid_post"):
            return value
        streams.append(value / 2)
        return streams[-1]

    expected = Reordered(exact, order).logits(tokens, halve)
    seen: list[Any] = []

    def edit(value: Tensor, hook: Any) -> Tensor:
        hook.ctx["times"] = hook.ctx.get("times", 0) + 1
        seen.append((hook.layer(), hook.ctx["times"], value.detach().clone()))
        return value / 2

    logits, cache = exact.run_with_cache(
        tokens,
        fwd_hooks=[(lambda name: name.endswith("hook_resid_post"), edit)],
        only_use_these_layers=order,
    )
    agree(logits, expected, 1e-10)
    assert [layer for layer, _, _ in seen] == order
    nth = [order[: place + 1].count(layer) for place, layer in enumerate(order)]
    assert [times for _, times, _ in seen] == nth
    for place, (layer, _, value) in enumerate(seen):
        agree(value / 2, streams[place], 1e-10)
        if layer not in order[place + 1 :]:
            agree(cache["resid_post", layer], streams[place], 1e-10)
    posts = [int(name.split(".")[1]) for name in cache if name.endswith("resid_post")]
    assert posts == [layer for place, layer in enumerate(order) if layer not in order[place + 1 :]]


def test_states_are_of_the_last_time_and_are_edited_each_time(exact: MambaTrace, tokens: Tensor) -> None:
    found: list[Tensor] = []

    def forget(h: Tensor, hook: Any) -> None:
        found.append(h.clone())
        h[:] = 0

    _, cache = exact.run_with_cache(
        tokens,
        ["blocks.1.hook_h"],
        fwd_hooks=[("blocks.1.hook_h.3", forget)],
        only_use_these_layers=[1, 0, 1],
    )
    stream = exact.run_with_hooks(tokens, stop_at_layer=0)
    for time, layer in enumerate([1, 0, 1]):
        hooks = [("blocks.1.hook_h.3", lambda h, hook: torch.zeros_like(h))] if layer else []
        after, one = exact.run_with_cache(stream, fwd_hooks=hooks, start_at_layer=layer, stop_at_layer=layer + 1)
        if layer:
            before = exact.run_with_cache(stream, "blocks.1.hook_h.3", start_at_layer=1, stop_at_layer=2)[1]
            agree(found[time // 2], before["blocks.1.hook_h.3"], 1e-10)
        stream = after
    agree(cache["h", 1], one["h", 1], 1e-10)


@pytest.mark.parametrize("order", [[2, 1], [2, 0, 2, 1], [1, 1, 0]], ids=str)
def test_gradients_go_back_through_the_layers_in_that_order(
    exact: MambaTrace, tokens: Tensor, order: list[int]
) -> None:
    gradients: list[Tensor] = []

    def watch(hook: str, value: Tensor) -> Tensor:
        if hook.endswith("hook_resid_post"):
            value.register_hook(lambda gradient: gradients.append(gradient.clone()))
        return value

    reordered = Reordered(exact, order)
    loss = next_token_loss(reordered.logits(tokens, watch), tokens)
    loss.backward()
    fired: list[int] = []

    def note(gradient: Tensor, hook: Any) -> None:
        fired.append(hook.layer())

    name = [lambda name: name.endswith("hook_resid_post")]
    ours, cache = exact.run_with_cache(
        tokens,
        name,
        return_type="loss",
        incl_bwd=True,
        bwd_hooks=[(name[0], note)],
        only_use_these_layers=order,
    )
    agree(ours, loss, 1e-10)
    assert fired == order[::-1]
    for place, layer in enumerate(order):
        if layer not in order[place + 1 :]:
            agree(cache[f"blocks.{layer}.hook_resid_post_grad"], gradients[len(order) - 1 - place], 1e-10)
    for layer in order:
        name = f"backbone.layers.{order.index(layer)}.mixer.in_proj.weight"
        weight = exact._module.backbone.layers[layer].mixer.in_proj.weight
        agree(weight.grad, reordered.weights[name].grad, 1e-10)


def test_they_go_with_where_a_run_starts_and_stops(exact: MambaTrace, tokens: Tensor) -> None:
    """Of the layers given, those in the range, in the order given."""
    stream = exact.run_with_hooks(tokens, only_use_these_layers=[2, 1, 0, 1], stop_at_layer=2)
    agree(stream, exact.run_with_hooks(tokens, only_use_these_layers=[1, 0, 1], stop_at_layer=3), 1e-10)
    first = exact.run_with_hooks(tokens, only_use_these_layers=[1, 0], stop_at_layer=2)
    second = {"only_use_these_layers": [1], "start_at_layer": 0, "stop_at_layer": 2}
    agree(stream, exact.run_with_hooks(first, **second), 1e-10)
    logits = exact.run_with_hooks(first, only_use_these_layers=[2, 0, 1], start_at_layer=1)
    agree(logits, exact.run_with_hooks(tokens, only_use_these_layers=[1, 0, 2, 1]), 1e-10)


def test_a_run_that_fails_leaves_the_model_as_it_was(exact: MambaTrace, tokens: Tensor) -> None:
    whole = plain(exact, tokens)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        exact.run_with_hooks(tokens, [("blocks.1.hook_y", fail)], only_use_these_layers=[2, 1])
    assert torch.equal(plain(exact, tokens), whole)
    assert list(exact._module.backbone._modules) == ["embeddings", "layers", "norm_f"]
    assert len(exact._module.backbone.layers) == N_LAYERS


@pytest.mark.parametrize("wrong", [[0, 1.0], ["1"], [None]], ids=str)
def test_layers_are_integers(tiny: MambaTrace, tokens: Tensor, wrong: list[Any]) -> None:
    with pytest.raises(LayerError, match=r"^only_use_these_layers=.*: .* layers 0 to 2, named by an integer"):
        tiny.run_with_hooks(tokens, only_use_these_layers=wrong)


# -- lasting edits -----------------------------------------------------------------------------------------


def test_edits_of_what_lies_behind_the_end_are_no_concern_of_a_run(exact: MambaTrace, tokens: Tensor) -> None:
    before = exact.run_with_hooks(tokens, stop_at_layer=1)
    attention, lens = hidden_attention(exact, tokens[:1], 0), state_lens(exact, tokens[:1], 0)
    with exact.edit(inplace=True):
        exact.layers[2].resid_post.output[:] = 0
    with exact.edit(inplace=True):
        exact.lm_head.output[:] = 3
    assert torch.equal(exact.run_with_hooks(tokens, stop_at_layer=1), before)
    assert torch.equal(hidden_attention(exact, tokens[:1], 0).values, attention.values)
    assert state_lens(exact, tokens[:1], 0).logits.shape == lens.logits.shape
    with torch.no_grad(), exact.trace(tokens) as tracer:
        stream = exact.layers[0].resid_post.output.save()
        tracer.stop()
    agree(stream, before, 1e-10)
    assert (exact.run_with_hooks(tokens) == 3).all(), "and they are there in the next"


def test_edits_take_part_in_a_run_of_some_layers(exact: MambaTrace, tokens: Tensor) -> None:
    def double(hook: str, value: Tensor) -> Tensor:
        return 2 * value if hook == "blocks.0.hook_resid_post" else value

    expected = Reordered(exact, [2, 1]).logits(tokens, double)
    with exact.edit(inplace=True):
        exact.layers[2].resid_post.output *= 2
    agree(exact.run_with_hooks(tokens, only_use_these_layers=[2, 1]), expected, 1e-10)
    stream = exact.run_with_hooks(tokens, stop_at_layer=2)
    agree(exact.run_with_hooks(stream, start_at_layer=2), exact.run_with_hooks(tokens), 1e-10)


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("layers[0].ssm.y", {"start_at_layer": 1}),
        ("embeddings", {"start_at_layer": 1}),
        ("layers[0].resid_post", {"only_use_these_layers": [2, 1]}),
    ],
    ids=str,
)
def test_an_edit_that_would_be_left_out_is_told(
    tiny: MambaTrace, tokens: Tensor, place: str, arguments: dict[str, Any]
) -> None:
    stream = tiny.run_with_hooks(tokens, stop_at_layer=1).detach()
    with tiny.edit(inplace=True):
        tiny.hook(place).output[:] = 0
        tiny.layers[2].resid_post.output[:] = 0
    asked, value = next(iter(arguments.items()))
    with pytest.raises(LayerError) as error:
        tiny.run_with_hooks(stream if asked == "start_at_layer" else tokens, **arguments)
    assert f"waits for {place}" in str(error.value)
    assert f"{asked}={value}" in str(error.value)
    tiny.clear_edits()
    tiny.run_with_hooks(tokens)


# -- values that are somebody's own ------------------------------------------------------------------------


def test_what_is_cached_stays_whatever_happens_to_what_was_seen(exact: MambaTrace, tokens: Tensor) -> None:
    kept: list[Tensor] = []
    exact._module.backbone.layers[1].resid_post.register_forward_hook(lambda site, args, out: out.zero_())
    with torch.no_grad():
        expected = copy.deepcopy(exact.run_with_cache(tokens, stop_at_layer=2)[1]["resid_post", 1])
        hooks = [
            ("blocks.0.hook_resid_pre", lambda value, hook: kept.append(value)),
            ("blocks.0.hook_y", lambda value, hook: zero(kept[0])),
        ]
        logits, cache = exact.run_with_cache(tokens, fwd_hooks=hooks)
    assert expected.abs().max() > 0
    assert torch.equal(cache["resid_pre", 0], cache["embed"])
    saved = cache["hook_logits"].clone()
    logits.zero_()
    assert torch.equal(cache["hook_logits"], saved)


def test_what_is_returned_is_the_callers(tiny: MambaTrace, tokens: Tensor) -> None:
    kept: list[Tensor] = []
    with torch.no_grad():
        stream = tiny.run_with_hooks(tokens, stop_at_layer=1)
        before = stream.clone()
        tiny.run_with_hooks(stream, start_at_layer=1, stop_at_layer=1).zero_()
        assert torch.equal(stream, before)
        logits = tiny.run_with_hooks(tokens, [("hook_logits", lambda value, hook: kept.append(value))])
        logits.zero_()
    assert kept[0].abs().max() > 0


def test_what_a_hook_does_to_its_hook_names_nothing_else(tiny: MambaTrace, tokens: Tensor) -> None:
    def rename(value: Tensor, hook: Any) -> None:
        hook.name = "mine"

    name = "blocks.1.hook_y"
    _, cache = tiny.run_with_cache(
        tokens, [name], "loss", fwd_hooks=[(name, rename)], bwd_hooks=[(name, rename)], incl_bwd=True
    )
    assert list(cache) == [name, f"{name}_grad"]


def test_a_gradient_that_a_hook_returns_stays_the_hooks(tiny: MambaTrace, tokens: Tensor) -> None:
    ones: list[Tensor] = []

    def replace(gradient: Tensor, hook: Any) -> Tensor:
        ones.append(torch.ones_like(gradient))
        return ones[0]

    hooks = [("blocks.1.hook_y", replace), ("blocks.1.hook_y", lambda gradient, hook: zero(gradient))]
    loss = tiny.run_with_hooks(tokens, bwd_hooks=hooks, return_type="loss")
    loss.backward()
    assert (ones[0] == 1).all()


def test_what_was_made_for_a_cache_is_not_copied(tiny: MambaTrace, tokens: Tensor, monkeypatch: Any) -> None:
    copies: list[int] = []
    monkeypatch.setattr(schedule, "copied", lambda value, device: copies.append(value.dim()) or value.clone())
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens)
        assert 4 not in copies
        assert cache["A_bar", 0].dim() == 4
        tiny.run_with_cache(tokens, fwd_hooks=[("hook_embed", lambda value, hook: None)])
    assert 4 in copies  # a hook may edit what it has seen
