"""What a visit tells a module, which visit of a place a worker gets, and in which order workers are served."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

import random
from typing import Any

import nnsight
import pytest
import torch
from conftest import agree
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.tracing import Visit, hooks_of, listened_to

STEPS = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module")
def shared(tiny_hf) -> MambaTrace:
    """One model for all plans, each of which leaves it as it was."""
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
def everything(shared, tokens) -> dict[str, list[Tensor]]:
    """What there is at the last position of each place in each step, read in traces of the grown prompt."""
    with shared.generate(tokens, **OPTIONS) as tracer:
        ids = tracer.result.save()
    found: dict[str, list[Tensor]] = {}
    for path in PLACES:
        found[path] = []
        for step in range(STEPS):
            with torch.no_grad(), shared.trace(ids[:, : tokens.shape[1] + step]):
                value = shared.hook(path).output.save()
            found[path].append(last(path, value))
    return found


def last(path: str, value: Tensor) -> Tensor:
    """A value at the last position."""
    if path.endswith("conv1d"):  # [B,E,L]; in a prefill the module pads both ends
        return value.new_zeros(())
    return value if path.endswith("]") and ".h[" in path else value[:, -1]


@pytest.mark.parametrize("seed", range(25))
def test_any_plan_of_steps_and_places(shared, tokens, everything, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(STEPS), draw.randint(1, STEPS)))
    plan = {step: sorted(draw.sample(range(len(PLACES)), draw.randint(1, 5))) for step in steps}
    with shared.generate(tokens, **OPTIONS) as tracer:
        seen = nnsight.save({})
        for step in tracer.iter[steps]:
            for number in plan[step]:
                seen[step, PLACES[number]] = last(PLACES[number], shared.hook(PLACES[number]).output.clone())
    assert set(seen) == {(step, PLACES[number]) for step in steps for number in plan[step]}
    for (step, path), value in seen.items():
        if not path.endswith("conv1d"):
            agree(value, everything[path][step], 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_edits_in_any_plan_of_steps_take_effect_in_their_step(shared, tokens, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, STEPS), draw.randint(1, STEPS - 1)))
    with shared.generate(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False) as tracer:
        logits = nnsight.save([])
        with tracer.invoke(tokens):
            for _ in tracer.iter[steps]:
                _ = shared.layers[1].ssm.h[-1].output.sum()
                shared.layers[1].resid_post.output[:] = 3.0
        with tracer.invoke():
            for _ in tracer.iter[:STEPS]:
                logits.append(shared.lm_head.output[:, -1].clone())
    same_steps = [logits[step] for step in steps]
    with shared.generate(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False) as tracer:
        again = nnsight.save([])
        with tracer.invoke(tokens):
            for _ in tracer.iter[steps]:
                shared.layers[1].resid_post.output[:] = 3.0
        with tracer.invoke():
            for _ in tracer.iter[:STEPS]:
                again.append(shared.lm_head.output[:, -1].clone())
    for one, other in zip(same_steps, [again[step] for step in steps], strict=True):
        agree(one, other)


@pytest.mark.parametrize("what", ["block", "mixer"])
def test_a_skipped_module_counts_as_visited_with_all_below_it(shared, tokens, what):
    """A step after one in which a module was skipped is that step, as for the modules that were not."""

    def run(read: bool) -> tuple[dict[int, Tensor], Tensor]:
        with shared.generate(tokens, **OPTIONS) as tracer:
            seen = nnsight.save({})
            for step in tracer.iter[:STEPS]:
                block = shared.layers[1]
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
    with torch.no_grad(), shared.trace(ids[:, : tokens.shape[1] + 1]):
        block = shared.layers[1]
        stream = block.resid_pre.output.save()
    assert seen[1].abs().max() > 0
    assert not torch.equal(seen[1], seen[3])
    assert seen[1, "post"].shape == stream[:, -1:].shape


@pytest.mark.parametrize("spellings", [(2, 2), (2, -7), (-7, 2), (-7, -7)])
def test_an_edit_of_a_state_comes_before_the_trace_however_both_name_it(shared, tokens, spellings):
    edited, traced = spellings
    with torch.no_grad(), shared.trace(tokens):
        clean = shared.layers[1].ssm.h[2].output.save()
    with shared.edit(inplace=True):
        shared.layers[1].ssm.h[edited].output *= 0.5
    try:
        for _ in range(3):
            with torch.no_grad(), shared.trace(tokens) as tracer:
                cache = tracer.cache(modules=[f"layers[1].ssm.h[{edited}]"])
                seen = shared.layers[1].ssm.h[traced].output.save()
                shared.layers[1].ssm.h[traced].output += 1
                after = shared.layers[1].ssm.h.output[:, 2].save()
            assert torch.equal(seen, clean * 0.5)
            agree(after, clean * 0.5 + 1)
            agree(cache[f"model.backbone.layers.1.mixer.h.{edited}"].output, after)
    finally:
        shared.clear_edits()


def test_two_edits_and_a_trace_of_one_state_are_served_in_the_order_they_were_made(shared, tokens):
    with torch.no_grad(), shared.trace(tokens):
        clean = shared.layers[1].ssm.h[2].output.save()
    for position, change in ((2, 2.0), (-7, 10.0), (2, 3.0)):
        with shared.edit(inplace=True):
            state = shared.layers[1].ssm.h[position].output
            shared.layers[1].ssm.h[position].output = state * 2 + change
    try:
        with torch.no_grad(), shared.trace(tokens):
            seen = shared.layers[1].ssm.h[-7].output.save()
    finally:
        shared.clear_edits()
    agree(seen, ((clean * 2 + 2) * 2 + 10) * 2 + 3)


# -- what a visit tells ------------------------------------------------------------------------------------


def visit_of(model: Any, layer: int, tell: Any) -> list[Any]:
    """What ``tell(visit)`` says each time that the convolution of ``layer`` is called, inside its mixer."""
    seen, mixer = [], model._module.backbone.layers[layer].mixer
    mixer.act.register_forward_hook(lambda *args: seen.append(tell(Visit(mixer))))
    return seen


@pytest.mark.parametrize(
    ("wanted", "inside"),
    [
        ("layers[1].ssm.y", True),
        ("layers[1].ssm.h[2]", True),
        ("layers[1].ssm.x_proj", True),
        ("layers[0].ssm.y", False),
        ("layers[2].ssm.y", False),
        ("lm_head", False),
        ("layers[1].resid_post", False),
    ],
)
def test_a_mixer_is_opened_by_what_is_inside_it_alone(tiny, tokens, wanted, inside):
    place = tiny.hook(wanted)
    seen = visit_of(tiny, 1, lambda visit: visit.inside(()))
    with tiny.trace(tokens):
        _ = place.output.save()
    assert seen == [inside]


def test_outside_a_trace_nothing_is_wanted(tiny, tokens):
    hooks = hooks_of(tiny.layers[1].ssm.y._module)
    seen = visit_of(tiny, 1, lambda visit: (visit.tracing, visit.inside(hooks), visit.wants("y")))
    tiny._module(tokens)
    assert seen == [(False, False, False)]


def test_pytorch_hooks_open_a_mixer_outside_a_trace(tiny, tokens):
    module = tiny.layers[1].ssm.y._module
    assert not listened_to(module)
    handle = module.register_forward_hook(lambda *args: None)
    assert listened_to(module)
    seen = visit_of(tiny, 1, lambda visit: (visit.inside(hooks_of(module)), visit.wants("y"), visit.wants("h")))
    tiny._module(tokens)
    handle.remove()
    assert not listened_to(module)
    assert seen == [(True, True, False)]


def test_sites_passed_over_are_counted_as_if_they_had_been_offered(tiny, tokens):
    counts = tiny.interleaver.counts
    with tiny.trace(tokens):
        _ = tiny.lm_head.output.save()
    closed = {name: n for name, n in counts.items() if ".mixer." in name and ".act" not in name}
    with tiny.trace(tokens) as tracer:
        _ = tracer.cache()
    opened = {name: counts[name] - n for name, n in closed.items()}
    assert set(closed.values()) == set(opened.values()) == {1}
    assert any(name.endswith("mixer.h.output") for name in closed)


def test_nothing_is_kept_of_the_positions_after_a_run(tiny, tokens):
    state = tiny.layers[1].ssm.h._module
    before = set(state.__dict__)
    with pytest.raises(ZeroDivisionError), tiny.trace(tokens):
        tiny.layers[1].ssm.h[4].output[:] = 0
        _ = 1 / 0
    with tiny.trace(tokens):
        tiny.layers[1].ssm.h[4].output[:] = 0
    assert set(state.__dict__) == before
