"""What Hugging Face's models and nnsight alone do: what two pages of the documentation say, held to what is installed.

A test of this file fails where Hugging Face has mended something, and then the page has to say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from conftest import make_hf
from hybrid_models import PLAIN, make_hybrid
from test_reference import distance, draw_tokens
from torch import Tensor

from mamba_trace import MambaTrace

PURE = ("mamba", "falcon_mamba", "mamba2")
#: Beyond the rounding of float32, and so an answer to another question.
WRONG, RIGHT = 1e-3, 1e-4
Answer = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def plain_of(kind: str, **changes: Any) -> Any:
    """A tiny model of Hugging Face's, of any of the ten architectures."""
    return make_hf(model_type=kind, **changes) if kind in PURE else make_hybrid(kind, **changes)


def errors(plain: Any, answer: Answer) -> tuple[float, float]:
    """How far an answer of Hugging Face's and ours are from what each should be, beside the largest logit."""
    tokens, model = draw_tokens(2, seed=1, length=10), MambaTrace(copy.deepcopy(plain))
    with torch.no_grad():
        return distance(*answer(plain, tokens)), distance(*answer(model._module, tokens))


def several_on_a_cache(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Five tokens, and five more at once on their cache; and the ten together."""
    cache = module(tokens[:, :5], use_cache=True).cache
    return module(tokens[:, 5:], cache=cache, use_cache=True).logits, module(tokens).logits[:, 5:]


def one_by_one(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Five tokens, and five more one after the other."""
    cache, logits = module(tokens[:, :5], use_cache=True).cache, []
    for position in range(5, 10):
        out = module(tokens[:, position : position + 1], cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, 1), module(tokens).logits[:, 5:]


def after_padding_on_the_right(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A token after a prompt of six that three columns of padding follow; and the seven alone."""
    mask = torch.ones_like(tokens)
    mask[:, 6:9] = 0
    cache = module(tokens[:, :9], attention_mask=mask[:, :9], use_cache=True).cache
    positions = {} if module.config.model_type in PURE else {"position_ids": torch.full((2, 1), 6)}
    step = module(tokens[:, 9:], cache=cache, attention_mask=mask, use_cache=True, **positions)
    return step.logits, module(torch.cat((tokens[:, :6], tokens[:, 9:]), 1)).logits[:, -1:]


def step_with_the_whole_mask(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Two decode steps that are given the mask of all tokens so far."""
    cache, mask = module(tokens[:, :8], use_cache=True).cache, torch.ones_like(tokens)
    for position in (8, 9):
        out = module(
            tokens[:, position : position + 1], cache=cache, attention_mask=mask[:, : position + 1], use_cache=True
        )
        cache = out.cache
    return out.logits, module(tokens).logits[:, -1:]


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "zamba", "bamba"])
def test_hugging_face_forgets_where_several_tokens_meet_a_cache(kind: str) -> None:
    """The state of Mamba-1's mixers; in Bamba how many tokens there were."""
    theirs, ours = errors(plain_of(kind), several_on_a_cache)
    assert theirs > WRONG
    assert ours < RIGHT


@pytest.mark.parametrize("kind", [*PURE, *PLAIN])
def test_hugging_face_decodes_wrongly_after_padding_on_the_right(kind: str) -> None:
    theirs, ours = errors(plain_of(kind), after_padding_on_the_right)
    assert theirs > WRONG
    assert ours < RIGHT


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_hugging_face_decodes_wrongly_with_the_mask_of_all_tokens(kind: str) -> None:
    theirs, ours = errors(plain_of(kind), step_with_the_whole_mask)
    assert theirs > WRONG
    assert ours < RIGHT


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba2", {"time_step_limit": (0.05, 0.5)}),
        ("zamba2", {"time_step_min": 0.05}),
        ("nemotron_h", {"time_step_min": 0.05}),
    ],
)
def test_hugging_face_leaves_the_limit_of_delta_out_of_decode_steps(kind: str, changes: dict[str, Any]) -> None:
    theirs, ours = errors(plain_of(kind, **changes), one_by_one)
    assert theirs > WRONG
    assert ours < RIGHT


@pytest.mark.parametrize("kind", PURE)
def test_hugging_face_rescales_weights_that_it_loads(kind: str, tmp_path: Path) -> None:
    module = plain_of(kind, rescale_prenorm_residual=True)
    module.save_pretrained(tmp_path)
    name = "backbone.layers.0.mixer.out_proj.weight"
    saved = module.get_parameter(name)
    loaded = type(module).from_pretrained(tmp_path).get_parameter(name)
    ours = MambaTrace(str(tmp_path), dispatch=True)._module.get_parameter(name)
    assert torch.equal(ours, saved)
    torch.testing.assert_close(loaded, saved / 3**0.5)  # three layers


def test_hugging_face_scans_a_float64_model_in_float32() -> None:
    module, tokens = plain_of("mamba2", dtype=torch.float64), draw_tokens(1, seed=2)
    model = MambaTrace(copy.deepcopy(module))
    with torch.no_grad():
        apart = distance(module(tokens).logits, model._module(tokens).logits)
    assert 1e-9 < apart < 1e-5  # `test_reference` says that ours are right to 1e-12


def test_nnsight_alone_reaches_no_state() -> None:
    """No module of Hugging Face's takes or gives the state after one token."""
    module, tokens = plain_of("mamba"), draw_tokens(1, seed=3)
    states = [(1, 24, 5), (1, 6, 24, 5), (1, 24, 6, 5)]
    seen: list[tuple[int, ...]] = []
    for part in module.modules():
        part.register_forward_hook(lambda _, given, result: seen.extend(shapes((given, result))))
    with torch.no_grad():
        module(tokens, use_cache=False)
    assert (1, 6, 48) in seen  # the output of in_proj
    assert not set(states) & set(seen)
    assert not hasattr(nnsight.NNsight(module).backbone.layers[0].mixer, "h")


def shapes(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in tuples."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    return [shape for item in value for shape in shapes(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("name", ["conv1d", "dt_proj"])
def test_nnsight_alone_misses_two_modules(name: str) -> None:
    """Hugging Face reads their weights and never calls them."""
    model, tokens = nnsight.NNsight(plain_of("mamba")), draw_tokens(1, seed=3)
    with pytest.raises(Exception, match="already ran past"), model.trace(tokens):
        nnsight.save(getattr(model.backbone.layers[0].mixer, name).output)
