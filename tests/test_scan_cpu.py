"""The compiled scan for the CPU against the reference in float64: values, gradients, odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_trace.errors import BackendError
from mamba_trace.scan import cpu, reference
from mamba_trace.scan.cpu import compiled as _compiled
from mamba_trace.scan.cpu import conv, team
from mamba_trace.scan.cpu.vectors import EXP2

TOLERANCE = 1e-5  # of a tensor's largest value
NAMES = ("x", "delta", "A", "B", "C", "h_start")
RESULTS = ("y", "h_last", "states")

#: B, L, E, N, each with several of the others; the kernels work in chunks of 64 positions and 16 channels.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 17, 3),
    (3, 63, 40, 16),
    (1, 64, 17, 33),
    (2, 65, 1, 16),
    (1, 200, 40, 3),
    (3, 1, 40, 33),
    (1, 2, 40, 1),
    (2, 63, 1, 33),
    (3, 64, 40, 1),
    (1, 65, 17, 16),
    (3, 200, 17, 1),
]


def arguments(B: int, L: int, E: int, N: int, seed: int = 0) -> list[Tensor]:
    """x, delta, A, B, C and h_start in float32; delta from 0.002 to 2: some states last, others do not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [normal(B, L, E), (1.7 * normal(B, L, E) - 2.5).exp().clamp(0.002, 2), -normal(E, N).exp()]
    return [*inputs, normal(B, L, N), normal(B, L, N), normal(B, E, N)]


def everything(scan: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """y and h_last of ``scan.selective_scan``, states of ``scan.selective_states``, whose y is y as well."""
    y, h_last = scan.selective_scan(*inputs)
    other_y, states = scan.selective_states(*inputs)
    assert torch.equal(y, other_y)
    return dict(zip(RESULTS, (y, h_last, states), strict=True))


def exact(inputs: list[Tensor]) -> dict[str, Tensor]:
    return everything(reference, [tensor.double() for tensor in inputs])


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.dtype == torch.float32, what
    near(actual, expected, tolerance, what)


def score(scan: Any, inputs: list[Tensor], through: str) -> Tensor:
    """The sum of one result, weighted at random."""
    run = scan.selective_states if through == "states" else scan.selective_scan
    result = run(*inputs)[0 if through == "y" else 1]
    generator = torch.Generator().manual_seed(7)
    return (result * torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)).sum()


def gradients(scan: Any, inputs: list[Tensor], through: str) -> dict[str, Tensor]:
    """The gradient of every argument, through one result weighted at random."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    grads = torch.autograd.grad(score(scan, inputs, through), inputs, allow_unused=True)
    # The reference's states are no function of C.
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for name, tensor, grad in zip(NAMES, inputs, grads, strict=True)
    }


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_float64(shape: tuple[int, ...]) -> None:
    inputs = arguments(*shape)
    actual, expected = everything(cpu, inputs), exact(inputs)
    for name in RESULTS:
        close(actual[name], expected[name], what=name)


@pytest.mark.parametrize("through", RESULTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(shape: tuple[int, ...], through: str) -> None:
    inputs = arguments(*shape)
    actual = gradients(cpu, inputs, through)
    expected = gradients(reference, [tensor.double() for tensor in inputs], through)
    for name in NAMES:
        close(actual[name], expected[name], what=f"gradient of {name}")
        if name != "C" or through == "y":
            assert bool(actual[name].any()), f"no gradient of {name}"


def test_gradients_through_all_results_at_once() -> None:
    inputs = [tensor.requires_grad_() for tensor in arguments(2, 70, 17, 5)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grads = []
    for scan, leaves in ((cpu, inputs), (reference, doubles)):
        y, h_last = scan.selective_scan(*leaves)
        also_y, states = scan.selective_states(*leaves)
        total = y.square().sum() + h_last.sum() + (also_y * states.sum(-1)).sum() + states[:, 30].sum()
        grads.append(torch.autograd.grad(total, leaves))
    for name, actual, expected in zip(NAMES, *grads, strict=True):
        close(actual, expected, what=f"gradient of {name}")


@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(B: int, L: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in arguments(B, L, 17, 3)]
    y, h_last = cpu.selective_scan(*inputs)
    also_y, states = cpu.selective_states(*inputs)
    assert y.shape == also_y.shape == (B, L, 17)
    assert states.shape == (B, L, 17, 3)
    assert torch.equal(h_last, inputs[-1])  # no positions leave the state alone
    grads = torch.autograd.grad(y.sum() + 2 * h_last.sum(), inputs)
    for name, tensor, grad in zip(NAMES, inputs, grads, strict=True):
        assert torch.equal(grad, torch.full_like(tensor, 2.0 if name == "h_start" else 0.0)), name


def test_without_h_start_the_state_begins_at_zero() -> None:
    inputs = arguments(2, 20, 17, 3)
    zero = [*inputs[:-1], torch.zeros_like(inputs[-1])]
    for run in (cpu.selective_scan, cpu.selective_states):
        for actual, expected in zip(run(*inputs[:-1]), run(*zero), strict=True):
            assert torch.equal(actual, expected)
    leaves = [tensor.requires_grad_() for tensor in inputs[:-1]]
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    actual = torch.autograd.grad(cpu.selective_scan(*leaves)[0].sum(), leaves)
    expected = torch.autograd.grad(reference.selective_scan(*doubles)[0].sum(), doubles)
    for name, one, other in zip(NAMES, actual, expected, strict=False):
        close(one, other, what=f"gradient of {name}")


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with the axes laid out in reverse, every second place unused and full of NaN."""
    axes = tuple(reversed(range(tensor.dim())))
    wide = torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1).flatten(-2)
    view = wide.permute(axes).contiguous().permute(axes)[..., ::2]
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("through", RESULTS)
def test_any_strides_will_do(through: str) -> None:
    inputs = arguments(2, 70, 17, 3)
    views = [strided(tensor) for tensor in inputs]
    for name, actual in everything(cpu, views).items():
        assert torch.equal(actual, everything(cpu, inputs)[name]), name
    for name, actual in gradients(cpu, views, through).items():
        assert torch.equal(actual, gradients(cpu, inputs, through)[name]), name


def test_broadcast_arguments_and_broadcast_gradients() -> None:
    x, delta, A, B, C, h_start = arguments(2, 30, 17, 3)
    broadcast = [x, delta[:1, :1, :1].expand_as(delta), A, B[:1].expand_as(B), C, h_start]  # strides of 0
    expected = exact(broadcast)
    for name, actual in everything(cpu, broadcast).items():
        close(actual, expected[name], what=name)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    cpu.selective_scan(leaf, *broadcast[1:])[0].sum().backward()  # sum's gradient has strides of 0
    reference.selective_scan(double, *[t.double() for t in broadcast[1:]])[0].sum().backward()
    close(leaf.grad, double.grad, what="gradient of x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_in_and_float32_goes_out(dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in arguments(2, 65, 17, 5)]
    expected = exact(inputs)
    for name, actual in everything(cpu, inputs).items():
        close(actual, expected[name], what=name)
    doubles = gradients(reference, [tensor.double() for tensor in inputs], "y")
    for name, actual in gradients(cpu, inputs, "y").items():
        assert actual.dtype == dtype  # of the argument, as autograd has it
        largest = float(doubles[name].abs().max())
        error = float((actual.double() - doubles[name]).abs().max())
        assert error <= torch.finfo(dtype).eps * largest, name  # one rounding


@pytest.mark.parametrize("step", [1e4, 1e30, 0.0])
def test_extreme_steps_give_numbers(step: float) -> None:
    """A large step forgets everything, A_bar being 0; a step of zero neither forgets nor writes."""
    x, delta, A, B, C, h_start = arguments(2, 70, 17, 5)
    delta[:, ::3] = step
    if step > 1e9:
        x = x / step  # so that delta x stays finite
    inputs = [x, delta, A, B, C, h_start]
    expected = exact(inputs)
    for name, actual in everything(cpu, inputs).items():
        assert bool(actual.isfinite().all()), name
        close(actual, expected[name], what=name)
    for through in RESULTS:
        for name, grad in gradients(cpu, inputs, through).items():
            assert bool(grad.isfinite().all()), f"gradient of {name} through {through}"


def test_decay_that_underflows_is_zero() -> None:
    """Around exp(-87.3), the smallest normal float32, and beyond exp(-103), the smallest of all."""
    steps = torch.tensor([80.0, 87.0, 87.5, 88.0, 90.0, 103.0, 104.0, 200.0, 1e4, 3e38])
    x, B, C = torch.zeros(1, 1, 10), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    y, h_last = cpu.selective_scan(x, steps.reshape(1, 1, 10), -torch.ones(10, 1), B, C, torch.ones(1, 10, 1))
    expected = torch.exp(-steps.double())
    assert bool(((h_last.flatten().double() - expected).abs() <= 2 * torch.finfo(torch.float32).tiny).all())
    torch.testing.assert_close(h_last.flatten()[0].double(), expected[0], rtol=2e-5, atol=0)
    assert not h_last.flatten()[-3:].any()
    assert torch.equal(y.flatten(), h_last.flatten())


def pieces_of(inputs: list[Tensor]) -> int:
    batch, length, width = inputs[0].shape
    return team.pieces(batch * -(-width // 16), length, shares=1)


@pytest.mark.parametrize("pool", ["openmp", "python"])
@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("shape", [(1, 700, 40, 16), (3, 300, 17, 3), (2, 400, 100, 5)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, ...], pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if pool == "python":
        monkeypatch.setattr(team, "openmp", lambda: None)
    inputs = arguments(*shape)
    assert pieces_of(inputs) > 2, "too small for several threads: this test would show nothing"
    several = everything(cpu, inputs)
    grads = {through: gradients(cpu, inputs, through) for through in RESULTS}
    torch.set_num_threads(1)
    for name, one in everything(cpu, inputs).items():
        assert torch.equal(several[name], one), name
    for through in RESULTS:
        for name, grad in gradients(cpu, inputs, through).items():
            if name in ("B", "C"):  # sums over channels, which the threads share out
                close(grads[through][name], grad.double(), what=f"gradient of {name}", tolerance=1e-6)
            else:
                assert torch.equal(grads[through][name], grad), name


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 129, 130])
def test_a_cut_changes_no_bit(cut: int) -> None:
    x, delta, A, B, C, h_start = arguments(2, 130, 17, 5)
    whole, h_last = cpu.selective_scan(x, delta, A, B, C, h_start)
    _, states = cpu.selective_states(x, delta, A, B, C, h_start)
    before, h = cpu.selective_scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], h_start)
    if cut:
        assert torch.equal(h, states[:, cut - 1])
    after, h = cpu.selective_scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], h)
    assert torch.equal(torch.cat((before, after), 1), whole)
    assert torch.equal(h, h_last)
    assert torch.equal(states[:, -1], h_last)


def test_five_thousand_positions() -> None:
    inputs = arguments(1, 5000, 17, 3)
    y, h_last = cpu.selective_scan(*inputs)
    expected_y, expected_h = reference.selective_scan(*[tensor.double() for tensor in inputs])
    close(y, expected_y, what="y")
    close(h_last, expected_h, what="h_last")


@pytest.mark.parametrize("L", [16384, 65536])
def test_a_long_prompt(L: int) -> None:
    inputs = arguments(1, L, 3, 2)
    expected = reference.selective_scan(*[tensor.double() for tensor in inputs])
    for name, actual, other in zip(("y", "h_last"), cpu.selective_scan(*inputs), expected, strict=True):
        close(actual, other, what=name)


def test_the_inputs_are_left_alone() -> None:
    inputs = arguments(2, 70, 17, 5)
    copies = [tensor.clone() for tensor in inputs]
    y, h_last = cpu.selective_scan(*inputs)
    y.zero_()
    h_last.zero_()
    gradients(cpu, inputs, "states")
    for name, tensor, copy in zip(NAMES, inputs, copies, strict=True):
        assert torch.equal(tensor, copy), name


def test_fake_tensors_have_the_shapes_and_no_data() -> None:
    with FakeTensorMode() as mode:
        inputs = [tensor.requires_grad_() for tensor in empty(2, 9, 17, 3)]
        y, h_last = cpu.selective_scan(*inputs)
        also_y, states = cpu.selective_states(*inputs)
        grads = torch.autograd.grad(y.sum() + h_last.sum() + states.sum(), inputs)
    assert y.shape == also_y.shape == (2, 9, 17)
    assert h_last.shape == (2, 17, 3)
    assert states.shape == (2, 9, 17, 3)
    for result in (y, h_last, also_y, states):
        assert result.fake_mode is mode
        assert result.dtype == torch.float32
        assert result.device.type == "cpu"
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]


def empty(B: int, L: int, E: int, N: int) -> list[Tensor]:
    """The arguments, without numbers."""
    return [torch.empty(shape) for shape in ((B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N), (B, E, N))]


@pytest.mark.parametrize("keep", [False, True], ids=["scan", "states"])
def test_the_operators_are_proper_ones(keep: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in arguments(2, 5, 17, 3)]
    torch.library.opcheck(torch.ops.mamba_trace.selective_scan_cpu, (*inputs, keep))


def test_one_argument_alone_may_ask_for_its_gradient() -> None:
    inputs = arguments(1, 70, 17, 3)
    expected = gradients(cpu, inputs, "y")
    for index, name in enumerate(NAMES):
        leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
        (grad,) = torch.autograd.grad(score(cpu, leaves, "y"), leaves[index])
        assert torch.equal(grad, expected[name]), name


def test_reasons_why_it_cannot_run() -> None:
    assert cpu.unavailable() is None
    assert cpu.unavailable(torch.device("cpu"), torch.float32, 1000) is None
    assert cpu.unavailable(torch.device("cpu"), torch.float64) == "it computes in float32, not torch.float64"
    assert cpu.unavailable(torch.device("meta")) == "the model is on meta, and it runs on the CPU alone"


def test_second_derivatives_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 6, 3), "delta": (1, 6, 3), "A": (3, 2), "B": (1, 6, 2), "C": (1, 6, 2), "h": (1, 3, 2)}
    values = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    values[2] = -values[2]
    products = []
    for backend, dtype in ((reference, torch.float64), (cpu, torch.float32)):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
        y, h_last = backend.selective_scan(*leaves)
        first = torch.autograd.grad(y.pow(2).sum() + h_last.pow(3).sum(), leaves, create_graph=True)
        products.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves))
    for exact, given in zip(*products, strict=True):
        torch.testing.assert_close(given.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


FORK = """
import os, signal, torch
from mamba_trace.scan import cpu
from mamba_trace.scan.cpu import team
torch.set_num_threads(4)
x, B = torch.rand(1, 200, 64), torch.rand(1, 200, 4)
inputs = [x, x, -torch.rand(64, 4), B, B]
assert team.pieces(4, 200) > 1
cpu.selective_scan(*inputs)  # so that there are threads to lose
expected = cpu.selective_scan(*inputs)[0]
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(cpu.selective_scan(*inputs)[0], expected) else 1)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_scans_too(tmp_path: Path) -> None:
    script = tmp_path / "fork.py"
    script.write_text(FORK, encoding="utf-8")
    assert subprocess.run([sys.executable, script], timeout=60, check=False).returncode == 0


def test_nowhere_to_keep_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cfunc(signature: object, **options: Any) -> Any:
        asked.append(options.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(_compiled, "cfunc", cfunc)
    fresh = _compiled.Kernel(conv.forward.function, conv.FORWARD)
    assert fresh.compiled.__code__.co_code == conv.forward.function.__code__.co_code
    assert asked == [True, False]


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="a tensor on meta among the inputs of a scan on the CPU"):
        cpu.causal_conv(torch.zeros(1, 5, 17), torch.zeros(17, 3, device="meta"), None)


# -- the gated scan ---------------------------------------------------------------------------------------


def gated_arguments(B: int, L: int, E: int, N: int) -> list[Tensor | None]:
    """x, delta_2, A, B, C, D, skip, h_start; delta_2 from about -8 to 3."""
    x, _, A, B_, C, h_start = arguments(B, L, E, N)
    generator = torch.Generator().manual_seed(3)
    delta_2 = 2 * torch.randn(B, L, E, generator=generator) - 2.5
    D, skip = torch.randn(E, generator=generator), 3 * torch.randn(B, L, E, generator=generator)
    return [x, delta_2, A, B_, C, D, skip, h_start]


def double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in inputs]


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_scan_is_that_of_float64(shape: tuple[int, ...], from_zero: bool) -> None:
    inputs = gated_arguments(*shape)
    if from_zero:
        inputs[-1] = None
    for name, actual, expected in zip(
        ("out", "h_last"), cpu.gated_scan(*inputs), reference.gated_scan(*double(inputs)), strict=True
    ):
        close(actual, expected, what=name)


def test_the_gated_scan_takes_the_views_that_a_mixer_has() -> None:
    x, delta_2, A, B, C, D, skip, h_start = gated_arguments(2, 70, 17, 3)
    fused = torch.cat((x, skip), dim=-1)
    projected = torch.cat((torch.full((2, 70, 4), torch.nan), B, C), dim=-1)
    views = [
        fused[..., :17],
        delta_2,
        A,
        projected[..., 4:7],
        projected[..., 7:],
        D,
        fused[..., 17:],
        h_start,
    ]
    for actual, expected in zip(
        cpu.gated_scan(*views), cpu.gated_scan(x, delta_2, A, B, C, D, skip, h_start), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("which", [0, 1], ids=["out", "h_last"])
def test_gradients_of_the_gated_scan(which: int) -> None:
    inputs = gated_arguments(2, 70, 17, 5)
    grads = []
    for scan, given in ((cpu, inputs), (reference, double(inputs))):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        result = scan.gated_scan(*leaves)[which]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
        grads.append(torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True))
    for name, actual, expected in zip(("x", "delta_2", "A", "B", "C", "D", "skip", "h_start"), *grads, strict=True):
        if expected is None:
            assert actual is None or not actual.any(), name
        else:
            close(actual, expected, what=f"gradient of {name}", tolerance=2e-5)


@pytest.mark.parametrize("delta_2", [-1e4, -200.0, -30.0, 30.0, 1e4, 3e38])
def test_extreme_steps_before_softplus(delta_2: float) -> None:
    inputs = gated_arguments(1, 70, 17, 3)
    inputs[0] = inputs[0] / max(delta_2, 1.0)
    inputs[1][:, ::3] = delta_2
    for name, actual, expected in zip(
        ("out", "h_last"), cpu.gated_scan(*inputs), reference.gated_scan(*double(inputs)), strict=True
    ):
        assert bool(actual.isfinite().all()), name
        close(actual, expected, what=name)


def test_softplus_is_precise_however_small() -> None:
    """Its value for -60 is 9e-27, and what that lets into the state is right to 1e-5 of itself."""
    steps = torch.tensor([-60.0, -20.0, -10.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 25.0])
    one, zero = torch.ones(1, 1, 9), torch.zeros(9)
    B = torch.ones(1, 1, 1)
    _, h_last = cpu.gated_scan(one, steps.reshape(1, 1, 9), -torch.ones(9, 1), B, B, zero, one)
    expected = torch.nn.functional.softplus(steps.double())
    torch.testing.assert_close(h_last.flatten().double(), expected, rtol=1e-5, atol=0)


# -- the explicit scan ------------------------------------------------------------------------------------

EXPLICIT = ("A_bar", "B_bar", "x", "C", "h_start")


def explicit_arguments(B: int, L: int, E: int, N: int) -> list[Tensor]:
    """A_bar in (-1, 1), some of it 0, as edits may make it."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A_bar = normal(B, L, E, N).tanh()
    A_bar[:, ::4] = 0
    return [A_bar, normal(B, L, E, N), normal(B, L, E), normal(B, L, N), normal(B, E, N)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_explicit_scan_is_that_of_float64(shape: tuple[int, ...]) -> None:
    inputs = explicit_arguments(*shape)
    for given in (inputs, [*inputs[:-1], None]):
        for run in ("explicit_scan", "explicit_states"):
            results = getattr(cpu, run)(*given), getattr(reference, run)(*double(given))
            for name, actual, expected in zip(("y", "second"), *results, strict=True):
                close(actual, expected, what=f"{name} of {run}")


@pytest.mark.parametrize("run", ["explicit_scan", "explicit_states"])
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_gradients_of_the_explicit_scan(shape: tuple[int, ...], run: str) -> None:
    inputs = explicit_arguments(*shape)
    grads = []
    for scan, given in ((cpu, inputs), (reference, double(inputs))):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        results = getattr(scan, run)(*leaves)
        score = sum(
            (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)).sum()
            for result in results
        )
        grads.append(torch.autograd.grad(score, leaves))
    for name, actual, expected in zip(EXPLICIT, *grads, strict=True):
        close(actual, expected, what=f"gradient of {name}")


def test_second_derivatives_of_the_explicit_scan() -> None:
    inputs = explicit_arguments(1, 5, 3, 2)
    products = []
    for scan, given in ((reference, double(inputs)), (cpu, inputs)):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        y, h_last = scan.explicit_scan(*leaves)
        first = torch.autograd.grad(y.pow(2).sum() + h_last.pow(3).sum(), leaves, create_graph=True)
        products.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves))
    for name, expected, actual in zip(EXPLICIT, *products, strict=True):
        close(actual, expected, what=name)


def test_the_explicit_scan_takes_any_strides() -> None:
    inputs = explicit_arguments(2, 20, 17, 3)
    for actual, expected in zip(cpu.explicit_scan(*map(strided, inputs)), cpu.explicit_scan(*inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("states", [False, True])
def test_the_explicit_operator_is_a_proper_one(states: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in explicit_arguments(2, 5, 17, 3)]
    torch.library.opcheck(torch.ops.mamba_trace.explicit_scan_cpu, (*inputs, states))


# -- the convolution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("L", "K"), [(1, 4), (2, 4), (3, 1), (70, 2), (70, 3), (5, 6)])
def test_the_convolution_is_pytorch_s(L: int, K: int, before: bool, bias: bool, activate: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x_in = normal(2, L, 2 * 17)[..., :17]  # half of what in_proj gives
    given = [x_in, normal(17, K), normal(17) if bias else None, normal(2, 17, K) if before else None]
    grads = []
    for backend, inputs in ((cpu, given), (reference, double(given))):
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        result = backend.causal_conv(*leaves, activate=activate)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads.append((result, torch.autograd.grad(result.pow(2).sum(), wanted)))
    (actual, gradient), (expected, expected_gradient) = grads
    close(actual.detach(), expected.detach(), what="conv")
    for one, other in zip(gradient, expected_gradient, strict=True):
        close(one, other, what="a gradient")
    with torch.no_grad():
        assert torch.equal(cpu.causal_conv(*given, activate=activate), actual)


def test_the_polynomial_of_the_exponential_is_closer_than_a_float32() -> None:
    f = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    power = sum(float(coefficient) * f**k for k, coefficient in enumerate(EXP2))
    assert float((power / torch.exp2(f) - 1).abs().max()) < 2e-8
