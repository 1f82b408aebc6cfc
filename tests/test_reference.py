"""Any interventions, in float64, against tests/reference.py: logits, saved values, parameter gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import OTHERS, TINY, VARIANTS, ModuleFactory, make_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Edit, EditValue, editing, forward
from torch import Tensor

from mamba_trace import MambaTrace

L, N_LAYERS = 6, 3
FLOAT64, FLOAT32 = 1e-12, 1e-5  # of the largest value


def draw_tokens(batch: int, seed: int, length: int = L) -> Tensor:
    return torch.randint(1, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


class Setup:
    """A float64 model, its weights, and every value of the reference on some tokens."""

    def __init__(self, model_type: str) -> None:
        limits = {"time_step_limit": (0.05, 0.4)} if model_type == "mamba2" else {}
        self.module = make_hf(dtype=torch.float64, use_bias=True, model_type=model_type, **limits)
        self.config, self.weights = self.module.config, dict(self.module.named_parameters())
        self.model = MambaTrace(self.module)
        self.hooks = [name for name, _ in self.values(draw_tokens(1, 0))]

    def forward(self, tokens: Tensor, edit: EditValue) -> Tensor:
        """The logits of the reference."""
        return forward(self.weights, self.config, tokens, edit)

    def values(self, tokens: Tensor) -> list[tuple[str, Tensor]]:
        """(hook name, value) of the reference in execution order; blocks.l.hook_h is the whole trajectory."""
        seen: list[tuple[str, Tensor]] = []

        def keep(hook: str, value: Tensor) -> Tensor:
            seen.append((hook, value))
            return value

        with torch.no_grad():
            self.forward(tokens, keep)
        return seen

    def place(self, hook: str, from_end: bool = False) -> Any:
        """The envoy of a hook; a position counted from the end if asked for."""
        stem, _, position = hook.rpartition(".")
        if from_end and stem.endswith("hook_h"):
            hook = f"{stem}.{int(position) - L}"
        return self.model.hook(hook)


@pytest.fixture(scope="module", params=TINY)
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


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
        axis = min(1, value.dim() - 1)
        position %= value.shape[axis]
        return Edit(hook, op, 0.3 * noise.select(axis, position), position)
    replacement = value * factor if value.any() else noise
    return Edit(hook, op, replacement if op == "replace" else replacement[0])


READ = "read"
OPERATIONS = (READ, "scale", "add", "replace", "zero", "add_at_position", "replace_first_row")


@dataclass(frozen=True)
class Step:
    """What a trace does at one place: reads and saves the value, edits it, or both in this order."""

    hook: str
    op: str
    position: int  # of the edit, where it takes one
    in_place: bool
    from_end: bool  # the place's own position, h[p], is written as a negative one
    saved: bool

    @property
    def reads(self) -> bool:
        return self.saved or self.op == READ

    def make(self, envoy: Any, edit: Edit | None, saved: dict[str, Tensor]) -> None:
        """Do it, inside a trace."""
        if self.reads:
            saved[self.hook] = envoy.output.save()
        if edit is not None:
            edit.in_place(envoy) if self.in_place else edit.assign(envoy)


def plans(hooks: list[str]) -> st.SearchStrategy[list[Step]]:
    """Up to eight steps, each at another place."""
    fields = (st.sampled_from(OPERATIONS), st.integers(0, 20), st.booleans(), st.booleans(), st.booleans())
    return st.lists(
        st.builds(Step, st.sampled_from(hooks), *fields), min_size=1, max_size=8, unique_by=lambda s: s.hook
    )


class Plan:
    """Steps in execution order, with tensors of the right shapes for given tokens."""

    def __init__(self, setup: Setup, steps: list[Step], tokens: Tensor, seed: int) -> None:
        self.setup, self.tokens = setup, tokens
        self.steps = sorted(steps, key=lambda step: setup.hooks.index(step.hook))
        values, generator = dict(setup.values(tokens)), torch.Generator().manual_seed(seed)
        self.edits = {
            step.hook: make_edit(step.hook, step.op, step.position, values[step.hook], generator)
            for step in steps
            if step.op != READ
        }
        self.saved: dict[str, Tensor] = {}

    def make(self) -> None:
        """Do every step, inside a trace."""
        for step in self.steps:
            step.make(self.setup.place(step.hook, step.from_end), self.edits.get(step.hook), self.saved)

    def reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's logits, and the values that the steps must have saved: each before its own edit."""
        saved: dict[str, Tensor] = {}
        reads, edit_value = {step.hook for step in self.steps if step.reads}, editing(self.edits.values())

        def edit(hook: str, value: Tensor) -> Tensor:
            if hook in reads:
                saved[hook] = value.detach()
            return edit_value(hook, value)

        return self.setup.forward(self.tokens, edit), saved

    def check(self, logits: Tensor) -> Tensor:
        """Hold the logits and the saved values to the reference's; return its logits."""
        expected, saved = self.reference()
        same(logits, expected, "logits")
        assert set(self.saved) == set(saved)
        for hook, value in saved.items():
            same(self.saved[hook], value, hook)
        return expected


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to rounding, relative to the largest value."""
    largest = float(expected.detach().abs().max())
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= 10 * FLOAT64 * max(largest, 1e-3), what


SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
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
    in_mamba_lens = {hook for hook in expected if ".mixer." not in hook and not hook.endswith("hook_h")}
    assert set(model.hook_names(L)) == in_mamba_lens
    for hook, value in actual.items():
        assert value.dtype == torch.float64
        if value.any():
            assert distance(value, expected[hook]) < FLOAT64, hook
        else:
            assert not expected[hook].any()


@pytest.mark.parametrize("changes", VARIANTS + OTHERS, ids=str)
def test_logits_in_float32(tiny_hf: ModuleFactory, changes: dict[str, Any]) -> None:
    module, tokens = tiny_hf(**changes), draw_tokens(3, seed=2)
    expected = forward(module.state_dict(), module.config, tokens)
    model = MambaTrace(module)
    with model.trace(tokens):
        logits = model.lm_head.output.save()
    assert logits.dtype == torch.float32
    assert distance(logits, expected) < FLOAT32


@settings(SETTINGS, max_examples=200)
@given(data=st.data(), batch=st.sampled_from([1, 2, 3]), seed=st.integers(0, 10**6))
def test_any_interventions(setup: Setup, data: Any, batch: int, seed: int) -> None:
    plan = Plan(setup, data.draw(plans(setup.hooks)), draw_tokens(batch, seed), seed)
    with setup.model.trace(plan.tokens):
        plan.make()
        logits = setup.model.lm_head.output.save()
    same_gradients(logits, plan.check(logits), list(setup.weights.values()), seed)


def same_gradients(actual: Tensor, expected: Tensor, parameters: list[Tensor], seed: int) -> None:
    """Equal derivatives of a random combination of logits with respect to every parameter."""
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, theirs = gradients(actual, parameters, cotangent), gradients(expected, parameters, cotangent)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * max(1.0, float(other.abs().max())))


def gradients(logits: Tensor, parameters: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The gradient of each parameter; zeros where it does not matter, as when the logits were replaced."""
    if not logits.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(torch.autograd.grad(logits, parameters, cotangent, allow_unused=True, materialize_grads=True))


@settings(SETTINGS, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_interventions_in_batched_invokes(setup: Setup, data: Any, seed: int) -> None:
    # A has no batch dimension: an edit of it is one for every invoke.
    hooks = [hook for hook in setup.hooks if not hook.endswith("hook_A")]
    one = Plan(setup, data.draw(plans(hooks)), draw_tokens(1, seed), seed)
    two = Plan(setup, data.draw(plans(hooks)), draw_tokens(2, seed + 1), seed)
    with setup.model.trace() as tracer:
        with tracer.invoke(one.tokens):
            one.make()
            logits_one = setup.model.lm_head.output.save()
        with tracer.invoke(two.tokens):
            two.make()
            logits_two = setup.model.lm_head.output.save()
        with tracer.invoke(one.tokens):
            clean = setup.model.lm_head.output.save()
    one.check(logits_one)
    two.check(logits_two)
    Plan(setup, [], one.tokens, seed).check(clean)


@settings(SETTINGS, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_interventions_on_a_batch_without_gradients(setup: Setup, data: Any, seed: int) -> None:
    plan = Plan(setup, data.draw(plans(setup.hooks)), draw_tokens(2, seed), seed)
    mode = data.draw(st.sampled_from([torch.no_grad, torch.inference_mode]))
    with mode():
        with setup.model.trace(plan.tokens):
            plan.make()
            logits = setup.model.lm_head.output.save()
        plan.check(logits)
