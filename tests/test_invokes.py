"""Which rows belong to which invoke, where generation makes several rows of each prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from mamba_trace import MambaTrace
from mamba_trace.tracing.invokes import rows_of_a_prompt

KINDS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams, all returned": {"num_beams": 2, "num_return_sequences": 2},
    "sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "one row each": {},
}


def results(returned: Any) -> dict[str, Tensor]:
    """Every tensor of what generate returned, by name; the rows of beams count from the first of all."""
    if isinstance(returned, Tensor):
        return {"sequences": returned}
    return {
        f"{name} {i}": part
        for name, value in returned.items()
        for i, part in enumerate(value if isinstance(value, tuple) else [value])
        if isinstance(part, Tensor) and name != "beam_indices"
    }


def halve_and_record(model: MambaTrace, tracer: Any, box: dict[str, Any]) -> None:
    for step in tracer.iter[:3]:
        if step == 1:
            model.layers[1].ssm.A.output[:] *= 2
            model.layers[1].ssm.y.output[:] *= 0.5
            box["y"] = model.layers[2].ssm.y.output.clone()
    box["returned"] = tracer.result


def alone(model: MambaTrace, prompt: Tensor, edit: bool, **kwargs: Any) -> dict[str, Any]:
    box: dict[str, Any] = {}
    with model.generate(prompt, **kwargs) as tracer:
        if edit:
            halve_and_record(model, tracer, box)
        else:
            box["returned"] = tracer.result
        box.save()
    return box


@pytest.mark.parametrize("dictionary", [False, True], ids=["ids", "dictionary"])
@pytest.mark.parametrize("where", ["trace", "invoke", "configuration", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_invoke_sees_and_edits_its_own_rows(tiny_hf, tokens, kind, where, dictionary):
    tiny = MambaTrace(tiny_hf(dtype=torch.float64))
    one, two = tokens[:1, :5], tokens[1:, :5]
    common = {"do_sample": False, **KINDS[kind], "max_new_tokens": 3, "eos_token_id": None}
    common |= {"return_dict_in_generate": True, "output_scores": True} if dictionary else {}
    edited, clean = alone(tiny, one, True, **common), alone(tiny, two, False, **common)["returned"]

    if where == "configuration":
        common = {"generation_config": GenerationConfig(**{**common, "pad_token_id": 0})}
    elif where == "model":
        tiny._module.generation_config.update(**common)
        common = {}
    box: dict[str, Any] = {}
    shapes = []
    with tiny.generate(**({} if where == "invoke" else common)) as tracer:
        with tracer.invoke(one, **(common if where == "invoke" else {})):
            halve_and_record(tiny, tracer, box)
            box.save()
        with tracer.invoke(two):
            shapes.append(len(tiny.layers[0].ssm.y.output))
            shapes.save()
            returned = tracer.result.save()
    k = max(KINDS[kind].get("num_beams", 1), KINDS[kind].get("num_return_sequences", 1))
    assert box["y"].shape == (k, 1, 24)
    assert shapes == [2 * k]
    torch.testing.assert_close(box["y"], edited["y"], rtol=0, atol=1e-10)
    for got, expected in ((box["returned"], edited["returned"]), (returned, clean)):
        assert isinstance(got, ModelOutput) == dictionary
        assert results(got).keys() == results(expected).keys()
        for name, value in results(expected).items():
            assert results(got)[name].shape == value.shape, name
            torch.testing.assert_close(results(got)[name], value, rtol=0, atol=1e-10, msg=name)


def test_what_comes_back_may_be_replaced_by_one_invoke(tiny, tokens):
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 2}
    plain = tiny.generate(tokens[1:], **kwargs)
    with tiny.generate(**kwargs) as tracer:
        with tracer.invoke(tokens[:1]):
            tracer.result = torch.zeros_like(tracer.result)
        with tracer.invoke(tokens[1:]):
            other = tracer.result.save()
        with tracer.invoke():
            everything = tracer.result.save()
    assert torch.equal(other, plain)
    assert everything.shape == (6, 11)
    assert not everything[:2].any()
    assert torch.equal(everything[2:], plain)


def test_one_invoke_goes_on_working(tiny, tokens):
    with tiny.generate(tokens, num_beams=3, do_sample=False, max_new_tokens=2) as tracer:
        y = tiny.layers[1].ssm.y.output.save()
        ids = tracer.result.save()
    assert y.shape[0] == 9
    assert torch.equal(ids, tiny._module.generate(tokens, num_beams=3, do_sample=False, max_new_tokens=2))


def test_rows_of_a_prompt(tiny):
    tiny._module.generation_config.num_beams = 4
    assert rows_of_a_prompt(tiny, tiny.generate, {}) == (4, 1)
    assert rows_of_a_prompt(tiny, tiny.generate, {"num_beams": 1}) == (1, 1)
    assert rows_of_a_prompt(tiny, tiny.generate, {"num_return_sequences": 5}) == (5, 5)
    config = GenerationConfig(num_beams=2, num_return_sequences=2)
    assert rows_of_a_prompt(tiny, tiny.generate, {"generation_config": config}) == (2, 2)
    assert rows_of_a_prompt(tiny, tiny._call, {}) == (1, 1)
