"""On a model with something of the user's in it, a cell is what an ordinary trace of it gives."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, ModuleFactory
from grids import MINUS, OURS, PLUS, THEIRS, Interrupted
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.errors import FileError
from mamba_trace.patching import PatchGrid, attribution_grid, logit_diff, patch_grid
from mamba_trace.patching.changes import changes
from mamba_trace.patching.question import windows
from mamba_trace.sites import BY_NAME, STATE

#: Of these, one comes before the first position at which the prompts differ, and none is the last.
LOOKED_AT = [1, 4]
Row = range | list[None]


def spread(logits: Tensor) -> Tensor:  # [B,m,V]
    return logits[:, 0, PLUS] - 2 * logits[:, -1, MINUS]


METRICS = {"spread": spread, "first": lambda logits: logits[:, 0, 3]}


def source_values(model: MambaTrace, site: str) -> dict[int | None, Tensor]:
    """The site's value in each layer, by an ordinary trace on the source."""
    values: dict[int | None, Tensor] = {}
    layers = [None] if BY_NAME[site].scope == "model" else range(len(model.layers))
    with torch.no_grad(), model.trace(THEIRS, use_cache=False):
        for layer in layers:
            values[layer] = model.hook(BY_NAME[site].path(layer)).output.clone()
    return values


def traced(
    model: MambaTrace, site: str, row: Row, position: int, values: dict[int | None, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both metrics of one cell, by an ordinary trace on the prompt."""
    with torch.no_grad(), model.trace(OURS, use_cache=False):
        for layer in row:
            place = model.hook(BY_NAME[site].path(layer))
            if site == STATE:
                place[position].output = values[layer][:, position]
            else:
                place.output[:, position] = values[layer][:, position]
        logits = model.lm_head.output[:, LOOKED_AT].clone().save()
    return spread(logits)[0], logits[0, 0, 3]


def check(model: MambaTrace, site: str, window: int = 1) -> dict[str, PatchGrid]:
    """Make a grid, and compare every cell of it."""
    grids = patch_grid(model, OURS, THEIRS, site, METRICS, metric_positions=LOOKED_AT, window=window, progress=False)
    rows: list[Row] = list(windows(len(model.layers), window))
    rows = [[None]] if BY_NAME[site].scope == "model" else rows
    values = source_values(model, site)
    cells = [torch.stack(traced(model, site, row, position, values)) for row in rows for position in range(6)]
    expected = torch.stack(cells).unflatten(0, (len(rows), 6))
    for number, name in enumerate(METRICS):
        torch.testing.assert_close(grids[name].values, expected[..., number], rtol=1e-9, atol=1e-9)
    return grids


# -- what a user may have done -----------------------------------------------------------------------------


def edit_at(place: str, edit: Callable[[Tensor], Tensor]) -> Callable[[MambaTrace], None]:
    """A lasting edit of one place."""

    def change(model: MambaTrace) -> None:
        with model.edit(inplace=True):
            model.hook(place).output = edit(model.hook(place).output)

    return change


def one_position(value: Tensor) -> Tensor:
    return torch.cat((value[:, :3], torch.full_like(value[:, 3:4], 0.3), value[:, 4:]), dim=1)


def centred(value: Tensor) -> Tensor:
    return value - value.mean(1, keepdim=True)


def rows_matter(value: Tensor) -> Tensor:
    return value - 0.5 * value.mean(0, keepdim=True) + value.shape[0] + value.shape[1]


def turned(value: Tensor) -> Tensor:
    return value + 0.5 * value.flip(1)


def hooked(model: MambaTrace) -> None:
    model._module.backbone.layers[1].register_forward_hook(lambda module, args, out: one_position(out))


def hooked_before(model: MambaTrace) -> None:
    model._module.backbone.norm_f.register_forward_pre_hook(lambda module, args: (turned(args[0]),))


def another_forward(model: MambaTrace) -> None:
    norm = model._module.backbone.layers[1].norm
    forward = norm.forward
    norm.forward = types.MethodType(lambda self, value: centred(forward(value)), norm)


class Mixing(nn.Module):
    """A linear layer of the user's own, which looks at all positions."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, value: Tensor) -> Tensor:
        return centred(self.linear(value))


def another_module(model: MambaTrace) -> None:
    mixer = model._module.backbone.layers[1].mixer
    mixer.out_proj = Mixing(mixer.out_proj)


CHANGES = {
    "a position of a layer": edit_at("layers[1].resid_post", one_position),
    "all positions of the first layer": edit_at("layers[0].resid_pre", centred),
    "a state": edit_at("layers[1].ssm.h[2]", lambda h: 0 * h + 0.3),
    "rows": edit_at("layers[1].ssm.y", rows_matter),
    "logits": edit_at("lm_head", turned),
    "the final norm": edit_at("norm_f", turned),
    "embeddings": edit_at("embeddings", centred),
    "a hook": hooked,
    "a hook before": hooked_before,
    "a forward": another_forward,
    "a module": another_module,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cell_is_what_an_ordinary_trace_gives(exact: MambaTrace, name: str) -> None:
    """Cells before the first difference of the prompts and behind all that is looked at included."""
    plain = patch_grid(exact, OURS, THEIRS, "resid_pre", METRICS, metric_positions=LOOKED_AT, progress=False)
    CHANGES[name](exact)
    for site, window in (("resid_pre", 1), ("h", 2)):
        grids = check(exact, site, window)
    changed = patch_grid(exact, OURS, THEIRS, "resid_pre", METRICS, metric_positions=LOOKED_AT, progress=False)
    assert (changed["spread"].values - plain["spread"].values).abs().max() > 1e-3
    assert grids["first"].plan.startswith("each cell in a forward of its own, over the whole prompt and from")


@pytest.mark.parametrize("site", ["conv", "B_bar", "norm", "embeddings", "norm_f", "lm_head"])
def test_every_kind_of_site_is_patched(exact: MambaTrace, site: str) -> None:
    CHANGES["logits"](exact)
    CHANGES["all positions of the first layer"](exact)
    check(exact, site)


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("falcon_mamba", "h"), ("mamba2", "h"), ("mamba2", "B_in"), ("mamba2", "write"), ("mamba2", "inner_norm")],
)
@pytest.mark.parametrize("name", ["a state", "all positions of the first layer"])
def test_every_architecture_runs_whole(tiny_hf: ModuleFactory, model_type: str, site: str, name: str) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type, dtype=torch.float64))
    CHANGES[name](model)
    grids = check(model, site, window=2)
    assert grids["first"].plan.startswith("each cell in a forward of its own")


def test_a_hook_on_all_modules_is_one(exact: MambaTrace) -> None:
    norms = exact._module.backbone.layers[1].norm

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return one_position(out) if module is norms else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        grids = check(exact, "resid_pre")
    finally:
        handle.remove()
    assert "a PyTorch hook on all modules" in grids["first"].plan


def test_an_edited_copy_is_edited_and_the_original_is_not(exact: MambaTrace) -> None:
    plain = patch_grid(exact, OURS, THEIRS, "h", logit_diff(exact, PLUS, MINUS), progress=False)
    with exact.edit() as (_, edited):
        edited.layers[1].resid_post.output[:, 3] = 0.3
    check(edited, "h")
    again = patch_grid(exact, OURS, THEIRS, "h", logit_diff(exact, PLUS, MINUS), progress=False)
    assert torch.equal(again.values, plain.values)
    assert again.plan == plain.plan == "each cell from its layer and its position on, as a row of a batch"
    last = patch_grid(exact, OURS, THEIRS, "lm_head", logit_diff(exact, PLUS, MINUS), progress=False)
    assert last.plan.startswith("no cell in a forward of its own")


def test_the_plan_says_why_and_is_shown_before_it_runs(
    tiny: MambaTrace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hooked(tiny)
    CHANGES["a state"](tiny)
    grid = patch_grid(tiny, OURS, THEIRS, "h", logit_diff(tiny, PLUS, MINUS))
    assert "as the model has a lasting edit (model.edit) and 1 more changes" in grid.plan
    shown = capsys.readouterr()
    assert f"patching h: {grid.plan}" in shown.err
    assert "18/18" in shown.err
    assert not shown.out
    assert PatchGrid.load(grid.save(tmp_path / "grid.json")).plan == grid.plan


def test_layers_in_another_order_run_whole(tiny_hf: ModuleFactory) -> None:
    """A pruned model, whose mixers have the numbers that they had."""
    module = tiny_hf(dtype=torch.float64)
    del module.backbone.layers[1]
    module.config.num_hidden_layers = 2
    grids = check(MambaTrace(module), "h")
    assert "another order of the layers" in grids["first"].plan


# -- what is known to look at one position of one row ------------------------------------------------------


def adapted(module: nn.Module, **options: Any) -> MambaTrace:
    targets = ["in_proj", "x_proj", "embeddings"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=targets, init_lora_weights=False, r=2, **options)
        inject_adapter_in_model(config, module)
    return MambaTrace(module.eval())


@pytest.mark.parametrize("model_type", TINY)
def test_an_adapted_model_is_swept_as_a_plain_one(tiny_hf: ModuleFactory, model_type: str) -> None:
    model = adapted(tiny_hf(model_type=model_type, dtype=torch.float64))
    assert changes(model) == []
    grids = check(model, "h", window=2)
    assert grids["first"].plan.startswith("each cell from its layer and its position on")
    assert changes(adapted(tiny_hf(model_type=model_type), use_dora=True)) != []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "a PyTorch hook on backbone.layers.1"),
        (another_forward, "another forward of backbone.layers.1.norm"),
        (another_module, "a Mixing as backbone.layers.1.mixer.out_proj"),
        (CHANGES["a state"], "a lasting edit (model.edit)"),
    ],
    ids=["hook", "forward", "module", "edit"],
)
def test_changes_are_named(tiny: MambaTrace, change: Callable[[MambaTrace], None], said: str) -> None:
    assert changes(tiny) == []
    change(tiny)
    assert [one.what for one in changes(tiny)] == [said]


INNER = {
    "falcon_mamba": ["dt_layernorm", "b_layernorm", "c_layernorm", "x_proj", "conv1d", "act"],
    "mamba2": ["norm", "in_proj", "conv1d", "act"],
}


@pytest.mark.parametrize(("model_type", "inner"), [(kind, inner) for kind in INNER for inner in INNER[kind]])
def test_inner_modules_of_every_architecture_are_plain_until_they_are_changed(
    tiny_hf: ModuleFactory, model_type: str, inner: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type))
    assert changes(model) == []
    mixer, name = model._module.backbone.layers[1].mixer, f"backbone.layers.1.mixer.{inner}"
    handle = getattr(mixer, inner).register_forward_hook(lambda module, args, out: None)
    assert [one.what for one in changes(model)] == [f"a PyTorch hook on {name}"]
    handle.remove()
    assert changes(model) == []
    setattr(mixer, inner, Mixing(getattr(mixer, inner)))
    assert [one.what for one in changes(model)] == [f"a Mixing as {name}"]


@pytest.mark.parametrize("model_type", TINY)
def test_a_convolution_that_looks_further_is_a_change(tiny_hf: ModuleFactory, model_type: str) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type))
    mixer = model._module.backbone.layers[1].mixer
    channels = mixer.conv1d.in_channels
    mixer.conv1d = nn.Conv1d(channels, channels, 5, padding=4, groups=channels)
    assert [one.what for one in changes(model)] == ["a Conv1d as backbone.layers.1.mixer.conv1d"]


def test_a_weight_that_computes_is_a_change(tiny: MambaTrace) -> None:
    class Scaled(nn.Parameter):
        pass

    norm = tiny._module.backbone.layers[1].norm
    norm.weight = Scaled(norm.weight.data)
    assert [one.what for one in changes(tiny)] == ["a Scaled as a weight of backbone.layers.1.norm"]


# -- folders -----------------------------------------------------------------------------------------------


def clamped(model: MambaTrace, at: float) -> None:
    """An edit that the unpatched runs never feel, so that their metrics cannot tell it."""
    with model.edit(inplace=True):
        model.layers[2].resid_post.output.clamp_(-at, at)


def test_a_folder_of_one_model_is_none_of_its_edited_one(tiny: MambaTrace, tmp_path: Path) -> None:
    def grid() -> PatchGrid:
        metric = logit_diff(tiny, PLUS, MINUS)
        return patch_grid(tiny, OURS, THEIRS, "h", metric, keep=tmp_path, progress=False)

    grid()
    clamped(tiny, 1e9)
    with pytest.raises(FileError, match="its changes is"):
        grid()


def test_an_edited_grid_goes_on_where_it_was_interrupted(tiny: MambaTrace, tmp_path: Path) -> None:
    metric = logit_diff(tiny, PLUS, MINUS)

    def grid(metric: Any) -> PatchGrid:
        return patch_grid(tiny, OURS, THEIRS, "h", {"m": metric}, keep=tmp_path, progress=False)["m"]

    clamped(tiny, 1e9)
    with pytest.raises(KeyboardInterrupt) as caught:
        grid(Interrupted(metric, after=1 + 7))
    assert "7 of 18 cells are kept" in caught.value.__notes__[0]
    tiny.clear_edits()
    clamped(tiny, 1e9)  # as in the next process
    again = Interrupted(metric, after=1 + 11)
    values = grid(again).values
    assert again.asked == again.after
    assert torch.equal(values, patch_grid(tiny, OURS, THEIRS, "h", metric, keep=tmp_path / "2", progress=False).values)
    tiny.clear_edits()
    clamped(tiny, 1e8)
    with pytest.raises(FileError, match="its changes is"):
        grid(metric)


# -- to first order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_pre", "h", "embeddings"])
@pytest.mark.parametrize("name", ["all positions of the first layer", "a hook", "embeddings"])
def test_an_estimate_is_what_gradients_of_an_ordinary_trace_say(exact: MambaTrace, name: str, site: str) -> None:
    CHANGES[name](exact)
    got = attribution_grid(exact, OURS, THEIRS, site, spread, metric_positions=LOOKED_AT)
    source, expected = source_values(exact, site), torch.zeros_like(got.values)
    for row, layer in enumerate(source):
        for position in range(6):
            place = exact.hook(BY_NAME[site].path(layer))
            place = place[position] if site == STATE else place
            with exact.trace(OURS, use_cache=False):
                root = place.output.detach().clone().requires_grad_().save()
                place.output = root
                logits = exact.lm_head.output[:, LOOKED_AT].save()
            (gradient,) = torch.autograd.grad(spread(logits).sum(), root)
            change = source[layer][:, position] - (root if site == STATE else root[:, position])
            slope = gradient if site == STATE else gradient[:, position]
            expected[row, position] = got.prompt_metric + (change * slope).sum().detach()
    torch.testing.assert_close(got.values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("site", ["resid_post", "h"])
def test_an_estimate_behind_a_detaching_edit_is_that_of_the_model(
    tiny_hf: ModuleFactory, site: str, trainable: bool
) -> None:
    """What comes behind has its gradient, though none of it reaches the embeddings."""
    model = MambaTrace(tiny_hf(dtype=torch.float64).requires_grad_(trainable))
    metric = logit_diff(model, PLUS, MINUS)
    plain = attribution_grid(model, OURS, THEIRS, site, metric)
    with model.edit(inplace=True):
        model.layers[1].resid_post.output = model.layers[1].resid_post.output.detach()
    cut = attribution_grid(model, OURS, THEIRS, site, metric)
    first = 1 if site == "resid_post" else 2
    torch.testing.assert_close(cut.values[first:], plain.values[first:], rtol=1e-12, atol=1e-12)
    assert (cut.values[first:] != cut.prompt_metric).any()
    assert (cut.values[:first] == cut.prompt_metric).all()


# -- on a server -------------------------------------------------------------------------------------------


def test_the_round_trip_of_a_request_keeps_edits(tmp_path: Path, tiny_hf: ModuleFactory) -> None:
    tiny_hf(dtype=torch.float64).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer"):
        model = MambaTrace(str(tmp_path), dispatch=True, dtype=torch.float64)
    CHANGES["all positions of the first layer"](model)
    metric = logit_diff(model, PLUS, MINUS)
    here = patch_grid(model, OURS, THEIRS, "h", metric, progress=False)
    there = patch_grid(model, OURS, THEIRS, "h", metric, remote="local")
    assert torch.equal(there.values, here.values)
    assert there.plan == here.plan
