"""Agreement with MambaLens: every hook's value, the logits after interventions on every hook, gradients.

The numbers come from MambaLens 0.0.4 itself, in float32; tests/record_mamba_lens.py says what each one is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Edit
from safetensors import safe_open
from torch import Tensor

from mamba_trace import MambaTrace, names

FILE = Path(__file__).parent / "data" / "mamba_lens.safetensors"
LENGTH = 9
TOLERANCE = 1e-5  # of the largest value


def load() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(FILE), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["spec"])  # noqa: SIM118


RECORDED, SPEC = load()
TOKENS = RECORDED["tokens"]


def model_from(prefix: str, config: dict[str, Any]) -> MambaTrace:
    weights = {name.removeprefix(prefix): tensor for name, tensor in RECORDED.items() if name.startswith(prefix)}
    return MambaTrace.from_state_dict(config, weights)


@pytest.fixture(scope="module")
def model() -> MambaTrace:
    """The recorded model, from the state dict as MambaLens names it."""
    return model_from("weights.", SPEC["config"])


def agree(actual: Tensor, name: str) -> None:
    expected = RECORDED[name]
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape, name
    difference, largest = float((actual - expected).detach().abs().max()), float(expected.abs().max())
    assert difference <= TOLERANCE * largest, f"{name}: {difference / largest:.1e} of the largest value"


def in_order(edits: list[Edit]) -> list[Edit]:
    """In our order of execution, which is not MambaLens's."""
    order = {hook: i for i, hook in enumerate(names.hook_names(SPEC["config"]["n_layers"], LENGTH))}
    return sorted(edits, key=lambda edit: order[edit.hook])


def edits_of(k: int) -> list[Edit]:
    """The edits of recorded intervention k, in our order."""
    edits = []
    for i, one in enumerate(SPEC["interventions"][k]["edits"]):
        argument = one.get("factor", RECORDED.get(f"intervention.{k}.{i}.tensor"))
        edits.append(Edit(one["hook"], one["op"], argument, one.get("position", 0)))
    return in_order(edits)


def describe(k: int) -> str:
    return " ".join(f"{edit.hook}:{edit.op}" for edit in edits_of(k))


INTERVENTIONS = range(len(SPEC["interventions"]))


def test_the_recording_covers_every_kind_of_hook(model: MambaTrace) -> None:
    kinds = {name.split("hook_", 1)[1].split(".")[0] for name in SPEC["hook_names"]}
    edited = {edit.hook.split("hook_", 1)[1].split(".")[0] for k in INTERVENTIONS for edit in edits_of(k)}
    assert edited == kinds
    assert len(INTERVENTIONS) == 69
    assert SPEC["ignored"] == []


def test_the_hooks_are_the_same(model: MambaTrace) -> None:
    ours = model.hook_names(LENGTH)
    assert set(ours) == set(SPEC["hook_names"])
    assert len(ours) == len(SPEC["hook_names"])
    assert all(names.to_hook_name(names.to_path(name)) == name for name in ours)


@pytest.mark.parametrize("prefix", ["weights.", "original."])
def test_every_value(prefix: str) -> None:
    model = model_from(prefix, SPEC["config" if prefix == "weights." else "original_config"])
    values = {}
    with model.trace(TOKENS):
        for name in model.hook_names(LENGTH):
            values[name] = model.hook(name).output.save()
        logits = model.output.logits.save()
    assert len(values) == sum(name.startswith("value.") for name in RECORDED)
    for name, value in values.items():
        agree(value, f"value.{name}")
    agree(logits, "logits")


@pytest.mark.parametrize("name", SPEC["hook_names"][::7])
def test_a_value_read_alone(model: MambaTrace, name: str) -> None:
    with model.trace(TOKENS):
        value = model.hook(name).output.save()
        logits = model.lm_head.output.save()
    agree(value, f"value.{name}")
    agree(logits, "logits")


@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
@pytest.mark.parametrize("k", INTERVENTIONS, ids=describe)
def test_intervention(model: MambaTrace, k: int, in_place: bool) -> None:
    with model.trace(TOKENS):
        for edit in edits_of(k):
            envoy = model.hook(edit.hook)
            edit.in_place(envoy) if in_place else edit.assign(envoy)
        logits = model.lm_head.output.save()
    agree(logits, f"intervention.{k}.logits")


def test_interventions_in_batched_invokes(model: MambaTrace) -> None:
    # An edit of A, which has no batch dimension, is one for every invoke; replace_first_row is one row's.
    batched = [k for k in INTERVENTIONS if not any(edit.hook.endswith("_A") for edit in edits_of(k))]
    logits = {}
    with model.trace() as tracer:
        for k in batched:
            with tracer.invoke(TOKENS):
                for edit in edits_of(k):
                    edit.in_place(model.hook(edit.hook))
                logits[k] = model.lm_head.output.save()
    assert len(logits) > 60
    for k, value in logits.items():
        agree(value, f"intervention.{k}.logits")


def test_gradients_through_nnsight(model: MambaTrace) -> None:
    """One backward trace that reads the gradient of every recorded place, last place first."""
    token, hooks = SPEC["gradient"]["token"], set(SPEC["gradient"]["hooks"])
    ordered = [name for name in model.hook_names(LENGTH) if name in hooks]
    gradients = {}
    with model.trace(TOKENS):
        values = {name: model.hook(name).output for name in ordered}
        score = model.lm_head.output[:, -1, token].sum()
        with score.backward():
            for name in reversed(ordered):
                gradients[name] = values[name].grad.save()
    assert set(gradients) == hooks
    assert len(hooks) == sum(name.startswith("grad.") for name in RECORDED)
    for name, gradient in gradients.items():
        agree(gradient, f"grad.{name}")


def test_gradients_through_autograd(model: MambaTrace) -> None:
    token, hooks = SPEC["gradient"]["token"], SPEC["gradient"]["hooks"]
    values = {}
    with model.trace(TOKENS):
        for name in model.hook_names(LENGTH):
            if name in hooks:
                values[name] = model.hook(name).output.save()
        score = model.lm_head.output[:, -1, token].sum().save()
    for name, gradient in zip(values, torch.autograd.grad(score, list(values.values())), strict=True):
        agree(gradient, f"grad.{name}")


@pytest.mark.parametrize("hook", SPEC["gradient"]["hooks"][::5])
def test_a_gradient_read_alone(model: MambaTrace, hook: str) -> None:
    with model.trace(TOKENS):
        value = model.hook(hook).output
        score = model.lm_head.output[:, -1, SPEC["gradient"]["token"]].sum()
        with score.backward():
            gradient = value.grad.save()
    agree(gradient, f"grad.{hook}")
