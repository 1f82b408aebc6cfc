"""The Triton scan against the reference in float64, in Triton's interpreter where there is no GPU.

The interpreter takes milliseconds for a position, so the shapes are small. Whether the kernels compile for a
GPU, which it does not tell, is tested without one: Triton brings its own assembler.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import near
from torch import Tensor

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from mamba_trace.scan import reference, triton
from mamba_trace.scan.triton import launch

assert torch.cuda.is_available() or launch.INTERPRETED, (
    "TRITON_INTERPRET=1 must be set before anything imports Triton: in conftest.py, or for the whole run"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5  # of a tensor's largest value
SELECTIVE = ("x", "delta", "A", "B", "C", "h_start")
EXPLICIT = ("A_bar", "B_bar", "x", "C", "h_start")

#: B, L, E, N; the kernels work in chunks of 64 positions, 4 or 8 at a time, and 16 channels when interpreted.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 17, 3),
    (3, 4, 33, 2),
    (2, 9, 17, 5),
    (1, 13, 5, 33),
    (1, 5, 2, 130),
    (1, 63, 3, 3),
    (1, 64, 2, 1),
    (1, 65, 1, 16),
    (1, 66, 3, 5),
    (1, 130, 2, 3),
]


@pytest.fixture(autouse=True)
def _no_warnings_of_underflow() -> Iterator[None]:
    numpy = pytest.importorskip("numpy")  # what the interpreter computes with
    with numpy.errstate(all="ignore"):
        yield


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def selective(B: int, L: int, E: int, N: int) -> list[Tensor]:
    """x, delta, A, B, C and h_start in float32; delta from 0.002 to 2: some states last, others do not."""
    delta = (1.7 * drawn(B, L, E, seed=1) - 2.5).exp().clamp(0.002, 2)
    A = -drawn(E, N, seed=2).exp()
    return [
        drawn(B, L, E, seed=0),
        delta,
        A,
        *(drawn(B, L, N, seed=s) for s in (3, 4)),
        drawn(B, E, N, seed=5),
    ]


def explicit(B: int, L: int, E: int, N: int) -> list[Tensor]:
    """A_bar, B_bar, x, C and h_start; A_bar from -1 to 1, a fifth of it 0."""
    A_bar = drawn(B, L, E, N, seed=1).clamp(-1, 1)
    A_bar[drawn(B, L, E, N, seed=2) > 0.84] = 0
    return [
        A_bar,
        drawn(B, L, E, N, seed=3),
        drawn(B, L, E, seed=0),
        drawn(B, L, N, seed=4),
        drawn(B, E, N, seed=5),
    ]


def gated(B: int, L: int, E: int, N: int) -> list[Tensor]:
    """x, delta_2, A, B, C, D, skip and h_start; delta_2 from about -14 to 8."""
    x, _, A, B_, C, h_start = selective(B, L, E, N)
    delta_2 = 4 * drawn(B, L, E, seed=6) - 3
    return [x, delta_2, A, B_, C, drawn(E, seed=7), 3 * drawn(B, L, E, seed=8), h_start]


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in inputs]


close = functools.partial(near, tolerance=TOLERANCE)


def values(scan: Any, name: str, inputs: list[Tensor]) -> dict[str, Tensor]:
    """y, h_last and states of the selective or explicit scan called ``name``."""
    y, h_last = getattr(scan, f"{name}_scan")(*inputs)
    other_y, states = getattr(scan, f"{name}_states")(*inputs)
    assert torch.equal(y, other_y)
    return {"y": y, "h_last": h_last, "states": states}


def weighted(results: tuple[Tensor, ...], through: tuple[int, ...] = (0, 1)) -> Tensor:
    """The sum of the results whose numbers are given, weighted at random."""
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for index in through:
        total = total + (results[index].double() * drawn(*results[index].shape, seed=9 + index)).sum()
    return total


def gradients(run: Any, inputs: list[Tensor], through: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    """The gradient of every argument through ``weighted`` results."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found = torch.autograd.grad(weighted(run(*leaves), through), leaves, allow_unused=True)
    # The reference's states are no function of C.
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def check_values(name: str, inputs: list[Tensor]) -> None:
    expected = values(reference, name, doubled(inputs))
    for what, actual in values(triton, name, inputs).items():
        assert actual.dtype == torch.float32
        close(actual, expected[what], what=what)


def check_gradients(name: str, inputs: list[Tensor], names: tuple[str, ...], through: tuple[int, ...] = (0, 1)) -> None:
    """Each gradient is as exact as in float32, and is then rounded once to the dtype of its argument."""
    actual = gradients(getattr(triton, name), inputs, through)
    expected = gradients(getattr(reference, name), doubled(inputs), through)
    for argument, given, one, other in zip(names, inputs, actual, expected, strict=True):
        assert one.dtype == given.dtype
        rounding = 0 if given.dtype == torch.float32 else torch.finfo(given.dtype).eps / 2
        close(one, other, what=f"gradient of {argument}", tolerance=TOLERANCE + rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_scan_is_that_of_float64(shape: tuple[int, ...]) -> None:
    check_values("selective", selective(*shape))
    check_gradients("selective_scan", selective(*shape), SELECTIVE)


@pytest.mark.parametrize("shape", [*SHAPES[:6], (1, 66, 3, 5)], ids=str)
def test_explicit_scan_is_that_of_float64(shape: tuple[int, ...]) -> None:
    check_values("explicit", explicit(*shape))
    check_gradients("explicit_scan", explicit(*shape), EXPLICIT)


@pytest.mark.parametrize("through", [(0,), (1,), (0, 1)], ids=["y", "other", "both"])
@pytest.mark.parametrize("name", ["selective_scan", "selective_states", "explicit_scan", "explicit_states"])
def test_gradients_through_each_result(name: str, through: tuple[int, ...]) -> None:
    make, names = (selective, SELECTIVE) if name.startswith("selective") else (explicit, EXPLICIT)
    check_gradients(name, make(2, 5, 3, 2), names, through)


def test_gradients_of_states_beyond_a_chunk() -> None:
    check_gradients("selective_states", selective(1, 67, 2, 3), SELECTIVE)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 17, 5), (1, 66, 3, 3)], ids=str)
def test_gated_scan_without_gradients_is_one_kernel(shape: tuple[int, ...]) -> None:
    inputs = gated(*shape)
    expected = reference.gated_scan(*doubled(inputs))
    for what, actual, exact in zip(("out", "h_last"), triton.gated_scan(*inputs), expected, strict=True):
        assert actual.dtype == torch.float32
        close(actual, exact, what=what)


def test_gated_scan_is_one_kernel_only_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[bool] = []
    run = launch.run_selective

    def recorded(*inputs: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        fused.append(others.get("skip") is not None)
        return run(*inputs, **others)

    monkeypatch.setattr(launch, "run_selective", recorded)
    leaves = [tensor.requires_grad_() for tensor in gated(1, 3, 2, 2)]
    out, _ = triton.gated_scan(*leaves)
    with torch.no_grad():
        again, _ = triton.gated_scan(*leaves)
    assert fused == [False, True]
    torch.testing.assert_close(out, again)


def test_gated_scan_with_gradients() -> None:
    names = ("x", "delta_2", "A", "B", "C", "D", "skip", "h_start")
    inputs = gated(2, 9, 17, 5)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    for actual, exact in zip(triton.gated_scan(*leaves), reference.gated_scan(*doubled(inputs)), strict=True):
        close(actual, exact, what="result")
    check_gradients("gated_scan", inputs, names)


def test_softplus_is_precise_however_small() -> None:
    """delta_2 alone decides h_last where x, B and C are 1 and the state starts at 0, after one position."""
    delta_2 = torch.tensor([-1e30, -1e4, -87.0, -50.0, -20.0, -5.0, -1.0, -0.1, 0.0, 0.1, 1.0, 5.0, 21.0, 1e4])
    delta_2 = delta_2[None, None].to(DEVICE)  # [1,1,E]
    one = torch.ones_like(delta_2)
    A, B, D = torch.zeros_like(delta_2[0]).T, one[..., :1], torch.zeros_like(delta_2[0, 0])
    out, h_last = triton.gated_scan(one, delta_2, A, B, B, D, one)
    expected = F.softplus(delta_2.double())  # [1,1,E]
    torch.testing.assert_close(h_last.mT.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), expected * F.silu(one.double()), rtol=1e-5, atol=0)
    assert not h_last.flatten()[:2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_in(dtype: torch.dtype) -> None:
    """float32 comes out, rounded once at the end where the result is to be half precise."""
    for name, make in (("selective", selective), ("explicit", explicit)):
        inputs = [tensor.to(dtype) for tensor in make(1, 5, 17, 3)]
        for what, actual in values(triton, name, inputs).items():
            assert actual.dtype == torch.float32
            close(actual, values(reference, name, doubled(inputs))[what], what=what)
        scan = f"{name}_scan"
        for one, other in zip(
            gradients(getattr(triton, scan), inputs),
            gradients(getattr(reference, scan), doubled(inputs)),
            strict=True,
        ):
            assert one.dtype == dtype
            close(one, other, what="gradient", tolerance=torch.finfo(dtype).eps)
    inputs = [tensor.to(dtype) for tensor in gated(1, 5, 17, 3)]
    expected = reference.gated_scan(*doubled(inputs))
    for leaves in (inputs, [tensor.clone().requires_grad_() for tensor in inputs]):
        out, h_last = triton.gated_scan(*leaves)
        assert out.dtype == dtype
        assert h_last.dtype == torch.float32
        close(out, expected[0], what="out", tolerance=torch.finfo(dtype).eps)
        close(h_last, expected[1], what="h_last")


def test_dtypes_mix() -> None:
    x, delta, A, B, C, h_start = selective(1, 9, 17, 5)
    inputs = [x.half(), delta, A, B.bfloat16(), C.half(), h_start.bfloat16()]
    check_gradients("selective_scan", inputs, SELECTIVE)
    for what, actual in values(triton, "selective", inputs).items():
        close(actual, values(reference, "selective", doubled(inputs))[what], what=what)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with the axes laid out in reverse, every second place unused and full of NaN."""
    axes = tuple(reversed(range(tensor.dim())))
    wide = torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1).flatten(-2)
    view = wide.permute(axes).contiguous().permute(axes)[..., ::2]
    assert not view.is_contiguous()
    return view


def test_any_strides_will_do() -> None:
    for name, make in (("selective", selective), ("explicit", explicit)):
        inputs = make(2, 5, 17, 3)
        views = [strided(tensor) for tensor in inputs]
        for what, actual in values(triton, name, views).items():
            assert torch.equal(actual, values(triton, name, inputs)[what]), what
        run = getattr(triton, f"{name}_states")
        for one, other in zip(gradients(run, views), gradients(run, inputs), strict=True):
            torch.testing.assert_close(one, other)
    inputs = gated(2, 5, 17, 3)
    for one, other in zip(triton.gated_scan(*map(strided, inputs)), triton.gated_scan(*inputs), strict=True):
        assert torch.equal(one, other)


def test_broadcast_arguments_and_broadcast_gradients() -> None:
    x, delta, A, B, C, _ = selective(1, 6, 3, 2)
    broadcast = [t.expand(3, -1, -1) for t in (x, delta)], A, [t.expand(3, -1, -1) for t in (B, C)]
    inputs = [*broadcast[0], broadcast[1], *broadcast[2]]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    doubles = [tensor.requires_grad_() for tensor in doubled(inputs)]
    # The gradient of a sum has strides of 0.
    actual = torch.autograd.grad(triton.selective_scan(*leaves)[0].sum(), leaves)
    expected = torch.autograd.grad(reference.selective_scan(*doubles)[0].sum(), doubles)
    for argument, one, other in zip(SELECTIVE, actual, expected, strict=False):
        close(one, other, what=f"gradient of {argument}")


def test_rows_may_have_an_A_each() -> None:
    inputs = selective(2, 9, 17, 3)
    inputs[2] = -drawn(2, 17, 3, seed=2).exp()
    check_gradients("selective_scan", inputs, SELECTIVE)


@pytest.mark.parametrize(("name", "make"), [("selective", selective), ("explicit", explicit)])
def test_without_h_start_the_state_begins_at_zero(name: str, make: Any) -> None:
    inputs = make(2, 5, 3, 2)
    zero = [*inputs[:-1], torch.zeros_like(inputs[-1])]
    for what, actual in values(triton, name, inputs[:-1]).items():
        assert torch.equal(actual, values(triton, name, zero)[what]), what
    run = getattr(triton, f"{name}_scan")
    for one, other in zip(gradients(run, inputs[:-1]), gradients(run, zero)[:-1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("step", [1e4, 1e30, 0.0])
def test_extreme_steps_give_numbers(step: float) -> None:
    """A large step forgets everything, A_bar being 0; a step of zero neither forgets nor writes."""
    inputs = selective(1, 10, 17, 3)
    inputs[1][:, ::3] = step
    if step > 1e9:
        inputs[0] = inputs[0] / step  # so that delta x stays finite
        inputs[2][0] = -3e38  # and delta A does not
    expected = values(reference, "selective", doubled(inputs))
    for what, actual in values(triton, "selective", inputs).items():
        assert bool(actual.isfinite().all()), what
        close(actual, expected[what], what=what)
    for run in (triton.selective_scan, triton.selective_states):
        for argument, grad in zip(SELECTIVE, gradients(run, inputs), strict=True):
            assert bool(grad.isfinite().all()), f"gradient of {argument}"


def test_extreme_gates_give_numbers() -> None:
    inputs = gated(1, 9, 3, 2)
    inputs[1][0, ::2] = -1e4
    inputs[6][0, :6] = torch.tensor([-1e30, -1e4, -80.0, 80.0, 1e4, 1e30])[:, None]
    out, h_last = triton.gated_scan(*inputs)
    expected = reference.gated_scan(*doubled(inputs))
    assert bool(h_last.isfinite().all())
    for position in range(9):
        close(out[:, position], expected[0][:, position], what=f"out at {position}")


def test_a_cut_changes_no_bit() -> None:
    x, delta, A, B, C, h_start = selective(1, 66, 2, 3)
    whole, h_last = triton.selective_scan(x, delta, A, B, C, h_start)
    _, states = triton.selective_states(x, delta, A, B, C, h_start)
    assert torch.equal(states[:, -1], h_last)
    for cut in (6, 64):
        y, h = triton.selective_scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], h_start)
        assert torch.equal(h, states[:, cut - 1])
        after, h = triton.selective_scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], h)
        assert torch.equal(torch.cat((y, after), 1), whole)
        assert torch.equal(h, h_last)


@pytest.mark.parametrize("name", ["selective_states", "explicit_states"])
def test_results_may_be_overwritten_before_the_gradient(name: str) -> None:
    inputs = selective(1, 6, 3, 2) if name.startswith("selective") else explicit(1, 6, 3, 2)
    run = getattr(triton, name)

    def overwritten(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, states = run(*leaves)
        total = weighted((y, states))
        with torch.no_grad():
            states.zero_()
        return total[None], total[None]

    for one, other in zip(gradients(overwritten, inputs, (0,)), gradients(run, inputs), strict=True):
        scale = drawn(1, seed=9).item()
        torch.testing.assert_close(one, scale * other)


def test_one_argument_alone_may_ask_for_its_gradient() -> None:
    for make, run in ((selective, triton.selective_scan), (explicit, triton.explicit_scan)):
        inputs = make(1, 2, 3, 2)
        expected = gradients(run, inputs)
        for index in range(len(inputs)):
            leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
            (grad,) = torch.autograd.grad(weighted(run(*leaves)), leaves[index])
            torch.testing.assert_close(grad, expected[index])


@pytest.mark.parametrize(
    "name", ["selective_scan", "selective_states", "explicit_scan", "explicit_states", "gated_scan"]
)
@pytest.mark.parametrize("start", [True, False], ids=["from h_start", "from zero"])
def test_second_derivatives_are_those_of_the_reference(name: str, start: bool) -> None:
    make = {"s": selective, "e": explicit, "g": gated}[name[0]]
    inputs = make(1, 5, 3, 2) if start else make(1, 5, 3, 2)[:-1]
    products = []
    for backend, given in ((reference, doubled(inputs)), (triton, inputs)):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        first, second = getattr(backend, name)(*leaves)
        total = first.pow(2).sum() + second.pow(3).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        products.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves))
    for exact, given in zip(*products, strict=True):
        close(given, exact, what="second derivative")


def test_the_inputs_are_left_alone() -> None:
    inputs = [*selective(1, 9, 3, 2), *explicit(1, 9, 3, 2)]
    copies = [tensor.clone() for tensor in inputs]
    gradients(triton.selective_scan, inputs[:6])
    gradients(triton.explicit_scan, inputs[6:])
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


# -- whether it can run --------------------------------------------------------------------------------------


def test_reasons_why_it_cannot_run() -> None:
    assert triton.unavailable() is None
    assert triton.unavailable(DEVICE) is None
    assert triton.unavailable(DEVICE, torch.float64) == "it computes in float32, not torch.float64"
    reason = triton.unavailable(DEVICE, d_state=257)
    assert reason == "it holds at most 256 state elements for each channel, not 257"
    reason = triton.unavailable(torch.device("meta"))
    assert reason == "the model is on meta, and it runs on a CUDA device alone: model.to('cuda')"


def test_a_broken_installation_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton._failure.__wrapped__(DEVICE) is None

    def wrong(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, h_last = reference.selective_scan(*inputs)
        return y + 0.01, h_last

    monkeypatch.setattr(triton, "selective_scan", wrong)
    assert "gave wrong numbers (off by 1.0e-02)" in triton._failure.__wrapped__(DEVICE)

    def failing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton, "selective_scan", failing)
    reason = triton._failure.__wrapped__(DEVICE)
    assert reason == f"a test of it on {DEVICE} failed (RuntimeError: no C compiler)"


def python(script: str, cache: Path) -> str:
    """What a new process prints, whose Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


ALONE = """
import sys, torch
from mamba_trace.scan import triton
assert not [name for name in sys.modules if name.startswith("triton") and sys.modules[name]]
torch.cuda.is_available = lambda: False
print(triton.unavailable(), triton.unavailable(torch.device("cpu")), sep="; ")
"""


def test_importing_it_imports_no_triton_and_a_cpu_needs_the_interpreter(tmp_path: Path) -> None:
    printed = python(ALONE, tmp_path)
    nothing, cpu = printed.strip().split("; ")
    assert nothing.startswith("PyTorch finds no CUDA device (torch.cuda.is_available() is False), ")
    assert "TRITON_INTERPRET=1" in nothing
    assert cpu == "the model is on cpu, and it runs on a CUDA device alone: model.to('cuda')"


def test_without_a_working_triton_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert triton._broken.__wrapped__() == "it needs Triton: pip install triton"

    def failing() -> None:
        raise OSError("libcuda.so: wrong ELF class")

    monkeypatch.setattr(triton, "_kernels", failing)
    reason = triton._broken.__wrapped__()
    assert reason == "Triton does not work here (OSError: libcuda.so: wrong ELF class)"


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mamba_trace.scan.triton import backward, kernels
from mamba_trace.scan.triton import gated_scan, selective_states, explicit_states
from mamba_trace.scan.dual import triton as dual, triton_kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}

def constants(value, path):
    if isinstance(value, tuple):
        return {p: v for i, part in enumerate(value) for p, v in constants(part, (*path, i)).items()}
    return {path: value} if value is None or (isinstance(value, int) and value == 1) else {}

def kind(value):
    if isinstance(value, tuple):
        return tuple(kind(part) for part in value)
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "constexpr" if value is None or (isinstance(value, int) and value == 1) else "i32"

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *values, num_warps, enable_fp_fusion, **blocks):
        names = self.kernel.arg_names
        signature = dict(zip(names, map(kind, values))) | dict.fromkeys(blocks, "constexpr")
        fixed = constants(values, ()) | {(names.index(name),): value for name, value in blocks.items()}
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, signature, fixed)
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        print(self.kernel.__name__, made.asm["cubin"][:4] == b"\\x7fELF")

for module, name in (
    (kernels, "selective_kernel"), (backward, "selective_backward_kernel"),
    (kernels, "explicit_kernel"), (backward, "explicit_backward_kernel"),
    (triton_kernels, "linear_kernel"), (triton_kernels, "linear_backward_kernel"),
):
    setattr(module, name, Compiled(getattr(module, name)))

x, h = torch.rand(1, 9, 40).bfloat16(), torch.zeros(1, 40, 16)
B, A, A_bar = torch.rand(1, 9, 16).bfloat16(), torch.rand(40, 16), torch.rand(1, 9, 40, 16)
gated_scan(x, x, A, B, B, A[:, 0], x, h)
x.requires_grad_()
sum(result.sum() for result in selective_states(x, x, A, B, B, h)).backward()
sum(result.sum() for result in explicit_states(A_bar, A_bar, x, B, h)).backward()
x, delta, B = torch.rand(1, 9, 4, 8).bfloat16(), torch.rand(1, 9, 4), torch.rand(1, 9, 2, 16)
h = torch.rand(1, 4, 8, 16)
dual.gated_scan(x, delta, -delta[0, 0], B, B, delta[0, 0], x, h)
x.requires_grad_()
sum(result.sum() for result in dual.selective_states(x, delta, -delta[0, 0], B, B, h)).backward()
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not: values of changing type, for one."""
    printed = python(COMPILE, tmp_path).split("\n")
    assert set(printed) - {""} == {
        f"{name}{way}_kernel True" for name in ("selective", "explicit", "linear") for way in ("", "_backward")
    }
