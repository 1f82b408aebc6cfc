"""Random programs on random models: the first of those that `programs` runs by hand, and what a program notices."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import programs
import pytest
import torch
from reference import Edit
from subjects import ARCHITECTURES, draw_subject, draw_tokens

RECORDED = Path(__file__).parent / "data" / "programs.json"
EACH = 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_program(architecture: str, part: int) -> None:
    for seed in range(part, EACH, 2):
        try:
            programs.run(architecture, seed)
        except Exception as error:
            error.add_note(f"python tests/programs.py --architectures {architecture} --first {seed} --programs 1")
            raise


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_seed_is_a_program(architecture: str) -> None:
    one, other = draw_subject(architecture, 3), draw_subject(architecture, 3)
    assert one.config.to_dict() == other.config.to_dict()
    assert torch.equal(one.module(draw_tokens(1, 0)).logits, other.module(draw_tokens(1, 0)).logits)
    plans = [programs.plan_of(subject, Random(5)) for subject in (one, other)]
    assert plans[0].steps == plans[1].steps
    assert torch.equal(plans[0].tokens, plans[1].tokens)


def test_a_program_notices_an_edit_that_is_not_made() -> None:
    subject = draw_subject("mamba", 0)
    plan = programs.Plan(subject, [programs.Step(subject.hooks[0], "scale")], draw_tokens(1, 0), seed=0)
    plan.edits = {subject.hooks[0]: Edit(subject.hooks[0], "scale", 1.5)}
    with torch.no_grad(), subject.model.trace(plan.tokens):
        logits = subject.model.logits.output.save()
    with pytest.raises(AssertionError, match=r"logits: .* apart"):
        plan.check(logits)


def test_a_gradient_where_it_jumps() -> None:
    """A delta in float32 may fall on the other side of its limit, and passes a derivative on or does not."""
    subject = next(
        subject
        for subject in (draw_subject("mamba2", seed) for seed in range(100))
        if subject.module.dtype == torch.float32 and len(subject.model.layers) == 1
    )
    tokens, seen = draw_tokens(1, 0), {}

    def exact(limit: float) -> list[torch.Tensor]:
        subject.config.time_step_limit = (limit, float("inf"))
        logits = subject.forward(tokens, lambda hook, value: seen.setdefault(hook, value) if limit < 0 else value)
        return programs.gradients(logits, subject.parameters, torch.ones_like(logits))

    exact(-1.0)
    delta = seen["blocks.0.hook_delta"].detach().flatten().sort().values.tolist()
    here, rounded, other = (lambda limit=limit: exact(limit) for limit in (delta[9] - 1e-10, delta[9] + 1e-10, 1.0))
    assert not torch.allclose(here()[0], rounded()[0], rtol=1e-2)
    programs.same_gradients(subject, rounded(), here, "a parameter")
    with pytest.raises(AssertionError, match=r"gradient of a parameter: .* apart"):
        programs.same_gradients(subject, other(), here, "a parameter")


def test_the_recorded_runs_had_no_failure() -> None:
    record = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(record) == set(ARCHITECTURES)
    for run in record.values():
        assert run["failures"] == []
        assert sum(run["kinds"].values()) == run["programs"] >= 10_000
