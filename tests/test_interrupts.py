"""Ctrl-C at any line: it is a KeyboardInterrupt that comes out, and the next trace is as if nothing had happened."""

from __future__ import annotations

import dis
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import greenlet
import pytest
import torch
from conftest import ModuleFactory
from nnsight.intervention.batching import Batcher
from nnsight.intervention.interleaver import Interleaver
from torch import Tensor

from mamba_trace import MambaTrace

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
#: Lines of these packages are where runs are interrupted.
PACKAGES = ("/mamba_trace/", "/nnsight/")


def traced(model: MambaTrace) -> list[Tensor]:
    """Two invokes that meet, an edit of what was saved, an edit of a state."""
    with torch.no_grad(), model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(IDS):
            y = model.layers[0].ssm.y.output
            saved = y.save()
            y[:] *= 2
            model.layers[1].ssm.h[2].output[:] = 0
            barrier()
            logits = model.lm_head.output.save()
        with tracer.invoke(IDS + 1):
            barrier()
            others = model.lm_head.output.save()
    return [saved, logits, others]


def hooked(model: MambaTrace) -> None:
    def double(value: Tensor, hook: Any) -> Tensor:
        return value * 2

    model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_h.2", double)])


#: A run, and which of the lines that it executes are tried: every n-th.
RUNS: dict[str, tuple[Callable[[MambaTrace], Any], int]] = {
    "trace": (traced, 499),
    "run_with_cache": (lambda model: model.run_with_cache(IDS), 1999),
    "run_with_hooks": (hooked, 499),
    "generate": (lambda model: model.generate(IDS, max_new_tokens=1, do_sample=False), 307),
}


@functools.cache
def ends_of_blocks(code: CodeType) -> set[int]:
    """Where a ``with`` calls ``__exit__(None, None, None)``: no signal comes between its block and that call."""
    found = list(dis.get_instructions(code))
    return {
        instruction.offset
        for place, instruction in enumerate(found)
        if all(each.opname == "LOAD_CONST" and each.argval is None for each in found[place : place + 3])
        and found[place + 3].opname in ("PRECALL", "CALL")
    }


class Interrupt:
    """A trace function that raises at the n-th line; ``raised`` says whether it came to that."""

    def __init__(self, line: int) -> None:
        self.line, self.lines, self.raised = line, 0, False

    def begin(self, *_: Any) -> None:
        """Trace the running greenlet, each of which has a trace function of its own."""
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.at_line if any(name in frame.f_code.co_filename for name in PACKAGES) else None

    def at_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lasti not in ends_of_blocks(frame.f_code):
            self.lines += 1
            if self.lines == self.line:
                self.raised = True
                raise KeyboardInterrupt
        return self.at_line


def interrupts(run: Callable[[], Any], stride: int) -> Iterator[int]:
    """Interrupt ``run`` at every ``stride``-th line, and yield which one it was."""
    line, before = stride, sys.gettrace()
    while True:
        interrupt = Interrupt(line)
        try:
            greenlet.settrace(interrupt.begin)
            interrupt.begin()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()
        except KeyboardInterrupt:
            pass
        else:
            assert not interrupt.raised, f"the interrupt at line {line} was swallowed"
        finally:
            sys.settrace(before)
            greenlet.settrace(None)
        if not interrupt.raised:
            return
        yield line
        line += stride


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupt_at_any_line_leaves_nothing(tiny_hf: ModuleFactory, kind: str) -> None:
    model = MambaTrace(tiny_hf())
    run, stride = RUNS[kind]
    expected, lines = traced(model), 0
    for line in interrupts(lambda: run(model), stride):
        lines += 1
        assert all(torch.equal(value, other) for value, other in zip(traced(model), expected, strict=True)), line
        assert not model.interleaver.interleaving, line
        assert not model.interleaver.mediators, line
    assert lines > 8


@pytest.mark.parametrize(
    ("place", "name"),
    [(Interleaver, "reindex"), (Interleaver, "cancel"), (Batcher, "assemble"), (Interleaver, "handle")],
)
def test_an_interrupt_in_the_bookkeeping_of_nnsight(
    tiny_hf: ModuleFactory, monkeypatch: pytest.MonkeyPatch, place: type, name: str
) -> None:
    model = MambaTrace(tiny_hf())
    expected = traced(model)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            traced(model)
    assert all(torch.equal(value, other) for value, other in zip(traced(model), expected, strict=True))
