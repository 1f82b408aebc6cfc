"""Every case of `bad_input` is refused as it says, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bad_input
import pytest
import torch
from bad_input import CASES, IDS
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.tracing.one_run import _runs
from mamba_trace.tracing.positions import CURSOR
from mamba_trace.tracing.saving import local

HOOKS = [f"_{kind}" for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")]


def traced(model: MambaTrace) -> list[Tensor]:
    """The state of the first layer with an SSM after a token, edited, and the logits of a trace."""
    layer = model.ssm_layers[0]
    with torch.no_grad(), model.trace(IDS):
        state = model.layers[layer].ssm.h[2].output.save()
        model.layers[layer].ssm.h[3].output[:] *= 2
        logits = model.lm_head.output.save()
    return [state, logits]


def left(model: MambaTrace) -> dict[str, Any]:
    """What a run may leave on a model: hooks, workers, forwards and notes of a pass over positions."""
    modules = list(model._module.modules())
    return {
        "hooks": sum(len(getattr(module, name)) for module in modules for name in HOOKS),
        "forwards": [type(module.__dict__.get("forward")).__name__ for module in modules],
        "cursors": [CURSOR in module.__dict__ for module in modules],
        "workers": (model.interleaver.interleaving, [*model.interleaver.mediators], model.interleaver.batcher),
        "threads": (list(local.guards), list(local.borrowers), list(_runs)),
        "global hooks": len(torch.nn.modules.module._global_forward_hooks),
    }


@pytest.fixture(scope="module")
def of() -> SimpleNamespace:
    """The models, what a trace of each gives, and their parameters."""
    models = vars(bad_input.models())
    return SimpleNamespace(
        models=models,
        traces={name: traced(model) for name, model in models.items()},
        left={name: left(model) for name, model in models.items()},
        parameters={name: [p.clone() for p in model._module.parameters()] for name, model in models.items()},
    )


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 120


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w.= ]+", "", case.what)[:60])
def test_it_is_refused_and_leaves_nothing(
    of: SimpleNamespace, case: bad_input.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = of.models[case.on]
    with pytest.raises(case.error) as error:
        case.call(model)
    assert re.search(case.words, str(error.value), re.DOTALL), str(error.value)
    del error
    assert left(model) == of.left[case.on]
    after = zip(traced(model), of.traces[case.on], strict=True)
    assert all(torch.equal(value, before) for value, before in after)
    parameters = zip(model._module.parameters(), of.parameters[case.on], strict=True)
    assert all(torch.equal(value, before) for value, before in parameters)
