"""``kernels=``: every backend gives the model the same numbers, whatever a trace does to it."""

from __future__ import annotations

import subprocess
import sys

import nnsight
import pytest
import torch
from conftest import ModuleFactory, agree
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError

BACKENDS = ("reference", "cpu", "auto")
LENGTH = 9


@pytest.fixture(scope="module")
def models(tiny_hf: ModuleFactory) -> dict[str, MambaTrace]:
    """The same weights under every choice of ``kernels``."""
    return {kernels: MambaTrace(tiny_hf(), kernels=kernels) for kernels in BACKENDS}


def parameter_gradients(model: MambaTrace, score: Tensor) -> dict[str, Tensor]:
    model._module.zero_grad()
    score.backward()
    return {name: parameter.grad.clone() for name, parameter in model._module.named_parameters()}


def weighted(logits: Tensor) -> Tensor:
    """A score that every logit enters with a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    return (logits * torch.randn(logits.shape, generator=generator).to(logits.dtype)).sum()


# -- the same numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["cpu", "auto"])
def test_logits_states_and_gradients_are_those_of_the_reference(
    models: dict[str, MambaTrace], tokens: Tensor, kernels: str
) -> None:
    found = []
    for model in (models["reference"], models[kernels]):
        with model.trace(tokens):
            state = model.layers[1].ssm.h[4].output.save()
            whole = model.layers[2].ssm.h.output.save()
            logits = model.lm_head.output.save()
        (gradient,) = torch.autograd.grad(weighted(logits), state, retain_graph=True)
        found.append((logits, state, whole, gradient, parameter_gradients(model, weighted(logits))))
    expected, actual = found
    for one, other in zip(actual[:4], expected[:4], strict=True):
        agree(one, other)
    assert actual[4].keys() == expected[4].keys()
    for name, gradient in actual[4].items():
        agree(gradient, expected[4][name])


@pytest.mark.parametrize("kernels", BACKENDS)
def test_decoding_gives_the_same_tokens_and_states(models: dict[str, MambaTrace], tokens: Tensor, kernels: str) -> None:
    found = []
    for model in (models["reference"], models[kernels]):
        with torch.no_grad(), model.generate(tokens, max_new_tokens=4, do_sample=False) as tracer:
            states = nnsight.save([])
            for _ in tracer.iter[:4]:
                states.append(model.layers[1].ssm.h[-1].output)
            output = tracer.result.save()
        found.append((output, states))
    (expected, expected_states), (actual, states) = found
    assert torch.equal(actual, expected)
    assert len(states) == 4
    for one, other in zip(states, expected_states, strict=True):
        agree(one, other)


@pytest.mark.parametrize(("kernels", "runs"), [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu")])
def test_the_choice_is_what_runs(models: dict[str, MambaTrace], tokens: Tensor, kernels: str, runs: str) -> None:
    model = models[kernels]
    with torch.no_grad(), model.trace(tokens):
        model.layers[0].ssm.h[2].output[:] = 0
        model.layers[1].ssm.h.output.save()
    scans = [[call for call in layer.calls if "conv" not in call.function] for layer in model.last_run]
    assert [[call.positions for call in layer] for layer in scans] == [[3, 6], [9], [9]]
    assert {call.backend for layer in scans for call in layer} == {runs}


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_float64_runs_on_the_reference(tiny_hf: ModuleFactory, tokens: Tensor, kernels: str) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64), kernels=kernels)
    single = MambaTrace(tiny_hf())
    with torch.no_grad(), model.trace(tokens):
        state = model.layers[1].ssm.h[4].output.save()
        logits = model.lm_head.output.save()
    with torch.no_grad(), single.trace(tokens):
        single_state = single.layers[1].ssm.h[4].output.save()
        single_logits = single.lm_head.output.save()
    assert state.dtype == logits.dtype == torch.float64
    agree(single_state.double(), state)
    agree(single_logits.double(), logits)


def test_cpu_on_a_float64_model_says_why_not_and_the_model_stays_usable(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64), kernels="cpu")
    reason = r"kernels='cpu' cannot run this scan: it computes in float32, not torch.float64; .*'auto'"
    for _ in range(2):  # the first failure leaves nothing behind
        with pytest.raises(BackendError, match=reason):
            model._module(tokens)
        with pytest.raises(BackendError, match=reason), model.trace(tokens):
            model.layers[1].ssm.h[4].output.save()
    model._module.float()
    with torch.no_grad(), model.trace(tokens):
        state = model.layers[1].ssm.h[4].output.save()
        logits = model.lm_head.output.save()
    expected = MambaTrace(tiny_hf())
    with torch.no_grad(), expected.trace(tokens):
        expected_state = expected.layers[1].ssm.h[4].output.save()
        expected_logits = expected.lm_head.output.save()
    agree(state, expected_state)
    agree(logits, expected_logits)


def test_importing_pulls_in_no_compiler_and_nothing_optional() -> None:
    """Not even importing all that a user imports; the first scan compiles."""
    code = (
        "import sys, mamba_trace; mamba_trace.MambaTrace; import mamba_trace.scan.cpu, mamba_trace.patching; "
        "optional = 'numba llvmlite plotly matplotlib mamba_ssm causal_conv1d'.split(); "
        # PyTorch may import Triton; this package does not, nor compiles anything.
        "own = ['mamba_trace.scan.' + name for name in ('cpu.compiled', 'triton.launch', 'triton.kernels')]; "
        "print(*(name for name in optional + own if name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [], "these were imported"
