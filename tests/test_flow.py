"""A cut takes away exactly what flows from sources to targets, by loops over all pairs in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import reference
import torch
from accelerate.hooks import attach_align_device_hook
from conftest import LENGTH, N_LAYERS, SIZES, ModuleFactory, agree
from kinds import BACKENDS, DUAL, KINDS, made, make
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.errors import ArgumentError, LayerError, PositionError, PromptError, SiteOrderError, SiteValueError
from mamba_trace.flow import (
    Cut,
    ZeroDelta,
    apply,
    decay_groups,
    decay_rate,
    knockout,
    knockout_conv,
    zero_delta,
)

E = SIZES["expand"] * SIZES["hidden_size"]
SOME = [0, 3, 4, 11, 23]

#: Edits, of which every case is made in the layers beside it (None is all of them).
CASES: dict[str, tuple[list[Cut | ZeroDelta], list[int] | None]] = {
    "one pair": ([Cut(2, 6)], [1]),
    "from the end": ([Cut(-7, -1)], [0, 2]),
    "many sources and targets": ([Cut([1, 4, 5], [3, 5, 8])], None),
    "tokens cut from themselves": ([Cut([2, 5], [2, 5])], [1]),
    "all that a token reads": ([Cut(slice(None), 7)], None),
    "slices": ([Cut(slice(2, 5), slice(4, None, 2))], [0, 1]),
    "masks": ([Cut(torch.arange(9) < 3, torch.arange(9) > 5, torch.arange(E) % 3 == 1)], [1]),
    "channels": ([Cut([0, 3], [4, 8], SOME)], None),
    "slow": ([Cut(1, [5, 8], "slow")], None),
    "medium": ([Cut(1, [5, 8], "medium")], None),
    "fast": ([Cut(1, [5, 8], "fast")], None),
    "taps": ([Cut([2, 5], [3, 4, 5], scan=False, conv=True)], None),
    "taps of channels": ([Cut(4, [4, 5, 6], SOME, scan=False, conv=True)], [0, 2]),
    "taps and scan": ([Cut(4, [4, 6, 8], conv=True)], None),
    "no time": ([ZeroDelta([3, -2])], None),
    "no time in channels": ([ZeroDelta(4, SOME)], [1]),
    "overlapping cuts": ([Cut([1, 2], [4, 6]), Cut([2, 3], [6, 7], SOME), Cut(2, 6, [4, 5])], None),
    "overlapping taps": (
        [Cut([3, 4], 5, scan=False, conv=True), Cut(4, [5, 6], SOME, scan=False, conv=True)],
        [0, 1],
    ),
    "everything at once": (
        [ZeroDelta(3, "fast"), Cut([1, 3], -1, conv=True), Cut(1, [4, 8], "slow"), ZeroDelta(0)],
        None,
    ),
}
#: The same by heads, for Mamba-2, and with whole heads where delta is zeroed.
CASES_OF_HEADS: dict[str, tuple[list[Cut | ZeroDelta], list[int] | None]] = {
    **{case: edits for case, edits in CASES.items() if case != "no time in channels"},
    "heads": ([Cut([0, 3], [4, 8], heads=[0, -1])], None),
    "one head": ([Cut(1, slice(2, None), heads=3)], [1]),
    "a mask of heads": ([Cut(1, [5, 8], heads=torch.arange(6) > 3)], None),
    "taps of a head": ([Cut(4, [4, 5, 6], scan=False, conv=True, heads=4)], [0, 2]),
    "taps and scan of heads": ([Cut(4, [4, 6, 8], conv=True, heads=[1, 2])], None),
    "taps of heads that overlap": (
        [Cut([3, 4], 5, scan=False, conv=True, heads=0), Cut(4, [5, 6], scan=False, conv=True, heads=[2, 5])],
        [0, 1],
    ),
    "no time in heads": ([ZeroDelta(4, heads=[0, 4])], [1]),
    "no time in the channels of heads": ([ZeroDelta(4, [8, 9, 10, 11, 16, 17, 18, 19])], [1]),
}
EVERY_CASE = [(kind, case) for kind in KINDS for case in (CASES_OF_HEADS if kind in DUAL else CASES)]


# -- the reference -----------------------------------------------------------------------------------------


def numbers(positions: Any) -> list[int]:
    """Positions of a call of `LENGTH`."""
    chosen = torch.zeros(LENGTH, dtype=torch.bool)
    chosen[positions] = True
    return chosen.nonzero().flatten().tolist()


def mask_of(weights: dict[str, Tensor], layer: int, channels: Any, heads: Any = None) -> Tensor:
    """Channels as a mask [E]; the thirds by the mean of exp(A_log) are counted out here once more."""
    mask = torch.zeros(E, dtype=torch.bool)
    A_log = weights[f"backbone.layers.{layer}.mixer.A_log"].double()
    units = len(A_log)  # channels, in Mamba-2 heads
    by_unit = mask.view(units, -1)
    if isinstance(channels, str):
        rate = A_log.exp().view(units, -1).mean(1).tolist()
        third = ["slow", "medium", "fast"].index(channels)
        by_unit[sorted(range(units), key=rate.__getitem__)[third * units // 3 : (third + 1) * units // 3]] = True
    elif heads is not None:
        by_unit[heads] = True
    elif channels is None:
        mask[:] = True
    else:
        mask[channels] = True
    return mask


class ByLoops:
    """The ``edit`` of `reference.forward` that makes cuts pair by pair; keeps every value by hook name."""

    def __init__(self, weights: dict[str, Tensor], edits: Iterable[Cut | ZeroDelta], layers: list[int] | None) -> None:
        self.weights, self.edits = weights, list(edits)
        self.layers = range(N_LAYERS) if layers is None else layers
        self.values: dict[str, Tensor] = {}

    def __call__(self, hook: str, value: Tensor) -> Tensor:
        parts = hook.split(".")
        if parts[0] == "blocks" and int(parts[1]) in self.layers and len(parts) == 3:
            layer, name = int(parts[1]), parts[2].removeprefix("hook_")
            if name in ("conv", "B_conv", "C_conv"):
                value = self.conv(layer, name, value.clone())
            elif name in ("delta", "y"):
                value = getattr(self, name)(layer, value.clone())
        self.values[hook] = value
        return value

    def pairs(self, layer: int, way: str) -> dict[tuple[int, int], Tensor]:
        """(source, target) -> the channels [E] in which the pair is cut."""
        found: dict[tuple[int, int], Tensor] = {}
        for cut in self.edits:
            if not isinstance(cut, Cut) or not getattr(cut, way):
                continue
            mask = mask_of(self.weights, layer, cut.channels, cut.heads)
            for j in numbers(cut.source_positions):
                for i in numbers(cut.target_positions):
                    found[j, i] = found.get((j, i), torch.zeros_like(mask)) | mask
        return found

    def of(self, layer: int, site: str) -> Tensor:
        return self.values[f"blocks.{layer}.hook_{site}"]

    def conv(self, layer: int, name: str, value: Tensor) -> Tensor:
        columns = self.of(layer, {"conv": "in_proj", "B_conv": "B_in", "C_conv": "C_in"}[name]).flatten(2)
        weight = self.weights[f"backbone.layers.{layer}.mixer.conv1d.weight"][:, 0].double()  # [channels,K]
        first, K = 0 if name == "conv" else E + (name == "C_conv") * columns.shape[2], weight.shape[1]
        weight = weight[first : first + columns.shape[2]]
        flat = value.flatten(2)  # [B,L,E], or [B,L,GN]
        for (j, i), mask in self.pairs(layer, "conv").items():
            if 0 <= i - j < K:
                if name != "conv":  # a group is cut as a whole if any of its channels is
                    G, N = value.shape[2:]
                    mask = torch.stack([mask[g * E // G : (g + 1) * E // G].any() for g in range(G)])
                    mask = mask.repeat_interleave(N)
                flat[:, i] -= mask * weight[:, K - 1 - (i - j)] * columns[:, j]
        return flat.view(value.shape)

    def delta(self, layer: int, value: Tensor) -> Tensor:
        for edit in self.edits:
            if isinstance(edit, ZeroDelta):
                mask = mask_of(self.weights, layer, edit.channels, edit.heads).view(value.shape[2], -1).all(1)
                for i in numbers(edit.positions):
                    value[:, i] = value[:, i] * ~mask
        return value

    def y(self, layer: int, value: Tensor) -> Tensor:
        x, C = self.of(layer, "ssm_input"), self.of(layer, "C")
        A_bar, B_bar = self.of(layer, "A_bar"), self.of(layer, "B_bar")
        if A_bar.dim() == 3:  # Mamba-2, written out for each channel
            P = E // A_bar.shape[2]
            A_bar, B_bar = A_bar.repeat_interleave(P, 2)[..., None], B_bar.repeat_interleave(P, 2)
            C = C.repeat_interleave(E // C.shape[2], 2)
        else:
            C = C[:, :, None]
        for (j, i), mask in self.pairs(layer, "scan").items():
            if j <= i:
                carried = B_bar[:, j] * x[:, j, :, None]  # [B,E,N]
                for k in range(j + 1, i + 1):
                    carried = A_bar[:, k] * carried
                value[:, i] -= mask * (carried * C[:, i]).sum(-1)
        return value


def by_loops(
    model: MambaTrace, tokens: Tensor, edits: Iterable[Cut | ZeroDelta], layers: list[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits [B,L,V] and every value, by hook name, in float64."""
    weights = model._module.state_dict()
    edit = ByLoops(weights, edits, layers)
    return reference.forward(weights, model._module.config, tokens, edit), edit.values


def cut_run(
    model: MambaTrace, tokens: Tensor, edits: list[Cut | ZeroDelta], layers: list[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits [B,L,V], and conv and y of every layer [B,L,E] as they went on."""
    with model.trace() as tracer:
        with tracer.invoke(tokens):
            apply(model, edits, layers)
        with tracer.invoke():
            values = {}
            for index, layer in enumerate(model.layers):
                values[f"blocks.{index}.hook_conv"] = layer.ssm.conv.output
                values[f"blocks.{index}.hook_y"] = layer.ssm.y.output
            values = values.save()
            logits = model.lm_head.output.save()
    return logits, values


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), EVERY_CASE)
def test_what_a_cut_leaves_is_what_loops_over_all_pairs_leave(tokens: Tensor, kind: str, case: str) -> None:
    model = made(kind)
    edits, layers = (CASES_OF_HEADS if kind in DUAL else CASES)[case]
    logits, values = cut_run(model, tokens, edits, layers)
    expected, everything = by_loops(model, tokens, edits, layers)
    for hook, value in values.items():
        agree(value, everything[hook], 1e-12)
    agree(logits, expected, 1e-11)
    uncut, _ = by_loops(model, tokens, [])
    assert (expected - uncut).abs().max() > 1e-3, "the cut matters, so the comparison means something"


@pytest.mark.parametrize(("kind", "each_backend"), BACKENDS, indirect=["each_backend"])
@pytest.mark.parametrize("case", ["many sources and targets", "overlapping cuts", "everything at once"])
def test_every_backend_cuts_the_same(tokens: Tensor, kind: str, each_backend: str, case: str) -> None:
    model = make(kind, each_backend, dtype=torch.float32)
    edits, layers = CASES[case]
    logits, values = cut_run(model, tokens, edits, layers)
    expected, everything = by_loops(model, tokens, edits, layers)
    for hook, value in values.items():
        agree(value, everything[hook].float())
    agree(logits, expected.float())
    if each_backend != "reference":
        assert each_backend in {call.backend for run in model.last_run for call in run.calls}


def test_in_half_precision_y_is_cut_in_float32(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.bfloat16))
    cut = Cut([1, 4], [4, 8])
    found = []
    for edits in ([], [cut]):
        with model.trace() as tracer:
            with tracer.invoke(tokens):
                apply(model, edits, 0)
            with tracer.invoke():
                ssm = model.layers[0].ssm
                values = [site.output for site in (ssm.ssm_input, ssm.delta, ssm.A, ssm.B, ssm.C, ssm.y)]
                values = values.save()
        found.append(values)
    (x, delta, A, B, C, whole), rest = (
        [value.double() for value in found[0]],
        found[1][-1],
    )
    assert rest.dtype == torch.float32
    for j, i in ((1, 4), (4, 4), (1, 8), (4, 8)):
        decay = torch.exp(delta[:, j + 1 : i + 1].sum(1)[..., None] * A)  # [B,E,N]
        write = (delta * x)[:, j, :, None] * B[:, j, None]
        whole[:, i] -= (C[:, i, None] * decay * write).sum(-1)
    agree(rest.double(), whole, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"conv_kernel": 1}, {"conv_kernel": 4}], ids=["one tap", "four taps"])
def test_each_tap_is_the_one_of_its_distance(tokens: Tensor, changes: dict[str, Any], kind: str) -> None:
    model = make(kind, **changes)
    edits: list[Cut | ZeroDelta] = [Cut(3, slice(2, 8), scan=False, conv=True)]
    agree(cut_run(model, tokens, edits)[0], by_loops(model, tokens, edits)[0], 1e-11)


def test_the_shorthands_make_the_same_cuts(exact_once: MambaTrace, tokens: Tensor) -> None:
    def run(call: Callable[[], None]) -> Tensor:
        with torch.no_grad(), exact_once.trace(tokens):
            call()
            logits = exact_once.lm_head.output.save()
        return logits

    for call, edit in (
        (lambda: knockout(exact_once, 1, -1, [0, 2], "slow"), Cut(1, -1, "slow")),
        (lambda: knockout(exact_once, 1, 2, [0, 2], SOME, conv=True), Cut(1, 2, SOME, True, True)),
        (lambda: knockout(exact_once, 1, 2, [-1, 0], scan=False, conv=True), Cut(1, 2, None, False, True)),
        (lambda: knockout_conv(exact_once, 1, 2, [0, 2], SOME), Cut(1, 2, SOME, False, True)),
        (lambda: zero_delta(exact_once, 4, [0, 2], SOME), ZeroDelta(4, SOME)),
    ):
        assert torch.equal(run(call), run(lambda edit=edit: apply(exact_once, edit, [0, 2])))


# -- what stays --------------------------------------------------------------------------------------------


def test_the_state_and_what_others_read_stay_bit_for_bit(tiny: MambaTrace, tokens: Tensor) -> None:
    found = []
    for edits in ([ZeroDelta(0, [0])], [ZeroDelta(0, [0]), Cut([1, 2], [4, 7], SOME)]):
        with torch.no_grad(), tiny.trace() as tracer:
            with tracer.invoke(tokens):
                apply(tiny, edits, 1)
            with tracer.invoke():
                states = [tiny.layers[1].ssm.h[p].output for p in (1, 4, 8)].save()
                y = tiny.layers[1].ssm.y.output.save()
        found.append((torch.stack(states), y))
    (states, y), (states_cut, y_cut) = found
    assert torch.equal(states, states_cut)
    reached = torch.zeros(LENGTH, E, dtype=torch.bool)
    reached[[[4], [7]], SOME] = True
    assert torch.equal(y[:, ~reached], y_cut[:, ~reached])
    assert (y[:, reached] != y_cut[:, reached]).all()


def test_layers_that_are_not_cut_keep_their_kernels(tiny: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), tiny.trace(tokens):
        knockout(tiny, 1, 4, layers=1, conv=True)
    assert not tiny.last_run[0].reasons
    assert tiny.last_run[1].reasons
    assert not tiny.last_run[2].reasons


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_cut_run(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    edits, layers = CASES["everything at once"]
    weights = {n: w.detach().clone().requires_grad_() for n, w in exact_once._module.named_parameters()}
    logits = reference.forward(weights, exact_once._module.config, tokens, ByLoops(weights, edits, layers))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weight).sum().backward()
    exact_once._module.zero_grad()
    (cut_run(exact_once, tokens, edits, layers)[0] * weight).sum().backward()
    for name, parameter in exact_once._module.named_parameters():
        agree(parameter.grad, weights[name].grad, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_edited_by_an_earlier_invoke_are_those_of_the_cut(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    ssm = exact_once.layers[1].ssm
    with torch.no_grad(), exact_once.trace() as tracer:
        with tracer.invoke(tokens):
            ssm.delta.output[:, 2:4] *= 3
            ssm.B.output[:, 1] += 1
            ssm.C.output[:, 6] *= -2
        with tracer.invoke():
            knockout(exact_once, [1, 3], 6, 1)
            logits = exact_once.lm_head.output.save()
    cut = ByLoops(exact_once._module.state_dict(), [Cut([1, 3], 6)], [1])

    def edit(hook: str, value: Tensor) -> Tensor:
        if hook.startswith("blocks.1.hook_") and hook.rsplit("_", 1)[-1] in ("delta", "B", "C"):
            value = value.clone()
            value[:, 2:4] *= 3 if hook.endswith("delta") else 1
            value[:, 1] += hook.endswith("_B")
            value[:, 6] *= -2 if hook.endswith("_C") else 1
        return cut(hook, value)

    agree(logits, reference.forward(cut.weights, exact_once._module.config, tokens, edit), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_edited_in_the_same_layer_is_read_less_the_sources_own_writes(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    ssm = exact_once.layers[1].ssm
    found = []
    for edit_state in (False, True):
        for edits in ([], [Cut(1, 6)]):
            with torch.no_grad(), exact_once.trace() as tracer:
                if edit_state:
                    with tracer.invoke(tokens):
                        ssm.h[4].output *= 2
                else:
                    with tracer.invoke(tokens):
                        ssm.h[4].output.shape  # noqa: B018
                with tracer.invoke():
                    apply(exact_once, edits, 1)
                with tracer.invoke():
                    y = ssm.y.output.save()
            found.append(y)
    plain, cut, doubled, doubled_cut = found
    assert (doubled - plain)[:, 6].abs().max() > 1e-3
    agree(doubled - doubled_cut, plain - cut, 1e-12)


# -- where it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_invoke_of_a_padded_batch_is_cut_at_its_own_tokens(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    short, long = tokens[:1, 4:], tokens[1:]
    with torch.no_grad(), exact_once.trace() as tracer:
        with tracer.invoke(tokens[:1], attention_mask=mask[:1]):
            knockout(exact_once, -4, -1, [0, 1], "slow", conv=True)
            first = exact_once.lm_head.output[:, 4:].save()
        with tracer.invoke(long, attention_mask=mask[1:]):
            zero_delta(exact_once, -3, 1)
            second = exact_once.lm_head.output.save()
    edits: list[Cut | ZeroDelta] = [Cut(1, 4, "slow", True, True)]
    weights = exact_once._module.state_dict()
    loops = ByLoops(weights, edits, [0, 1])
    agree(first, reference.forward(weights, exact_once._module.config, short, loops), 1e-10)
    agree(second, by_loops(exact_once, long, [ZeroDelta(-3)], [1])[0], 1e-10)


@pytest.mark.parametrize(
    ("positions", "warns"),
    [(3, True), (-3, False), ([-2, 4], True), (slice(4, None), True), (slice(-4, None), False),
     (slice(None), False)],
    ids=["counted from the start", "from the end", "one of two", "slice", "slice from the end", "all"],
)  # fmt: skip
def test_a_position_that_counts_padding_warns_at_the_line_that_asks(
    tiny: MambaTrace, tokens: Tensor, positions: Any, warns: bool
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), tiny.trace(tokens, attention_mask=mask):
            zero_delta(tiny, positions, 1)
    said = [one for one in caught if "left-padded by [2, 0, 0]" in str(one.message)]
    assert len(said) == warns
    assert all(one.filename == __file__ for one in said)


@pytest.mark.parametrize(
    ("positions", "warns"),
    [(-8, True), ([-1, -8], True), (-7, False), (slice(-9, -7), True), (slice(-9, -6), False)],
    ids=["int", "one of two", "first token", "slice of padding", "slice clipped"],
)
def test_a_position_that_some_prompts_do_not_have_warns(
    tiny: MambaTrace, tokens: Tensor, positions: Any, warns: bool
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), tiny.trace(tokens, attention_mask=mask):
            knockout(tiny, positions, -1, 1)
    said = [one for one in caught if "fewer than 8 tokens this is padding. The shortest has 7" in str(one.message)]
    assert len(said) == warns
    assert all(one.filename == __file__ for one in said)


@pytest.mark.parametrize("positions", [-8, [-1, -8], [-8, 3], slice(-9, -7)], ids=str)
def test_a_position_that_no_prompt_has_is_refused_though_padding_is_there(
    tiny: MambaTrace, tokens: Tensor, positions: Any
) -> None:
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    with (
        pytest.raises(PositionError, match=r"source_positions=.*left-padded by 2, .* has 7 tokens"),
        tiny.trace(tokens, attention_mask=mask),
    ):
        knockout(tiny, positions, -1, 1)
    assert not len(tiny.last_run)


def test_without_padding_no_position_warns(tiny: MambaTrace, tokens: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), tiny.trace(tokens, attention_mask=torch.ones_like(tokens)):
            knockout(tiny, [0, 3], 5, 1, conv=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [None, "slow"], ids=["all", "slow"])
def test_offloaded_weights_are_fetched_and_left_to_the_run(tokens: Tensor, channels: str | None, kind: str) -> None:
    plain, model = make(kind, dtype=torch.float32), make(kind, dtype=torch.float32)
    expected_groups = decay_groups(plain, 2)
    for block in model._module.backbone.layers:
        attach_align_device_hook(block, execution_device=torch.device("cpu"), offload=True)
    assert model.layers[1].ssm._module.A_log.is_meta
    found = []
    for each in (plain, model):
        with torch.no_grad(), each.trace(tokens):
            each.layers[1].ssm.skip.output.shape  # noqa: B018 - the mixer is running, its weights at hand
            knockout(each, 2, -1, [1, 2], channels, conv=True)
            logits = each.lm_head.output.save()
        found.append(logits)
    agree(found[1], found[0])
    groups = decay_groups(model, 2)
    assert all(torch.equal(groups[name], expected_groups[name]) for name in groups)
    assert model.layers[1].ssm._module.A_log.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_cut_before_it_is_continued(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    with torch.no_grad(), exact_once.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
        for step in tracer.iter[:3]:
            if step == 0:
                knockout(exact_once, 6, -1, conv=True)
            if step == 2:
                zero_delta(exact_once, 0)
        continued = tracer.result.save()
    first = by_loops(exact_once, tokens, [Cut(6, -1, conv=True)])[0][:, -1].argmax(-1)
    assert torch.equal(continued[:, LENGTH], first)


@pytest.mark.parametrize("channels", [None, "fast", [1, -1]], ids=["all", "fast", "indices"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_found_without_running_anything(tokens: Tensor, channels: Any, kind: str) -> None:
    tiny = make(kind, dtype=torch.float32)
    with tiny.scan(tokens):
        knockout(tiny, [1, 2], -1, None, channels, conv=True)
        logits = tiny.lm_head.output.save()
    assert logits.shape == (*tokens.shape, SIZES["vocab_size"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_can_be_made_for_good(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    with exact_once.edit() as (_, edited):
        knockout(exact_once, 2, -1)
    with torch.no_grad(), edited.trace(tokens):
        logits = edited.lm_head.output.save()
    agree(logits, by_loops(exact_once, tokens, [Cut(2, -1)])[0], 1e-11)


# -- channels by how fast they forget ----------------------------------------------------------------------


def test_the_groups_are_the_thirds_by_the_mean_of_minus_A(tiny_hf: ModuleFactory) -> None:
    model = MambaTrace(tiny_hf(expand=3, hidden_size=7, dtype=torch.bfloat16))  # 21 channels
    A_log = model.layers[-1].ssm._module.A_log
    rate = decay_rate(model, -1)
    assert rate.dtype == torch.float32
    torch.testing.assert_close(rate, A_log.detach().float().exp().mean(1), rtol=1e-6, atol=0)
    groups = decay_groups(model, N_LAYERS - 1)
    assert list(groups) == ["slow", "medium", "fast"]
    assert [len(group) for group in groups.values()] == [7, 7, 7]
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(21))
    assert rate[groups["slow"]].max() <= rate[groups["medium"]].min()
    assert rate[groups["medium"]].max() <= rate[groups["fast"]].min()


def test_every_channel_is_in_one_group_where_they_are_no_multiple_of_three(tiny_hf: ModuleFactory) -> None:
    groups = decay_groups(MambaTrace(tiny_hf(hidden_size=10)), 0)  # 20 channels
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(20))
    assert [len(group) for group in groups.values()] == [7, 7, 6]


@pytest.mark.parametrize("kind", DUAL)
def test_the_channels_of_a_head_have_its_rate_and_its_group(kind: str) -> None:
    model = made(kind)
    A_log = model.layers[1].ssm._module.A_log.detach()
    rate = decay_rate(model, 1)
    agree(rate, A_log.exp().repeat_interleave(4), 1e-12)
    groups = decay_groups(model, 1)
    order = A_log.argsort()
    for group, heads in zip(groups.values(), order.split(2), strict=True):
        assert (group // 4).unique().tolist() == heads.sort().values.tolist()
        assert group.tolist() == sorted(group.tolist())
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(E))


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_prompt_the_rate_is_the_mean_of_minus_delta_A(tokens: Tensor, kind: str) -> None:
    model, prompt = made(kind), tokens[:1]
    _, values = by_loops(model, prompt, [])
    delta, A = values["blocks.2.hook_delta"][0], values["blocks.2.hook_A"]
    expected = (-delta[..., None] * A).mean((0, 2)) if A.dim() == 2 else (-delta * A).mean(0).repeat_interleave(4)
    agree(decay_rate(model, -1, prompt), expected, 1e-11)
    groups = decay_groups(model, 2, prompt)
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(E))
    assert expected[groups["slow"]].max() <= expected[groups["medium"]].min()
    assert expected[groups["medium"]].max() <= expected[groups["fast"]].min()
    if kind in DUAL:
        assert all(len(set((group // 4).tolist())) * 4 == len(group) for group in groups.values())
    with pytest.raises(RuntimeError, match="decay_rate with a prompt is a trace of its own"), model.trace(tokens):
        decay_groups(model, 2, prompt)
    with pytest.raises(PromptError, match="one prompt"):
        decay_rate(model, 2, tokens)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_third_without_heads_is_refused(tokens: Tensor, n_heads: int) -> None:
    model = make("mamba2, one group", num_heads=n_heads, head_dim=E // n_heads)
    words = rf"channels='fast': a layer of {n_heads} heads has no such third"
    with pytest.raises(SiteValueError, match=words), model.trace(tokens):
        knockout(model, 1, 4, channels="fast")
    assert not len(model.last_run)
    assert [len(group) for group in decay_groups(model, 0).values()] == [E // n_heads] * n_heads + [0] * (3 - n_heads)


# -- what is refused ---------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[type[Exception], str, Callable[[MambaTrace], None]]] = {
    "a position past the end": (
        PositionError,
        r"target_positions=9, but there are 9, from -9 to 8.*this one has 9",
        lambda model: knockout(model, 1, 9),
    ),
    "a position before the start": (
        PositionError,
        r"source_positions=-10, but there are 9",
        lambda model: knockout(model, [1, -10], 8),
    ),
    "an empty slice": (
        PositionError,
        r"positions=slice\(20, None, None\), which is none of the 9",
        lambda model: zero_delta(model, slice(20, None)),
    ),
    "no position": (
        PositionError,
        r"positions=\[\], which is none of the 9",
        lambda model: zero_delta(model, []),
    ),
    "a fraction": (
        PositionError,
        r"positions=1.5: give an integer, a slice, several integers or a boolean mask of 9",
        lambda model: zero_delta(model, 1.5),  # type: ignore[arg-type]
    ),
    "a mask of another length": (
        PositionError,
        r"positions=a boolean mask of 2, but there are 9",
        lambda model: zero_delta(model, [True, False]),
    ),
    "a source after every target": (
        PositionError,
        r"source_positions=\[5, 6\], target_positions=4: every source comes after every target",
        lambda model: knockout(model, [5, 6], 4),
    ),
    "a source out of the convolution's reach": (
        PositionError,
        r"no source is in reach of the convolution.*and the 2 positions before it",
        lambda model: knockout_conv(model, 1, [0, 4]),
    ),
    "a layer that is not there": (
        LayerError,
        r"layers=\[0, 3\]: this model has layers 0 to 2, and no 3",
        lambda model: knockout(model, 1, 4, [0, 3]),
    ),
    "a word for layers": (
        LayerError,
        r"^layers='all': this model has layers 0 to 2, named by one integer or several; None is all$",
        lambda model: knockout(model, 1, 4, "all"),  # type: ignore[arg-type]
    ),
    "a mask of layers": (
        LayerError,
        r"layers=\[True, .*: this model has layers 0 to 2, named by one integer or several",
        lambda model: knockout(model, 1, 4, [True, False, True]),
    ),
    "no layer": (LayerError, r"layers=\[\] names no layer", lambda model: knockout(model, 1, 4, [])),
    "an unknown group": (
        SiteValueError,
        r"channels='slowest': the groups by decay are 'slow', 'medium', 'fast'",
        lambda model: knockout(model, 1, 4, channels="slowest"),
    ),
    "a channel that is not there": (
        SiteValueError,
        r"channels=24, but there are 24, from -24 to 23.*Channels count along E \(d_inner\), of size 24",
        lambda model: knockout(model, 1, 4, channels=[3, 24]),
    ),
    "a mask of other channels": (
        SiteValueError,
        r"channels=a boolean mask of 3, but there are 24",
        lambda model: zero_delta(model, 1, channels=torch.ones(3, dtype=torch.bool)),
    ),
    "no channel": (
        SiteValueError,
        r"which is none of the 24",
        lambda model: zero_delta(model, 1, channels=torch.zeros(24, dtype=torch.bool)),
    ),
    "nothing to cut": (
        ArgumentError,
        r"scan=False and conv=False: nothing would be cut",
        lambda model: knockout(model, 1, 4, scan=False),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_before_anything_is_computed(tiny: MambaTrace, tokens: Tensor, case: str) -> None:
    kind, message, call = REFUSED[case]
    with pytest.raises(kind, match=message), tiny.trace(tokens):
        call(tiny)
    assert not len(tiny.last_run)


#: Heads that a model lacks, and what is said of them.
REFUSED_HEADS: dict[str, tuple[str, str, Callable[[MambaTrace], None]]] = {
    "heads of Mamba-1": (
        "mamba",
        r"heads=\[0\]: a mixer of Mamba-1 or Falcon-Mamba has 0 heads.*channels=, which count along E .* of size 24",
        lambda model: knockout(model, 1, 4, heads=[0]),
    ),
    "heads of Falcon-Mamba": (
        "falcon_mamba",
        r"heads=2: a mixer of Mamba-1 or Falcon-Mamba has 0 heads",
        lambda model: zero_delta(model, 1, heads=2),
    ),
    "a head that is not there": (
        DUAL[0],
        r"heads=6, but there are 6, from -6 to 5.*Heads count along H \(heads\), of size 6, each of 4 channels",
        lambda model: knockout_conv(model, 3, 4, heads=[0, 6]),
    ),
    "a mask of other heads": (
        DUAL[1],
        r"heads=a boolean mask of 24, but there are 6",
        lambda model: knockout(model, 1, 4, heads=torch.ones(E) > 0),
    ),
    "heads by name": (
        DUAL[1],
        r"heads='slow': give an integer",
        lambda model: knockout(model, 1, 4, heads="slow"),  # type: ignore[arg-type]
    ),
    "heads and channels": (
        DUAL[1],
        r"channels='slow' and heads=\[1\]: both choose channels",
        lambda model: knockout(model, 1, 4, channels="slow", heads=[1]),
    ),
    "part of a head": (
        DUAL[1],
        r"channels=\[0, 1, 2, 3, 9\]: .* share one delta, and these have some of head 2, which is channels 8 to 11",
        lambda model: zero_delta(model, 1, channels=[0, 1, 2, 3, 9]),
    ),
    "a channel that is not there": (
        DUAL[1],
        r"channels=24, but there are 24, from -24 to 23",
        lambda model: zero_delta(model, 1, channels=[24]),
    ),
}


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_heads_that_are_not_there_are_refused_before_anything_is_computed(tokens: Tensor, case: str) -> None:
    kind, message, call = REFUSED_HEADS[case]
    model = make(kind)
    with pytest.raises(SiteValueError, match=message), model.trace(tokens):
        call(model)
    assert not len(model.last_run)
    with torch.no_grad(), model.trace(tokens):
        logits = model.lm_head.output.save()
    agree(logits, by_loops(model, tokens, [])[0], 1e-11)


def test_a_position_is_refused_where_the_inputs_have_gone_past(tiny: MambaTrace, tokens: Tensor) -> None:
    def body() -> None:
        tiny.layers[1].resid_pre.output.shape  # noqa: B018
        knockout(tiny, 1, 9, layers=1)

    with pytest.raises(PositionError, match="target_positions=9, but there are 9"), tiny.trace(tokens):
        body()


@pytest.mark.parametrize("kind", KINDS)
def test_reads_before_and_after_fit_into_the_same_block(tokens: Tensor, kind: str) -> None:
    exact_once = made(kind)
    _, values = by_loops(exact_once, tokens, [Cut(2, -1)], [1])
    with torch.no_grad(), exact_once.trace(tokens):
        before = exact_once.layers[1].resid_pre.output.save()
        knockout(exact_once, 2, -1, layers=1)
        y, output = exact_once.layers[1].ssm.y.output.save(), exact_once.layers[1].ssm.ssm_output.output.save()
        after = exact_once.layers[1].resid_post.output.save()
    agree(before, values["blocks.1.hook_resid_pre"], 1e-12)
    agree(y, values["blocks.1.hook_y"], 1e-12)
    agree(output, values["blocks.1.hook_ssm_output"], 1e-12)
    agree(after, values["blocks.1.hook_resid_post"], 1e-12)


def test_a_second_call_in_the_same_layer_is_refused(tiny: MambaTrace, tokens: Tensor) -> None:
    def body() -> None:
        knockout(tiny, 1, -1, layers=1)
        knockout(tiny, 2, -1, layers=1)

    cure = r"layers\[1\].ssm.ssm_input.*flow.apply\(model, \[Cut\(...\), Cut\(...\)\], layers\)"
    with pytest.raises(SiteOrderError, match=cure), tiny.trace(tokens):
        body()


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("knockout", lambda model: knockout(model, 1, 4)),
        ("knockout_conv", lambda model: knockout_conv(model, 3, 4)),
        ("zero_delta", lambda model: zero_delta(model, 1)),
        ("apply", lambda model: apply(model, Cut(1, 4))),
    ],
    ids=["knockout", "knockout_conv", "zero_delta", "apply"],
)
def test_a_cut_outside_of_a_trace_is_told_where_it_belongs(
    tiny: MambaTrace, verb: str, call: Callable[[MambaTrace], None]
) -> None:
    with pytest.raises(SiteValueError, match=rf"^{verb} edits a run: call it inside `with model.trace"):
        call(tiny)


@pytest.mark.parametrize("layer", [None, [1, 2], "1", 1.5, True], ids=repr)
def test_groups_are_those_of_one_layer(tiny: MambaTrace, layer: Any) -> None:
    with pytest.raises(LayerError, match=r"^layer=.*: this model has layers 0 to 2, named by one integer$"):
        decay_groups(tiny, layer)


def test_taps_of_an_adapted_convolution_are_not_guessed(tiny: MambaTrace, tokens: Tensor) -> None:
    class Adapted(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mixer: Any = tiny.layers[1].ssm._module
    adapted = copy.deepcopy(mixer.conv1d)
    adapted.__class__ = Adapted
    mixer.conv1d = adapted
    with pytest.raises(SiteValueError, match=r"conv1d of layer 1 is a Adapted"), tiny.trace(tokens):
        knockout_conv(tiny, 1, 2)
