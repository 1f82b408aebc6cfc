"""Models whose weights accelerate has spread over main memory and disk, before or after they were wrapped.

Whatever the order of wrapping, dispatching and taking hooks off again, every read, edit, gradient and grid is
that of the undivided model. Models that are split over devices are in test_split_models.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from conftest import LENGTH, MAMBA_SITES, N_LAYERS, SIZES, agree, make_hf
from nnsight.intervention.source import Controller
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.conversion.checkpoints import save_original
from mamba_trace.errors import CheckpointError
from mamba_trace.flow import knockout
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.patching import attribution_grid, patch_grid
from mamba_trace.tracing.placement import check_weights, full_device_map, input_device

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer", "ignore:The following device_map keys")

CPU = torch.device("cpu")
#: Embedding and first layer in memory, the rest of the layers on disk.
SOME_ON_DISK = {"": "cpu", "layers.1": "disk", "layers.2": "disk"}
#: The same for accelerate itself, which knows neither this package's names nor entries that overlap.
DISPATCHED = {
    "backbone.embeddings": "cpu",
    "backbone.layers.0": "cpu",
    "backbone.layers.1": "disk",
    "backbone.layers.2": "disk",
    "backbone.norm_f": "cpu",
    "lm_head": "cpu",
}

Make = Callable[[Path], MambaTrace]


def loaded(device_map: Any, **options: Any) -> Make:
    """Loaded from a folder with a device map."""

    def make(folder: Path) -> MambaTrace:
        make_hf().save_pretrained(folder / "model")
        return MambaTrace(folder / "model", device_map=device_map, offload_folder=folder / "offload", **options)

    return make


def dispatch(module: nn.Module, folder: Path) -> None:
    """Some layers to disk, by accelerate."""
    dispatch_model(module, DISPATCHED, offload_dir=folder)


def to_memory(module: nn.Module, folder: Path) -> None:
    """All weights to main memory, from where each layer's are fetched to run on the CPU."""
    cpu_offload(module, CPU)


def to_disk(module: nn.Module, folder: Path) -> None:
    """All weights to disk."""
    disk_offload(module, folder, CPU)


def to_memory_by_mixer(module: nn.Module, folder: Path) -> None:
    """All weights to main memory, those of a mixer's inner modules to be fetched when the mixer runs."""
    cpu_offload(module, CPU, preload_module_classes=["MambaMixer", "HookableMambaMixer"])


def hook(module: nn.Module, folder: Path) -> None:
    """Hooks on every module, which move nothing."""
    dispatch_model(module, {"": "cpu"}, force_hooks=True)


def in_order(*steps: Any) -> Make:
    """Made of a module by steps: `dispatch` and the like, ``"wrap"``, ``"run"`` and ``"remove"``."""

    def make(folder: Path) -> MambaTrace:
        module, model = make_hf(), None
        for number, step in enumerate(steps):
            if step == "wrap":
                model = MambaTrace(module)
            elif step == "run":
                model.run_with_hooks(torch.ones(1, 3, dtype=torch.long))
            elif step == "remove":
                remove_hook_from_submodules(module)
            else:
                step(module, folder / str(number))
        return model

    return make


ORDERS: dict[str, Make] = {
    "loaded auto": loaded("auto"),
    "loaded cpu": loaded("cpu"),
    "loaded some on disk": loaded(SOME_ON_DISK),
    "loaded all on disk": loaded({"": "disk"}),
    "loaded max_memory": loaded("auto", max_memory={"cpu": 12_000}),
    "dispatched, wrapped": in_order(dispatch, "wrap"),
    "to memory, wrapped": in_order(to_memory, "wrap"),
    "to disk, wrapped": in_order(to_disk, "wrap"),
    "wrapped, dispatched": in_order("wrap", dispatch),
    "wrapped, to memory": in_order("wrap", to_memory),
    "wrapped, to disk": in_order("wrap", to_disk),
    "wrapped, run, dispatched": in_order("wrap", "run", dispatch),
    "to memory by mixer, wrapped": in_order(to_memory_by_mixer, "wrap"),
    "hooked, wrapped, hooked again": in_order(hook, "wrap", hook),
    "dispatched, wrapped, removed": in_order(dispatch, "wrap", "remove"),
    "to memory, wrapped, run, removed": in_order(to_memory, "wrap", "run", "remove"),
    "wrapped, to disk, removed": in_order("wrap", to_disk, "remove"),
    "wrapped, to memory, run, removed": in_order("wrap", to_memory, "run", "remove"),
    "to memory, wrapped, removed, dispatched": in_order(to_memory, "wrap", "remove", dispatch),
}


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys(), scope="module")
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MambaTrace:
    return request.param(tmp_path_factory.mktemp("placed"))


@pytest.fixture(scope="module")
def whole() -> MambaTrace:
    """The undivided model."""
    return MambaTrace(make_hf())


@pytest.fixture
def prompt(tokens: Tensor) -> Tensor:
    return tokens[:1]


@pytest.fixture
def source(tokens: Tensor) -> Tensor:
    return tokens[1:2]


def sites_of(model: MambaTrace) -> Iterator[Any]:
    """The envoy of every site of the model, in execution order."""
    yield model.embeddings
    for layer in model.layers:
        for site in MAMBA_SITES:
            if site.scope != "model":
                yield getattr(layer if site.scope == "block" else layer.ssm, site.name)
    yield model.norm_f
    yield model.lm_head


def every_site(model: MambaTrace, tokens: Tensor) -> list[Tensor]:
    values = []
    with torch.no_grad(), model.trace(tokens):
        for site in sites_of(model):
            values.append(site.output.save())
    return values


def metric(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 5]


def test_every_site_of_every_layer(placed, whole, tokens):
    found, expected = every_site(placed, tokens), every_site(whole, tokens)
    assert len(found) == len(expected) > N_LAYERS * 20
    for one, other in zip(found, expected, strict=True):
        agree(one, other, 1e-6)


@pytest.mark.parametrize("place", [dispatch, to_memory, to_disk], ids=lambda place: place.__name__)
@pytest.mark.parametrize("model_type", ["falcon_mamba", "mamba2"])
def test_every_value_of_the_other_architectures(model_type, place, tokens, tmp_path):
    module = make_hf(model_type=model_type)
    _, expected = MambaTrace(copy.deepcopy(module)).run_with_cache(tokens)
    place(module, tmp_path)
    _, found = MambaTrace(module).run_with_cache(tokens)
    assert list(found) == list(expected)
    for name in expected:
        agree(found[name], expected[name], 1e-6)


@pytest.mark.parametrize("name", ["conv", "A_bar", "h_start"])
def test_an_edit_in_each_layer(placed, whole, tokens, name):
    logits = {}
    for model in (placed, whole):
        with torch.no_grad(), model.trace(tokens):
            for layer in model.layers:
                site = getattr(layer.ssm, name)
                site.output = site.output / 2 + 0.1
            logits[model] = model.lm_head.output.save()
    agree(logits[placed], logits[whole], 1e-6)


def test_edits_of_the_state_at_positions_of_each_layer(placed, whole, tokens):
    logits = {}
    for model in (placed, whole):
        with torch.no_grad(), model.trace(tokens):
            for layer in model.layers:
                layer.ssm.h[2].output[:] = 0
                layer.ssm.h[-1].output = torch.ones(len(tokens), 24, SIZES["state_size"])
            logits[model] = model.lm_head.output.save()
    agree(logits[placed], logits[whole], 1e-6)


def test_the_gradient_of_a_state_with_respect_to_earlier_sites(placed, whole, tokens):
    gradients = {}
    for model in (placed, whole):
        with model.trace(tokens):
            x = model.layers[0].ssm.x_in.output
            delta = model.layers[1].ssm.delta.output
            h = model.layers[2].ssm.h[4].output
            gradients[model] = torch.autograd.grad(h.square().sum(), [x, delta]).save()
    for one, other in zip(gradients[placed], gradients[whole], strict=True):
        agree(one, other)  # the convolution of an offloaded layer is summed in another order


def test_a_trace_over_the_steps_of_generate(placed, whole, tokens):
    found = {}
    for model in (placed, whole):
        logits = []
        with (
            torch.no_grad(),
            model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer,
        ):
            for _ in tracer.iter[:3]:
                model.layers[1].ssm.h[-1].output[:] *= 0.5
                logits.append(model.lm_head.output[:, -1].save())
            written = tracer.result.save()
        found[model] = written, torch.stack(logits)
    assert torch.equal(found[placed][0], found[whole][0])
    agree(found[placed][1], found[whole][1], 1e-6)


def test_run_with_cache(placed, whole, tokens):
    logits, cache = placed.run_with_cache(tokens)
    expected, expected_cache = whole.run_with_cache(tokens)
    agree(logits, expected, 1e-6)
    assert cache.keys() == expected_cache.keys()
    for name in expected_cache:
        agree(cache[name], expected_cache[name], 1e-6)


@pytest.mark.parametrize("grid_of", [patch_grid, attribution_grid])
def test_a_grid(placed, whole, prompt, source, grid_of):
    found, expected = (grid_of(model, prompt, source, "h", metric).values for model in (placed, whole))
    assert found.shape == (N_LAYERS, LENGTH)
    agree(found, expected, 1e-5)


@pytest.mark.parametrize("lens_of", [logit_lens, state_lens])
def test_a_lens(placed, whole, prompt, lens_of):
    found, expected = (lens_of(model, prompt, top=2) for model in (placed, whole))
    assert torch.equal(found.top_ids, expected.top_ids)
    agree(found.top_logits, expected.top_logits, 1e-5)


def test_a_knockout(placed, whole, tokens):
    logits = {}
    for model in (placed, whole):
        with torch.no_grad(), model.trace(tokens):
            knockout(model, 2, -1, [1, 2], "slow", conv=True)
            logits[model] = model.lm_head.output.save()
    agree(logits[placed], logits[whole], 1e-5)


def test_a_scan_of_shapes_leaves_the_weights_as_they_were(placed, whole, tokens):
    placed.dispatch()
    before = {name: weight.device for name, weight in placed._module.named_parameters()}
    with placed.scan(tokens):
        shape = list(placed.layers[1].ssm.h.output.shape).save()
        last = list(placed.lm_head.output.shape).save()
    assert shape == [*tokens.shape, 24, SIZES["state_size"]]
    assert last == [*tokens.shape, SIZES["vocab_size"]]
    assert {name: weight.device for name, weight in placed._module.named_parameters()} == before
    agree(placed.run_with_hooks(tokens), whole.run_with_hooks(tokens), 1e-6)


# -- what accelerate and nnsight each do to a module -------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose weights accelerate brings, in order."""
    modules: list[nn.Module] = []
    bring = AlignDevicesHook.pre_forward

    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modules.append(module)
        return bring(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    return modules


@pytest.mark.parametrize("steps", [(to_memory, "wrap"), ("wrap", to_memory)], ids=["before", "after"])
def test_each_layers_weights_are_brought_once_and_taken_away_again(steps, tokens, tmp_path, loads):
    model = in_order(*steps)(tmp_path)
    model.run_with_hooks(tokens)
    assert len(loads) == len({id(module) for module in loads}) > N_LAYERS * 5
    assert all(parameter.is_meta for parameter in model._module.parameters())


def test_an_offloaded_convolution_is_called_and_another_is_not(tokens, tmp_path):
    model = in_order("wrap", dispatch)(tmp_path)
    model.run_with_hooks(tokens)
    reasons = {run.layer: " ".join(run.reasons) for run in model.last_run}
    assert "conv1d" not in reasons[0]
    assert "conv1d is wanted, hooked or changed" in reasons[1]


@pytest.mark.parametrize(
    "steps",
    [("wrap", hook, "run"), (hook, "wrap", "remove", "run"), (hook, "wrap", hook, "run")],
    ids=["hooked", "hooks removed", "hooked again"],
)
def test_a_trace_puts_the_controllers_back(steps, tmp_path):
    model = in_order(*steps)(tmp_path)
    for module in model._module.modules():
        assert isinstance(module.__dict__["forward"], Controller)


def test_a_forward_that_somebody_else_put_there_is_left(tiny, tokens):
    module = tiny.layers[1].ssm.x_proj._module

    def zero(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], module.out_features)

    module.forward = zero
    with torch.no_grad(), tiny.trace(tokens):
        C = tiny.layers[1].ssm.C.output.save()
    assert module.forward is zero
    assert not C.any()


# -- where things go ---------------------------------------------------------------------------------------


def test_inputs_go_where_the_embedding_runs(placed, tokens):
    placed.dispatch()
    assert placed.device == CPU
    assert placed.pipeline.device == CPU


def test_the_device_of_a_model_without_weights_is_meta(tmp_path):
    make_hf().save_pretrained(tmp_path)
    assert MambaTrace(tmp_path).device.type == "meta"
    assert input_device(nn.Identity()) == CPU


def test_the_device_of_weights_that_are_fetched_with_the_whole_model_or_by_one_hook_of_several():
    at_once = nn.Sequential(nn.Linear(2, 2))
    add_hook_to_module(at_once, AlignDevicesHook(CPU, offload=True, place_submodules=True))
    one_of_two = nn.Sequential(nn.Linear(2, 2))
    add_hook_to_module(one_of_two[0], AlignDevicesHook(CPU))
    add_hook_to_module(one_of_two[0], AlignDevicesHook(CPU, offload=True), append=True)
    for module in (at_once, one_of_two):
        assert module[0].weight.is_meta
        assert input_device(module) == CPU
        check_weights(module)
        remove_hook_from_submodules(module)
        check_weights(module)
        module.to("meta")
        with pytest.raises(CheckpointError, match=r"2 weights are on the meta device.*: 0\.weight"):
            check_weights(module)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_an_original_checkpoint_is_offloaded_too(whole, tokens, tmp_path, safe):
    save_original(make_hf(), tmp_path / "model", safe_serialization=safe)
    model = MambaTrace(tmp_path / "model", device_map=SOME_ON_DISK, offload_folder=tmp_path / "offload")
    agree(model.run_with_hooks(tokens), whole.run_with_hooks(tokens), 1e-6)
    assert model.layers[1].ssm._module.A_log.is_meta


@pytest.mark.parametrize(
    ("device_map", "full"),
    [
        ("auto", "auto"),
        ({"": "cpu"}, {"": "cpu"}),
        ({"backbone": "cpu", "lm_head": "cpu"}, {"backbone": "cpu", "lm_head": "cpu"}),
        ({"backbone": "disk"}, {"backbone": "disk", "lm_head": "disk"}),
        (
            {"embeddings": "cpu", "layers": "disk", "norm_f": 0},
            {"backbone.embeddings": "cpu", "backbone.layers": "disk", "backbone.norm_f": 0, "lm_head": "cpu"},
        ),
        (SOME_ON_DISK, DISPATCHED),
    ],
    ids=["no map", "one device", "complete", "tied head", "names of this package", "entries that overlap"],
)
def test_a_device_map_is_completed(tiny_hf, device_map, full):
    assert full_device_map(device_map, tiny_hf()) == full


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {"": "cpu", "layers.7": "disk"},
            r"places 'layers.7', which is not a part.*did you mean backbone.layers",
        ),
        (
            {"layers.0": "cpu"},
            r"no place for backbone.embeddings, backbone.layers.1, .*, backbone.norm_f, ...",
        ),
        ({"": "cpu", "lm_head": "disk"}, "embeddings on cpu and lm_head on disk, which are one weight"),
    ],
    ids=["no such layer", "left out", "tied and apart"],
)
def test_a_device_map_that_does_not_fit_is_refused_when_the_model_is_made(tmp_path, device_map, message):
    make_hf().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        MambaTrace(tmp_path, device_map=device_map)


def test_a_device_that_is_not_here_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    make_hf().save_pretrained(tmp_path)
    model = MambaTrace(tmp_path, device_map={"": "cpu", "layers.2": "maia:3"})
    monkeypatch.setattr(
        "mamba_trace.conversion.model_loading.load_model", lambda *args: pytest.fail("weights were read")
    )
    with pytest.raises(CheckpointError, match=r"places backbone.layers.2 on maia:3.*There are.*cpu and disk"):
        model.dispatch()


@pytest.mark.parametrize("device_map", [SOME_ON_DISK, {"": "disk"}], ids=["some on disk", "all on disk"])
def test_weights_that_nothing_loads_are_refused_before_anything_runs(tokens, tmp_path, device_map):
    model = loaded(device_map, dispatch=True)(tmp_path)
    remove_hook_from_submodules(model._module)
    entered = []
    with (
        pytest.raises(CheckpointError, match=r"weights are on the meta device.*: backbone\..*Load the model again"),
        model.trace(tokens),
    ):
        entered.append(model.embeddings.output)
    assert not entered


def test_a_place_for_a_single_parameter_of_a_mixer_is_refused(tokens, tmp_path):
    model = loaded({"": "cpu", "layers.2.ssm.A_log": "disk"})(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 weights .* backbone.layers.2.mixer.A_log.*place modules"):
        model.run_with_hooks(tokens)
