"""A ported script does what the script did: both are run, on a reference and as the traces that are printed.

`Lens` is MambaLens as far as the fixture scripts in tests/data/port use it, over the float64 forward of
`reference`. A script is run with it, its port is run on a MambaTrace of the same weights, and the variables
that both leave behind have to agree.
"""

from __future__ import annotations

import ast
import doctest
import functools
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from reference import forward
from torch import Tensor
from torch.nn.functional import cross_entropy

import mamba_trace.porting
from mamba_trace import MambaTrace, names
from mamba_trace.errors import FileError, UnknownSiteError
from mamba_trace.porting import Report, port_file, port_name, port_script

SCRIPTS = Path(__file__).parent / "data" / "port"
LOAD = "HookedTransformer.from_pretrained('state-spaces/mamba-130m')"


class Cache(dict):
    """MambaLens's ActivationCache: keys are hook names, or (short name, layer)."""

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple):
            key = act_name(*key)
        return super().__getitem__(key)


def act_name(name: str, layer: int | None = None) -> str:
    return f"hook_{name}" if layer is None else f"blocks.{layer % 3}.hook_{name}"


class Lens:
    """A HookedMamba."""

    model: MambaTrace

    def __init__(self) -> None:
        self.weights = {n: w.detach().double() for n, w in self.model._module.state_dict().items()}
        self.cfg = SimpleNamespace(n_layers=len(self.model.layers))
        self.added: list[tuple[Any, Callable, str]] = []
        self.to_single_token = self.model.to_single_token
        self.to_tokens = functools.partial(self.model.to_tokens, prepend_bos=True)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Lens:
        return cls()

    def __call__(
        self, tokens: Tensor, return_type: str | None = "logits", stop_at_layer: int | None = None
    ) -> Any:
        seen: dict[str, Tensor] = {}

        def edit(name: str, value: Tensor) -> Tensor:
            if name.endswith(".hook_h"):
                return value
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            hook = SimpleNamespace(name=name, layer=lambda: layer)
            value = value.clone()
            for wanted, function, direction in self.added:
                if (wanted(name) if callable(wanted) else wanted == name) and direction == "fwd":
                    new = function(value, hook=hook)
                    value = value if new is None else new
            for wanted, function, direction in self.added:
                if wanted == name and direction == "bwd":
                    value.requires_grad_() if value.is_leaf else None
                    value.register_hook(functools.partial(function, hook=hook))
            seen[name] = value
            return value

        logits = forward(self.weights, self.model.config, tokens, edit)
        self.seen = seen
        if stop_at_layer is not None:
            return seen[f"blocks.{stop_at_layer}.hook_resid_pre"]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"logits": logits, "loss": loss, "both": (logits, loss), None: None}[return_type]

    def generate(
        self,
        input: str | Tensor,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        do_sample: bool = True,
        use_past_kv_cache: bool = True,
        prepend_bos: bool = True,
        return_type: str = "input",
        verbose: bool = True,
    ) -> Any:
        assert not do_sample, "a drawn token cannot be compared"
        tokenizer = self.model.tokenizer
        tokens = self.model.to_tokens(input, prepend_bos=prepend_bos) if isinstance(input, str) else input
        for _ in range(max_new_tokens):
            tokens = torch.cat((tokens, self(tokens)[:, -1:].argmax(-1)), dim=1)
            if stop_at_eos and tokens[0, -1] == tokenizer.eos_token_id:
                break
        text = isinstance(input, str) and return_type == "input"
        return tokenizer.decode(tokens[0], skip_special_tokens=True) if text else tokens

    def add_hook(self, name: Any, function: Callable, dir: str = "fwd") -> None:
        self.added.append((name, function, dir))

    def reset_hooks(self) -> None:
        self.added = []

    @contextmanager
    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = ()) -> Iterator[Lens]:
        held = list(self.added)
        self.added += [(name, fn, "fwd") for name, fn in fwd_hooks]
        self.added += [(name, fn, "bwd") for name, fn in bwd_hooks]
        yield self
        self.added = held

    def run_with_hooks(
        self, tokens: Tensor, fwd_hooks: Any = (), fast_ssm: bool = False, fast_conv: bool = False
    ) -> Any:
        with self.hooks(fwd_hooks):
            return self(tokens)

    def run_with_cache(
        self, tokens: Tensor, names_filter: Any = None, remove_batch_dim: bool = False, **options: Any
    ) -> Any:
        output = self(tokens, **options)
        filters = [names_filter] if isinstance(names_filter, str) else names_filter
        wanted = {
            name: value.detach()
            for name, value in self.seen.items()
            if filters is None or (filters(name) if callable(filters) else name in filters)
        }
        if remove_batch_dim:
            wanted = {name: v if name.endswith("hook_A") else v[0] for name, v in wanted.items()}
        return output, Cache(wanted)


def libraries(model: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules called mamba_lens and transformer_lens, whose HookedMamba has the weights of ``model``."""
    lens, transformers, points = (ModuleType(name) for name in ("a", "b", "c"))
    lens.HookedMamba = type("HookedMamba", (Lens,), {"model": model})  # type: ignore[attr-defined]
    transformers.utils = SimpleNamespace(get_act_name=act_name)  # type: ignore[attr-defined]
    points.HookPoint = object  # type: ignore[attr-defined]
    typing = ModuleType("d")
    typing.Float = {(torch.Tensor, shape): Any for shape in ("B L V", "B E N")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_lens", lens)
    monkeypatch.setitem(sys.modules, "transformer_lens", transformers)
    monkeypatch.setitem(sys.modules, "transformer_lens.hook_points", points)
    monkeypatch.setitem(sys.modules, "jaxtyping", typing)


def run_ported(report: Report, model: MambaTrace, folder: Path) -> dict[str, Any]:
    """The variables of a ported script, with ``model`` in place of the one that it loads."""
    tree = ast.parse(report.script)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("MambaTrace('state-spaces"):
            node.value = ast.Name("THE_MODEL", ast.Load())
    script = folder / "ported.py"
    script.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
    return runpy.run_path(str(script), init_globals={"THE_MODEL": model})


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """The same tensors and numbers, in the same places, up to float32 against float64."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), where
        assert ours.shape == theirs.shape, where
        largest = float(theirs.detach().double().abs().max())
        torch.testing.assert_close(
            ours.detach().double(),
            theirs.detach().double(),
            rtol=0,
            atol=2e-5 * max(largest, 1e-3),
            msg=where,
        )
    elif isinstance(theirs, dict):
        for key in ours:  # a trace keeps what the script reads, MambaLens keeps all
            same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}[{index}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4), where
    elif isinstance(theirs, str):
        assert ours == theirs, where


def compared(
    script: str, model: MambaTrace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Run a fixture script and its port; the port's variables, and the names that were compared."""
    libraries(model, monkeypatch)
    theirs = runpy.run_path(str(SCRIPTS / script))
    report = port_file(SCRIPTS / script)
    assert not report.problems
    for name in ("mamba_lens", "transformer_lens", "transformer_lens.hook_points"):
        monkeypatch.delitem(sys.modules, name)
    ours = run_ported(report, model, tmp_path)
    kinds = (Tensor, float, list, dict, tuple)
    shared = [n for n in theirs if n in ours and isinstance(theirs[n], kinds) and not n.startswith("_")]
    for name in shared:
        same(ours[name], theirs[name], name)
    return ours, shared


# -- scripts and their ports -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["patch_state.py", "patch_residual.py"])
def test_the_seed_experiments(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = MambaTrace.demo()
    ours, shared = compared(script, model, monkeypatch, tmp_path)
    assert {"grid", "low", "high", "dirty_logits"} <= set(shared)
    assert ours["grid"].max() > 0.5, "some cell carries the answer"
    site = "'h'" if script == "patch_state.py" else "'resid_pre'"
    (note,) = port_file(SCRIPTS / script).notes
    assert f"patch_grid(model, clean_tokens, dirty_tokens, site={site}, metric=...)" in note.reason


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("hooks.py", "out_of_order every_state some_layers mixed seen branched run_time inside added plain"),
        ("hooks.py", "faded loss logits_too loss_too by_length"),
        ("caches.py", "y matrix last first short act final states streams gate alone backwards conv C"),
        (
            "caches.py",
            "lens from_the_end sizes squeezed_y squeezed_A stream early_y edited_logits edited_y filtered",
        ),
        ("caches.py", "edited_streams edited_states edited_ends edited_norm"),
        ("gradients.py", "gradients logits score loss"),
    ],
)
def test_a_ported_script_computes_the_same(
    script: str, results: str, tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, shared = compared(script, tiny, monkeypatch, tmp_path)
    assert set(results.split()) <= set(shared)


def test_generate_is_hugging_faces_with_the_defaults_of_transformer_lens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = MambaTrace.demo()
    ours, shared = compared("generate.py", model, monkeypatch, tmp_path)
    assert {"ids", "texts", "with_the_token", "without", "further", "unasked"} <= set(shared)
    assert ours["texts"] == [f"{ours['prompt']} Emma."]
    assert ours["ids"][0, 0] == ours["with_the_token"][0, 0] == model.tokenizer.bos_token_id
    assert ours["without"][0, 0] != model.tokenizer.bos_token_id
    eos = (ours["further"][0, 1:] == model.tokenizer.eos_token_id).nonzero()
    assert 0 < eos[0] < ours["further"].shape[1] - 2, "it went on after the end of the text"


@pytest.mark.parametrize(
    ("call", "becomes"),
    [
        (
            "model.generate('Hi')",
            "model.tokenizer.decode(model.generate(model.to_tokens('Hi', prepend_bos=True), "
            "max_new_tokens=10, do_sample=True, top_k=0)[0], skip_special_tokens=True)",
        ),
        (
            "model.generate(tokens, 5, temperature=0.5, top_k=3, top_p=0.9, eos_token_id=7)",
            "model.generate(tokens, max_new_tokens=5, eos_token_id=7, do_sample=True, top_k=3, top_p=0.9, "
            "temperature=0.5)",
        ),
        (
            "model.generate(tokens, return_type='str', do_sample=False)",
            "model.tokenizer.batch_decode(model.generate(tokens, max_new_tokens=10, do_sample=False), "
            "skip_special_tokens=True)",
        ),
    ],
    ids=["a string", "drawn", "text of tokens"],
)
def test_a_call_of_generate_is_listed_with_what_it_becomes(call: str, becomes: str) -> None:
    script = f"from transformer_lens import HookedTransformer\nmodel = {LOAD}\nout = {call}\nagain = {call}"
    report = port_script(script)
    found = {(one.line, one.found): one.becomes for one in report.findings}
    assert found[3, call] == found[4, call] == becomes
    assert f"out = {becomes}" in [block.code for block in report.blocks]
    (note,) = [note for note in report.notes if "beginning-of-sequence token before a string" in note.reason]
    assert note.line == 3, "it is said once"
    unsure = [note.line for note in report.notes if "if its input is a string" in note.reason]
    assert unsure == ([3, 4] if call.startswith("model.generate(tokens, 5") else [])


@pytest.mark.parametrize(
    ("arguments", "found", "reason"),
    [
        ("tokens, freq_penalty=1.0", "freq_penalty=1.0", "has none: pass logits_processor="),
        ("tokens, return_type='embeds'", "return_type='embeds'", "generate gives token ids"),
        ("tokens, nonsense=3", "nonsense=3", "no counterpart"),
        ("tokens, **options", "**options", "only the run knows"),
    ],
)
def test_what_generate_has_no_counterpart_of(arguments: str, found: str, reason: str) -> None:
    report = port_script(f"model = {LOAD}\nout = model.generate({arguments})")
    (problem,) = report.problems
    assert (problem.line, problem.found) == (2, found)
    assert reason in problem.reason


def test_hooks_that_are_set_while_it_generates_are_a_problem() -> None:
    script = f"model = {LOAD}\nwith model.hooks([('blocks.0.hook_y', f)]):\n    model.generate(tokens)"
    (problem,) = port_script(script).problems
    assert problem.line == 3
    assert "tracer.iter[:]" in problem.reason


def test_generate_of_something_else_is_left_alone() -> None:
    report = port_script(f"model = {LOAD}\nout = other.generate('Hi')")
    assert [finding.line for finding in report.findings] == [1]
    assert "out = other.generate('Hi')" in report.script


def test_the_fixture_hooks_change_something(
    tiny: MambaTrace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a port that drops a hook cannot pass."""
    ours, _ = compared("hooks.py", tiny, monkeypatch, tmp_path)
    for name in "out_of_order every_state some_layers mixed branched run_time inside added".split():
        assert not torch.allclose(ours[name], ours["plain"], atol=1e-3), name


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_block_compiles(script: Path) -> None:
    report = port_file(script)
    assert report.blocks
    for block in report.blocks:
        compile(block.code, str(script), "exec")
        assert "run_with" not in block.code


def test_scripts_in_one_notebook_keep_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both experiments one after the other: the second assigns the names of the first again."""
    texts = [(SCRIPTS / name).read_text(encoding="utf-8") for name in ("patch_state.py", "patch_residual.py")]
    first, both = port_script(texts[0]), port_script("first = 1\n" + "\n".join(texts))
    second = port_script(texts[1])
    assert not both.problems
    loops = [block.code for report in (first, second) for block in report.blocks if "for layer" in block.code]
    ported = [block.code for block in both.blocks if "for layer" in block.code]
    assert ported[-1] == loops[-1]
    assert ported[1] == loops[1]


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*names.hook_names(2, 3), *names.BRIDGE_MODEL, "blocks.1.mixer.hook_out"])
def test_every_hook_name_is_the_path_that_names_says(name: str) -> None:
    assert port_name(name) == f"model.{names.to_path(name)}.output"


def test_a_name_keeps_what_varies() -> None:
    assert port_name("blocks.{layer}.hook_h.{pos}") == "model.layers[layer].ssm.h[pos].output"
    assert port_name("blocks.{l + 1}.hook_h.{-1}") == "model.layers[l + 1].ssm.h[-1].output"
    assert port_name("blocks.{layer}.{hook}") == "model.hook(f'blocks.{layer}.{hook}').output"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.3.hook_deltaa", "did you mean blocks.3.hook_delta or"),
        ("blocks.3.attn.hook_pattern", "a Mamba has no attention"),
        ("blocks.3.hook_resid_mid", "a Mamba has no attention, no MLP and one norm"),
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
out = model.run_with_hooks(x, fwd_hooks=[(name, lambda y, hook: y * 2)])
"""
    assert "model.hook(name).output = model.hook(name).output * 2" in port_script(script).blocks[0].code


# -- hook functions ----------------------------------------------------------------------------------------


def test_a_function_whose_names_mean_another_thing_at_the_call_is_called() -> None:
    script = """
scale = 2
def louder(value, hook):
    return value * scale
def run(model, x):
    scale = 3
    return model.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_y", louder)])
def run_plainly(model, x):
    return model.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_y", louder)])
"""
    report = port_script(script)
    called, inlined = report.blocks
    assert "model.layers[0].ssm.y.output = louder(model.layers[0].ssm.y.output, hook=None)" in called.code
    assert "model.layers[0].ssm.y.output = model.layers[0].ssm.y.output * scale" in inlined.code
    assert "def louder" in report.script


def test_a_function_from_elsewhere_may_return_nothing() -> None:
    code = port_script(
        'from edits import f\nout = model.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_y", f)])'
    )
    assert code.blocks[-1].code.splitlines() == [
        "with model.trace(x):",
        "    edited = f(model.layers[0].ssm.y.output, "
        "hook=SimpleNamespace(name='blocks.0.hook_y', layer=lambda: 0))",
        "    if edited is not None:",
        "        model.layers[0].ssm.y.output = edited",
        "    out = model.lm_head.output.save()",
    ]
    assert code.script.startswith("from types import SimpleNamespace\n")


def test_hooks_that_are_added_at_a_hook_point_hold_until_they_are_reset() -> None:
    script = """
k = 1
model.blocks[k].hook_y.add_hook(lambda y, hook: y * 0)
a = model(x)
model.reset_hooks()
b = model(x)
"""
    first, second = port_script(script).blocks
    assert "model.layers[k].ssm.y.output = model.layers[k].ssm.y.output * 0" in first.code
    assert second.code == "with model.trace(x):\n    b = model.lm_head.output.save()"


# -- loading and conversion --------------------------------------------------------------------------------


def test_loading_and_conversion_run_as_they_are_printed(tiny: MambaTrace, tmp_path: Path) -> None:
    script = """
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
    report = port_script(script)
    assert not report.problems
    assert "model = MambaTrace.from_state_dict(hooked_cfg, hooked)" in report.script
    done = run_ported(report, tiny, tmp_path)
    assert back_to(done["back"]) == (16, 2, 32)
    assert "blocks.0.W_delta_1" in "".join(done["hooked"]), "MambaLens's names"
    for one, other in zip(done["made"]._module.parameters(), done["model"]._module.parameters(), strict=True):
        assert torch.equal(one, other)


def back_to(config: dict[str, Any]) -> tuple[int, int, int]:
    return config["d_model"], config["n_layer"], config["vocab_size"]


def test_loading_leaves_out_what_folds_weights() -> None:
    script = """
from transformer_lens import HookedTransformer, utils
model = HookedTransformer.from_pretrained("state-spaces/mamba-130m", fold_ln=False, device="cuda")
gpt = HookedTransformer.from_pretrained("gpt2")
array = utils.to_numpy(model(x))
accuracy = utils.lm_accuracy(model(x), x)
"""
    report = port_script(script)
    code = report.blocks[1].code
    assert code == "model = MambaTrace('state-spaces/mamba-130m', device='cuda')"
    assert "array = logits.detach().cpu().numpy()" in report.script
    reasons = {problem.line: problem.reason for problem in report.problems}
    assert "gpt2 is no Mamba" in reasons[4]
    assert "has no counterpart" in reasons[6]
    assert any(one.found == "fold_ln=False" and "nothing is folded" in one.note for one in report.findings)


# -- what cannot be ported, and the report -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "line", "said"),
    [
        ('model.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_z", f)])', 1, "no attention"),
        ('model.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_hh.2", f)])', 1, "did you mean"),
        ("y = 1\nf = lambda: model.run_with_cache(x)", 2, "a trace is a block"),
        ("while model.run_with_hooks(x)[0, 0, 0] > 0:\n    pass", 1, "a trace is a block"),
        ('a, c = model.run_with_cache(x, incl_bwd=True)\nc["hook_embed"]', 1, "with loss.backward()"),
        ("a, c = model.run_with_cache(x)\nc.logit_attrs(1)", 2, "a method of ActivationCache"),
        ("model.run_with_hooks(x, nonsense=3)", 1, "no counterpart"),
        ('model.add_hook("blocks.0.hook_y", f, dir="bwd")\nmodel.run_with_hooks(x)', 1, "no .backward()"),
        (
            "hooks = [(lambda n: 'B' in n, f), ('blocks.1.mixer.in_proj.hook_out', f)]\n"
            "model.run_with_hooks(x, fwd_hooks=hooks)",
            2,
            "put its line where its turn in execution order is",
        ),
        (
            "h = [(f'blocks.{l}.hook_y', lambda y, hook: y * l) for l in r]\n"
            "model.run_with_hooks(x, fwd_hooks=h)",
            1,
            "sees the last l only",
        ),
        (
            "def f(y, hook, k):\n    return y * k\n"
            "k = 1\nmodel.add_hook('blocks.0.hook_y', partial(f, k=k))\nk = 2\nmodel.run_with_hooks(x)",
            4,
            "the trace at line 6 reads k anew",
        ),
        ("for i in y:\n    g(i)\n    model.add_hook('blocks.0.hook_y', f)\nmodel.reset_hooks()", 1, "stay"),
    ],
)
def test_what_cannot_be_ported_is_named_with_its_line(code: str, line: int, said: str) -> None:
    problems = port_script(code).problems
    assert [one for one in problems if one.line == line and said in one.reason], problems


def test_flags_of_kernels_are_left_out_with_the_reason() -> None:
    report = port_script("out = model.run_with_hooks(x, fast_ssm=True, fast_conv=True)")
    assert {one.found: one.note for one in report.findings if one.note} == {
        "fast_ssm=True": "the scan kernel runs wherever its inner sites are not asked for",
        "fast_conv=True": "the convolution kernel runs wherever conv is not asked for",
    }
    assert report.blocks[0].code == "with model.trace(x):\n    out = model.lm_head.output.save()"


def test_the_examples_of_the_docstrings() -> None:
    result = doctest.testmod(mamba_trace.porting)
    assert result.attempted >= 4
    assert not result.failed


def test_a_script_is_never_run() -> None:
    report = port_script("raise SystemExit(3)\nout = model.run_with_hooks(x)")
    assert report.blocks[0].line == 2


def test_a_cache_whose_names_are_not_known_saves_every_site_and_says_so() -> None:
    report = port_script("logits, cache = model.run_with_cache(x)\nshow(cache)")
    assert "cache[name] = model.hook(name).output.save()" in report.blocks[0].code
    assert report.notes[0].line == 2
    assert "tracer.cache(modules=[...])" in report.notes[0].reason


def test_the_report_says_it_all_in_lines_and_as_json() -> None:
    report = port_script(
        'a, c = model.run_with_cache("Hi")\nc["blocks.0.hook_y"], c["blocks.0.hook_q"]', "s.py"
    )
    text = str(report)
    trace = "with model.trace(model.to_tokens('Hi', prepend_bos=True)):"
    assert text.startswith(f"s.py\n    1  model.run_with_cache('Hi')\n       -> {trace} ...\n")
    assert "    2  'blocks.0.hook_y'\n       -> model.layers[0].ssm.y.output" in text
    assert "# line 1\nwith model.trace(model.to_tokens('Hi', prepend_bos=True)):\n    c = {}.save()\n" in text
    assert "Cannot be ported:\n    2  'blocks.0.hook_q'\n" in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["blocks"][0]["line"] == 1
    assert data["problems"][0]["found"] == "'blocks.0.hook_q'"


def test_what_is_no_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"gone\.py cannot be read: No such file"):
        port_file(tmp_path / "gone.py")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="no text in UTF-8"):
        port_file(tmp_path / "bytes.py")
    with pytest.raises(FileError, match=r"broken\.py, line 2 is no Python"):
        port_script("a = 1\nb = (", "broken.py")
    with pytest.raises(FileError, match="is no Python"):
        port_script("a = '\0'", "null.py")


def test_layers_from_the_end_are_read_in_their_turn(tiny: MambaTrace, tmp_path: Path) -> None:
    script = """
from mamba_lens import HookedMamba
model = HookedMamba.from_pretrained("state-spaces/mamba-130m")
logits, cache = model.run_with_cache(tokens)
last, first, middle = cache["resid_post", -1], cache["y", 0], cache["blocks.2.hook_y"]
"""
    tokens = torch.tensor([[3, 1, 7, 9]])
    report = port_script(script)
    script_here = report.script.replace("(tokens)", f"(torch.tensor({tokens.tolist()}))")
    done = run_ported(replace(report, script=f"import torch\n{script_here}"), tiny, tmp_path)
    with tiny.trace(tokens):
        y = tiny.layers[0].ssm.y.output.save()
        post = tiny.layers[2].resid_post.output.save()
    torch.testing.assert_close(done["first"], y)
    torch.testing.assert_close(done["last"], post)


def test_a_script_without_hooks_says_so() -> None:
    assert "no hook name and no call" in str(port_script("print(1)"))


def test_the_header_of_a_script_stays_first() -> None:
    header = '"""Doc."""\nfrom __future__ import annotations\n'
    script = f'{header}out = model.run_with_hooks(x, fwd_hooks=[("hook_embed", f)])'
    lines = port_script(script).script.splitlines()
    assert lines[0] == '"""Doc."""'
    assert lines[1:3] == ["from __future__ import annotations", "from types import SimpleNamespace"]


def test_a_string_gets_the_token_that_the_libraries_put_first() -> None:
    script = (
        "from mamba_lens import HookedMamba\n"
        "model = HookedMamba.from_pretrained('x-mamba')\n"
        "text = 'Hi'\n"
        "tokens = model.to_tokens(text)\n"
        "other = model.to_tokens(text, prepend_bos=False)\n"
        "a, b, c = model(text), model(tokens), model(text, prepend_bos=False)\n"
    )
    ported = port_script(script).script
    assert "tokens = model.to_tokens(text, prepend_bos=True)" in ported
    assert "other = model.to_tokens(text, prepend_bos=False)" in ported
    assert ported.count("with model.trace(model.to_tokens(text, prepend_bos=True)):") == 1
    assert ported.count("with model.trace(tokens):") == 1
    assert ported.count("with model.trace(text):") == 1
