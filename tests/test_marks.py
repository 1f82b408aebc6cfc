"""Digests tell apart what gives other cells, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModuleFactory
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import FileError
from mamba_trace.patching import logit_diff, patch_grid
from mamba_trace.patching.marks import mark_of_function, mark_of_weights, qualified

THRESHOLD = 1.0
calls = 0


def above(logits: Tensor) -> Tensor:
    return (logits[:, 0] > THRESHOLD).float()


def counted(logits: Tensor) -> Tensor:
    global calls
    calls += 1
    return logits[:, 0]


def normalised(metric: Callable[[Tensor], Tensor], low: float) -> Callable[[Tensor], Tensor]:
    def recovered(logits: Tensor) -> Tensor:
        return metric(logits) - low

    return recovered


class Counting:
    """A metric that counts its calls."""

    def __init__(self, metric: Any) -> None:
        self.metric, self.calls = metric, 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return self.metric(logits)


def test_functions_that_do_something_else_have_another_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [
        mark_of_function(metric)
        for metric in (
            above,
            counted,
            normalised(lambda logits: logits[:, 0], 0.0),
            normalised(lambda logits: logits[:, 0], 1.0),
            normalised(lambda logits: logits[:, 1], 0.0),
            normalised(lambda logits: logits.softmax(-1)[:, 0], 0.0),
            Counting(above),
            Counting(counted),
        )
    ]
    assert len(set(marks)) == len(marks)
    monkeypatch.setitem(globals(), "THRESHOLD", 2.0)
    assert mark_of_function(above) != marks[0]


def test_a_mark_stays_where_calls_are_counted_and_the_function_is_made_anew() -> None:
    before, counting = mark_of_function(counted), Counting(above)
    again = mark_of_function(counting)
    counted(torch.zeros(1, 2))
    counting(torch.zeros(1, 2))
    assert mark_of_function(counted) == before
    assert mark_of_function(counting) == again
    one, other = (normalised(lambda logits: logits[:, 0], 0.5) for _ in range(2))
    assert mark_of_function(one) == mark_of_function(other)


def test_folders_know_a_metric_of_this_package_wherever_its_module_stands(tiny: MambaTrace) -> None:
    assert qualified(logit_diff(tiny, 3, 4)) == "mamba_trace.metrics.LogitDiff"


def test_weights_of_another_model(tiny_hf: ModuleFactory) -> None:
    module = tiny_hf()
    before = mark_of_weights(module)
    assert mark_of_weights(tiny_hf()) == before
    with torch.no_grad():
        module.backbone.layers[1].mixer.D.mul_(0.5)
    assert mark_of_weights(module) != before


def test_a_folder_of_one_architecture_is_none_of_another(
    tiny_hf: ModuleFactory, tokens: Tensor, tmp_path: Path
) -> None:
    """Where the weights have the same names, shapes and numbers, and a metric says nothing."""

    def grid(model_type: str, **changes: Any) -> None:
        model = MambaTrace(tiny_hf(model_type=model_type, **changes))
        metrics: Any = {"m": lambda logits: 0.0 * logits[:, 0]}
        patch_grid(model, tokens[:1], tokens[1:2], "h", metrics, keep=tmp_path / model_type, progress=False)

    assert mark_of_weights(tiny_hf(model_type="falcon_mamba")) == mark_of_weights(tiny_hf(model_type="mamba"))
    grid("falcon_mamba")
    (tmp_path / "falcon_mamba").rename(tmp_path / "mamba")
    with pytest.raises(FileError, match="its architecture is 'Falcon-Mamba', and this one's 'Mamba-1'"):
        grid("mamba")
    grid("mamba2")
    grid("mamba2")
    for other in ({"time_step_limit": (0.1, 0.3)}, {"layer_norm_epsilon": 1e-2}, {"n_groups": 1, "state_size": 10}):
        with pytest.raises(FileError, match="its model has another configuration"):
            grid("mamba2", **other)


def test_a_folder_from_before_architectures_were_told_apart_is_a_mamba_1(
    tiny: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor, tmp_path: Path
) -> None:
    def grid(model: MambaTrace) -> None:
        patch_grid(model, tokens[:1], tokens[1:2], "h", logit_diff(model, 3, 4), keep=tmp_path, progress=False)

    grid(tiny)
    path = tmp_path / "question.json"
    question = json.loads(path.read_text())
    for name in ("architecture", "settings"):
        del question[name]
    path.write_text(json.dumps(question))
    grid(tiny)
    with pytest.raises(FileError, match="its architecture is 'Mamba-1', and this one's 'Mamba-2'"):
        grid(MambaTrace(tiny_hf(model_type="mamba2")))


def test_a_folder_belongs_to_its_metric_and_weights(tiny_hf: ModuleFactory, tokens: Tensor, tmp_path: Path) -> None:
    tiny, other = MambaTrace(tiny_hf()), MambaTrace(tiny_hf())

    def grid(model: MambaTrace, metric: Any) -> Tensor:
        arguments: dict[str, Any] = {"keep": tmp_path, "progress": False}
        return patch_grid(model, tokens[:1], tokens[1:2], "h", {"m": metric}, **arguments)["m"].values

    metric = logit_diff(tiny, 3, 4)
    first = grid(tiny, normalised(metric, 0.0))
    assert torch.equal(grid(other, normalised(logit_diff(other, 3, 4), 0.0)), first)
    with pytest.raises(FileError, match="measured by another metric"):
        grid(tiny, normalised(lambda logits: metric(logits) * 1.0, 0.0))
    with torch.no_grad():
        other._module.backbone.layers[1].mixer.D.add_(1e-6)
    with pytest.raises(FileError, match="of a model with other weights"):
        grid(other, normalised(logit_diff(other, 3, 4), 0.0))
