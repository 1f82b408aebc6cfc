"""Modules from a configuration alone, or with a state dict: every architecture, bit for bit, nothing left unmade."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import MODEL_TYPES, assert_same_weights, each_architecture, family_config, family_model
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config, convert_state_dict
from mamba_trace.conversion.building import from_scratch
from mamba_trace.errors import CheckpointError

IDS = torch.arange(9)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}])
@each_architecture
def test_a_state_dict_gives_the_same_model(model_type: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    module = family_model(model_type, dtype=dtype, **changes)
    torch.empty(10**6).fill_(torch.nan)  # so that memory that is not written does not happen to hold ones
    model = MambaTrace.from_state_dict(module.config, module.state_dict())
    assert_same_weights(model._module, module)
    assert type(model._module.config) is type(module.config)
    if dtype == torch.float32:
        assert (logits(model._module) - logits(module)).abs().max() < 1e-5 * logits(module).abs().max()


@each_architecture
def test_buffers_that_no_state_dict_holds_are_made_anew(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(self: torch.nn.Module, *, device: str, recurse: bool = True) -> torch.nn.Module:
        return self._apply(lambda tensor: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype), recurse=recurse)

    monkeypatch.setattr(torch.nn.Module, "to_empty", filled)
    module = family_model(model_type)
    expected = dict(module.named_buffers())
    assert bool(expected) is (model_type == "falcon_mamba")
    before = torch.get_rng_state()
    models = [MambaTrace.from_state_dict(module.config, module.state_dict()), MambaTrace.from_config(module.config)]
    assert torch.equal(torch.get_rng_state(), before)
    for model in models:
        found = dict(model._module.named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())


@pytest.mark.parametrize("given", MODEL_TYPES)
@each_architecture
def test_the_configuration_of_another_architecture(model_type: str, given: str) -> None:
    """Falcon-Mamba's weights cannot be told from Mamba-1's; those of Mamba-2 can."""
    weights = family_model(model_type).state_dict()
    if ("mamba2" in (model_type, given)) and model_type != given:
        with pytest.raises(CheckpointError, match="the layers look like those of a Mamba"):
            MambaTrace.from_state_dict(family_config(given), weights)
    else:
        MambaTrace.from_state_dict(family_config(given), weights)


@pytest.mark.parametrize("format", ["original", "mamba_lens"])
def test_weights_in_a_format_that_falcon_mamba_does_not_have(format: str) -> None:
    weights = convert_state_dict(family_model("mamba").state_dict(), format)
    with pytest.raises(CheckpointError, match=f"a Falcon-Mamba, which has no {format} format"):
        MambaTrace.from_state_dict(family_config("falcon_mamba"), weights)


@pytest.mark.parametrize(("one", "other"), [("mamba", "falcon_mamba"), ("falcon_mamba", "mamba"), ("mamba2", "mamba")])
def test_a_configuration_that_names_another_class(one: str, other: str) -> None:
    class_name = type(family_model(other)).__name__
    config = family_config(one).to_dict() | {"architectures": [class_name]}
    with pytest.raises(CheckpointError, match=f"says model_type '{one}', and architectures {class_name}"):
        MambaTrace.from_state_dict(config, family_model(one).state_dict())
    with pytest.raises(CheckpointError, match=f"says model_type '{one}', and architectures {class_name}"):
        MambaTrace.from_config(config)


@pytest.mark.parametrize(("one", "other"), [("mamba", "mamba2"), ("mamba2", "mamba")])
def test_a_configuration_that_was_converted_from_another_architecture(one: str, other: str) -> None:
    config, source = family_config(one), convert_config(family_config(other), "original", keep_source=False)
    config.mamba_trace_source = {"format": "original", "trained": True, "config": source}
    with pytest.raises(CheckpointError, match="mamba_trace_source says that it was converted from that of a Mamba-"):
        MambaTrace.from_state_dict(config, family_model(one).state_dict())


@each_architecture
def test_a_state_dict_in_every_format_that_there_is(model_type: str) -> None:
    module = family_model(model_type)
    for format in {"mamba": ("original", "mamba_lens"), "mamba2": ("original",)}.get(model_type, ()):
        config = convert_config(module.config, format)
        model = MambaTrace.from_state_dict(config, convert_state_dict(module.state_dict(), format))
        assert_same_weights(model._module, module)


@each_architecture
def test_equal_seeds_give_equal_models(model_type: str) -> None:
    first, again, other = (from_scratch(family_config(model_type), torch.float32, seed) for seed in (3, 3, 4))
    assert_same_weights(first, again)
    assert not torch.equal(logits(first), logits(other))
    assert torch.isfinite(logits(first)).all()
