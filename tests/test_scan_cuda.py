"""The backend over mamba-ssm's and causal-conv1d's kernels, with stand-ins for these, against float64.

What the real kernels compute is tested in test_gpu.py; here it is what they are given and what is made of it.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_stand_ins
import pytest
import torch
from conftest import agree, make_hf, near
from cuda_stand_ins import StandIns
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError
from mamba_trace.scan import check, cuda, dispatch, reference
from mamba_trace.scan.cuda import conv_failure, installed, scan_failure

TOLERANCE = 1e-5  # of a tensor's largest value
FUNCTIONS = ("selective_scan", "selective_states", "gated_scan")
NAMES = {
    "selective_scan": ("x", "delta", "A", "B", "C", "h_start"),
    "selective_states": ("x", "delta", "A", "B", "C", "h_start"),
    "gated_scan": ("x", "delta_2", "A", "B", "C", "D", "skip", "h_start"),
}
#: B, L, E, N
SHAPES = [(1, 1, 1, 1), (2, 1, 5, 3), (1, 8, 1, 3), (3, 7, 6, 1), (2, 24, 5, 16), (1, 33, 3, 40)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return cuda_stand_ins.install(monkeypatch)


def arguments(function: str, B: int, L: int, E: int, N: int, start: bool = True) -> list[Tensor]:
    """The arguments of ``function`` in float32, the last of them h_start if there is a ``start``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    delta_2 = 1.7 * normal(B, L, E) - 2.5
    values = {
        "x": normal(B, L, E),
        "delta_2": delta_2,
        "delta": delta_2.exp().clamp(0.002, 2),
        "A": -normal(E, N).exp(),
        "B": normal(B, L, N),
        "C": normal(B, L, N),
        "D": normal(E),
        "skip": normal(B, L, E),
        "h_start": normal(B, E, N),
    }
    return [values[name] for name in NAMES[function] if start or name != "h_start"]


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in inputs]


close = functools.partial(near, tolerance=TOLERANCE)


def weights(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)


def gradients(run: Callable[..., Any], inputs: list[Tensor], through: str) -> list[Tensor]:
    """The gradient of each of ``inputs`` through the first result, the second or both, weighted at random."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    first, second = run(*leaves)
    chosen = {"first": [first], "second": [second], "both": [first, second]}[through]
    total = torch.stack([(result * weights(result)).sum().to(torch.float64) for result in chosen]).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def compare(function: str, inputs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """The values of ``function`` beside those of the definition in float64."""
    actual = getattr(cuda, function)(*inputs)
    expected = getattr(reference, function)(*doubled(inputs))
    for name, one, other in zip(("first result", "second result"), actual, expected, strict=True):
        close(one, other, what=f"{name} of {function}", tolerance=tolerance)


def compare_gradients(function: str, inputs: list[Tensor], through: str) -> None:
    actual = gradients(getattr(cuda, function), inputs, through)
    expected = gradients(getattr(reference, function), doubled(inputs), through)
    for name, one, other in zip(NAMES[function], actual, expected, strict=False):
        close(one, other, what=f"gradient of {name} through {through} of {function}")


# -- values and gradients --------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_float64(function: str, shape: tuple[int, ...], start: bool) -> None:
    inputs = arguments(function, *shape, start=start)
    compare(function, inputs)
    first, second = getattr(cuda, function)(*inputs)
    assert first.dtype == second.dtype == torch.float32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("through", ["first", "second", "both"])
@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_float64(function: str, shape: tuple[int, ...], start: bool, through: str) -> None:
    compare_gradients(function, arguments(function, *shape, start=start), through)


@pytest.mark.usefixtures("kernels")
def test_results_may_be_edited_in_place() -> None:
    """As a trace does with every value, the scan's arguments being kept for the gradient."""
    for function in FUNCTIONS:
        grads = []
        for scan, inputs in (
            (cuda, arguments(function, 1, 5, 1, 1)),
            (reference, doubled(arguments(function, 1, 5, 1, 1))),
        ):
            leaves = [tensor.requires_grad_() for tensor in inputs]
            for index in (0, 1):
                result = getattr(scan, function)(*leaves)[index]
                result[:, :1] *= 3
                grads.append(torch.autograd.grad(result.sum(), leaves[0])[0].double())
        torch.testing.assert_close(grads[:2], grads[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_argument_alone_may_ask_for_its_gradient(function: str) -> None:
    inputs = arguments(function, 1, 6, 4, 3)
    expected = gradients(getattr(cuda, function), inputs, "both")
    for index, name in enumerate(NAMES[function]):
        leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
        first, second = getattr(cuda, function)(*leaves)
        total = (first * weights(first)).sum() + (second * weights(second)).sum()
        close(torch.autograd.grad(total, leaves[index])[0], expected[index].double(), what=name, tolerance=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_those_of_the_reference(function: str) -> None:
    found = []
    for scan, inputs in (
        (cuda, arguments(function, 1, 4, 3, 2)),
        (reference, doubled(arguments(function, 1, 4, 3, 2))),
    ):
        leaves = [tensor.requires_grad_() for tensor in inputs]
        first, second = getattr(scan, function)(*leaves)
        total = (first.square() * weights(first)).sum() + (second.square() * weights(second)).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for name, actual, expected in zip(NAMES[function], *found, strict=True):
        close(actual, expected, what=f"second derivative of {name}")


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with the axes laid out in reverse, every second place unused and full of NaN."""
    axes = tuple(reversed(range(tensor.dim())))
    wide = torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1).flatten(-2)
    return wide.permute(axes).contiguous().permute(axes)[..., ::2]


def off_by_one(tensor: Tensor) -> Tensor:
    """The same numbers, beginning at no multiple of 16 bytes, the axes laid out in reverse."""
    axes = tuple(reversed(range(tensor.dim())))
    turned = tensor.permute(axes)
    room = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
    room[1:] = turned.flatten()
    return room[1:].view(turned.shape).permute(axes)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", [strided, off_by_one])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
def test_any_layout_will_do(function: str, start: bool, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((2, 16, 3, 4), (1, 16, 1, 1), (2, 1, 3, 4)):
        inputs = [layout(tensor) for tensor in arguments(function, *shape, start=start)]
        compare(function, inputs)
        for through in ("first", "second"):
            compare_gradients(function, inputs, through)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", [strided, off_by_one])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_of_any_layout_comes_back(function: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, *others = arguments(function, 2, 16, 3, 4, start=False)
    leaf = x.requires_grad_()
    first, _ = getattr(cuda, function)(leaf, *others)
    grad = weights(first)
    (expected,) = torch.autograd.grad(first, leaf, grad, retain_graph=True)
    (actual,) = torch.autograd.grad(first, leaf, layout(grad), retain_graph=True)
    assert torch.equal(actual, expected)
    (summed,) = torch.autograd.grad(first.sum(), leaf)  # strides of 0
    assert bool(summed.any())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_is_rounded_once(function: str, start: bool, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in arguments(function, 2, 9, 4, 3, start=start)]
    first, second = getattr(cuda, function)(*inputs)
    assert first.dtype == (dtype if function == "gated_scan" else torch.float32)
    assert second.dtype == torch.float32
    expected = getattr(reference, function)(*doubled(inputs))
    rounding = torch.finfo(dtype).eps if function == "gated_scan" else TOLERANCE
    close(first, expected[0], what="first result", tolerance=rounding)
    close(second, expected[1], what="second result")
    exact = gradients(getattr(reference, function), doubled(inputs), "first")
    for name, actual, other in zip(
        NAMES[function], gradients(getattr(cuda, function), inputs, "first"), exact, strict=False
    ):
        assert actual.dtype == dtype
        close(actual, other, what=name, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_may_be_mixed(function: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    inputs = [tensor.to(dtypes[i % 3]) for i, tensor in enumerate(arguments(function, 2, 9, 4, 3))]
    for some in (inputs, inputs[:-1]):
        compare(function, some)
        for tensor, grad in zip(some, gradients(getattr(cuda, function), some, "both"), strict=True):
            assert grad.dtype == tensor.dtype


# -- virtual positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["selective_scan", "gated_scan"])
def test_virtual_positions_are_added_where_they_are_needed(kernels: StandIns, function: str) -> None:
    L, N = 9, 5
    for start in (False, True):
        inputs = arguments(function, 2, L, 4, N, start=start)
        before = N if start else 0
        getattr(cuda, function)(*inputs)
        with torch.no_grad():
            getattr(cuda, function)(*[tensor.clone().requires_grad_() for tensor in inputs])
        assert kernels.lengths() == [before + L] * 2  # without a gradient none at the end
        kernels.calls.clear()
        for through, after in (("first", 0), ("second", N), ("both", N)):
            gradients(getattr(cuda, function), inputs, through)
            assert kernels.lengths() == [before + L, before + L + after]
            assert ["grad" in call.flags for call in kernels.calls] == [False, True]
            kernels.calls.clear()


def test_the_states_are_scans_of_one_component_each(kernels: StandIns) -> None:
    cuda.selective_states(*arguments("selective_states", 2, 9, 4, 5))
    assert [call.shapes["A"] for call in kernels.calls] == [(4, 1)] * 5
    assert kernels.lengths() == [10] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_scan_is_one_fused_call(kernels: StandIns, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in arguments("gated_scan", 2, 9, 4, 5)]
    cuda.gated_scan(*inputs[:-1])
    cuda.gated_scan(*inputs)
    plain, begun = kernels.calls
    assert plain.flags == {"D", "z", "softplus", "last_state"}
    assert begun.flags == {"D", "z", "last_state"}
    assert (plain.dtype, begun.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("function", ["selective_scan", "selective_states"])
def test_outputs_that_are_to_be_precise_are_computed_in_float32(kernels: StandIns, function: str) -> None:
    inputs = [tensor.half() for tensor in arguments(function, 2, 9, 4, 5, start=False)]
    getattr(cuda, function)(*inputs)
    assert {call.dtype for call in kernels.calls} == {torch.float32}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e20])
def test_a_state_is_begun_at_exactly(scale: float) -> None:
    """A position that neither forgets nor writes leaves what was written before it."""
    generator = torch.Generator().manual_seed(0)
    h_start = scale * torch.randn(2, 4, 16, generator=generator)
    A = -torch.linspace(1e-3, 500, 64).reshape(4, 16)
    zeros = [torch.zeros(2, 1, width) for width in (4, 4, 16, 16)]
    _, h_last = cuda.selective_scan(zeros[0], zeros[1], A, *zeros[2:], h_start)
    assert torch.equal(h_last, h_start)
    _, states = cuda.selective_states(zeros[0], zeros[1], A, *zeros[2:], h_start)
    assert torch.equal(states[:, 0], h_start)


# -- numbers at the edge ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("decay", [0.0, 500.0, 1e6, 1e30])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_decay_gives_numbers(function: str, decay: float) -> None:
    inputs = arguments(function, 2, 8, 3, 16)
    inputs[2][0] = -decay
    inputs[2][1, 3] = -decay
    if decay < 1e9:
        compare(function, inputs)
    for through in ("first", "second"):
        for grad in gradients(getattr(cuda, function), inputs, through):
            assert bool(grad.isfinite().all())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_extreme_steps_give_numbers(function: str, step: float) -> None:
    """A large step forgets everything, A_bar being 0; a step of zero neither forgets nor writes."""
    inputs = arguments(function, 2, 8, 3, 5)
    inputs[1][:, ::3] = step if function != "gated_scan" or step else -1e4
    if step > 1e9:
        inputs[0] = inputs[0] / step  # so that delta x stays finite
    compare(function, inputs)
    for through in ("first", "second"):
        if step < 1e9:
            compare_gradients(function, inputs, through)
        for grad in gradients(getattr(cuda, function), inputs, through):
            assert bool(grad.isfinite().all())


# -- the convolution -------------------------------------------------------------------------------------


def convolution(L: int, K: int, bias: bool, before: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, L, 5), (5, K), (5,), (2, 5, K))
    x_in, weight, *others = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [
        x_in,
        weight,
        *(value if kept else None for value, kept in zip(others, (bias, before), strict=True)),
    ]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("activate", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "no before"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("L", "K"), [(1, 4), (2, 2), (7, 3), (16, 4)])
def test_the_convolution(L: int, K: int, bias: bool, before: bool, activate: bool) -> None:
    inputs = convolution(L, K, bias, before)
    found = []
    for scan, dtype in ((cuda, torch.float32), (reference, torch.float64)):
        for layout in (torch.clone, strided):
            leaves = [None if t is None else layout(t.to(dtype)).requires_grad_() for t in inputs]
            out = scan.causal_conv(*leaves, activate=activate)
            wanted = [leaf for leaf in leaves if leaf is not None]
            grads = torch.autograd.grad((out * weights(out)).sum(), wanted)
            found.append((out, *grads))
    expected = found[-1]
    for result in found[:2]:
        for index, (one, other) in enumerate(zip(result, expected, strict=True)):
            close(one, other, what=f"result {index}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_convolution_in_half_precision(kernels: StandIns, dtype: torch.dtype) -> None:
    inputs = convolution(7, 4, True, True, dtype)
    out = cuda.causal_conv(*inputs, activate=True)
    assert out.dtype == dtype
    close(out, reference.causal_conv(*doubled(inputs), activate=True), what="conv", tolerance=torch.finfo(dtype).eps)
    assert kernels.calls[0].flags == {"bias", "silu"}
    assert kernels.lengths() == [10]  # three columns before
    cuda.causal_conv(inputs[0], inputs[1].float(), inputs[2])  # the bias follows the weight


@pytest.mark.usefixtures("kernels")
def test_second_derivatives_of_the_convolution() -> None:
    found = []
    for scan, dtype in ((cuda, torch.float32), (reference, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in convolution(6, 3, True, True)]
        out = scan.causal_conv(*leaves, activate=True)
        grads = torch.autograd.grad((out.square() * weights(out)).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, what="second derivative")


# -- why it cannot run -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place for packages that are found first, nothing of them remembered before or after."""
    packages = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    found = (installed.scan_kernel, installed.conv_kernel)  # a test may put others in their place
    for cached in found:
        cached.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    for cached in found:
        cached.cache_clear()


def write_mamba(place: Path, interface: str, release: str | None = None) -> None:
    """A package mamba_ssm whose module of the scan is ``interface``."""
    if release is not None:
        write_release(place, "mamba_ssm", release)
    (place / "mamba_ssm" / "ops").mkdir(parents=True)
    for package in (place / "mamba_ssm", place / "mamba_ssm" / "ops"):
        (package / "__init__.py").write_text("")
    (place / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(interface)


def write_release(place: Path, name: str, release: str) -> None:
    """What says which release of a package is installed."""
    (place / f"{name}-{release}.dist-info").mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {release}\n"
    (place / f"{name}-{release}.dist-info" / "METADATA").write_text(about)


@pytest.mark.usefixtures("fresh")
def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.unavailable() == f"it needs mamba-ssm: {cuda.INSTALL_SCAN}"
    assert cuda.conv_unavailable() == f"it needs causal-conv1d: {cuda.INSTALL_CONV}"
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install" in cuda.INSTALL_SCAN


@pytest.mark.usefixtures("fresh")
def test_without_a_device_installing_alone_is_not_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = "PyTorch finds no CUDA device (torch.cuda.is_available() is False), and it needs"
    assert cuda.unavailable() == f"{first} mamba-ssm: {cuda.INSTALL_SCAN}"
    assert cuda.conv_unavailable() == f"{first} causal-conv1d: {cuda.INSTALL_CONV}"
    with pytest.raises(BackendError, match="kernels='cuda' cannot run: PyTorch finds no CUDA device"):
        check("cuda")
    gpu = torch.device("cuda")
    assert cuda.unavailable(gpu) == f"it needs mamba-ssm: {cuda.INSTALL_SCAN}", "its inputs are on one"


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        ("import selective_scan_cuda", "ModuleNotFoundError: No module named 'selective_scan_cuda'"),
        (
            "try:\n    import selective_scan_cuda\nexcept ImportError:\n    selective_scan_cuda = None\n"
            "def selective_scan_fn(): raise AssertionError",
            "ImportError: selective_scan_cuda was not built",
        ),
        ("raise OSError('libcudart.so.12: cannot open\\nmore')", "OSError: libcudart.so.12: cannot open"),
        ("selective_scan_cuda = 1", "AttributeError: .* has no attribute 'selective_scan_fn'"),
    ],
)
def test_installed_without_its_kernel(fresh: Path, interface: str, reason: str) -> None:
    write_mamba(fresh, interface)
    message = cuda.unavailable(torch.device("cuda", 0))
    assert message is not None
    whole = rf"mamba-ssm is installed without a working kernel \({reason}\): {re.escape(cuda.INSTALL_SCAN)}"
    assert re.fullmatch(whole, message), message


def test_a_convolution_that_does_not_import(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (fresh / "causal_conv1d").mkdir()
    (fresh / "causal_conv1d" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert cuda.conv_unavailable() == (
        "causal-conv1d is installed without a working kernel (ImportError: undefined symbol: _ZN3c10): "
        f"{cuda.INSTALL_CONV}"
    )


def test_what_is_installed_is_what_runs(fresh: Path) -> None:
    names = ", ".join(installed.SELECTIVE_SCAN.parameters)
    write_mamba(fresh, f"selective_scan_cuda = 1\ndef selective_scan_fn({names}, more=None): return 'ran'", "2.10rc1")
    kernel = installed.scan_kernel()
    assert not isinstance(kernel, str), kernel
    assert kernel(*names.split(", ")) == "ran"


# -- another release is installed ------------------------------------------------------------------------


SIGNATURE = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
CONV_SIGNATURE = "x, weight, bias=None, seq_idx=None, activation=None"
#: A release, the parameters of its function, and what is said of it.
MISFITS = [
    ("2.2.6.post3", SIGNATURE, "mamba-ssm 2.2.6.post3 is too old, 2.3 is the first release to use: "),
    ("1.9", SIGNATURE, "mamba-ssm 1.9 is too old, 2.3 is the first release to use: "),
    (
        "2.4",
        f"{SIGNATURE}, *, head",
        "mamba-ssm 2.4 has another selective_scan_fn .* argument: 'head'.*has been tested: ",
    ),
    ("3.0", SIGNATURE.replace("delta,", "dt,"), "mamba-ssm 3.0 has another selective_scan_fn .* 'd.*has been tested: "),
]


@pytest.mark.parametrize(("release", "parameters", "words"), MISFITS, ids=[misfit[0] for misfit in MISFITS])
def test_a_release_that_does_not_fit_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, release: str, parameters: str, words: str
) -> None:
    """By kernels="cuda" before anything runs; kernels="auto" passes over it and its report says so."""
    called = "def selective_scan_fn(" + parameters + "): raise AssertionError('it was called')"
    write_mamba(fresh, f"selective_scan_cuda = 1\n{called}", release)
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cpu",))
    words += re.escape(f"{cuda.INSTALL_SCAN}=={installed.MAMBA.newest}")
    with pytest.raises(BackendError, match=f"kernels='cuda' cannot run: {words}$"):
        MambaTrace(make_hf(), kernels="cuda")
    monkeypatch.setitem(dispatch.SUITABLE, "cpu", ("cuda", "triton"))
    model = MambaTrace(make_hf())
    with torch.no_grad(), model.trace([[1, 2, 3]]):
        logits = model.lm_head.output.save()
    for run in model.last_run:
        assert [call.backend for call in run.calls] == ["PyTorch", "triton"]
        assert len(run.reasons) == 1
        assert re.fullmatch(f"cuda: {words}", run.reasons[0])
    agree(logits, make_hf()(torch.tensor([[1, 2, 3]])).logits)
    assert model.last_run[0].reasons[0] in str(model.last_run)


@pytest.mark.parametrize(
    ("release", "parameters", "words"),
    [
        pytest.param(
            "1.4.0", CONV_SIGNATURE, "causal-conv1d 1.4.0 is too old, 1.5 is the first release to use: ", id="1.4"
        ),
        pytest.param(
            "2.0",
            "x, weight, bias=None",
            "causal-conv1d 2.0 has another causal_conv1d_fn .*'activation'.*has been tested: ",
            id="2.0",
        ),
    ],
)
def test_a_convolution_that_does_not_fit_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, release: str, parameters: str, words: str
) -> None:
    write_release(fresh, "causal_conv1d", release)
    (fresh / "causal_conv1d").mkdir()
    called = f"def causal_conv1d_fn({parameters}): raise AssertionError('it was called')"
    (fresh / "causal_conv1d" / "__init__.py").write_text(called)
    stand_ins = StandIns()
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(installed, "scan_kernel", lambda: stand_ins.selective_scan_fn)
    words += re.escape(f"{cuda.INSTALL_CONV}=={installed.CONV.newest}")
    with pytest.raises(BackendError, match=f"kernels='cuda' cannot run: {words}$"):
        check("cuda")
    monkeypatch.setitem(dispatch.SUITABLE, "cpu", ("cuda", "triton"))
    model = MambaTrace(make_hf())
    with torch.no_grad(), model.trace([[1, 2, 3]]):
        model.lm_head.output.save()
    for run in model.last_run:
        assert [call.backend for call in run.calls] == ["PyTorch", "cuda"]
        assert len(run.reasons) == 1
        assert re.fullmatch(f"cuda: {words}", run.reasons[0])


@pytest.mark.usefixtures("kernels")
def test_unsuitable_inputs_are_named() -> None:
    cpu = torch.device("cpu")
    assert cuda.unavailable() is None
    assert cuda.unavailable(cpu, torch.float32, 256) is None
    assert cuda.unavailable(cpu, torch.float64) == "it computes in float32, not torch.float64"
    assert cuda.unavailable(cpu, d_state=300) == "it takes a state of at most 256, not 300"
    assert cuda.conv_unavailable(cpu, torch.bfloat16, 2) is None
    assert cuda.conv_unavailable(cpu, width=5) == "it convolves over 2 to 4 positions, not 5"
    reason = "it computes in float32, float16, bfloat16, not torch.float64"
    assert cuda.conv_unavailable(cpu, torch.float64) == reason


def test_a_model_elsewhere_is_told_where_to_go(kernels: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cuda",))
    reason = "the model is on cpu, and it runs on a CUDA device alone: model.to('cuda')"
    assert cuda.unavailable(torch.device("cpu")) == reason
    assert cuda.conv_unavailable(torch.device("cpu")) == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "PyTorch finds no CUDA device (torch.cuda.is_available() is False)"
    assert cuda.unavailable() == cuda.conv_unavailable() == reason
    assert not kernels.calls


def test_a_kernel_is_tried_before_it_is_used(kernels: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    def broken(*inputs: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    def wrong(*inputs: Any, **options: Any) -> Any:
        out, last_state = kernels.selective_scan_fn(*inputs, **options)
        return 1.01 * out, last_state

    def nan(*inputs: Any, **options: Any) -> Any:
        return torch.full_like(options["x"], torch.nan)

    assert scan_failure.__wrapped__(cpu) is None
    assert conv_failure.__wrapped__(cpu) is None
    assert [call.name for call in kernels.calls] == ["scan", "conv"]
    monkeypatch.setattr(cuda, "scan_failure", scan_failure.__wrapped__)
    monkeypatch.setattr(cuda, "conv_failure", conv_failure.__wrapped__)
    monkeypatch.setattr(installed, "scan_kernel", lambda: broken)
    failed = "its kernel fails here (RuntimeError: CUDA error: no kernel image is available)"
    assert cuda.unavailable(cpu) == failed
    assert cuda.unavailable() is None  # in general
    monkeypatch.setattr(installed, "scan_kernel", lambda: wrong)
    assert str(cuda.unavailable(cpu)).startswith("its kernel is wrong here, by ")
    monkeypatch.setattr(installed, "conv_kernel", lambda: nan)
    assert str(cuda.conv_unavailable(cpu)).startswith("its kernel is wrong here, by nan")


def test_importing_pulls_in_no_kernel(tmp_path: Path) -> None:
    for name in ("mamba_ssm", "causal_conv1d", "triton"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError(f'{__name__} was imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mamba_trace.scan.cuda"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
