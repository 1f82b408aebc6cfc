"""Tensors whose memory does not hold their numbers: no kernel reads it, and results are those of any other tensor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import cuda_stand_ins
import dual_stand_ins
import nnsight
import pytest
import torch
from conftest import TINY, make_hf, near
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.scan import DUAL, SELECTIVE, dispatch
from mamba_trace.scan.norm import rms_norm
from mamba_trace.scan.recompute import in_memory

B, L, E, H, N, K = 2, 5, 16, 2, 3, 4
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "selective": {
        **dict.fromkeys(("x", "delta", "delta_2", "skip"), (B, L, E)),
        **dict.fromkeys(("B", "C"), (B, L, N)),
        **dict.fromkeys(("A_bar", "B_bar"), (B, L, E, N)),
        **{"A": (E, N), "D": (E,), "h_start": (B, E, N)},
    },
    "dual": {
        **dict.fromkeys(("x", "skip"), (B, L, H, E // H)),
        **dict.fromkeys(("delta", "A_bar"), (B, L, H)),
        **dict.fromkeys(("B", "C"), (B, L, 1, N)),
        **{"A": (H,), "D": (H,), "B_bar": (B, L, H, N), "h_start": (B, H, E // H, N)},
    },
    "conv": {"x_in": (B, L, E), "weight": (E, K), "bias": (E,), "before": (B, E, K)},
    "norm": {"x": (B, L, E), "weight": (E,)},
}
SCANS = ("selective_scan", "selective_states", "explicit_scan", "explicit_states", "gated_scan")

Run = Callable[..., Any]


def convolved(x_in: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (dispatch.causal_conv(x_in, weight, bias, before, activate=True, backend=dispatch.BACKENDS["cpu"]),)


def normed(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (rms_norm(x, weight, 1e-3),)


def functions() -> Iterator[Any]:
    """Each function with kernels of its own on each backend that runs here: its shapes, and how it is run."""
    for family in (SELECTIVE, DUAL):
        for name in SCANS:
            for kernels in ("cpu", "triton", "cuda"):
                run = functools.partial(getattr(family, name), kernels=kernels)
                yield pytest.param(family.name, run, id=f"{family.name}-{name}-{kernels}")
    yield pytest.param("conv", convolved, id="conv")
    yield pytest.param("norm", normed, id="norm")


def arguments(shapes: str, run: Run) -> dict[str, Tensor]:
    """Tensors from 0.1 to 1 by name."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name in inspect.signature(run).parameters if name in SHAPES[shapes]]
    return {name: 0.1 + 0.9 * torch.rand(SHAPES[shapes][name], generator=generator) for name in names}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages' kernels in plain PyTorch, and no warnings of underflow from Triton's interpreter."""
    cuda_stand_ins.install(monkeypatch)
    dual_stand_ins.install(monkeypatch)
    numpy = pytest.importorskip("numpy")
    with numpy.errstate(all="ignore"):
        yield


@pytest.mark.parametrize(("shapes", "run"), [*functions()])
def test_the_negative_of_a_tensor_may_be_handed_over(shapes: str, run: Run) -> None:
    given = arguments(shapes, run)
    expected = run(**given)
    for name, tensor in given.items():
        found = run(**{**given, name: torch._neg_view(-tensor)})
        for one, other in zip(found, expected, strict=True):
            near(one, other, 1e-6, name)


@pytest.mark.parametrize(("shapes", "run"), [*functions()])
def test_gradients_come_in_a_batch_and_as_negatives(shapes: str, run: Run) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in arguments(shapes, run).items()}
    leaves, results = [*given.values()], run(**given)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(3, *result.shape, generator=generator) for result in results]
    take = functools.partial(torch.autograd.grad, results, leaves, retain_graph=True)
    one_by_one = [take([weight[row] for weight in weights]) for row in range(3)]
    for row in range(3):
        negatives = take([torch._neg_view(-weight[row]) for weight in weights])
        for name, one, other in zip(given, negatives, one_by_one[row], strict=True):
            near(one, other, 1e-5, f"the gradient of {name}")
    together = take(weights, is_grads_batched=True)
    for name, one, others in zip(given, together, zip(*one_by_one, strict=True), strict=True):
        near(one, torch.stack(others), 1e-5, f"the gradients of {name}")


@pytest.mark.parametrize("model_type", TINY)
def test_a_jacobian_of_a_traced_model_is_taken_at_once(model_type: str) -> None:
    model = MambaTrace(make_hf(model_type=model_type))
    tokens = torch.randint(1, 20, (2, 4), generator=torch.Generator().manual_seed(0))
    with model.trace(tokens):
        read = [model.layers[0].resid_pre.output, model.layers[0].ssm.delta_2.output, model.layers[1].ssm.h[2].output]
        nnsight.save(read)
        logits = model.hook("logits").output[0, -1, :3].save()
    take = functools.partial(torch.autograd.grad, logits, read, retain_graph=True)
    rows = torch.eye(3)
    together = take(rows, is_grads_batched=True)
    for one, others in zip(together, zip(*map(take, rows), strict=True), strict=True):
        near(one, torch.stack(others), 1e-5)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(2), True),
        (torch.nn.Parameter(torch.ones(2)), True),
        (torch.ones(2, 3).mT, True),
        (torch.ones(2).double(), True),
        (torch._neg_view(torch.ones(2)), False),
        (torch.view_as_complex(torch.ones(2, 2)).conj().imag, False),
        (torch._efficientzerotensor(2), False),
        (torch.ones(2).to_sparse(), False),
        (torch.nested.nested_tensor([torch.ones(2)]), False),
        (torch.nn.parameter.UninitializedParameter(), False),
        (None, True),
    ],
)
def test_which_tensors_a_kernel_may_read(tensor: Tensor | None, expected: bool) -> None:
    assert in_memory(tensor) is expected
    assert in_memory(torch.ones(1), tensor) is expected
