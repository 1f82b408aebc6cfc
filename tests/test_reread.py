"""A place that is read again: without a request while the model stands still, and with one as soon as it may not."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from mamba_trace import MambaTrace


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The locations that workers have asked for."""
    asked: list[str] = []
    event = Mediator.event.__func__

    def watched(cls: Any, kind: Any, location: str, *rest: Any) -> Any:
        asked.append(location)
        return event(cls, kind, location, *rest)

    monkeypatch.setattr(Mediator, "event", classmethod(watched))
    return asked


@pytest.mark.parametrize(
    "path",
    ["layers.1.resid_post", "layers.1.ssm", "layers.1", "layers.1.ssm.h.2", "layers.1.ssm.h", "embeddings"],
)
def test_the_model_is_asked_once(path: str, tiny: MambaTrace, tokens: Tensor, requests: list[str]) -> None:
    with tiny.trace(tokens):
        place = tiny.get(path)
        first = place.output
        for row in range(4):
            place.output[:, row] = row
        again = place.output
        assert again is first
        kept = again.save()
    assert len(requests) == 1
    assert all(bool((kept[:, row] == row).all()) for row in range(4))


def test_what_was_assigned_is_read(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace(tokens):
        place = tiny.layers[1].resid_post
        before = place.output.save()
        place.output = before + 1
        place.output[:, 0] = 7
        after = place.output.save()
    assert torch.equal(after[:, 1:], before[:, 1:] + 1)
    assert bool((after[:, 0] == 7).all())


def test_what_was_saved_stays_whatever_is_written_to_what_is_read_again(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace(tokens):
        expected = tiny.layers[1].resid_post.output.save()
    with tiny.trace(tokens):
        place = tiny.layers[1].resid_post
        saved = place.output.save()
        place.output[:] = 0
        row = place.output[:, 0].save()
        place.output[:] += 1
        last = place.output.save()
    assert torch.equal(saved, expected)
    assert not row.any()
    assert bool((last == 1).all())


def test_after_other_requests_the_model_is_asked_again(tiny: MambaTrace, tokens: Tensor, requests: list[str]) -> None:
    with tiny.trace(tokens):
        place = tiny.layers[1].resid_post
        before = place.output
        _ = tiny.layers[1].output
        with pytest.raises(Exception, match="already computed"):
            _ = place.output
        del before
    assert len(requests) == 2


def test_another_block_may_have_assigned_meanwhile(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            place = tiny.layers[1].resid_post
            before = place.output.clone().save()
            barrier()
            after = place.output.save()
        with tracer.invoke():
            whole = tiny.layers[1].resid_post.output
            tiny.layers[1].resid_post.output = whole + 1
            barrier()
    assert torch.equal(after, before + 1)


def test_each_step_of_a_generation_is_read_anew(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.generate(tokens[:1], max_new_tokens=3, do_sample=False) as tracer:
        reads = [].save()
        for _ in tracer.iter[:]:
            place = tiny.layers[1].resid_post
            reads.append((place.output[:, -1], place.output[:, -1]))
    assert len(reads) == 3
    for first, second in reads:
        assert torch.equal(first, second)
    assert not torch.equal(reads[1][0], reads[2][0])


def test_rows_of_a_batch_are_read_anew_once_a_part_of_them_was_edited(tiny: MambaTrace, tokens: Tensor) -> None:
    place = tiny.layers[1].resid_post
    with tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            place.output[:, 0] *= 1.5
            place.output.register_hook(lambda grad: grad)  # of a view that was edited by a part PyTorch would crash
            found = tiny.logits.output.save()
        with tracer.invoke(tokens[1:]):
            _ = tiny.logits.output
    with tiny.trace(tokens[:1]):
        place.output[:, 0] *= 1.5
        expected = tiny.logits.output.save()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [False, True], ids=["alone", "batch"])
@pytest.mark.parametrize("grads", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("edit", ["place", "name"])
def test_what_was_saved_twice_stays(batch: bool, grads: bool, edit: str, tiny: MambaTrace, tokens: Tensor) -> None:
    place = tiny.layers[1].resid_post

    def run(edited: bool) -> list[Tensor]:
        first = place.output.save()
        second = place.output.save()
        if edited and edit == "place":
            place.output[:] = 0
        elif edited:
            second.add_(1)
        return [first, second, place.output.clone()]

    with torch.set_grad_enabled(grads):
        if batch:
            with tiny.trace() as tracer:
                with tracer.invoke(tokens[:1]):
                    kept = nnsight.save(run(True))
                with tracer.invoke(tokens[1:]):
                    _ = tiny.logits.output
        else:
            with tiny.trace(tokens[:1]):
                kept = nnsight.save(run(True))
        with tiny.trace(tokens[:1]):
            plain = nnsight.save(run(False))
    (first, second, last), before = kept, plain[0]
    torch.testing.assert_close(first, before)
    torch.testing.assert_close(second, before)
    torch.testing.assert_close(last, torch.zeros_like(before) if edit == "place" else before + 1)
