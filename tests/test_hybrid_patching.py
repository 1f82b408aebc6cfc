"""Grids over mixed layers: rows are the layers that have the site, and each cell is what its own trace gives."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import MINUS, OURS, PLUS, THEIRS, Interrupted
from hybrid_models import HYBRIDS, make_hybrid
from rich.console import Console
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT as TEXT
from mamba_trace.cli import SOURCE as OTHER_TEXT
from mamba_trace.errors import FileError, LayerError, MetricError, PositionError, UnknownSiteError
from mamba_trace.modeling.architectures import BY_TYPE
from mamba_trace.modeling.attention import HookableAttention
from mamba_trace.patching import PatchGrid, attribution_grid, logit_diff, patch_grid
from mamba_trace.patching.changes import changes
from mamba_trace.patching.command import PatchCommand
from mamba_trace.patching.grid import asked
from mamba_trace.patching.plan import Limits, Plan
from mamba_trace.patching.question import positional
from mamba_trace.results.page import Report
from mamba_trace.sites import BY_NAME, STATE

#: The kinds whose architecture the package has.
KINDS = [kind for kind in HYBRIDS if HYBRIDS[kind]["model_type"] in BY_TYPE]
#: One kind of each architecture, with all its kinds of layers.
PLAIN_KINDS = [kind for kind in KINDS if "," not in kind]
#: How cells of a plain model run.
IN_BATCHES = "each cell from its layer and its position on, as a row of a batch"
Row = list[int | None]


@functools.cache
def made(kind: str) -> MambaTrace:
    """The model of a kind in float64, made once for all tests, none of which may change it."""
    return MambaTrace(make_hybrid(kind, dtype=torch.float64))


def rows_of(model: MambaTrace, site: str, window: range = range(1)) -> list[Row]:
    """The layers that each row patches, by what the model offers and not by what the grid knows of it."""
    if BY_NAME[site].scope == "model":
        return [[None]]
    there = []
    for layer in range(len(model.layers)):
        try:
            model.hook(BY_NAME[site].path(layer))
        except UnknownSiteError:
            continue
        there.append(layer)
    return [[layer + offset for offset in window if layer + offset in there] for layer in there]


def difference(logits: Tensor) -> Tensor:
    return logits[..., -1, PLUS] - logits[..., -1, MINUS]


def by_hand(model: MambaTrace, site: str, rows: list[Row], measure: Callable[[Tensor], Tensor] = difference) -> Tensor:
    """The grid from one ordinary trace, each row of whose batch is the whole prompt and has its own cell patched."""
    length, layers = OURS.shape[1], sorted({layer for row in rows for layer in row}, key=lambda layer: layer or 0)
    values: dict[int | None, Tensor] = {}
    with torch.no_grad(), model.trace(THEIRS, use_cache=False):
        for layer in layers:
            values[layer] = model.hook(BY_NAME[site].path(layer)).output[0].clone()
    with torch.no_grad(), model.trace(OURS.repeat(len(rows) * length, 1), use_cache=False) as tracer:
        for layer in layers:
            place = model.hook(BY_NAME[site].path(layer))
            for position in range(length):
                cells = [number * length + position for number, row in enumerate(rows) if layer in row]
                if site == STATE:
                    place[position].output[cells] = values[layer][position]
                else:
                    place.output[cells, position] = values[layer][position]
        logits = model.hook("logits").output.save()
        result = tracer.result.save()
    # What the model itself returns, which Nemotron-H rounds to float32.
    torch.testing.assert_close(result.logits.double(), logits.double(), rtol=1e-6, atol=1e-6)
    return measure(logits).unflatten(0, (len(rows), length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def grid_of(model: MambaTrace, site: str, **arguments: Any) -> Any:
    arguments.setdefault("metric", logit_diff(model, PLUS, MINUS))
    return patch_grid(model, OURS, THEIRS, site, progress=False, **arguments)


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any trace fails the test."""
    monkeypatch.setattr(MambaTrace, "trace", None)


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_every_cell_of_every_site_is_its_own_trace(kind: str) -> None:
    model = made(kind)
    assert changes(model) == []
    for site in positional(model._layout):
        got, rows = grid_of(model, site, batch_size=4), rows_of(model, site)
        assert got.layers == [layer for (layer,) in rows if layer is not None], site
        assert got.row_labels == ([site] if rows == [[None]] else [str(layer) for layer in got.layers])
        expected = by_hand(model, site, rows)
        close(got.values, expected)
        assert ((expected - got.prompt_metric).abs().amax(1) > 1e-6).all(), "no row is without effect"
        late = BY_NAME[site].scope == "model" and site != "embeddings"
        # A shared transformer reads the embeddings in every layer that has it.
        alone = site == "embeddings" and "shared_out" in positional(model._layout)
        how = "each cell in a forward of its own" if alone else IN_BATCHES
        assert got.plan.startswith("no cell in a forward of its own" if late and not alone else how)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_of_every_variant_start_from_what_was_before_them(kind: str) -> None:
    """Also with so little memory that states are made for a position at a time, and that each cell runs alone."""
    model = made(kind)
    sites: dict[str, list[dict[str, Any]]] = {"h": [{}, {"memory": 1}], "k": [{"batch_size": 7, "memory": 50_000}]}
    for site, limits in (sites | {"conv": [{}], "resid_pre": [{"memory": 50_000}]}).items():
        if site in positional(model._layout):
            expected = by_hand(model, site, rows_of(model, site))
            for limit in limits:
                close(grid_of(model, site, **limit).values, expected)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize(("window", "offsets"), [(2, range(0, 2)), (3, range(-1, 2))])
def test_a_window_counts_layers_of_the_model(kind: str, window: int, offsets: range) -> None:
    model = made(kind)
    for site in ("resid_mid", "resid_post", "h", "B", "v", "mlp_out"):
        if site not in positional(model._layout):
            continue
        got, rows = grid_of(model, site, window=window), rows_of(model, site, offsets)
        close(got.values, by_hand(model, site, rows))
        assert f"patches {site} in those of {window} layers of the model that have it" in got.caption()


def test_a_window_leaves_out_the_layers_without_the_site() -> None:
    """In a Nemotron-H they lie between its two layers with an SSM, and between those with an MLP."""
    model = made("nemotron_h")
    assert model.ssm_layers == [0, 4]
    alone = grid_of(model, "h").values
    for window in (2, 3, 4):  # too few layers for both
        assert torch.equal(grid_of(model, "h", window=window).values, alone)
    rows = [[1, 3], [1, 3]]
    close(grid_of(model, "mlp_out", window=5).values, by_hand(model, "mlp_out", rows))
    assert (grid_of(model, "h", window=5).values - alone).abs().max() == 0  # two to either side
    with_edit = MambaTrace(make_hybrid("nemotron_h", dtype=torch.float64))
    with with_edit.edit(inplace=True):
        with_edit.layers[2].attn_out.output[:] *= 1
    whole = grid_of(with_edit, "mlp_out", window=5)
    assert whole.plan.startswith("each cell in a forward of its own")
    close(whole.values, by_hand(model, "mlp_out", rows))


@pytest.mark.parametrize("kind", ["granitemoehybrid", "falcon_h1"])
@pytest.mark.parametrize("site", ["resid_pre", "k", "h", "lm_head", "norm_f", "logits", "embeddings"])
def test_metrics_see_the_logits_that_the_model_returns(kind: str, site: str) -> None:
    """At positions of which some come before a patch and one after it."""
    model, shapes = made(kind), set()

    def spread(logits: Tensor) -> Tensor:  # [B,3,V]
        shapes.add(logits.shape[1:])
        return logits[:, 0, PLUS] - 2 * logits[:, 1, MINUS] + logits[:, 2, 1]

    got = grid_of(model, site, metric=spread, metric_positions=[-2, 1, 3])
    expected = by_hand(model, site, rows_of(model, site), lambda at: at[:, 1, PLUS] - 2 * at[:, 3, MINUS] + at[:, 4, 1])
    close(got.values, expected, 1e-9)
    assert shapes == {(3, 31)}
    with torch.no_grad():
        whole = spread(model._module(OURS).logits[:, [1, 3, 4]])
    assert got.prompt_metric == pytest.approx(float(whole), rel=1e-9)


@pytest.mark.parametrize("kind", ["nemotron_h", "falcon_h1", "granitemoehybrid", "bamba"])
def test_eager_attention_gives_the_same_grid(kind: str) -> None:
    model = MambaTrace(make_hybrid(kind, dtype=torch.float64, attn_implementation="eager"))
    for site in ("q", "h"):
        close(grid_of(model, site, memory=50_000).values, by_hand(model, site, rows_of(model, site)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no experts" in kind or "dense" in kind or "_h1" in kind])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_cells_in_the_dtype_of_the_model(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Without experts, of which rounding may choose others where two are about as good."""
    model = MambaTrace(make_hybrid(kind, dtype=dtype))
    for site in ("k", "resid_pre"):
        expected = by_hand(model, site, rows_of(model, site)).float()
        got = grid_of(model, site).values
        assert (got - expected).abs().max() < tolerance * expected.abs().max()


# -- what runs ---------------------------------------------------------------------------------------------


def test_attention_runs_a_cell_from_its_layer_and_position_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    by_function = HookableAttention.by_function

    def noted(self: HookableAttention, q: Tensor, k: Tensor, *args: Any) -> Any:
        shapes.append((*q.shape[::2], k.shape[2]))  # B, L, S
        return by_function(self, q, k, *args)

    monkeypatch.setattr(HookableAttention, "by_function", noted)
    grid_of(made("nemotron_h"), "resid_post")
    unpatched, patched, *after = shapes
    assert unpatched == (2, 6, 6)
    assert patched == (4, 4, 5 + 4), "phase 1: a row for each of the positions 2 to 5, up to the end"
    assert after == [(2, 6 - position, 6) for position in range(2, 6)], "phase 2: the two rows below, and no padding"
    shapes.clear()
    grid_of(made("nemotron_h"), "resid_post", batch_size=5)  # a forward for each position: five rows
    assert shapes == [unpatched, *[(rows, 6 - position, 6) for position in range(2, 6) for rows in (1, 2)]]


def test_layers_without_an_ssm_keep_no_states() -> None:
    model = made("nemotron_h")
    n_states = 12 * 4 * 5 * 8

    def short(site: str, memory: int) -> bool:
        question = asked("patch_grid", model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), -1, 1)
        return Plan.of(model, question, Limits(None, memory)).short

    of_states = 6 * n_states  # of one layer, at every position
    of_two = (2 * 2 + 4 * 2) * of_states  # two layers keep states and values, and one makes them
    assert short("h", of_two)
    assert not short("h", of_two - 1)
    two_states, values = (2 + 4) * of_states, 2 * 6 * 24 * 8  # two more layers keep values
    assert not short("mlp_out", two_states + values - 1)
    assert short("mlp_out", two_states + values)


# -- to first order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_an_estimate_is_what_gradients_of_an_ordinary_trace_say(kind: str, steps: int) -> None:
    model = made(kind)
    ends = []
    for tokens in (OURS, THEIRS):
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            ends.append(model.embeddings.output.clone().save())
    for site in ("resid_pre", "h", "v", "router", "mlp_out", "norm_2", "embeddings", "logits"):
        if site not in positional(model._layout):
            continue
        got = attribution_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), steps=steps)
        rows = [layer for (layer,) in rows_of(model, site)]
        assert got.layers == [layer for layer in rows if layer is not None]
        slopes = torch.stack([first_order(model, site, layer, ends, steps) for layer in rows])
        close(got.values, got.prompt_metric + slopes, 1e-9)
        assert slopes.abs().max() > 1e-6


def first_order(model: MambaTrace, site: str, layer: int | None, ends: list[Tensor], steps: int) -> Tensor:
    """What a patch of one layer adds to first order at each position [L], by a trace for each step."""
    path, found = BY_NAME[site].path(layer), []
    for tokens in (OURS, THEIRS):
        with torch.no_grad(), model.trace(tokens, use_cache=False):
            found.append(model.hook(path).output[0].clone().save())
    total = torch.zeros(OURS.shape[1], dtype=torch.float64)
    places = range(OURS.shape[1]) if site == STATE else [None]
    for step in range(steps):
        start = ends[0] if steps == 1 else torch.lerp(*ends, (step + 0.5) / steps)
        for position in places:
            with model.trace(OURS, use_cache=False):
                model.embeddings.output = start.clone()
                place = model.hook(path) if position is None else model.hook(path)[position]
                root = place.output.detach().clone().requires_grad_().save()
                place.output = root
                logits = model.hook("logits").output.save()
            (gradient,) = torch.autograd.grad(difference(logits).sum(), root)
            at = slice(None) if position is None else slice(position, position + 1)
            change = (found[1] - found[0])[at]
            total[at] += (gradient.reshape(change.shape) * change).flatten(1).sum(1)
    return total / steps


# -- which rows --------------------------------------------------------------------------------------------


def test_layers_choose_the_rows() -> None:
    model = made("jamba")
    both = grid_of(model, "h"), attribution_grid(model, OURS, THEIRS, "h", logit_diff(model, PLUS, MINUS))
    assert both[0].layers == [0, 2, 3]
    some = grid_of(model, "h", layers=[-1, 0])
    assert (some.layers, some.row_labels) == ([0, 3], ["0", "3"])
    close(some.values, both[0].values[[0, 2]], 1e-12)
    one = attribution_grid(model, OURS, THEIRS, "h", logit_diff(model, PLUS, MINUS), layers=2)
    close(one.values, both[1].values[1:2], 1e-12)
    window = grid_of(model, "h", layers=2, window=2)  # of layers that are no rows, too
    close(window.values, by_hand(model, "h", [[2, 3]]))


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("make", [patch_grid, attribution_grid])
def test_what_is_not_there_is_refused_before_anything_runs(make: Callable[..., Any]) -> None:
    def message(kind: type[Exception], name: str, site: str, **arguments: Any) -> str:
        model = made(name)
        with pytest.raises(kind) as caught:
            make(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), **arguments)
        return str(caught.value)

    said = message(UnknownSiteError, "jamba", "h", layers=[0, 1])
    assert said == (
        "layers=[0, 1]: layers[1] is attention and has no ssm; these have one: 0, 2, 3. model.ssm_layers lists them"
    )
    assert "layers[2] is SSM and has no attn; these have one: 1" in message(UnknownSiteError, "bamba", "q", layers=2)
    assert "layers=7: this model has layers 0 to 3" in message(LayerError, "jamba", "h", layers=7)
    assert "logits belongs to the model" in message(LayerError, "falcon_h1", "logits", layers=[0])
    said = message(PositionError, "jamba", "attn.pattern")
    assert "pattern [B batch, Q query heads, L positions, S attended positions] belongs to two positions" in said
    said = message(UnknownSiteError, "granitemoehybrid, no SSM", "h")
    assert "'h': no layer of this model has a place of that name. There are embeddings, resid_pre, " in said
    said = message(UnknownSiteError, "jamba", "B_in")
    assert "'B_in': no layer of this model has a place of that name: it is a site of Mamba-2. There are" in said
    assert "did you mean resid_mid" in message(UnknownSiteError, "jamba", "resid_midd")


def test_sites_have_the_names_that_models_give_them() -> None:
    model = made("nemotron_h")
    for name, same in (("attn.q", "q"), ("moe.router", "router"), ("ssm.h", "h"), ("attn.hook_z", "z")):
        assert grid_of(model, name).site == same
    assert torch.equal(grid_of(model, "ssm_out").values, grid_of(model, "out_proj").values)
    assert grid_of(model, "logits").site == grid_of(model, "hook_logits").site == "lm_head"
    assert grid_of(made("falcon_h1"), "hook_logits").site == "logits"
    assert grid_of(made("falcon_h1"), "ssm_out").site == "ssm_out"


# -- what comes back ---------------------------------------------------------------------------------------


def test_files_pictures_and_pages_name_the_layers(tmp_path: Path) -> None:
    grid = grid_of(made("jamba"), "h")
    for name in ("grid.json", "grid.safetensors"):
        loaded = PatchGrid.load(grid.save(tmp_path / name))
        assert (loaded.layers, loaded.row_labels) == ([0, 2, 3], ["0", "2", "3"])
        assert torch.equal(loaded.values, grid.values)
    old = json.loads((tmp_path / "grid.json").read_text())
    del old["layers"]  # as files were before
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert PatchGrid.load(tmp_path / "old.json").layers == [0, 2, 3]
    assert grid.caption().endswith("; rows are the layers 0, 2, 3")
    figure = grid.figure()
    assert figure.layout.yaxis.labelalias == {"0": "0", "1": "2", "2": "3"}
    assert "layer 2\n" in grid.heatmap().hover_texts()[1][0]
    page = Report({"h": grid}).save(tmp_path / "page.html").read_text()
    assert "rows are the layers 0, 2, 3" in page
    assert figure.data[0].text[2][0].startswith("layer 3<br>")
    whole = grid_of(made("jamba"), "resid_pre")
    assert "layers" not in whole.caption()
    assert grid_of(made("jamba"), "embeddings").layers == []


def test_grids_of_other_layers_are_not_compared() -> None:
    model = made("jamba")
    one, other = (grid_of(model, "h", layers=layers) for layers in ([0, 2], [0, 3]))
    with pytest.raises(MetricError, match=r"layers is \[0, 2\] in one and \[0, 3\] in the other"):
        one.correlation(other)
    assert dataclasses.replace(one, method="attribution").correlation(one) == pytest.approx(1)


def test_what_is_done_outlives_an_interrupt_and_belongs_to_its_rows_and_its_model(tmp_path: Path) -> None:
    model, folder = made("falcon_h1"), tmp_path / "kept"
    metric = logit_diff(model, PLUS, MINUS)
    whole = grid_of(model, "k", metric=Interrupted(metric), batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        grid_of(model, "k", metric={"m": Interrupted(metric, after=3)}, batch_size=3, keep=folder)
    again = Interrupted(metric, after=1 + 4 - 2)  # the unpatched runs, and what is left
    grid = grid_of(model, "k", metric={"m": again}, batch_size=3, keep=folder)["m"]
    assert again.asked == again.after
    assert torch.equal(grid.values, whole.values)
    with pytest.raises(FileError, match=r"its layers is None, and this one's \[0, 2\]"):
        grid_of(model, "k", metric={"m": metric}, keep=folder, layers=[0, 2])
    changed = MambaTrace(make_hybrid("falcon_h1", dtype=torch.float64, key_multiplier=1.25))
    with pytest.raises(FileError, match="holds the cells of another grid"):
        grid_of(changed, "k", metric={"m": metric}, keep=folder)


def test_the_command_names_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = MambaTrace.demo().tokenizer
    model = MambaTrace(make_hybrid("nemotron_h", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    options = {"window": 1, "batch_size": None, "keep": tmp_path, "progress": False}
    command = PatchCommand("tiny", TEXT, OTHER_TEXT, ["h", "attn.q", "hook_mlp_out"], True, None, options)
    grids = command.grids(model, logit_diff(model, " Emma", " Shelby"))
    described = json.loads(command.as_json(grids))["grids"]
    assert [grid["layers"] for grid in described[::2]] == [[0, 4], [2], [1, 3]]
    assert [grid["rows"] for grid in described[1::2]] == [["0", "4"], ["2"], ["1", "3"]]
    command.print(grids, Console(width=120))
    shown = capsys.readouterr().out
    assert "layer 4 " in shown
    assert "correlation with patching" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h", "mlp_out", "q"]
    with pytest.raises(UnknownSiteError, match="'resid_mid': no layer of this model"):
        PatchCommand("tiny", TEXT, OTHER_TEXT, ["h", "resid_mid"], False, None, options).grids(model, min)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_hidden_states_that_were_recorded_change_no_plan(kind: str) -> None:
    """transformers leaves its hooks on the blocks, which only look."""
    model, tokens = MambaTrace(make_hybrid(kind)), torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        assert model._module(tokens, output_hidden_states=True, output_attentions=True).hidden_states is not None
    grid = patch_grid(model, tokens, tokens.flip(1), "resid_pre", lambda logits: logits[:, 3], progress=False)
    assert str(grid.plan) == IN_BATCHES
