"""The hybrid that ships: both kinds of layers are needed, and grids say which of them carries the answer.

What an ablation leaves is measured on sentences of held-out names, with the term that a layer adds to the stream
set to zero; a guess between the two names is right half of the time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from tutorial import train_demo

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.errors import CheckpointError
from mamba_trace.interventions import ablate
from mamba_trace.model import DEMOS
from mamba_trace.patching import Metric, logit_diff, patch_grid

SSM, ATTENTION = [0, 1, 3, 4, 5, 7], [2, 6]
#: Positions of the prompt: the name of the giver, the verb after it, and the last, which predicts the answer.
GIVER, VERB, LAST = 10, 11, 14


@pytest.fixture(scope="module")
def model() -> MambaTrace:
    return MambaTrace.demo("hybrid")


@pytest.fixture(scope="module")
def metric(model: MambaTrace) -> Metric:
    return logit_diff(model, " Emma", " Shelby")


def share_of(model: MambaTrace, site: str, metric: Metric) -> Tensor:
    return patch_grid(model, PROMPT, SOURCE, site, metric, progress=False).normalized()


def accuracy_without(model: MambaTrace, layers: Sequence[int]) -> float:
    """Share of 200 sentences of held-out names that are answered when these layers add nothing to the stream."""
    held_out = json.loads((DEMOS["hybrid"] / "splits.json").read_text())["held_out"]
    sample = list(itertools.islice(train_demo().examples(held_out, "hybrid"), 200))
    answers = torch.tensor([model.to_single_token(example.answer) for example in sample])
    with torch.no_grad(), model.trace([example.prompt for example in sample]):
        for layer in layers:
            ablate(model.layers[layer].ssm_out if layer in SSM else model.layers[layer].attn_out)
        logits = model.logits.output[:, -1].save()
    return (logits.argmax(-1) == answers).float().mean().item()


def test_layers_are_of_two_kinds(model: MambaTrace) -> None:
    assert model.ssm_layers == SSM
    assert model.attention_layers == ATTENTION
    assert set(model.layer_kinds) == {"SSM", "attention"}


def test_another_architecture_is_refused_with_those_that_ship() -> None:
    with pytest.raises(CheckpointError, match="'mamba', 'mamba2', 'hybrid'"):
        MambaTrace.demo("transformer")
