"""What users select: every layer that does not exist is refused with one error and one message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mamba_trace
from mamba_trace import MambaTrace
from mamba_trace.arguments.selection import layer_number, layer_numbers
from mamba_trace.errors import LayerError, UnknownSiteError
from mamba_trace.flow import decay_rate
from mamba_trace.hidden_attention import hidden_attention
from mamba_trace.lenses import state_lens
from mamba_trace.means import mean_activation
from mamba_trace.names import layer_index


def ignored(value: Tensor, hook: Any) -> None:
    raise AssertionError("never called")


#: What is asked of the model and its tokens, and how the message quotes it.
ASKED: dict[str, tuple[str, Callable[[MambaTrace, Tensor], Any]]] = {
    "a layer of the model": ("layers[3]", lambda m, t: m.layers[3]),
    "a place": ("'blocks.3.hook_y'", lambda m, t: m.hook("blocks.3.hook_y")),
    "a path": ("'layers[3].ssm.h[2]'", lambda m, t: m.hook("layers[3].ssm.h[2]")),
    "a hook": ("'blocks.3.hook_y'", lambda m, t: m.run_with_hooks(t, [("blocks.3.hook_y", ignored)])),
    "a backward hook": (
        "'blocks.3.hook_h.2'",
        lambda m, t: m.run_with_hooks(t, bwd_hooks=[("blocks.3.hook_h.2", ignored)]),
    ),
    "a name to keep": ("'blocks.3.hook_h'", lambda m, t: m.run_with_cache(t, "blocks.3.hook_h")),
    "where a run starts": ("start_at_layer=3", lambda m, t: m.run_with_hooks(t, start_at_layer=3)),
    "where a run stops": ("stop_at_layer=4", lambda m, t: m.run_with_hooks(t, stop_at_layer=4)),
    "layers of a run": (
        "only_use_these_layers=3",
        lambda m, t: m.run_with_hooks(t, only_use_these_layers=[0, 3]),
    ),
    "a key of a cache": ("('resid_post', 3)", lambda m, t: m.run_with_cache(t)[1]["resid_post", 3]),
    "a hook name in a cache": ("'blocks.3.hook_y'", lambda m, t: m.run_with_cache(t)[1]["blocks.3.hook_y"]),
    "a trajectory in a cache": ("('h', -4)", lambda m, t: m.run_with_cache(t)[1]["h", -4]),
    "a stream of a cache": ("layer=4", lambda m, t: m.run_with_cache(t)[1].accumulated_resid(4)),
    "sites of a cache": ("layer=4", lambda m, t: m.run_with_cache(t)[1].stack_activation("h", 4)),
    "the weights of a block": ("blocks[-4]", lambda m, t: m.blocks[-4]),
    "several layers": ("layers=[0, 3]", lambda m, t: layer_numbers(m, [0, 3])),
    "a rate of decay": ("layer=3", lambda m, t: decay_rate(m, 3)),
    "hidden attention": ("layer=-4", lambda m, t: hidden_attention(m, t[:1], -4)),
    "a mean": ("layers=3", lambda m, t: mean_activation(m, t, "y", 3)),
    "a lens": ("layers=3", lambda m, t: state_lens(m, t[:1], 3)),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_layer_that_does_not_exist_is_one_error_with_one_message(tiny: MambaTrace, tokens: Tensor, case: str) -> None:
    asked, call = ASKED[case]
    with pytest.raises(LayerError) as error:
        call(tiny, tokens)
    number = re.findall(r"-?\d+", asked.split("hook_")[0].split(".ssm")[0])[-1]
    assert str(error.value) == f"{asked}: this model has layers 0 to 2, and no {number}"
    assert isinstance(error.value, UnknownSiteError)  # so also a KeyError, as of any mapping


def test_no_other_file_has_a_message_of_its_own() -> None:
    package = Path(mamba_trace.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    having = {name for name, text in texts.items() if re.search(r"has layers 0 to \{", text)}
    assert having == {"names/__init__.py", "arguments/selection.py"}
    assert texts["arguments/selection.py"].count("has layers 0 to {") == 1  # no layer at all was named


def test_a_cache_without_a_layer_is_still_a_mapping(tiny: MambaTrace, tokens: Tensor) -> None:
    _, cache = tiny.run_with_cache(tokens, "blocks.1.hook_y")
    assert cache.get(("y", 7)) is None
    assert ("y", 7) not in cache
    assert ("y", 1) in cache


@pytest.mark.parametrize("layer", [1, -2, np.int64(1), torch.tensor(1)], ids=repr)
def test_a_layer_is_any_integer_and_counts_from_the_end_too(tiny: MambaTrace, layer: Any) -> None:
    assert layer_index(layer, 3, "layer") == layer_number(tiny, layer) == 1
    assert layer_numbers(tiny, [2, layer]) == [1, 2]


@pytest.mark.parametrize("layer", [True, np.bool_(True), torch.tensor(True), 1.0, "1", None, [1]], ids=repr)
def test_what_is_no_integer_is_no_layer(layer: Any) -> None:
    with pytest.raises(LayerError, match=r"^layer: .* 0 to 2, named by an integer, -1 for the last$"):
        layer_index(layer, 3, "layer")
