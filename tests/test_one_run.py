"""One run of a model at a time: threads take turns, and a run in a run is refused and harms nothing."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012, SIM117

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import TraceError
from mamba_trace.mamba_lens import HookedMamba
from mamba_trace.tracing import one_run
from mamba_trace.tracing.one_run import only_run


def edited_logits(model: MambaTrace, tokens: Tensor, factor: float) -> Tensor:
    """The logits of a run in which a state and a stream are multiplied."""
    with torch.no_grad(), model.trace(tokens):
        model.layers[1].ssm.h[2].output[:] *= factor
        model.layers[2].resid_pre.output[:] *= factor
        logits = model.lm_head.output.save()
    return logits


def in_threads(*work: Callable[[], Any]) -> list[BaseException]:
    """Run functions in threads of their own, to their ends; what they raised."""
    raised: list[BaseException] = []

    def guarded(one: Callable[[], Any]) -> None:
        try:
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread waits for ever"
    return raised


# -- threads -----------------------------------------------------------------------------------------------


def test_a_thousand_runs_over_four_threads(tiny, tokens):
    """Two threads have wrappers of their own around one module; a fifth calls it outside of traces."""
    models = [tiny, tiny, MambaTrace(tiny._module), MambaTrace(tiny._module)]
    prompts = [tokens[:1], tokens[1:2, :6], tokens[:2], tokens[2:, 3:]]
    factors = [0.5, 2.0, -1.0, 0.0]
    right = [edited_logits(*one) for one in zip(models, prompts, factors, strict=True)]
    with torch.no_grad():
        plain = tiny._module(tokens).logits
    wrong, done = [], []
    over = threading.Event()

    def runs(i: int) -> None:
        for _ in range(250):
            if not torch.equal(edited_logits(models[i], prompts[i], factors[i]), right[i]):
                wrong.append(i)
            done.append(i)

    def calls() -> None:
        while not over.is_set():
            with torch.no_grad():
                if not torch.equal(tiny._module(tokens).logits, plain):
                    wrong.append("plain")

    beside = threading.Thread(target=calls)
    beside.start()
    raised = in_threads(*(lambda i=i: runs(i) for i in range(4)))
    over.set()
    beside.join()
    assert raised == []
    assert wrong == []
    assert len(done) == 1000


@pytest.mark.parametrize("kind", ["generate", "invokes", "scan", "run_with_cache", "session", "gradient", "edited"])
def test_other_runs_take_turns_too(tiny, tokens, kind):
    def run() -> Any:
        if kind == "generate":
            return tiny.generate(tokens, max_new_tokens=3, do_sample=False)
        if kind == "invokes":
            with torch.no_grad(), tiny.trace() as tracer:
                with tracer.invoke(tokens[:1]):
                    tiny.layers[1].ssm.y.output[:] = 0
                with tracer.invoke(tokens[1:]):
                    logits = tiny.lm_head.output.save()
            return logits
        if kind == "scan":
            with tiny.scan(tokens):
                shape = list(tiny.layers[1].ssm.h[2].output.shape).save()
            return torch.tensor(shape)
        if kind == "run_with_cache":
            with torch.no_grad():
                return tiny.run_with_cache(tokens, "blocks.1.hook_h.3")[1]["blocks.1.hook_h.3"]
        if kind == "session":
            with torch.no_grad(), tiny.session():
                with tiny.trace(tokens):
                    state = tiny.layers[1].ssm.h[2].output
                with tiny.trace(tokens):
                    tiny.layers[2].ssm.h[4].output = state
                    logits = tiny.lm_head.output.save()
            return logits
        if kind == "gradient":
            with tiny.trace(tokens):
                y = tiny.layers[1].ssm.y.output
                loss = tiny.lm_head.output.sum()
                with loss.backward():
                    gradient = y.grad.save()
            return gradient
        with tiny.edit() as (_, edited):
            edited.layers[1].ssm.y.output[:] = 0
        with torch.no_grad(), edited.trace(tokens):
            logits = edited.lm_head.output.save()
        return logits

    right, wrong = run(), []

    def runs() -> None:
        for _ in range(10):
            if not torch.equal(run(), right):
                wrong.append(1)

    assert in_threads(runs, runs, runs) == []
    assert wrong == []


def test_weights_are_loaded_once_where_two_threads_begin(monkeypatch):
    model = MambaTrace.demo(dispatch=False)
    loaded = []
    load = type(model)._load
    monkeypatch.setattr(
        type(model), "_load", lambda self, *args, **kwargs: loaded.append(1) or load(self, *args, **kwargs)
    )
    answers = []

    def run() -> None:
        with torch.no_grad(), model.trace("Emma gave an apple to"):
            logits = model.lm_head.output.save()
        answers.append(logits)

    assert in_threads(run, run) == []
    assert len(loaded) == 1
    assert torch.equal(*answers)


def test_two_models_run_at_the_same_time(tiny, tiny_hf, tokens):
    """Each waits, in its run, for the other to be in its own."""
    other, meet = MambaTrace(tiny_hf()), threading.Barrier(2, timeout=60)

    def run(model: MambaTrace) -> None:
        with torch.no_grad(), model.trace(tokens):
            _ = model.layers[1].ssm.y.output
            meet.wait()

    assert in_threads(lambda: run(tiny), lambda: run(other)) == []


def test_compilers_come_back_when_the_last_of_two_runs_ends(tiny, tiny_hf, tokens):
    """Runs of two models that overlap, of which the first to begin is the first to end."""
    import torch._dynamo

    other, began, ended, seen = MambaTrace(tiny_hf()), threading.Event(), threading.Event(), []

    def first() -> None:
        with only_run(tiny, "a run"):
            began.wait(60)
        ended.set()

    def second() -> None:
        with only_run(other, "a run"):
            began.set()
            ended.wait(60)
            seen.append(stance())

    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    assert stance() == "default"
    assert not in_threads(first, second)
    assert seen == ["force_eager"]
    assert stance() == "default"


def test_what_would_wait_for_ever_is_refused(tiny, tiny_hf, tokens):
    """A in B in one thread, and B in A in another."""
    other, meet = MambaTrace(tiny_hf()), threading.Barrier(2, timeout=60)
    ended = []

    def run(outer: MambaTrace, inner: MambaTrace) -> None:
        with torch.no_grad(), outer.trace(tokens):
            _ = outer.layers[0].ssm.y.output
            meet.wait()
            with inner.trace(tokens):
                _ = inner.lm_head.output
        ended.append(1)

    raised = in_threads(lambda: run(tiny, other), lambda: run(other, tiny))
    assert len(ended) == 1
    (error,) = raised
    assert isinstance(error, TraceError)
    assert "would wait for ever: another thread is running a trace of this model" in str(error)
    assert torch.equal(edited_logits(tiny, tokens, 0.5), edited_logits(other, tokens, 0.5))


def test_a_long_wait_says_why(tiny, tokens, monkeypatch):
    monkeypatch.setattr(one_run, "PATIENCE", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with torch.no_grad(), tiny.trace(tokens):
            _ = tiny.layers[0].ssm.y.output
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    threading.Timer(3.0, leave.set).start()
    with pytest.warns(UserWarning, match=r"has waited for 0 s: another thread is running a trace of this model"):
        edited_logits(tiny, tokens, 0.5)
    holder.join()


# -- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize("where", ["body", "first", "hook", "invoke", "prompt"])
def test_a_run_that_ends_early_is_over(tiny, tokens, error, where):
    right = edited_logits(tiny, tokens, 0.5)

    def fail(*args: Any) -> None:
        raise error

    handle = tiny._module.backbone.layers[1].register_forward_hook(fail) if where == "hook" else None
    with pytest.raises(error), torch.no_grad(), tiny.trace() as tracer:
        if where == "invoke":
            fail()
        with tracer.invoke(tokens):
            if where == "first":
                fail()
            _ = tiny.layers[1].ssm.y.output
            if where in ("body", "prompt"):
                fail()
            _ = tiny.lm_head.output
    if handle is not None:
        handle.remove()
    assert torch.equal(edited_logits(tiny, tokens, 0.5), right)
    assert in_threads(lambda: edited_logits(tiny, tokens, 0.5)) == []


def test_an_interrupt_while_waiting(tiny, tokens):
    right = edited_logits(tiny, tokens, 0.5)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with torch.no_grad(), tiny.trace(tokens):
            _ = tiny.layers[0].ssm.y.output
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)

    def interrupt() -> None:
        main = threading.main_thread()
        while main not in one_run._waiting:
            time.sleep(0.01)
        time.sleep(0.2)
        # A signal, as of Ctrl-C, ends the wait at once. `_thread.interrupt_main` would let it go on, and raise
        # anywhere.
        signal.pthread_kill(main.ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        edited_logits(tiny, tokens, 0.5)
    leave.set()
    holder.join()
    assert torch.equal(edited_logits(tiny, tokens, 0.5), right)


# -- a run in a run ----------------------------------------------------------------------------------------


def nested_trace(model: Any, tokens: Tensor) -> None:
    with model.trace(tokens):
        _ = model.lm_head.output.save()


def nested_generate(model: Any, tokens: Tensor) -> None:
    with model.generate(tokens, max_new_tokens=1):
        _ = model.lm_head.output.save()


def nested_scan(model: Any, tokens: Tensor) -> None:
    with model.scan(tokens):
        _ = model.lm_head.output.shape


def nested_session(model: Any, tokens: Tensor) -> None:
    with model.session():
        with model.trace(tokens):
            _ = model.lm_head.output.save()


def nested_edited(model: Any, tokens: Tensor) -> None:
    with model.edit() as (_, edited):
        edited.layers[1].ssm.y.output[:] = 0
    with edited.trace(tokens):
        _ = edited.lm_head.output.save()


NESTED: dict[str, Callable[[Any, Tensor], Any]] = {
    "trace": nested_trace,
    "generate with": nested_generate,
    "generate": lambda model, tokens: model.generate(tokens, max_new_tokens=1),
    "scan": nested_scan,
    "session": nested_session,
    "edited": nested_edited,
    "trace=False": lambda model, tokens: model.trace(tokens, trace=False),
    "pipe": lambda model, tokens: model.pipe("Emma"),
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens),
    "run_with_hooks": lambda model, tokens: model.run_with_hooks(tokens),
    "another wrapper": lambda model, tokens: nested_trace(MambaTrace(model._module), tokens),
    "of a block": lambda model, tokens: model.layers[1].trace(torch.zeros(1, 2, 12), trace=False),
}


@pytest.mark.parametrize("lens", [False, True], ids=["MambaTrace", "HookedMamba"])
@pytest.mark.parametrize("kind", NESTED)
def test_a_run_in_a_run_is_refused_and_the_outer_one_goes_on(tiny_hf, tokens, kind, lens):
    model: Any = HookedMamba(tiny_hf()) if lens else MambaTrace(tiny_hf())
    expected = edited_logits(model, tokens, 0.5)
    with torch.no_grad(), model.trace(tokens):
        model.layers[1].ssm.h[2].output[:] *= 0.5
        said = None
        try:
            NESTED[kind](model, tokens)
        except TraceError as error:
            said = str(error).save()
        model.layers[2].resid_pre.output[:] *= 0.5
        logits = model.lm_head.output.save()
    assert "trace" in said
    assert "model is in one" in said or "one trace at a time: put it before or after" in said
    assert torch.equal(logits, expected)
    assert torch.equal(edited_logits(model, tokens, 0.5), expected)


def test_before_the_invokes_of_a_trace(tiny, tokens):
    with pytest.raises(TraceError, match="one trace at a time"), tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            _ = tiny.lm_head.output.save()
        nested_trace(tiny, tokens)


def test_what_is_no_run_of_its_own_works_in_a_trace(tiny, tiny_hf, tokens):
    """An ad hoc call of a module, a backward pass, a trace of another model, a stored edit."""
    other = MambaTrace(tiny_hf(seed=3))
    right = edited_logits(other, tokens, 0.5)
    with torch.no_grad():
        lens = tiny._module.lm_head(tiny._module.backbone.norm_f(torch.ones(1, 2, 12)))
    with tiny.trace(tokens):
        y = tiny.layers[1].ssm.y.output
        called = tiny.lm_head(tiny.norm_f(torch.ones(1, 2, 12))).save()
        inner = edited_logits(other, tokens, 0.5).save()
        loss = tiny.lm_head.output.sum()
        with loss.backward():
            gradient = y.grad.save()
    assert torch.equal(called, lens)
    assert torch.equal(inner, right)
    assert gradient.any()
