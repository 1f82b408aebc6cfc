"""Every error: it names what was asked for, what exists and what to do, at the user's line; and the model
goes on as if nothing had happened."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012, PT031, SIM117

from __future__ import annotations

import re
import sys
import traceback
from typing import Any

import bad_input
import pytest
import torch
from bad_input import IDS, PROMPTS
from by_hand import by_hand, same
from conftest import MAMBA_SITES
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import (
    BackendError,
    CheckpointError,
    MambaTraceError,
    PositionError,
    PromptError,
    SiteOrderError,
    SiteValueError,
    UnknownSiteError,
)

PATHS = [site.path(1) for site in MAMBA_SITES] + ["layers[1].ssm.h[3]", "layers[1].ssm.h[-2]"]


@pytest.fixture(autouse=True)
def _usable_afterwards(tiny, tiny_hf, tokens):
    """After each test the model of `tiny` has the logits, states and edits of one never touched."""
    yield
    expected = by_hand(tiny_hf().double(), tokens)
    with torch.no_grad():
        same(tiny._module(tokens).logits, expected["lm_head"])
    with torch.no_grad(), tiny.trace(tokens):
        first = tiny.layers[1].ssm.h[0].output.save()
        last = tiny.layers[1].ssm.h[-1].output.save()
        logits = tiny.lm_head.output.save()
    same(first, expected["layers[1].ssm.h[0]"])
    same(last, expected["layers[1].ssm.h[-1]"])
    same(logits, expected["lm_head"])


def at_users_line(error: Any, line: str) -> None:
    """The last line of this file in the traceback is ``line``."""
    mine = [frame.line for frame in traceback.extract_tb(error.tb) if frame.filename == __file__]
    assert mine, "the traceback does not lead to the user's code"
    assert mine[-1] == line


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name", "suggestion"),
    [
        ("layers[0].ssm", "delt", "delta"),
        ("layers[0].ssm", "convolution", "conv"),
        ("layers[0].ssm", "hstart", "h_start"),
        ("layers[0]", "resid_middle", "resid_"),
        ("layers[0]", "layer_inputs", "layer_input"),
        ("", "embeding", "embeddings"),
        ("", "lm_hed", "lm_head"),
    ],
)
def test_an_unknown_site_suggests_the_nearest(tiny, place, name, suggestion):
    envoy = {"": tiny, "layers[0]": tiny.layers[0], "layers[0].ssm": tiny.layers[0].ssm}[place]
    with pytest.raises(UnknownSiteError, match=f"has no '{name}'; did you mean .*{suggestion}.*It has: ") as error:
        getattr(envoy, name)
    assert "?." not in str(error.value), "a question has a mark of its own"
    assert isinstance(error.value, AttributeError)
    assert not hasattr(envoy, name)


def test_an_unknown_site_lists_what_there_is(tiny):
    with pytest.raises(UnknownSiteError) as error:
        _ = tiny.layers[0].ssm.zzz
    for site in MAMBA_SITES:
        if site.scope == "mixer":
            assert site.name in str(error.value)
    assert "layers[0].ssm" in str(error.value)


def test_what_there_is_are_the_sites_of_this_place(tiny):
    with pytest.raises(UnknownSiteError, match=r"It has: resid_pre, layer_input, norm, resid_post, ssm$"):
        _ = tiny.layers[1].inner_norm
    hybrid = MambaTrace.demo("hybrid")
    layer = hybrid.attention_layers[0]
    with pytest.raises(UnknownSiteError, match=rf"^layers\[{layer}\].attn has no 'yy'.*It has: q, k, v, pattern, z$"):
        _ = hybrid.layers[layer].attn.yy


def test_every_error_stands_in_one_module():
    classes = {cls for module in modules_of("mamba_trace") for cls in vars(module).values() if is_error(cls)}
    assert {cls.__module__ for cls in classes} == {"mamba_trace.errors"}
    assert issubclass(SiteOrderError, OutOfOrderError)


def modules_of(package):
    return [module for name, module in sys.modules.items() if name.split(".")[0] == package]


def is_error(value):
    return isinstance(value, type) and issubclass(value, MambaTraceError)


def test_an_unknown_site_inside_a_trace(tiny, tokens):
    with pytest.raises(UnknownSiteError, match="did you mean delta") as error, tiny.trace(tokens):
        _ = tiny.layers[0].ssm.delt.output.save()
    at_users_line(error, "_ = tiny.layers[0].ssm.delt.output.save()")


def test_a_site_of_the_mixer_asked_of_the_block_or_the_model(tiny):
    for envoy in (tiny.layers[0], tiny):
        with pytest.raises(UnknownSiteError, match="'conv'") as error:
            _ = envoy.conv
        assert "It has: " in str(error.value)


def test_attributes_of_python_are_no_sites(tiny):
    assert not hasattr(tiny.layers[0].ssm, "__wrapped__")
    assert not hasattr(tiny, "_nothing_of_this_name")
    assert tiny.layers[0].ssm.conv_kernel_size == tiny.config.conv_kernel  # of the module


def test_unknown_hook_names_and_layers(tiny):
    with pytest.raises(
        UnknownSiteError,
        match=r"no site is called 'blocks\.0\.hook_detla'; did you mean blocks\.0\.hook_delta",
    ):
        tiny.hook("blocks.0.hook_detla")
    with pytest.raises(UnknownSiteError, match=r"'blocks\.3\.hook_delta': this model has layers 0 to 2"):
        tiny.hook("blocks.3.hook_delta")


# -- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("p", [9, 100, -10, -1000])
def test_a_position_out_of_range(tiny, tokens, p, read):
    with pytest.raises(PositionError) as error, tiny.trace(tokens):
        if read:
            _ = tiny.layers[1].ssm.h[p].output.save()
        else:
            tiny.layers[1].ssm.h[p].output = torch.zeros(1)
    at_users_line(
        error,
        "_ = tiny.layers[1].ssm.h[p].output.save()" if read else "tiny.layers[1].ssm.h[p].output = torch.zeros(1)",
    )
    assert f"layers[1].ssm.h[{p}]" in str(error.value)
    assert "9 positions" in str(error.value)
    assert "-9 <= p < 9" in str(error.value)
    assert isinstance(error.value, IndexError)


def test_a_position_out_of_range_after_one_in_range(tiny, tokens):
    with pytest.raises(PositionError, match=r"layers\[1\].ssm.h\[9\]") as error, tiny.trace(tokens):
        tiny.layers[1].ssm.h[8].output[:] = 0
        _ = tiny.layers[1].ssm.h[9].output.save()
    at_users_line(error, "_ = tiny.layers[1].ssm.h[9].output.save()")


def test_a_position_out_of_range_that_the_block_catches(tiny, tiny_hf, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        state = None  # nnsight: a block cannot start with try
        try:
            state = tiny.layers[1].ssm.h[50].output
        except PositionError:
            state = tiny.layers[1].ssm.h[-1].output.save()
        logits = tiny.lm_head.output.save()
    expected = by_hand(tiny_hf().double(), tokens)
    same(state, expected["layers[1].ssm.h[-1]"])
    same(logits, expected["lm_head"])


def test_a_prompts_position_in_a_decode_step(tiny, tokens):
    with pytest.raises(PositionError, match=r"has 1 position,.*every decode step of generate has 1"):
        with tiny.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
            for _ in tracer.iter[:3]:
                _ = tiny.layers[1].ssm.h[5].output.save()


def test_a_position_out_of_range_in_one_invoke_of_two(tiny, tokens):
    with pytest.raises(PositionError, match=r"h\[9\]"), tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            _ = tiny.layers[1].ssm.h[2].output.save()
        with tracer.invoke(tokens[1:]):
            _ = tiny.layers[1].ssm.h[9].output.save()


@pytest.mark.parametrize("index", [slice(2), slice(None), slice(1, 3), [0, 1], (0, 1)], ids=repr)
def test_several_positions_at_once(tiny, tokens, index):
    with pytest.raises(PositionError, match=r"one position at a time") as error, tiny.trace(tokens):
        tiny.layers[1].ssm.h[index].output[:] = 0
    at_users_line(error, "tiny.layers[1].ssm.h[index].output[:] = 0")
    assert "layers[1].ssm.h.output [B,L,E,N]" in str(error.value)


@pytest.mark.parametrize("index", [1.0, "five", None])
def test_a_position_that_is_no_integer(tiny, index):
    with pytest.raises((TypeError, PositionError)):
        _ = tiny.layers[1].ssm.h[index]


def test_what_a_position_does_not_have(tiny, tokens):
    with (
        pytest.raises(SiteValueError, match=r"layers\[1\].ssm.h\[3\] has no input; read h\[p - 1\]"),
        tiny.trace(tokens),
    ):
        _ = tiny.layers[1].ssm.h[3].input
    with pytest.raises(SiteValueError, match="cannot be skipped; assign to its output"), tiny.trace(tokens):
        tiny.layers[1].ssm.h[3].skip(0)
    with pytest.raises(UnknownSiteError, match=r"has no 'weight'; it has .output"):
        _ = tiny.layers[1].ssm.h[3].weight


# -- order -------------------------------------------------------------------------------------------------

ORDER = [
    ("layers[1].ssm.y", "layers[1].ssm.conv"),
    ("layers[1].ssm.C", "layers[1].ssm.A_bar"),
    ("layers[1].ssm.h[3]", "layers[1].ssm.h[2]"),
    ("layers[1].ssm.h[-1]", "layers[1].ssm.h[0]"),
    ("layers[1].ssm.h[5]", "layers[1].ssm.h[-9]"),
    ("layers[1].ssm.h", "layers[1].ssm.h[8]"),
    ("layers[1].ssm.y", "layers[1].ssm.h[8]"),
    ("layers[1].ssm.x_in", "layers[1].ssm.skip"),
    ("layers[2].resid_pre", "layers[1].ssm.h[3]"),
    ("layers[2].resid_pre", "layers[1].ssm.delta"),
    ("lm_head", "embeddings"),
    ("layers[1].layer_input", "layers[1].resid_pre"),
    ("layers[1].resid_post", "layers[1].ssm.out_proj"),
]


@pytest.mark.parametrize("write", [False, True], ids=["read", "written"])
@pytest.mark.parametrize(("first", "second"), ORDER)
def test_out_of_order(tiny, tokens, first, second, write):
    one, other = tiny.hook(first), tiny.hook(second)
    reached_end = []
    with pytest.raises(SiteOrderError) as error, tiny.trace(tokens):
        _ = one.output.save()
        if write:
            other.output = torch.zeros(1)
        else:
            _ = other.output.save()
        reached_end.append(1)
    at_users_line(error, "other.output = torch.zeros(1)" if write else "_ = other.output.save()")
    assert isinstance(error.value, OutOfOrderError)
    assert isinstance(error.value, MambaTraceError)
    assert str(error.value).startswith(f"{second} was already computed in this run")
    assert f"before {first}" in str(error.value)
    assert not reached_end


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers[1].ssm.y", "layers[1].ssm.conv"),
        ("layers[1].ssm.y", "layers[1].ssm.h[-1]"),
        ("layers[2].ssm.h[-1]", "layers[1].ssm.h[-1]"),
        ("lm_head", "embeddings"),
    ],
)
def test_out_of_order_in_a_decode_step(tiny, tokens, first, second, step):
    """nnsight alone would wait, and hand out the value of the next step."""
    one, other = tiny.hook(first), tiny.hook(second)
    with pytest.raises(SiteOrderError, match="was already computed") as error:
        with tiny.generate(tokens, max_new_tokens=4, do_sample=False) as tracer:
            for _ in tracer.iter[step]:
                _ = one.output.save()
                _ = other.output.save()
    at_users_line(error, "_ = other.output.save()")


def test_out_of_order_that_the_block_catches(tiny, tiny_hf, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        y = tiny.layers[1].ssm.y.output.save()
        try:
            _ = tiny.layers[1].ssm.h[3].output
        except OutOfOrderError:
            logits = tiny.lm_head.output.save()
    expected = by_hand(tiny_hf().double(), tokens)
    same(y, expected["layers[1].ssm.y"])
    same(logits, expected["lm_head"])


def test_a_site_outside_a_trace(tiny):
    for place in (tiny.layers[0].ssm.conv, tiny.layers[0].ssm.h[2], tiny.layers[0], tiny.lm_head):
        with pytest.raises(ValueError, match="outside of interleaving"):
            _ = place.output
        with pytest.raises(ValueError, match="outside of interleaving"):
            place.output = torch.zeros(1)


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_value_of_the_wrong_shape(tiny, tokens, path):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        current = place.output.save()
    with pytest.raises(SiteValueError) as error, tiny.trace(tokens):
        place.output = torch.zeros(2, 2)
    at_users_line(error, "place.output = torch.zeros(2, 2)")
    assert f"{path} takes shape {tuple(current.shape)}" in str(error.value)
    assert "not (2, 2)" in str(error.value)
    for letter, word in {"B": "batch", "E": "d_inner", "N": "d_state", "L": "positions"}.items():
        axes = "BEN" if "[" in path.rsplit(".", 1)[-1] else place.site.axes
        assert (f"{letter} {word}" in str(error.value)) == (letter in axes)
    assert f"{path}.output[:" in str(error.value)


@pytest.mark.parametrize("value", [0.0, 1, [1.0], None, "zero"], ids=repr)
@pytest.mark.parametrize("path", ["layers[1].ssm.delta", "layers[1].ssm.h[3]", "lm_head"])
def test_a_value_that_is_no_tensor(tiny, tokens, path, value):
    place = tiny.hook(path)
    with pytest.raises(SiteValueError, match=f"not a {type(value).__name__}") as error, tiny.trace(tokens):
        place.output = value
    at_users_line(error, "place.output = value")
    assert str(error.value).startswith(f"{path} takes a tensor of shape (")
    assert f"{path}.output[:] = ..." in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("path", ["layers[1].ssm.delta", "layers[1].ssm.h[3]", "lm_head"])
def test_a_value_that_is_not_floating(tiny, tokens, path, dtype):
    place = tiny.hook(path)
    with (
        pytest.raises(SiteValueError, match=rf"such as torch.float32, not {dtype}: use .float\(\)") as error,
        tiny.trace(tokens),
    ):
        place.output = place.output.to(dtype)
    at_users_line(error, "place.output = place.output.to(dtype)")
    assert str(error.value).startswith(path)


def test_a_value_on_the_meta_device(tiny, tokens):
    with (
        pytest.raises(SiteValueError, match=r"layers\[1\].ssm.delta was given a tensor on the meta device"),
        tiny.trace(tokens),
    ):
        tiny.layers[1].ssm.delta.output = torch.empty_like(tiny.layers[1].ssm.delta.output, device="meta")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_floating_value_of_another_dtype_is_cast(tiny, tokens, path, dtype):
    place = tiny.hook(path)
    with torch.no_grad(), tiny.trace(tokens):
        given = (place.output * 0.5).to(dtype)
        place.output = given
        taken = place.output.save()
        given.save()
    assert taken.dtype == torch.float32
    assert torch.equal(taken, given.float())


def test_a_wrong_value_that_the_block_catches(tiny, tokens):
    with torch.no_grad(), tiny.trace(tokens):
        _ = tiny.layers[1].ssm.ssm_input.output
        try:
            tiny.layers[1].ssm.delta.output = torch.zeros(3)
        except SiteValueError:
            tiny.layers[1].ssm.delta.output[:] = 0
        delta = tiny.layers[1].ssm.delta.output.save()
    assert not delta.any()


def test_a_value_of_all_rows_assigned_in_one_invoke(tiny, tokens):
    with (
        pytest.raises(SiteValueError, match=r"takes shape \(2, 9, 24\) .*not \(3, 9, 24\)"),
        tiny.trace() as tracer,
    ):
        with tracer.invoke(tokens[:1]):
            _ = tiny.lm_head.output.save()
        with tracer.invoke(tokens[1:]):
            tiny.layers[1].ssm.delta.output = torch.zeros(3, 9, 24)


@pytest.mark.parametrize("place", ["layers[1].ssm", "layers[1]"])
@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (torch.zeros(3, 4, 12), r"\(3, 4, 12\) of torch.float32"),
        (torch.zeros(3, 9, 1), r"\(3, 9, 1\) of torch.float32"),
        (torch.zeros(3, 9, 12, dtype=torch.long), r"\(3, 9, 12\) of torch.int64"),
        (0, "int"),
    ],
    ids=["length", "width", "dtype", "number"],
)
def test_what_is_skipped_with_must_fit(tiny, tokens, place, wrong, found):
    skip = {"layers[1].ssm": lambda: tiny.layers[1].ssm.skip, "layers[1]": lambda: tiny.layers[1].skip}[place]
    message = (
        rf"{re.escape(place)}\.skip\(\.\.\.\) takes .* of shape \(3, 9, 12\) "
        rf"\[B batch, L positions, D d_model\], not {found}$"
    )
    with pytest.raises(SiteValueError, match=message) as error, tiny.trace(tokens):
        skip()(wrong)
        _ = tiny.lm_head.output.save()
    at_users_line(error, "skip()(wrong)")


def test_a_replacement_must_fit_the_rows_of_its_invoke(tiny, tokens):
    zeros = torch.zeros(3, 9, 12)
    with pytest.raises(SiteValueError, match=r"\(2, 9, 12\) .*not \(3, 9, 12\)"), tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            tiny.layers[1].ssm.skip(zeros[:1])
        with tracer.invoke(tokens[1:]):
            tiny.layers[1].ssm.skip(zeros)


@pytest.mark.parametrize("inside", [True, False])
def test_what_has_run_can_no_longer_be_skipped(tiny, tokens, inside):
    message = r"layers\[1\]\.ssm was already computed in this run, so it can no longer be skipped"
    with pytest.raises(SiteOrderError, match=message) as error, tiny.trace(tokens):
        _ = (tiny.layers[1].ssm.y if inside else tiny.layers[2].resid_pre).output.save()
        tiny.layers[1].ssm.skip(torch.zeros(3, 9, 12))
    at_users_line(error, "tiny.layers[1].ssm.skip(torch.zeros(3, 9, 12))")


def test_skipping_at_one_step_of_generate(tiny, tokens):
    def generated(steps):
        ids, shapes = [], []
        with tiny.generate(tokens, max_new_tokens=4, do_sample=False) as tracer:
            for step in tracer.iter[:4]:
                if step in steps:
                    stream = tiny.layers[1].ssm.input
                    shapes.append(tuple(stream.shape))
                    tiny.layers[1].ssm.skip(100 * torch.ones_like(stream))
                ids.append(tiny.lm_head.output[:, -1].argmax(-1))
            ids.save()
            shapes.save()
        return torch.stack(ids, dim=1), shapes

    plain, _ = generated(())
    for step in range(4):
        ids, shapes = generated((step,))
        assert shapes == [(3, 9 if step == 0 else 1, 12)]
        assert torch.equal(ids[:, :step], plain[:, :step])
        assert not torch.equal(ids[:, step], plain[:, step])


# -- prompts, backends, modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "World"]], ids=str)
def test_a_prompt_without_a_tokenizer(tiny, prompt):
    with (
        pytest.raises(PromptError, match=r"has no tokenizer.*tensor of token ids \[B,L\].*tokenizer=") as error,
        tiny.trace(prompt),
    ):
        _ = tiny.lm_head.output.save()
    assert isinstance(error.value, ValueError)
    with pytest.raises(PromptError, match="has no tokenizer"), tiny.generate(prompt, max_new_tokens=2):
        _ = tiny.lm_head.output.save()
    with pytest.raises(PromptError, match="has no tokenizer"):
        tiny.to_tokens(prompt)


@pytest.mark.parametrize(("token", "form"), [(31, list), (10**6, torch.tensor), (-1, torch.tensor)])
def test_a_token_that_is_none(tiny, tokens, token, form):
    ids = form([[1, 2], [3, token]])
    message = f"token {token} is not in the vocabulary, whose ids are 0 to 30"
    with pytest.raises(PromptError, match=message), tiny.trace(ids):
        _ = tiny.lm_head.output.save()
    with pytest.raises(PromptError, match=message):
        tiny.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("ids", [[[1, 2], []], [[], [1]], [[]], torch.zeros(1, 0, dtype=torch.long)], ids=str)
def test_token_ids_of_no_token(tiny, ids):
    with pytest.raises(PromptError, match="has no tokens"), tiny.trace(ids):
        _ = tiny.lm_head.output.save()
    with pytest.raises(PromptError, match="has no tokens"), tiny.scan(ids):
        _ = tiny.lm_head.output.save()


def test_a_backend_that_does_not_exist(tiny, tiny_hf):
    with pytest.raises(BackendError, match=r"no backend is called 'nonsense'; there are auto, reference, cpu"):
        MambaTrace(tiny_hf(), kernels="nonsense")


def test_a_module_that_is_no_mamba(tiny):
    with pytest.raises(
        CheckpointError, match=r"Linear is not a language model that this .* knows; it knows MambaForCausalLM"
    ):
        MambaTrace(torch.nn.Linear(2, 2))


def test_every_error_is_one_of_ours():
    import mamba_trace.errors as errors

    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, Exception) and name != "MambaTraceError":
            assert issubclass(error, MambaTraceError), name
            assert error.__doc__, name


# -- calls from outside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("form", ["list", "rows", "tensors", "1-D", "encoding", "named", "array"])
def test_what_a_run_starts_from(tiny, form, dtype):
    ids = IDS.to(dtype)
    with torch.no_grad(), tiny.trace(IDS):
        expected = tiny.lm_head.output.save()
    given = {
        "list": ids[0].tolist(),
        "rows": ids.tolist(),
        "tensors": [ids[0]],
        "1-D": ids[0],
        "encoding": {"input_ids": ids},
        "array": ids.numpy(),
    }
    named = {"input_ids": ids, "use_cache": False, "attention_mask": torch.ones_like(IDS)}
    with (
        torch.no_grad(),
        tiny.trace(*([] if form == "named" else [given[form]]), **(named if form == "named" else {})),
    ):
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, expected)


def test_an_attribute_of_the_users_own_on_the_model(tiny):
    tiny.note = "kept"
    assert tiny.note == "kept"


def test_steps_of_a_range(tiny, tokens):
    with tiny.generate(tokens, max_new_tokens=5, do_sample=False) as tracer:
        seen = [(step, tiny.layers[1].ssm.y.output.shape[1]) for step in tracer.iter[0:5:2]].save()
    assert seen == [(0, 9), (2, 1), (4, 1)]


def test_an_open_loop_ends_with_the_run(tiny, tokens):
    seen = []
    with (
        pytest.warns(UserWarning, match="was never reached") as told,
        tiny.generate(max_new_tokens=3, do_sample=False) as tracer,
    ):
        with tracer.invoke(tokens):
            for step in tracer.iter[:]:
                _ = tiny.lm_head.output
                seen.append(step)
        with tracer.invoke():
            seen.save()
    assert seen == [0, 1, 2]
    assert any(warning.filename == __file__ for warning in told)


@pytest.mark.parametrize("asked", ["an empty list", "3-D", "an unknown argument", "lengths", "two prompts"])
def test_the_last_line_of_a_refused_prompt_is_the_users(tiny, asked):
    with pytest.raises(PromptError) as error:
        PROMPTS[asked][0](tiny)
    last = traceback.extract_tb(error.tb)[-1]
    assert last.filename == bad_input.__file__
    assert "with model.trace(" in last.line


def helper(place: Any) -> None:
    place.output = torch.zeros(1)


@pytest.mark.parametrize("how", ["order", "position", "value", "unknown", "caught late", "helper", "model's side"])
def test_the_last_line_of_every_error_is_the_users(tiny, tokens, how):
    site = tiny._module.backbone.layers[1].mixer.A
    hook = site.register_forward_hook(lambda module, args, value: 2 * value) if how == "model's side" else None
    with pytest.raises(MambaTraceError) as error, torch.no_grad(), tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            if how == "model's side":
                tiny.layers[1].ssm.A.output[:] = -1
            _ = tiny.layers[1].ssm.y.output
            if how == "order":
                _ = tiny.layers[1].ssm.conv.output
            if how == "position":
                _ = tiny.layers[2].ssm.h[77].output
            if how == "value":
                tiny.layers[2].ssm.delta.output = torch.zeros(1)
            if how == "unknown":
                _ = tiny.layers[2].ssm.delt.output
            if how == "caught late":
                _ = tiny.layers[1].ssm.x_proj.input
            if how == "helper":
                helper(tiny.layers[2].ssm.delta)
        with tracer.invoke(tokens[1:]):
            _ = tiny.lm_head.output
    if hook is not None:
        hook.remove()
    frames = traceback.extract_tb(error.tb)
    assert frames[-1].filename == __file__
    assert (frames[-1].name == "helper") == (how == "helper")


def test_A_edited_by_an_invoke_and_replaced_by_a_hook(tiny: MambaTrace, tokens: Tensor) -> None:
    """The hook's value is for all invokes, and would silently undo what one of them did."""
    site = tiny._module.backbone.layers[1].mixer.A
    handle = site.register_forward_hook(lambda module, args, value: 2 * value)
    message = r"layers\[1\]\.ssm\.A was edited by an invoke and replaced for all of them by a PyTorch hook"
    with torch.no_grad(), pytest.raises(SiteValueError, match=message), tiny.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            tiny.layers[1].ssm.A.output[:] = -1
        with tracer.invoke(tokens[1:]):
            tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace() as tracer:  # without an edit the hook has its way
        with tracer.invoke(tokens[:1]):
            tiny.layers[1].ssm.y.output.save()
        with tracer.invoke(tokens[1:]):
            tiny.lm_head.output.save()
    handle.remove()
