"""Any set of interventions, in float64, against tests/reference.py: logits, and gradients of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModuleFactory, make_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Edit, editing, forward
from torch import Tensor
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace

L, N_LAYERS = 6, 3
FLOAT64, FLOAT32 = 1e-12, 1e-5  # of the largest value
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_bias": True},
    {"use_conv_bias": False, "conv_kernel": 2},
    {"conv_kernel": 4, "time_step_rank": 1, "state_size": 16},
    {"time_step_rank": "auto", "state_size": 3, "expand": 3, "tie_word_embeddings": False},
    {"residual_in_fp32": False, "layer_norm_epsilon": 1e-2, "use_bias": True, "conv_kernel": 1},
]


def draw_tokens(batch: int, seed: int, length: int = L) -> Tensor:
    return torch.randint(1, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


class Setup:
    """A float64 model, its weights, and every value of the reference on some tokens."""

    def __init__(self) -> None:
        self.module = make_hf(dtype=torch.float64, use_bias=True)
        self.config, self.weights = self.module.config, dict(self.module.named_parameters())
        self.model = MambaTrace(self.module)
        self.hooks = [name for name, _ in self.values(draw_tokens(1, 0))]
        self.order = {name: i for i, name in enumerate(self.hooks)}

    def values(self, tokens: Tensor) -> list[tuple[str, Tensor]]:
        """(hook name, value) of the reference in execution order; blocks.l.hook_h is the whole trajectory."""
        seen: list[tuple[str, Tensor]] = []

        def keep(hook: str, value: Tensor) -> Tensor:
            seen.append((hook, value))
            return value

        with torch.no_grad():
            forward(self.weights, self.config, tokens, keep)
        return seen

    def place(self, hook: str, from_end: bool = False) -> Any:
        """The envoy of a hook; a position counted from the end if asked for."""
        stem, _, position = hook.rpartition(".")
        if from_end and stem.endswith("hook_h"):
            hook = f"{stem}.{int(position) - L}"
        return self.model.hook(hook)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def make_edit(hook: str, op: str, position: int, value: Tensor, generator: torch.Generator) -> Edit:
    """An edit of a size that matters: tensors are of the value's own size, replacements of its own signs."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    noise = noise * (float(value.square().mean().sqrt()) or 1.0)
    factor = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
    if op == "scale":
        return Edit(hook, op, 0.25 + 1.5 * float(torch.rand(1, generator=generator)))
    if op == "add":
        return Edit(hook, op, 0.3 * noise)
    if op == "add_at_position":
        position %= value.shape[1]
        return Edit(hook, op, 0.3 * noise[:, position], position)
    replacement = value * factor if value.any() else noise
    return Edit(hook, op, replacement if op == "replace" else replacement[0])


OPERATIONS = ("scale", "add", "replace", "zero", "add_at_position", "replace_first_row")


@st.composite
def interventions(draw: Callable[..., Any], hooks: list[str]) -> list[tuple[str, str, int, bool, bool]]:
    """(hook, operation, position, whether in place, whether counted from the end) of up to seven edits."""
    chosen = draw(st.lists(st.sampled_from(hooks), min_size=1, max_size=7, unique=True))
    return [
        (hook, draw(st.sampled_from(OPERATIONS)), draw(st.integers(0, 20)), draw(st.booleans()), draw(st.booleans()))
        for hook in chosen
    ]


def as_edits(setup: Setup, plan: list[tuple[str, str, int, bool, bool]], tokens: Tensor, seed: int) -> list[tuple[Edit, bool, bool]]:  # fmt: skip
    """The edits of a plan in execution order, each with whether it is in place and counted from the end."""
    values, generator = dict(setup.values(tokens)), torch.Generator().manual_seed(seed)
    edits = [
        (make_edit(hook, op, position, values[hook], generator), in_place, from_end)
        for hook, op, position, in_place, from_end in plan
    ]
    return sorted(edits, key=lambda one: setup.order[one[0].hook])


def make_all(setup: Setup, edits: list[tuple[Edit, bool, bool]]) -> None:
    """Make the edits, inside a trace."""
    for edit, in_place, from_end in edits:
        envoy = setup.place(edit.hook, from_end)
        edit.in_place(envoy) if in_place else edit.assign(envoy)


SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_value_in_float64(tiny_hf: ModuleFactory, changes: dict[str, Any], batch: int) -> None:
    module = tiny_hf(dtype=torch.float64, **changes)
    expected: dict[str, Tensor] = {}

    def keep(hook: str, value: Tensor) -> Tensor:
        expected[hook] = value.detach()
        return value

    tokens = draw_tokens(batch, seed=2)
    forward(module.state_dict(), module.config, tokens, keep)
    model, actual = MambaTrace(module), {}
    with model.trace(tokens):
        for hook in expected:
            actual[hook] = model.hook(hook).output.save()
    assert set(model.hook_names(L)) == {hook for hook in expected if not hook.endswith("hook_h")}
    for hook, value in actual.items():
        assert value.dtype == torch.float64
        if value.any():
            assert distance(value, expected[hook]) < FLOAT64, hook
        else:
            assert not expected[hook].any()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_in_float32(tiny_hf: ModuleFactory, changes: dict[str, Any]) -> None:
    module, tokens = tiny_hf(**changes), draw_tokens(3, seed=2)
    expected = forward(module.state_dict(), module.config, tokens)
    model: MambaForCausalLM = MambaTrace(module)
    with model.trace(tokens):
        logits = model.lm_head.output.save()
    assert logits.dtype == torch.float32
    assert distance(logits, expected) < FLOAT32


@settings(SETTINGS, max_examples=150)
@given(data=st.data(), batch=st.sampled_from([1, 2, 3]), seed=st.integers(0, 10**6))
def test_any_interventions(setup: Setup, data: Any, batch: int, seed: int) -> None:
    tokens = draw_tokens(batch, seed)
    edits = as_edits(setup, data.draw(interventions(setup.hooks)), tokens, seed)
    with setup.model.trace(tokens):
        make_all(setup, edits)
        logits = setup.model.lm_head.output.save()
    expected = forward(setup.weights, setup.config, tokens, editing(edit for edit, _, _ in edits))
    same_with_gradients(logits, expected, list(setup.weights.values()), seed)


def same_with_gradients(actual: Tensor, expected: Tensor, parameters: list[Tensor], seed: int) -> None:
    """Equal values, and equal derivatives of a random combination of them with respect to every parameter."""
    if not expected.any():  # an edit set all logits to zero
        assert not actual.any()
        return
    assert distance(actual, expected.detach()) < 10 * FLOAT64
    if not expected.requires_grad:  # or to constants
        assert not actual.requires_grad
        return
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = max(float(parameter.abs().max()) for parameter in parameters)
    pairs = zip(
        torch.autograd.grad(actual, parameters, cotangent, allow_unused=True),
        torch.autograd.grad(expected, parameters, cotangent, allow_unused=True),
        strict=True,
    )
    for ours, theirs in pairs:
        theirs = torch.zeros(1) if theirs is None else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * max(size, float(theirs.abs().max())))


@settings(SETTINGS, max_examples=50)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_interventions_in_batched_invokes(setup: Setup, data: Any, seed: int) -> None:
    # A has no batch dimension: an edit of it is one for every invoke.
    hooks = [hook for hook in setup.hooks if not hook.endswith("hook_A")]
    first, second = draw_tokens(1, seed), draw_tokens(2, seed + 1)
    edits = [as_edits(setup, data.draw(interventions(hooks)), tokens, seed) for tokens in (first, second)]
    with setup.model.trace() as tracer:
        with tracer.invoke(first):
            make_all(setup, edits[0])
            one = setup.model.lm_head.output.save()
        with tracer.invoke(second):
            make_all(setup, edits[1])
            two = setup.model.lm_head.output.save()
        with tracer.invoke(first):
            clean = setup.model.lm_head.output.save()
    for tokens, made, logits in ((first, edits[0], one), (second, edits[1], two), (first, [], clean)):
        expected = forward(setup.weights, setup.config, tokens, editing(edit for edit, _, _ in made))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11 * float(expected.abs().max() + 1e-9))
