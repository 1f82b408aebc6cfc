"""Gradients of every site and through every site, in float64, against finite differences of the same trace.

The derivative along a random direction, read through autograd, must equal the change of the score when a
trace moves the site's value that way. The finite difference only uses forward runs, which other tests hold
to independent references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModuleFactory
from torch import Tensor, nn

from mamba_trace import MambaTrace, names

L = 6
STEP, TOLERANCE = 1e-5, 1e-6
TRAJECTORY = "layers[{layer}].ssm.h"
HOOKS = [
    name
    for name in names.hook_names(3, L)
    if "hook_h." not in name or name.endswith((".0", ".3", f".{L - 1}"))
]
PLACES = [name for name in HOOKS if not name.startswith("blocks.1.")] + [
    TRAJECTORY.format(layer=n) for n in (0, 2)
]
EDITS = ["read", "assigned", "in place", "partly in place"]


@pytest.fixture(scope="module")
def model(tiny_hf: ModuleFactory) -> MambaTrace:
    return MambaTrace(tiny_hf(dtype=torch.float64, use_bias=True))


def noise(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_tokens(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randint(1, 31, (batch, L), generator=torch.Generator().manual_seed(seed))


def score_of(logits: Tensor) -> Tensor:
    """A fixed random combination of all logits."""
    return (logits * noise(logits.shape, seed=7)).sum()


def edited(envoy: Any, how: str) -> Tensor:
    """The value that a place carries on, edited inside a trace as ``how`` says."""
    value = envoy.output
    if how == "assigned":
        value = 0.7 * value + 0.1
        envoy.output = value
    elif how == "in place":
        value *= 0.7
        value += 0.1
    elif how == "partly in place":
        value[:, 1] = 0.3
    return value


def central_difference(score: Callable[[float], float], step: float = STEP) -> float:
    """d score(t) / dt at 0, to fourth order."""
    near, far = score(step) - score(-step), score(2 * step) - score(-2 * step)
    return (8 * near - far) / (12 * step)


def assert_close(actual: Tensor, expected: float, scale: float = 0.0) -> None:
    """Equal to TOLERANCE relative, or to rounding of a difference of scores of size ``scale``."""
    rounding = 1e-14 * scale / STEP
    assert abs(float(actual) - expected) <= TOLERANCE * abs(expected) + rounding, (float(actual), expected)


def along(model: MambaTrace, place: str, how: str, tokens: Tensor) -> Callable[[float], float]:
    """The score when a trace edits a place as ``how`` says and moves it by t in the direction of seed 11."""

    def score(t: float) -> float:
        with torch.no_grad(), model.trace(tokens):
            envoy = model.hook(place)
            value = edited(envoy, how)
            envoy.output = value + t * noise(value.shape, seed=11)
            result = score_of(model.lm_head.output).save()
        return float(result)

    return score


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_of_every_place(model: MambaTrace, place: str, how: str) -> None:
    tokens = draw_tokens()
    with model.trace(tokens):
        value = edited(model.hook(place), how)
        score = score_of(model.lm_head.output)
        with score.backward():
            gradient = value.grad.save()
        score = score.detach().save()
    assert gradient.abs().max() > 0
    expected = central_difference(along(model, place, how, tokens))
    assert abs(expected) > 1e-4
    assert_close((gradient * noise(gradient.shape, seed=11)).sum(), expected, abs(float(score)))


@pytest.mark.parametrize("how", EDITS)
def test_all_places_in_one_backward_pass(model: MambaTrace, how: str) -> None:
    """Every place edited and asked for its gradient at once, against the same asked for one by one."""
    tokens, gradients, alone = draw_tokens(), {}, {}
    places = names.hook_names(3, L)
    with model.trace(tokens):
        values = {place: edited(model.hook(place), how) for place in places}
        score = score_of(model.lm_head.output)
        with score.backward():
            for place in reversed(places):
                gradients[place] = values[place].grad.save()
    for place in places[::9]:
        with model.trace(tokens):
            kept = {}
            for one in places:
                kept[one] = edited(model.hook(one), how)
            score = score_of(model.lm_head.output)
            alone[place] = torch.autograd.grad(score, kept[place])[0].save()
    for place, gradient in alone.items():
        torch.testing.assert_close(gradients[place], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("place", [place for place in PLACES if not place.endswith("_A")])
def test_gradients_in_batched_invokes(model: MambaTrace, place: str, how: str) -> None:
    """Of each invoke's own score; A, which has no batch dimension, is one value for both."""
    first, second = draw_tokens(1, seed=5), draw_tokens(2, seed=6)
    with model.trace() as tracer:
        with tracer.invoke(first):
            one = edited(model.hook(place), how)
            score_one = score_of(model.lm_head.output)
            with score_one.backward(retain_graph=True):
                gradient_one = one.grad.save()
        with tracer.invoke(second):
            two = edited(model.hook(place), how)
            score_two = score_of(model.lm_head.output)
            with score_two.backward():
                gradient_two = two.grad.save()
    for tokens, gradient in ((first, gradient_one), (second, gradient_two)):
        assert gradient.shape[0] == tokens.shape[0]
        expected = central_difference(along(model, place, how, tokens))
        assert_close((gradient * noise(gradient.shape, seed=11)).sum(), expected, 100.0)


def test_an_assigned_gradient_is_what_flows_on(model: MambaTrace) -> None:
    """With the gradient of h[3] set to zero, what came before reaches the score by other ways only."""
    tokens = draw_tokens()

    def gradient_of_h1(cut: bool) -> Tensor:
        with model.trace(tokens):
            before, at = model.layers[1].ssm.h[1].output, model.layers[1].ssm.h[3].output
            score = model.layers[1].ssm.y.output[:, 4:].sum()
            with score.backward():
                if cut:
                    at.grad = torch.zeros_like(at)
                gradient = before.grad.save()
        return gradient

    assert gradient_of_h1(cut=False).abs().max() > 0
    assert not gradient_of_h1(cut=True).any()


PARAMETERS = [
    "A_log",
    "D",
    "conv1d.weight",
    "in_proj.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
]
ACTIVE = {
    "none": [],
    "A_bar": ["blocks.1.hook_A_bar"],
    "B_bar": ["blocks.1.hook_B_bar"],
    "h": ["blocks.1.hook_h.2", f"blocks.1.hook_h.{L - 1}"],
    "A_bar and h": ["blocks.1.hook_A_bar", "blocks.1.hook_h.0", "blocks.1.hook_h.4"],
    "delta, C and the trajectory": ["blocks.1.hook_delta", "blocks.1.hook_C", "layers[1].ssm.h"],
}


@pytest.mark.parametrize("how", EDITS[1:])
@pytest.mark.parametrize("places", ACTIVE.values(), ids=ACTIVE)
def test_gradients_of_parameters_under_an_edit(tiny_hf: ModuleFactory, places: list[str], how: str) -> None:
    model, tokens = MambaTrace(tiny_hf(dtype=torch.float64)), draw_tokens()
    parameters = dict(model._module.named_parameters())

    def logits_of() -> Tensor:
        with model.trace(tokens):
            for place in places:
                edited(model.hook(place), how)
            logits = model.lm_head.output.save()
        return logits

    chosen = [name for name in parameters if "layers.2" not in name and name.endswith(tuple(PARAMETERS))]
    gradients = torch.autograd.grad(score_of(logits_of()), [parameters[name] for name in chosen])
    for name, gradient in zip(chosen, gradients, strict=True):
        expected = central_difference(moved(parameters[name], lambda: float(score_of(logits_of()))))
        assert_close((gradient * noise(gradient.shape, seed=11)).sum(), expected, 100.0)


@torch.no_grad()
def moved(parameter: nn.Parameter, score: Callable[[], float]) -> Callable[[float], float]:
    """``score`` with a parameter moved by t in the direction of seed 11, and moved back afterwards."""
    original, direction = parameter.clone(), noise(parameter.shape, seed=11)

    @torch.no_grad()
    def at(t: float) -> float:
        parameter.copy_(original + t * direction)
        try:
            return score()
        finally:
            parameter.copy_(original)

    return at


def test_parameter_gradients_of_one_backward_are_those_of_hugging_face(tiny_hf: ModuleFactory) -> None:
    """``loss.backward()`` as a plain call inside a trace, with sites read, fills ``parameter.grad``."""
    plain, tokens = tiny_hf(), draw_tokens()
    model = MambaTrace(tiny_hf())
    score_of(plain(tokens).logits).backward()
    with model.trace(tokens):
        model.layers[1].ssm.A_bar.output.save()
        model.layers[1].ssm.h[2].output.save()
        score_of(model.lm_head.output).backward()
    for (name, ours), theirs in zip(model._module.named_parameters(), plain.parameters(), strict=True):
        tolerance = 1e-4 * float(theirs.grad.abs().max())
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_of_a_soft_prompt(model: MambaTrace) -> None:
    """The user's own tensor, assigned at a site, gets its gradient."""
    tokens = draw_tokens()
    state = noise((2, 24, 5), seed=4).requires_grad_()
    with model.trace(tokens):
        model.layers[0].ssm.h_start.output = state
        score = score_of(model.lm_head.output).save()
    (gradient,) = torch.autograd.grad(score, state)

    def at(t: float) -> float:
        with torch.no_grad(), model.trace(tokens):
            model.layers[0].ssm.h_start.output = state + t * noise(state.shape, seed=11)
            result = score_of(model.lm_head.output).save()
        return float(result)

    assert_close((gradient * noise(state.shape, seed=11)).sum(), central_difference(at), 100.0)


@pytest.mark.parametrize("name", ["A_bar", "B_bar"])
def test_the_gradient_of_a_matrix_that_was_read_beside_the_whole_trajectory(tiny_hf, tokens, name) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64))
    grads = []
    for whole in (False, True):
        with model.trace(tokens):
            matrix = model.layers[0].ssm.get(name).output
            if whole:
                model.layers[0].ssm.h.output.sum()
            loss = model.lm_head.output.square().sum()
            with loss.backward():
                grads.append(matrix.grad.clone().save())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
