"""Saved values stay what they were, edits in place reach the run, and reads of one place are one tensor."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from conftest import MAMBA_SITES, agree
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import SiteValueError
from mamba_trace.tracing import served
from mamba_trace.tracing.views import same_part

PATHS = [site.path(1) for site in MAMBA_SITES] + ["layers[1].ssm.h[2]", "layers[1].ssm.h[-1]"]
NATIVE = [f"layers[1].ssm.{name}" for name in ("in_proj", "conv1d", "x_proj", "dt_proj")]


@pytest.fixture(scope="module")
def tiny(tiny_hf) -> MambaTrace:
    return MambaTrace(tiny_hf())


@pytest.fixture(autouse=True)
def _no_guard_stays():
    yield
    assert not served.local.guards
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
        saved = place.output.save()
        same = nnsight.save([place.output is saved for _ in range(3)])
        saved.sum(), saved * 2, saved.clone(), saved[:, 0]
        same.append(place.output is saved)
    assert all(same)


def test_a_name_that_is_edited_after_a_save_has_the_edited_value(tiny, tokens):
    place = tiny.layers[1].ssm.y
    clean, expected = zeroed(tiny, tokens, "layers[1].ssm.y")
    with tiny.trace(tokens):
        value = place.output
        before = value.save()
        value[:] = 0
        after = value.save()
        total = value.abs().sum().save()
        logits = tiny.lm_head.output.save()
    assert torch.equal(before, clean)
    assert not after.any()
    assert total == 0
    agree(logits.detach(), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_name_that_was_saved_is_there_after_the_trace(tiny, tokens, grad):
    clean, expected = zeroed(tiny, tokens, "layers[1].ssm.y")

    def function(place: Any) -> tuple[Tensor, Tensor]:
        inner = place.output
        return inner.save(), inner.zero_()

    with torch.set_grad_enabled(grad), tiny.trace(tokens):
        value = tiny.layers[0].ssm.y.output
        value.save()
        value *= 1
        kept, zero = function(tiny.layers[1].ssm.y)
        zero = zero.clone().save()
        logits = tiny.lm_head.output.save()
    assert value.any()
    agree(kept.detach(), clean)
    assert not zero.any()
    agree(logits.detach(), expected)


def test_a_value_that_was_saved_by_its_name_survives_edits_at_any_later_time(tiny, tokens):
    place = tiny.layers[1].ssm.y
    clean, _ = zeroed(tiny, tokens, "layers[1].ssm.y")
    with torch.no_grad(), tiny.trace(tokens):
        value = place.output
        first = value.save()
        place.output = value * 2
        second = place.output
        kept = second.save()
        _ = tiny.layers[1].resid_post.output
        value[:], second[:] = 0, 0
    assert torch.equal(first, clean)
    assert torch.equal(kept, clean * 2)


def test_the_gradient_of_a_copy_is_that_of_its_value(tiny, tokens):
    with tiny.trace(tokens):
        value = tiny.layers[1].ssm.y.output
        saved = value.save()
        loss = tiny.lm_head.output[0, -1, 3]
        with loss.backward(retain_graph=True):
            by_copy = saved.grad.save()
        with loss.backward():
            by_value = value.grad.save()
    assert torch.equal(by_copy, by_value)
    assert by_copy.any()
    torch.save(saved.detach(), io.BytesIO())
    assert "register_hook" not in saved.__dict__


@pytest.mark.parametrize("save", [lambda v: [v].save(), lambda v: {"v": v}.save(), lambda v: (v,).save()])
def test_a_container_that_is_saved_with_its_values_in_it(tiny, tokens, save):
    clean, expected = zeroed(tiny, tokens, "layers[1].ssm.y")
    with torch.no_grad(), tiny.trace(tokens):
        value = tiny.layers[1].ssm.y.output
        kept = save(value)
        value[:] = 0
        logits = tiny.lm_head.output.save()
    assert torch.equal(kept["v"] if isinstance(kept, dict) else kept[0], clean)
    agree(logits, expected)


def test_nested_and_overwritten_entries_of_containers(tiny, tokens):
    place = tiny.layers[1].ssm.y
    clean, _ = zeroed(tiny, tokens, "layers[1].ssm.y")
    with torch.no_grad(), tiny.trace(tokens):
        pairs, named, late = nnsight.save([]), nnsight.save({"a": 1, "x": []}), nnsight.save([])
        for position in range(3):
            pairs.append((position, place.output[:, position]))
        place.output[:, :3] = 0
        value = place.output
        named["a"] = value
        named["x"].append(value[:, 3])
        value[:, 3:] = 0
        last = place.output
        place.output = last + 1
        late.append(last)
        last[:] = 5
    for position, part in pairs:
        assert torch.equal(part, clean[:, position])
    assert torch.equal(named["a"][:, 3:], clean[:, 3:])
    assert torch.equal(named["x"][0], clean[:, 3])
    assert not late[0].any()


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "narrow": lambda part: part.narrow(1, 0, 2).zero_(),
    "detach": lambda part: part.detach()[:, :2].zero_(),
    "numpy": lambda part: part.detach().numpy()[:, :2].fill(0),
    "out=": lambda part: torch.zeros(part[:, :2].shape, out=part.detach()[:, :2]),
    "foreach": lambda part: torch._foreach_mul_([part[:, :2]], 0.0),
}


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("named", [False, True])
def test_an_edit_through_a_view_of_what_was_saved_reaches_the_run(tiny, tokens, way, named):
    place = tiny.layers[1].resid_post
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
        place.output[:, 1, :2] = 0
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        if named:
            part = place.output[:, 1]
            saved = part.save()
            PARTS[way](part)
        else:
            saved = place.output[:, 1].save()
            PARTS[way](saved)
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean[:, 1])
    agree(logits, expected)


def test_a_method_in_place_leaves_one_tensor_for_all_reads(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        place = tiny.layers[1].ssm.y
        place.output[:] = 1
        saved = place.output.save()
        place.output.mul_(2)
        second = place.output
        place.output[:] = 5
        same = nnsight.save([second is place.output, bool((second == 5).all())])
    assert (saved == 1).all()
    assert same == [True, True]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_an_edit_of_another_invoke_is_not_lost_by_a_save(tiny, tokens, named, grad):
    place = tiny.layers[1].ssm.y
    with torch.no_grad(), tiny.trace(tokens[:2]):
        clean = place.output.clone().save()
        place.output[0], place.output[1] = 0, 1
        expected = tiny.lm_head.output.save()
    with torch.set_grad_enabled(grad), tiny.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            first = place.output
            barrier()
            first[:] = 0
            head = tiny.lm_head.output.save()
        with tracer.invoke(tokens[1:2]):
            if named:
                second = place.output
                saved = second.save()
                second[:] = 1
            else:
                saved = place.output.save()
                place.output[:] = 1
            barrier()
            tail = tiny.lm_head.output.save()
    assert torch.equal(saved, clean[1:])
    agree(torch.cat((head, tail)).detach(), expected)


def test_the_input_of_the_convolution_in_a_batch_of_invokes(tiny, tokens):
    """Its value is a transpose; nnsight cuts an invoke's rows by strides."""
    conv1d = tiny.layers[1].ssm.conv1d

    def gradient(batched: bool) -> Tensor:
        with tiny.trace() as tracer:
            with tracer.invoke(tokens[:1]):
                value = conv1d.input
                loss = tiny.lm_head.output.sum()
                with loss.backward(retain_graph=True):
                    found = value.grad.clone().save()
            if batched:
                with tracer.invoke(tokens[1:2]):
                    saved = conv1d.input.save()
                    conv1d.input.transpose(0, -1)[...] = saved.transpose(0, -1).clone()
        return found

    agree(gradient(True), gradient(False), 1e-5)


def test_a_block_s_input_can_be_edited_in_part_where_an_earlier_site_was_read(tiny, tokens):
    with tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            _ = tiny.layers[0].ssm.h_read.output
            tiny.layers[1].input[:, 0] = 0
            logits = tiny.lm_head.output.save()
        with tracer.invoke(tokens[1:2]):
            pass
    with torch.no_grad(), tiny.trace(tokens[:1]):
        tiny.layers[1].input[:, 0] = 0
        expected = tiny.lm_head.output.save()
    agree(logits.detach(), expected)
    logits.sum().backward()


def test_a_place_is_not_saved_for_its_value(tiny, tokens):
    with (
        pytest.raises(SiteValueError, match=r"layers\[1\].ssm.h.3. is a place.*output.save"),
        tiny.trace(tokens),
    ):
        _ = tiny.layers[1].ssm.h[3].save()


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
    for grad in (False, True):
        with torch.set_grad_enabled(grad), tiny.scan(tokens):
            shape = tiny.layers[0].ssm.h[0].output.save().shape
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


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_the_same_part_of_another_layout(order):
    back = torch.argsort(torch.tensor(order)).tolist()
    old = torch.arange(60.0).reshape(3, 4, 5).permute(*order).contiguous().permute(*back)
    new = torch.zeros(3, 4, 10)[..., ::2].copy_(old)
    parts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[1],
        lambda t: t[:, 2],
        lambda t: t[..., 3],
        lambda t: t[1:, ::2, 1:4],
        lambda t: t[2, 1, 4],
        lambda t: t.transpose(0, 2)[1],
        lambda t: t[:, 1:2],
        lambda t: t[:, :, None],
        lambda t: t[0:0],
    ]
    for part in parts:
        found = same_part(part(old), old, new)
        assert torch.equal(found, part(new))
        assert found.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
    assert same_part(old[:1].expand(2, 4, 5), old, new) is None


# -- a forgotten save ----------------------------------------------------------------------------------------


def test_a_name_that_keeps_its_old_value_is_warned_of(tiny: MambaTrace, tokens: Tensor) -> None:
    def forgotten(logits: Any) -> Any:
        with tiny.trace(tokens):
            tiny.layers[0].ssm.y.output[:] = 0
            logits = tiny.lm_head.output
        return logits

    def forgotten_in_an_invoke(clean: Any, logits: Any) -> Any:
        with tiny.trace() as tracer:
            with tracer.invoke(tokens):
                clean, logits = [tiny.lm_head.output], tiny.lm_head.output
            with tracer.invoke(tokens):
                tiny.lm_head.output.save()
        return clean, logits

    old = tiny._module(tokens).logits
    with pytest.warns(UserWarning, match=r"'logits': assigned in this trace and not saved.*logits = \.\.\.\.save\(\)"):
        found = forgotten(old)
    assert found is old
    with pytest.warns(UserWarning, match="'clean', 'logits': assigned"):
        assert forgotten_in_an_invoke(old, old)[0] is old


def test_nothing_is_warned_of_where_nothing_is_lost(tiny: MambaTrace, tokens: Tensor) -> None:
    logits, number, total = tiny._module(tokens).logits, 3, torch.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tiny.trace(tokens):
            fresh = tiny.lm_head.output
            number = number + 1
            total += fresh.sum().detach()
            logits = fresh.save()
        with tiny.session():
            with tiny.trace(tokens):
                logits = tiny.lm_head.output
            with tiny.trace(tokens):
                again = logits.sum().save()
    assert total == again == logits.sum()


@pytest.mark.parametrize("within", ["trace", "session", "generate"])
def test_what_was_saved_is_freed_with_the_users_last_name_for_it(tiny: MambaTrace, tokens: Tensor, within: str) -> None:
    """Without a next trace, and without a search for circles."""

    def saved() -> list[weakref.ref[Tensor]]:
        with torch.no_grad():
            if within == "session":
                with tiny.session():
                    values = [].save()
                    with tiny.trace(tokens):
                        values.append(tiny.layers[0].ssm.h[2].output)
            elif within == "generate":
                with tiny.generate(tokens, max_new_tokens=2):
                    values = [].save()
                    values.append(tiny.layers[0].ssm.h[2].output)
            else:
                with tiny.trace(tokens):
                    values = [].save()
                    for position in range(9):
                        values.append(tiny.layers[0].ssm.h[position].output)
        return [weakref.ref(value) for value in values]

    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in saved()] == [None] * (9 if within == "trace" else 1)
    finally:
        gc.enable()
