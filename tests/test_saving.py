"""Saved values stay what they were, edits in place reach the run, and reads of one place are one tensor."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from conftest import agree
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.demand import saving
from mamba_trace.sites import SITES

PATHS = [site.path(1) for site in SITES] + ["layers[1].ssm.h[2]", "layers[1].ssm.h[-1]"]
NATIVE = [f"layers[1].ssm.{name}" for name in ("in_proj", "conv1d", "x_proj", "dt_proj")]


@pytest.fixture(scope="module")
def tiny(tiny_hf) -> MambaTrace:
    return MambaTrace(tiny_hf())


@pytest.fixture(autouse=True)
def _no_guard_stays():
    yield
    assert not saving._local.guards
    assert torch._C._len_torch_function_stack() == 0


def zeroed(model: MambaTrace, tokens: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """The value at a place, and the logits of a run in which it is zero."""
    place = model.hook(path)
    with torch.no_grad(), model.trace(tokens):
        clean = place.output.clone().save()
        place.output = torch.zeros_like(clean)
        logits = model.lm_head.output.save()
    return clean, logits


def by_index(value: Tensor) -> None:
    value[:] = 0


def by_augmented_assignment(value: Tensor) -> None:
    value *= 0


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "[:] =": by_index,
    "*=": by_augmented_assignment,
    "zero_()": lambda value: value.zero_(),
    "out=": lambda value: torch.zeros(value.shape, out=value.detach()),
    "a view": lambda value: value.transpose(0, -1).fill_(0),
    ".data": lambda value: value.data.zero_(),
    ".numpy()": lambda value: value.detach().numpy().fill(0),
    "relu of F": lambda value: torch.nn.functional.threshold(value, float("inf"), 0.0, inplace=True),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", [*PATHS, *NATIVE])
def test_a_value_that_was_read_then_saved_survives_an_edit_of_what_was_read(tiny, tokens, path, way, mode):
    clean, expected = zeroed(tiny, tokens, path)
    place = tiny.hook(path)
    with mode(), tiny.trace(tokens):
        value = place.output
        saved = value.save()
        WAYS[way](value)
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean)
    agree(logits.clone(), expected)


@pytest.mark.parametrize("path", [*PATHS, *NATIVE])
def test_the_same_where_gradients_are_recorded(tiny, tokens, path):
    clean, expected = zeroed(tiny, tokens, path)
    place = tiny.hook(path)
    with tiny.trace(tokens):
        value = place.output
        saved = value.save()
        value[:] = 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean)
    agree(logits.detach(), expected)
    logits.sum().backward()


@pytest.mark.parametrize("save", [lambda value: value.save(), nnsight.save], ids=["method", "function"])
@pytest.mark.parametrize("path", ["layers[1].resid_post", "layers[1].ssm.h[2]", "layers[1].ssm.delta"])
def test_an_edit_of_what_was_saved_reaches_the_run_and_not_what_was_saved(tiny, tokens, path, save):
    clean, expected = zeroed(tiny, tokens, path)
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        saved = save(place.output)
        saved[:] = 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean)
    agree(logits, expected)


def test_an_augmented_assignment_to_a_saved_name_gives_it_the_new_value(tiny, tokens):
    clean, expected = zeroed(tiny, tokens, "layers[1].resid_post")
    with torch.no_grad(), tiny.trace(tokens):
        saved = tiny.layers[1].resid_post.output.save()
        saved *= 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean * 0)
    agree(logits, expected)


@pytest.mark.parametrize("itself", [True, False], ids=["through itself", "through the place"])
def test_a_saved_part_stays_and_its_edit_reaches_the_run(tiny, tokens, itself):
    place = tiny.layers[1].resid_post
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
        place.output[:, 3] = 0
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        part = place.output[:, 3].save()
        (part if itself else place.output[:, 3])[:] = 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(part, clean[:, 3])
    agree(logits, expected)


def test_each_save_keeps_what_there_was_then(tiny, tokens):
    place = tiny.layers[1].ssm.y
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        first = place.output.save()
        place.output[:, 0] = 1
        second = place.output.save()
        place.output[:, 0] = 2
        place.output = place.output * 2
        third = place.output.save()
        place.output[:, 0] = 3
    one, two = clean.clone(), clean.clone()
    one[:, 0], two[:, 0] = 1, 2
    assert torch.equal(first, clean)
    assert torch.equal(second, one)
    assert torch.equal(third, two * 2)


def test_saved_lists_and_dictionaries_keep_what_is_put_into_them(tiny, tokens):
    place = tiny.layers[1].resid_post
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        whole, named, rows = nnsight.save([]), nnsight.save({}), nnsight.save([])
        value = place.output
        together = [value, value[:, 1]].save()
        whole.append(value)
        named["value"] = value
        for position in range(tokens.shape[1]):
            rows.append(place.output[:, position])
            place.output[:, position] = 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(torch.stack(rows, 1), clean)
    for kept in (whole[0], named["value"], together[0]):
        assert torch.equal(kept, clean)
    assert torch.equal(together[1], clean[:, 1])
    agree(logits, zeroed(tiny, tokens, "layers[1].resid_post")[1])


def test_saved_inputs_and_outputs_of_modules_stay(tiny, tokens):
    norm = tiny.layers[1].norm
    with torch.no_grad(), tiny.trace(tokens):
        inputs = norm.input.clone().save()
        norm.input = torch.ones_like(inputs)
        clean = tiny.output.logits.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        value = norm.input
        saved = value.save()
        value[:] = 1
        returned = tiny.output
        whole, logits = returned.save(), returned.logits.save()
        returned.logits[:] = 0
        after = tiny.output.logits.save()
    assert torch.equal(saved, inputs)
    for kept in (logits, whole.logits):
        agree(kept, clean)
    assert not after.any()


def test_what_is_assigned_to_the_place_is_not_undone_by_an_edit_of_what_was_there(tiny, tokens):
    place = tiny.layers[1].resid_post
    clean, expected = zeroed(tiny, tokens, "layers[1].resid_post")
    with torch.no_grad(), tiny.trace(tokens):
        value = place.output
        saved = value.save()
        place.output = torch.zeros_like(value)
        value[:] = 5
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean)
    agree(logits, expected)


def test_invokes_and_barriers(tiny, tokens):
    place = tiny.layers[1].resid_post
    with torch.no_grad(), tiny.trace(tokens[:2]):
        clean = place.output.clone().save()
        place.output[0] = 1
        place.output[1] = 2
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            one = place.output
            first = one.save()
            barrier()
            one[:] = 1
            head = tiny.lm_head.output.save()
        with tracer.invoke(tokens[1:2]):
            second = place.output.save()
            barrier()
            place.output[:] = 2
            tail = tiny.lm_head.output.save()
    assert torch.equal(torch.cat((first, second)), clean)
    agree(torch.cat((head, tail)), expected)


def test_a_place_read_twice_before_a_barrier(tiny, tokens):
    with torch.no_grad(), tiny.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            h = tiny.layers[0].ssm.h[2].output
            h[..., 0] = tiny.layers[0].ssm.h[2].output[..., 1]
            norm = tiny.layers[0].ssm.h[2].output.norm().save()
            barrier()
        with tracer.invoke(tokens[1:2]):
            _ = tiny.layers[0].ssm.y.output
            barrier()
            tiny.layers[1].ssm.h[2].output = h
            taken = tiny.layers[1].ssm.h[2].output.norm().save()
    agree(taken, norm)


def test_nothing_is_copied_where_nothing_is_written(tiny, tokens):
    place = tiny.layers[1].resid_post
    with torch.no_grad(), tiny.trace(tokens):
        value = place.output
        same = nnsight.save([value.save() is value])
        same.extend(place.output is value for _ in range(3))
        value.sum(), value * 2, value.clone(), value[:, 0]
        same.append(place.output is value)
    assert all(same)


def test_a_loop_of_reads_and_edits_has_one_tensor(tiny, tokens):
    """So its time and memory are linear in the number of positions."""
    with torch.no_grad(), tiny.trace(tokens):
        place = tiny.layers[1].ssm.y
        places = nnsight.save({place.output.data_ptr()})
        for position in range(tokens.shape[1]):
            place.output[:, position] = position
            places.add(place.output.data_ptr())
        after = place.output.save()
    assert len(places) == 1
    assert torch.equal(after[0, :, 0], torch.arange(tokens.shape[1]).float())


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("path", ["layers[0].ssm.y", "layers[0].resid_post", "layers[0].ssm.h[2]"])
def test_the_gradient_of_a_second_read_has_what_went_through_the_first(tiny_hf, tokens, path, second):
    tiny = MambaTrace(tiny_hf(dtype=torch.float64))
    place = tiny.hook(path)
    with tiny.trace(tokens):
        first = place.output.save()
        value = place.output if second else first
        later = tiny.layers[1].ssm.delta.output
        tiny.layers[1].ssm.delta.output = later + first.mean()
        loss = tiny.lm_head.output[0, -1, 3]
        by_autograd = torch.autograd.grad(loss, value, retain_graph=True)[0].save()
        with loss.backward():
            gradient = value.grad.save()
    agree(gradient, by_autograd)

    def run(step: Tensor) -> Tensor:
        with torch.no_grad(), tiny.trace(tokens):
            edited = place.output + step
            place.output = edited
            tiny.layers[1].ssm.delta.output = tiny.layers[1].ssm.delta.output + edited.mean()
            logit = tiny.lm_head.output[0, -1, 3].save()
        return logit

    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (run(1e-5 * direction) - run(-1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_no_guard_is_left_by_what_ends_a_block(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens) as tracer:
        value = tiny.layers[0].resid_post.output
        saved = value.save()
        tracer.stop()
    assert saved.any()
    with pytest.raises(ZeroDivisionError), torch.no_grad(), tiny.trace(tokens):
        _ = tiny.layers[0].resid_post.output.save()
        _ = 1 / 0
    assert torch._C._len_torch_function_stack() == 0
    with torch.no_grad(), tiny.scan(tokens):
        shape = tiny.layers[0].ssm.h[2].output.save().shape
        _ = nnsight.save(tuple(shape))


def test_a_saved_value_stays_in_every_step_of_generate(tiny, tokens):
    def run(edit: bool) -> list[Tensor]:
        with tiny.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
            states = nnsight.save([])
            for _ in tracer.iter[:3]:
                state = tiny.layers[0].ssm.h[-1].output
                states.append(state.save())
                if edit:
                    state += 0.0
                    state[:] = state * 1.0
        return states

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)
