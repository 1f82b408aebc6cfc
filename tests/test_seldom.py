"""What people do seldom, and must be answered as well: behaviour that the tests of each topic do not come to."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModuleFactory, agree
from hybrid_models import make_hybrid
from torch import Tensor

from mamba_trace import MambaTrace, flow, interventions, means
from mamba_trace.errors import (
    CheckpointError,
    LayerError,
    PromptError,
    SiteValueError,
    UnknownSiteError,
)
from mamba_trace.hidden_attention import hidden_attention
from mamba_trace.patching.changes import moves_alone
from mamba_trace.patching.marks import mark_of_function
from mamba_trace.porting import port_name
from mamba_trace.results.heatmap import Heatmap
from mamba_trace.results.notebook import extremes
from mamba_trace.scan import cpu

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def without_ssm() -> MambaTrace:
    """A Granite 4 with attention alone."""
    return MambaTrace(make_hybrid("granitemoehybrid", layers_block_type=["full_attention"] * 2, num_hidden_layers=2))


# -- prompts and masks ---------------------------------------------------------------------------------------


def test_rows_of_several_lengths_have_a_mask_each() -> None:
    model = MambaTrace.demo()
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    with model.trace({"input_ids": rows, "attention_mask": [[0, 1, 1, 1], [1, 1, 1]]}):
        logits = model.lm_head.output[:, -1].save()
    for row, alone in zip(logits, ([2, 3, 4], [5, 6, 7]), strict=True):
        agree(row, model._module(torch.tensor([alone])).logits[0, -1])


def test_a_mask_of_one_axis_is_that_of_the_only_prompt(tiny: MambaTrace) -> None:
    mask = torch.tensor([0, 0, 1, 1, 1])
    expected = tiny._module(IDS[:, 2:]).logits[0, -1]
    with tiny.trace(IDS, attention_mask=mask):
        traced = tiny.lm_head.output[0, -1].save()
    agree(traced, expected)
    agree(tiny.run_with_hooks(IDS, attention_mask=mask)[0, -1], expected)
    found, expected_means = means.mean_activation(tiny, IDS[0], "y", attention_mask=mask), {}
    expected_means |= means.mean_activation(tiny, IDS[:, 2:], "y")
    for layer, mean in expected_means.items():
        agree(found[layer], mean)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"attention_mask": torch.ones(1, 2)}, {}, "strings bring their own mask"),
        ({"padding_side": "left"}, {"padding_side": "right"}, "padded on one side"),
    ],
    ids=["mask", "side"],
)
def test_what_one_invoke_of_several_cannot_have(first: dict[str, Any], second: dict[str, Any], words: str) -> None:
    model = MambaTrace.demo()

    def two_invokes() -> None:
        with model.trace() as tracer:
            with tracer.invoke("Emma gave", **first):
                model.lm_head.output.save()
            with tracer.invoke("Emma gave an apple", **second):
                model.lm_head.output.save()

    with pytest.raises(PromptError, match=words):
        two_invokes()


def test_a_model_is_called_with_ids_and_not_with_text() -> None:
    with pytest.raises(PromptError, match=r"run_with_hooks\(prompt\)"):
        MambaTrace.demo()("Emma gave an apple to")


def test_a_loss_takes_a_tensor_of_tokens(tiny: MambaTrace) -> None:
    with pytest.raises(PromptError, match=r"loss_fn takes the tokens \[B,L\]"):
        tiny.loss_fn(torch.zeros(1, 5, 31), IDS.tolist())


# -- hooks and caches ----------------------------------------------------------------------------------------


def test_arguments_that_take_a_list_say_so(tiny: MambaTrace) -> None:
    calls: dict[str, Any] = {
        "fwd_hooks takes a list of pairs": lambda: tiny.run_with_hooks(IDS, fwd_hooks=5),
        "names_filter is a name, a predicate": lambda: tiny.run_with_cache(IDS, names_filter=5),
    }
    for words, call in calls.items():
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(LayerError, match="it takes a list of layers"):
        tiny.run_with_hooks(IDS, only_use_these_layers=1)


def test_a_hook_of_the_whole_model_has_no_layer(tiny: MambaTrace) -> None:
    with pytest.raises(LayerError, match="belongs to no layer"):
        tiny.run_with_hooks(IDS, fwd_hooks=[("hook_embed", lambda value, hook: print(hook.layer()))])


def test_nothing_is_stacked_before_the_first_layer(tiny: MambaTrace) -> None:
    _, cache = tiny.run_with_cache(IDS)
    with pytest.raises(LayerError, match="no layers before layer 0"):
        cache.stack_activation("y", layer=0)


def test_the_blocks_of_weights_say_what_they_are(tiny: MambaTrace) -> None:
    assert repr(tiny.blocks) == "3 blocks; model.blocks[0] lists the weights of one"


# -- places that are no values -------------------------------------------------------------------------------


def test_a_layer_is_not_assigned_by_number(tiny: MambaTrace) -> None:
    with pytest.raises(SiteValueError, match=r"layers\[1\]"), tiny.trace(IDS):
        tiny.layers[1] = torch.zeros(1)


def test_numpy_takes_no_place(tiny: MambaTrace) -> None:
    with pytest.raises(SiteValueError, match="make an array of"), tiny.trace(IDS):
        np.asarray(tiny.layers[1].ssm.y)


# -- models without an SSM -----------------------------------------------------------------------------------


def test_a_model_without_an_ssm_is_told_so(without_ssm: MambaTrace) -> None:
    calls: list[Any] = [
        lambda: hidden_attention(without_ssm, IDS, 0),
        lambda: means.mean_activation(without_ssm, IDS, "h"),
        lambda: without_ssm.hook("blocks.0.hook_y"),
    ]
    for call in calls:
        with pytest.raises((UnknownSiteError, LayerError)):
            call()
    with pytest.raises((UnknownSiteError, LayerError)), without_ssm.trace(IDS):
        flow.apply(without_ssm, [])
    with torch.no_grad(), without_ssm.trace(IDS):
        without_ssm.lm_head.output.save()
    assert list(without_ssm.last_run) == []


# -- modules -------------------------------------------------------------------------------------------------


def test_the_gated_norm_is_still_hugging_faces(tiny_hf: ModuleFactory) -> None:
    theirs, ours = tiny_hf(model_type="mamba2"), MambaTrace(tiny_hf(model_type="mamba2"))
    norm, other = theirs.backbone.layers[0].mixer.norm, ours.layers[0].ssm._module.norm
    x, gate = torch.randn(2, 3, 3, norm.weight.numel())[:2].unbind(0)
    agree(other(x, gate), norm(x, gate))
    agree(other(x), norm(x))


def test_hooks_of_accelerate_that_move_alone() -> None:
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook

    assert moves_alone(SequentialHook(AlignDevicesHook(), AlignDevicesHook()))
    assert not moves_alone(SequentialHook(AlignDevicesHook(), ModelHook()))


def test_a_scan_without_numba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu._broken.cache_clear()
    try:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert cpu.unavailable() == "it needs numba: pip install numba"
        cpu._broken.cache_clear()
        monkeypatch.undo()
        monkeypatch.setattr(cpu, "kernels_in", lambda module: 1 / 0)
        assert "numba does not work here (ZeroDivisionError" in str(cpu.unavailable())
    finally:
        monkeypatch.undo()
        cpu._broken.cache_clear()
    assert cpu.unavailable() is None


# -- grids and results ---------------------------------------------------------------------------------------


class Two:
    """Two metrics that are methods."""

    def first(self, logits: Tensor) -> Tensor:
        return logits[:, 1]

    def second(self, logits: Tensor) -> Tensor:
        return logits[:, 1] * 2


def weighed(logits: Tensor, weights: Any) -> Tensor:
    return sum(logits[:, token] for token in weights)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (lambda: Two().first, lambda: Two().first, lambda: Two().second),
        (
            lambda: functools.partial(weighed, weights={1, 2}),
            lambda: functools.partial(weighed, weights={2, 1}),
            lambda: functools.partial(weighed, weights={1, 3}),
        ),
        (
            lambda: functools.partial(weighed, weights=torch.tensor([1, 2])),
            lambda: functools.partial(weighed, weights=torch.tensor([1, 2])),
            lambda: functools.partial(weighed, weights=torch.tensor([1, 3])),
        ),
    ],
    ids=["method", "set", "tensor"],
)
def test_metrics_are_told_apart_by_what_they_hold(one: Any, same: Any, other: Any) -> None:
    assert mark_of_function(one()) == mark_of_function(same())
    assert mark_of_function(one()) != mark_of_function(other())


def test_a_heatmap_of_which_nothing_is_computed_says_so() -> None:
    heatmap = Heatmap(
        values=torch.full((2, 3), float("nan")), title="none", row_title="row", row_labels=["a", "b"],
        column_labels=["x", "y", "z"],
    )  # fmt: skip
    assert "none computed" in extremes(heatmap)


# -- names and checkpoints -----------------------------------------------------------------------------------


def test_a_name_that_is_no_string_of_python_is_no_name() -> None:
    with pytest.raises(UnknownSiteError, match=r"blocks\.\{i\.hook_y"):
        port_name("blocks.{i.hook_y")


def test_a_link_to_a_missing_file_is_named(tmp_path: Path) -> None:
    MambaTrace.demo().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to a file that is not there"):
        MambaTrace(str(tmp_path))


@pytest.mark.parametrize("chosen", [[1, 3], [False, True, False, True, False], torch.tensor([1, 3])], ids=str)
def test_positions_may_be_listed_or_marked(tiny: MambaTrace, chosen: Any) -> None:
    with torch.no_grad(), tiny.trace(IDS):
        tiny.layers[1].ssm.y.output[:, 1] = 0
        tiny.layers[1].ssm.y.output[:, 3] = 0
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(IDS):
        interventions.ablate(tiny.layers[1].ssm.y, positions=chosen)
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, expected)


# -- values without rows -------------------------------------------------------------------------------------


def test_an_invoke_may_skip_a_value_that_all_invokes_share(tiny: MambaTrace) -> None:
    """It then has the replacement for its own, as if it had assigned it."""
    A = -torch.rand(24, 5, generator=torch.Generator().manual_seed(0)) - 0.5

    def two_invokes(skips: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), tiny.trace() as tracer:
            with tracer.invoke(IDS):
                plain = tiny.lm_head.output.save()
            with tracer.invoke(IDS):
                if skips:
                    tiny.layers[1].ssm.A.skip(A)
                else:
                    tiny.layers[1].ssm.A.output = A
                replaced = tiny.lm_head.output.save()
        return plain, replaced

    (plain, replaced), expected = two_invokes(skips=True), two_invokes(skips=False)
    assert torch.equal(replaced, expected[1])
    assert torch.equal(plain, expected[0])
    with torch.no_grad(), tiny.trace(IDS):
        untouched = tiny.lm_head.output.save()
    agree(plain, untouched)
    assert (replaced - plain).abs().max() > 1e-3


def test_an_invoke_of_the_whole_batch_edits_a_shared_value_for_all(tiny: MambaTrace) -> None:
    with torch.no_grad(), tiny.trace() as tracer:
        with tracer.invoke(IDS):
            plain = tiny.lm_head.output.save()
        with tracer.invoke():
            tiny.layers[1].ssm.A.output = -torch.ones(24, 5)
    with torch.no_grad(), tiny.trace(IDS):
        tiny.layers[1].ssm.A.output = -torch.ones(24, 5)
        expected = tiny.lm_head.output.save()
    agree(plain, expected)


def test_a_tensor_of_eight_bits_is_assigned_in_the_dtype_of_the_value(tiny: MambaTrace) -> None:
    narrow = torch.randn(1, 5, 24).to(torch.float8_e4m3fn)
    logits = []
    for value in (narrow, narrow.float()):
        with torch.no_grad(), tiny.trace(IDS):
            tiny.layers[1].ssm.y.output = value
            logits.append(tiny.lm_head.output.save())
    assert torch.equal(*logits)
