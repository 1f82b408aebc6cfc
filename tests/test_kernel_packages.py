"""What mamba-ssm's and causal-conv1d's own Python is handed, and what is made of what it returns, against float64.

Their releases run over stand-ins for their compiled halves alone, and mamba-ssm's Triton kernels in Triton's
interpreter (`kernel_packages`). The tests skip where pip reaches no package index.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import test_gpu
import torch
from conftest import agree, make_hf, near
from kernel_packages import RELEASES, imported, sources
from test_scan_cuda import FUNCTIONS, NAMES, arguments, compare, compare_gradients, convolution, doubled, weights
from test_scan_dual import arguments as dual_arguments
from test_scan_dual import gradients, rounded, written_out
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.scan import check, cuda, reference
from mamba_trace.scan.cuda import installed
from mamba_trace.scan.dual import cuda as dual_cuda
from mamba_trace.scan.dual import reference as dual_reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the real kernels here")
#: The shape that Triton's interpreter runs in a second: B, L, H, P, G, N, and the positions of a chunk.
SIZES, CHUNK = (1, 19, 2, 3, 1, 4), 16


@pytest.fixture(scope="session")
def folder() -> Path:
    try:
        return sources()
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=RELEASES, ids=" and ".join)
def packages(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, str]]:
    """The releases of mamba-ssm and causal-conv1d that run."""
    with imported(folder, *request.param), numpy.errstate(all="ignore"):
        yield request.param


def test_the_releases_are_those_that_are_declared() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]["cuda"]
    assert declared == [f"{each.name}>={each.oldest}" for each in (installed.CONV, installed.MAMBA)]
    newest, _, oldest = RELEASES
    assert newest == (installed.MAMBA.newest, installed.CONV.newest)
    for package, release in zip((installed.MAMBA, installed.CONV), oldest, strict=True):
        assert release.startswith(f"{package.oldest}.")


def test_every_function_is_found_and_gets_its_example_right(packages: tuple[str, str]) -> None:
    cpu = torch.device("cpu")
    assert (str(installed.MAMBA), str(installed.CONV)) == (f"mamba-ssm {packages[0]}", f"causal-conv1d {packages[1]}")
    for reason in (cuda.unavailable(cpu), cuda.conv_unavailable(cpu), cuda.conv_misfit(), dual_cuda.unavailable()):
        assert reason is None, reason
    assert check("cuda") == check("cuda", "dual") == "cuda"


@pytest.mark.usefixtures("packages")
def test_the_scan_of_mamba() -> None:
    """Lengths at which rows begin at multiples of 16 bytes and others; a state to begin at, none; every gradient."""
    for function in FUNCTIONS:
        for sizes, start in (((2, 1, 5, 3), True), ((1, 7, 1, 4), False), ((3, 8, 6, 1), True), ((2, 16, 3, 5), False)):
            inputs = arguments(function, *sizes, start=start)
            compare(function, inputs)
            for through in ("first", "second"):
                compare_gradients(function, inputs, through)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_scan_of_mamba_in_half_precision(dtype: torch.dtype) -> None:
    for start in (True, False):
        inputs = [tensor.to(dtype) for tensor in arguments("gated_scan", 2, 9, 4, 3, start=start)]
        first, second = cuda.gated_scan(*inputs)
        assert (first.dtype, second.dtype) == (dtype, torch.float32)
        expected = reference.gated_scan(*doubled(inputs))
        near(first, expected[0], torch.finfo(dtype).eps)
        near(second, expected[1], 1e-5)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        grads = torch.autograd.grad((cuda.gated_scan(*leaves)[0] * weights(first)).sum(), leaves)
        exact = [tensor.requires_grad_() for tensor in doubled(inputs)]
        others = torch.autograd.grad((reference.gated_scan(*exact)[0] * weights(expected[0])).sum(), exact)
        for name, grad, other in zip(NAMES["gated_scan"], grads, others, strict=False):
            near(grad, other, 4 * torch.finfo(dtype).eps, name)


@pytest.mark.usefixtures("packages")
def test_the_convolution() -> None:
    dtypes = ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2))
    for L, K, bias, before, silu in ((1, 4, True, True, True), (7, 3, False, False, False), (8, 2, True, True, False)):
        for dtype, tolerance in dtypes:
            inputs, found = convolution(L, K, bias, before, dtype), []
            for scan, chosen in ((cuda, dtype), (reference, torch.float64)):
                leaves = [
                    None if tensor is None else tensor.to(chosen, copy=True).requires_grad_() for tensor in inputs
                ]
                out = scan.causal_conv(*leaves, activate=silu)
                wanted = [leaf for leaf in leaves if leaf is not None]
                found.append((out, *torch.autograd.grad((out * weights(out)).sum(), wanted)))
            for index, (one, other) in enumerate(zip(*found, strict=True)):
                near(one, other, tolerance, f"{index} of {L, K, dtype}")


@pytest.mark.usefixtures("packages")
def test_states_and_sequences_of_the_convolution() -> None:
    """Not called by this package, but by mamba-ssm: their numbers are those of the definition too."""
    kernel: Any = installed.conv_kernel()
    generator = torch.Generator().manual_seed(0)
    x, first = (torch.randn(2, length, 8, generator=generator).transpose(1, 2) for length in (7, 3))
    weight, bias = torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)
    define = functools.partial(reference.causal_conv, activate=True)
    out, final = kernel(x, weight, bias, initial_states=first, return_final_states=True, activation="silu")
    before = torch.cat((torch.zeros(2, 8, 1), first), dim=-1)
    near(out, define(*doubled([x.transpose(1, 2), weight, bias, before])).transpose(1, 2), 1e-5)
    assert torch.equal(final, x[..., -3:])
    out = kernel(x, weight, bias, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2).int(), activation="silu")
    for part in (slice(0, 3), slice(3, 7)):
        alone = define(*doubled([x[..., part].transpose(1, 2), weight, bias]))
        near(out[..., part], alone.transpose(1, 2), 1e-5, "a sequence")
    with pytest.raises(AssertionError):
        kernel(x.contiguous(), weight, bias, initial_states=first)


def test_the_gradients_of_mamba_2(packages: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a state to begin at, through both results; in two chunks in the newest release."""
    monkeypatch.setattr(dual_cuda, "CHUNK", CHUNK)
    exact = dual_arguments("selective_scan", SIZES if packages == RELEASES[0] else (1, 5, *SIZES[2:]))
    expected = gradients(dual_reference.selective_scan, exact)
    for name, grad in gradients(dual_cuda.selective_scan, rounded(exact)).items():
        near(grad, expected[name], 1e-5, name)


@torch.no_grad()
def test_the_values_of_mamba_2(packages: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of two chunks with the gate, one position, and in the newest release chunks of the size that we use."""
    whole = [(dual_cuda.CHUNK, "selective_scan", (5, 1))] * (packages == RELEASES[0])
    for chunk, function, (length, groups) in (
        (CHUNK, "gated_scan", (19, 2)),
        (CHUNK, "gated_scan", (1, 1)),
        (CHUNK, "selective_scan", (1, 2)),
        *whole,
    ):
        monkeypatch.setattr(dual_cuda, "CHUNK", chunk)
        exact = dual_arguments(function, (1, length, 2, 3, groups, 4))
        y, states = written_out(exact)
        out, h_last = getattr(dual_cuda, function)(*rounded(exact).values())
        near(out, y, 1e-5, f"the output of {function}")
        near(h_last, states[:, -1], 1e-5, "the last state")


# -- what runs on a GPU in one command -------------------------------------------------------------------


@pytest.fixture
def small_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The GPU's benchmark, on the CPU and of models that Triton's interpreter can run."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    forward, gpu = importlib.import_module("forward"), importlib.import_module("gpu")
    monkeypatch.setattr(forward, "LAYER", 1)
    small = {"DEVICE": torch.device("cpu"), "VOCABULARY": 48, "PROMPT": 6, "NEW_TOKENS": 3}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    return gpu


def checkpoint(other: Any, folder: Path, kernels: str) -> MambaTrace:
    """The model of mamba-ssm as its own checkpoint, loaded here."""
    other.save_pretrained(folder)
    with warnings.catch_warnings(action="ignore"):  # it has no tokenizer
        return MambaTrace(folder, kernels=kernels, dispatch=True)


newest = pytest.mark.parametrize("packages", RELEASES[:1], indirect=True, ids=" and ".join)


@newest
@pytest.mark.usefixtures("packages")
@torch.no_grad()
def test_mamba_ssm_s_own_model_has_the_logits_of_ours(small_benchmark: ModuleType, tmp_path: Path) -> None:
    tokens = small_benchmark.random_tokens(7)
    for kernels, shape in (
        ("cuda", {"num_hidden_layers": 2, "hidden_size": 16, "state_size": 16}),
        ("reference", {"num_hidden_layers": 1, "hidden_size": 32, "state_size": 128, "num_heads": 1}),
    ):
        other = small_benchmark.theirs(shape, torch.float32)
        assert other is not None
        model = checkpoint(other, tmp_path / kernels, kernels)
        agree(model._module(tokens).logits, other(tokens).logits)
        assert {call.backend for run in model.last_run for call in run.calls} >= {kernels}
        if "num_heads" not in shape:  # a prompt of Mamba-2 needs its heads in eights, which would take minutes here
            expected = other.generate(tokens, max_length=10)
            assert torch.equal(model._module.generate(tokens, max_new_tokens=3, do_sample=False), expected)


@newest
@pytest.mark.usefixtures("packages")
def test_every_contender_of_the_benchmark_runs(small_benchmark: ModuleType) -> None:
    """All but CUDA graphs, which stand-ins cannot capture; in the dtype of most runs."""
    shape, dtype = {"num_hidden_layers": 2, "hidden_size": 16, "state_size": 16}, torch.bfloat16
    model, other = small_benchmark.ours(shape, dtype, "cuda"), small_benchmark.theirs(shape, dtype)
    runs = [small_benchmark.prefill(model, other, 7), small_benchmark.decode(model, other)]
    runs.append(small_benchmark.heatmap(model, 3))
    assert all("mamba_ssm" in some for some in runs[:2])
    with torch.no_grad():
        for name, run in {name: run for some in runs for name, run in some.items()}.items():
            if name != "mamba_ssm, CUDA graph":
                assert small_benchmark.synchronised(run)() == 1, name
    assert {call.backend for layer in model.last_run for call in layer.calls} == {"cuda"}


@newest
@pytest.mark.usefixtures("packages")
def test_the_gpu_tests_meet_no_wrong_argument(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of test_gpu.py on the CPU, of sizes that are small enough for it."""
    monkeypatch.setattr(test_gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(dual_cuda, "CHUNK", CHUNK)
    small = {"num_hidden_layers": 1, "num_heads": 2, "head_dim": 12, "n_groups": 1}
    monkeypatch.setattr(test_gpu, "make_hf", functools.partial(make_hf, **small))
    for function in FUNCTIONS:
        for L, N, dtype in ((1, 16, torch.float32), (63, 5, torch.bfloat16)):
            test_gpu.compare(cuda, function, L, N, dtype, start=True)
    for architecture, prompt in (("mamba", tokens), ("mamba2", tokens[:1, :5])):
        test_gpu.test_a_trace_gives_the_numbers_of_the_reference(architecture, prompt, "cuda")
        test_gpu.test_decoding_gives_the_tokens_and_states_of_the_reference(architecture, prompt, "cuda")


def test_the_oldest_convolution_does_not_serve_mamba_ssm_s_own_model(
    packages: tuple[str, str], small_benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no module of functions in C++, so that the benchmark has no rows of mamba_ssm's; it serves ours."""
    found = small_benchmark.theirs({"num_hidden_layers": 1, "hidden_size": 16, "state_size": 16}, torch.float32)
    left_out = "mamba_ssm's rows are left out: AssertionError: causal_conv1d_cuda is not available"
    assert (found is None) == capsys.readouterr().out.startswith(left_out) == (packages == RELEASES[-1])
