"""What the porter reads in a script, what it makes of it, and what it says."""

from __future__ import annotations

import doctest
import inspect
import json
import linecache
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mamba_trace.porting
from mamba_trace import MambaTrace, mamba_lens, names
from mamba_trace.errors import FileError, UnknownSiteError
from mamba_trace.hooked.cache import ActivationCache
from mamba_trace.hooked.hooks import Hook
from mamba_trace.porting import encoded, imports, lacking, name_note, port_file, port_name, port_script, runs
from mamba_trace.porting.report import REMARK
from mamba_trace.sites import SITES, STATE

LOAD = "HookedTransformer.from_pretrained('state-spaces/mamba-130m')"
AXES = "[B,E,L,N] in TransformerLens's Mamba-1 is [B,L,E,N] here; in Mamba-2 both have [B,L,H,P,N]"
HALVE = "fwd_hooks=[('blocks.0.hook_y', lambda y, hook: y / 2)]"


def said(report: Any) -> list[tuple[int, str]]:
    return [(one.line, one.reason) for one in report.problems]


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*names.hook_names(2, 3), *names.BRIDGE_MODEL, "blocks.1.mixer.hook_out"])
def test_every_hook_name_is_the_path_that_names_says(name: str) -> None:
    assert port_name(name) == f"model.{names.to_path(name)}.output"


def test_a_name_keeps_what_varies() -> None:
    assert port_name("blocks.{layer}.hook_h.{pos}") == "model.layers[layer].ssm.h[pos].output"
    assert port_name("blocks.{l + 1}.hook_h.{-1}") == "model.layers[l + 1].ssm.h[-1].output"
    assert port_name("blocks.{layer}.{hook}") == 'model.hook(f"blocks.{layer}.{hook}").output'


def test_names_of_transformer_lens_that_stand_for_another_tensor_say_so() -> None:
    script = """cache["blocks.0.mixer.hook_ssm_state"][:, 3]
    cache["blocks.1.mixer.hook_ssm_write"]
    cache["blocks.2.mixer.out_proj.hook_in"]
    cache["blocks.2.mixer.inner_norm.hook_out"]
    """
    found = port_script(script.replace("\n    ", "\n")).findings
    assert [one.becomes for one in found] == [
        "model.layers[0].ssm.h_read.output",
        "model.layers[1].ssm.write.output",
        "model.layers[2].ssm.after_skip.output",
        "model.layers[2].ssm.inner_norm.output",
    ]
    assert [one.note for one in found[:2]] == [AXES] * 2
    assert "in a Mamba-2 it is ssm.inner_norm" in found[2].note
    assert not found[3].note


def test_a_note_is_given_for_the_names_that_it_concerns() -> None:
    """That of other axes for two sites alone, and that only hybrids have it for what only they have."""
    for site in SITES:
        name = site.hook_name(3) + ".5" * (site.name == STATE)
        expected = AXES if site.name in ("write", "h_read") else "in hybrids" if site.part else ""
        if site.name != "logits":  # whose hook name is that of lm_head
            assert name_note(name) == expected, name
            (found,) = port_script(f'cache["{name}"]').findings
            assert found.note == expected


@pytest.mark.parametrize("name", ["state-spaces/mamba2-130m", "AntonV/mamba-2-1.3b", "mistralai/Mamba-Codestral-7B"])
def test_a_mamba_2_is_no_hooked_mamba(name: str) -> None:
    reasons = [reason for _, reason in said(port_script(LOAD.replace("state-spaces/mamba-130m", name)))]
    assert reasons == [f"{name} is a Mamba-2 by its name, and HookedMamba loads none: MambaTrace({name!r})"]
    for mamba_1 in ("state-spaces/mamba-2.8b", "tiiuae/falcon-mamba-7b"):
        assert not said(port_script(LOAD.replace("state-spaces/mamba-130m", mamba_1)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.3.hook_deltaa", "did you mean blocks.3.hook_delta or"),
        ("blocks.3.attn.hook_result", "no architecture has this site; layers[3].attn.z is nearest, in hybrids"),
        ("blocks.{l}.attn.hook_rot_k", "no architecture has this site; layers[{l}].attn.k is nearest, in hybrids"),
        ("blocks.3.mlp.hook_pre", "no architecture has this site; layers[3].mlp_out is nearest, in hybrids"),
        ("blocks.3.hook_q_input", "no architecture has this site; layers[3].layer_input is nearest"),
        ("hook_pos_embed", "no architecture has this site"),
        ("blocks.{layer}.hook_deltaa", "no site is called 'blocks.{layer}.hook_deltaa'"),
        ("ln_final.hook_in", "use its blocks.l.hook_resid_post"),
    ],
)
def test_a_name_that_is_no_place_is_refused_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        port_name(name)
    assert said in str(caught.value)
    assert "900" not in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        "f'blocks.{layer}.hook_h.{pos}'",
        "f'blocks.{layer!s}.hook_h.{pos:d}'",
        "'blocks.' + str(layer) + '.hook_h.' + str(pos)",
        "'blocks.%d.hook_h.%s' % (layer, pos)",
        "'blocks.{}.hook_h.{}'.format(layer, pos)",
        "'blocks.{1}.hook_h.{at}'.format(0, layer, at=pos)",
        "utils.get_act_name('h.' + str(pos), layer)",
        "prefix + f'hook_h.{pos}'",
    ],
)
def test_a_name_is_read_however_it_is_put_together(written: str) -> None:
    script = (
        "from transformer_lens import utils\n"
        "for layer in range(3):\n"
        "    for pos in range(4):\n"
        "        prefix = f'blocks.{layer}.'\n"
        f"        out = model.run_with_hooks(x, fwd_hooks=[({written}, lambda h, hook: h * 0)])\n"
    )
    report = port_script(script)
    becomes = {finding.becomes for finding in report.findings if finding.line == 5}
    assert "model.layers[layer].ssm.h[pos].output" in becomes
    code = report.blocks[-1].code
    assert "model.layers[layer].ssm.h[pos].output = model.layers[layer].ssm.h[pos].output * 0" in code


def test_a_name_that_depends_on_the_run_is_looked_up_there() -> None:
    script = """
if late:
    name = "blocks.1.hook_y"
else:
    name = "blocks.0.hook_y"
out = model.run_with_hooks(torch.tensor(x), fwd_hooks=[(name, lambda y, hook: y * 2)])
"""
    assert "model.hook(name).output = model.hook(name).output * 2" in port_script(script).blocks[0].code


def test_a_variable_that_is_set_again_is_not_read() -> None:
    script = "k = 1\nname = f'blocks.{k}.hook_y'\nk = 2\nmodel.run_with_hooks(tokens, fwd_hooks=[(name, f)])"
    assert "f(model.hook(name).output" in port_script(script).blocks[0].code
    looped = "for k in r:\n    name = f'blocks.{k}.hook_y'\n    model.run_with_hooks(t, fwd_hooks=[(name, f)])\n"
    assert "f(model.layers[k].ssm.y.output" in port_script(looped + looped.replace("name", "n")).blocks[0].code
    changed = "hooks = [('blocks.0.hook_y', f)]\nhooks.append(g)\nmodel.run_with_hooks(t, fwd_hooks=hooks)"
    assert "in hooks:" in port_script(changed).blocks[0].code


def test_keys_of_a_cache_are_names_too() -> None:
    report = port_script("a, c = model.run_with_cache(x)\nc['resid_pre', l], c['q', 0], c['blocks.1.hook_h.2']")
    found = {one.found: one.becomes for one in report.findings}
    assert found["c['resid_pre', l]"] == "model.layers[l].resid_pre.output"
    assert found["'blocks.1.hook_h.2'"] == "model.layers[1].ssm.h[2].output"
    assert found["model.run_with_cache(x)"] == "model.run_with_cache(x)"
    assert "no architecture has this site; layers[0].attn.q is nearest" in report.problems[0].reason


# -- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "traced"),
    [
        ("'Hi'", "model.to_tokens('Hi', prepend_bos=True)"),
        ("['Hi', 'you']", "model.to_tokens(['Hi', 'you'], prepend_bos=True)"),
        ("prompts", "model.to_tokens(prompts, prepend_bos=True)"),
        (
            "[f'{name} said' for name in them]",
            "model.to_tokens([f'{name} said' for name in them], prepend_bos=True)",
        ),
        ("prompts, prepend_bos=False", "model.to_tokens(prompts, prepend_bos=False)"),
        ("tokens[:, :3]", "tokens[:, :3]"),
        (
            "unknown",
            "model.to_tokens(unknown, prepend_bos=True) if isinstance(unknown, (str, list)) else unknown",
        ),
    ],
)
def test_strings_get_the_token_that_the_libraries_put_first(given: str, traced: str) -> None:
    script = "prompts = ['Hi', 'you']\ntokens = model.to_tokens('Hi')\n"
    script += f"out = model.run_with_hooks({given}, {HALVE})\n"
    assert f"\nwith model.trace({traced}):\n" in "\n" + port_script(script).blocks[0].code
    if given.startswith("tokens"):
        script += "tokens = 'text'\n"
        assert "isinstance(tokens[:, :3], (str, list))" in port_script(script).blocks[0].code


def test_a_default_that_the_script_sets_is_followed() -> None:
    script = f"model.default_prepend_bos = False\nout = model.run_with_hooks('Hi', {HALVE})"
    assert "with model.trace(model.to_tokens('Hi')):" in port_script(script).blocks[0].code


def test_a_list_of_prompts_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"out = model.run_with_hooks(['Emma and', 'Shelby had fun at'], {HALVE})"
    demo = MambaTrace.demo()
    model = mamba_lens.HookedMamba(demo._module, tokenizer=demo.tokenizer)
    space: dict[str, Any] = {"model": model}
    exec(script, space)
    theirs = space["out"]
    path = "trace.py"
    code = port_script(script).blocks[0].code
    linecache.cache[path] = (len(code), None, code.splitlines(keepends=True), path)
    exec(compile(code, path, "exec"), space)
    torch.testing.assert_close(space["out"][:, -1], theirs[:, -1])


def test_what_is_the_same_here_is_shown_as_code() -> None:
    report = port_script("ids = model.to_tokens('Hi')\nmodel.to_string(ids)\nout = model.generate('Hi', 3)")
    assert "    1  model.to_tokens('Hi')\n       -> model.to_tokens('Hi') (the same here)\n" in str(report)
    assert "model.generate('Hi', 3)\n       -> model.generate('Hi', 3) (the same here)" in str(report)
    assert report.script == "ids = model.to_tokens('Hi')\nmodel.to_string(ids)\nout = model.generate('Hi', 3)"


# -- hook functions ----------------------------------------------------------------------------------------


def test_a_function_from_elsewhere_may_return_nothing() -> None:
    script = 'from edits import f\nout = model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_y", f)])'
    code = port_script(f"ids = torch.tensor([[1]])\n{script}").blocks[-1].code
    assert code.splitlines() == [
        "from types import SimpleNamespace",
        "with model.trace(ids):",
        '    edited = f(model.layers[0].ssm.y.output, hook=SimpleNamespace(name="blocks.0.hook_y", layer=lambda: 0))',
        "    if edited is not None:",
        "        model.layers[0].ssm.y.output = edited",
        "    out = model.lm_head.output.save()",
    ]


def test_places_of_which_the_order_is_not_known_get_no_wrong_trace() -> None:
    both = "fwd_hooks=[('blocks.0.hook_h.-1', f), ('blocks.0.hook_h.2', f)]"
    for hooks in (both, both.replace("hook_h.-1", "mixer.in_proj.hook_out")):
        report = port_script(f"out = model.run_with_hooks(tokens, {hooks})")
        assert not report.blocks
        assert "order" in report.notes[0].reason


def test_a_lambda_that_sees_the_last_of_a_loop_is_left_in_its_list() -> None:
    script = "h = [(f'blocks.{l}.hook_y', lambda y, hook: y * l) for l in r]\nmodel.run_with_hooks(x, fwd_hooks=h)"
    report = port_script(script)
    assert "for wanted, function in h:" in report.blocks[0].code
    assert not [one for one in report.findings if "* l" in one.becomes]
    now = port_script(script.replace("hook: y", "hook, l=l: y"))
    assert [one for one in now.findings if "layers[l].ssm.y.output" in one.becomes and "lambda" in one.found]


# -- hooks that a model kept -------------------------------------------------------------------------------


def test_hooks_that_are_added_are_given_to_the_runs() -> None:
    script = """
first = model(x)
# of all layers
model.blocks[k].hook_y.add_hook(lambda y, hook: y * 0)  # zero
model.blocks[2].hook_h[5].add_hook(f, "bwd")
for name in names:
    model.add_hook(name, f)
a = model(x, "loss")  # a comment
model.reset_hooks()
def again(x):
    return model.run_with_cache(y, fwd_hooks=h)
"""
    assert port_script(script).script.splitlines() == [
        "",
        "first = model(x)",
        "# of all layers",
        "model_fwd_hooks = []",
        'model_fwd_hooks.append((f"blocks.{k}.hook_y", lambda y, hook: y * 0))  # zero',
        "model_bwd_hooks = []",
        'model_bwd_hooks.append(("blocks.2.hook_h.5", f))',
        "for name in names:",
        "    model_fwd_hooks.append((name, f))",
        'a = model.run_with_hooks(x, return_type="loss", fwd_hooks=model_fwd_hooks, '
        "bwd_hooks=model_bwd_hooks)  # a comment",
        "model_fwd_hooks.clear(), model_bwd_hooks.clear()",
        "def again(x):",
        "    return model.run_with_cache(y, fwd_hooks=[*model_fwd_hooks, *h], bwd_hooks=model_bwd_hooks)",
    ]


def test_hooks_of_a_block_are_given_to_its_runs() -> None:
    script = """
with torch.no_grad(), model.hooks(
    fwd_hooks=[(name, f)],  # one
    bwd_hooks=h,
) as hooked:
    out = hooked(x)
    # the end of the block
"""
    ported = port_script(script).script
    compile(ported, "s", "exec")
    assert "# one" in ported
    assert "    # the end of the block\n" in ported
    assert "nullcontext(model) as hooked:" in ported
    assert "    out = hooked.run_with_hooks(x, fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks)\n" in ported
    assert ported.lstrip().startswith("from contextlib import nullcontext\n")


def test_positional_arguments_keep_their_meaning() -> None:
    """The libraries hand them on to the model; run_with_hooks and run_with_cache have others there."""
    script = "a = model.run_with_hooks(x, 'loss', fwd_hooks=h)\nb = model.run_with_cache(x, 'both', fast_ssm=f)\n"
    assert port_script(script).script == (
        "a = model.run_with_hooks(x, return_type='loss', fwd_hooks=h)\n"
        "b = model.run_with_cache(x, return_type='both')\n"
    )
    assert list(inspect.signature(mamba_lens.HookedMamba.forward).parameters)[1:6] == list(runs.FORWARD)


def test_hooks_keep_the_order_in_which_they_were_set() -> None:
    script = """model.add_hook(name, f)
with model.hooks(g):
    with model.hooks(fwd_hooks=h):
        out = model.run_with_hooks(x, fwd_hooks=[own])
"""
    in_order = "[*model_fwd_hooks, *fwd_hooks, *fwd_hooks_, *[own]]"
    assert f"out = model.run_with_hooks(x, fwd_hooks={in_order})" in port_script(script).script


def test_a_list_of_hooks_gets_a_name_of_its_own() -> None:
    script = "fwd_hooks = 3\nmodel_fwd_hooks = 4\nmodel.add_hook(name, f)\n"
    script += "with model.hooks(h):\n    out = model(x)\n"
    assert port_script(script).script.endswith(
        "model_fwd_hooks_ = []\nmodel_fwd_hooks_.append((name, f))\n"
        "with nullcontext(h) as fwd_hooks_:\n"
        "    out = model.run_with_hooks(x, fwd_hooks=[*model_fwd_hooks_, *fwd_hooks_])\n"
    )


@pytest.mark.parametrize(
    "script",
    [
        "if a:\n\tout = model.run_with_hooks(x, fwd_hooks=[('hook_embed', f)], fast_ssm=True)  # a\n",
        "def f():\n    # b\n    from transformer_lens import utils\n",
        "def f():\n    from transformer_lens import utils\n",
        "import mamba_lens; x = 1; y = model.run_with_hooks(x, fwd_hooks=[('hook_embed', f)])  # c\n",
        "out = model.run_with_hooks(\n    x,  # d\n    fast_ssm=True,  # e\n    fwd_hooks=h,  # f\n)\n",
        "with model.hooks(h):  # g\n    y = model(\n        x,  # h\n    )\n# i\n",
        "class A:\n    def f(self):\n        self.model.add_hook(n, f)  # j\n        return self.model(x)\n",
        "a = b\nb = a\nmodel.run_with_hooks(a, fwd_hooks=a)\n",
        "f = f\nmodel.run_with_hooks(f, fwd_hooks=[(f, f)])\n",
        "model.run_with_hooks(x, fwd_hooks=[(f'blocks.{d[\"a\"]}.hook_y', f)])\n",
        "async def f():\n    async with x:\n        a = await model.run_with_hooks(x, fwd_hooks=h)  # k\n",
        "g = lambda x: model.run_with_hooks(*x, fwd_hooks=[('hook_embed', f)], **kw)\n",
        "model.run_with_hooks()\nmodel.add_hook()\nmodel.hooks()\nget_act_name()\n",
        "model.add_hook(\n    n,  # l\n    f,  # m\n)\n",
    ],
)
def test_a_port_is_python_with_every_comment(script: str) -> None:
    report = port_script(script)
    compile(report.script, "script", "exec")
    assert all(comment in report.script for comment in re.findall(r"# \w", script))
    for block in report.blocks:
        compile(block.code, "block", "exec")


# -- imports and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("import mamba_lens", "from mamba_trace import mamba_lens"),
        ("import mamba_lens as ml", "from mamba_trace import mamba_lens as ml"),
        (
            "from mamba_lens import (\n    HookedMamba,  # it\n)",
            "from mamba_trace.mamba_lens import (\n    HookedMamba,  # it\n)",
        ),
        ("from mamba_lens import *", "from mamba_trace.mamba_lens import *"),
        ("from mamba_lens.HookedMamba import HookedMamba as H", "from mamba_trace.mamba_lens import HookedMamba as H"),
        ("import os, mamba_lens  # both", "import os  # both\nfrom mamba_trace import mamba_lens"),
        (
            "from transformer_lens.hook_points import HookPoint",
            "from mamba_trace.hooked.hooks import Hook as HookPoint",
        ),
        ("from transformer_lens import utils", ""),
        ("x\n# why\nfrom transformer_lens import utils", "x\n# why\npass"),
        (
            "from transformer_lens import utils\nutils.test_prompt(1)",
            "from transformer_lens import utils\nutils.test_prompt(1)",
        ),
        (
            "from transformer_lens import HookedTransformer as HT, utils\nHT.from_pretrained('mamba')",
            "from mamba_trace.mamba_lens import HookedMamba as HT\nHT.from_pretrained('mamba')",
        ),
        (
            "from transformer_lens import HookedTransformer\ndef f(model: HookedTransformer): ...",
            "from mamba_trace.mamba_lens import HookedMamba\ndef f(model: HookedMamba): ...",
        ),
        (
            "import transformer_lens\nm = transformer_lens.HookedTransformer.from_pretrained('mamba')",
            "from mamba_trace import mamba_lens\nm = mamba_lens.HookedMamba.from_pretrained('mamba')",
        ),
    ],
)
def test_imports_are_renamed(line: str, becomes: str) -> None:
    report = port_script(f"{line}\n")
    assert re.sub(rf"(?m)^{REMARK}.*\n", "", report.script).strip() == becomes
    assert bool(report.problems) == ("test_prompt" in line)


POINT = "from mamba_lens.input_dependent_hooks import InputDependentHookPoint"


@pytest.mark.parametrize("line", [POINT, f"{POINT} as P", POINT.replace(".input_dependent_hooks", "")])
def test_a_name_that_is_not_here_is_left_out_where_nothing_uses_it(line: str) -> None:
    report = port_script(f"{line}\nx = 1\n")
    assert report.script == "x = 1\n"
    assert not report.problems
    (found,) = report.findings
    assert found.note == "nothing uses InputDependentHookPoint, which has no counterpart and needs none"
    both = port_script("from mamba_lens import (HookedMamba,  # it\n    InputDependentHookPoint as I)\nHookedMamba\n")
    assert both.script == "# it\nfrom mamba_trace.mamba_lens import HookedMamba\nHookedMamba\n"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (f"{POINT}\nInputDependentHookPoint(f)", "InputDependentHookPoint"),
        ("import mamba_lens as ml\nml.InputDependentHookPoint(f)", "ml.InputDependentHookPoint"),
        ("from mamba_lens import HookedMamba, convert_hooked_weights as c\nc(1)", "c"),
    ],
)
def test_a_name_that_is_not_here_is_a_problem_where_it_is_used(script: str, found: str) -> None:
    report = port_script(script)
    assert [(one.line, one.found) for one in report.problems] == [(2, found)]
    assert imports.ABSENT in report.problems[0].reason
    assert f"{REMARK} {found}: " in report.script.splitlines()[-2]


def test_every_import_that_a_port_writes_is_there() -> None:
    assert set(imports.SHARED) == set(mamba_lens.__all__)
    for line in imports.MOVED.values():
        space: dict[str, Any] = {}
        exec(line, space)
        assert {Hook, ActivationCache, mamba_lens.HookedMamba} & {one for one in space.values() if callable(one)}
    names_of_theirs = [*mamba_lens.__all__, "InputDependentHookPoint", "InputDependentHookedRootModule", "utils"]
    lines = [f"from mamba_lens.anything import {name} as n{i}\nn{i}" for i, name in enumerate(names_of_theirs)]
    lines += [f"from transformer_lens import {name}\n{name}" for name in [*imports.MOVED, "utils"]]
    ported = port_script("\n".join(["import mamba_lens", *lines])).script.splitlines()
    ours = [line for line in ported if re.match(r"(from|import) mamba_trace", line)]
    assert len(ours) > len(mamba_lens.__all__)
    exec("\n".join(ours), {})


def test_a_call_that_loads_is_renamed_and_what_folds_is_left_out() -> None:
    source = """
from transformer_lens import HookedTransformer, utils
model = HookedTransformer.from_pretrained_no_processing(
    model_name="state-spaces/mamba-130m",  # small
    fold_ln=False, device="cuda",
    center_unembed=True,
)
gpt = HookedTransformer.from_pretrained("gpt2", fold_ln=False)
array = utils.to_numpy(model(x))
accuracy = utils.lm_accuracy(model(x), x)
"""
    report = port_script(source)
    assert (
        re.sub(rf"(?m)^{REMARK}.*\n", "", report.script)
        == """
from mamba_trace.mamba_lens import HookedMamba
from transformer_lens import utils
model = HookedMamba.from_pretrained(
    pretrained_model_name="state-spaces/mamba-130m",  # small
    device="cuda",
)
gpt = HookedMamba.from_pretrained("gpt2")
array = (model(x)).detach().cpu().numpy()
accuracy = utils.lm_accuracy(model(x), x)
"""
    )
    assert [line for line, _ in said(report)] == [8, 10]
    assert "gpt2 is no Mamba" in report.problems[0].reason
    assert "no counterpart" in report.problems[1].reason
    assert any(one.found == "fold_ln=False" and "nothing is folded" in one.note for one in report.findings)


def test_making_and_converting_run_as_they_are(tmp_path: Path) -> None:
    source = """
import mamba_lens
from mamba_lens import MambaCfg, MambaInitCfg

cfg = {"d_model": 16, "n_layer": 2, "vocab_size": 32, "tie_embeddings": False}
made = mamba_lens.HookedMamba(
    cfg=MambaCfg(d_model=16, n_layers=2, vocab_size=32, initializer_cfg=MambaInitCfg(dt_min=0.01)),
    initialize_params=True, device="cpu",
)
original = mamba_lens.convert_hooked_state_dict_to_original_state_dict(
    cfg=made.cfg, state_dict=made.state_dict()
)
back = mamba_lens.convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg=made.cfg)
hooked_cfg = mamba_lens.convert_original_config_to_hooked_mamba_config(cfg, device="cpu")
hooked = mamba_lens.convert_original_state_dict_to_hooked_state_dict(original)
model = mamba_lens.HookedMamba(cfg=hooked_cfg, device="cpu")
model.load_state_dict(hooked)
"""
    report = port_script(source)
    assert not report.problems
    done: dict[str, Any] = {}
    exec(report.script, done)
    assert (done["back"]["d_model"], done["back"]["n_layer"], done["back"]["vocab_size"]) == (16, 2, 32)
    assert "blocks.0.W_delta_1" in "".join(done["hooked"]), "MambaLens's names"
    for one, other in zip(done["made"]._module.parameters(), done["model"]._module.parameters(), strict=True):
        assert torch.equal(one, other)


# -- what cannot be ported, and the report -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "line", "reason"),
    [
        ('model.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_result", f)])', 1, "attn.z is nearest"),
        ('model.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_hh.2", f)])', 1, "did you mean"),
        ("model.add_perma_hook('blocks.0.hook_y', f)", 1, "model.edit(inplace=True)"),
        ("model.add_hook('blocks.0.hook_y', f, level=1)", 1, "model.edit(inplace=True)"),
        ("stack.enter_context(model.hooks(h))", 1, "model.edit(inplace=True)"),
        ("model.add_hook('hook_embed', f)\nother.run_with_hooks(x)", 2, "if this is one, give it fwd_hooks="),
        ("with model.hooks([('hook_embed', f)]):\n    model.generate(x)", 1, "tracer.iter[:]"),
        ("with model.hooks([('hook_embed', f)]):\n    evaluate(model)", 1, "pass fwd_hooks="),
        (
            "def g(x):\n    return model(x)\nwith model.hooks([('hook_embed', f)]):\n    g(x)",
            3,
            "pass fwd_hooks=",
        ),
    ],
)
def test_what_cannot_be_ported_is_named_with_its_line(code: str, line: int, reason: str) -> None:
    report = port_script(code)
    assert [one for one in said(report) if one[0] == line and reason in one[1]], report.problems
    lines = report.script.splitlines()
    comments = [number for number, text in enumerate(lines) if text.strip().startswith(REMARK)]
    assert [
        one for one in comments if reason in lines[one] and code.splitlines()[line - 1].strip()[:5] in lines[one + 1]
    ]
    left = "\n".join(text for number, text in enumerate(lines) if number not in comments)
    assert left == code or "add_hook(" in code, "it fails where it stands"
    assert str(report).endswith(f"Each place has a comment, {REMARK} ...")


@pytest.mark.parametrize(
    ("code", "found", "reason"),
    [
        ("model.blocks[0].attn.W_Q", "model.blocks[0].attn", "a Mamba has no attention"),
        ("for i, b in enumerate(model.blocks):\n    print(b.mlp.W_in, b.W_B)", "b.mlp", "no MLP"),
        ("for b in model.blocks[1:]:\n    b.ln1.w", "b.ln1", "one norm in each block"),
        ("[b.attn for b in model.blocks]", "b.attn", "a Mamba has no attention"),
        ("b = model.blocks[2]\nb.mixer.A_log", "b.mixer", "has no 'mixer'"),
        ("if model.cfg.n_layers > model.cfg.n_heads:\n    pass", "model.cfg.n_heads", "no attention heads"),
        ("model.W_Q[0]", "model.W_Q", "model has no 'W_Q'"),
        ("model.unembed.W_U", "model.unembed", "model.W_U is the matrix"),
        ("model.set_use_attn_result(True)", "model.set_use_attn_result", "model has no"),
        ("model.hook_dict['hook_embed']", "model.hook_dict", "hooks are not kept"),
        ("_, c = model.run_with_cache(x)\nc.compute_head_results()", "c.compute_head_results", "a cache has no"),
    ],
)
def test_a_part_of_a_model_that_is_not_here_is_a_problem(code: str, found: str, reason: str) -> None:
    report = port_script(f"ids = model.to_tokens('Hi')\n{code}\n")
    assert [one.found for one in report.problems] == [found]
    assert reason in report.problems[0].reason
    assert f"{REMARK} {found}: " in report.script
    compile(report.script, "s", "exec")


def test_a_part_of_a_model_that_is_here_is_none() -> None:
    used = "cfg.d_inner W_U loss_fn norm.weight tokenizer.eos_token_id get_token_position parameters() made".split()
    script = "ids = model.to_tokens('Hi')\nmodel.made = 1\n" + "".join(f"model.{one}\n" for one in used)
    script += "for b in model.blocks:\n    b.W_B.weight, b.A_log, b.norm\n_, c = model.run_with_cache(ids)\nc.items()\n"
    assert not port_script(script).problems
    model, cache = lacking.tiny()["model"], lacking.tiny()["cache"]
    own = [name for name in vars(mamba_lens.HookedMamba) if not name.startswith("_")]
    assert not [name for name in own if not hasattr(model, name) and name not in lacking.SURE]
    for name in lacking.SURE - {"run_with_cache", *runs.LOADERS}:
        first, _, rest = name.partition(".")
        owner = model.cfg if rest else model if hasattr(model, first) else cache
        assert hasattr(owner, rest or first), name


def test_the_prompt_that_a_patch_grid_takes_is_one_of_the_script() -> None:
    names = "".join(f"{name} = torch.tensor({name}_ids)\n" for name in ("tokens", "corrupt", "third"))
    run = "model.run_with_hooks(tokens, fwd_hooks=[(f'blocks.{l}.hook_conv', f)])"
    loops = f"for l in r:\n    for p in s:\n        {run}\n"

    def source(caches: str) -> str:
        reason = port_script(names + caches + loops).notes[0].reason
        (found,) = re.findall(r"patch_grid\(model, tokens, (.*), site='conv', metric=\.\.\.\)", reason)
        return found

    assert source("") == "source=..."
    one = "_, a = model.run_with_cache(corrupt[:1])\n"
    assert source(one) == "corrupt[:1]"
    two = f"{one}b = model.run_with_cache(third)[1]\n"
    assert source(two) == "source=...", "either may be meant"
    assert source(f"{two}def f(v, hook):\n    return b[hook.name]\n") == "third"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("run = model.run_with_hooks\nrun(x, fwd_hooks=[('blocks.1.mixer.hook_ssm_state', f)])", "is not seen"),
        ("def f(cache):\n    return cache['blocks.1.mixer.hook_ssm_write'][:, :, 3]", "no run of a model is seen"),
        ("h = ['blocks.1.mixer.hook_ssm_state', f]\nmodel.run_with_hooks(x, **{'fwd_hooks': [h]})", "hooks in **"),
    ],
)
def test_a_value_with_other_axes_that_no_run_turns_is_a_problem(script: str, reason: str) -> None:
    report = port_script(script)
    assert [one for one in report.problems if reason in one.reason]
    assert REMARK in report.script


def test_runs_without_such_values_are_left_alone() -> None:
    script = (
        "a = model.run_with_hooks(x, fwd_hooks=[('blocks.0.hook_y', f)])\n"
        "_, b = model.run_with_cache(x, names_filter=['hook_embed'])\n"
    )
    state = "model.run_with_hooks(x, fwd_hooks=[('blocks.1.mixer.hook_ssm_state', f)])\n"
    assert port_script(script + state).script.endswith(
        script + state.replace("[(", "hooks_with_their_axes(model, [(").replace("])\n", "]))\n")
    )
    assert port_script(f"model = {LOAD}\n{script}_, c = model.run_with_cache(x)\nc['resid_pre', 0]").script.endswith(
        f"\n{script}_, c = model.run_with_cache(x)\nc['resid_pre', 0]"
    )


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("y = [model.run_with_hooks(x, fwd_hooks=h) for x in xs]", "part of something"),
        ("while model.run_with_hooks(x, fwd_hooks=h)[0, 0, 0] > 0:\n    pass", ""),
        ("a = model.run_with_hooks(x, fwd_hooks=h, stop_at_layer=2)", "it takes stop_at_layer"),
        ("a, c = model.run_with_cache(x, fwd_hooks=h)", "it fills a cache"),
        ("a = model.run_with_hooks(x, bwd_hooks=h)", "order"),
    ],
)
def test_a_run_without_a_trace_runs_as_it_is_and_says_why(code: str, why: str) -> None:
    report = port_script(code)
    assert report.script == code
    assert not report.problems
    assert not report.blocks
    assert not why or why in report.notes[0].reason


@pytest.mark.parametrize(("site", "noted"), [("h.{p}", True), ("conv", True), ("A", False), ("h_start", False)])
def test_two_loops_over_a_site_with_positions_are_one_call(site: str, noted: bool) -> None:
    run = f"model.run_with_hooks(tokens, fwd_hooks=[(f'blocks.{{l}}.hook_{site}', f)])"
    report = port_script(f"for l in r:\n    for p in s:\n        {run}\n")
    assert ["patch_grid(" in note.reason for note in report.notes] == [True] * noted


def test_flags_of_kernels_are_left_out_with_the_reason() -> None:
    report = port_script("x = torch.tensor(y)\nout = model.run_with_hooks(x, fast_ssm=True, fast_conv=True)")
    assert {one.found: one.note for one in report.findings if one.note} == {
        "fast_ssm=True": "the scan kernel runs wherever its inner sites are not asked for",
        "fast_conv=True": "the convolution kernel runs wherever conv is not asked for",
    }
    assert report.blocks[0].code == "with model.trace(x):\n    out = model.lm_head.output.save()"
    assert report.script.endswith("out = model.run_with_hooks(x)")


def test_the_examples_of_the_docstrings() -> None:
    result = doctest.testmod(mamba_trace.porting)
    assert result.attempted >= 4
    assert not result.failed


def test_a_script_is_never_run() -> None:
    report = port_script("raise SystemExit(3)\nout = model.run_with_hooks(x)")
    assert report.blocks[0].line == 2


def test_the_report_says_it_all_in_lines_and_as_json() -> None:
    report = port_script(
        f'a = model.run_with_hooks("Hi", {HALVE})\nc["blocks.0.hook_h.1"], c["blocks.0.hook_q"]', "s.py"
    )
    text = str(report)
    assert text.startswith(
        "s.py\n    1  'blocks.0.hook_y'\n       -> model.layers[0].ssm.y.output\n    1  ('blocks.0.hook"
    )
    assert "(\"Hi\", fwd_hooks=[('blocks.0.hook_y', lambda y, hook: y / 2)])\n       -> with model.trace(" in text
    assert '    2  "blocks.0.hook_h.1"\n       -> model.layers[0].ssm.h[1].output' in text
    assert '# line 1\nwith model.trace(model.to_tokens("Hi", prepend_bos=True)):\n    model.layers[0]' in text
    assert 'Cannot be ported:\n    2  "blocks.0.hook_q"\n' in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["blocks"][0]["line"] == 1
    assert data["problems"][0]["found"] == '"blocks.0.hook_q"'
    assert data["script"] == report.script


def test_what_is_no_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"gone\.py cannot be read: No such file"):
        port_file(tmp_path / "gone.py")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="no text in UTF-8"):
        port_file(tmp_path / "bytes.py")
    (tmp_path / "odd.py").write_bytes(b"# coding: klingon\n")
    with pytest.raises(FileError, match="nor in an encoding it names"):
        port_file(tmp_path / "odd.py")
    (tmp_path / "book.ipynb").write_text('{"cells": []}', encoding="utf-8")
    with pytest.raises(FileError, match=r"is a notebook.*nbconvert --to script"):
        port_file(tmp_path / "book.ipynb")
    for terms in (400, 30_000):  # libcst gives up on the first, Python on the second
        with pytest.raises(FileError, match=r"long\.py nests expressions too deeply"):
            port_script("a = " + " + ".join(["1"] * terms), "long.py")
    with pytest.raises(FileError, match=r"broken\.py, line 2 is no Python"):
        port_script("a = 1\nb = (", "broken.py")
    with pytest.raises(FileError, match="is no Python"):
        port_script("a = '\0'", "null.py")


def test_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "dos.py").write_bytes(b"\xef\xbb\xbfimport mamba_lens\r\nx = 1  # one\r\n")
    assert port_file(tmp_path / "dos.py").script == "from mamba_trace import mamba_lens\r\nx = 1  # one\r\n"


def test_a_script_is_read_in_the_encoding_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b'# coding: latin-1\nimport mamba_lens\ns = "\xe9"\n')
    expected = '# coding: latin-1\nfrom mamba_trace import mamba_lens\ns = "é"\n'
    assert port_file(tmp_path / "latin.py").script == expected
    assert encoded(expected) == expected.encode("latin-1")
    assert encoded("s = 'é'\n") == "s = 'é'\n".encode()


@pytest.mark.parametrize("around", ["", "def work():\n    "])
def test_hooks_may_be_reset_before_any_is_added(around: str) -> None:
    source = f"""
model = load()
{around}model.reset_hooks()
model.add_hook("blocks.0.hook_y", fn)
out = model("Hi")
model.reset_hooks()
model.add_hook("blocks.0.hook_y", fn, dir="bwd")
"""
    ported, seen = port_script(source).script, []

    class Model:
        def run_with_hooks(self, *args: Any, **hooks: Any) -> None:
            seen.append(hooks["fwd_hooks"][:])

    space: dict[str, Any] = {"load": Model, "fn": print}
    exec(ported, space)
    assert seen == [[("blocks.0.hook_y", print)]]
    assert (space["model_fwd_hooks"], len(space["model_bwd_hooks"])) == ([], 1)


def test_a_variable_of_the_script_is_not_taken() -> None:
    source = 'model_fwd_hooks=3\nf(model_fwd_hooks_=1).model_fwd_hooks_\nmodel.add_hook("hook_embed", fn)\nmodel("Hi")'
    assert 'model.run_with_hooks("Hi", fwd_hooks=model_fwd_hooks_)' in port_script(source).script


def test_a_run_under_another_name_of_a_hooked_model_is_a_problem() -> None:
    report = port_script('model.add_hook("hook_embed", fn)\nother = model\nother("Hi")\nunknown("Hi")')
    assert [(one.line, one.reason) for one in report.problems] == [
        (3, "hooks are added to model: if this is one, give it fwd_hooks=")
    ]


def test_a_script_without_hooks_says_so() -> None:
    assert "no hook name and no call" in str(port_script("print(1)"))
    assert port_script("").script == ""


def test_the_header_of_a_script_stays_first() -> None:
    header = '#!/usr/bin/env python\n"""Doc."""\nfrom __future__ import annotations\n'
    body = "with model.hooks([('hook_embed', f)]):\n    out = model(x)\n"
    lines = port_script(header + body).script.splitlines()
    assert lines[:3] == header.splitlines()
    compile("\n".join(lines), "s", "exec")


def test_only_a_port_imports_libcst(tmp_path: Path) -> None:
    code = "import sys, mamba_trace.cli, mamba_trace\nprint('libcst' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
