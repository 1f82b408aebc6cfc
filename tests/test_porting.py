"""A ported script does what the script did: both are run, the port also with every trace that is shown.

`Lens` is MambaLens as far as the fixture scripts in tests/data/port use it, over the float64 forward of
`reference`. A script is run with it, and its port on a HookedMamba of the same weights: first as it is
ported, then with each trace of the report in the place of its statement. The variables that they leave behind
have to agree.
"""

from __future__ import annotations

import difflib
import functools
import re
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from reference import forward
from torch import Tensor
from torch.nn.functional import cross_entropy

from mamba_trace import MambaTrace, mamba_lens
from mamba_trace.porting import PortReport, port_file, port_script

SCRIPTS = Path(__file__).parent / "data" / "port"


IN_OTHER_AXES = "in_place returned short mixed by_two by_test inside added"


class Cache(dict):
    """MambaLens's ActivationCache: keys are hook names, or (short name, layer)."""

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple):
            key = act_name(*key)
        return super().__getitem__(key)


def act_name(name: str, layer: int | None = None) -> str:
    return f"hook_{name}" if layer is None else f"blocks.{layer % 3}.hook_{name}"


def turned(name: str, value: Tensor) -> Tensor:
    """A value with the axes of TransformerLens's Mamba-1 for those of this package, and the other way round."""
    return value.transpose(1, 2).contiguous() if "hook_ssm_s" in name or "hook_ssm_w" in name else value


class Lens:
    """A HookedMamba."""

    model: MambaTrace

    def __init__(self) -> None:
        self.weights = {n: w.detach().double() for n, w in self.model._module.state_dict().items()}
        self.cfg = SimpleNamespace(n_layers=len(self.model.layers))
        self.blocks = [SimpleNamespace(mixer=SimpleNamespace(eager_scan=False)) for _ in self.model.layers]
        self.added: list[tuple[Any, Callable, str]] = []
        self.to_single_token = self.model.to_single_token
        self.to_tokens = functools.partial(self.model.to_tokens, prepend_bos=True)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Lens:
        return cls()

    boot_transformers = from_pretrained

    def __call__(self, tokens: Tensor, return_type: str | None = "logits", stop_at_layer: int | None = None) -> Any:
        seen: dict[str, Tensor] = {}

        def edit(name: str, value: Tensor) -> Tensor:
            if name.endswith(".hook_h"):
                return value
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            hook = SimpleNamespace(name=name, layer=lambda: layer)
            value = turned(name, value.clone())
            for wanted, function, direction in self.added:
                if (wanted(name) if callable(wanted) else wanted == name) and direction == "fwd":
                    new = function(value, hook=hook)
                    value = value if new is None else new
            for wanted, function, direction in self.added:
                if wanted == name and direction == "bwd":
                    value.requires_grad_() if value.is_leaf else None
                    value.register_hook(functools.partial(function, hook=hook))
            seen[name] = value
            return turned(name, value)

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
    transformers.TransformerBridge = type("TransformerBridge", (Lens,), {"model": model})  # type: ignore[attr-defined]
    points.HookPoint = object  # type: ignore[attr-defined]
    typing = ModuleType("d")
    typing.Float = {(torch.Tensor, shape): Any for shape in ("B L V", "B E N")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_lens", lens)
    monkeypatch.setitem(sys.modules, "transformer_lens", transformers)
    monkeypatch.setitem(sys.modules, "transformer_lens.hook_points", points)
    monkeypatch.setitem(sys.modules, "jaxtyping", typing)


def with_traces(report: PortReport) -> str:
    """The ported script with each trace in the place of its statement."""
    script = report.script
    for block in report.blocks:
        first, *rest = map(re.escape, block.statement.splitlines())
        lines = "\n".join([rf"(?m)^([ ]*){first}", *(rf"(?:\1)?{line}" for line in rest)]) + r"(?=\n|$)"
        match = re.search(lines, script)
        assert match is not None, block.statement
        script = script[: match.start()] + textwrap.indent(block.code, match[1]) + script[match.end() :]
    return script


def run_ported(script: str, model: MambaTrace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables of a ported script, whose ``from_pretrained`` gives the weights of ``model``."""
    hooked = mamba_lens.HookedMamba(model._module, tokenizer=model.tokenizer)
    monkeypatch.setattr(mamba_lens.HookedMamba, "from_pretrained", lambda *args, **kwargs: hooked)
    path = folder / "ported.py"
    path.write_text(script, encoding="utf-8")
    return runpy.run_path(str(path))


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


@pytest.fixture(params=[False, True], ids=["as it is ported", "with its traces"])
def traced(request: pytest.FixtureRequest) -> bool:
    return request.param


def compared(
    script: str, model: MambaTrace, traced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Run a fixture script and its port; the port's variables, and the names that were compared."""
    libraries(model, monkeypatch)
    theirs = runpy.run_path(str(SCRIPTS / script))
    report = port_file(SCRIPTS / script)
    assert not report.problems
    for name in ("mamba_lens", "transformer_lens", "transformer_lens.hook_points"):
        monkeypatch.delitem(sys.modules, name)
    ours = run_ported(with_traces(report) if traced else report.script, model, tmp_path, monkeypatch)
    kinds = (Tensor, float, list, dict, tuple)
    shared = [n for n in theirs if n in ours and isinstance(theirs[n], kinds) and not n.startswith("_")]
    for name in shared:
        same(ours[name], theirs[name], name)
    return ours, shared


# -- scripts and their ports -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["patch_state.py", "patch_residual.py"])
def test_the_seed_experiments(script: str, traced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = MambaTrace.demo()
    ours, shared = compared(script, model, traced, monkeypatch, tmp_path)
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
        ("axes.py", f"{IN_OTHER_AXES} plain read edited_state edited_y gradients logits state write per_layer shapes"),
        ("axes.py", "norms one_state written both_norms stopped early_state projected y"),
    ],
)
def test_a_ported_script_computes_the_same(
    script: str,
    results: str,
    traced: bool,
    tiny: MambaTrace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _, shared = compared(script, tiny, traced, monkeypatch, tmp_path)
    assert set(results.split()) <= set(shared) | ({"filtered"} if "filtered" in results else set())


def test_generate_stays_as_it_is(traced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = MambaTrace.demo()
    ours, shared = compared("generate.py", model, traced, monkeypatch, tmp_path)
    assert {"ids", "texts", "with_the_token", "without", "further", "unasked"} <= set(shared)
    assert ours["texts"] == [f"{ours['prompt']} Emma."]
    assert ours["ids"][0, 0] == ours["with_the_token"][0, 0] == model.tokenizer.bos_token_id
    assert ours["without"][0, 0] != model.tokenizer.bos_token_id
    eos = (ours["further"][0, 1:] == model.tokenizer.eos_token_id).nonzero()
    assert 0 < eos[0] < ours["further"].shape[1] - 2, "it went on after the end of the text"


@pytest.mark.parametrize("script", ["hooks.py", "caches.py", "axes.py"])
def test_the_fixture_hooks_change_something(
    script: str, tiny: MambaTrace, traced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a port that drops a hook cannot pass."""
    ours, _ = compared(script, tiny, traced, monkeypatch, tmp_path)
    hooked = "out_of_order every_state some_layers mixed branched run_time inside added faded"
    hooked = {"hooks.py": hooked, "caches.py": "edited_logits", "axes.py": IN_OTHER_AXES}[script]
    plain = ours["logits" if script == "caches.py" else "plain"]
    for name in hooked.split():
        assert not torch.allclose(ours[name], plain, atol=1e-3), name


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_only_what_is_listed_changes(script: Path) -> None:
    """All else of a script stays to the byte, its comments and its formatting included."""
    text, report = script.read_text(encoding="utf-8"), port_file(script)
    compile(report.script, str(script), "exec")
    lines = {finding.line for finding in report.findings}
    matcher = difflib.SequenceMatcher(None, text.splitlines(), report.script.splitlines(), autojunk=False)
    for kind, start, end, *_ in matcher.get_opcodes():
        touched = set(range(start + 1, max(start, end - 1) + 2))
        assert kind == "equal" or touched & lines, text.splitlines()[start:end]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_trace_compiles(script: Path) -> None:
    report = port_file(script)
    for block in report.blocks:
        compile(block.code, str(script), "exec")
        assert "run_with" not in block.code
    assert report.blocks or script.stem in ("generate", "gradients", "caches")


def test_every_hook_of_the_fixtures_has_its_trace() -> None:
    """As a line of its own where the script says where it is, and in the trace of its run."""
    traces = {f.found: f.becomes for name in SCRIPTS.glob("*.py") for f in port_file(name).findings}
    assert traces['("blocks.2.hook_y", shift)'].startswith("model.layers[2].ssm.y.output = shift(")
    assert traces['("blocks.0.hook_h.3", lambda h, hook: torch.zeros_like(h))'] == (
        "model.layers[0].ssm.h[3].output = torch.zeros_like(model.layers[0].ssm.h[3].output)"
    )
    assert traces["(hook_name, hook_fn)"].startswith("model.layers[layer].ssm.h[position].output = hook_fn(")
    assert traces["(name, partial(patch_residual, layer=layer, position=position))"].startswith(
        "model.layers[layer].resid_pre.output = partial("
    )
    assert traces["(wanted[0], keep)"].startswith("value = model.hook(wanted[0]).output.save()\n")
    assert traces['("blocks.0.hook_y", keep)'].splitlines() == [
        "value = model.layers[0].ssm.y.output.save()",
        "with loss.backward():",
        '    keep(value.grad, hook=SimpleNamespace(name="blocks.0.hook_y", layer=lambda: 0))',
    ]
    hooks = port_file(SCRIPTS / "hooks.py")
    run = re.compile(r"= model\.run_with_hooks\(|^model\.run_with_hooks|(inside|added) = model\(")
    lines = (SCRIPTS / "hooks.py").read_text("utf-8").splitlines()
    starts = [number for number, line in enumerate(lines, 1) if run.search(line)]
    assert set(starts) <= {block.line for block in hooks.blocks}


def test_the_trace_of_a_gradient_computes_what_the_hook_sees(tiny: MambaTrace) -> None:
    script = "model.run_with_hooks(tokens, bwd_hooks=[('blocks.1.hook_h.2', lambda g, hook: seen.append(g))])"
    (shown,) = [
        f.becomes.splitlines() for f in port_script(script).findings if "lambda" in f.found and "run" not in f.found
    ]
    assert shown[2].strip() == "seen.append(value.grad)"
    tokens, seen = torch.tensor([[3, 1, 7, 9]]), []
    tiny.run_with_hooks(tokens, bwd_hooks=[("blocks.1.hook_h.2", lambda g, hook: seen.append(g))]).sum().backward()
    with tiny.trace(tokens):
        value = tiny.layers[1].ssm.h[2].output.save()
        loss = tiny.lm_head.output.sum().save()
    with loss.backward():
        seen.append(value.grad)
    torch.testing.assert_close(seen[0], seen[1])


def test_scripts_in_one_notebook_keep_apart() -> None:
    """Both experiments one after the other: the second assigns the names of the first again."""
    first, second = ((SCRIPTS / name).read_text("utf-8") for name in ("patch_state.py", "patch_residual.py"))
    both = port_script(first + second)
    assert both.script == port_script(first).script + port_script(second).script
    assert not both.problems
    hooked = [block.code for block in both.blocks if "SimpleNamespace" in block.code]
    assert len(hooked) == 2
    assert "hook_fn(model.layers[layer].ssm.h[position].output, " in hooked[0]
    assert "(model.layers[layer].resid_pre.output, " in hooked[1]
