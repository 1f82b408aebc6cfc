"""Gradients of every site and through every site, in float64, against finite differences of the same trace.

The derivative along a random direction, read through autograd, must equal the change of the score when a
trace moves the site's value that way. The finite difference only uses forward runs, which other tests hold
to independent references.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import nnsight
import pytest
import reference_dual
import torch
from conftest import ModuleFactory, agree, make_hf
from reference import forward
from torch import Tensor, nn

from mamba_trace import MambaTrace, names

L = 6
STEP, TOLERANCE = 1e-5, 1e-6
TRAJECTORY = "layers[{layer}].ssm.h"
HOOKS = [name for name in names.hook_names(3, L) if "hook_h." not in name or name.endswith((".0", ".3", f".{L - 1}"))]
PLACES = [name for name in HOOKS if not name.startswith("blocks.1.")] + [TRAJECTORY.format(layer=n) for n in (0, 2)]
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


#: Where a score is taken for a difference, in steps.
TICKS = (1, -1, 2, -2)


def difference(scores: list[float], step: float = STEP) -> float:
    """d score(t) / dt at 0, to fourth order, from the scores at TICKS."""
    return (8 * (scores[0] - scores[1]) - (scores[2] - scores[3])) / (12 * step)


def central_difference(score: Callable[[float], float], step: float = STEP) -> float:
    """d score(t) / dt at 0, to fourth order."""
    return difference([score(tick * step) for tick in TICKS], step)


def assert_close(actual: Tensor, expected: float, scale: float = 0.0) -> None:
    """Equal to TOLERANCE relative, or to rounding of a difference of scores of size ``scale``."""
    rounding = 1e-14 * scale / STEP
    assert abs(float(actual) - expected) <= TOLERANCE * abs(expected) + rounding, (float(actual), expected)


def slope(model: MambaTrace, place: str, how: str, tokens: Tensor) -> float:
    """How the score changes when a trace edits a place as ``how`` says and moves it in the direction of seed 11."""

    def logits_at(ticks: Sequence[int]) -> Tensor:
        """Of a batch with the prompts once for each tick."""
        rows = tokens.repeat(len(ticks), 1)
        with torch.no_grad(), model.trace(rows):
            envoy = model.hook(place)
            value = edited(envoy, how)
            moves = torch.cat([STEP * tick * noise(value[: len(value) // len(ticks)].shape, seed=11) for tick in ticks])
            envoy.output = value + moves
            logits = model.lm_head.output.save()
        return logits

    # A has no batch axis.
    together: list[Sequence[int]] = [[tick] for tick in TICKS] if place.endswith("_A") else [TICKS]
    parts = [part for ticks in together for part in logits_at(ticks).chunk(len(ticks))]
    return difference([float(score_of(part)) for part in parts])


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
    expected = slope(model, place, how, tokens)
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
        expected = slope(model, place, how, tokens)
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
    expected = central_difference(moved([parameters[name] for name in chosen], lambda: float(score_of(logits_of()))))
    slopes = [(gradient * noise(gradient.shape, seed=11 + i)).sum() for i, gradient in enumerate(gradients)]
    assert min(map(abs, slopes)) > 1e-4 * abs(expected), "the difference feels each of them"
    assert_close(sum(slopes, torch.zeros(())), expected, 100.0)


@torch.no_grad()
def moved(parameters: list[nn.Parameter], score: Callable[[], float]) -> Callable[[float], float]:
    """``score`` with each parameter moved by t in a direction of its own, and moved back afterwards."""
    originals = [parameter.clone() for parameter in parameters]
    directions = [noise(parameter.shape, seed=11 + i) for i, parameter in enumerate(parameters)]

    @torch.no_grad()
    def at(t: float) -> float:
        for parameter, original, direction in zip(parameters, originals, directions, strict=True):
            parameter.copy_(original + t * direction)
        try:
            return score()
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
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
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


STATES = ["h_start", *(f"h[{p}]" for p in range(L))]


def states_by_hand(plain: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The score by `reference_dual`, and the gradient of each state of the layer in the middle through autograd."""
    kept = {}

    def keep(hook: str, value: Tensor) -> Tensor:
        if hook in places:
            kept[places[hook]] = value = value.requires_grad_()
        return value

    places = {names.to_hook_name(f"layers[1].ssm.{state}"): state for state in STATES}
    score = score_of(reference_dual.forward(plain.state_dict(), plain.config, tokens, keep))
    return score.detach(), dict(zip(kept, torch.autograd.grad(score, list(kept.values())), strict=True))


def traced_states(model: MambaTrace, tokens: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """The gradients of states of the layer in the middle, through one trace."""
    kept = {}
    with model.trace(tokens):
        for state in wanted:
            ssm = model.layers[1].ssm
            kept[state] = ssm.h_start.output if state == "h_start" else ssm.h[int(state[2:-1])].output
        score = score_of(model.lm_head.output.double()).save()
        kept = nnsight.save(kept)
    return dict(zip(kept, torch.autograd.grad(score, list(kept.values())), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_states_of_mamba2_have_the_gradients_of_the_recurrence(
    tiny_hf: ModuleFactory, dtype: torch.dtype, tolerance: float, kernels: str
) -> None:
    """Alone and all in one trace: with each state that is read the scan is cut at another place."""
    module, tokens = tiny_hf(model_type="mamba2", dtype=dtype), draw_tokens()
    model = MambaTrace(module, kernels=kernels)
    _, expected = states_by_hand(module, tokens)
    together = traced_states(model, tokens, STATES)
    for state in STATES:
        agree(together[state].double(), expected[state], tolerance, f"{state}, all states being read")
        alone = traced_states(model, tokens, [state])[state]
        agree(alone.double(), expected[state], tolerance, f"{state} alone")


@pytest.mark.parametrize("state", STATES)
def test_states_of_mamba2_have_the_gradients_of_finite_differences(tiny_hf: ModuleFactory, state: str) -> None:
    model, tokens = MambaTrace(tiny_hf(model_type="mamba2", dtype=torch.float64)), draw_tokens()
    gradient = traced_states(model, tokens, [state])[state]
    for seed in range(3):
        direction = noise(gradient.shape, seed)

        def at(t: float, direction: Tensor = direction) -> float:
            with torch.no_grad(), model.trace(tokens):
                ssm = model.layers[1].ssm
                place = ssm.h_start if state == "h_start" else ssm.h[int(state[2:-1])]
                place.output = place.output + t * direction
                result = score_of(model.lm_head.output).save()
            return float(result)

        expected = central_difference(at, step=1e-4)
        assert abs(float((gradient * direction).sum()) - expected) <= 1e-8 * abs(expected)


CONSTANTS = {
    "A_bar": ("delta",),
    "B_bar": ("delta", "B"),
    "write": ("delta", "B"),
    "h_start": ("ssm_input",),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_gradient_of_a_place_behind_constants(model: MambaTrace, name: str) -> None:
    """A_log still reaches A_bar where delta is a constant, and the score depends on what was read anyhow."""
    tokens = draw_tokens()

    def run(t: float, keep: list[Tensor]) -> Tensor:
        ssm = model.layers[1].ssm
        with model.trace(tokens):
            for number, constant in enumerate(sorted(CONSTANTS[name], reverse=True)):
                place = ssm.get(constant)
                place.output = 0.3 * noise(place.output.shape, seed=number).abs()
            value = ssm.get(name).output
            if name in ("B_bar", "write") and not value.requires_grad:
                ssm.get(name).output = value.requires_grad_()
            keep.append(nnsight.save(value))
            if t:
                ssm.get(name).output = value + t * noise(value.shape, seed=11)
            result = score_of(model.lm_head.output).save()
        return result

    kept: list[Tensor] = []
    (gradient,) = torch.autograd.grad(run(0.0, kept), kept)
    with torch.no_grad():
        expected = central_difference(lambda t: float(run(t, [])))
    assert abs(expected) > 1e-6
    assert_close((gradient * noise(gradient.shape, seed=11)).sum(), expected, 100.0)


# -- random programs ---------------------------------------------------------------------------------------

#: What a program does at a place; each also keeps the tensors whose gradients are compared.
ACTIONS = {
    "read": 4,
    "scaled": 2,
    "in place": 3,
    "partly in place": 2,
    "counted, then in place": 1,
    "constant": 2,
    "detached": 1,
    "leaf": 1,
    "joined with an earlier value": 1,
}
#: Gradients of these may be asked for although nothing before them takes one.
BEGINNINGS = ("hook_h_start",)


@dataclass
class Program:
    """Actions at places in execution order, which a trace and an interpreter can run.

    Attributes:
        steps: of each place, what is done there and the seed of the numbers that it takes.
        shapes: of the value at each place.
        kept: the tensors of the run whose gradients are compared, by place and kind.
        terms: what was added to the score, beside the logits.
    """

    steps: list[tuple[str, str, int]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    terms: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the last run."""
        self.kept, self.terms = {}, []

    def act(self, hook: str, action: str, seed: int, envoy: Any) -> None:
        """Do one step where ``envoy.output`` is the value, which may be edited in place or replaced."""
        if action == "constant":
            envoy.output = 0.5 * noise(self.shapes[hook], seed)
            return
        value = self.kept[hook] = envoy.output
        noisy = 0.1 * noise(value.shape, seed)
        if action == "in place" or action.startswith("counted"):
            if action.startswith("counted"):
                self.terms.append((value * noisy).sum())
            value *= 0.7
            value += noisy
        elif action == "partly in place":
            value[..., 1:, :1] = noisy[..., 1:, :1]
        elif action == "detached":
            envoy.output = value.detach()
        elif action != "read":
            envoy.output = self.kept[f"{hook}, {action}"] = self.replacement(hook, action, seed, value)

    def replacement(self, hook: str, action: str, seed: int, value: Tensor) -> Tensor:
        """What is assigned where ``value`` was read, for the actions that keep it."""
        if action == "scaled":
            return 0.7 * value + 0.1 * noise(value.shape, seed)
        if action == "leaf":
            return noise(value.shape, seed).requires_grad_()
        others = [other for name, other in self.kept.items() if name != hook]
        return value + 0.1 * others[seed % len(others)].sin().mean() if others else 1.1 * value

    def score(self, logits: Tensor) -> Tensor:
        """What is differentiated."""
        return score_of(logits) + sum(self.terms)


class Cell:
    """A value as the interpreter hands it out: an ``output`` to read, edit in place or replace."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def interpreted(program: Program, weights: dict[str, Tensor], config: Any, tokens: Tensor) -> Tensor:
    """Run a program on `reference.forward`: plain float64 operations. Returns the score."""
    program.begin()
    steps = {hook: (action, seed) for hook, action, seed in program.steps}

    def edit(hook: str, value: Tensor) -> Tensor:
        program.shapes[hook] = tuple(value.shape)
        if hook not in steps:
            return value
        cell = Cell(value.clone())  # no place shares memory with another
        if hook.endswith(BEGINNINGS) and not cell.output.requires_grad:
            cell.output = cell.output.requires_grad_().clone()
        program.act(hook, *steps[hook], cell)
        return cell.output

    return program.score(forward(weights, config, tokens, edit))


def traced(program: Program, model: MambaTrace) -> None:
    """Run a program inside a trace."""
    program.begin()
    for hook, action, seed in program.steps:
        program.act(hook, action, seed, model.hook(hook))


def gradients_of(program: Program, score: Tensor, parameters: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of every tensor that was kept and takes one, and of every parameter."""
    asked = {name: tensor for name, tensor in program.kept.items() if tensor.requires_grad}
    asked |= {f"parameter {index}": parameter for index, parameter in enumerate(parameters)}
    found = torch.autograd.grad(score, list(asked.values()), allow_unused=True)
    return dict(zip(asked, found, strict=True))


def differences(ours: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> list[str]:
    """The gradients that differ by more than rounding."""
    found = []
    for name, expected in right.items():
        if name not in ours:
            found.append(f"{name}: takes no gradient")
            continue
        actual, size = ours[name], 0.0 if expected is None else float(expected.abs().max())
        if actual is None or expected is None:
            actual, expected = (torch.zeros(1) if one is None else one for one in (actual, expected))
        error = float((actual - expected).abs().max())
        if not error <= 1e-9 * max(size, 1e-2):
            found.append(f"{name}: off by {error:.1e} of {size:.1e}")
    return found


class Programs:
    """Programs on a float64 model of two tiny layers."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 4, "state_size": 2, "vocab_size": 11, "time_step_rank": 3}
        self.module = make_hf(dtype=torch.float64, num_hidden_layers=2, **sizes)
        self.model, self.config = MambaTrace(self.module), self.module.config
        self.weights = dict(self.module.named_parameters())
        self.tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        whole = Program([])
        interpreted(whole, self.weights, self.config, self.tokens)
        self.hooks = list(whole.shapes)  # in execution order
        self.shapes = whole.shapes

    def draw(self, seed: int) -> Program:
        """A program that mostly stays within one layer, whose sites depend on each other most."""
        draw = random.Random(seed)
        layer = f"blocks.{draw.randrange(2)}."
        near = [hook for hook in self.hooks if hook.startswith(layer)]
        chosen = {draw.choice(near if draw.random() < 0.8 else self.hooks) for _ in range(draw.randint(1, 7))}
        actions = draw.choices(list(ACTIONS), list(ACTIONS.values()), k=len(chosen))
        hooks = sorted(chosen, key=self.hooks.index)
        steps = [(hook, action, draw.randrange(1000)) for hook, action in zip(hooks, actions, strict=True)]
        return Program(steps, shapes=self.shapes)

    def run(self, program: Program) -> list[str]:
        """What differs between a trace of the program and the interpreter."""
        parameters = list(self.weights.values())
        with self.model.trace(self.tokens):
            traced(program, self.model)
            score = program.score(self.model.lm_head.output).save()
            nnsight.save(program.kept)
        if not score.requires_grad:
            return (
                []
                if not interpreted(program, self.weights, self.config, self.tokens).requires_grad
                else ["no gradient"]
            )
        value, ours = float(score.detach()), gradients_of(program, score, parameters)
        score = interpreted(program, self.weights, self.config, self.tokens)
        assert abs(value - float(score.detach())) <= 1e-9 * max(abs(value), 1.0), "the forward values differ"
        return differences(ours, gradients_of(program, score, parameters))


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


@pytest.mark.parametrize("block", range(4))
def test_gradients_of_random_programs(programs: Programs, block: int) -> None:
    for seed in range(50 * block, 50 * (block + 1)):
        program = programs.draw(seed)
        assert not (wrong := programs.run(program)), (seed, program.steps, wrong)
