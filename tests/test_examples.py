"""Every public call has an example in its docstring, and the example runs."""

from __future__ import annotations

import inspect
import linecache
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import rich
import torch
from transformers import MambaConfig, MambaForCausalLM

from mamba_trace import (
    MambaTrace,
    conversion,
    flow,
    hidden_attention,
    interventions,
    lenses,
    means,
    names,
    patching,
    porting,
    results,
    scan,
)
from mamba_trace.hidden_attention import AttentionMaps, Contributions, HiddenAttention
from mamba_trace.hooked import losses
from mamba_trace.hooked.cache import ActivationCache
from mamba_trace.lenses import LogitLens, StateLens
from mamba_trace.patching import metrics
from mamba_trace.patching.result import PatchGrid
from mamba_trace.results import Report, Result, figure, heatmap, page, png, terminal
from mamba_trace.results.heatmap import Heatmap

#: What users call: of modules all public functions, of classes all public methods and properties.
MODULES: tuple[ModuleType, ...] = (
    *(conversion, names, patching, losses, porting, scan, interventions, means, lenses, flow),
    *(hidden_attention, results, heatmap, figure, png, terminal, page, metrics),
)
CLASSES: tuple[type, ...] = (
    *(MambaTrace, ActivationCache, Result, Report, PatchGrid),
    *(HiddenAttention, Contributions, AttentionMaps, LogitLens, StateLens),
)
#: Public of name and no call for users: helpers that other modules share, and what nnsight's classes define.
APART = {
    *("name_of", "named_metrics", "measured", "parse", "nearest", "check", "check_state_dict"),
    *("convolution", "causal_conv", "residuals_per_layer"),
    *("labels", "heatmap", "output", "tokenizer_prepends_bos"),
}


def called() -> dict[str, str]:
    """The docstring of every public function and method, by its name."""
    found: dict[str, str] = {}
    for module in MODULES:
        exported = getattr(module, "__all__", None) or [
            name for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__
        ]
        for name in exported:
            if isinstance(getattr(module, name), FunctionType) and not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = inspect.getdoc(getattr(module, name)) or ""
    for cls in CLASSES:
        for base in cls.__mro__:
            if not base.__module__.startswith("mamba_trace") or (base is not cls and base in CLASSES):
                continue  # what is inherited from another of them is tried there
            for name, one in vars(base).items():
                method = isinstance(one, (FunctionType, classmethod, staticmethod, property))
                if method and not name.startswith("_"):
                    found.setdefault(f"{cls.__name__}.{name}", inspect.getdoc(getattr(cls, name)) or "")
    return found


def public() -> dict[str, str]:
    """The docstring of everything that users call, and of the classes that they make, by its name."""
    made = {cls.__name__: inspect.getdoc(cls) or "" for cls in (*CLASSES, Heatmap)}
    found = {name: text for name, text in called().items() if last(name) not in APART}
    return found | {name: text for name, text in made.items() if example_of(text)}


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def example_of(text: str) -> str:
    """The code of a docstring's example, ``>>>`` lines included; empty where there is none."""
    if "Example::" in text:
        return textwrap.dedent(text.split("Example::", 1)[1])
    marks = [line.strip() for line in text.splitlines() if line.strip().startswith((">>> ", "... "))]
    return "\n".join(line[4:] for line in marks)


@pytest.fixture(scope="module")
def model() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def space(model: MambaTrace) -> dict[str, Any]:
    """What examples may name without making it."""
    prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
    source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
    metric = patching.logit_diff(model, " Emma", " Shelby")
    grid = patching.patch_grid(model, prompt, source, "h", metric, progress=False)
    found = {"model": model, "prompt": prompt, "source": source, "metric": metric, "grid": grid}
    found |= {"heatmap": grid.heatmap(), "torch": torch, "Tensor": torch.Tensor, "rich": rich}
    found |= {"Path": Path, "dataclass": dataclass}
    found |= {cls.__name__: cls for cls in (*CLASSES, Heatmap, MambaConfig, MambaForCausalLM)}
    for module in MODULES:
        found |= {name: one for name, one in vars(module).items() if isinstance(one, FunctionType)}
    return found


def test_every_public_call_has_an_example() -> None:
    assert not [name for name, text in public().items() if not example_of(text).strip()]


def test_what_is_no_call_for_users_is_there() -> None:
    assert not APART - {last(name) for name in called()}


@pytest.mark.parametrize("name", [name for name, text in public().items() if example_of(text).strip()])
def test_the_example_runs(name: str, space: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = example_of(public()[name]).replace('"state-spaces/mamba-370m"', '"demo"')
    if '"demo"' in code or "figure().show()" in code:
        code = code.replace('MambaTrace("demo")', "MambaTrace.demo()").replace(".show()", ".to_json()")
    _, cache = space["model"].run_with_cache(space["prompt"])
    script = str(tmp_path / "example.py")
    linecache.cache[script] = (len(code), None, code.splitlines(keepends=True), script)
    exec(compile(code, script, "exec"), {**space, "cache": cache})
