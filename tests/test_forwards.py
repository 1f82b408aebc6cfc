"""Who stands between a caller and a module's own forward."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from nnsight import NNsight
from torch import nn

from mamba_trace.tracing import is_itself, rebind_forward

X = torch.ones(2, 3)


@pytest.fixture
def probe() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_the_body_under_a_controller_can_be_told_that_the_class_changed(probe):
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    before = probe._module[0](X)
    probe._module[0].__class__ = Doubled
    assert torch.equal(probe._module[0](X), before), "nnsight keeps the forward it wrapped"
    rebind_forward(probe._module[0])
    assert torch.equal(probe._module[0](X), 2 * before)
    with probe.trace(X):
        value = probe[0].output.save()
    assert torch.equal(value, 2 * before)


def test_a_module_is_itself_until_somebody_changes_it():
    class Other(nn.Linear):
        pass

    plain = nn.Linear(3, 3)
    assert is_itself(plain, nn.Linear)
    assert not is_itself(Other(3, 3), nn.Linear)
    handle = plain.register_forward_pre_hook(lambda *args: None)
    assert not is_itself(plain, nn.Linear)
    handle.remove()
    assert is_itself(plain, nn.Linear)
    add_hook_to_module(plain, AlignDevicesHook(execution_device="cpu"))
    assert not is_itself(plain, nn.Linear)  # its forward is accelerate's
    wrapped = NNsight(nn.Sequential(plain))
    assert is_itself(plain, nn.Linear)  # nnsight's, which runs what accelerate's hook does and then its own
    torch.testing.assert_close(wrapped._module(X), X @ plain.weight.T + plain.bias)
    plain._hf_hook.offload = True
    assert not is_itself(plain, nn.Linear)
    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    assert not is_itself(replaced, nn.Linear)
