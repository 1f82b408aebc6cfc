"""Which visit of a place a worker gets, in any plan of steps, and in which order a place serves workers."""

from __future__ import annotations

import random
from typing import Any

import nnsight
import pytest
import torch
from conftest import agree
from torch import Tensor

from mamba_trace import MambaTrace

STEPS = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module")
def tiny(tiny_hf) -> MambaTrace:
    return MambaTrace(tiny_hf())


PLACES = [
    "layers[0].resid_pre",
    "layers[0].ssm.conv1d",
    "layers[0].ssm.delta",
    "layers[0].ssm.h[-1]",
    "layers[0].ssm.y",
    "layers[0].resid_post",
    "layers[1].ssm.x_in",
    "layers[1].ssm.h[-1]",
    "layers[1].ssm.out_proj",
    "layers[1].resid_post",
    "layers[2].norm",
    "norm_f",
    "lm_head",
]


@pytest.fixture(scope="module")
def everything(tiny, tokens) -> dict[str, list[Tensor]]:
    """What there is at the last position of each place in each step, read in traces of the grown prompt."""
    with tiny.generate(tokens, **OPTIONS) as tracer:
        ids = tracer.result.save()
    found: dict[str, list[Tensor]] = {}
    for path in PLACES:
        found[path] = []
        for step in range(STEPS):
            with torch.no_grad(), tiny.trace(ids[:, : tokens.shape[1] + step]):
                value = tiny.hook(path).output.save()
            found[path].append(last(path, value))
    return found


def last(path: str, value: Tensor) -> Tensor:
    """A value at the last position."""
    if path.endswith("conv1d"):  # [B,E,L]; in a prefill the module pads both ends
        return value.new_zeros(())
    return value if path.endswith("]") and ".h[" in path else value[:, -1]


@pytest.mark.parametrize("seed", range(25))
def test_any_plan_of_steps_and_places(tiny, tokens, everything, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(STEPS), draw.randint(1, STEPS)))
    plan = {step: sorted(draw.sample(range(len(PLACES)), draw.randint(1, 5))) for step in steps}
    with tiny.generate(tokens, **OPTIONS) as tracer:
        seen = nnsight.save({})
        for step in tracer.iter[steps]:
            for number in plan[step]:
                seen[step, PLACES[number]] = last(PLACES[number], tiny.hook(PLACES[number]).output.clone())
    assert set(seen) == {(step, PLACES[number]) for step in steps for number in plan[step]}
    for (step, path), value in seen.items():
        if not path.endswith("conv1d"):
            agree(value, everything[path][step], 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_edits_in_any_plan_of_steps_take_effect_in_their_step(tiny, tokens, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, STEPS), draw.randint(1, STEPS - 1)))
    with tiny.generate(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False) as tracer:
        logits = nnsight.save([])
        with tracer.invoke(tokens):
            for _ in tracer.iter[steps]:
                _ = tiny.layers[1].ssm.h[-1].output.sum()
                tiny.layers[1].resid_post.output[:] = 3.0
        with tracer.invoke():
            for _ in tracer.iter[:STEPS]:
                logits.append(tiny.lm_head.output[:, -1].clone())
    same_steps = [logits[step] for step in steps]
    with tiny.generate(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False) as tracer:
        again = nnsight.save([])
        with tracer.invoke(tokens):
            for _ in tracer.iter[steps]:
                tiny.layers[1].resid_post.output[:] = 3.0
        with tracer.invoke():
            for _ in tracer.iter[:STEPS]:
                again.append(tiny.lm_head.output[:, -1].clone())
    for one, other in zip(same_steps, [again[step] for step in steps], strict=True):
        agree(one, other)


@pytest.mark.parametrize("what", ["block", "mixer"])
def test_a_skipped_module_counts_as_visited_with_all_below_it(tiny, tokens, what):
    """A step after one in which a module was skipped is that step, as for the modules that were not."""

    def run(read: bool) -> tuple[dict[int, Tensor], Tensor]:
        with tiny.generate(tokens, **OPTIONS) as tracer:
            seen = nnsight.save({})
            for step in tracer.iter[:STEPS]:
                block = tiny.layers[1]
                if step in (0, 2):
                    if what == "block":
                        block.skip(block.input)
                    else:
                        block.ssm.skip(torch.zeros_like(block.ssm.input))
                elif read:
                    seen[step] = block.ssm.h[-1].output.clone()
                    block.ssm.y.output.sum()
                    seen[step, "post"] = block.resid_post.output.clone()
            ids = tracer.result.save()
        return seen, ids

    seen, ids = run(read=True)
    assert torch.equal(ids, run(read=False)[1])
    assert set(seen) == {1, 3, (1, "post"), (3, "post")}
    # The state of a layer that was skipped in the prompt starts from zero, at the first token that it sees.
    with torch.no_grad(), tiny.trace(ids[:, : tokens.shape[1] + 1]):
        block = tiny.layers[1]
        stream = block.resid_pre.output.save()
    assert seen[1].abs().max() > 0
    assert not torch.equal(seen[1], seen[3])
    assert seen[1, "post"].shape == stream[:, -1:].shape


@pytest.mark.parametrize("spellings", [(2, 2), (2, -7), (-7, 2), (-7, -7)])
def test_an_edit_of_a_state_comes_before_the_trace_however_both_name_it(tiny, tokens, spellings):
    edited, traced = spellings
    with torch.no_grad(), tiny.trace(tokens):
        clean = tiny.layers[1].ssm.h[2].output.save()
    with tiny.edit(inplace=True):
        tiny.layers[1].ssm.h[edited].output *= 0.5
    try:
        for _ in range(3):
            with torch.no_grad(), tiny.trace(tokens) as tracer:
                cache = tracer.cache(modules=[f"layers[1].ssm.h[{edited}]"])
                seen = tiny.layers[1].ssm.h[traced].output.save()
                tiny.layers[1].ssm.h[traced].output += 1
                after = tiny.layers[1].ssm.h.output[:, 2].save()
            assert torch.equal(seen, clean * 0.5)
            agree(after, clean * 0.5 + 1)
            agree(cache[f"model.backbone.layers.1.mixer.h.{edited}"].output, after)
    finally:
        tiny.clear_edits()


def test_two_edits_and_a_trace_of_one_state_are_served_in_the_order_they_were_made(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        clean = tiny.layers[1].ssm.h[2].output.save()
    for position, change in ((2, 2.0), (-7, 10.0), (2, 3.0)):
        with tiny.edit(inplace=True):
            state = tiny.layers[1].ssm.h[position].output
            tiny.layers[1].ssm.h[position].output = state * 2 + change
    try:
        with torch.no_grad(), tiny.trace(tokens):
            seen = tiny.layers[1].ssm.h[-7].output.save()
    finally:
        tiny.clear_edits()
    agree(seen, ((clean * 2 + 2) * 2 + 10) * 2 + 3)
