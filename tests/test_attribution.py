"""An attribution grid is what the gradients of an independent Mamba say, to first order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from conftest import ModuleFactory
from grids import LONG, MINUS, OURS, PATCHED, PLUS, THEIRS
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import ArgumentError, MetricError
from mamba_trace.patching import attribution_grid, log_prob, logit_diff, patch_grid
from mamba_trace.sites import BY_NAME


class Run:
    """The reference on one prompt: every value, and the gradient of the metric with respect to each."""

    def __init__(self, module: Any, tokens: Tensor, embeddings: Tensor | None = None) -> None:
        self.values: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}

        def edit(hook: str, value: Tensor) -> Tensor:
            if hook == "hook_embed" and embeddings is not None:
                value = embeddings
            self.values[hook] = value.detach()
            moved[hook] = torch.zeros_like(value, requires_grad=True)
            return value + moved[hook]

        logits = reference.forward(module.state_dict(), module.config, tokens, edit)[0, -1]
        self.metric = logits[PLUS] - logits[MINUS]
        found = torch.autograd.grad(self.metric, list(moved.values()), allow_unused=True)
        self.gradients = {
            hook: torch.zeros_like(self.values[hook]) if gradient is None else gradient
            for hook, gradient in zip(moved, found, strict=True)
        }


def first_order(module: Any, site: str, steps: int) -> Tensor:
    """The grid of `OURS` and `THEIRS`: [rows,L]."""
    prompt, source = Run(module, OURS), Run(module, THEIRS)
    start, end = prompt.values["hook_embed"], source.values["hook_embed"]
    points = [Run(module, OURS, torch.lerp(start, end, (step + 0.5) / steps)) for step in range(steps)]
    runs = [prompt] if steps == 1 else points
    layers = [None] if BY_NAME[site].scope == "model" else range(module.config.num_hidden_layers)
    rows = []
    for layer in layers:
        name, length = BY_NAME[site].hook_name(layer), OURS.shape[1]
        hooks = [f"{name}.{p}" for p in range(length)] if site == "h" else [name]
        cells = []
        for hook in hooks:
            gradient = torch.stack([run.gradients[hook] for run in runs]).mean(0)
            product = ((source.values[hook] - prompt.values[hook]) * gradient)[0]
            cells.append(product.sum() if site == "h" else product.flatten(1).sum(1))
        rows.append(torch.stack(cells) if site == "h" else cells[0])
    return prompt.metric.detach() + torch.stack(rows).detach()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("model_type", "site"), PATCHED)
def test_a_grid_is_the_difference_of_values_times_the_gradient(
    tiny_hf: ModuleFactory, model_type: str, site: str, steps: int
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type, dtype=torch.float64))
    got = attribution_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS), steps=steps)
    expected = first_order(tiny_hf(model_type=model_type, dtype=torch.float64), site, steps)
    torch.testing.assert_close(got.values, expected, rtol=1e-10, atol=1e-10)
    assert (expected - got.prompt_metric).abs().max() > 1e-4
    assert got.method == ("attribution" if steps == 1 else "integrated gradients")


@pytest.mark.parametrize("site", ["h", "conv"])
def test_every_backend_gives_the_same_grid(tiny_hf: ModuleFactory, each_backend: str, site: str) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers and steps, there and back."""
    model = MambaTrace(tiny_hf(), kernels=each_backend)
    got = attribution_grid(model, OURS, THEIRS, site, logit_diff(model, PLUS, MINUS))
    expected = first_order(tiny_hf(), site, 1)
    largest = float((expected - got.prompt_metric).abs().max())
    torch.testing.assert_close(got.values.double(), expected.double(), rtol=0, atol=1e-5 * largest)


def test_it_is_what_small_patches_do(exact: MambaTrace) -> None:
    """To first order in the difference of the runs: a small step of the source's embeddings."""
    metric = logit_diff(exact, PLUS, MINUS)
    with torch.no_grad():
        weight = exact._module.backbone.embeddings.weight
        differ = (OURS != THEIRS)[0]
        for ours, theirs in zip(OURS[0, differ], THEIRS[0, differ], strict=True):
            weight[theirs] = weight[ours] + 1e-5 * weight[theirs]
    patched = patch_grid(exact, OURS, THEIRS, "h", metric, progress=False)
    estimated = attribution_grid(exact, OURS, THEIRS, "h", metric)
    moved = (patched.values - patched.prompt_metric).abs().max()
    assert moved > 1e-7
    assert (patched.values - estimated.values).abs().max() < 1e-3 * moved
    assert estimated.correlation(patched) > 0.999


def test_several_metrics_come_from_one_run(exact: MambaTrace) -> None:
    metrics = {"difference": logit_diff(exact, PLUS, MINUS), "probability": log_prob(exact, PLUS)}
    both = attribution_grid(exact, LONG[:1], LONG[1:], "conv", metrics, metric_positions=-3)
    for name, metric in metrics.items():
        alone = attribution_grid(exact, LONG[:1], LONG[1:], "conv", metric, metric_positions=-3)
        torch.testing.assert_close(both[name].values, alone.values, rtol=1e-12, atol=1e-12)
    assert both["difference"].metric == "difference"


def test_a_metric_in_place_leaves_the_others_their_logits_and_gradients(exact: MambaTrace) -> None:
    def halved(logits: Tensor) -> Tensor:
        logits /= 2
        return logits[:, PLUS]

    def plain(logits: Tensor) -> Tensor:
        return logits[:, PLUS]

    both = attribution_grid(exact, OURS, THEIRS, "h", {"halved": halved, "plain": plain})
    alone = attribution_grid(exact, OURS, THEIRS, "h", plain)
    torch.testing.assert_close(both["plain"].values, alone.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both["halved"].values, alone.values / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [True, False])
def test_it_leaves_no_gradient_on_the_weights(tiny_hf: ModuleFactory, trainable: bool) -> None:
    module = tiny_hf().requires_grad_(trainable)
    before = copy.deepcopy(module.state_dict())
    model = MambaTrace(module)
    metric = logit_diff(model, PLUS, MINUS)
    with torch.no_grad():
        grid = attribution_grid(model, OURS, THEIRS, "resid_pre", metric)
    assert (grid.values != grid.prompt_metric).any()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_metric_without_a_gradient_is_refused(tiny: MambaTrace) -> None:
    with pytest.raises(MetricError, match="argmax has no gradient"):
        attribution_grid(tiny, OURS, THEIRS, "h", {"argmax": lambda logits: logits.argmax(-1).float()})
    with pytest.raises(MetricError, match="inference_mode"), torch.inference_mode():
        attribution_grid(tiny, OURS, THEIRS, "h", logit_diff(tiny, PLUS, MINUS))
    with pytest.raises(ArgumentError, match="steps=0"):
        attribution_grid(tiny, OURS, THEIRS, "h", logit_diff(tiny, PLUS, MINUS), steps=0)
