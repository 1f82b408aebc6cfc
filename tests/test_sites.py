"""Every row of the site table, read and edited as a user would, against the independent `reference`.

`by_hand` gives the reference's values.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from by_hand import Edit, by_hand, change, same
from conftest import MODEL_TYPES, agree, has, make_hf
from hybrid_models import PLAIN, make_hybrid
from torch import Tensor

import mamba_trace
from mamba_trace import MambaTrace, names
from mamba_trace.errors import SiteValueError
from mamba_trace.modeling.architectures import ARCHITECTURES, axis_sizes
from mamba_trace.sites import BY_NAME, FAMILY_MODELS, SITES, rows, site_named, walk

N_LAYERS = 3

#: Every site of the first layer and of the model by the path users write; the state at both ends and inside.
SITE_PATHS = [site.path(0) for site in SITES if not site.part]
POSITIONS = ["layers[0].ssm.h[0]", "layers[0].ssm.h[3]", "layers[0].ssm.h[-1]", "layers[0].ssm.h[-5]"]
PATHS = SITE_PATHS + POSITIONS
LAST_LAYER = [site.path(2) for site in SITES if site.scope != "model" and not site.part] + ["layers[2].ssm.h[2]"]
#: Inner modules whose output is no site.
NATIVE = [f"layers[0].ssm.{name}" for name in ("in_proj", "conv1d", "x_proj", "dt_proj")]


def each(names: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize over the models and the paths, or tuples with paths, that each of them has."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    having = [(t, *row) for t in MODEL_TYPES for row in rows if all(has(t, str(path)) for path in row)]
    return pytest.mark.parametrize(("model_type", *names.split()), having, indirect=["model_type"])


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(model_type):
    """One model for every test here: nothing a trace does may outlive it."""
    return MambaTrace(make_hf(model_type=model_type))


@pytest.fixture(scope="module")
def hf(model_type):
    """The same weights in Hugging Face's own module, in float64."""
    return make_hf(model_type=model_type).double()


def logits_of(model: MambaTrace, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model._module(tokens).logits


# -- reading -----------------------------------------------------------------------------------------------


@each("path", PATHS + LAST_LAYER)
def test_every_site_has_its_value_and_reading_it_changes_nothing(tiny, hf, tokens, path):
    expected = by_hand(hf, tokens)
    before = logits_of(tiny, tokens)
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        value = place.output.save()
        logits = tiny.lm_head.output.save()
    same(value, expected[path])
    agree(logits, before)


@each("path", SITE_PATHS)
def test_shapes_are_those_of_the_table(tiny, tokens, path):
    sizes = axis_sizes(tiny._module) | {"B": tokens.shape[0], "L": tokens.shape[1]}
    place = tiny.hook(path)
    with tiny.trace(tokens):
        value = place.output.save()
    axes = BY_NAME[path.rsplit(".", 1)[-1]].axes_in(tiny.architecture.family)
    assert value.shape == tuple(sizes[axis] for axis in axes)
    assert place._axes == axes
    assert value.dtype == torch.float32


def test_every_site_at_once_in_execution_order(tiny, hf, tokens):
    expected = by_hand(hf, tokens)
    with torch.no_grad(), tiny.trace(tokens):
        values = nnsight.save({})
        for site, layer in walk(N_LAYERS, tiny.architecture.family):
            values[site.path(layer)] = tiny.hook(site.path(layer)).output
    assert list(values) == [site.path(layer) for site, layer in walk(N_LAYERS, tiny.architecture.family)]
    for path, value in values.items():
        same(value, expected[path])


@pytest.mark.parametrize("offset", [0, 1], ids=["from the start", "from the end"])
def test_the_state_after_every_token_of_every_layer(tiny, hf, tokens, offset):
    length = tokens.shape[1]
    expected = by_hand(hf, tokens)
    with torch.no_grad(), tiny.trace(tokens):
        states = nnsight.save({})
        for layer in range(N_LAYERS):
            for p in range(length):
                states[layer, p] = tiny.layers[layer].ssm.h[p - offset * length].output
        logits = tiny.lm_head.output.save()
    for (layer, p), state in states.items():
        same(state, expected[f"layers[{layer}].ssm.h[{p}]"])
    same(logits, expected["lm_head"])


@pytest.mark.parametrize(
    "three",
    [3, np.int64(3), np.int32(3), torch.tensor(3), torch.arange(5)[3]],
    ids=lambda p: type(p).__name__,
)
def test_a_position_may_be_any_integer(tiny, hf, tokens, three):
    with tiny.trace(tokens):
        state = tiny.layers[0].ssm.h[three].output.save()
    same(state, by_hand(hf, tokens)["layers[0].ssm.h[3]"])


@pytest.mark.parametrize("order", [(-1, 6), (6, -1), (-1, -1), (6, 6)], ids=str)
def test_one_position_under_both_its_names(tiny, hf, tokens, order):
    tokens = tokens[:, :7]
    first, second = order
    with tiny.trace(tokens):
        one = tiny.layers[0].ssm.h[first].output.save()
        other = tiny.layers[0].ssm.h[second].output.save()
    expected = by_hand(hf, tokens)["layers[0].ssm.h[6]"]
    same(one, expected)
    same(other, expected)


@pytest.mark.parametrize("order", [(-1, 6), (6, -1)], ids=str)
def test_an_edit_under_one_name_is_read_under_the_other(tiny, tokens, order):
    tokens = tokens[:, :7]
    first, second = order
    with tiny.trace(tokens):
        tiny.layers[0].ssm.h[first].output[:] = 0.25
        state = tiny.layers[0].ssm.h[second].output.save()
    assert (state == 0.25).all()


def test_positions_and_then_the_whole_trajectory(tiny, hf, tokens):
    expected = by_hand(hf, tokens, {"layers[0].ssm.h[2]": change})
    with tiny.trace(tokens):
        state = tiny.layers[0].ssm.h[2].output
        tiny.layers[0].ssm.h[2].output = change(state)
        last = tiny.layers[0].ssm.h[-1].output.save()
        whole = tiny.layers[0].ssm.h.output.save()
    same(whole, expected["layers[0].ssm.h"])
    same(last, whole[:, -1])


def test_a_prompt_of_one_token(tiny, hf, tokens):
    tokens = tokens[:, :1]
    expected = by_hand(hf, tokens, {"layers[1].ssm.h[0]": change})
    with tiny.trace(tokens):
        tiny.layers[1].ssm.h[0].output = change(tiny.layers[1].ssm.h[0].output)
        whole = tiny.layers[1].ssm.h.output.save()
        logits = tiny.lm_head.output.save()
    same(whole, expected["layers[1].ssm.h"])
    same(logits, expected["lm_head"])


# -- writing -----------------------------------------------------------------------------------------------


@each("path", PATHS + LAST_LAYER + NATIVE)
def test_an_assignment_means_what_the_table_says(tiny, hf, tokens, path):
    expected = by_hand(hf, tokens, {path: native_edit(path)})
    place = tiny.hook(path)
    goes_on = path.startswith(("layers[0]", "embeddings"))
    with torch.no_grad(), tiny.trace(tokens):
        place.output = native_edit(path)(place.output)
        read_again = place.output.save()
        out = tiny.layers[2].ssm.out_proj.output.save() if goes_on else None
        logits = tiny.lm_head.output.save()
    if path.endswith("conv1d"):  # the module pads both ends
        read_again = read_again[..., : tokens.shape[1]]
    same(read_again, expected[path])
    if goes_on:
        same(out, expected["layers[2].ssm.out_proj"])
    same(logits, expected["lm_head"])
    assert not torch.allclose(logits, logits_of(tiny, tokens), rtol=1e-4, atol=1e-4), "the edit did nothing"


def native_edit(path: str) -> Edit:
    """`change`, and for the modules that are no site an edit with a counterpart in `by_hand`."""
    return (lambda value: value * 1.5) if path.endswith("conv1d") else change


@each("path", PATHS + LAST_LAYER)
def test_an_edit_in_place_equals_the_assignment(tiny, tokens, path):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        place.output = change(place.output)
        assigned = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        place.output[:] = change(place.output)
        in_place = tiny.lm_head.output.save()
    same(in_place, assigned, 1e-6)
    assert not torch.allclose(in_place, logits_of(tiny, tokens), rtol=1e-4, atol=1e-4)


@each("path", PATHS + LAST_LAYER)
def test_an_edit_of_a_slice_leaves_the_rest(tiny, hf, tokens, path):
    def zero_some(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., 1:3] = 0.5
        value[-1] *= 0.5
        return value

    expected = by_hand(hf, tokens, {path: zero_some})
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        place.output[..., 1:3] = 0.5
        place.output[-1] *= 0.5
        value = place.output.save()
        logits = tiny.lm_head.output.save()
    same(value, expected[path])
    # A row of the stream is left so small that its norm magnifies rounding: of twelve seeds of the weights the worst
    # logit is off by 1e-4, and by as much where PyTorch multiplies.
    same(logits, expected["lm_head"], 1e-4)


@each("path", PATHS)
def test_an_augmented_assignment(tiny, hf, tokens, path):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        place.output *= 0.5
        logits = tiny.lm_head.output.save()
    same(logits, by_hand(hf, tokens, {path: lambda value: value * 0.5})["lm_head"])


@each("path", PATHS)
def test_edits_in_place_work_where_gradients_are_recorded(tiny, hf, tokens, path):
    place = tiny.hook(path)
    with tiny.trace(tokens):
        place.output[..., 0] = 0.25
        logits = tiny.lm_head.output.save()

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., 0] = 0.25
        return value

    same(logits, by_hand(hf, tokens, {path: edit})["lm_head"])
    logits.sum().backward()


@each("path", PATHS)
def test_a_value_of_any_stride_or_floating_dtype_is_taken(tiny, hf, tokens, path):
    expected = by_hand(hf, tokens, {path: change})["lm_head"]
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        value = change(place.output).double()
        place.output = value.transpose(0, -1).contiguous().transpose(0, -1)
        taken = place.output.save()
        logits = tiny.lm_head.output.save()
    assert taken.dtype == torch.float32
    same(logits, expected)


# -- what a saved value keeps ------------------------------------------------------------------------------


def assert_saved(tiny: MambaTrace, tokens: Tensor, path: str, trace: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The saved value is the clean one, and the logits are those of zeroing the site."""
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
        place.output = torch.zeros_like(clean)
        expected = tiny.lm_head.output.save()
    saved, logits = trace(place)
    assert torch.equal(saved, clean)
    agree(logits, expected)


@each("path", PATHS)
def test_a_saved_value_survives_an_edit_in_place(tiny, tokens, path):
    def trace(place: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), tiny.trace(tokens):
            saved = place.output.save()
            place.output[:] = 0
            logits = tiny.lm_head.output.save()
        return saved, logits

    assert_saved(tiny, tokens, path, trace)


@each("path", PATHS)
def test_a_saved_value_survives_an_augmented_assignment(tiny, tokens, path):
    def trace(place: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), tiny.trace(tokens):
            saved = place.output.save()
            place.output *= 0
            logits = tiny.lm_head.output.save()
        return saved, logits

    assert_saved(tiny, tokens, path, trace)


@each("path", ["layers[0].resid_post", "layers[0].ssm.delta", "layers[0].ssm.h[3]", "lm_head"])
def test_a_saved_slice_survives_an_edit_in_place(tiny, tokens, path):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        saved = place.output[:, -1].save()
        place.output[:] = 0
    assert torch.equal(saved, clean[:, -1])


@each("path", ["layers[0].resid_post", "layers[0].ssm.delta", "layers[0].ssm.h[3]", "lm_head"])
def test_a_value_in_a_saved_list_survives_an_edit_in_place(tiny, tokens, path):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        clean = place.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        saved = nnsight.save([])
        saved.append(place.output)
        place.output[:] = 0
    assert torch.equal(saved[0], clean)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("reads", [0, 1, 2, 3])
@pytest.mark.parametrize("saved", [False, True], ids=["bound", "saved"])
@each("path", ["layers[0].resid_post", "layers[0].ssm.h[3]"])
def test_an_edit_through_a_name_bound_earlier_reaches_the_run(tiny, hf, tokens, path, saved, reads, mode):
    place = tiny.hook(path)
    expected = by_hand(hf, tokens, {path: lambda value: value * 0})["lm_head"]
    with mode(), tiny.trace(tokens):
        value = place.output
        if saved:
            value.save()
        for _ in range(reads):
            _ = place.output.sum()
        value[:] = 0
        logits = tiny.lm_head.output.save()
    same(logits.detach().clone(), expected)


def test_edits_through_one_name_after_the_other(tiny, hf, tokens):
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 0], value[:, 1] = 1.0, 2.0
        return value

    expected = by_hand(hf, tokens, {"layers[0].resid_post": edit})["lm_head"]
    with torch.no_grad(), tiny.trace(tokens):
        value = tiny.layers[0].resid_post.output
        value[:, 0] = 1.0
        tiny.layers[0].resid_post.output[:, 1] = 2.0
        logits = tiny.lm_head.output.save()
    same(logits, expected)


def test_edits_through_two_names_at_once_both_count(tiny, hf, tokens):
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 0], value[:, 1] = 1.0, 2.0
        return value

    expected = by_hand(hf, tokens, {"layers[0].resid_post": edit})["lm_head"]
    with torch.no_grad(), tiny.trace(tokens):
        value = tiny.layers[0].resid_post.output
        tiny.layers[0].resid_post.output[:, 1] = 2.0
        value[:, 0] = 1.0
        logits = tiny.lm_head.output.save()
    same(logits, expected)


def test_the_last_of_two_edits_through_two_names_counts(tiny, hf, tokens):
    expected = by_hand(hf, tokens, {"layers[0].resid_post": torch.ones_like})["lm_head"]
    with torch.no_grad(), tiny.trace(tokens):
        value = tiny.layers[0].resid_post.output
        tiny.layers[0].resid_post.output[:] = 2.0
        value[:] = 1.0
        logits = tiny.lm_head.output.save()
    same(logits, expected)


def test_edits_of_two_invokes_between_which_a_barrier_stands(tiny, hf, tokens):
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[0], value[1] = 1.0, 2.0
        return value

    expected = by_hand(hf, tokens[:2], {"layers[0].resid_post": edit})["lm_head"]
    with torch.no_grad(), tiny.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tokens[:1]):
            first = tiny.layers[0].resid_post.output
            barrier()
            first[:] = 1.0
            one = tiny.lm_head.output.save()
        with tracer.invoke(tokens[1:2]):
            second = tiny.layers[0].resid_post.output
            second[:] = 2.0
            barrier()
            two = tiny.lm_head.output.save()
    same(torch.cat((one, two)), expected)


CROSS = [
    ("embeddings", "layers[0].resid_pre"),
    ("embeddings", "layers[0].layer_input"),
    ("layers[0].resid_pre", "layers[0].layer_input"),
    ("layers[0].norm", "layers[0].ssm.skip"),
    ("layers[0].ssm.in_proj", "layers[0].ssm.skip"),
    ("layers[0].ssm.in_proj", "layers[0].ssm.x_in"),
    ("layers[0].ssm.skip", "layers[0].ssm.x_in"),
    ("layers[0].ssm.x_in", "layers[0].ssm.B_in"),
    ("layers[0].ssm.B_in", "layers[0].ssm.C_in"),
    ("layers[0].ssm.C_in", "layers[0].ssm.conv"),
    ("layers[0].ssm.conv", "layers[0].ssm.B_conv"),
    ("layers[0].ssm.B_conv", "layers[0].ssm.C_conv"),
    ("layers[0].ssm.C_conv", "layers[0].ssm.C"),
    ("layers[0].ssm.conv1d", "layers[0].ssm.conv"),
    ("layers[0].ssm.conv", "layers[0].ssm.ssm_input"),
    ("layers[0].ssm.ssm_input", "layers[0].ssm.y"),
    ("layers[0].ssm.x_proj", "layers[0].ssm.delta_1"),
    ("layers[0].ssm.x_proj", "layers[0].ssm.B"),
    ("layers[0].ssm.x_proj", "layers[0].ssm.C"),
    ("layers[0].ssm.delta_1", "layers[0].ssm.delta_2"),
    ("layers[0].ssm.dt_proj", "layers[0].ssm.delta_2"),
    ("layers[0].ssm.delta_2", "layers[0].ssm.delta"),
    ("layers[0].ssm.delta", "layers[0].ssm.A_bar"),
    ("layers[0].ssm.A", "layers[0].ssm.A_bar"),
    ("layers[0].ssm.delta", "layers[0].ssm.B_bar"),
    ("layers[0].ssm.B", "layers[0].ssm.B_bar"),
    ("layers[0].ssm.B", "layers[0].ssm.C"),
    ("layers[0].ssm.h_start", "layers[0].ssm.h[0]"),
    ("layers[0].ssm.h[2]", "layers[0].ssm.h[3]"),
    ("layers[0].ssm.h[2]", "layers[0].ssm.h"),
    ("layers[0].ssm.h[-1]", "layers[0].ssm.h"),
    ("layers[0].ssm.B_bar", "layers[0].ssm.write"),
    ("layers[0].ssm.write", "layers[0].ssm.h[0]"),
    ("layers[0].ssm.h[-1]", "layers[0].ssm.h_read"),
    ("layers[0].ssm.h", "layers[0].ssm.h_read"),
    ("layers[0].ssm.h_read", "layers[0].ssm.y"),
    ("layers[0].ssm.h", "layers[0].ssm.y"),
    ("layers[0].ssm.y", "layers[0].ssm.ssm_output"),
    ("layers[0].ssm.ssm_output", "layers[0].ssm.after_skip"),
    ("layers[0].ssm.after_skip", "layers[0].ssm.out_proj"),
    ("layers[0].ssm.after_skip", "layers[0].ssm.inner_norm"),
    ("layers[0].ssm.inner_norm", "layers[0].ssm.out_proj"),
    ("layers[0].ssm.out_proj", "layers[0].resid_post"),
    ("layers[0].resid_pre", "layers[0].resid_post"),
    ("layers[0].resid_post", "layers[1].resid_pre"),
    ("layers[0].resid_post", "layers[1].layer_input"),
    ("layers[2].resid_post", "norm_f"),
    ("norm_f", "lm_head"),
]


@each("earlier later", CROSS)
def test_a_saved_value_survives_an_edit_of_a_later_site(tiny, tokens, earlier, later):
    first, second = tiny.hook(earlier), tiny.hook(later)
    with torch.no_grad(), tiny.trace(tokens):
        clean = first.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens) as tracer:
        cache = tracer.cache(modules=[first])
        saved = first.output.save()
        second.output[:] = 7.0
    assert torch.equal(saved, clean)
    assert torch.equal(cache[first.path].output, clean)


@each("earlier later", CROSS[:: len(CROSS) // 8])
def test_a_saved_value_survives_a_later_edit_where_gradients_are_recorded(tiny, tokens, earlier, later):
    first, second = tiny.hook(earlier), tiny.hook(later)
    with tiny.trace(tokens):
        clean = first.output.clone().save()
    with tiny.trace(tokens):
        saved = first.output.save()
        second.output[:] = 7.0
        logits = tiny.lm_head.output.save()
    assert torch.equal(saved, clean)
    logits.sum().backward()


NATIVE_INPUTS = {
    "layers[0].norm": "in_proj",
    "layers[0].ssm.ssm_input": "x_proj",
    "layers[0].ssm.delta_1": "dt_proj",
    "layers[0].ssm.after_skip": "out_proj",
    "layers[0].ssm.inner_norm": "out_proj",
}


@each("earlier module", list(NATIVE_INPUTS.items()))
def test_a_saved_site_survives_an_edit_of_the_input_it_becomes(tiny, tokens, earlier, module):
    first, second = tiny.hook(earlier), getattr(tiny.layers[0].ssm, module)
    with torch.no_grad(), tiny.trace(tokens):
        clean = first.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        saved = first.output.save()
        second.input[:] = 7.0
    assert torch.equal(saved, clean)


@each("name", ["in_proj", "conv1d", "x_proj", "dt_proj"])
def test_a_saved_value_of_an_inner_module_survives_an_edit_in_place(tiny, tokens, name):
    module = getattr(tiny.layers[0].ssm, name)
    with torch.no_grad(), tiny.trace(tokens):
        clean = module.output.clone().save()
    with torch.no_grad(), tiny.trace(tokens):
        saved = module.output.save()
        module.output[:] = 7.0
    assert torch.equal(saved, clean)


def test_a_value_saved_by_one_worker_survives_the_edit_of_another(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        clean = tiny.layers[0].resid_post.output.clone().save()
    with torch.no_grad(), tiny.trace() as tracer:
        with tracer.invoke(tokens):
            saved = tiny.layers[0].resid_post.output.save()
        with tracer.invoke():
            tiny.layers[0].resid_post.output[:] = 7.0
    assert torch.equal(saved, clean)


# -- the meaning of each kind of edit ----------------------------------------------------------------------


def test_A_with_as_many_channels_as_rows_is_not_cut(tiny_config):
    config = type(tiny_config)(**{**tiny_config.to_dict(), "hidden_size": 2, "intermediate_size": 4})
    model = MambaTrace.from_config(config, seed=3)
    rows = torch.randint(1, config.vocab_size, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(rows[:1]):
            one = model.layers[0].ssm.A.output.save()
            h_one = model.layers[0].ssm.h[1].output.save()
        with tracer.invoke(rows[1:]):
            model.layers[0].ssm.A.output[:, 0] = -3.0
            other = model.layers[0].ssm.A.output.save()
            h_other = model.layers[0].ssm.h[1].output.save()
            logits = model.lm_head.output.save()
    assert one.shape == other.shape == (4, config.state_size)
    assert (other[:, 0] == -3).all()
    assert (h_one.shape[0], h_other.shape[0]) == (1, 3)

    def edit(A: Tensor) -> Tensor:
        A = A.clone()
        A[:, 0] = -3.0
        return A

    expected = by_hand(model._module.double(), rows, {"layers[0].ssm.A": edit})
    same(h_one, expected["layers[0].ssm.h[1]"][:1])
    same(h_other, expected["layers[0].ssm.h[1]"][1:])
    same(logits, expected["lm_head"][1:])


# -- the table ---------------------------------------------------------------------------------------------


def test_a_new_site_is_one_row_and_one_line():
    """Read alone, edited, in a cache, by a hook and under generate, for a site of each stage and scope."""
    script = Path(__file__).parent / "new_sites.py"
    path = os.pathsep.join([str(Path(mamba_trace.__file__).parent.parent), str(script.parent)])
    run = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["u", "conv_out", "h_kept", "raw_y", "branch"]


def test_a_site_knows_its_place_in_the_table():
    assert [site.index for site in SITES] == list(range(len(SITES)))
    for site in SITES:
        assert site_named(site.name) is site
        of_logits = site.name == "logits"  # MambaLens's name is that of lm_head where these are one
        assert site_named(site.hook) is (BY_NAME["lm_head"] if of_logits else site)
    assert site_named("hook_nothing") is None
    order = [names.parse(f"layers[0].ssm.{name}").index() for name in ("in_proj", "skip", "conv1d", "conv")]
    assert order == sorted(order)
    assert names.parse("layers[0].ssm.h[3]").index() < names.parse("layers[0].ssm.h").index()


# -- around a trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@each("path", PATHS)
def test_grad_modes_around_a_trace(tiny, hf, tokens, mode, path):
    place = tiny.hook(path)
    with mode(), tiny.trace(tokens):
        saved = place.output.save()
        place.output[:] = change(place.output)
        logits = tiny.lm_head.output.save()
    same(saved.detach().clone(), by_hand(hf, tokens)[path])
    same(logits.detach().clone(), by_hand(hf, tokens, {path: change})["lm_head"])


def test_every_row_of_the_table_is_covered_here():
    assert {path.rsplit(".", 1)[-1] for path in SITE_PATHS} == {site.name for site in SITES if not site.part}
    assert functools.reduce(set.union, ({a, b} for a, b in CROSS)) >= set(SITE_PATHS)


def test_an_edit_of_A_in_one_invoke_leaves_the_others_alone(tiny, hf, tokens):
    one, two = tokens[:1], tokens[1:]
    halved = by_hand(hf, two, {"layers[0].ssm.A": lambda A: A * 0.5})["lm_head"]
    for in_place in (True, False):
        with torch.no_grad(), tiny.trace() as tracer:
            with tracer.invoke(one):
                first = tiny.lm_head.output.save()
            with tracer.invoke(two):
                if in_place:
                    tiny.layers[0].ssm.A.output *= 0.5
                else:
                    tiny.layers[0].ssm.A.output = tiny.layers[0].ssm.A.output * 0.5
                second = tiny.lm_head.output.save()
        same(first, by_hand(hf, one)["lm_head"])
        same(second, halved)


@pytest.mark.parametrize("name", ["y", "in_proj"])
def test_a_place_is_not_a_value(tiny, tokens, name):
    with pytest.raises(SiteValueError, match=rf"layers\[0\].ssm.{name} is a place.*{name}.output"):
        setattr(tiny.layers[0].ssm, name, torch.zeros(1))
    with pytest.raises(SiteValueError, match=r"layers\[0\].ssm is a place"):
        tiny.layers[0].ssm = torch.zeros(1)
    with pytest.raises(SiteValueError, match=r"h\[3\] is a place"):
        tiny.layers[0].ssm.h[3] = torch.zeros(1)


def test_an_assigned_tensor_is_not_changed_by_a_later_edit(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        given = tiny.layers[0].ssm.y.output.clone().save()
        tiny.layers[0].ssm.y.output = given
        tiny.layers[0].ssm.y.output[:] = 0
    assert given.any()


def test_a_saved_stream_survives_an_edit_of_the_input_of_the_next_block(tiny, tokens):
    for inputs in (True, False):
        with torch.no_grad(), tiny.trace(tokens):
            saved = tiny.layers[0].resid_post.output.save()
            block = tiny.layers[1]
            (block.inputs[0][0] if inputs else block.input)[:] = 0
            stream = block.resid_pre.output.save()
        assert saved.any()
        assert not stream.any()


def test_a_saved_site_survives_an_edit_of_what_the_model_returns(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        normed = tiny.norm_f.output.save()
        tiny.backbone.output.last_hidden_state[:] = 0
        zeroed = tiny.lm_head.output.save()
        tiny.output.logits[:] = 7
        returned = tiny.output.logits.save()
    assert normed.any()
    assert not zeroed.any()
    assert (returned == 7).all()


def test_a_layer_that_does_not_exist(tiny):
    with pytest.raises(IndexError, match=r"layers\[7\]: this model has layers 0 to"):
        tiny.layers[7]


def test_printing_a_model_shows_every_site_with_its_shape_once(tiny):
    shown = str(tiny)
    table = [line.split() for line in shown[shown.index("Sites, in the order") :].splitlines()[1:]]
    assert [line[0] for line in table] == [row.path for row in rows(tiny.architecture.family)]
    assert shown.count(type(tiny.layers[0].ssm._module).__name__) == 1
    state = "[B, 24, 5]   " if tiny.architecture.family == "selective" else "[B, 6, 4, 5] "
    assert f"layers[l].ssm.h[p]         {state}          blocks.l.hook_h.p" in shown


# -- three edits of the state ------------------------------------------------------------------------------


def test_the_state_carried_the_state_read_and_what_is_written_differ(tiny, hf, tokens):
    """Each set to zero at position 3 alone."""
    ssm, edits = tiny.layers[0].ssm, {}
    zero_at_3 = lambda value: torch.cat((value[:, :3], 0 * value[:, 3:4], value[:, 4:]), dim=1)  # noqa: E731
    with torch.no_grad():
        with tiny.trace(tokens):
            clean = ssm.y.output.save()
        with tiny.trace(tokens):
            ssm.h[3].output[:] = 0
            edits["h[3]"] = ssm.y.output.save()
        with tiny.trace(tokens):
            ssm.h_read.output[:, 3] = 0
            edits["h_read"] = ssm.y.output.save()
        with tiny.trace(tokens):
            ssm.write.output[:, 3] = 0
            edits["write"] = ssm.y.output.save()
    changed = {
        name: [p for p in range(9) if not torch.allclose(y[:, p], clean[:, p], atol=1e-6)] for name, y in edits.items()
    }
    after = [3, 4, 5, 6, 7, 8]
    assert changed == {"h[3]": after, "h_read": [3], "write": after}
    assert not torch.allclose(edits["h[3]"], edits["write"], atol=1e-3)  # what came before 3 is left
    assert (edits["h[3]"][:, 3] == 0).all()
    assert (edits["h_read"][:, 3] == 0).all()
    for name in ("h_read", "write"):
        expected = by_hand(hf, tokens, {f"layers[0].ssm.{name}": zero_at_3})
        same(edits[name], expected["layers[0].ssm.y"])


def test_the_state_that_is_read_is_not_the_one_that_is_cached(tiny, tokens):
    ssm = tiny.layers[0].ssm
    states = []
    for place in (None, ssm.h_read, ssm.h):
        with torch.no_grad(), tiny.trace(tokens, use_cache=True):
            if place is not None:
                place.output[:, -1] = 0
            cache = tiny.output.cache.save()
        states.append(cache.layers[0].recurrent_states[0])
    agree(states[1], states[0])
    agree(states[2], states[0])


@pytest.mark.parametrize("place", ["write", "h_read"])
def test_gradients_of_what_transformerlens_has(tiny, tokens, place):
    """Against those of the same values made by hand: y = C h_read, and h is linear in what is written."""
    ssm = tiny.layers[1].ssm
    with tiny.trace(tokens):
        A_bar = ssm.A_bar.output.save()
        C = ssm.C.output.save()
        value = getattr(ssm, place).output.save()
        y = ssm.y.output.save()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((y * weights).sum(), value)
    if C.dim() == 4:  # Mamba-2: each head reads the C of its group, and decays as one
        C = C.repeat_interleave(value.shape[2] // C.shape[2], dim=2)[..., None, :]
        A_bar = A_bar[..., None, None]
    else:
        C = C[:, :, None]
    carried = (weights.view(value.shape[:-1])[..., None] * C).detach()
    if place == "write":
        for p in range(tokens.shape[1] - 2, -1, -1):
            carried[:, p] += A_bar[:, p + 1].detach() * carried[:, p + 1]
    agree(gradient, carried)


@pytest.mark.parametrize("kind", PLAIN)
def test_printing_a_hybrid_shows_its_sites_in_an_order_to_ask_for_them(kind: str) -> None:
    """Attention of Zamba comes before the SSM, whose input it adds to."""
    model = MambaTrace(make_hybrid(kind))
    shown = [
        line.split()[0] for line in repr(model).partition("Sites, in the order to ask for them:")[2].splitlines()[1:]
    ]
    shown = [path.rpartition(".")[2] for path in shown if not path.endswith("[p]")]
    assert sorted(shown) == sorted(site.name for site in SITES if model._layout.has(site))
    for layer in {None, *range(len(model.layers))}:
        own = [site.name for site, number in model._layout.walk() if number == layer]
        assert [name for name in shown if name in own] == own


def test_a_site_has_its_name_and_its_hooks() -> None:
    assert site_named("y") is site_named("hook_y") is BY_NAME["y"]
    assert site_named("blocks.1.hook_y") is site_named(5) is None


def test_each_family_has_the_architectures_that_say_so() -> None:
    found = [(architecture.family, architecture.name) for architecture in ARCHITECTURES if not architecture.hybrid]
    assert found == [(family, name) for family, names in FAMILY_MODELS.items() for name in names]
