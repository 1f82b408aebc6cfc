"""The scans: values, gradients and segments against a float64 definition that shares no code with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_trace.scan import Explicit, Recurrence, Selective, Watched, explicit_scan, selective_scan

HALF = (torch.float16, torch.bfloat16)
SELECTIVE, EXPLICIT = ("x", "delta", "A", "B", "C", "h_start"), ("A_bar", "B_bar", "x", "C", "h_start")
FLOAT32, FLOAT64 = 1e-5, 1e-13  # of the largest value

Arguments = dict[str, Tensor]


def arguments(B: int = 2, L: int = 7, E: int = 6, N: int = 5, seed: int = 0) -> Arguments:
    """Everything both scans take, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"x": normal(B, L, E), "delta": normal(B, L, E).exp() / 4, "A": -normal(E, N).exp()}
    inputs |= {"B": normal(B, L, N), "C": normal(B, L, N), "h_start": normal(B, E, N)}
    return inputs | {"A_bar": normal(B, L, E, N).sigmoid(), "B_bar": normal(B, L, E, N)}


def pick(inputs: Arguments, names: tuple[str, ...]) -> list[Tensor]:
    return [inputs[name] for name in names]


def discretised(inputs: Arguments) -> Arguments:
    """The same arguments with A_bar and B_bar as delta, A and B define them."""
    A_bar = torch.exp(torch.einsum("ble,en->blen", inputs["delta"], inputs["A"]))
    return inputs | {"A_bar": A_bar, "B_bar": torch.einsum("ble,bln->blen", inputs["delta"], inputs["B"])}


def by_definition(inputs: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,L,E], h_last [B,E,N] and every state [B,L,E,N], by the closed form and no recurrence.

    h_p = (prod_{k<=p} A_bar_k) h_start + sum_{q<=p} (prod_{q<k<=p} A_bar_k) B_bar_q x_q
    """
    A_bar, B_bar, x, C, h_start = (inputs[name].double() for name in EXPLICIT)
    states = []
    for p in range(x.shape[1]):
        h = A_bar[:, : p + 1].prod(1) * h_start
        for q in range(p + 1):
            h = h + A_bar[:, q + 1 : p + 1].prod(1) * B_bar[:, q] * x[:, q, :, None]
        states.append(h)
    trajectory = torch.stack(states, 1) if states else h_start.new_zeros(x.shape[0], 0, *h_start.shape[1:])
    return torch.einsum("blen,bln->ble", trajectory, C), states[-1] if states else h_start, trajectory


def run_both(inputs: Arguments) -> list[tuple[Tensor, Tensor]]:
    """Both scans on the same recurrence."""
    return [selective_scan(*pick(inputs, SELECTIVE)), explicit_scan(*pick(inputs, EXPLICIT))]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    B=st.integers(1, 3),
    L=st.integers(0, 12),
    E=st.integers(1, 5),
    N=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_both_scans_are_the_definition(B: int, L: int, E: int, N: int, seed: int) -> None:
    inputs = discretised(arguments(B, L, E, N, seed))
    y, h_last, _ = by_definition(inputs)
    for actual_y, actual_h in run_both(inputs):
        assert actual_y.dtype == actual_h.dtype == torch.float64
        near(actual_y, y, FLOAT64)
        near(actual_h, h_last, FLOAT64)


def test_float32_is_as_near_as_float32_is() -> None:
    inputs = discretised(arguments(L=200))
    y, h_last, _ = by_definition(inputs)
    for actual_y, actual_h in run_both({name: tensor.float() for name, tensor in inputs.items()}):
        assert actual_y.dtype == actual_h.dtype == torch.float32
        near(actual_y, y, FLOAT32)
        near(actual_h, h_last, FLOAT32)


def test_without_h_start_the_state_begins_at_zero() -> None:
    inputs = discretised(arguments())
    zero = inputs | {"h_start": torch.zeros_like(inputs["h_start"])}
    for scan, names in ((selective_scan, SELECTIVE), (explicit_scan, EXPLICIT)):
        for actual, expected in zip(scan(*pick(inputs, names)[:-1]), by_definition(zero)[:2], strict=True):
            near(actual, expected, FLOAT64)


@pytest.mark.parametrize("h_start", [True, False])
def test_no_positions_leave_the_state_alone(h_start: bool) -> None:
    inputs = arguments(L=0)
    for scan, names in ((selective_scan, SELECTIVE), (explicit_scan, EXPLICIT)):
        y, h_last = scan(*pick(inputs, names)[: None if h_start else -1])
        assert y.shape == inputs["x"].shape
        assert torch.equal(h_last, inputs["h_start"] if h_start else torch.zeros_like(inputs["h_start"]))


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, laid out with the axes reversed and every second element unused."""
    axes = tuple(reversed(range(tensor.dim())))
    wide = torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1).flatten(-2)
    view = wide.permute(axes).contiguous().permute(axes)[..., ::2]
    assert torch.equal(view, tensor)
    assert not view.is_contiguous()
    return view


def test_any_strides_will_do() -> None:
    inputs = discretised(arguments())
    for contiguous, other in zip(
        run_both(inputs), run_both({name: strided(tensor) for name, tensor in inputs.items()}), strict=True
    ):
        near(other[0], contiguous[0], FLOAT64)
        near(other[1], contiguous[1], FLOAT64)
    broadcast = inputs | {"delta": inputs["delta"][:1, :1, :1].expand_as(inputs["delta"])}  # strides of 0
    y, h_last, _ = by_definition(discretised(broadcast))
    near(selective_scan(*pick(broadcast, SELECTIVE))[0], y, FLOAT64)
    near(selective_scan(*pick(broadcast, SELECTIVE))[1], h_last, FLOAT64)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: tensor.to(dtype) for name, tensor in arguments(L=40).items()}
    exact = discretised({name: tensor.double() for name, tensor in inputs.items()})
    y, h_last, _ = by_definition(exact)
    actual_y, actual_h = selective_scan(*pick(inputs, SELECTIVE))
    assert actual_y.dtype == actual_h.dtype == torch.float32
    near(actual_y, y, FLOAT32)
    near(actual_h, h_last, FLOAT32)
    y, h_last, _ = by_definition({name: tensor.double() for name, tensor in inputs.items()})
    actual_y, actual_h = explicit_scan(*pick(inputs, EXPLICIT))
    assert actual_y.dtype == actual_h.dtype == torch.float32
    near(actual_y, y, FLOAT32)
    near(actual_h, h_last, FLOAT32)


@pytest.mark.parametrize(("scan", "names"), [(selective_scan, SELECTIVE), (explicit_scan, EXPLICIT)])
@pytest.mark.parametrize("output", [0, 1, slice(None)], ids=["y", "h_last", "both"])
def test_gradients_of_every_argument(scan: Callable[..., Any], names: tuple[str, ...], output: Any) -> None:
    inputs = [tensor.requires_grad_() for tensor in pick(arguments(B=2, L=4, E=2, N=3), names)]
    # h_last does not depend on C, which gradcheck takes for a gradient of zero.
    assert torch.autograd.gradcheck(lambda *tensors: scan(*tensors)[output], inputs)


def test_second_derivatives() -> None:
    inputs = [tensor.requires_grad_() for tensor in pick(arguments(B=1, L=2, E=2, N=2), SELECTIVE)]
    assert torch.autograd.gradgradcheck(selective_scan, inputs)


def test_second_derivatives_where_an_input_was_computed_from_another(each_backend: str) -> None:
    """In a model delta is a function of x: what reaches x by way of delta is no part of the scan's own gradient."""
    found = []
    for kernels, dtype in (("reference", torch.float64), (each_backend, torch.float32)):
        inputs = {name: tensor.to(dtype) for name, tensor in arguments(B=1, L=4, E=2, N=3).items()}
        x = inputs["x"].requires_grad_()
        given = inputs | {"delta": x.square()}
        y, h_last = selective_scan(*pick(given, SELECTIVE), kernels=kernels)
        (first,) = torch.autograd.grad(y.square().sum() + h_last.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    near(found[1], found[0], FLOAT32)


def recurrences(inputs: Arguments) -> list[Recurrence]:
    return [
        Selective(inputs["x"], inputs["C"], inputs["delta"], inputs["A"], inputs["B"]),
        Explicit(inputs["x"], inputs["C"], inputs["A_bar"], inputs["B_bar"]),
        Watched(
            *pick(inputs, ("x", "C", "A_bar", "B_bar")),
            Selective(*pick(inputs, ("x", "C", "delta", "A", "B"))),
        ),
    ]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(L=st.integers(1, 10), cuts=st.sets(st.integers(0, 10)), seed=st.integers(0, 99))
def test_segments_join_to_the_whole(L: int, cuts: set[int], seed: int) -> None:
    inputs = discretised(arguments(L=L, seed=seed))
    y, h_last, _ = by_definition(inputs)
    stops = [*sorted(cut for cut in cuts if cut <= L), L]
    for one in recurrences(inputs):
        parts, h, start = [], inputs["h_start"], 0
        for stop in stops:
            part, h = one.run(start, stop, h)
            parts.append(part)
            start = stop
        near(torch.cat(parts, 1), y, FLOAT64)
        near(h, h_last, FLOAT64)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 3), (2, 5), (6, 7), (4, 4)])
def test_states_are_those_of_each_position(start: int, stop: int) -> None:
    inputs = discretised(arguments())
    y, _, trajectory = by_definition(inputs)
    before = inputs["h_start"] if start == 0 else trajectory[:, start - 1]
    for one in recurrences(inputs):
        out, states = one.states(start, stop, before)
        near(out, y[:, start:stop], FLOAT64)
        near(states, trajectory[:, start:stop], FLOAT64)
        near(one.read(states, slice(start, stop)), y[:, start:stop], FLOAT64)
        near(one.read(trajectory[:, 3], 3), y[:, 3], FLOAT64)
        near(one.read(trajectory), y, FLOAT64)


@pytest.mark.parametrize("cut", [0, 3, 7])
def test_the_gradients_of_watched_matrices_are_those_of_explicit_ones(cut: int) -> None:
    inputs = discretised(arguments())
    leaves = [tensor.requires_grad_() for tensor in pick(inputs, EXPLICIT)]
    gradients = []
    for one in recurrences(inputs)[1:]:
        before, h = one.run(0, cut, inputs["h_start"])
        after, h_last = one.run(cut, 7, h)
        score = torch.cat((before, after), 1).square().sum() + h.square().sum() + h_last.pow(3).sum()
        gradients.append(torch.autograd.grad(score, leaves))
    for explicit, watched in zip(*gradients, strict=True):
        near(watched, explicit, FLOAT64)
