"""The scan in pieces: one for each state that is wanted, and each edit of a state carried on."""

from __future__ import annotations

import pytest
import torch
from by_hand import by_hand, change, same
from conftest import both_families, make_hf, near
from hybrid_models import PLAIN, make_hybrid
from subjects import draw_tokens
from torch import Tensor
from transformers import DynamicCache

from mamba_trace import MambaTrace
from mamba_trace.scan import recurrence


def stretches(model: MambaTrace) -> list[list[int]]:
    """How many positions each scan call of the last run had, layer by layer."""
    return [[call.positions for call in layer.calls if "conv" not in call.function] for layer in model.last_run]


@both_families
def test_three_wanted_states_cost_one_layer_four_segments(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace(tokens):
        tiny.layers[1].ssm.h[2].output[:] = 0
        tiny.layers[1].ssm.h[-2].output.save()
        tiny.layers[1].ssm.h[-1].output.save()
    assert stretches(tiny) == [[9], [3, 5, 1], [9]]


@both_families
def test_nothing_wanted_is_one_scan_for_each_layer(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace(tokens):
        tiny.lm_head.output.save()
    assert stretches(tiny) == [[9]] * 3
    tiny._module(tokens)  # and outside a trace
    assert stretches(tiny) == [[9]] * 3
    with tiny.trace(tokens):
        tiny.layers[0].ssm.delta.output[:] *= 0.5
        tiny.layers[0].ssm.C.output.save()
        tiny.layers[2].ssm.h_start.output += 1
        tiny.layers[2].ssm.y.output.save()
    assert stretches(tiny) == [[9]] * 3


@both_families
def test_h_carries(tiny, hf, tokens):
    p = 3
    layer = tiny.layers[1].ssm
    with torch.no_grad(), tiny.trace(tokens):
        clean_h = layer.h.output.save()
        clean_y = layer.y.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        A_bar = layer.A_bar.output.save()
        C = layer.C.output.save()
        write = layer.write.output.save()
        layer.h[p].output[:] = 1.0
        h = layer.h.output.save()
        y = layer.y.output.save()
    A_bar = A_bar.view(*A_bar.shape, *[1] * (write.dim() - A_bar.dim()))  # of a whole head in Mamba-2
    same(h[:, :p], clean_h[:, :p], 1e-6)
    same(y[:, :p], clean_y[:, :p], 1e-6)
    assert (h[:, p] == 1).all()
    assert ((y - clean_y)[:, p:].abs().amax(dim=(0, 2)) > 1e-4).all()
    state = torch.ones_like(h[:, p])
    for t in range(p, tokens.shape[1]):
        if t > p:
            state = A_bar[:, t] * state + write[:, t]
        same(h[:, t], state)
        same(y[:, t], layer._module.scans.read_out(state, C[:, t]).flatten(1))


@both_families
@pytest.mark.parametrize("positions", [(0,), (2, 4), (0, 1, 2, 3), (-1,), (3, -2, -1)], ids=str)
def test_several_edited_states_of_one_layer(tiny, hf, tokens, positions):
    expected = by_hand(hf, tokens, {f"layers[0].ssm.h[{p}]": change for p in positions})
    with torch.no_grad(), tiny.trace(tokens):
        for p in positions:
            tiny.layers[0].ssm.h[p].output = change(tiny.layers[0].ssm.h[p].output)
        y = tiny.layers[0].ssm.y.output.save()
        logits = tiny.lm_head.output.save()
    same(y, expected["layers[0].ssm.y"])
    same(logits, expected["lm_head"])


@both_families
@pytest.mark.parametrize("other", ["A_bar", "B_bar", "delta", "B", "C", "h_start", "A", "ssm_input"])
def test_an_edited_state_together_with_other_edits_of_its_layer(tiny, hf, tokens, other):
    path = f"layers[0].ssm.{other}"
    expected = by_hand(hf, tokens, {path: change, "layers[0].ssm.h[2]": change})
    with torch.no_grad(), tiny.trace(tokens):
        tiny.hook(path).output = change(tiny.hook(path).output)
        tiny.layers[0].ssm.h[2].output[:] = change(tiny.layers[0].ssm.h[2].output)
        whole = tiny.layers[0].ssm.h.output.save()
        logits = tiny.lm_head.output.save()
    same(whole, expected["layers[0].ssm.h"])
    same(logits, expected["lm_head"])


@both_families
@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
def test_writing_h_whole_is_writing_every_position(tiny, tokens, in_place):
    layer = tiny.layers[0].ssm
    with torch.no_grad(), tiny.trace(tokens):
        new = change(layer.h.output).save()
    with torch.no_grad(), tiny.trace(tokens):
        for p in range(tokens.shape[1]):
            layer.h[p].output = new[:, p]
        one_by_one = layer.y.output.save()
        logits = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        if in_place:
            layer.h.output[:] = new
        else:
            layer.h.output = new
        whole = layer.y.output.save()
        whole_logits = tiny.lm_head.output.save()
    same(whole, one_by_one, 1e-6)
    same(whole_logits, logits, 1e-6)


@both_families
def test_a_state_replaced_by_an_equal_constant_takes_no_gradient(tiny: MambaTrace, tokens: Tensor) -> None:
    """What is before it then reaches what is after it by the convolution alone."""
    ssm = tiny.layers[0].ssm
    with tiny.trace(tokens):
        x = ssm.ssm_input.output
        ssm.h[3].output = ssm.h[3].output.detach()
        after = ssm.y.output[:, 4:].sum()
        with after.backward():
            gradient = x.grad.save()
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].any()


ONE_BY_ONE = ["mamba", "mamba2", "zamba"]


def model_and_tokens(kind: str) -> tuple[MambaTrace, Tensor]:
    """A tiny model in float32, and two rows of 23 tokens."""
    return MambaTrace(make_hybrid(kind) if kind in PLAIN else make_hf(model_type=kind)), draw_tokens(2, 0, length=23)


@pytest.mark.parametrize("edited", [None, 0, 2, 9, 22])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_states_read_one_by_one_are_run_ahead_of(kind: str, edited: int | None) -> None:
    """Where all are only read, and where one of them is edited."""
    model, tokens = model_and_tokens(kind)
    with torch.no_grad():
        with model.trace(tokens):
            found = [].save()
            for position in range(23):
                state = model.layers[0].ssm.h[position].output
                if position == edited:
                    state[:] = state * 2
                found.append(state.clone())
            logits = model.logits.output.save()
        for position in (0, 3, 8, 10, 22):  # each in a trace of its own
            with model.trace(tokens):
                first = position if edited is None else min(position, edited)
                state = model.layers[0].ssm.h[first].output
                if first == edited:
                    state[:] = state * 2
                if position > first:
                    state = model.layers[0].ssm.h[position].output
                alone = state.clone().save()
            near(found[position], alone, 1e-6)
        with model.trace(tokens):
            if edited is not None:
                model.layers[0].ssm.h[edited].output[:] *= 2
            expected = model.logits.output.save()
    near(logits, expected, 1e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_reading_every_state_takes_a_few_scans(kind: str) -> None:
    model, tokens = model_and_tokens(kind)
    with torch.no_grad(), model.trace(tokens):
        for position in range(23):
            model.layers[0].ssm.h[position].output.save()
    assert stretches(model)[0] == [1, 1, 8, 13]


@pytest.mark.parametrize("site", [None, "A_bar"])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_gradients_of_many_positions_are_those_of_slices(
    kind: str, site: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = model_and_tokens(kind)
    found, at_once, apply = [], list[int](), recurrence._Singles.apply
    monkeypatch.setattr(recurrence._Singles, "apply", lambda whole: at_once.append(len(found)) or apply(whole))
    for few in (2, 10**6):
        monkeypatch.setattr(recurrence, "FEW", few)
        with model.trace(tokens):
            values = [model.layers[0].resid_pre.output].save()
            if site is not None:
                values.append(model.layers[0].ssm.get(site).output)
            for position in range(23):
                if position != 11:  # the rest of a stretch of two
                    values.append(model.layers[0].ssm.h[position].output)
            logit = model.logits.output[:, -1, 3].sum().save()
        found.append(torch.autograd.grad(logit, values))
    for one, other in zip(*found, strict=True):
        near(one, other, 1e-5)
    assert set(at_once) == {0}, "in the first of the two runs alone"


def states_one_by_one(model: MambaTrace, tokens: Tensor, what: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Values that lead to a logit, the logit, and a sum over states, in a run in which every state is taken."""
    layer = model.layers[0]
    mask = torch.ones_like(tokens)
    if what == "padded":
        mask[0, :6] = mask[1, :1] = 0
    with model.trace(tokens, attention_mask=mask, use_cache=False):
        values = [layer.resid_pre.output].save()
        if what in ("delta", "A_bar", "B_bar", "write"):
            values.append(layer.ssm.get(what).output)
        elif what == "edited A_bar":
            layer.ssm.A_bar.output = layer.ssm.A_bar.output * 0.9
        for position in range(23):
            state = layer.ssm.h[position].output
            if position == 9 and what == "in place":
                state *= 2
            elif position == 9 and what == "assigned":
                state = layer.ssm.h[9].output = state.sin()
            elif position == 9 and what == "detached":
                layer.ssm.h[9].output = state.detach()
            if position != 11 or what != "one left out":
                values.append(state)
        if what == "the trajectory too":
            values.append(layer.ssm.h.output)
        logit = model.logits.output[:, -1, 3].sum().save()
    return values, logit, sum(state.sin().sum() for state in values[-12:-4])


KINDS_OF_STATES = [
    "delta",
    "A_bar",
    "B_bar",
    "write",
    "edited A_bar",
    "in place",
    "assigned",
    "detached",
    "one left out",
]


@pytest.mark.parametrize("what", ["nothing", *KINDS_OF_STATES, "the trajectory too", "padded"])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_gradients_through_states_that_are_run_ahead(kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of states that are run one by one, to the second derivative."""
    model, tokens = model_and_tokens(kind)
    model._module.double()
    parameters = [p for name, p in model._module.named_parameters() if "layers.0.mixer" in name or "mamba" in name]
    found, calls = [], []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(recurrence.Recurrence, "links", lambda *_: None)
        values, logit, of_states = states_one_by_one(model, tokens, what)
        calls.append(len(stretches(model)[0]))
        grads = [values, [logit], torch.autograd.grad(logit, values, retain_graph=True, allow_unused=True)]
        grads.append(torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True))
        grads.append(torch.autograd.grad(of_states, [*values, *parameters], retain_graph=True, allow_unused=True))
        first = torch.autograd.grad(of_states, [values[0], values[-9]], create_graph=True)
        again = sum(each.square().sum() for each in first)
        grads.append(torch.autograd.grad(again, [values[0], *values[-12:], *parameters], allow_unused=True))
        found.append([each for group in grads for each in group])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            near(one, other, 1e-9)
    assert what == "padded" or calls[0] < calls[1]


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_gradients_through_states_where_rows_differ_in_A(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run one by one, as no row of a scan has the A of another."""
    model, tokens = model_and_tokens(kind)
    ssm, found = model.layers[0].ssm, []
    ssm.A._module.register_forward_hook(lambda module, given, A: torch.stack((A, 1.5 * A)))
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(recurrence.Recurrence, "links", lambda *_: None)
        with model.trace(tokens, use_cache=False):
            values = [].save()
            for position in range(23):
                values.append(ssm.h[position].output)
            logit = model.logits.output[:, -1, 3].sum().save()
        found.append(torch.autograd.grad(logit, [*values, *ssm._module.parameters()]))
        assert len(stretches(model)[0]) >= 23
    for one, other in zip(*found, strict=True):
        near(one, other, 1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_only_what_is_asked_for_takes_gradients(kind: str) -> None:
    """With frozen weights, from the first state on for which somebody asks, and by way of C alone."""
    model, tokens = model_and_tokens(kind)
    model._module.requires_grad_(False)
    ssm = model.layers[0].ssm
    with model.trace(tokens, use_cache=False):
        states = [].save()
        for position in range(23):
            state = ssm.h[position].output
            if position == 5:
                state.requires_grad_()
            states.append(state)
        logit = model.logits.output[:, -1, 3].sum().save()
    assert [state.requires_grad for state in states] == [False] * 5 + [True] * 18
    ahead = torch.autograd.grad(logit, states[5:])
    with model.trace(tokens, use_cache=False):
        state = ssm.h[5].output
        state.requires_grad_()
        logit = model.logits.output[:, -1, 3].sum().save()
        with logit.backward():
            alone = state.grad.save()
    near(ahead[0], alone, 1e-5)
    with model.trace(tokens, use_cache=False):
        C = ssm.C.output
        C.requires_grad_()
        for position in range(23):
            ssm.h[position].output.save()
        logit = model.logits.output[:, -1, 3].sum().save()
        with logit.backward():
            one_by_one = C.grad.save()
    with model.trace(tokens, use_cache=False):
        C = ssm.C.output
        C.requires_grad_()
        logit = model.logits.output[:, -1, 3].sum().save()
        with logit.backward():
            at_once = C.grad.save()
    near(one_by_one, at_once, 1e-5)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_gradients_pass_padding_that_is_run_ahead(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after padding on the right is the one before it."""
    model, tokens = model_and_tokens(kind)
    model._module.double()
    mask, found = torch.ones_like(tokens), []
    mask[0, -6:] = 0
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(recurrence.Recurrence, "links", lambda *_: None)
        with model.trace(tokens, attention_mask=mask, use_cache=False):
            values = [model.layers[0].resid_pre.output].save()
            for position in range(23):
                values.append(model.layers[0].ssm.h[position].output)
        found.append(torch.autograd.grad(values[-1].sin().sum(), values[:-6]))
    assert found[0][0][0].any()
    for one, other in zip(*found, strict=True):
        near(one, other, 1e-9)


@pytest.mark.parametrize("what", ["hook", "detached"])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_gradient_that_ends_at_a_state_ends_there_exactly(kind: str, what: str) -> None:
    """Behind a hook that stops even what is no number, and behind a state that is detached in place."""
    model, tokens = model_and_tokens(kind)
    with model.trace(tokens, use_cache=False):
        states = [].save()
        for position in range(23):
            state = model.layers[0].ssm.h[position].output
            if position == 9 and what == "hook":
                state.register_hook(torch.zeros_like)
            elif position == 9:
                state.detach_()
            states.append(state)
        last = (states[-1].sum() * (torch.nan if what == "hook" else 1)).save()
    before, after = torch.autograd.grad(last, [states[6], states[12]], allow_unused=True)
    assert before is None or not before.any()
    assert after.any()


@pytest.mark.parametrize("how", ["read", "edited", "assigned"])
@both_families
def test_a_state_that_was_handed_out_may_be_edited_when_it_is_too_late(
    how: str, tiny: MambaTrace, tokens: Tensor
) -> None:
    """It then changes nothing: neither the trajectory, nor what is read from it, nor a cache."""

    def run(late: bool) -> list[Tensor]:
        cache = DynamicCache(config=tiny.config)
        with torch.no_grad(), tiny.trace(tokens, cache=cache, use_cache=True):
            ssm = tiny.layers[1].ssm
            handed = []
            for position in (2, 3, 4, -1):
                state = ssm.h[position].output
                if how == "edited":
                    state[:] *= 2
                if how == "assigned":
                    state = state * 2
                    ssm.h[position].output = state
                handed.append(state)
                if late:
                    for other in handed[:-1]:
                        other[:] = 9
            states = ssm.h.output.clone().save()
            if late:
                handed[-1][:] = 9
            ssm.h_read.output[:, 0] = 0
            logits = tiny.lm_head.output.save()
        return [states, logits, cache.layers[1].recurrent_states[0]]

    for value, other in zip(run(late=True), run(late=False), strict=True):
        assert torch.equal(value, other)


@both_families
def test_states_that_were_only_read_are_not_kept(tiny: MambaTrace, tokens: Tensor) -> None:
    """One after the other, they are one stretch, from which the trajectory is made."""
    with torch.no_grad(), tiny.trace(tokens):
        ssm = tiny.layers[1].ssm
        for position in range(tokens.shape[1]):
            _ = ssm.h[position].output
        states = ssm.h.output.save()
    assert stretches(tiny)[1][-1] == tokens.shape[1]
    with torch.no_grad(), tiny.trace(tokens):
        expected = tiny.layers[1].ssm.h.output.save()
    near(states, expected, 1e-6)
