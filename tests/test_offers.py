"""What a forward offers, what it may leave out, and which modules it may compute past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import by_hand
from conftest import FUSED, agree, both_families, functions, near
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.errors import SiteValueError
from mamba_trace.modeling.offers import SITE_NAMES, names_inside, same_contents
from mamba_trace.sites import FAMILIES, SITES


def test_the_forward_does_what_its_source_says_where_that_is_wanted(tiny: MambaTrace, tokens: Tensor) -> None:
    ssm = tiny.layers[1].ssm
    assert "self_convolve" in str(ssm.source)
    with torch.no_grad(), tiny.trace(tokens):
        ssm.source.self_scan_0.output.save()
    assert functions(tiny.last_run[1]) == ["causal_conv", "selective_scan"]
    assert functions(tiny.last_run[0]) == FUSED


def test_a_pytorch_hook_on_an_inner_module_fires(tiny: MambaTrace, tokens: Tensor) -> None:
    mixer = tiny._module.backbone.layers[1].mixer
    for name in ("conv1d", "act", "in_proj", "x_proj", "dt_proj", "out_proj"):
        fired = []
        handle = getattr(mixer, name).register_forward_hook(lambda *args, fired=fired: fired.append(1))
        tiny._module(tokens)
        assert fired == [1], name
        handle.remove()
    tiny._module(tokens)
    assert [functions(run) for run in tiny.last_run] == [FUSED] * 3


def test_a_hook_on_all_modules_fires_on_every_one(tiny: MambaTrace, tokens: Tensor) -> None:
    called: set[int] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: called.add(id(module)))
    try:
        tiny._module(tokens)
    finally:
        handle.remove()
    named = dict(tiny._module.named_modules())
    missed = [name for name, module in named.items() if id(module) not in called]
    assert missed == ["backbone.layers"]  # a list, which is never called


def test_a_replaced_convolution_is_called(tiny: MambaTrace, tokens: Tensor) -> None:
    class Doubled(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    before = tiny._module(tokens).logits
    tiny._module.backbone.layers[1].mixer.conv1d.__class__ = Doubled
    del tiny._module.backbone.layers[1].mixer.conv1d.forward  # what nnsight had put there
    assert not torch.allclose(tiny._module(tokens).logits, before)
    assert functions(tiny.last_run[1]) == ["causal_conv", "gated_scan"]


def test_a_convolution_with_another_forward_is_called(tiny: MambaTrace, tokens: Tensor) -> None:
    conv1d = tiny._module.backbone.layers[1].mixer.conv1d
    own = conv1d.forward
    conv1d.forward = lambda x: 2 * own(x)
    tiny._module(tokens)
    assert functions(tiny.last_run[1]) == ["causal_conv", "gated_scan"]


def test_the_inner_convolution_is_found_at_a_later_step(tiny: MambaTrace, tokens: Tensor) -> None:
    """A step that bypassed it counts as a visit all the same."""
    found = []
    with torch.no_grad(), tiny.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[2]:
            found.append(tiny.layers[1].ssm.conv1d.output.save())
            found.append(tiny.layers[1].ssm.delta.output.save())
    assert found[0].shape[0] == tokens.shape[0]
    assert found[1].shape == (tokens.shape[0], 1, 24)


def test_the_names_of_a_module_and_of_a_stage_are_the_table_s_in_its_order(tiny: MambaTrace) -> None:
    for family in FAMILIES:
        own = [site for site in SITES if site.scope == "mixer" and family in site.families]
        assert names_inside(family, "states") == tuple(site.name for site in own if site.stage == "states")
    in_mixer = [site.name for site in SITES if site.scope == "mixer" and "selective" in site.families]
    assert list(tiny.layers[0].ssm._module.__dict__[SITE_NAMES]) == [name for name in in_mixer if name != "out_proj"]
    assert tiny.layers[0]._module.__dict__[SITE_NAMES] == ("resid_pre", "layer_input", "resid_post")


@both_families
def test_another_activation_is_called(tiny: MambaTrace, hf: Any, tokens: Tensor) -> None:
    """The kernels apply SiLU: they must not where something else stands for it, whatever the configuration says."""
    for activation in (nn.GELU(), nn.SiLU(inplace=True), nn.Sequential(nn.SiLU())):
        tiny._module.backbone.layers[1].mixer.act = activation
        with torch.no_grad():
            fast = tiny._module(tokens).logits
            tiny.kernels = "reference"
            agree(fast, tiny._module(tokens).logits)
            tiny.kernels = "auto"
    near(fast, by_hand(hf, tokens)["lm_head"], 1e-5)


def test_a_convolution_of_another_length_is_named(tiny: MambaTrace, tokens: Tensor) -> None:
    mixer = tiny._module.backbone.layers[1].mixer
    mixer.conv1d = nn.Conv1d(24, 24, 3, groups=24)
    with pytest.raises(SiteValueError, match=r"layers\[1\]\.ssm\.conv1d returned 7 columns for the 9.*padding=2"):
        tiny._module(tokens)


@pytest.mark.parametrize(
    ("after", "same"), [([1.0, 2.0], True), ([1.0, 2.5], False), ([1.0, float("nan")], False)], ids=str
)
def test_an_edit_is_seen_by_its_contents(after: list[float], same: bool) -> None:
    assert same_contents(torch.tensor([1.0, 2.0]), torch.tensor(after)) is same
    assert not same_contents(torch.tensor([1.0, 2.0]), torch.tensor(after, device="meta"))
