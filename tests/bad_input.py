"""Bad input: what was called, what is wrong with it, the error it must give, and words that its message must hold.

`test_bad_input` runs every case on a model and holds that nothing of it is left: the next trace has the same bits,
so have the parameters, and no hook, worker or file is there that was not before.
"""

# The body of a trace starts on a line of its own.
# ruff: noqa: SIM117

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from conftest import make_hf
from family_models import family_model
from hybrid_models import make_hybrid
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_trace import MambaTrace, flow, interventions, lenses, means, names, porting
from mamba_trace.errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    FileError,
    LayerError,
    MetricError,
    PositionError,
    PromptError,
    SiteOrderError,
    SiteValueError,
    TraceError,
    UnknownSiteError,
)
from mamba_trace.patching import PatchGrid, attribution_grid, logit_diff, patch_grid

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
ONES = torch.ones_like(IDS)
#: A batch for the bodies of traces: [3,9], of no padding token.
BATCH = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(1))


class Case(NamedTuple):
    """A call that must be refused.

    Attributes:
        what: what is wrong with it.
        call: the call, which takes the model of the test.
        error: the type of its exception.
        words: a regular expression that its message must hold.
        on: the model: "mamba", "mamba2", "hybrid" or a demo's name.
    """

    what: str
    call: Callable[[Any], Any]
    error: type[BaseException]
    words: str
    on: str = "mamba"


def run(model: MambaTrace, *prompt: Any, **kwargs: Any) -> None:
    with model.trace(*prompt, **kwargs):
        _ = model.lm_head.output.save()


def invokes(model: MambaTrace, *prompts: Any, **kwargs: Any) -> None:
    with model.trace(**kwargs) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                _ = model.lm_head.output.save()


def inside(call: Callable[[Any], Any]) -> Callable[[Any], None]:
    """``call`` in the body of a trace."""

    def case(model: MambaTrace) -> None:
        with torch.no_grad(), model.trace(IDS):
            call(model)
            _ = model.lm_head.output.save()

    return case


def in_body(call: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    """``call`` in the body of a trace of three prompts, with the tracer."""

    def case(model: MambaTrace) -> None:
        with torch.no_grad(), model.trace(BATCH) as tracer:
            call(model, tracer)
            _ = model.lm_head.output.save()

    return case


def at(path: str, call: Callable[[Any], Any]) -> Callable[[Any], None]:
    """``call`` of the envoy at a path, which keeps its attributes."""

    def case(model: MambaTrace) -> None:
        envoy = model.layers[1].get(path) if path.startswith("ssm") else model.get(path) if path else model
        before = set(envoy.__dict__)
        try:
            call(envoy)
        finally:
            assert set(envoy.__dict__) == before

    return case


def assign(name: str, value: Any = 0) -> Any:
    return lambda envoy: setattr(envoy, name, value)


def cut_to(place: str, value: Any) -> Any:
    return lambda m, tracer: setattr(m.hook(place) if "ssm." in place else m.layers[1].ssm, "output", value)


#: What a run cannot start from.
PROMPTS: dict[str, tuple[Any, str]] = {
    "an empty list": (lambda m: run(m, []), r"the prompt is \[\]: a run needs one prompt at least"),
    "no rows": (lambda m: run(m, IDS[:0]), r"has no rows: its shape is \(0, 6\)"),
    "an empty invoke list": (lambda m: invokes(m, IDS, []), r"a run needs one prompt at least"),
    "None": (
        lambda m: run(m, None),
        r"the prompt is None .*: a run needs a string, a list of strings, token ids",
    ),
    "an invoke of None": (lambda m: invokes(m, IDS, None), r"the prompt is None"),
    "0-D": (
        lambda m: run(m, torch.tensor(3)),
        r"int64 with shape \(\); token ids are integers.* \[L\] or \[B,L\]",
    ),
    "3-D": (lambda m: run(m, IDS[None]), r"shape \(1, 1, 6\); token ids are"),
    "floats": (lambda m: run(m, IDS.float()), r"float32 with shape \(1, 6\).*inputs_embeds= \[B,L,D\]"),
    "bools": (lambda m: run(m, IDS > 2), r"a tensor of torch.bool"),
    "bytes of ids": (lambda m: run(m, IDS.byte()), r"torch.uint8 .*integers, int64 or int32"),
    "a list of bools": (
        lambda m: run(m, [True, False]),
        r"a list holds strings, token ids of one prompt, or rows",
    ),
    "a mixed list": (
        lambda m: run(m, ["t", 5]),
        r"the prompt is \['t', 5\] \(a list\): .* and one kind of these",
    ),
    "a list of None": (lambda m: run(m, [None]), r"the prompt is \[None\]"),
    "a row of floats": (lambda m: run(m, [[1, 2], [1.5]]), r"row 1 of the prompt is \[1.5\]"),
    "a row of text": (lambda m: run(m, [[1, 2], ["a"]]), r"row 1 of the prompt is \['a'\]"),
    "a row that is 3-D": (lambda m: run(m, [IDS[None]]), r"row 0 of the prompt is a tensor of torch.int64"),
    "a number": (
        lambda m: run(m, 5),
        r"must be a string, a list of strings or token ids .*, not 5 \(a int\)",
    ),
    "bytes": (lambda m: run(m, b"Emma"), r"not b'Emma' \(a bytes\)"),
    "an encoding of nothing": (lambda m: run(m, {}), r"or an encoding with input_ids"),
    "an encoding of floats": (
        lambda m: run(m, {"input_ids": IDS.float()}),
        r"input_ids= is a tensor of torch.float32",
    ),
    "two prompts": (
        lambda m: run(m, IDS, IDS),
        r"one prompt, not 2 arguments: give several prompts as a list",
    ),
    "a mask in front": (lambda m: run(m, IDS, torch.ones_like(IDS)), r"everything else by name"),
    "a prompt and ids": (
        lambda m: run(m, IDS, input_ids=IDS),
        r"was given a prompt and input_ids=: give one",
    ),
    "text and ids": (lambda m: run(m, "Emma", input_ids=IDS), r"was given a prompt and input_ids=: give one"),
    "an encoding and ids": (
        lambda m: run(m, {"input_ids": IDS}, input_ids=IDS),
        r"given a prompt and input_ids=",
    ),
    "ids and embeddings": (
        lambda m: run(m, input_ids=IDS, inputs_embeds=torch.zeros(1, 6, 12)),
        r"was given input_ids= and inputs_embeds=",
    ),
    "embeddings of another width": (
        lambda m: run(m, inputs_embeds=torch.zeros(1, 6, 3)),
        r"a floating tensor \[B,L,12\], not a tensor of torch.float32 with shape \(1, 6, 3\)",
    ),
    "embeddings of integers": (
        lambda m: run(m, inputs_embeds=torch.zeros(1, 6, 12).long()),
        r"\[B,L,12\], not",
    ),
    "an unknown argument": (
        lambda m: run(m, IDS, unknown=1),
        r"a trace has no argument 'unknown'.*use_cache",
    ),
    "a misspelt argument": (
        lambda m: run(m, IDS, atention_mask=torch.ones_like(IDS)),
        r"no argument 'atention_mask'; did you mean attention_mask",
    ),
    "an argument of generate": (
        lambda m: run(m, IDS, max_new_tokens=3),
        r"'max_new_tokens'.*model.generate\(prompt, max_new_tokens=...\)",
    ),
    "an unknown argument beside invokes": (
        lambda m: invokes(m, IDS, IDS, unknown=1),
        r"no argument 'unknown'",
    ),
    "truncation of ids": (lambda m: run(m, IDS, truncation=True), r"no argument 'truncation'"),
    "lengths": (
        lambda m: invokes(m, IDS, IDS[:, :3]),
        r"prompts of 3 and 6 tokens .*has no tokenizer to pad them with: fill the shorter",
    ),
    "lengths of a list": (
        lambda m: run(m, [[1, 2, 3], [4]]),
        r"prompts of 1 and 3 tokens .*has no tokenizer",
    ),
    "generate of nothing": (lambda m: m.generate([], max_new_tokens=1), r"a run needs one prompt at least"),
    "generate of floats": (lambda m: m.generate(IDS.float(), max_new_tokens=1), r"token ids are integers"),
    "run_with_hooks(5)": (lambda m: m.run_with_hooks(5), r"the prompt must be a string.*not 5 \(a int\)"),
    "logit_diff of None": (
        lambda m: logit_diff(m, None, 1),
        r"a token is a string that is one token, or its id",
    ),
    "logit_diff of a fraction": (lambda m: logit_diff(m, 1.5, 1), r"or its id, 0 to 30, not a float"),
}

#: path of an envoy, what is done to it, the error, words of it.
PLACES: list[tuple[str, str, Any, type[Exception], str]] = [
    (
        "ssm.h",
        "[1.0]",
        lambda h: h[1.0],
        PositionError,
        r"h\[1.0\]: a position is an integer, .* not a float",
    ),
    ("ssm.h", "['2']", lambda h: h["2"], PositionError, r"h\['2'\]: a position is an integer, .* not a str"),
    ("ssm.h", "[True]", lambda h: h[True], PositionError, r"h\[True\]: a position is an integer"),
    ("ssm.h", "[tensor(True)]", lambda h: h[torch.tensor(True)], PositionError, r"a position is an integer"),
    ("ssm.h", "[None]", lambda h: h[None], PositionError, r"not a NoneType"),
    ("ssm.h", "[...]", lambda h: h[...], PositionError, r"not a ellipsis"),
    (
        "",
        "layers['1']",
        lambda m: m.layers["1"],
        LayerError,
        r"layers\['1'\]: .* layers 0 to 2, named by an integer",
    ),
    (
        "",
        "layers[True]",
        lambda m: m.layers[True],
        LayerError,
        r"layers\[True\]: this model has layers 0 to 2",
    ),
    ("", "layers[1.0]", lambda m: m.layers[1.0], LayerError, r"layers\[1.0\]: this model has layers 0 to 2"),
    (
        "",
        "layers[0, 1]",
        lambda m: m.layers[0, 1],
        LayerError,
        r"named by an integer, -1 for the last, or a slice",
    ),
    (
        "",
        "layers[3]",
        lambda m: m.layers[3],
        LayerError,
        r"^layers\[3\]: .* layers 0 to 2, and no 3$",
    ),
    (
        "",
        "layers.foo",
        lambda m: m.layers.foo,
        UnknownSiteError,
        r"layers has no 'foo': it has the layers \[0\] to",
    ),
    (
        "",
        "get(5)",
        lambda m: m.get(5),
        UnknownSiteError,
        r"get takes a dotted path such as 'layers.3.ssm.h.5', not 5",
    ),
    ("", "get('')", lambda m: m.get(""), UnknownSiteError, r"get takes a dotted path"),
    ("", "get(...9)", lambda m: m.get("layers.9.ssm"), UnknownSiteError, r"it has the layers \[0\] to \[2\]"),
    ("", "foo", lambda m: m.foo, UnknownSiteError, r"model has no 'foo'.*It has: .*lm_head"),
    (
        "",
        "hook(5)",
        lambda m: m.hook(5),
        UnknownSiteError,
        r"named by a string, 'blocks.3.hook_h.5' .*not by the int 5",
    ),
    ("", "hook(None)", lambda m: m.hook(None), UnknownSiteError, r"not by the NoneType None"),
    (
        "",
        "hook_names('5')",
        lambda m: m.hook_names("5"),
        PositionError,
        r"an integer of at least one .*not '5'",
    ),
    ("", "hook_names(0)", lambda m: m.hook_names(0), PositionError, r"at least one position, not 0"),
    ("", "hook_names(2.5)", lambda m: m.hook_names(2.5), PositionError, r"not 2.5"),
    (
        "",
        "get_caching_hooks",
        lambda m: m.get_caching_hooks,
        UnknownSiteError,
        r"hooks are not kept on a model",
    ),
    (
        "ssm.y",
        ".outputs",
        lambda y: y.outputs,
        UnknownSiteError,
        r"y has no 'outputs'; did you mean output.*\.inputs",
    ),
    (
        "ssm.y",
        ".shape",
        lambda y: y.shape,
        UnknownSiteError,
        r"no 'shape'; its value has one: .*y\.output\.shape",
    ),
    ("ssm.y", ".mean", lambda y: y.mean(), UnknownSiteError, r"its value has one: .*y\.output\.mean"),
    (
        "ssm.x_proj",
        ".otput",
        lambda x: x.otput,
        UnknownSiteError,
        r"x_proj has no 'otput'; did you mean output",
    ),
    (
        "ssm.y",
        "[0]",
        lambda y: y[0],
        SiteValueError,
        r"is a place, not a value: index its value, .*y\.output\[0\]",
    ),
    ("ssm.y", "[0] =", lambda y: y.__setitem__(0, 1), SiteValueError, r"assign to .*y\.output\[0\]"),
    ("ssm.y", "for", lambda y: list(y), SiteValueError, r"is a place, not a value: loop over .*y\.output"),
    ("ssm.y", "len", lambda y: len(y), SiteValueError, r"ask for the length of .*y\.output"),
    ("ssm.h.2", "[0]", lambda h: h[0], SiteValueError, r"index its value, .*h\[2\]\.output\[0\]"),
    ("ssm.h.2", "[0] =", lambda h: h.__setitem__(0, 1), SiteValueError, r"assign to .*h\[2\]\.output\[0\]"),
    ("ssm.h.2", "for", lambda h: list(h), SiteValueError, r"loop over layers\[1\]\.ssm\.h\[2\]\.output"),
    ("ssm.h.2", ".source", lambda h: h.source, UnknownSiteError, r"h\[2\] has no 'source'; it has .output"),
    ("ssm.h.2", ".trace", lambda h: h.trace(IDS), UnknownSiteError, r"has no 'trace'; it has .output"),
    (
        "ssm.h",
        "len outside",
        lambda h: len(h),
        SiteValueError,
        r"only while the model runs, in the body of `with",
    ),
    ("ssm.h", "for outside", lambda h: list(h), SiteValueError, r"only while the model runs"),
    (
        "ssm.y",
        "outside",
        lambda y: y.output,
        SiteValueError,
        r"outside of interleaving: it has a value only while",
    ),
    (
        "ssm",
        "skip outside",
        lambda s: s.skip(torch.zeros(1, 6, 12)),
        SiteValueError,
        r"only while the model runs",
    ),
    (
        "ssm.y",
        ".outptu =",
        assign("outptu"),
        UnknownSiteError,
        r"y has no 'outptu' to assign to; did you mean output",
    ),
    (
        "ssm.y",
        ".value =",
        assign("value"),
        UnknownSiteError,
        r"A value is assigned to .output or .input or .inputs",
    ),
    ("ssm.h", ".output_ =", assign("output_"), UnknownSiteError, r"did you mean output"),
    ("ssm.h.2", ".outputs =", assign("outputs"), UnknownSiteError, r"h\[2\] has no 'outputs' to assign to"),
    ("ssm.x_proj", ".otput =", assign("otput"), UnknownSiteError, r"x_proj has no 'otput' to assign to"),
    ("ssm", ".outptu =", assign("outptu"), UnknownSiteError, r"ssm has no 'outptu' to assign to"),
    ("ssm", ".z =", assign("z"), UnknownSiteError, r"ssm has no 'z' to assign to"),
    ("", ".outptu =", assign("outptu"), UnknownSiteError, r"model has no 'outptu' to assign to"),
    ("lm_head", ".outptu =", assign("outptu"), UnknownSiteError, r"lm_head has no 'outptu' to assign to"),
    ("ssm", ".y =", assign("y"), SiteValueError, r"ssm.y is a place, not a value: assign to .*ssm.y.output"),
]

#: What the body of a trace does, the error, words of it.
BODIES: dict[str, tuple[Any, type[Exception], str]] = {
    "a site of a skipped mixer": (
        lambda m, tracer: (m.layers[1].ssm.skip(torch.zeros(3, 9, 12)), m.layers[1].ssm.y.output),
        SiteOrderError,
        r"layers\[1\].ssm.y was never computed in this run, in which layers\[1\].ssm was skipped",
    ),
    "an input that has gone by": (
        lambda m, tracer: (m.layers[1].ssm.y.output, m.layers[1].ssm.x_proj.input),
        SiteOrderError,
        r"layers\[1\].ssm.x_proj.input was asked for when the run had gone past it",
    ),
    "iter[[2, 0]]": (
        lambda m, tracer: tracer.iter[[2, 0]],
        PositionError,
        r"tracer.iter\[\[2, 0\]\]: .* in order",
    ),
    "iter[[1, 1]]": (lambda m, tracer: tracer.iter[[1, 1]], PositionError, r"name each once and ascending"),
    "iter[-1]": (lambda m, tracer: tracer.iter[-1], PositionError, r"steps are integers counted from 0"),
    "iter[-2:]": (
        lambda m, tracer: tracer.iter[-2:],
        PositionError,
        r"tracer.iter\[-2:\]: steps are integers",
    ),
    "iter[True]": (lambda m, tracer: tracer.iter[True], PositionError, r"steps are integers counted from 0"),
    "iter['a']": (lambda m, tracer: tracer.iter["a"], PositionError, r"steps are integers counted from 0"),
    "iter[1.5]": (lambda m, tracer: tracer.iter[1.5], PositionError, r"steps are integers counted from 0"),
    "iter[::2]": (lambda m, tracer: tracer.iter[::2], PositionError, r"name its end, tracer.iter\[:n:2\]"),
    "an endless loop": (
        lambda m, tracer: list(tracer.iter),
        PositionError,
        r"asked the run for nothing in 100000",
    ),
    "cache(5)": (
        lambda m, tracer: tracer.cache(5),
        UnknownSiteError,
        r"takes a list of envoys, paths or hook names",
    ),
    "cache('y')": (
        lambda m, tracer: tracer.cache("layers[1].ssm.y"),
        UnknownSiteError,
        r"takes a list .* not 'layers",
    ),
    "cache([5])": (lambda m, tracer: tracer.cache([5]), UnknownSiteError, r"a place is named by a string"),
    "barrier('a')": (
        lambda m, tracer: tracer.barrier("a"),
        SiteValueError,
        r"the number of invokes .*not 'a'",
    ),
    "barrier(0)": (lambda m, tracer: tracer.barrier(0), SiteValueError, r"the number of invokes .*not 0"),
    "ssm.output = 5": (
        cut_to("ssm", 5),
        SiteValueError,
        r"layers\[1\].ssm takes a tensor of shape \(3, 9, 12\)",
    ),
    "ssm.output of another shape": (
        cut_to("ssm", torch.zeros(2, 2)),
        SiteValueError,
        r"takes shape \(3, 9, 12\) \[B",
    ),
    "layers[1].output = None": (
        lambda m, tracer: setattr(m.layers[1], "output", None),
        SiteValueError,
        r"layers\[1\] takes a tensor of shape \(3, 9, 12\) \[B batch, L positions, D d_model\], not a "
        r"NoneType",
    ),
    "x_proj.output = 5": (
        lambda m, tracer: setattr(m.layers[1].ssm.x_proj, "output", 5),
        SiteValueError,
        r"x_proj takes a tensor of shape \(3, 9, 14\), not a int",
    ),
    "x_proj.output of another shape": (
        lambda m, tracer: setattr(m.layers[1].ssm.x_proj, "output", torch.zeros(2, 2)),
        SiteValueError,
        r"x_proj takes shape \(3, 9, 14\), not \(2, 2\)",
    ),
    "x_proj.input = 5": (
        lambda m, tracer: setattr(m.layers[1].ssm.x_proj, "input", 5),
        SiteValueError,
        r"x_proj.input takes a floating tensor .*\(3, 9, 24\) of torch.float32, .*not int",
    ),
    "x_proj.inputs = 5": (
        lambda m, tracer: setattr(m.layers[1].ssm.x_proj, "inputs", 5),
        SiteValueError,
        r"x_proj.inputs takes all inputs as \(args, kwargs\).* not a int",
    ),
    "embeddings.input of floats": (
        lambda m, tracer: setattr(m.embeddings, "input", torch.zeros(3, 9)),
        SiteValueError,
        r"embeddings.input takes an integer tensor .* of torch.int64",
    ),
    "backbone.output = 5": (
        lambda m, tracer: setattr(m.backbone, "output", 5),
        SiteValueError,
        r"backbone.output takes a MambaOutput, not a int",
    ),
    "x_proj.skip(5)": (
        lambda m, tracer: m.layers[1].ssm.x_proj.skip(5),
        SiteValueError,
        r"x_proj.skip\(...\) takes what stands for the output .* a floating tensor of 3 rows, not int",
    ),
    "lm_head.skip(5)": (lambda m, tracer: m.lm_head.skip(5), SiteValueError, r"lm_head.skip\(...\) takes"),
    "ssm.y.skip(5)": (
        lambda m, tracer: m.layers[1].ssm.y.skip(5),
        SiteValueError,
        r"ssm.y.skip\(...\) takes",
    ),
    "a misspelt value": (
        lambda m, tracer: setattr(m.layers[1].ssm.y, "outptu", 0),
        UnknownSiteError,
        r"no 'outptu' to assign to; did you mean output",
    ),
}


def place(path: str, call: Callable[[Any], Any], error: type[Exception], words: str, on: str = "mamba") -> Case:
    return Case(f"{path} {words}", at(path, call), error, words, on)


def mask(value: Any, words: str) -> Case:
    return Case(f"a mask: {words}", lambda m: run(m, IDS, attention_mask=value), PromptError, words)


MASKS = [
    mask(ONES * float("nan"), "attention_mask"),
    mask(ONES * 0.5, "attention_mask"),
    mask(ONES * 2, "attention_mask.*2"),
    mask(-ONES, "attention_mask.*-1"),
    mask(ONES[None, None], r"of the shape \[1, 6\] of the tokens, not \[1, 1, 1, 6\]"),
    mask(ONES[:, :3], r"not \[1, 3\]"),
    mask(torch.ones(1, 9), r"not \[1, 9\]\. Columns for tokens before these need the cache"),
    mask(torch.tensor(1), r"not \[\]"),
    mask("abc", "attention_mask is 1 on each token .* not a str"),
    mask(torch.ones(2, 6), r"not \[2, 6\]"),
    mask(torch.tensor([[1, 0, 1, 1, 0, 1]]), "between"),
    mask(ONES.to(torch.complex64), "not torch.complex64"),
    mask(ONES.to("meta"), "on the meta device holds no numbers"),
    mask(ONES.to_sparse(), "of layout torch.sparse_coo"),
]

SHAPES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "unsqueeze_": (lambda x: x.unsqueeze_(0), r"was \(1, 6, \d+\) of torch.float32.*made it \(1, 1, 6, \d+\)"),
    "squeeze_": (lambda x: x.squeeze_(0), r"made it \(6, \d+\).*reshape a copy, .*\.clone\(\)"),
    "transpose_": (lambda x: x.transpose_(1, 2), r"made it \(1, \d+, 6\)"),
    "resize_": (lambda x: x.resize_(1, 2), r"made it \(1, 2\)"),
    "data": (lambda x: setattr(x, "data", torch.zeros(2)), r"made it \(2,\)"),
    "data of another dtype": (lambda x: setattr(x, "data", x.double()), "made it .* of torch.float64"),
    "its memory": (lambda x: x.untyped_storage().resize_(0), "made it lose its memory"),
}
IN_PLACE = [
    Case(f"{path}: {how}", inside(lambda m, e=edit, p=path: e(m.hook(p).output)), SiteValueError, words, on)
    for how, (edit, words) in SHAPES.items()
    for on, path in (
        ("mamba", "layers[1].ssm.y"),
        ("mamba2", "layers[0].ssm.conv"),
        ("hybrid", "layers[0].resid_pre"),
        ("mamba", "lm_head"),
    )
]
H_IN_PLACE = [
    Case("h[2]: unsqueeze_", inside(lambda m: m.layers[1].ssm.h[2].output.unsqueeze_(0)), SiteValueError, r"h\[2\]", on)
    for on in ("mamba", "mamba2", "hybrid")
] + [
    Case(
        "an input: unsqueeze_",
        inside(lambda m: m.norm_f.input.unsqueeze_(0)),
        SiteValueError,
        r"norm_f\.input was \(1, 6, 12\)",
    ),
]


def given(make: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    """What ``make`` makes of a value is assigned to its place."""

    def call(m: Any) -> None:
        place = m.layers[1].ssm.conv
        place.output = make(place.output)

    return inside(call)


VALUES = [
    Case(
        "sparse",
        given(lambda x: x.to_sparse()),
        SiteValueError,
        r"conv takes a dense tensor.*sparse_coo: use .to_dense",
    ),
    Case("sparse rows", given(lambda x: x[0].to_sparse_csr()), SiteValueError, "layout is sparse_csr"),
    Case("mkldnn", given(lambda x: x.to_mkldnn()), SiteValueError, "layout is mkldnn"),
    Case(
        "nested",
        given(lambda x: torch.nested.nested_tensor([x[0], x[0]])),
        SiteValueError,
        "is nested: use torch.nested",
    ),
    Case("meta", given(lambda x: x.to("meta")), SiteValueError, "meta device"),
    Case("complex", given(lambda x: x.to(torch.complex64)), SiteValueError, "takes a floating tensor.*complex64"),
    Case("integers", given(lambda x: x.long()), SiteValueError, r"int64: use .float\(\)"),
    Case("a list", given(lambda x: x.tolist()), SiteValueError, "not a list.*torch.as_tensor"),
    Case("an array", given(lambda x: x.numpy()), SiteValueError, "not a ndarray.*torch.as_tensor"),
    Case(
        "sparse skip",
        inside(lambda m: m.layers[0].ssm.skip(m.layers[0].norm.output.to_sparse())),
        SiteValueError,
        "dense",
    ),
    Case(
        "sparse input",
        inside(lambda m: setattr(m.norm_f, "input", m.norm_f.input.to_sparse())),
        SiteValueError,
        "dense",
    ),
    Case(
        "sparse from a hook",
        lambda m: m.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_y", lambda y, hook: y.to_sparse())]),
        SiteValueError,
        "what the hook on blocks.1.hook_y returned: .*dense",
    ),
]

HOOK = "blocks.1.hook_y"
NAMES = [
    place("", lambda m: m.layers[1:].ssm, UnknownSiteError, r"a list of 2 blocks, which has no 'ssm': write a loop"),
    place("", lambda m: setattr(m.layers[:1], "output", 0), UnknownSiteError, "has no 'output': write a loop"),
    place("", lambda m: m.layers[:"a"], LayerError, r"layers\[None:'a':None\]: a slice of the layers 0 to 2"),
    place("", lambda m: m.layers[True:], LayerError, "has integers"),
    place("", lambda m: m.layers[::0], LayerError, "a step that is not 0"),
    place("", lambda m: m.layers.output, UnknownSiteError, r"layers has no 'output'.*name one, layers\[0\]\.output"),
    place("", lambda m: setattr(m.layers, "output", 0), UnknownSiteError, "layers has no 'output'"),
    place("", lambda m: m.get("blocks.0.hook_h.5"), UnknownSiteError, r"model\.hook\('blocks.0.hook_h.5'\)"),
    place("ssm.y", lambda y: y > 0, SiteValueError, r"compute with .*ssm\.y\.output"),
    place("ssm.y", lambda y: y // 2, SiteValueError, "is a place, not a value"),
    place("ssm.y", abs, SiteValueError, "compute with"),
    place("ssm.y", float, SiteValueError, "not a value: compute"),
    place("ssm.y", torch.relu, SiteValueError, r"give relu\(\.\.\.\) .*ssm\.y\.output"),
    place("ssm.y", lambda y: torch.stack([y]), SiteValueError, r"give stack\(\.\.\.\)"),
    place("ssm.y", lambda y: torch.zeros(1) + y, SiteValueError, r"give add\(\.\.\.\)"),
    place("ssm", lambda ssm: ssm + 1, SiteValueError, r"compute with layers\[1\]\.ssm\.output"),
    place("ssm.x_proj", lambda x: 2 * x, SiteValueError, r"compute with .*x_proj\.output"),
    Case("to_path(5)", lambda m: names.to_path(5), UnknownSiteError, "named by a string"),
    Case("to_hook_name(None)", lambda m: names.to_hook_name(None), UnknownSiteError, "named by a string"),
    Case("hook of bytes", lambda m: m.hook(b"hook_embed"), UnknownSiteError, "not by the bytes"),
    Case("attention of a Mamba", lambda m: m.layers[0].attn, UnknownSiteError, "a Mamba has no attention"),
]

RUNS = [
    Case("ids on meta", lambda m: run(m, IDS.to("meta")), PromptError, "on the meta device, which holds no numbers"),
    Case("sparse ids", lambda m: run(m, IDS.to_sparse()), PromptError, r"sparse_coo: use .to_dense\(\)"),
    Case("an array of objects", lambda m: run(m, IDS.numpy().astype(object)), PromptError, "not an array of integers"),
    Case("an array of text", lambda m: run(m, IDS.numpy().astype(str)), PromptError, "not an array of integers"),
    Case("an id of 70 bits", lambda m: run(m, [[2**70]]), PromptError, "is in no vocabulary"),
    Case(
        "text as input_ids", lambda m: run(m, {"input_ids": "Emma"}), PromptError, r"input_ids= must be token ids \[L\]"
    ),
    Case(
        "an encoding's key",
        lambda m: run(m, {"input_ids": IDS, "foo": 1}),
        PromptError,
        "encoding has no argument 'foo'",
    ),
    Case("an empty residual stream", lambda m: run(m, inputs_embeds=torch.zeros(1, 0, 12)), PromptError, r"\[B,L,12\]"),
    Case(
        "embeddings on meta", lambda m: run(m, inputs_embeds=torch.zeros(1, 2, 12, device="meta")), PromptError, "meta"
    ),
    Case("past_key_values", lambda m: run(m, IDS, past_key_values=object()), PromptError, "goes in as cache="),
    Case("cache_params", lambda m: run(m, IDS, cache_params=object()), PromptError, "goes in as cache=", "hybrid"),
    Case(
        "a cache that is none", lambda m: run(m, IDS, cache=5), PromptError, "cache= takes the cache of an earlier run"
    ),
    Case("use_cache", lambda m: run(m, IDS, use_cache="perhaps"), PromptError, "use_cache= takes True or False"),
    Case("logits_to_keep", lambda m: run(m, IDS, logits_to_keep=-1), PromptError, "how many of the last positions"),
    Case("labels of text", lambda m: run(m, IDS, labels="abc"), PromptError, "labels= takes an integer tensor"),
    Case("labels of floats", lambda m: run(m, IDS, labels=IDS.float()), PromptError, "labels= takes an integer tensor"),
    Case("labels of no token", lambda m: run(m, IDS, labels=IDS + 99), PromptError, "labels= has 100, .*0 to 30; -100"),
    Case("labels of another length", lambda m: run(m, IDS, labels=IDS[:, :3]), PromptError, r"\[1, 6\], not \[1, 3\]"),
    Case(
        "position_ids of text", lambda m: run(m, IDS, position_ids="a"), PromptError, "position_ids= takes an integer"
    ),
    Case(
        "max_new_tokens='a'", lambda m: m.generate(IDS, max_new_tokens="a"), PromptError, "max_new_tokens= takes an int"
    ),
    Case("max_new_tokens=1.5", lambda m: m.generate(IDS, max_new_tokens=1.5), PromptError, "takes an integer, not 1.5"),
    Case(
        "num_beams=True", lambda m: m.generate(IDS, num_beams=True, max_new_tokens=1), PromptError, "num_beams= takes"
    ),
    Case("to_string(-1)", lambda m: m.to_string(-1), PromptError, "token -1 is not in the vocabulary", "demo"),
    Case("to_string(True)", lambda m: m.to_string(True), PromptError, "integers, not torch.bool", "demo"),
    Case("to_string(1.5)", lambda m: m.to_string(1.5), PromptError, "takes token ids, which are integers", "demo"),
    Case("to_string('a')", lambda m: m.to_string("a"), PromptError, "to_string takes token ids", "demo"),
    Case("to_string on meta", lambda m: m.to_string(IDS.to("meta")), PromptError, "to_string takes token ids", "demo"),
    Case("to_tokens(5)", lambda m: m.to_tokens(5), PromptError, "takes a string or a list of strings", "demo"),
    Case("to_single_token('')", lambda m: m.to_single_token(""), PromptError, "is 0 tokens", "demo"),
    Case("text of no token", lambda m: run(m, ""), PromptError, "has no tokens", "demo"),
    Case("text of no token in a list", lambda m: run(m, ["", "Emma"]), PromptError, "has no tokens", "demo"),
    Case("text in Mamba-2", lambda m: run(m, "Emma"), PromptError, "has no tokenizer", "mamba2"),
    Case("a Mamba-2's 3-D ids", lambda m: run(m, IDS[None]), PromptError, "token ids are integers", "mamba2"),
    Case("a hybrid's empty batch", lambda m: run(m, IDS[:0]), PromptError, "has no rows", "hybrid"),
]


def nested(model: MambaTrace) -> None:
    with model.trace(IDS):
        with model.trace(IDS):
            _ = model.lm_head.output.save()


def invoke_in_a_run(model: MambaTrace) -> None:
    with model.trace(IDS) as tracer:
        with tracer.invoke(IDS):
            _ = model.lm_head.output.save()


def invoke_on_the_same_line(model: MambaTrace) -> None:
    with model.trace() as tracer, tracer.invoke(IDS):
        _ = model.lm_head.output.save()


def invoke_after_the_end(model: MambaTrace) -> None:
    with model.trace(IDS) as tracer:
        _ = model.lm_head.output.save()
    with tracer.invoke(IDS):
        _ = model.lm_head.output.save()


def no_prompt(model: MambaTrace) -> None:
    with model.trace() as tracer:
        with tracer.invoke():
            _ = model.lm_head.output.save()


def without_a_prompt(ask: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    """What a body asks for, in a trace that has invokes alone."""

    def call(model: MambaTrace) -> None:
        with model.trace() as tracer:
            with tracer.invoke(IDS):
                _ = model.lm_head.output.save()
            ask(model, tracer)

    return call


def below_a_skipped_block(model: MambaTrace) -> None:
    with model.trace(IDS):
        model.layers[0].skip(model.embeddings.output)
        _ = model.layers[0].ssm.h[2].output.save()


def in_another_thread(model: MambaTrace) -> None:
    caught: list[BaseException] = []

    def read() -> None:
        try:
            _ = model.layers[0].ssm.y.output
        except Exception as error:
            caught.append(error)

    with model.trace(IDS):
        _ = model.embeddings.output
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    raise caught[0]


def interrupted(model: MambaTrace) -> None:
    with model.trace(IDS):
        model.layers[0].ssm.h[1].output[:] = 0
        raise KeyboardInterrupt


def raising(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("of the user's own")


def a_hook_that_raises(model: MambaTrace) -> None:
    handle = model._module.get_submodule("backbone.layers.1").register_forward_hook(raising)
    try:
        run(model, IDS)
    finally:
        handle.remove()


def backward_that_raises(model: MambaTrace) -> None:
    model.run_with_hooks(IDS, bwd_hooks=[(HOOK, raising)], return_type="loss").backward()


OTHER = MambaTrace(make_hf())
NO_PROMPT = "this trace has no prompt.*Give it one, .*or ask in the body of an invoke"
TRACES = [
    Case("a trace in a trace", nested, TraceError, "one trace at a time"),
    Case("run_with_cache in a trace", inside(lambda m: m.run_with_cache(IDS)), TraceError, "a trace of its own"),
    Case("generate in a trace", inside(lambda m: m.generate(IDS, max_new_tokens=1)), TraceError, "a run of its own"),
    Case("a grid in a trace", inside(lambda m: grid(m)), TraceError, "patch_grid is a trace of its own"),
    Case("an invoke in a run", invoke_in_a_run, TraceError, "already running. Give trace\\(\\) no prompt"),
    Case("an invoke on the line of its trace", invoke_on_the_same_line, TraceError, "a line of its own"),
    Case("an invoke after the end", invoke_after_the_end, TraceError, "this trace is over. Open another"),
    Case("no invoke has a prompt", no_prompt, PromptError, "no invoke of this trace has a prompt"),
    *(
        Case(f"{what} in a trace without a prompt", without_a_prompt(ask), SiteValueError, f"^{what}: {NO_PROMPT}")
        for what, ask in {
            r"layers\[0\].ssm.y": lambda m, tracer: m.layers[0].ssm.y.output,
            r"layers\[0\].ssm.h\[2\]": lambda m, tracer: m.layers[0].ssm.h[2].output,
            r"layers\[0\]": lambda m, tracer: m.layers[0].skip(torch.zeros(1)),
            "lm_head": lambda m, tracer: setattr(m.lm_head, "output", torch.zeros(1)),
            "lm_head.input": lambda m, tracer: m.lm_head.input,
            "zero_delta": lambda m, tracer: flow.zero_delta(m, [1]),
            "tracer.iter": lambda m, tracer: list(tracer.iter[:2]),
            "tracer.result": lambda m, tracer: tracer.result,
        }.items()
    ),
    Case(
        "below a skipped block",
        below_a_skipped_block,
        SiteOrderError,
        r"h\[2\] was never computed.*layers\[0\] was skip",
    ),
    Case("a site in another thread", in_another_thread, SiteValueError, "only while the model runs"),
    Case("Ctrl-C in a trace", interrupted, KeyboardInterrupt, ""),
    Case("an exception in a body", inside(raising), ZeroDivisionError, "of the user's own"),
    Case("an exception in a PyTorch hook", a_hook_that_raises, ZeroDivisionError, "of the user's own"),
    Case(
        "an exception in a hook", lambda m: m.run_with_hooks(IDS, fwd_hooks=[(HOOK, raising)]), ZeroDivisionError, "own"
    ),
    Case("an exception in a backward hook", backward_that_raises, ZeroDivisionError, "of the user's own"),
    Case("an exception in a filter", lambda m: m.run_with_cache(IDS, names_filter=raising), ZeroDivisionError, "own"),
    Case("an exception in a metric", lambda m: grid(m, metric=raising), ZeroDivisionError, "of the user's own"),
    Case(
        "a cache of another model", in_body(lambda m, t: t.cache([OTHER.lm_head])), UnknownSiteError, "of another model"
    ),
    Case("a cache of the layers", in_body(lambda m, t: t.cache([m.layers])), UnknownSiteError, r"list\(model.layers\)"),
    Case("kernels=5", lambda m: setattr(m, "kernels", 5), BackendError, "no backend is called 5"),
    Case("kernels='cuda'", lambda m: setattr(m, "kernels", "cuda"), BackendError, "cuda"),
]


def grid(model: MambaTrace, **changes: Any) -> Any:
    asked = {"prompt": IDS, "source": IDS + 1, "progress": False, **changes}
    asked.setdefault("metric", logit_diff(model, 1, 2))
    return patch_grid(model, asked.pop("prompt"), asked.pop("source"), **asked)


def of_grid(error: type[Exception], words: str, **changes: Any) -> Case:
    given = {name: "a function" if callable(value) else value for name, value in changes.items()}
    return Case(f"a grid with {given}: {words}", lambda m: grid(m, **changes), error, words)


GRIDS = [
    of_grid(UnknownSiteError, "nope", site="nope"),
    of_grid(PositionError, "position", site="A"),
    of_grid(MetricError, "needs a metric", metric=None),
    of_grid(MetricError, "needs a metric", metric={"a": 5}),
    of_grid(MetricError, r"one number for each row \[B\]", metric=lambda logits: logits.sum()),
    of_grid(MetricError, "returned a NoneType", metric=lambda logits: None),
    of_grid(MetricError, "a tensor on the meta device", metric=lambda logits: logits[:, 0].to("meta")),
    of_grid(MetricError, "a tensor of layout torch.sparse_coo", metric=lambda logits: logits[:, 0].to_sparse()),
    of_grid(MetricError, "unpatched runs is nan", metric=lambda logits: logits[:, 0] * float("nan")),
    of_grid(PositionError, "metric_positions", metric_positions=99),
    of_grid(LayerError, "window=0", window=0),
    of_grid(ArgumentError, "window=1.5: that is an integer", window=1.5),
    of_grid(LayerError, "layers=99", layers=99),
    of_grid(LayerError, "names no layer", layers=[]),
    of_grid(ArgumentError, "batch_size=0", batch_size=0),
    of_grid(ArgumentError, "memory='x'", memory="x"),
    of_grid(FileError, "keep=5.5 names no folder", keep=5.5),
    of_grid(FileError, "keep='' names no folder", keep=""),
    of_grid(FileError, "cannot keep the cells", keep=__file__),
    of_grid(PromptError, "has 6 tokens and source 3", source=IDS[:, :3]),
    of_grid(PromptError, "on meta in the layout", prompt=IDS.to("meta")),
    of_grid(PromptError, "prompt must be one prompt", prompt=IDS.repeat(2, 1)),
    Case("a grid of a module", lambda m: patch_grid(m._module, IDS, IDS), ArgumentError, r"MambaTrace\(module\)"),
    Case("a metric of no model", lambda m: logit_diff(None, 1, 2), ArgumentError, "not a NoneType"),
    Case("a metric of True", lambda m: logit_diff(m, True, 2), PromptError, "a token is .* not a bool"),
    Case("a metric of one token", lambda m: logit_diff(m, 1, 1), PromptError, "never differ"),
    Case(
        "an estimate in 0 steps",
        lambda m: attribution_grid(m, IDS, IDS + 1, metric=logit_diff(m, 1, 2), steps=0),
        ArgumentError,
        "steps=0",
    ),
    Case("a grid compared with 5", lambda m: grid(m).correlation(5), MetricError, "another PatchGrid, not with a int"),
    Case("knockout of no model", lambda m: flow.knockout(5, 0, 1), ArgumentError, "takes a MambaTrace"),
    Case("knockout outside", lambda m: flow.knockout(m, 0, 1), SiteValueError, "call it inside"),
    Case(
        "apply(5)", inside(lambda m: flow.apply(m, 5)), ArgumentError, "takes Cut and ZeroDelta, one or several, not 5"
    ),
    Case("apply([5])", inside(lambda m: flow.apply(m, [5])), ArgumentError, r"not \[5\]"),
    Case("ablate(5)", inside(lambda m: interventions.ablate(5)), SiteValueError, "ablate"),
    Case("ablate outside", lambda m: interventions.ablate(m.layers[0].ssm.y), SiteValueError, "inside"),
    Case(
        "steer by 3 numbers",
        inside(lambda m: interventions.steer(m.layers[0].ssm.y, torch.zeros(3))),
        SiteValueError,
        "3",
    ),
    Case("a mean of 5", lambda m: means.mean_activation(m, 5, "y"), PromptError, "prompts are strings"),
    Case(
        "a mean of batches of 'a'",
        lambda m: means.mean_activation(m, IDS, "y", batch_size="a"),
        ArgumentError,
        "batch_size",
    ),
    Case("a lens of 'a' tokens", lambda m: lenses.logit_lens(m, IDS, top="a"), ArgumentError, "top='a'"),
    Case("a lens of no token", lambda m: lenses.logit_lens(m, IDS, token=99), PromptError, "token 99 is not in"),
    Case("stack_activation(5)", lambda m: m.run_with_cache(IDS)[1].stack_activation(5), UnknownSiteError, "a site"),
    Case(
        "pos_slice=99", lambda m: m.run_with_cache(IDS)[1].decompose_resid(pos_slice=99), PositionError, "6 positions"
    ),
    Case("port_name(5)", lambda m: porting.port_name(5), UnknownSiteError, "takes a hook name"),
    Case("port_file(5)", lambda m: porting.port_file(5), FileError, "port_script takes its text"),
    Case("port_script(5)", lambda m: porting.port_script(5), FileError, "port_file takes its path"),
]

MODELS = [
    Case("MambaTrace(5)", lambda m: MambaTrace(5), Exception, ""),
    Case("a linear map", lambda m: MambaTrace(torch.nn.Linear(2, 2)), CheckpointError, "it knows MambaForCausalLM"),
    Case("demo([])", lambda m: MambaTrace.demo([]), CheckpointError, r"no demo of \[\] ships; there are 'mamba'"),
    Case("an argument", lambda m: MambaTrace(make_hf(), kernel="cpu"), CheckpointError, "no argument kernel.*kernels"),
    Case(
        "a dtype for a module",
        lambda m: MambaTrace(make_hf(), dtype=torch.float16),
        CheckpointError,
        "dtype= decides how",
    ),
    Case("a tokenizer's name", lambda m: MambaTrace(make_hf(), tokenizer="gpt2"), ArgumentError, "AutoTokenizer"),
    Case("tokenizer_kwargs=5", lambda m: MambaTrace(make_hf(), tokenizer_kwargs=5), ArgumentError, "takes a dict"),
    Case(
        "a misspelt attribute of the tokenizer",
        lambda m: MambaTrace.demo(tokenizer_kwargs={"padding_sid": "left"}),
        ArgumentError,
        "'padding_sid', which is no attribute .*; did you mean padding_side",
    ),
    *(
        Case(f"from_config {words}", lambda m, c=config, k=more: MambaTrace.from_config(c, **k), error, words)
        for config, more, error, words in [
            (
                {"d_model": 8, "n_layer": 1, "vocab_size": 20, "n_layers": 2},
                {},
                CheckpointError,
                "two names of one field",
            ),
            (
                {"d_model": 8, "n_layers": 1, "vocab_size": 20, "N": 3, "d_state": 4},
                {},
                CheckpointError,
                "N=3 and d_state=4",
            ),
            ({"d_model": 8, "n_layer": 1, "vocab_size": 20, "ssm_cfg": {"d_stat": 2}}, {}, CheckpointError, "d_state"),
            ({"model_type": "mamba", "hidden_siz": 8}, {}, CheckpointError, "did you mean hidden_size"),
            ({"d_model": 8, "n_layer": 0, "vocab_size": 20}, {}, CheckpointError, "at least 1"),
            ({"d_model": 10**7, "n_layer": 4000, "vocab_size": 20}, {}, CheckpointError, "parameters .*are built"),
            ({"d_model": 8, "n_layer": 1, "vocab_size": 20}, {"seed": "x"}, ArgumentError, "seed='x'"),
            ({"d_model": 8, "n_layer": 1, "vocab_size": 20}, {"seed": 2**70}, ArgumentError, "64 bits"),
            ({"d_model": 8, "n_layer": 1, "vocab_size": 20}, {"dtype": torch.int8}, CheckpointError, "no dtype"),
            ({"d_model": 8, "n_layer": 1, "vocab_size": 20}, {"unknown": 1}, CheckpointError, "no argument unknown"),
            (5, {}, CheckpointError, "found int"),
        ]
    ),
    *(
        Case(
            f"from_state_dict {words}", lambda m, c=change: c(m.config, m._module.state_dict()), CheckpointError, words
        )
        for change, words in [
            (lambda c, s: MambaTrace.from_state_dict(c, 5), "maps names to tensors, and this is a int"),
            (lambda c, s: MambaTrace.from_state_dict(c, {}), "not the state dict"),
            (lambda c, s: MambaTrace.from_state_dict(c, {k: v.long() for k, v in s.items()}), "are floating: use"),
            (lambda c, s: MambaTrace.from_state_dict(c, {k: v.to("meta") for k, v in s.items()}), "meta device"),
            (lambda c, s: MambaTrace.from_state_dict(c, {k: v.to_sparse() for k, v in s.items()}), "sparse_coo"),
            (lambda c, s: MambaTrace.from_state_dict(c, {k: v[:1] for k, v in s.items()}), "expected"),
            (lambda c, s: MambaTrace.from_state_dict(5, s), "expected a configuration"),
        ]
    ),
]


# -- files -------------------------------------------------------------------------------------------------


class Code:
    """A pickle of this would write a file when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


WEIGHTS = "model.safetensors"


@functools.cache
def good_checkpoint() -> tempfile.TemporaryDirectory[str]:
    """A folder with a checkpoint that nothing is wrong with, which lasts as long as the tests run."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory()
    make_hf().save_pretrained(folder.name)
    return folder


def loading(change: Callable[[Path], Any]) -> Callable[[Any], None]:
    """Load a checkpoint, in the working directory, whose files ``change`` has changed."""

    def case(model: Any) -> None:
        shutil.copytree(good_checkpoint().name, "checkpoint")
        change(Path("checkpoint"))
        try:
            MambaTrace("checkpoint", dispatch=True)
        finally:
            assert not Path("executed").exists()

    return case


def weights(change: Callable[[bytes], bytes]) -> Callable[[Any], None]:
    return loading(lambda f: (f / WEIGHTS).write_bytes(change((f / WEIGHTS).read_bytes())))


def config(**fields: Any) -> Callable[[Any], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return loading(change)


def text(name: str, content: str) -> Callable[[Any], None]:
    return loading(lambda folder: (folder / name).write_text(content))


def pickled(content: bytes | None) -> Callable[[Any], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        if content is None:
            torch.save({"backbone.x": Code()}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(content)

    return loading(change)


def index(file: Any) -> Callable[[Any], None]:
    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), file)
        (folder / WEIGHTS).rename(folder / "other.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return loading(change)


def huge(_: bytes) -> bytes:
    tensor = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}
    header = json.dumps({"backbone.embeddings.weight": tensor}).encode()
    return struct.pack("<Q", len(header)) + header


def without(folder: Path) -> None:
    kept = {name: value for name, value in load_file(folder / WEIGHTS).items() if "A_log" not in name}
    save_file(kept, folder / WEIGHTS)


def result(change: Callable[[Path], Any], name: str = "grid.json") -> Callable[[Any], Any]:
    """Load a result from a file that ``change`` has changed."""

    def case(model: MambaTrace) -> None:
        change(grid(model, layers=0).save(name))
        PatchGrid.load(name)

    return case


def replaced(old: str, new: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(file.read_text().replace(old, new))


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def saved_while(failing: Callable[..., Any], name: str, attribute: str = "write_text") -> Callable[[Any], None]:
    """Save a grid over an older one while the system fails in the middle: the older one stays."""

    def case(model: MambaTrace) -> None:
        values = grid(model, layers=0)
        before = values.save(name).read_bytes()
        owner: Any = Path if attribute == "write_text" else __import__("mamba_trace.results.stored", fromlist=["x"])
        working = getattr(owner, attribute)

        def half(*args: Any, **kwargs: Any) -> None:
            working(*args, **kwargs)
            failing()

        setattr(owner, attribute, half)
        try:
            values.save(name)
        finally:
            setattr(owner, attribute, working)
            assert Path(name).read_bytes() == before
            assert os.listdir(".") == [name]

    return case


FILES = [
    Case("half of the weights", weights(lambda b: b[: len(b) // 2]), CheckpointError, "it may be incomplete"),
    Case("no byte of the weights", weights(lambda b: b""), CheckpointError, "it has 0 bytes"),
    Case("a header of noise", weights(lambda b: b[:10] + b"\xff" * 20 + b[30:]), CheckpointError, "cannot be read"),
    Case("a header of 2^60 bytes", weights(lambda b: struct.pack("<Q", 2**60) + b[8:]), CheckpointError, "too large"),
    Case("a tensor of 10^18 numbers", weights(huge), CheckpointError, "overflow"),
    Case("missing weights", loading(without), CheckpointError, "A_log"),
    Case("a pickle with code", pickled(None), CheckpointError, "loading it could run code, so it is refused"),
    Case("a bare pickle with code", pickled(pickle.dumps(Code())), CheckpointError, "could run code, so it is refused"),
    Case("no pickle", pickled(b"noise"), CheckpointError, "no file of weights that torch.save wrote"),
    Case(
        "an index that leads out", index("../other.safetensors"), CheckpointError, "not in the folder of the checkpoint"
    ),
    Case("an index of /etc/passwd", index("/etc/passwd"), CheckpointError, "and so is not read"),
    Case("an index of a missing file", index("nope.safetensors"), CheckpointError, "nope.safetensors is not there"),
    Case("an index of numbers", index(5), CheckpointError, "with a string, found 5"),
    Case("no JSON", text("config.json", "abc"), CheckpointError, "is not JSON"),
    Case("an empty config.json", text("config.json", ""), CheckpointError, "it is empty"),
    Case("a list as config.json", text("config.json", "[]"), CheckpointError, "must hold a JSON object, found a list"),
    Case("JSON 100,000 lists deep", text("config.json", "[" * 100_000), CheckpointError, "is not JSON"),
    Case("no generation_config", text("generation_config.json", "abc"), CheckpointError, "is not JSON"),
    Case(
        "another model", text("config.json", '{"model_type": "gpt2"}'), CheckpointError, "says model_type 'gpt2'; only"
    ),
    Case("10^9 layers", config(num_hidden_layers=10**9), CheckpointError, "At most 4096 layers are built"),
    Case("no layers", config(num_hidden_layers=0), CheckpointError, "at least 1"),
    Case("a width of 10^12", config(hidden_size=10**12), CheckpointError, "declares hidden_size 1000000000000"),
    Case("a state of text", config(state_size="a"), CheckpointError, "state_size"),
    Case("a config of another shape", config(conv_kernel=99), CheckpointError, "declares conv_kernel 99"),
    Case("no such folder", lambda m: MambaTrace("/nonexistent/folder", dispatch=True), CheckpointError, "nonexistent"),
    Case(
        "half of a result", result(lambda f: f.write_text(f.read_text()[:99])), FileError, "no result that Result.save"
    ),
    Case(
        "a result of another class", result(replaced("PatchGrid", "os.system")), FileError, "no class of results known"
    ),
    Case("a result's dtype", result(replaced('"float32"', '"load"')), FileError, "no result that Result.save wrote"),
    Case("a result of 10^11 rows", result(replaced('"shape": [1,', '"shape": [100000000000,')), FileError, "no result"),
    Case("a result 100,000 lists deep", result(lambda f: f.write_text("[" * 100_000)), FileError, "no result"),
    Case(
        "a result without a field",
        result(replaced('"metric":', '"metrik":')),
        FileError,
        "another version of PatchGrid",
    ),
    Case("half of a safetensors", result(lambda f: os.truncate(f, 99), "g.safetensors"), FileError, "no result"),
    Case("a result's path", lambda m: PatchGrid.load(5), FileError, "named by a string or a Path, not by 5"),
    Case("a picture is no data", lambda m: PatchGrid.load("grid.png"), FileError, "pictures hold no data"),
    Case("a result saved as 5", lambda m: grid(m, layers=0).save(5), FileError, "named by a string or a Path"),
    Case("a result saved as .txt", lambda m: grid(m, layers=0).save("a.txt"), FileError, "not .txt"),
    Case("a result saved nowhere", lambda m: grid(m, layers=0).save("no/a.json"), FileError, "there is no folder no"),
    Case("a full disk, .json", saved_while(full, "grid.json"), FileError, "No space left on device. Choose another"),
    Case("a full disk, .safetensors", saved_while(full, "g.safetensors", "save_file"), FileError, "No space left"),
    Case("Ctrl-C in a save", saved_while(interrupt, "grid.json"), KeyboardInterrupt, ""),
]

CASES = [
    *(Case(f"a prompt: {what}", call, PromptError, words) for what, (call, words) in PROMPTS.items()),
    *(Case(f"{path}{what}", at(path, call), error, words) for path, what, call, error, words in PLACES),
    *(Case(f"a body: {what}", in_body(call), error, words) for what, (call, error, words) in BODIES.items()),
    *(MASKS + IN_PLACE + H_IN_PLACE + VALUES + NAMES + RUNS + TRACES + GRIDS + MODELS + FILES),
]


def models() -> SimpleNamespace:
    """A model of each kind that the cases are run on."""
    return SimpleNamespace(
        mamba=MambaTrace(make_hf()),
        mamba2=MambaTrace(family_model("mamba2")),
        hybrid=MambaTrace(make_hybrid("zamba2", dtype=torch.float32)),
        demo=MambaTrace.demo(),
    )
