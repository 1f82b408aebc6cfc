"""Ablation and steering, against the float64 forward of `reference` with the same edits by hand."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from conftest import BATCH, LENGTH, ModuleFactory, agree
from kinds import BACKENDS, DUAL, KINDS, made, make
from reference import forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import PositionError, SiteValueError
from mamba_trace.interventions import ablate, steer
from mamba_trace.sites import SITES

E, D, N = 24, 12, 5
STEPS = 3
Edits = Mapping[str, Callable[[Tensor], Tensor]]

SIZES = {"B": BATCH, "L": LENGTH, "D": D, "E": E, "N": N, "R": 4, "V": 31, "H": 6, "P": 4, "G": 2}


def places_of(kind: str) -> list[tuple[str, str, str, str]]:
    """Every site at layer 1, with its hook in `reference`, and the state after a position counted either way."""
    family = "dual" if kind in DUAL else "selective"
    sites = [site for site in SITES if family in site.families and not site.part]
    places = [(kind, site.path(1), site.hook_name(1), site.axes_in(family)) for site in sites]
    state = next(site for site in sites if site.name == "h").axes_in(family).replace("L", "")
    return places + [(kind, f"layers[1].ssm.h[{p}]", f"blocks.1.hook_h.{p % LENGTH}", state) for p in (2, -1)]


PLACES = [place for kind in KINDS if kind != "falcon_mamba" for place in places_of(kind)]
POSITIONAL = [place for place in PLACES if "L" in place[3]]


def ids(places: list[tuple[str, str, str, str]]) -> list[str]:
    return [f"{kind}-{path}" for kind, path, _, _ in places]


def has_channels(axes: str) -> bool:
    """Whether a site has an axis of channels, or of heads and of channels in them."""
    return "H" not in axes or "P" in axes


def at_channel(axes: str, channel: int) -> dict[str, int]:
    """The index of a channel along the axes of a site, by letter."""
    if "H" in axes:
        return {"H": channel // 4, "P": channel % 4}
    return {next(one for one in "EDRNV" if one in axes): channel}


def fill(value: Tensor, axes: str, number: Any, **index: Any) -> None:
    """Fill part of a value in place: one index or several along each axis given, by letter."""
    value[tuple(index.get(axis, slice(None)) for axis in axes)] = number


@pytest.fixture(scope="module")
def model(tiny_hf: ModuleFactory) -> MambaTrace:
    """In float64, so that what differs from the reference is wrong. Nothing a test does may outlive it."""
    return MambaTrace(tiny_hf(dtype=torch.float64))


def by_hand(model: MambaTrace, tokens: Tensor, edits: Edits) -> Tensor:
    """The logits of the reference [B,L,V] under edits by hook name."""
    return forward(
        model._module.state_dict(),
        model.config,
        tokens,
        lambda hook, value: edits[hook](value) if hook in edits else value,
    )


def values_of(model: MambaTrace, tokens: Tensor) -> dict[str, Tensor]:
    """Every value of the reference by hook name."""
    found: dict[str, Tensor] = {}
    forward(model._module.state_dict(), model.config, tokens, lambda hook, value: found.setdefault(hook, value))
    return found


def logits_with(model: MambaTrace, tokens: Tensor, act: Callable[[], None]) -> Tensor:
    """The logits [B,L,V] of a trace in which ``act`` is called first."""
    with torch.no_grad(), model.trace(tokens):
        act()
        logits = model.lm_head.output.save()
    return logits


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def put(part: Any, replacement: Any) -> Callable[[Tensor], Tensor]:
    """An edit that replaces ``value[part]``, on a copy."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[part] = replacement
        return value

    return edit


# -- ablation: where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), PLACES, ids=ids(PLACES))
def test_zero_ablation_of_every_site(tokens: Tensor, kind: str, path: str, hook: str, axes: str) -> None:
    model = made(kind)
    logits = logits_with(model, tokens, lambda: ablate(model.hook(path)))
    agree(logits, by_hand(model, tokens, {hook: torch.zeros_like}), 1e-10)


WITH_CHANNELS = [place for place in POSITIONAL if has_channels(place[3])]


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), WITH_CHANNELS, ids=ids(WITH_CHANNELS))
def test_positions_and_channels_are_an_outer_product(
    tokens: Tensor, kind: str, path: str, hook: str, axes: str
) -> None:
    model = made(kind)

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        for position in (1, LENGTH - 2):
            for channel in (0, 2, 3):
                fill(value, axes, 0.5, L=position, **at_channel(axes, channel))  # of a state, every n
        return value

    logits = logits_with(model, tokens, lambda: ablate(model.hook(path), 0.5, positions=[1, -2], channels=[0, 2, 3]))
    agree(logits, by_hand(model, tokens, {hook: edit}), 1e-10)


NOT_POSITIONAL = [place for place in PLACES if "L" not in place[3] and has_channels(place[3])]


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), NOT_POSITIONAL, ids=ids(NOT_POSITIONAL))
def test_channels_of_sites_without_positions_are_those_of_d_inner(
    tokens: Tensor, kind: str, path: str, hook: str, axes: str
) -> None:
    model = made(kind)

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        for channel in (1, E - 1):
            fill(value, axes, -0.25, **at_channel(axes, channel))
        return value

    logits = logits_with(model, tokens, lambda: ablate(model.hook(path), -0.25, channels=[1, -1]))
    agree(logits, by_hand(model, tokens, {hook: edit}), 1e-10)


OF_HEADS = [place for place in PLACES if place[0] in DUAL and set("HE") & set(place[3])]


def fill_heads(value: Tensor, axes: str, number: Any, **index: Any) -> None:
    """`fill` at heads 1 and 5."""
    for head in (1, 5):
        if "H" in axes:
            fill(value, axes, number, H=head, **index)
        else:
            fill(value, axes, number, E=slice(4 * head, 4 * head + 4), **index)


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), OF_HEADS, ids=ids(OF_HEADS))
def test_heads_are_those_of_the_site_or_their_channels(
    tokens: Tensor, kind: str, path: str, hook: str, axes: str
) -> None:
    model = made(kind)
    for positions in (None, [1, -2]) if "L" in axes else (None,):

        def edit(value: Tensor, positions: Any = positions) -> Tensor:
            value = value.clone()
            for position in [slice(None)] if positions is None else positions:
                fill_heads(value, axes, 0.25, **({"L": position} if "L" in axes else {}))
            return value

        logits = logits_with(
            model,
            tokens,
            lambda positions=positions: ablate(model.hook(path), 0.25, positions=positions, heads=[-1, 1]),
        )
        agree(logits, by_hand(model, tokens, {hook: edit}), 1e-10)


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), OF_HEADS, ids=ids(OF_HEADS))
def test_a_direction_is_added_in_some_heads(tokens: Tensor, kind: str, path: str, hook: str, axes: str) -> None:
    model, direction = made(kind), direction_of(axes)
    part = torch.zeros_like(direction)
    fill_heads(part, axes.replace("B", "").replace("L", ""), 1.0)
    logits = logits_with(model, tokens, lambda: steer(model.hook(path), direction, -0.5, heads=[1, 5]))
    agree(logits, by_hand(model, tokens, {hook: lambda value: value - 0.5 * direction * part}), 1e-10)


@pytest.mark.parametrize(
    ("heads", "chosen"), [(2, [2]), (-1, [5]), (slice(4, 9), [4, 5]), (torch.arange(6) < 2, [0, 1])], ids=repr
)
def test_heads_come_in_many_forms(tokens: Tensor, heads: Any, chosen: list[int]) -> None:
    model, other = made(DUAL[0]), noise(BATCH, LENGTH, 6)
    logits = logits_with(model, tokens, lambda: ablate(model.layers[1].ssm.delta, other.abs(), heads=heads))
    edit = put((..., chosen), other.abs()[..., chosen])
    agree(logits, by_hand(model, tokens, {"blocks.1.hook_delta": edit}), 1e-10)


FORMS = {
    "integer": (7, [7]),
    "negative integer": (-2, [7]),
    "numpy integer": (np.int64(7), [7]),
    "tensor of no axes": (torch.tensor(7), [7]),
    "slice": (slice(2, None, 3), [2, 5, 8]),
    "slice past the end": (slice(-2, 100), [7, 8]),
    "list": ([8, 0, -2], [0, 7, 8]),
    "tuple with a repeat": ((1, 1, 3), [1, 3]),
    "range": (range(3), [0, 1, 2]),
    "tensor": (torch.tensor([4, -1]), [4, 8]),
    "array": (np.array([4, -1]), [4, 8]),
    "mask": (torch.arange(9) % 4 == 1, [1, 5]),
    "list of bool": ([False] * 8 + [True], [8]),
    "nothing": (None, list(range(9))),
}


@pytest.mark.parametrize(("form", "chosen"), FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("keyword", ["positions", "channels"])
def test_indices_come_in_many_forms(
    tiny_hf: ModuleFactory, tokens: Tensor, keyword: str, form: Any, chosen: list[int]
) -> None:
    wide = MambaTrace(tiny_hf(hidden_size=LENGTH, expand=1))  # as many channels as positions
    with torch.no_grad(), wide.trace(tokens):
        before = wide.layers[0].ssm.y.output.save()
        ablate(wide.layers[0].ssm.y, 9.0, **{keyword: form})
        after = wide.layers[0].ssm.y.output.save()
    expected = before.clone()
    expected.index_fill_(1 if keyword == "positions" else 2, torch.tensor(chosen, dtype=torch.long), 9.0)
    assert torch.equal(after, expected)


def test_a_value_saved_before_an_ablation_stays_what_it_was(model: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), model.trace(tokens):
        before = model.layers[1].ssm.y.output.save()
        ablate(model.layers[1].ssm.y)
        after = model.layers[1].ssm.y.output.save()
    agree(before, values_of(model, tokens)["blocks.1.hook_y"], 1e-10)
    assert not after.any()


# -- ablation: by what -------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "number": -1.5,
    "integer": 2,
    "numpy number": np.float32(0.5),
    "tensor of no axes": torch.tensor(0.75, dtype=torch.float64),
    "mean of each channel": noise(E),
    "mean of each position": noise(LENGTH, E),
    "another run": noise(BATCH, LENGTH, E),
    "one row for all": noise(1, LENGTH, E),
    "a number for each position": noise(LENGTH, 1),
    "float32": noise(E).float(),
}


@pytest.mark.parametrize("part", [(slice(None),), (slice(None), [[0], [5]], [3, 4])], ids=["whole", "part"])
@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
def test_the_part_that_is_replaced_is_that_of_the_value_broadcast(
    model: MambaTrace, tokens: Tensor, value: Any, part: Any
) -> None:
    full = torch.as_tensor(value, dtype=torch.float64).broadcast_to(BATCH, LENGTH, E)
    chosen = {} if len(part) == 1 else {"positions": [0, 5], "channels": [3, 4]}
    logits = logits_with(model, tokens, lambda: ablate(model.layers[1].ssm.y, value, **chosen))
    agree(logits, by_hand(model, tokens, {"blocks.1.hook_y": put(part, full[part])}), 1e-10)


def test_the_user_s_tensor_is_left_alone(model: MambaTrace, tokens: Tensor) -> None:
    mine = noise(BATCH, LENGTH, E)
    copy = mine.clone()
    with torch.no_grad(), model.trace(tokens):
        ablate(model.layers[1].ssm.y, mine)
        model.layers[1].ssm.y.output[:] = 0
    assert torch.equal(mine, copy)


def test_resample_ablation_of_states_takes_them_from_another_invoke(model: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            state = model.layers[1].ssm.h[4].output
            barrier()
            clean = model.lm_head.output.save()
        with tracer.invoke(tokens[1:]):
            barrier()
            ablate(model.layers[1].ssm.h[4], state, channels=range(10))
            logits = model.lm_head.output.save()
    taken = values_of(model, tokens[:1])["blocks.1.hook_h.4"]
    edit = put((slice(None), slice(0, 10)), taken[:, :10])
    agree(logits, by_hand(model, tokens[1:], {"blocks.1.hook_h.4": edit}), 1e-10)
    agree(clean, by_hand(model, tokens[:1], {}), 1e-10)


# -- steering: where ---------------------------------------------------------------------------------------


def direction_of(axes: str, kind: str = "") -> Tensor:
    sizes = {**SIZES, "G": KINDS.get(kind, {}).get("n_groups", 2)}
    return 0.3 * noise(*(sizes[axis] for axis in axes if axis not in "BL"))


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), PLACES, ids=ids(PLACES))
def test_a_direction_is_added_at_every_site(tokens: Tensor, kind: str, path: str, hook: str, axes: str) -> None:
    model, direction = made(kind), direction_of(axes, kind)
    logits = logits_with(model, tokens, lambda: steer(model.hook(path), direction, -0.5))
    agree(logits, by_hand(model, tokens, {hook: lambda value: value - 0.5 * direction}), 1e-10)


@pytest.mark.parametrize(("kind", "path", "hook", "axes"), POSITIONAL, ids=ids(POSITIONAL))
def test_a_direction_is_added_at_some_positions_once(
    tokens: Tensor, kind: str, path: str, hook: str, axes: str
) -> None:
    model, direction = made(kind), direction_of(axes, kind)

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        for position in (0, LENGTH - 3):
            value[:, position] += direction
        return value

    logits = logits_with(model, tokens, lambda: steer(model.hook(path), direction, positions=[0, -3, 0]))
    agree(logits, by_hand(model, tokens, {hook: edit}), 1e-10)


def test_a_direction_of_another_dtype_is_cast_and_the_site_keeps_its_own(tiny: MambaTrace, tokens: Tensor) -> None:
    direction = noise(D)
    with torch.no_grad(), tiny.trace(tokens):
        before = tiny.layers[0].resid_post.output.save()
        steer(tiny.layers[0].resid_post, direction, torch.tensor(2.0))
        after = tiny.layers[0].resid_post.output.save()
    agree(after, before + 2 * direction.float(), 1e-6)


#: Places that end a fused scan in each of the ways there are, and one after which it stays whole.
ENDING = ("conv", "A_bar", "write", "h[2]", "y", "resid_post")
ON_BACKENDS = [
    (backend, *place) for kind, backend in BACKENDS for place in places_of(kind) if place[1].endswith(ENDING)
]


@pytest.mark.parametrize(
    ("each_backend", "kind", "path", "hook", "axes"), ON_BACKENDS, indirect=["each_backend"]
)  # fmt: skip
def test_every_backend_is_ablated_and_steered_the_same(
    tokens: Tensor, each_backend: str, kind: str, path: str, hook: str, axes: str
) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers and steps of a run."""
    model, tokens = make(kind, each_backend, dtype=torch.float32), tokens[:1]
    direction = direction_of(axes, kind)
    part: dict[str, Any] = {"channels": [0, 2, 3]} if has_channels(axes) else {"heads": [1, 5]}

    def act() -> None:
        ablate(model.hook(path), 0.5, **part)
        steer(model.hook(path), direction)

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        if "heads" in part:
            fill_heads(value, axes, 0.5)
        else:
            for channel in part["channels"]:
                fill(value, axes, 0.5, **at_channel(axes, channel))
        return value + direction

    agree(logits_with(model, tokens, act), by_hand(model, tokens, {hook: edit}).float(), 1e-5)


# -- in every kind of trace --------------------------------------------------------------------------------


def test_an_ablation_in_one_invoke_leaves_the_other(model: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            clean = model.lm_head.output.save()
        with tracer.invoke(tokens[1:]):
            ablate(model.layers[0].ssm.A, -1.0, channels=[0, 5])
            ablate(model.layers[1].ssm.h[3])
            steer(model.layers[2].resid_post, torch.ones(D, dtype=torch.float64))
            logits = model.lm_head.output.save()
    edits = {
        "blocks.0.hook_A": put([0, 5], -1.0),
        "blocks.1.hook_h.3": torch.zeros_like,
        "blocks.2.hook_resid_post": lambda value: value + 1,
    }
    agree(clean, by_hand(model, tokens[:1], {}), 1e-10)
    agree(logits, by_hand(model, tokens[1:], edits), 1e-10)


def greedy(model: MambaTrace, tokens: Tensor, edits: Callable[[int], Edits]) -> Tensor:
    """Generated ids [B,L+STEPS] from whole forwards of the reference; ``edits`` of the step's length."""
    for _ in range(STEPS):
        logits = by_hand(model, tokens, edits(tokens.shape[1]))
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return tokens


def generated(model: MambaTrace, tokens: Tensor, act: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Generated ids [B,L+STEPS] and the last step's logits [B,V], with ``act`` called at every step."""
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    with model.generate(tokens, **options) as tracer:
        for _ in tracer.iter[:STEPS]:
            act()
            last = model.lm_head.output[:, -1].save()
        ids = tracer.result.save()
    return ids, last


def test_steering_at_every_step_of_generate_is_a_loop_of_whole_forwards(model: MambaTrace, tokens: Tensor) -> None:
    direction = 2 * noise(D)
    ids, last = generated(model, tokens, lambda: steer(model.layers[1].resid_post, direction))
    edits = {"blocks.1.hook_resid_post": lambda value: value + direction}
    expected = greedy(model, tokens, lambda length: edits)
    assert torch.equal(ids, expected)
    assert not torch.equal(ids, greedy(model, tokens, lambda length: {})), "the direction changed nothing"
    agree(last, by_hand(model, expected[:, :-1], edits)[:, -1], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_steered_at_every_step_is_carried_on(tokens: Tensor, kind: str) -> None:
    model, direction = made(kind), 5 * (noise(6, 4, N) if kind in DUAL else noise(E, N))
    ids, last = generated(model, tokens, lambda: steer(model.layers[1].ssm.h[-1], direction))

    def edits(length: int) -> Edits:
        return {f"blocks.1.hook_h.{p}": lambda h: h + direction for p in range(LENGTH - 1, length)}

    expected = greedy(model, tokens, edits)
    assert torch.equal(ids, expected)
    agree(last, by_hand(model, expected[:, :-1], edits(LENGTH + STEPS - 1))[:, -1], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_at_every_step_of_generate_is_a_loop_of_whole_forwards(tokens: Tensor, kind: str) -> None:
    model, mean = made(kind), noise(E)
    ids, last = generated(model, tokens, lambda: ablate(model.layers[1].ssm.y, mean, channels=range(12)))
    edits = {"blocks.1.hook_y": put((..., slice(0, 12)), mean[:12])}
    expected = greedy(model, tokens, lambda length: edits)
    assert torch.equal(ids, expected)
    agree(last, by_hand(model, expected[:, :-1], edits)[:, -1], 1e-10)


@pytest.mark.filterwarnings("ignore:.*was never reached")  # the open loop ends with the generation
def test_an_edited_model_is_steered_at_every_step(model: MambaTrace, tokens: Tensor) -> None:
    direction = 2 * noise(D)
    with model.edit() as (tracer, steered):
        for _ in tracer.iter[:]:
            steer(steered.layers[1].resid_post, direction)
    ids = steered.generate(tokens, max_new_tokens=STEPS, do_sample=False)
    edits = {"blocks.1.hook_resid_post": lambda value: value + direction}
    assert torch.equal(ids, greedy(model, tokens, lambda length: edits))


def test_an_edited_model_is_ablated_in_every_trace(model: MambaTrace, tokens: Tensor) -> None:
    with model.edit() as (_, edited):
        ablate(edited.layers[1].ssm.h[4], channels=slice(6))
    expected = by_hand(model, tokens, {"blocks.1.hook_h.4": put((slice(None), slice(6)), 0.0)})
    for _ in range(2):
        agree(logits_with(edited, tokens, lambda: None), expected, 1e-10)
    agree(logits_with(model, tokens, lambda: None), by_hand(model, tokens, {}), 1e-10)


def test_gradients_flow_past_an_ablation_and_into_a_direction(model: MambaTrace, tokens: Tensor) -> None:
    direction, mean = noise(D).requires_grad_(), noise(E).requires_grad_()
    with model.trace(tokens):
        ablate(model.layers[0].ssm.y, mean, positions=[2, 3], channels=range(4))
        ablate(model.layers[1].ssm.h[4], channels=range(9))
        steer(model.layers[1].resid_post, direction, 0.5, positions=-1)
        model.lm_head.output.square().sum().backward()
    found = [direction.grad, mean.grad, model.layers[0].ssm._module.A_log.grad]
    model._module.zero_grad(set_to_none=True)
    direction.grad = mean.grad = None
    weights = {name: weight.detach() for name, weight in model._module.state_dict().items()}
    A_log = weights["backbone.layers.0.mixer.A_log"].requires_grad_()
    edits: Edits = {
        "blocks.0.hook_y": put((slice(None), [[2], [3]], list(range(4))), mean[:4]),
        "blocks.1.hook_h.4": put((slice(None), slice(9)), 0.0),
        "blocks.1.hook_resid_post": lambda x: torch.cat((x[:, :-1], x[:, -1:] + 0.5 * direction), dim=1),
    }
    logits = forward(weights, model.config, tokens, lambda hook, value: edits[hook](value) if hook in edits else value)
    logits.square().sum().backward()
    for actual, expected in zip(found, [direction.grad, mean.grad, A_log.grad], strict=True):
        assert actual is not None
        assert expected is not None
        agree(actual, expected, 1e-9)


def test_a_scan_without_numbers(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.scan(tokens):
        ablate(tiny.layers[0].ssm.y, noise(E), positions=[0, 3], channels=[1])
        ablate(tiny.layers[1].ssm.h[3])
        steer(tiny.layers[1].resid_post, noise(D))
        shape = nnsight.save(tiny.lm_head.output.shape)
    assert shape == (BATCH, LENGTH, 31)


# -- what does not fit -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Any], None], type[Exception], list[str]]] = {
    "position": (
        lambda m: ablate(m.layers[1].ssm.y, positions=[0, 9]),
        PositionError,
        ["layers[1].ssm.y", "L positions", "positions=9", "there are 9, from -9 to 8", "decode step"],
    ),
    "position to steer": (
        lambda m: steer(m.layers[1].resid_pre, torch.ones(D), positions=-10),
        PositionError,
        ["layers[1].resid_pre", "positions=-10", "from -9 to 8"],
    ),
    "slice of nothing": (
        lambda m: ablate(m.norm_f, positions=slice(9, None)),
        PositionError,
        ["norm_f", "slice(9, None, None)", "none of the 9"],
    ),
    "no positions": (
        lambda m: ablate(m.norm_f, positions=[]),
        PositionError,
        ["norm_f", "positions=[]", "none of the 9"],
    ),
    "mask of nothing": (
        lambda m: ablate(m.layers[1].ssm.h[2], channels=torch.zeros(E) > 0),
        SiteValueError,
        ["layers[1].ssm.h[2]", "none of the 24"],
    ),
    "positions of h[p]": (
        lambda m: ablate(m.layers[1].ssm.h[2], positions=2),
        PositionError,
        ["layers[1].ssm.h[2] [B batch, E d_inner, N d_state]", "leave positions= out"],
    ),
    "short mask of positions": (
        lambda m: ablate(m.layers[1].ssm.y, positions=torch.ones(4, dtype=torch.bool)),
        PositionError,
        ["a boolean mask of 4, but there are 9"],
    ),
    "one bool": (
        lambda m: ablate(m.layers[1].ssm.y, positions=True),
        PositionError,
        ["a boolean mask of 1, but there are 9"],
    ),
    "numbers and bools": (
        lambda m: ablate(m.layers[1].ssm.y, positions=[True, 2]),
        PositionError,
        ["positions=[True, 2]", "several integers or a boolean mask of 9"],
    ),
    "word for positions": (
        lambda m: ablate(m.layers[1].ssm.y, positions="all"),
        PositionError,
        ["positions='all'", "give an integer, a slice"],
    ),
    "channel": (
        lambda m: ablate(m.layers[1].ssm.B, channels=[0, 5]),
        SiteValueError,
        ["layers[1].ssm.B", "channels=5", "there are 5, from -5 to 4", "N (d_state)"],
    ),
    "channel of a state": (
        lambda m: ablate(m.layers[1].ssm.h[2], channels=E),
        SiteValueError,
        ["layers[1].ssm.h[2]", "channels=24", "E (d_inner)"],
    ),
    "mask of channels": (
        lambda m: ablate(m.layers[1].ssm.y, channels=torch.ones(D, dtype=torch.bool)),
        SiteValueError,
        ["a boolean mask of 12, but there are 24"],
    ),
    "fractional channel": (
        lambda m: ablate(m.layers[1].ssm.y, channels=torch.tensor([0.5])),
        SiteValueError,
        ["channels=tensor([0.5000])", "several integers"],
    ),
    "value of another shape": (
        lambda m: ablate(m.layers[1].ssm.y, torch.ones(D)),
        SiteValueError,
        ["layers[1].ssm.y [B batch, L positions, E d_inner]", "(3, 9, 24)", "(12,) does not broadcast"],
    ),
    "value of too many axes": (
        lambda m: ablate(m.layers[1].ssm.h[2], torch.ones(1, 1, E, N)),
        SiteValueError,
        ["(3, 24, 5)", "(1, 1, 24, 5)"],
    ),
    "value of integers": (
        lambda m: ablate(m.layers[1].ssm.y, torch.ones(E, dtype=torch.long)),
        SiteValueError,
        ["a number or a floating tensor", "int64"],
    ),
    "means of all layers": (
        lambda m: ablate(m.layers[1].ssm.y, {1: torch.ones(E)}),
        SiteValueError,
        ["not a dict", "means[layer]"],
    ),
    "direction of another shape": (
        lambda m: steer(m.layers[1].ssm.h[2], torch.ones(E)),
        SiteValueError,
        ["layers[1].ssm.h[2]", "shape (24, 5) [E d_inner, N d_state]", "not (24,)"],
    ),
    "direction for each position": (
        lambda m: steer(m.layers[1].ssm.y, torch.ones(LENGTH, E)),
        SiteValueError,
        ["shape (24,) [E d_inner]", "not (9, 24)"],
    ),
    "direction that is a number": (
        lambda m: steer(m.layers[1].ssm.y, 1.0),
        SiteValueError,
        ["layers[1].ssm.y", "a floating tensor, not a float"],
    ),
    "scale that is a word": (
        lambda m: steer(m.layers[1].ssm.y, torch.ones(E), scale="2"),  # type: ignore[arg-type]
        SiteValueError,
        ["layers[1].ssm.y", "scale= is one number", "not '2'"],
    ),
    "scale of several numbers": (
        lambda m: steer(m.layers[1].ssm.y, torch.ones(E), scale=torch.ones(3)),
        SiteValueError,
        ["layers[1].ssm.y", "scale= is one number", "a tensor of shape [3]"],
    ),
    "group of channels": (
        lambda m: ablate(m.layers[1].ssm.h[2], channels="slow"),  # type: ignore[arg-type]
        SiteValueError,
        ["layers[1].ssm.h[2]", "channels='slow'", "decay_groups(model, 1)['slow']", "mamba_trace.flow"],
    ),
    "word for channels": (
        lambda m: ablate(m.layers[1].ssm.B, channels="slow"),  # type: ignore[arg-type]
        SiteValueError,
        ["channels='slow'", "give an integer, a slice"],
    ),
    "output instead of its place": (
        lambda m: ablate(m.layers[1].ssm.y.output),
        SiteValueError,
        ["ablate takes a site", "not its output", "a tensor of shape [3, 9, 24]"],
    ),
    "module": (
        lambda m: steer(m.layers[1].ssm.in_proj, torch.ones(2 * E)),
        SiteValueError,
        ["steer takes a site", "layers[1].ssm.in_proj"],
    ),
}


#: The same of heads: which kind of model is asked.
WRONG_HEADS: dict[str, tuple[str, Callable[[Any], None], list[str]]] = {
    "heads of Mamba-1": (
        "mamba",
        lambda m: ablate(m.layers[1].ssm.y, heads=[2]),
        ["layers[1].ssm.y", "heads=[2]", "0 heads", "give channels=", "of size 24"],
    ),
    "heads of Falcon-Mamba to steer": (
        "falcon_mamba",
        lambda m: steer(m.layers[1].ssm.h[2], noise(E, N), heads=0),
        ["layers[1].ssm.h[2]", "heads=0", "0 heads"],
    ),
    "head": (
        DUAL[0],
        lambda m: ablate(m.layers[1].ssm.delta, heads=[0, 6]),
        ["layers[1].ssm.delta [B batch, L positions, H heads]", "heads=6", "there are 6, from -6 to 5"],
    ),
    "head of d_inner": (
        DUAL[1],
        lambda m: steer(m.layers[1].ssm.y, noise(E), heads=-7),
        ["layers[1].ssm.y", "heads=-7", "there are 6", "each of 4 channels"],
    ),
    "heads of the stream": (
        DUAL[1],
        lambda m: ablate(m.layers[1].resid_post, heads=[0]),
        ["layers[1].resid_post [B batch, L positions, D d_model]", "heads=[0]", "no axis of heads"],
    ),
    "heads of a group": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.B, heads=[0]),
        ["layers[1].ssm.B [B batch, L positions, G groups, N d_state]", "no axis of heads"],
    ),
    "channels of heads alone": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.delta, channels=[3]),
        ["layers[1].ssm.delta", "channels=[3]", "the 4 channels of a head share", "give heads=", "there are 6"],
    ),
    "channels of B_bar": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.B_bar, channels=[3]),
        ["layers[1].ssm.B_bar", "give heads="],
    ),
    "channel of a state": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.h[2], channels=24),
        ["layers[1].ssm.h[2] [B batch, H heads, P head_dim, N d_state]", "channels=24", "from -24 to 23"],
    ),
    "group of channels of a state": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.h[2], channels="slow"),  # type: ignore[arg-type]
        ["channels='slow'", "decay_groups(model, 1)['slow']"],
    ),
    "channels and heads": (
        DUAL[1],
        lambda m: ablate(m.layers[1].ssm.y, channels=[3], heads=[0]),
        ["layers[1].ssm.y", "channels=[3] and heads=[0]", "give one"],
    ),
    "direction without heads": (
        DUAL[1],
        lambda m: steer(m.layers[1].ssm.h[2], noise(E, N)),
        ["shape (6, 4, 5) [H heads, P head_dim, N d_state]", "not (24, 5)"],
    ),
}


@pytest.mark.parametrize(("kind", "act", "words"), WRONG_HEADS.values(), ids=list(WRONG_HEADS))
def test_heads_that_do_not_fit_are_refused_with_words_and_change_nothing(
    tokens: Tensor, kind: str, act: Callable[[Any], None], words: list[str]
) -> None:
    model = made(kind)
    with pytest.raises(SiteValueError) as raised, model.trace(tokens):
        act(model)
        _ = model.lm_head.output.save()
    for word in words:
        assert word in str(raised.value)
    agree(logits_with(model, tokens, lambda: None), by_hand(model, tokens, {}), 1e-10)


@pytest.mark.parametrize(("act", "error", "words"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_fit_is_refused_with_words_and_changes_nothing(
    model: MambaTrace, tokens: Tensor, act: Callable[[Any], None], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised, model.trace(tokens):
        act(model)
        _ = model.lm_head.output.save()
    for word in words:
        assert word in str(raised.value)
    agree(logits_with(model, tokens, lambda: None), by_hand(model, tokens, {}), 1e-10)


@pytest.mark.parametrize(
    ("verb", "act"),
    [
        ("ablate", lambda m: ablate(m.layers[1].ssm.y)),
        ("ablate", lambda m: ablate(m.layers[1].ssm.h[2])),
        ("steer", lambda m: steer(m.layers[1].resid_post, torch.ones(D))),
    ],
    ids=["ablate a site", "ablate a state", "steer"],
)
def test_an_edit_outside_of_a_trace_is_told_where_it_belongs(
    model: MambaTrace, verb: str, act: Callable[[Any], None]
) -> None:
    with pytest.raises(SiteValueError, match=rf"^{verb} edits a run: call it inside `with model.trace"):
        act(model)


@pytest.mark.parametrize("scale", [2, np.float32(2), torch.tensor(2), torch.tensor([2.0])], ids=repr)
def test_a_scale_is_a_number_in_any_form(model: MambaTrace, tokens: Tensor, scale: Any) -> None:
    place, direction = model.layers[1].resid_post, noise(D)
    found = logits_with(model, tokens, lambda: steer(place, direction, scale))
    agree(found, by_hand(model, tokens, {"blocks.1.hook_resid_post": lambda v: v + 2 * direction}), 1e-10)


def test_a_position_of_the_prompt_is_none_of_a_decode_step(model: MambaTrace, tokens: Tensor) -> None:
    with (
        pytest.raises(PositionError, match="positions=4, but there are 1, from -1 to 0"),
        model.generate(tokens, max_new_tokens=2, do_sample=False) as tracer,
    ):
        for _ in tracer.iter[:]:
            ablate(model.layers[1].ssm.y, positions=4)
