"""What runs where: a kernel is given up in the layer and the stage where a site needs it, and nowhere else.

Random sets of reads, edits, caches and invokes are run on every backend, and once more on the reference with
every site of every layer made. The numbers have to agree, and each run's report has to name the kernels that
the sites call for and no other. The CUDA kernels are stand-ins (`cuda_stand_ins`), Triton's are interpreted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cuda_stand_ins
import nnsight
import pytest
import torch
from allocations import PeakMemory
from conftest import FUSED, MAMBA_SITES, SIZES, ModuleFactory, agree, functions
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import parameter_gradients, weighted
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError
from mamba_trace.scan import dispatch, reference
from mamba_trace.scan.record import Call
from mamba_trace.sites import STATE, walk

N_LAYERS, LENGTH = SIZES["num_hidden_layers"], 9
BACKENDS = ("reference", "cpu", "cuda", "triton")
#: What makes the scan leave delta, D and the gate to PyTorch.
BARE = ("delta", "A_bar", "B_bar", "write", STATE, "h_read", "y", "ssm_output")


@pytest.fixture(scope="module")
def monkeymodule() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def models(tiny_hf: ModuleFactory, monkeymodule: pytest.MonkeyPatch) -> dict[str, MambaTrace]:
    """The same weights on every backend, and with every site made on the reference."""
    cuda_stand_ins.install(monkeymodule)
    models = {kernels: MambaTrace(tiny_hf(), kernels=kernels) for kernels in BACKENDS}
    everything = MambaTrace(tiny_hf(), kernels="reference")
    for module in everything._module.modules():
        if type(module).__name__ == "SiteModule":
            module.register_forward_hook(lambda *args: None)  # wanted, and left alone
    return {**models, "everything": everything}


# -- any set of sites, any way ------------------------------------------------------------------------------


def places() -> list[str]:
    """Every site of every layer in execution order, each position of the state before the whole of it."""
    found = []
    for site, layer in walk(N_LAYERS):
        path = site.path(layer)
        if site.name == STATE:
            found += [f"{path}[{position}]" for position in range(LENGTH)]
        found.append(path)
    return found


PLACES = places()
ACTIONS = ("read", "scale", "assign")
INVOKE = st.dictionaries(st.integers(0, len(PLACES) - 1), st.sampled_from(ACTIONS), max_size=6)


@dataclass
class Plan:
    """What a trace does: in each invoke, path -> action, in execution order; and the places it caches."""

    invokes: list[dict[str, str]]
    cached: list[str] = field(default_factory=list)

    def wanted(self, layer: int) -> dict[str, str]:
        """The places wanted in a layer's mixer, relative to it, and what is done there."""
        prefix = f"layers[{layer}].ssm."
        found = dict.fromkeys(self.cached, "read")
        for invoke in self.invokes:
            found.update({path: a for path, a in invoke.items() if found.get(path, "read") == "read"})
        return {p.removeprefix(prefix): a for p, a in found.items() if p.startswith(prefix)}


@st.composite
def plans(draw: Callable[..., Any]) -> Plan:
    drawn = draw(st.lists(INVOKE, min_size=1, max_size=2))
    invokes = [{PLACES[index]: actions[index] for index in sorted(actions)} for actions in drawn]
    in_layers = [path for path in PLACES if "[" in path]
    cached = draw(st.lists(st.sampled_from(in_layers), max_size=2, unique=True))
    return Plan(invokes, cached)


def act(model: MambaTrace, actions: dict[str, str], seen: dict[str, Tensor]) -> None:
    """Do what one invoke does; what it saw goes into ``seen``."""
    for path, action in actions.items():
        envoy = model.hook(path)
        seen[path] = envoy.output.detach().clone()
        if action == "scale":
            envoy.output[:] *= 0.9
        elif action == "assign":
            envoy.output = envoy.output * 0.8 - 0.01


def perform(model: MambaTrace, plan: Plan, tokens: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Run a plan in one trace: what each invoke saw and what was cached, and the logits of all rows."""
    seen: list[dict[str, Tensor]] = [{} for _ in plan.invokes]
    with model.trace() as tracer:
        for row, actions in enumerate(plan.invokes):
            with tracer.invoke(tokens[row : row + 1]):
                act(model, actions, nnsight.save(seen[row]))
        with tracer.invoke():
            cache = tracer.cache(modules=plan.cached or ["lm_head"])
            logits = model.lm_head.output.save()
    cached = {path: cache[path].output.detach() for path in cache.keys()}  # noqa: SIM118
    return [*seen, cached], logits


def expected_calls(plan: Plan, layer: int, kernels: str) -> list[tuple[str, str, int]]:
    """The kernel calls that the wanted sites of a layer call for: (function, backend, positions)."""
    wanted = plan.wanted(layer)
    conv = {"cpu": "cpu", "cuda": "cuda"}.get(kernels, "PyTorch")
    fused = conv != "PyTorch" and "conv" not in wanted
    calls = [("conv_silu" if fused else "causal_conv", conv, LENGTH)]
    if not any(place.split("[")[0] in BARE for place in wanted):
        return [*calls, ("gated_scan", kernels, LENGTH)]
    explicit = any(wanted.get(name, "read") != "read" for name in ("A_bar", "B_bar", "write"))
    scan = "explicit" if explicit else "selective"
    backend = "triton" if kernels == "cuda" and explicit else kernels

    def call(function: str, positions: int) -> tuple[str, str, int]:
        update = positions < 1 or (positions == 1 and kernels != "cpu")
        return f"{scan}_{function}", "reference" if update else backend, positions

    stops = sorted(int(place[2:-1]) + 1 for place in wanted if place.startswith("h["))
    starts = [0, *stops]
    stretches = [call("scan", stop - start) for start, stop in zip(starts, stops, strict=False)]
    if STATE not in wanted and "h_read" not in wanted:
        return calls + stretches + [call("scan", LENGTH - starts[-1])] * (starts[-1] < LENGTH)
    again = [call("states", positions - 1) for _, _, positions in stretches]
    return calls + stretches + again + [call("states", LENGTH - starts[-1])] * (starts[-1] < LENGTH)


@settings(deadline=None, derandomize=True, max_examples=6)
@given(plan=plans())
def test_any_set_of_sites_means_the_same_on_every_backend(
    models: dict[str, MambaTrace], tokens: Tensor, plan: Plan
) -> None:
    expected, expected_logits = perform(models["everything"], plan, tokens)
    expected_gradients = parameter_gradients(models["everything"], weighted(expected_logits))
    for kernels in BACKENDS:
        model = models[kernels]
        seen, logits = perform(model, plan, tokens)
        for layer in range(N_LAYERS):
            calls = [(call.function, call.backend, call.positions) for call in model.last_run[layer].calls]
            assert calls == expected_calls(plan, layer, kernels), f"layer {layer}"
        gradients = parameter_gradients(model, weighted(logits))
        agree(logits, expected_logits)
        for one, other in zip(seen, expected, strict=True):
            assert one.keys() == other.keys()
            for path, value in one.items():
                agree(value, other[path])
        for name in ("A_log", "D", "x_proj.weight", "dt_proj.bias", "conv1d.weight"):
            for layer in (0, 2):
                path = f"backbone.layers.{layer}.mixer.{name}"
                agree(gradients[path], expected_gradients[path], 2e-5)


# -- the table, row by row --------------------------------------------------------------------------------

ROWS = [
    ([], FUSED),
    (["conv"], ["causal_conv", "gated_scan"]),
    *(([name], FUSED) for name in ("skip", "x_in", "ssm_input", "delta_1", "delta_2", "A", "B", "C")),
    (["delta"], ["conv_silu", "selective_scan"]),
    (["h_start"], FUSED),
    (["A_bar"], ["conv_silu", "selective_scan"]),
    (["B_bar"], ["conv_silu", "selective_scan"]),
    (["write"], ["conv_silu", "selective_scan"]),
    (["h_read"], ["conv_silu", "selective_states"]),
    (["y"], ["conv_silu", "selective_scan"]),
    (["ssm_output"], ["conv_silu", "selective_scan"]),
    (["after_skip"], FUSED),
    (["out_proj"], FUSED),
    (["h[3]"], ["conv_silu", "selective_scan", "selective_scan"]),
    (["h"], ["conv_silu", "selective_states"]),
    (["in_proj"], FUSED),
    (["x_proj"], FUSED),
    (["dt_proj"], FUSED),
    (["conv1d"], ["causal_conv", "gated_scan"]),
]


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
@pytest.mark.parametrize(("sites", "expected"), ROWS, ids=str)
def test_a_read_costs_what_its_site_needs_and_in_its_layer_alone(
    models: dict[str, MambaTrace], tokens: Tensor, sites: list[str], expected: list[str], kernels: str
) -> None:
    model = models[kernels]
    with torch.no_grad(), model.trace(tokens):
        for site in sites:
            model.hook(f"layers[1].ssm.{site}").output.save()
    runs = model.last_run
    assert functions(runs[1]) == expected
    assert functions(runs[0]) == functions(runs[2]) == FUSED
    assert not runs[0].reasons
    assert bool(runs[1].reasons) == (expected != FUSED)


@pytest.mark.parametrize("name", ["A_bar", "B_bar", "write"])
@pytest.mark.parametrize(("kernels", "runs"), [("cpu", "cpu"), ("cuda", "triton"), ("triton", "triton")])
def test_an_edited_matrix_costs_the_explicit_scan_of_its_layer(
    models: dict[str, MambaTrace], tokens: Tensor, name: str, kernels: str, runs: str
) -> None:
    model = models[kernels]
    with torch.no_grad(), model.trace(tokens):
        getattr(model.layers[1].ssm, name).output[:, 2] = 0
    assert [run.calls[-1].function for run in model.last_run] == ["gated_scan", "explicit_scan", "gated_scan"]
    assert model.last_run[1].calls[-1].backend == runs


def test_a_whole_mamba2_on_triton_is_the_reference(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    found = {}
    for kernels in ("reference", "triton"):
        model = MambaTrace(tiny_hf(model_type="mamba2"), kernels=kernels)
        with torch.no_grad(), model.trace(tokens[:1]):
            model.layers[0].ssm.write.output[:, 2] *= 2
            model.layers[1].ssm.h[3].output[:] *= 0.5
            y = model.layers[2].ssm.y.output.save()
            logits = model.lm_head.output.save()
        found[kernels] = y, logits
        used = {call.backend for run in model.last_run for call in run.calls if "conv" not in call.function}
        assert used <= {kernels, "reference"}
        assert kernels in used
    for one, other in zip(*found.values(), strict=True):
        agree(other, one)


# -- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_decode_step_is_one_update_of_the_state(models: dict[str, MambaTrace], tokens: Tensor, kernels: str) -> None:
    model = models[kernels]
    with torch.no_grad():
        model._module.generate(tokens, max_new_tokens=3, do_sample=False)
    backend = "cpu" if kernels == "cpu" else "reference"
    for run in model.last_run:
        assert run.positions == 1
        assert run.calls[1:] == [Call("gated_scan", backend, 1)]


# -- memory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> MambaTrace:
    config = {"d_model": 64, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"d_state": 16}}
    return MambaTrace.from_config(config, kernels="cpu")


def test_no_trajectory_is_made_where_none_is_asked_for(wide: MambaTrace) -> None:
    L, E, N = 512, 128, 16
    tokens = torch.randint(1, 40, (1, L), generator=torch.Generator().manual_seed(0))

    def edit() -> None:
        with wide.trace(tokens, logits_to_keep=1):
            wide.layers[1].ssm.h[5].output[:] = 0

    def read_whole() -> None:
        with wide.trace(tokens, logits_to_keep=1):
            wide.layers[1].ssm.h.output.save()

    with torch.no_grad():
        plain = PeakMemory.of(lambda: wide._module(tokens, logits_to_keep=1))
        edited, whole = PeakMemory.of(edit), PeakMemory.of(read_whole)
    for memory in (plain, edited):
        assert (1, L, E, N) not in memory.shapes
        assert memory.largest < L * E * N * 4
    assert edited.peak <= 1.05 * plain.peak
    assert (1, L, E, N) in whole.shapes  # so that the tests above would notice


def test_no_trajectory_is_kept_for_the_backward_pass(wide: MambaTrace) -> None:
    L, E, N = 512, 128, 16
    tokens = torch.randint(1, 40, (1, L), generator=torch.Generator().manual_seed(0))
    memory = PeakMemory.of(lambda: wide._module(tokens).logits.sum().backward())
    assert (1, L, E, N) not in memory.shapes
    assert memory.largest < L * E * N * 4


# -- choosing and forcing ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", False)
    for name in ("cpu",):
        monkeypatch.setattr(dispatch.BACKENDS[name], "unavailable", lambda *args: "numba is broken")
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match=r"no compiled scan .* \(cpu: numba is broken\).*mamba-trace info"):
        assert dispatch.choose("auto", cpu, torch.float32, 16) == "reference"
    assert dispatch.choose("auto", cpu, torch.float32, 16) == "reference"  # warnings are errors in this test


def test_float64_is_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", False)
    assert dispatch.choose("auto", torch.device("cpu"), torch.float64, 16) == "reference"


def test_a_gpu_prefers_the_installed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, reasons = torch.device("cuda"), {"cuda": None, "triton": None}
    for name in reasons:
        monkeypatch.setattr(dispatch.BACKENDS[name], "unavailable", lambda *args, name=name: reasons[name])
    assert dispatch.choose("auto", gpu, torch.float32, 16) == "cuda"
    reasons["cuda"] = "not installed"
    assert dispatch.choose("auto", gpu, torch.float32, 16) == "triton"


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0), (0, 0)])
def test_an_empty_batch_or_prompt(models: dict[str, MambaTrace], kernels: str, B: int, L: int) -> None:
    x, A, C, h = torch.ones(B, L, 4), -torch.ones(4, 3), torch.ones(B, L, 3), torch.ones(B, 4, 3)
    for run, shape in ((dispatch.selective_scan, h.shape), (dispatch.selective_states, (B, L, 4, 3))):
        y, second = run(x, x, A, C, C, h, kernels=kernels)
        assert (y.shape, second.shape) == (x.shape, shape)
    out, h_last = dispatch.gated_scan(x, x, A, C, C, torch.ones(4), x, h, kernels=kernels)
    assert out.shape == x.shape
    assert torch.equal(h_last, h)
    y, h_last = dispatch.explicit_scan(torch.ones(B, L, 4, 3), torch.ones(B, L, 4, 3), x, C, h, kernels=kernels)
    assert y.shape == x.shape
    assert torch.equal(h_last, h)


@pytest.mark.parametrize(
    "name", ["selective_scan", "selective_states", "gated_scan", "explicit_scan", "explicit_states"]
)
def test_a_scan_takes_the_arguments_of_its_definition_and_the_backend(name: str) -> None:
    run, definition = getattr(dispatch, name), getattr(reference, name)
    arguments = [argument for argument in inspect.signature(definition).parameters if argument != "scan"]
    assert [*inspect.signature(run).parameters] == [*arguments, "kernels"]
    assert run.__name__ == name
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, 3), "B": (2, 9, 3), "C": (2, 9, 3), "D": (4,), "h_start": (2, 4, 3)}
    shapes |= dict.fromkeys(("A_bar", "B_bar"), (2, 9, 4, 3))
    given = {each: -torch.rand(shapes.get(each, (2, 9, 4)), generator=generator) for each in arguments}
    for kernels in ("reference", "cpu"):
        for by_position in (0, 2, len(arguments)):
            inputs = [*given.values()][:by_position]
            named = {each: tensor for each, tensor in given.items() if each in arguments[by_position:]}
            for one, other in zip(run(*inputs, **named, kernels=kernels), definition(**given), strict=True):
                agree(one, other)
    with pytest.raises(TypeError, match="beta"):
        run(**given, beta=given["C"])


def test_every_site_of_a_mixer_has_a_row() -> None:
    """A new site comes with what it costs."""
    rows = {site.split("[")[0] for sites, _ in ROWS for site in sites}
    assert {site.name for site in MAMBA_SITES if site.scope == "mixer"} <= rows


# -- transforms of functions --------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, e: torch.func.grad(lambda x: f(x).square().sum())(e),
    "jvp": lambda f, e: torch.func.jvp(f, (e,), (e.cos(),))[1],
    "vmap": lambda f, e: torch.func.vmap(lambda x: f(x[None])[0])(e),
    "gradients per sample": lambda f, e: torch.func.vmap(torch.func.grad(lambda x: f(x[None]).sin().sum()))(e),
    "hessian": lambda f, e: torch.func.hessian(lambda v: f(e[:1, :3] + v).sin().sum())(e[0, 0]),
    "forward mode": lambda f, e: forward_mode(f, e),
}


def forward_mode(f: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(e, e.cos()))).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_transforms_of_functions_are_those_of_hugging_face_s_module(
    tiny_hf: ModuleFactory, kernels: str, name: str
) -> None:
    plain, model = tiny_hf(num_hidden_layers=2), MambaTrace(tiny_hf(num_hidden_layers=2), kernels=kernels)
    embeddings = torch.randn(2, 5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    expected, actual = (
        TRANSFORMS[name](lambda e, m=module: m(inputs_embeds=e, use_cache=False).logits, embeddings)
        for module in (plain, model._module)
    )
    agree(actual, expected)
    with torch.no_grad():  # and afterwards the kernels run again
        model._module(inputs_embeds=embeddings)
    assert {call.backend for call in model.last_run[0].calls} <= {"reference", "PyTorch", "cpu"}
    assert ("cpu" in {call.backend for call in model.last_run[0].calls}) == (kernels == "auto")


def test_the_parameters_of_a_wrapped_module_can_be_transformed(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    grads = []
    for module in (tiny_hf(), MambaTrace(tiny_hf())._module):
        weights = {name: weight.detach() for name, weight in module.named_parameters()}

        def score(weights: dict[str, Tensor], row: Tensor, module: nn.Module = module) -> Tensor:
            given = {"input_ids": row[None], "use_cache": False}
            return torch.func.functional_call(module, weights, (), given).logits.sin().sum()

        grads.append(torch.func.vmap(torch.func.grad(score), (None, 0))(weights, tokens))
    for name, expected in grads[0].items():
        agree(grads[1][name], expected)


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda"])
def test_a_kernel_that_is_forced_says_why_it_cannot_be_transformed(models: dict[str, MambaTrace], kernels: str) -> None:
    module, embeddings = models[kernels]._module, torch.rand(1, 3, SIZES["hidden_size"])
    message = f"kernels='{kernels}' cannot run under torch.func .*: use kernels='auto' or kernels='reference'"
    with pytest.raises(BackendError, match=message):
        torch.func.grad(lambda e: module(inputs_embeds=e, use_cache=False).logits.sum())(embeddings)
