"""Metrics are what their names say, of the logits of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import ModuleFactory
from grids import OURS, THEIRS, slow_grid
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching import log_prob, logit, logit_diff, patch_grid, phases, prob


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (logit, lambda logits: logits[-1, 7]),
        (log_prob, lambda logits: logits[-1].log_softmax(-1)[7]),
        (prob, lambda logits: logits[-1].softmax(-1)[7]),
    ],
    ids=["logit", "log_prob", "prob"],
)
def test_metrics_are_what_their_names_say(
    exact: MambaTrace, tiny_hf: ModuleFactory, metric: Any, expected: Callable[[Tensor], Tensor]
) -> None:
    got = patch_grid(exact, OURS, THEIRS, "y", metric(exact, 7), progress=False)
    torch.testing.assert_close(got.values, slow_grid(tiny_hf(dtype=torch.float64), "y", expected), rtol=1e-9, atol=1e-9)
    assert got.metric == {logit: "logit", log_prob: "log probability", prob: "probability"}[metric] + " of 7"


def pair_of_logits(answer: int, wrong: int) -> Callable[[Tensor], Tensor]:
    """A metric of which nobody knows what it looks at."""
    return lambda logits: logits[..., answer] - logits[..., wrong]


@pytest.mark.parametrize("site", ["h", "resid_pre", "embeddings", "lm_head"])
def test_a_grid_is_the_same_where_few_logits_are_looked_at(exact: MambaTrace, site: str) -> None:
    known = {"one": logit_diff(exact, 7, 3), "other": logit(exact, 5), "again": logit(exact, 7)}
    own = {"one": pair_of_logits(7, 3), "other": lambda logits: logits[..., 5], "again": lambda logits: logits[..., 7]}
    got, expected = (patch_grid(exact, OURS, THEIRS, site, metric, progress=False) for metric in (known, own))
    for name, grid in got.items():
        torch.testing.assert_close(grid.values, expected[name].values, rtol=1e-9, atol=1e-9)
        assert grid.source_metric == pytest.approx(expected[name].source_metric)


def test_only_the_logits_that_metrics_look_at_are_computed(exact: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[list[int]] = []
    own = phases.logits_of

    def logits_of(tokens: list[int], *rest: Any) -> Tensor:
        computed.append(tokens)
        return own(tokens, *rest)

    monkeypatch.setattr(phases, "logits_of", logits_of)
    many: dict[str, Any] = {str(token): logit(exact, token) for token in range(phases.FEW + 1)}
    for metric, expected in (
        ({"one": logit_diff(exact, 7, 3), "other": logit(exact, 5)}, [3, 5, 7]),
        (logit(exact, 7), [7]),
        (prob(exact, 7), None),
        (log_prob(exact, 7), None),
        ({"one": logit(exact, 7), "other": pair_of_logits(7, 3)}, None),
        (many, None),
    ):
        computed.clear()
        patch_grid(exact, OURS, THEIRS, "h", metric, progress=False)
        assert all(tokens == expected for tokens in computed)
        assert bool(computed) == (expected is not None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_few_logits_are_those_of_the_head(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    head, value = torch.nn.Linear(48, 31, bias=bias, dtype=dtype), torch.randn(5, 3, 48, dtype=dtype)
    with torch.no_grad():
        logits = phases.logits_of([3, 7], head, value)
        expected = head.double()(value.double())[..., [3, 7]]
        assert torch.equal(phases.logits_of([3, 7], head.to(dtype), value[2:3, 1:2]), logits[2:3, 1:2])
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_head_that_somebody_listens_to_is_called(exact: MambaTrace) -> None:
    heard: list[Tensor] = []
    handle = exact._module.lm_head.register_forward_hook(lambda module, given, output: heard.append(output))
    try:
        patch_grid(exact, OURS, THEIRS, "h", logit(exact, 7), progress=False)
    finally:
        handle.remove()
    assert {value.shape[-1] for value in heard} == {exact._module.lm_head.out_features}


def test_a_head_that_is_offloaded_is_called(tiny_hf: ModuleFactory) -> None:
    plain, module = MambaTrace(tiny_hf(dtype=torch.float64)), tiny_hf(dtype=torch.float64)
    cpu_offload(module.lm_head, execution_device=torch.device("cpu"))
    assert module.lm_head.weight.is_meta
    offloaded = MambaTrace(module)
    grids = [patch_grid(model, OURS, THEIRS, "h", logit(model, 7), progress=False) for model in (plain, offloaded)]
    torch.testing.assert_close(grids[1].values, grids[0].values, rtol=1e-9, atol=1e-9)
