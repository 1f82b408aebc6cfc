"""The traceback of a mistake ends at the user's line, and no line above it is of this package or of nnsight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight.schema.config import CONFIG
from test_notebook import PROMPTS, run_cells
from torch import Tensor

import mamba_trace
from mamba_trace import MambaTrace
from mamba_trace.errors import MambaTraceError, PromptError, SiteValueError, UnknownSiteError
from mamba_trace.hidden_attention import attention_maps, contributions, hidden_attention
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.means import mean_activation
from mamba_trace.modeling.stretches import Stretches
from mamba_trace.patching import patch_grid


def wrong_shape(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(tokens):
        model.layers[1].ssm.h[3].output = torch.zeros(3)  # here


def misspelt(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(tokens):
        _ = model.layers[1].ssm.detla.output  # here


def out_of_range(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(tokens):
        _ = model.layers[1].ssm.h[99].output  # here


def no_prompt(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(3.5):  # here
        _ = model.lm_head.output


def own_key_error(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(tokens):
        _ = model.layers[1].ssm.delta.output
        _ = {}["nothing"]  # here


def in_an_invoke(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace() as tracer:
        with tracer.invoke(tokens):
            model.layers[1].ssm.delta.output.save()
        with tracer.invoke(tokens):
            _ = {}["nothing"]  # here


def in_a_step(model: MambaTrace, tokens: Tensor) -> None:
    with model.generate(tokens, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:3]:
            _ = model.lm_head.output[0, 0, 10**9]  # here


def in_a_backward(model: MambaTrace, tokens: Tensor) -> None:
    with model.trace(tokens):
        delta = model.layers[1].ssm.delta.output
        delta.requires_grad_(True)
        with model.lm_head.output.sum().backward():
            _ = delta.grad[10**6]  # here


def in_a_session(model: MambaTrace, tokens: Tensor) -> None:
    with model.session(), model.trace(tokens):
        _ = {}["nothing"]  # here


def in_a_scan(model: MambaTrace, tokens: Tensor) -> None:
    with model.scan(tokens):
        _ = {}["nothing"]  # here


def in_an_edit(model: MambaTrace, tokens: Tensor) -> None:
    with model.edit() as (_, edited):
        _ = edited.layers[1].ssm.delta.output
        _ = {}["nothing"]  # here
    with edited.trace(tokens):
        _ = edited.lm_head.output


def in_a_hook(model: MambaTrace, tokens: Tensor) -> None:
    def hooked(value: Tensor, hook: Any) -> Tensor:
        return {}["nothing"]  # here

    model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_delta", hooked)])


def what_a_hook_returns(model: MambaTrace, tokens: Tensor) -> None:
    hooks = [("blocks.1.hook_delta", lambda value, hook: value[..., :3])]
    model.run_with_hooks(tokens, fwd_hooks=hooks)  # here


def in_a_filter(model: MambaTrace, tokens: Tensor) -> None:
    model.run_with_cache(tokens, names_filter=lambda name: {}["nothing"])  # here


def in_a_metric(model: MambaTrace, tokens: Tensor) -> None:
    def metric(logits: Tensor) -> Tensor:
        return {}["nothing"]  # here

    patch_grid(model, tokens[:1], tokens[1:2], site="h", metric=metric, progress=False)


def what_a_metric_returns(model: MambaTrace, tokens: Tensor) -> None:
    patch_grid(model, tokens[:1], tokens[1:2], site="h", metric=lambda logits: logits, progress=False)  # here


def in_a_lens(model: MambaTrace, tokens: Tensor) -> None:
    logit_lens(model, tokens[:1], token=10**6)  # here


def in_a_lens_of_states(model: MambaTrace, tokens: Tensor) -> None:
    state_lens(model, tokens[:1], layer=99)  # here


def in_a_map(model: MambaTrace, tokens: Tensor) -> None:
    hidden_attention(model, tokens[:1], layer=99)  # here


def in_maps(model: MambaTrace, tokens: Tensor) -> None:
    attention_maps(model, tokens[:1], layers=[99])  # here


def in_contributions(model: MambaTrace, tokens: Tensor) -> None:
    contributions(model, tokens[:1], layer=99)  # here


def in_a_mean(model: MambaTrace, tokens: Tensor) -> None:
    mean_activation(model, tokens, "detla")  # here


MISTAKES: list[Callable[[MambaTrace, Tensor], None]] = [
    *(wrong_shape, misspelt, out_of_range, no_prompt, own_key_error, in_an_invoke, in_a_step, in_a_backward),
    *(in_a_session, in_a_scan, in_an_edit, in_a_hook, what_a_hook_returns, in_a_filter, in_a_metric),
    *(what_a_metric_returns, in_a_lens, in_a_lens_of_states, in_a_map, in_maps, in_contributions, in_a_mean),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_every_line_is_the_users_and_the_last_is_the_mistake(
    tiny: MambaTrace, tokens: Tensor, mistake: Callable[[MambaTrace, Tensor], None]
) -> None:
    with pytest.raises((MambaTraceError, KeyError, IndexError)) as error:
        mistake(tiny, tokens)
    frames = traceback.extract_tb(error.tb)
    assert {frame.filename for frame in frames} == {__file__}
    assert frames[-1].line is not None
    assert frames[-1].line.endswith("# here")
    assert len(frames) <= 4, "a line is said once"
    assert error.value.__cause__ is None
    assert "During handling" not in "".join(traceback.format_exception(error.value))
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, tiny._module(tokens).logits), "the model is usable and unchanged"


def test_what_a_mistake_called_outside_of_this_package_is_shown(tiny: MambaTrace, tokens: Tensor) -> None:
    with pytest.raises(RuntimeError) as error, tiny.trace(tokens):
        torch.einsum("i", tiny.layers[1].ssm.delta.output)
    named = [Path(frame.filename).name for frame in traceback.extract_tb(error.tb)]
    assert named[:2] == ["test_frames.py"] * 2
    assert named[2:] == ["functional.py"]


def test_an_error_that_no_line_of_the_user_led_to_keeps_its_traceback(
    tiny: MambaTrace, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stretches, "run", None)
    with pytest.raises(TypeError) as error, torch.no_grad(), tiny.trace(tokens):
        _ = tiny.layers[1].ssm.h[3].output
    named = {Path(frame.filename).parent.name for frame in traceback.extract_tb(error.tb)}
    assert {"modeling", "mamba"} <= named


def test_debug_mode_shows_every_frame(tiny: MambaTrace, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    with pytest.raises(SiteValueError) as error:
        wrong_shape(tiny, tokens)
    assert any("nnsight" in frame.filename for frame in traceback.extract_tb(error.tb))


SCRIPT = PROMPTS + "import torch\n"
#: What is run after it, and the lines that its traceback shows.
LINES = {
    "a shape": "with model.trace(prompt):\n    model.layers[1].ssm.h[3].output = torch.zeros(3)\n",
    "a name": "with model.trace(prompt):\n    x = model.layers[1].ssm.detla.output\n",
    "a position": "with model.trace(prompt):\n    x = model.layers[1].ssm.h[99].output\n",
    "a key": "with model.trace(prompt):\n    x = model.lm_head.output\n    y = {}['nothing']\n",
    "a hook": (
        "def fn(value, hook):\n    return {}['nothing']\n"
        "model.run_with_hooks(prompt, fwd_hooks=[('blocks.1.hook_delta', fn)])\n"
    ),
    "a metric": (
        "def fn(logits):\n    return {}['nothing']\n"
        "patch_grid(model, prompt, source, site='h', metric=fn, progress=False)\n"
    ),
}
SHOWN = {
    **{name: [lines.splitlines()[0], lines.splitlines()[-1]] for name, lines in LINES.items()},
    **{name: [LINES[name].splitlines()[-1], LINES[name].splitlines()[1]] for name in ("a hook", "a metric")},
}


def test_the_traceback_of_a_script(tmp_path: Path) -> None:
    name, script = "a shape", tmp_path / "script.py"
    script.write_text(SCRIPT + LINES[name])
    paths = os.pathsep.join([str(Path(mamba_trace.__file__).parents[1]), *sys.path])
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    lines = ran.stderr.splitlines()
    at = lines.index("Traceback (most recent call last):")
    files = [line for line in lines[at:] if line.startswith("  File ")]
    assert [line for line in files if f'"{script}"' not in line] == []
    assert [line.strip() for line in lines[at:] if line.strip() in map(str.strip, SHOWN[name])] == [
        line.strip() for line in SHOWN[name]
    ]
    assert ran.returncode == 1


def in_a_kernel() -> Iterator[tuple[str, str]]:
    _, *outputs = run_cells(SCRIPT, *LINES.values())
    for name, of_cell in zip(LINES, outputs, strict=True):
        (error,) = [output for output in of_cell if output.output_type == "error"]
        yield name, re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))


def test_the_traceback_of_a_cell() -> None:
    for name, shown in in_a_kernel():
        assert "site-packages" not in shown, name
        assert "mamba_trace/" not in shown, name
        marked = [line.split(None, 2)[2] for line in shown.splitlines() if re.match(r"-+> ?\d", line)]
        assert [line.strip() for line in marked] == [line.strip() for line in SHOWN[name]], name


def test_a_misspelt_name_is_told_once(tiny: MambaTrace) -> None:
    with pytest.raises(UnknownSiteError) as error:
        _ = tiny.layers[1].ssm.detla
    assert error.value.__suppress_context__
    with pytest.raises(PromptError):
        no_prompt(tiny, torch.zeros(1, 1))
