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


def test_the_weights_answer_after_a_load_by_name(model: MambaTrace) -> None:
    with torch.no_grad(), model.trace(PROMPT):
        answer = model.logits.output[0, -1].argmax().save()
    assert model.to_string(answer) == " Emma"
    with torch.no_grad(), model.generate(SOURCE, max_new_tokens=3, do_sample=False) as tracer:
        tokens = tracer.result.save()
    assert model.to_string(tokens[0, -3:]) == " Shelby.<|endoftext|>"


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["SSM 0", "SSM 1", "attention 2"])
def test_nothing_stands_in_for_the_first_two_ssms_and_the_first_attention(needed: int, model: MambaTrace) -> None:
    assert accuracy_without(model, [needed]) < 0.25


def test_no_kind_does_without_the_other(model: MambaTrace) -> None:
    assert accuracy_without(model, SSM) < 0.05
    assert accuracy_without(model, ATTENTION) < 0.05


def test_the_other_layers_can_be_left_out_all_ssms_at_once(model: MambaTrace) -> None:
    assert accuracy_without(model, []) >= 0.99
    assert accuracy_without(model, [3, 4, 5, 7]) >= 0.95
    assert accuracy_without(model, [6]) >= 0.95


def test_the_stream_leaves_the_giver_by_ssms_and_the_verb_by_attention(model: MambaTrace, metric: Metric) -> None:
    share = share_of(model, "resid_pre", metric)
    assert share.shape == (8, 15)
    path = [GIVER, GIVER, VERB, LAST, LAST, LAST, LAST, LAST]
    for layer, position in enumerate(path):
        assert share[layer, position] > 0.9, (layer, position)
        others = share[layer].index_fill(0, torch.tensor(position), 0.0)
        assert others.abs().max() < 0.05, layer


def test_one_cell_of_attention_carries_the_answer(model: MambaTrace, metric: Metric) -> None:
    share = share_of(model, "attn_out", metric)
    assert share.shape == (len(ATTENTION), 15)
    assert share[0, LAST] > 0.9
    share[0, LAST] = 0.0
    assert share.abs().max() < 0.05


def test_ssms_bring_it_to_the_verb_and_their_states_hold_nothing(model: MambaTrace, metric: Metric) -> None:
    written, states = share_of(model, "ssm_out", metric), share_of(model, "h", metric)
    assert written.shape == states.shape == (len(SSM), 15)
    assert written[0, GIVER] > 0.9
    assert written[1, VERB] > 0.9
    assert share_of(model, "conv", metric)[1, VERB] > 0.9, "the convolution carries it there"
    assert states.abs().max() < 0.05


def test_attention_reads_both_names_and_the_verb_after_the_giver(model: MambaTrace) -> None:
    with torch.no_grad(), model.trace(PROMPT):
        pattern = model.layers[2].attn.pattern.output[0, :, -1].save()
    first, second = 2, 4
    seen = pattern[:, [first, second, VERB]]  # [Hq,3]
    assert seen.sum(1).min() > 0.8
    assert (seen.amax(0) > 0.25).all(), "each of the three is read by some head"
