"""The mean of a site over prompts, which is what mean ablation puts in its place.

A mean is silently wrong if padding is counted, if short prompts weigh as much as long ones, or if half
precision rounds a long sum away. `mean_activation` counts every token once and padding never, and adds up in
float64. It holds one batch of one layer at a time, so any number of prompts fits in the memory of a forward.

Source: mean ablation as in Wang et al. (arXiv 2211.00593), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments.padding import mask_of
from .arguments.prompts import prompt_of
from .arguments.selection import Layers, layer_numbers
from .errors import ArgumentError, LayerError, PromptError, SiteValueError, UnknownSiteError
from .names import check_family, nearest, parse
from .names.layouts import absent, site_in
from .sites import BY_HOOK, BY_NAME, Site, describe_axes, site_named
from .tracing.frames import users_errors
from .tracing.one_run import refuse_inside_a_trace

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["mean_activation"]


@users_errors
def mean_activation(
    model: MambaTrace,
    prompts: str | Sequence[str] | Tensor,
    site: str,
    layers: Layers = None,
    *,
    over: str = "positions",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
) -> dict[int | None, Tensor]:
    """The mean of a site over prompts, padding left out: what `interventions.ablate` takes for mean ablation.

    Args:
        model: the model.
        prompts: a string, a list of strings, or token ids [B,L] or [L].
        site: a site's name or hook name: ``"y"``, ``"resid_post"``, ``"h"``, ``"hook_conv"``, ...
        layers: one or several, which have the site; ``None`` for all that do. A site of the whole model
            (``"embeddings"``) has none.
        over: ``"positions"``: over all tokens of all prompts, each with the same weight. ``"prompts"``: for
            each position separately, for prompts of one length. An attention pattern, whose rows are as long as
            the prompt, only has the latter.
        attention_mask: [B,L], 0 on the padding of token ids. Not needed for strings, nor for tokens that
            ``to_tokens`` made.
        batch_size: how many prompts one forward runs. One batch of one layer of the site is held at a time.

    Returns:
        The mean by layer, counted from 0 (by ``None`` for a site of the whole model), on the CPU and in
        float32 or better. It has the site's axes without B and L, such as [E]; with ``over="prompts"`` only B
        is gone, such as [L,E], and ``means[1][5]`` is the mean for ``h[5]``.

    Raises:
        UnknownSiteError: if this model has no such site, or one of the layers lacks it, saying which layers have
            it. Like the others, before anything runs.
        LayerError: if the model has no such layer.
        SiteValueError: if the site is the same for every prompt.
        PromptError: if there are no prompts, or they have several lengths with ``over="prompts"``.
        ArgumentError: for another ``over``, one that the site does not have, or a ``batch_size`` below 1.
        RuntimeError: inside a trace.

    Example::

        from mamba_trace.interventions import ablate
        from mamba_trace.means import mean_activation

        means = mean_activation(model, [prompt, source], "y", layers=[1, 2])
        with model.trace(prompt):
            ablate(model.layers[1].ssm.y, means[1])  # mean ablation of a layer's scan
            logits = model.lm_head.output.save()
    """
    refuse_inside_a_trace(model, "mean_activation")
    averaged = averaged_site(model, site)
    sums = {layer: Sum() for layer in averaged_layers(model, averaged, layers)}
    if over not in ("positions", "prompts"):
        raise ArgumentError(f"over={over!r} is neither 'positions' nor 'prompts'")
    if over == "positions" and "S" in averaged.axes:
        raise ArgumentError(
            f"over='positions': each row of {site} {describe_axes(averaged.axes)} belongs to one position and has "
            f"a number for each before it; over='prompts' averages it over prompts of one length"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}: a forward runs at least one prompt")
    rows = prompt_rows(model, prompts)
    if isinstance(rows, Tensor):  # for all rows at once: the longest says what is padding in the others
        attention_mask = row_mask(model, prompts, attention_mask)
    if over == "prompts":
        check_one_length(model, rows, attention_mask)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        mask = None if attention_mask is None else attention_mask[part]
        add_batch(model, rows[part], mask, averaged, over, sums)
    return {layer: total.mean() for layer, total in sums.items()}


class Sum:
    """A running sum over rows, in float64 on the CPU from one batch to the next."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.dtype = torch.float32

    def add(self, rows: Tensor) -> None:
        """Add rows [n,...]."""
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        total = rows.detach().sum(0, dtype=self.dtype).cpu().double()
        self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    def mean(self) -> Tensor:
        """The mean of all rows [...]."""
        assert self.total is not None
        return (self.total / self.count).to(self.dtype)


def add_batch(
    model: MambaTrace, rows: Any, mask: Tensor | None, site: Site, over: str, sums: dict[int | None, Sum]
) -> None:
    """Run some prompts, and add the values of a site to the sum of each layer."""
    inputs = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad(), model.trace(rows, use_cache=False, **inputs) as tracer:
        kept = model.inputs[1].get("attention_mask")  # [B,L] or None
        for layer, total in sums.items():
            value = model.hook(site.path(layer)).output
            if over == "positions" and "L" in site.axes:
                everything = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
                value = value[everything if kept is None else kept.to(value.device) != 0]  # [n,...]
            total.add(value)
        tracer.stop()


def averaged_site(model: MambaTrace, name: str) -> Site:
    """The site with a name or hook name.

    Raises:
        UnknownSiteError: if this model has none that is called so.
        SiteValueError: if it has no axis B.
    """
    site = site_named(name)
    if site is None:
        raise UnknownSiteError(
            f"no site is called {name!r}{nearest(str(name), [*BY_NAME, *BY_HOOK])}. A mean is of one site at "
            f"several layers: site='y', layers=[1, 2]"
        )
    family = model.architecture.family
    check_family(parse(site.path(0)), family, name)
    if "B" not in site.axes:
        raise SiteValueError(f"{name} {describe_axes(site.axes_in(family))} is the same for every prompt: read it once")
    return site


def averaged_layers(model: MambaTrace, site: Site, layers: Layers) -> list[int] | list[None]:
    """The layers in ascending order, counted from 0. Raises `LayerError` or `UnknownSiteError`."""
    if site.scope != "model":
        return layer_numbers(model, layers, site)
    if site_in(model._layout, site, None) is None:
        raise absent(model._layout, site, None, repr(site.name))
    if layers is not None:
        raise LayerError(f"{site.name} belongs to no layer: leave layers={layers!r} out")
    return [None]


def prompt_rows(model: MambaTrace, prompts: Any) -> list[str] | Tensor:
    """Prompts as a list of strings or token ids [B,L]. Raises `PromptError`."""
    rows = prompt_of(model, prompts, None)
    if isinstance(rows, Tensor):
        return rows if rows.dim() == 2 else rows[None]
    if not isinstance(rows, (str, list, tuple)):
        raise PromptError(f"prompts are strings or a tensor of token ids [B,L], not {rows!r} (a {type(rows).__name__})")
    rows = [rows] if isinstance(rows, str) else list(rows)
    if not all(isinstance(row, str) for row in rows):
        raise PromptError(f"prompts are strings or a tensor of token ids [B,L], not a list of {rows[0]!r}")
    return rows


def row_mask(model: MambaTrace, prompts: Any, mask: Any) -> Tensor | None:
    """The attention mask [B,L] of token ids [B,L] or [L]; ``None`` without padding. Raises `PromptError`."""
    if mask is not None and prompts.dim() == 1:
        prompts = prompts[None]
    mask = mask_of(prompts, model.tokenizer, mask)
    return mask if mask is None or mask.dim() == 2 else mask[None]


def check_one_length(model: MambaTrace, rows: list[str] | Tensor, mask: Tensor | None) -> None:
    """Raise a `PromptError` if prompts have several lengths, or padding."""
    if isinstance(rows, Tensor):
        lengths = {rows.shape[1]} if mask is None else {rows.shape[1], *mask.sum(-1).tolist()}
    else:
        lengths = {model.to_tokens(row).shape[1] for row in rows}
    if len(lengths) > 1:
        raise PromptError(
            f"over='prompts' averages at each position, and these prompts have {min(lengths)} to "
            f"{max(lengths)} tokens: give prompts of one length without padding, or over='positions'"
        )
