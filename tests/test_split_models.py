"""Models that are split over two devices: each value is on its layer's device, and nothing else changes.

The devices are those of device_stand_ins.py, on which tensors of different devices cannot meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import dispatch_model
from conftest import MAMBA_SITES, N_LAYERS, SIZES, agree, make_hf
from device_stand_ins import StandInDevices, move
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import SiteValueError
from mamba_trace.flow import knockout
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.patching import attribution_grid, patch_grid

FIRST, SECOND = "maia:0", "maia:1"
E, N = 24, SIZES["state_size"]
#: Where each part runs; "cpu" in a map means main memory, and to run on the first device.
SPLIT = {
    "backbone.embeddings": FIRST,
    "backbone.layers.0": FIRST,
    "backbone.layers.1": SECOND,
    "backbone.layers.2": SECOND,
    "backbone.norm_f": SECOND,
    "lm_head": FIRST,
}
MAPS = {
    "two devices": SPLIT,
    "two devices and main memory": {**SPLIT, "backbone.layers.2": "cpu"},
}


@pytest.fixture(params=[*MAPS.values(), None], ids=[*MAPS.keys(), "one device"])
def split(request: pytest.FixtureRequest) -> Iterator[MambaTrace]:
    with StandInDevices():
        module = make_hf()
        if request.param is None:
            yield MambaTrace(move(module, FIRST))
            return
        dispatch_model(module, request.param, main_device=FIRST, skip_keys=module._skip_keys_device_placement)
        yield MambaTrace(module)


@pytest.fixture
def whole() -> MambaTrace:
    """The undivided model, on the CPU."""
    return MambaTrace(make_hf())


def device_of(model: MambaTrace, layer: int) -> torch.device:
    place = getattr(model._module, "hf_device_map", {}).get(f"backbone.layers.{layer}")
    return torch.device(SECOND if place == SECOND else FIRST)


def on_cpu(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """``value`` is on one of the devices, and has the numbers of ``expected``."""
    assert value.device.type == "maia"
    agree(value.cpu(), expected, tolerance)


def metric(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 5]


def test_tensors_of_two_devices_cannot_meet():
    with StandInDevices():
        one, other = torch.ones(2, device=FIRST), torch.ones(2).to(SECOND)
        assert (one + one).device == one.device != other.device
        with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor: tensors on maia:0 and maia:1"):
            one + other
        with pytest.raises(RuntimeError, match="tensors on cpu and maia:0"):
            one + torch.ones(2)
        assert (one.to(SECOND) + other).tolist() == [2, 2]


def test_every_site_is_on_the_device_of_its_layer(split, whole, tokens):
    names = [site.name for site in MAMBA_SITES if site.scope == "mixer"]
    values: dict[MambaTrace, list[list[Tensor]]] = {split: [], whole: []}
    for model, found in values.items():
        with torch.no_grad(), model.trace(tokens):
            for layer in model.layers:
                resid = layer.resid_pre.output
                inside = [getattr(layer.ssm, name).output for name in names]
                found.append([resid, *inside, layer.resid_post.output].save())
    for layer in range(N_LAYERS):
        for value, expected in zip(values[split][layer], values[whole][layer], strict=True):
            assert value.device == device_of(split, layer)
            on_cpu(value, expected)


ASSIGNED: dict[str, Callable[[MambaTrace, int], None]] = {
    "h_start": lambda model, b: setattr(model.layers[1].ssm.h_start, "output", torch.ones(b, E, N)),
    "h[p]": lambda model, b: setattr(model.layers[1].ssm.h[4], "output", torch.ones(b, E, N)),
    "conv": lambda model, b: setattr(model.layers[1].ssm.conv, "output", torch.ones(b, 9, E)),
    "A": lambda model, b: setattr(model.layers[1].ssm.A, "output", -torch.ones(E, N)),
    "in_proj": lambda model, b: setattr(model.layers[1].ssm.in_proj, "output", torch.ones(b, 9, 2 * E)),
    "input of x_proj": lambda model, b: setattr(model.layers[1].ssm.x_proj, "input", torch.ones(b, 9, E)),
    "block": lambda model, b: setattr(model.layers[1], "output", torch.ones(b, 9, 12)),
    "mixer skipped": lambda model, b: model.layers[1].ssm.skip(torch.ones(b, 9, 12)),
    "block skipped": lambda model, b: model.layers[1].skip(torch.ones(b, 9, 12)),
}


@pytest.mark.parametrize("assign", ASSIGNED.values(), ids=ASSIGNED.keys())
def test_a_tensor_of_the_users_is_moved_to_the_device_of_its_layer(split, whole, tokens, assign):
    logits = {}
    for model in (split, whole):
        with torch.no_grad(), model.trace(tokens):
            assign(model, len(tokens))
            logits[model] = model.lm_head.output.save()
    assert split.device == logits[split].device == torch.device(FIRST)
    on_cpu(logits[split], logits[whole])


@pytest.mark.parametrize("place", [lambda ssm: ssm.conv, lambda ssm: ssm.in_proj], ids=["a site", "a module"])
def test_a_tensor_that_cannot_be_moved_is_refused_with_both_devices(split, tokens, place):
    message = rf"layers\[1\].*was given a tensor on the meta device.*it is on {device_of(split, 1)}"
    size = 2 * E if place(split.layers[1].ssm) is split.layers[1].ssm.in_proj else E
    with pytest.raises(SiteValueError, match=message), split.trace(tokens):
        place(split.layers[1].ssm).output = torch.ones(*tokens.shape, size, device="meta")


def test_the_gradient_of_later_values_on_another_device(split, whole, tokens):
    gradients = {}
    for model in (split, whole):
        with model.trace(tokens):
            x = model.layers[0].ssm.x_in.output
            h = model.layers[1].ssm.h[4].output
            logits = model.lm_head.output
            goal = h.square().sum().to(logits.device) + logits[:, -1].square().sum()
            gradients[model] = torch.autograd.grad(goal, [x, h]).save()
    for value, expected in zip(gradients[split], gradients[whole], strict=True):
        on_cpu(value, expected)


def test_generate_with_an_edit_at_every_step(split, whole, tokens):
    found = {}
    for model in (split, whole):
        with (
            torch.no_grad(),
            model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer,
        ):
            for _ in tracer.iter[:3]:
                model.layers[1].ssm.h[-1].output[:] *= 0.5
            found[model] = tracer.result.save()
    assert found[split].tolist() == found[whole].tolist()


def test_a_batch_with_padding_and_an_edit_of_one_invoke(split, whole, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    logits = {}
    for model in (split, whole):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(tokens[:1], attention_mask=mask[:1]):
                model.layers[1].ssm.h[-2].output[:] = 0
            with tracer.invoke(tokens[1:], attention_mask=mask[1:]):
                model.layers[2].ssm.A.output[:] *= 0.5
            with tracer.invoke():
                logits[model] = model.lm_head.output.save()
    on_cpu(logits[split], logits[whole])


def test_run_with_cache(split, whole, tokens):
    logits, cache = split.run_with_cache(tokens)
    expected, expected_cache = whole.run_with_cache(tokens)
    on_cpu(logits, expected)
    for name in expected_cache:
        on_cpu(cache[name], expected_cache[name])


@pytest.mark.parametrize("site", ["h", "resid_pre"])
@pytest.mark.parametrize("grid_of", [patch_grid, attribution_grid])
def test_a_grid(split, whole, tokens, grid_of, site):
    found, expected = (grid_of(model, tokens[:1], tokens[1:2], site, metric).values for model in (split, whole))
    agree(found, expected)


@pytest.mark.parametrize("lens_of", [logit_lens, state_lens])
def test_a_lens(split, whole, tokens, lens_of):
    found, expected = (lens_of(model, tokens[:1], top=2) for model in (split, whole))
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    agree(found.top_logits.cpu(), expected.top_logits)


def test_a_knockout(split, whole, tokens):
    logits = {}
    for model in (split, whole):
        with torch.no_grad(), model.trace(tokens):
            knockout(model, 2, -1, [1, 2], "slow", conv=True)
            logits[model] = model.lm_head.output.save()
    on_cpu(logits[split], logits[whole])
