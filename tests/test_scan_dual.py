"""Mamba-2's scan: every function on every backend against the recurrence written out in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import dual_stand_ins
import pytest
import torch
import torch.nn.functional as F
from allocations import PeakMemory
from conftest import near
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_trace.errors import BackendError
from mamba_trace.scan import DUAL, SELECTIVE, Explicit, Recurrence, Selective, Watched, check, dispatch
from mamba_trace.scan import selective_scan as plain_selective_scan
from mamba_trace.scan.cpu import team
from mamba_trace.scan.dual import cpu, loops, reference
from mamba_trace.scan.record import Call, recording

FUNCTIONS = ("selective_scan", "selective_states", "gated_scan", "explicit_scan", "explicit_states")
KERNELS = ("reference", "cpu", "triton", "cuda")
#: B, L, H, P, G, N: one of each, more heads than groups, blocks and vectors that are cut short, several chunks.
SIZES = [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 4, 6, 17, 3, 16), (1, 70, 2, 9, 1, 33), (1, 5, 2, 75, 2, 20)]
#: For what does not depend on sizes: Triton's interpreter takes its time for each head and position.
SMALL = (1, 4, 2, 3, 1, 5)
FLOAT32, FLOAT64 = 2e-6, 1e-12  # of the largest value

Arguments = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mamba-ssm's kernels in plain PyTorch, and no warnings of underflow from Triton's interpreter."""
    dual_stand_ins.install(monkeypatch)
    numpy = pytest.importorskip("numpy")
    with numpy.errstate(all="ignore"):
        yield


def arguments(function: str, sizes: tuple[int, ...] = SIZES[1], by_channel: bool = False) -> Arguments:
    """The arguments of a function in float64; A_bar of both signs, as an edit may make it."""
    batch, length, heads, width, groups, n_state = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(batch, length, heads, width),
        "delta": F.softplus(normal(batch, length, heads) - 1),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, n_state),
        "C": normal(batch, length, groups, n_state),
        "h_start": normal(batch, heads, width, n_state),
        "D": normal(heads),
        "skip": normal(batch, length, heads, width),
        "A_bar": normal(batch, length, heads).tanh(),
        "B_bar": normal(batch, length, heads, *[width] * by_channel, n_state),
    }
    return {name: values[name] for name in inspect.signature(getattr(DUAL, function)).parameters if name in values}


def written_out(given: Arguments) -> tuple[Tensor, Tensor]:
    """y [B,L,H,P] and every state [B,L,H,P,N], by the definition; y is gated where there is a gate."""
    x, C, h = (given[name].double() for name in ("x", "C", "h_start"))
    each = x.shape[2] // C.shape[2]
    if "A_bar" in given:
        a, b = given["A_bar"].double(), given["B_bar"].double()
        b = b if b.dim() == 5 else b[:, :, :, None]
    else:
        delta = given["delta"].double()
        a = (delta * given["A"].double()).exp()
        b = (delta[..., None] * given["B"].double().repeat_interleave(each, dim=2))[:, :, :, None]
    states = []
    for p in range(x.shape[1]):
        h = a[:, p, :, None, None] * h + b[:, p] * x[:, p, ..., None]
        states.append(h)
    trajectory = torch.stack(states, dim=1)
    y = (trajectory * C.repeat_interleave(each, dim=2)[:, :, :, None]).sum(-1)
    if "skip" in given:
        y = (y + given["D"].double()[:, None] * x) * F.silu(given["skip"].double())
    return y, trajectory


def rounded(given: Arguments, dtype: torch.dtype = torch.float32) -> Arguments:
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def check_values(function: str, given: Arguments, kernels: str, tolerance: float = FLOAT32) -> None:
    y, states = written_out(given)
    first, second = getattr(DUAL, function)(**given, kernels=kernels)
    near(first, y, tolerance, "the first result")
    near(second, states if function.endswith("states") else states[:, -1], tolerance, "the second result")


def gradients(function: Callable[..., Any], given: Arguments, through: tuple[int, ...] = (0, 1)) -> Arguments:
    """The gradient of every argument through the results, weighted at random."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    score = torch.zeros((), dtype=torch.float64)
    for index, result in enumerate(function(**leaves)):
        if index in through:
            generator = torch.Generator().manual_seed(index)
            score = score + (result.double() * torch.randn(result.shape, generator=generator, dtype=score.dtype)).sum()
    grads = torch.autograd.grad(score, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}


def on(kernels: str, function: str) -> Callable[..., Any]:
    return lambda **given: getattr(DUAL, function)(**given, kernels=kernels)


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_values_are_those_of_float64(kernels: str, function: str, sizes: tuple[int, ...]) -> None:
    given = rounded(arguments(function, sizes))
    check_values(function, given, kernels)
    for result in getattr(DUAL, function)(**given, kernels=kernels):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_definition_in_float64(function: str, sizes: tuple[int, ...]) -> None:
    check_values(function, arguments(function, sizes), "auto", FLOAT64)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("function", ["explicit_scan", "explicit_states"])
def test_each_channel_may_have_its_own_write(kernels: str, function: str) -> None:
    given = rounded(arguments(function, SMALL, by_channel=True))
    check_values(function, given, kernels)
    expected = gradients(getattr(reference, function), rounded(given, torch.float64))
    for name, actual in gradients(on(kernels, function), given).items():
        near(actual, expected[name], 10 * FLOAT32, name)


@pytest.mark.parametrize("h_start", [True, False])
@pytest.mark.parametrize("kernels", KERNELS)
def test_no_positions_leave_the_state_alone(kernels: str, h_start: bool) -> None:
    for function in FUNCTIONS:
        given = rounded(arguments(function, (2, 0, 4, 3, 2, 5)))
        h = given["h_start"]
        if not h_start:
            del given["h_start"]
        first, second = getattr(DUAL, function)(**given, kernels=kernels)
        assert first.shape == given["x"].shape
        if function.endswith("states"):
            assert second.shape == (2, 0, 4, 3, 5)
        else:
            assert torch.equal(second, h if h_start else torch.zeros_like(h))


@pytest.mark.parametrize("kernels", KERNELS)
def test_without_h_start_the_state_begins_at_zero(kernels: str) -> None:
    for function in FUNCTIONS:
        for length in (1, 6):
            given = rounded(arguments(function, (1, length, 2, 3, 1, 5)))
            given["h_start"] = torch.zeros_like(given["h_start"])
            expected = getattr(DUAL, function)(**given, kernels=kernels)
            del given["h_start"]
            for one, other in zip(getattr(DUAL, function)(**given, kernels=kernels), expected, strict=True):
                assert torch.equal(one, other)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, laid out with the axes reversed and every second element unused."""
    axes = tuple(reversed(range(tensor.dim())))
    wide = torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1).flatten(-2)
    return wide.permute(axes).contiguous().permute(axes)[..., ::2]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_any_strides_will_do(kernels: str, function: str) -> None:
    given = rounded(arguments(function))
    check_values(function, {name: strided(tensor) for name, tensor in given.items()}, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("length", [1, 9])
def test_slices_of_one_tensor_as_a_mixer_has_them(kernels: str, length: int) -> None:
    _, _, heads, width, groups, n_state = SIZES[1]
    given = rounded(arguments("gated_scan", (2, length, heads, width, groups, n_state)))
    whole = torch.cat([given[name].flatten(2) for name in ("skip", "x", "B", "C", "delta")], dim=-1)
    sizes = [heads * width, heads * width, groups * n_state, groups * n_state, heads]
    skip, x, B, C, given["delta"] = whole.split(sizes, dim=-1)
    given |= {name: tensor.unflatten(-1, (heads, width)) for name, tensor in (("x", x), ("skip", skip))}
    given |= {name: tensor.unflatten(-1, (groups, n_state)) for name, tensor in (("B", B), ("C", C))}
    check_values("gated_scan", given, kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_half_precision_is_accumulated_in_float32(kernels: str, function: str, dtype: torch.dtype) -> None:
    given = rounded(arguments(function), dtype)
    first, second = getattr(DUAL, function)(**given, kernels=kernels)
    y, states = written_out(given)
    gated = function == "gated_scan"
    assert first.dtype == (dtype if gated else torch.float32)
    assert second.dtype == torch.float32
    near(first, y, torch.finfo(dtype).eps if gated else FLOAT32, "the first result")
    near(second, states if function.endswith("states") else states[:, -1], FLOAT32, "the second result")


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_may_have_an_A_each(kernels: str, length: int) -> None:
    for function in ("selective_scan", "selective_states", "gated_scan"):
        given = rounded(arguments(function, (2, length, 4, 3, 2, 5)))
        A = torch.stack([given["A"], 3 * given["A"]])
        whole = getattr(DUAL, function)(**given | {"A": A}, kernels=kernels)
        for row in range(2):
            alone = {k: v if k in ("A", "D") else v[row : row + 1] for k, v in given.items()} | {"A": A[row]}
            y, states = written_out(alone)
            near(whole[0][row : row + 1], y, FLOAT32)
            near(whole[1][row : row + 1], states if function.endswith("states") else states[:, -1], FLOAT32)


@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("kernels", ["reference", "cpu", "triton"])
def test_extreme_steps_give_numbers(kernels: str, step: float) -> None:
    """A large step forgets everything, A_bar being 0; a step of zero neither forgets nor writes."""
    given = arguments("selective_scan")
    given["delta"][:, ::3] = step
    if step > 1e9:
        given["x"] = given["x"] / step  # so that delta x stays finite
    check_values("selective_scan", rounded(given), kernels)
    for name, grad in gradients(on(kernels, "selective_scan"), rounded(given)).items():
        assert bool(grad.isfinite().all()), name


# -- stretches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 32, 75])
def test_any_gate_is_that_of_pytorch_on_the_cpu(width: int) -> None:
    given = {name: each.float() for name, each in arguments("gated_scan", (1, cpu.MANY + 3, 2, width, 1, 20)).items()}
    given |= {name: given[name].abs() for name in ("x", "B", "C", "D", "h_start")}  # nothing cancels
    extremes = [0.0, -0.0, 1e-30, 20.0, 87.0, -87.0, 88.7, -88.7, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf, math.nan]
    given["skip"] = torch.tensor(extremes).repeat(given["skip"].numel() // 15 + 1)[: given["skip"].numel()]
    given["skip"] = given["skip"].view_as(given["x"])
    expected, _ = DUAL.gated_scan(**given, kernels="reference")
    actual, _ = DUAL.gated_scan(**given, kernels="cpu")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("cut", [0, 1, 16, 31, 33])
def test_a_cut_changes_no_bit_on_the_cpu(cut: int) -> None:
    given = rounded(arguments("selective_scan", (2, 33, 4, 19, 2, 20)))
    whole, h_last = DUAL.selective_scan(**given, kernels="cpu")
    also_y, states = DUAL.selective_states(**given, kernels="cpu")
    assert torch.equal(also_y, whole)
    parts, h = [], given["h_start"]
    for span in (slice(0, cut), slice(cut, 33)):
        part = {k: v if k == "A" else v[:, span] for k, v in given.items()} | {"h_start": h}
        y, h = DUAL.selective_scan(**part, kernels="cpu")
        parts.append(y)
        if span.start == 0 and cut:
            assert torch.equal(h, states[:, cut - 1])
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(h, h_last)


def recurrences(given: Arguments, kernels: str) -> list[Recurrence]:
    x, C, delta, A, B = (given[name] for name in ("x", "C", "delta", "A", "B"))
    A_bar = (delta * A).exp()
    B_bar = delta[..., None] * B.repeat_interleave(x.shape[2] // B.shape[2], dim=2)
    ones = torch.ones_like(x)
    options = {"family": DUAL, "kernels": kernels}
    selective = Selective(x, C, delta, A, B, **options)
    return [
        selective,
        Explicit(x, C, A_bar, B_bar, **options),
        Explicit(ones, C, A_bar, B_bar[:, :, :, None] * x[..., None], **options),
        Watched(x, C, A_bar, B_bar, selective, **options),
    ]


@pytest.mark.parametrize("kernels", KERNELS)
def test_stretches_join_to_the_whole(kernels: str) -> None:
    given = rounded(arguments("selective_scan", (1, 11, 2, 3, 1, 5)))
    y, states = written_out(given)
    for one in recurrences(given, kernels):
        parts, h, start = [], given["h_start"], 0
        for stop in (1, 5, 5, 11):
            out, trajectory = one.states(start, stop, h)
            near(trajectory, states[:, start:stop], FLOAT32)
            near(one.read(trajectory, slice(start, stop)), y[:, start:stop], FLOAT32)
            part, h = one.run(start, stop, h)
            near(out, part.double(), FLOAT32)
            near(h, states[:, stop - 1], FLOAT32)
            parts.append(part)
            start = stop
        near(torch.cat(parts, 1), y, FLOAT32)
        near(one.read(states[:, 3].float(), 3), y[:, 3], FLOAT32)


def test_the_gradients_of_watched_matrices_are_those_of_explicit_ones() -> None:
    given = arguments("selective_scan")
    found = []
    for index in (1, 3):
        one = recurrences(given, "auto")[index]
        leaves = [one.A_bar.requires_grad_(), one.B_bar.requires_grad_(), one.x.requires_grad_()]
        y, h = one.run(0, 4, given["h_start"])
        after, h_last = one.run(4, 7, h)
        score = torch.cat((y, after), 1).square().sum() + h_last.pow(3).sum()
        found.append(torch.autograd.grad(score, leaves))
        one.x.requires_grad_(False)
    for explicit, watched in zip(*found, strict=True):
        near(watched, explicit, FLOAT64)


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_are_those_of_float64(kernels: str, function: str, through: tuple[int, ...]) -> None:
    given = rounded(arguments(function, SIZES[2] if through == (0, 1) else SIZES[1]))
    expected = gradients(getattr(reference, function), rounded(given, torch.float64), through)
    for name, actual in gradients(on(kernels, function), given, through).items():
        near(actual, expected[name], 10 * FLOAT32, f"the gradient of {name}")  # sums over all positions


@pytest.mark.parametrize("sizes", [(1, 70, 2, 9, 1, 33), (2, 33, 2, 75, 1, 20)], ids=str)
@pytest.mark.parametrize("function", ["selective_scan", "selective_states"])
def test_gradients_beyond_a_chunk(function: str, sizes: tuple[int, ...]) -> None:
    given = rounded(arguments(function, sizes))
    expected = gradients(getattr(reference, function), rounded(given, torch.float64))
    for kernels in ("cpu", "triton") if sizes[1] == 70 else ("cpu",):
        for name, actual in gradients(on(kernels, function), given).items():
            near(actual, expected[name], 10 * FLOAT32, f"the gradient of {name}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_definition_has_the_gradients_of_finite_differences(function: str) -> None:
    given = arguments(function, (1, 3, 2, 2, 1, 2))
    run = getattr(DUAL, function)
    assert torch.autograd.gradcheck(lambda *leaves: run(*leaves), [t.requires_grad_() for t in given.values()])


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_argument_alone_may_ask_for_its_gradient(kernels: str) -> None:
    given = rounded(arguments("gated_scan", SMALL))
    expected = gradients(on(kernels, "gated_scan"), given)
    for wanted in given:
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in given.items()}
        first, second = DUAL.gated_scan(**leaves, kernels=kernels)
        weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                   for i, r in enumerate((first, second))]  # fmt: skip
        score = (first.double() * weights[0]).sum() + (second.double() * weights[1]).sum()
        near(torch.autograd.grad(score, leaves[wanted])[0], expected[wanted].double(), FLOAT32, wanted)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_second_derivatives_are_those_of_the_definition(kernels: str, function: str) -> None:
    found = []
    for run, dtype in ((getattr(reference, function), torch.float64), (on(kernels, function), torch.float32)):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in arguments(function, (1, 4, 2, 2, 1, 3)).items()}
        first, second = run(**leaves)
        total = first.pow(2).sum() + second.pow(3).sum()
        grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), list(leaves.values())))
    for exact, actual in zip(*found, strict=True):
        near(actual, exact, 10 * FLOAT32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_results_may_be_edited_in_place(kernels: str) -> None:
    """As a trace does with every value, the scan's arguments being kept for the gradient."""
    for function in FUNCTIONS:
        for index in (0, 1):
            found = []
            for run, dtype in ((on(kernels, function), torch.float32), (getattr(reference, function), torch.float64)):
                leaves = {name: t.to(dtype).requires_grad_() for name, t in arguments(function, SMALL).items()}
                result = run(**leaves)[index]
                result[:, :1] *= 3
                found.append(torch.autograd.grad(result.sum(), leaves["x"])[0])
            near(found[0], found[1], 10 * FLOAT32)


# -- transforms, fake tensors, operators ---------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_of_torch_func(function: str) -> None:
    given = rounded(arguments(function, (2, 3, 2, 2, 1, 3)))
    others = {name: tensor for name, tensor in given.items() if name != "x"}

    def run(x: Tensor) -> Tensor:
        return getattr(DUAL, function)(**others, x=x)[0]

    x, tangent = given["x"], given["x"].cos()
    near(torch.func.jvp(run, (x,), (tangent,))[1], (run(x + tangent) - run(x)).double(), 10 * FLOAT32)  # linear in x
    grad = torch.func.grad(lambda x: run(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    near(grad, torch.autograd.grad(run(leaf).sin().sum(), leaf)[0].double(), 10 * FLOAT32)
    several = torch.stack((x, tangent))
    near(torch.func.vmap(run)(several), torch.stack((run(x), run(tangent))).double(), 10 * FLOAT32)


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda"])
def test_a_kernel_that_is_forced_says_why_it_cannot_be_transformed(kernels: str) -> None:
    given = rounded(arguments("selective_scan"))
    x = given.pop("x")
    with pytest.raises(BackendError, match=f"kernels='{kernels}' cannot run under torch.func"):
        torch.func.grad(lambda x: DUAL.selective_scan(x, **given, kernels=kernels)[0].sum())(x)


@pytest.mark.parametrize("h_start", [True, False])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_tensors_have_the_shapes_dtypes_and_dependencies(function: str, by_channel: bool, h_start: bool) -> None:
    given = rounded(arguments(function, by_channel=by_channel), torch.bfloat16)
    if not h_start:
        del given["h_start"]
    real = getattr(DUAL, function)(**given)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor).requires_grad_() for name, tensor in given.items()}
        results = getattr(DUAL, function)(**fakes)
        for result, expected in zip(results, real, strict=True):
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        grads = torch.autograd.grad(sum(result.float().sum() for result in results), list(fakes.values()))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in given.values()]
    rows = fakes | {"A": fakes["A"].expand(2, -1)} if "A" in fakes else fakes
    assert getattr(DUAL, function)(**rows)[1].shape == real[1].shape


@pytest.mark.parametrize("keep", [False, True], ids=["scan", "states"])
def test_the_operator_is_a_proper_one(keep: bool) -> None:
    given = rounded(arguments("selective_scan"))
    x, delta, A, B, C, h = (given[name] for name in ("x", "delta", "A", "B", "C", "h_start"))
    inputs = [t.detach().requires_grad_() for t in (x, (delta * A).exp(), delta, B, C, h)]
    torch.library.opcheck(torch.ops.mamba_trace.linear_scan_cpu, (*inputs, keep))


def test_the_names_of_the_scans_are_not_mixed_up() -> None:
    assert SELECTIVE.selective_scan is plain_selective_scan
    assert (SELECTIVE.name, DUAL.name) == ("selective", "dual")
    for function in FUNCTIONS:
        run, definition = getattr(DUAL, function), getattr(reference, function)
        names = [name for name in inspect.signature(definition).parameters if name != "scan"]
        assert [*inspect.signature(run).parameters] == [*names, "kernels"]
        others = inspect.signature(getattr(SELECTIVE, function)).parameters
        assert [*others] == [name + "_2" * (name == "delta" and function == "gated_scan") for name in names] + [
            "kernels"
        ]


# -- which backend runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_call_is_noted_with_the_backend_that_ran(function: str) -> None:
    others = ("triton" if function not in ("selective_scan", "gated_scan") else "cuda", "triton")
    for kernels, backend in zip(("cpu", "cuda", "triton"), ("cpu", *others), strict=True):
        for length in (5, 1, 0):
            expected = backend
            if length == 0 or (length == 1 and backend == "triton"):
                expected = "reference"
            calls: list[Call] = []
            with recording(calls):
                getattr(DUAL, function)(**rounded(arguments(function, (1, length, 2, 3, 1, 4))), kernels=kernels)
            assert calls == [Call(function, expected, length)]


def test_limits_are_named() -> None:
    given = rounded(arguments("selective_scan", (1, 2, 1, 1, 1, 257)))
    with pytest.raises(BackendError, match="at most 256 state elements"):
        DUAL.selective_scan(**given, kernels="triton")
    with pytest.raises(BackendError, match=r"float32, not torch\.float64"):
        DUAL.selective_scan(**arguments("selective_scan"), kernels="cpu")
    assert (check("cpu", "dual"), check("auto", "dual")) == ("cpu", "auto")
    with pytest.raises(BackendError, match="there are auto, reference"):
        check("fast", "dual")
    assert {each.backend for each in dispatch.availability("dual")} == set(dispatch.BACKENDS)


def test_ours_comes_first_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's kernel rounds the factors of its products to TF32."""
    backends = dispatch.FAMILIES["dual"]
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends[name], "unavailable", lambda *args: None)
    assert dispatch.choose("auto", torch.device("cuda"), torch.float32, 128, backends) == "triton"


# -- the loops of the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["openmp", "python"])
def test_threads_change_no_bit(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if pool == "python":
        monkeypatch.setattr(team, "openmp", lambda: None)
    given = rounded(arguments("selective_states", (2, 200, 4, 70, 2, 20)))
    before, found = torch.get_num_threads(), []
    for threads in (4, 1):
        torch.set_num_threads(threads)
        found.append([*cpu.selective_states(**given), *gradients(cpu.selective_states, given).values()])
    torch.set_num_threads(before)
    for several, one in zip(*found, strict=True):
        assert torch.equal(several, one)


def test_no_trajectory_is_made_where_none_is_asked_for() -> None:
    sizes = B, L, H, P, _, N = (1, 128, 4, 16, 1, 32)
    given = rounded(arguments("gated_scan", sizes))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}

    def forward_and_backward() -> None:
        out, h_last = DUAL.gated_scan(**leaves)
        torch.autograd.grad(out.sum() + h_last.sum(), list(leaves.values()))

    with torch.no_grad():
        plain = PeakMemory.of(lambda: DUAL.gated_scan(**given))
    for memory in (plain, PeakMemory.of(forward_and_backward)):
        assert (B, L, H, P, N) not in memory.shapes
        assert memory.largest < L * H * P * N * 4
    del given["D"], given["skip"]
    with torch.no_grad():  # so that the test above would notice
        assert PeakMemory.of(lambda: DUAL.selective_states(**given)).largest >= L * H * P * N * 4


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_kernel_refuses_what_does_not_fit(name: str) -> None:
    kernel = getattr(loops, name)
    sizes = {"batch": 2, "length": 3, "heads": 4, "width": 3, "n_state": 5, "each_B": 2, "each_C": 4}
    sizes |= {"groups_B": 2, "groups_C": 1}
    good: dict[str, Any] = dict.fromkeys(kernel.layout.given, 1)
    for array, buffer in kernel.layout.buffers.items():
        good[array] = torch.zeros([sizes[axis] for axis in buffer.names])
    team.run(kernel, 1, **good)
    for array in kernel.layout.buffers:
        for wrong in (None, good[array].double(), good[array][..., 1:], good[array].to("meta")):
            with pytest.raises(BackendError, match=r"a compiled kernel takes|among the inputs of a scan"):
                team.run(kernel, 1, **{**good, array: wrong})


# -- the gated scan over many positions ----------------------------------------------------------------------


@pytest.mark.parametrize("growing", [False, True], ids=["", "growing"])
@pytest.mark.parametrize("sizes", [*SIZES, (3, 37, 4, 40, 4, 7), (2, 66, 2, 64, 1, 32)], ids=str)
def test_the_scan_chunk_by_chunk_is_that_of_the_recurrence(sizes, growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks that are cut short, several groups, and heads whose states grow at some positions."""
    monkeypatch.setattr(cpu, "MANY", 1)
    given = arguments("gated_scan", sizes)
    if growing:
        given["A"][::2] *= -0.3
        given["delta"][:, ::3] = 0
    check_values("gated_scan", rounded(given), "cpu")
    zeros = rounded(given) | {"h_start": torch.zeros_like(given["h_start"], dtype=torch.float32)}
    expected, found = cpu.gated_scan(*zeros.values()), cpu.gated_scan(*[*zeros.values()][:-1])
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_a_scan_of_many_positions_takes_views_and_is_the_same_on_several_threads(monkeypatch) -> None:
    given = rounded(arguments("gated_scan", (2, 45, 4, 40, 2, 20)))
    monkeypatch.setattr(team, "SMALL", 1)
    for name in ("x", "B", "C", "skip"):
        value = given[name].flatten(2)
        given[name] = torch.cat((value + 1, value), dim=-1)[..., value.shape[-1] :].view(given[name].shape)
    before, found = torch.get_num_threads(), []
    for threads in (4, 1):
        torch.set_num_threads(threads)
        found.append(cpu.gated_scan(*given.values()))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    check_values("gated_scan", given, "cpu")


@pytest.mark.parametrize("decay", [0.0, float("inf"), float("nan")], ids=str)
def test_what_a_position_holds_stays_behind_it(decay: float) -> None:
    """No number of a chunk reaches a position before its own, whatever it is."""
    given = rounded(arguments("gated_scan", (1, 40, 2, 9, 1, 5)))
    expected, _ = cpu.gated_scan(*given.values())
    given["x"][:, 38] = float("nan") if decay == 0.0 else 1.0
    given["delta"][:, 38] = -decay if decay == 0.0 else decay
    found, _ = cpu.gated_scan(*given.values())
    near(found[:, :38], expected[:, :38], FLOAT32, "what comes before")


def test_extreme_steps_over_many_positions_give_numbers() -> None:
    for step in (0.0, 1e4, 1e30):
        given = arguments("gated_scan", (1, 40, 2, 9, 1, 5))
        given["delta"][:, ::3] = step
        if step > 1e9:
            given["x"] = given["x"] / step
            given["D"] = given["D"] * 0
        check_values("gated_scan", rounded(given), "cpu")
