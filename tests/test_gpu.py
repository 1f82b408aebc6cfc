"""The real kernels of every backend that runs on a GPU, and a model on them, against the definition there.

Tolerances are of a tensor's largest value. The kernels use the GPU's fast exponential, whose error grows with
the number of positions that a state remembers, so they are not those of the CPU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import nnsight
import pytest
import test_scan_dual
import torch
from conftest import make_hf, near
from hybrid_models import PLAIN, make_hybrid
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError
from mamba_trace.patching import logit_diff, patch_grid
from mamba_trace.scan import DUAL, cuda, reference, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]

DEVICE = torch.device("cuda:0")
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton}
HALVES = (torch.bfloat16, torch.float16)
VALUES, GRADIENTS = 1e-4, 1e-3
#: The least number that float16, and that a kernel in float32, tells from 0.
SMALLEST_HALF, SMALLEST = 1e-7, 1e-30
#: L, N and the dtypes of the inputs; the kernels work in pieces of 64 to 2048 positions.
SIZES: list[tuple[int, int, torch.dtype]] = [
    (1, 16, torch.float32),
    (2, 5, torch.float32),
    (63, 64, torch.float32),
    (63, 256, torch.float32),
    (1000, 16, torch.float32),
    (1024, 1, torch.float32),
    (4097, 5, torch.float32),
    *((length, d_state, dtype) for length, d_state in ((2, 16), (63, 5), (1000, 16)) for dtype in HALVES),
]
ARGUMENTS = {
    "selective_scan": ("x", "delta", "A", "B", "C", "h_start"),
    "selective_states": ("x", "delta", "A", "B", "C", "h_start"),
    "gated_scan": ("x", "delta_2", "A", "B", "C", "D", "skip", "h_start"),
    "explicit_scan": ("A_bar", "B_bar", "x", "C", "h_start"),
    "explicit_states": ("A_bar", "B_bar", "x", "C", "h_start"),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """Each backend that can run here."""
    module = BACKENDS[request.param]
    if (reason := module.unavailable(DEVICE)) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return module


def arguments(function: str, L: int, N: int, dtype: torch.dtype, start: bool, E: int = 6) -> list[Tensor]:
    """The arguments of ``function`` for two rows; delta from 0.002 to 2: some states last, others do not."""
    generator = torch.Generator().manual_seed(L + N)
    B = 2 if L < 2000 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    delta_2 = 1.7 * normal(B, L, E) - 2.5
    makers = {
        "x": lambda: normal(B, L, E),
        "delta_2": lambda: delta_2,
        "delta": lambda: delta_2.exp().clamp(0.002, 2),
        "A": lambda: -normal(E, N).exp(),
        "B": lambda: normal(B, L, N),
        "C": lambda: normal(B, L, N),
        "D": lambda: normal(E),
        "skip": lambda: normal(B, L, E),
        "A_bar": lambda: normal(B, L, E, N).sigmoid(),
        "B_bar": lambda: 0.1 * normal(B, L, E, N),
        "h_start": lambda: normal(B, E, N),
    }
    names = [name for name in ARGUMENTS[function] if start or name != "h_start"]
    return [makers[name]().to(DEVICE, dtype) for name in names]


def weights(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)


def outcome(scan: ModuleType, function: str, inputs: list[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Both results of ``function``, and the gradients of its arguments through each of them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = getattr(scan, function)(*leaves)
    grads = []
    for result in results:
        total = (result * weights(result)).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves)
        grads.append([zero if grad is None else grad for zero, grad in zip(zeros, found, strict=True)])
    return [result.detach() for result in results], grads


@functools.lru_cache(maxsize=1)
def exact(function: str, L: int, N: int, dtype: torch.dtype, start: bool) -> Any:
    """The `outcome` of the definition, in float64."""
    return outcome(reference, function, [t.double() for t in arguments(function, L, N, dtype, start)])


def smallest(actual: Tensor) -> float:
    return SMALLEST_HALF if actual.dtype == torch.float16 else SMALLEST


# -- the functions of a backend --------------------------------------------------------------------------


def compare(backend: ModuleType, function: str, L: int, N: int, dtype: torch.dtype, start: bool) -> None:
    inputs = arguments(function, L, N, dtype, start)
    results, grads = outcome(backend, function, inputs)
    expected, expected_grads = exact(function, L, N, dtype, start)
    rounding = torch.finfo(dtype).eps
    for index, (one, other) in enumerate(zip(results, expected, strict=True)):
        rounded = function == "gated_scan" and index == 0
        assert one.dtype == (dtype if rounded else torch.float32)
        near(one, other, max(VALUES, rounding if rounded else 0), f"result {index}", smallest(one))
    for index, (some, others) in enumerate(zip(grads, expected_grads, strict=True)):
        for name, one, other in zip(ARGUMENTS[function], some, others, strict=False):
            assert one.dtype == dtype
            where = f"gradient of {name} through result {index}"
            near(one, other, max(GRADIENTS, 4 * rounding), where, smallest(one))


@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
@pytest.mark.parametrize(("L", "N", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("function", ["selective_scan", "selective_states", "gated_scan"])
def test_scans(function: str, L: int, N: int, dtype: torch.dtype, start: bool, backend: ModuleType) -> None:
    compare(backend, function, L, N, dtype, start)


@pytest.mark.parametrize("start", [True, False], ids=["start", "no start"])
@pytest.mark.parametrize(("L", "N", "dtype"), [size for size in SIZES if size[0] < 4000], ids=str)
@pytest.mark.parametrize("function", ["explicit_scan", "explicit_states"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # mamba-ssm's kernel takes no matrices
def test_explicit_scans(function: str, L: int, N: int, dtype: torch.dtype, start: bool, backend: ModuleType) -> None:
    compare(backend, function, L, N, dtype, start)


@torch.no_grad()
def test_a_long_prompt(backend: ModuleType) -> None:
    inputs = arguments("selective_scan", 65536, 16, torch.float32, start=True, E=4)
    expected = reference.selective_scan(*[tensor.double() for tensor in inputs])
    for actual, other in zip(backend.selective_scan(*inputs), expected, strict=True):
        near(actual, other, VALUES, "65536 positions")


@pytest.mark.parametrize("function", ["selective_scan", "selective_states", "gated_scan"])
def test_any_layout_will_do(function: str, backend: ModuleType) -> None:
    for L in (1, 128, 130):
        inputs = arguments(function, L, 5, torch.float32, start=False)
        views = []
        for tensor in inputs:
            axes = tuple(reversed(range(tensor.dim())))
            room = torch.full((tensor.numel() + 1,), torch.nan, device=DEVICE)
            room[1:] = tensor.permute(axes).flatten()
            views.append(room[1:].view(tensor.permute(axes).shape).permute(axes))  # at no multiple of 16 bytes
        results, grads = outcome(backend, function, views)
        expected, expected_grads = outcome(backend, function, inputs)
        for one, other in zip(results, expected, strict=True):
            near(one, other.double(), 1e-6, "result")
        for some, others in zip(grads, expected_grads, strict=True):
            for one, other in zip(some, others, strict=True):
                near(one, other.double(), 1e-5, "gradient")  # summed in any order


@pytest.mark.parametrize("function", ["selective_scan", "selective_states", "gated_scan"])
@pytest.mark.parametrize(("decay", "step"), [(500.0, 1.0), (1e6, 1.0), (1.0, 1e4), (1.0, 0.0)])
def test_numbers_at_the_edge(function: str, decay: float, step: float, backend: ModuleType) -> None:
    """A_bar underflows, or is 1: finite everywhere, and the values right."""
    inputs = arguments(function, 130, 16, torch.float32, start=True)
    inputs[2][0] = -decay
    inputs[1][:, ::3] = step
    results, grads = outcome(backend, function, inputs)
    expected = getattr(reference, function)(*[tensor.double() for tensor in inputs])
    for one, other in zip(results, expected, strict=True):
        near(one, other, VALUES, "result", smallest(one))
    assert all(bool(grad.isfinite().all()) for some in grads for grad in some)


def test_states_are_begun_at_and_read_exactly(backend: ModuleType) -> None:
    x, delta, A, B, C, h_start = arguments("selective_scan", 3, 256, torch.float32, start=True)
    for scale in (1e-10, 1.0, 1e10):
        h = (scale * h_start).requires_grad_()
        _, h_last = backend.selective_scan(x, torch.zeros_like(delta), 50 * A, B, C, h)
        near(h_last, h.detach().double(), 1e-6, "h_last")
        (grad,) = torch.autograd.grad(h_last, h, weights(h_last))
        near(grad, weights(h_last).double(), 1e-6, "gradient")


# -- the convolution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("L", [1, 2, 63, 1000, 4096])
def test_the_convolution(L: int, K: int, dtype: torch.dtype) -> None:
    if (reason := cuda.conv_unavailable(DEVICE, dtype, K)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(L)
    shapes = ((2, L, 24), (24, K), (24,), (2, 24, K))
    everything = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    rounding = torch.finfo(dtype).eps
    for kept, activate in (([0, 1, 2, 3], True), ([0, 1, 3], False), ([0, 1, 2], True), ([0, 1], False)):
        found = []
        for scan, chosen in ((cuda, dtype), (reference, torch.float64)):
            leaves = [everything[index].to(chosen, copy=True).requires_grad_() for index in kept]
            by_index: dict[int, Tensor] = dict(zip(kept, leaves, strict=True))
            given = [by_index.get(index) for index in range(4)]
            out = scan.causal_conv(*given, activate=activate)
            found.append((out, *torch.autograd.grad((out * weights(out)).sum(), leaves)))
        for one, other in zip(*found, strict=True):
            assert one.dtype == dtype
            near(one, other, max(VALUES, 4 * rounding), f"of arguments {kept}", smallest(one))


# -- Mamba-2 -----------------------------------------------------------------------------------------------

#: B, L, H, P, G, N; the first is the shape of mamba2-130m.
DUAL_SIZES = [(1, 130, 24, 64, 1, 128), (2, 1, 24, 64, 1, 128), (2, 63, 6, 5, 3, 7), (1, 300, 4, 32, 4, 16)]
#: mamba-ssm's kernel multiplies chunks in TF32, which has ten bits.
TF32 = 3e-3


@pytest.mark.parametrize("sizes", DUAL_SIZES, ids=str)
@pytest.mark.parametrize("function", test_scan_dual.FUNCTIONS)
@pytest.mark.parametrize("kernels", ["auto", *BACKENDS])
def test_scans_of_mamba_2(kernels: str, function: str, sizes: tuple[int, ...]) -> None:
    exactly = test_scan_dual.arguments(function, sizes)
    given = {name: tensor.to(DEVICE, torch.float32) for name, tensor in exactly.items()}
    tolerance = TF32 if kernels == "cuda" else VALUES
    try:
        found = getattr(DUAL, function)(**given, kernels=kernels)
        grads = test_scan_dual.gradients(test_scan_dual.on(kernels, function), given)
    except BackendError as error:
        pytest.skip(str(error))
    y, states = test_scan_dual.written_out(exactly)
    expected = (y, states if function.endswith("states") else states[:, -1])
    for one, other in zip(found, expected, strict=True):
        near(one.cpu(), other, tolerance, function)
    exact_grads = test_scan_dual.gradients(test_scan_dual.on("reference", function), exactly)
    for name, grad in grads.items():
        near(grad.cpu(), exact_grads[name], 10 * tolerance, f"gradient of {name}")


# -- a model ---------------------------------------------------------------------------------------------

ARCHITECTURES = ["mamba", "falcon_mamba", "mamba2", *PLAIN]
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model_on(kernels: str, architecture: str = "mamba", **changes: Any) -> MambaTrace:
    """A tiny model on the GPU; skips if the backend cannot run its scan."""
    hybrid = architecture in PLAIN
    module = make_hybrid(architecture, **changes) if hybrid else make_hf(model_type=architecture, **changes)
    model = MambaTrace(module.to(DEVICE), kernels=kernels)
    try:
        with torch.no_grad():
            model._module(torch.ones(1, 4, dtype=torch.long, device=DEVICE))
    except BackendError as error:
        pytest.skip(f"{kernels}: {error}")
    return model


def traced(model: MambaTrace, tokens: Tensor) -> list[Tensor]:
    """Logits, states that are read before and after an edit, and gradients, of one trace."""
    first, last = model.ssm_layers[0], model.ssm_layers[-1]
    with model.trace(tokens):
        model.layers[first].ssm.h[2].output[:] *= 0.5
        early = model.layers[last].ssm.h[3].output.save()
        late = model.layers[last].ssm.h[-1].output.save()
        y = model.layers[last].ssm.y.output.save()
        logits = model.logits.output.save()
    score = (logits * weights(logits)).sum()
    parameters = [model.layers[layer].ssm._module.A_log for layer in model.ssm_layers]
    embeddings = model._module.get_input_embeddings().weight
    grads = torch.autograd.grad(score, [early, *parameters, embeddings])
    return [logits, early, late, y, *grads]


@pytest.mark.parametrize("kernels", ["auto", *BACKENDS])
@each_model
def test_a_trace_gives_the_numbers_of_the_reference(architecture: str, tokens: Tensor, kernels: str) -> None:
    here = tokens.to(DEVICE)
    actual = traced(model_on(kernels, architecture), here)
    expected = traced(model_on("reference", architecture), here)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        tolerance = VALUES if index < 4 else GRADIENTS  # logits, two states and y, then gradients
        near(one, other.double(), tolerance, f"number {index}")


@pytest.mark.parametrize("kernels", ["auto", *BACKENDS])
@each_model
def test_nothing_watched_gives_the_logits_of_the_reference(architecture: str, tokens: Tensor, kernels: str) -> None:
    here = tokens.to(DEVICE)
    # Tiny hybrids amplify the rounding of bfloat16, which the two backends do at different places.
    for dtype in (torch.float32, *([] if architecture in PLAIN else [torch.bfloat16])):
        with torch.no_grad():
            actual = model_on(kernels, architecture, dtype=dtype)._module(here).logits
            expected = model_on("reference", architecture, dtype=dtype)._module(here).logits
        near(actual, expected.double(), max(VALUES, 8 * torch.finfo(dtype).eps), str(dtype))


@pytest.mark.parametrize("kernels", ["auto", *BACKENDS])
@each_model
def test_decoding_gives_the_tokens_and_states_of_the_reference(architecture: str, tokens: Tensor, kernels: str) -> None:
    found = []
    for model in (model_on(kernels, architecture), model_on("reference", architecture)):
        layer = model.ssm_layers[-1]
        with (
            torch.no_grad(),
            model.generate(tokens.to(DEVICE), max_new_tokens=5, do_sample=False) as tracer,
        ):
            states = nnsight.save([])
            for _ in tracer.iter[:5]:
                states.append(model.layers[layer].ssm.h[-1].output)
            output = tracer.result.save()
        found.append((output, list(states)))
    (actual, states), (expected, expected_states) = found
    assert torch.equal(actual, expected)
    for one, other in zip(states, expected_states, strict=True):
        near(one, other.double(), VALUES, "a state")


@each_model
def test_a_cell_of_a_grid_is_its_own_trace(architecture: str) -> None:
    model, (prompt, source) = model_on("auto", architecture), torch.arange(1, 21).view(2, 1, 10)
    layer = model.ssm_layers[-1]
    grid = patch_grid(model, prompt, source, "h", logit_diff(model, 3, 5), progress=False)
    with torch.no_grad(), model.trace(source):
        state = model.layers[layer].ssm.h[4].output.save()
    with torch.no_grad(), model.trace(prompt):
        model.layers[layer].ssm.h[4].output = state
        logits = model.logits.output[0, -1].save()
    expected = (logits[3] - logits[5]).double()
    near(grid.values[-1, 4].double(), expected.cpu(), VALUES, "a cell", VALUES * float(logits.abs().max()))
