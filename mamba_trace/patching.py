"""Activation patching: which layer, at which position, holds what makes the model answer as it does.

Two prompts of the same length differ in a token or two, and the model answers them differently. A site's
value at one layer and position is taken from the run on one (``source``) and put into the run on the other
(``prompt``). Where the answer follows, the information was there. `patch_grid` asks this of every layer and
position at once.

Every cell is the result of an ordinary trace: a batch holds ``source`` in row 0 and ``prompt`` in all others,
one row for each position, and the site's value is copied from row 0 into each row at that row's position. So
no activations are kept between runs, and memory grows with ``batch_size`` alone.

Source: activation patching as in Vig et al. (arXiv 2004.12265) and Meng et al. (arXiv 2202.05262).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import names
from .errors import MetricError, PositionError, PromptError, UnknownSiteError
from .grids import PatchGrid
from .prompts import describe, matching_tokens, single_token, token_strings
from .sites import BY_HOOK, BY_NAME, SITES, STATE, Site, describe_axes

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["Metric", "PatchGrid", "logit_diff", "patch_grid"]

#: Logits at the last position [B,V] -> one number for each row [B].
Metric = Callable[[Tensor], Tensor]
#: The sites a grid can be made of.
POSITIONAL = tuple(site.name for site in SITES if "L" in site.axes)


def logit_diff(model: MambaTrace, answer: str | int, wrong: str | int) -> Metric:
    """The metric of the seed experiments: the logit of one token minus that of another.

    Args:
        model: whose tokenizer turns strings into tokens.
        answer: a string that is one token (mind its leading space), or a token id.
        wrong: likewise.

    Returns:
        A function from logits [B,V] to differences [B].

    Raises:
        PromptError: if either is not one token of the vocabulary, or both are the same.

    Example::

        metric = logit_diff(model, " Emma", " Shelby")
    """
    plus, minus = single_token(model, answer), single_token(model, wrong)
    if plus == minus:
        raise PromptError(
            f"answer and wrong are both {answer!r} (token {plus}), so their logits never differ"
        )

    def metric(logits: Tensor) -> Tensor:
        return logits[:, plus] - logits[:, minus]  # [B]

    metric.__name__ = f"logit of {answer!r} minus logit of {wrong!r}"
    return metric


def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | None = None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> PatchGrid:
    """Patch a site from the run on ``source`` into that on ``prompt``, at every layer and position in turn.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        source: likewise, of as many tokens.
        site: a site's name or hook name: ``"h"``, ``"resid_pre"``, ``"hook_conv"``, ... ``h`` is the state
            carried on from a position, so patching it acts on everything after, too.
        metric: from the logits at the last position [B,V] to [B]; see `logit_diff`.
        batch_size: how many positions one forward patches, each in a row of its own.
        progress: show a progress bar on stderr.

    Returns:
        The grid: [n_layers, L], or [1, L] for a site of the whole model (embeddings, norm_f, lm_head).

    Raises:
        PromptError: before anything runs, if the prompts are not two single prompts of one length.
        UnknownSiteError: if there is no such site.
        PositionError: if the site has no positions.
        MetricError: if the metric does not return one number for each row.

    Example::

        grid = patch_grid(model, prompt, source, "resid_pre", logit_diff(model, " Emma", " Shelby"))
        grid.figure().show()
    """
    where = find_site(site)
    tokens, source_tokens = matching_tokens(model, prompt, source)  # [1,L] each
    metric = checked_metric(metric)
    if batch_size < 1:
        raise PromptError(f"batch_size={batch_size}: a forward patches at least one position")
    layers = [None] if where.scope == "model" else list(range(len(model.layers)))
    values = torch.empty(len(layers), tokens.shape[1])
    with (
        torch.no_grad(),
        tqdm(total=values.numel(), desc=f"patching {where.name}", disable=not progress) as bar,
    ):
        logits = plain_logits(model, torch.cat((source_tokens, tokens)))  # [2,V]
        source_metric, prompt_metric = measured(metric, logits).tolist()
        for row, layer in enumerate(layers):
            for positions, logits in swept(model, tokens, source_tokens, where, layer, batch_size):
                values[row, positions] = measured(metric, logits)
                bar.update(len(positions))
    return PatchGrid(
        values=values,
        prompt_metric=prompt_metric,
        source_metric=source_metric,
        site=where.name,
        metric=getattr(metric, "__name__", type(metric).__name__),
        row_labels=[where.name if layer is None else str(layer) for layer in layers],
        prompt_tokens=token_strings(model, tokens),
        source_tokens=token_strings(model, source_tokens),
    )


# -- running -----------------------------------------------------------------------------------------------


def plain_logits(model: MambaTrace, tokens: Tensor) -> Tensor:
    """The logits at the last position [B,V] of tokens [B,L], nothing patched."""
    with model.trace(tokens, logits_to_keep=1):
        logits = model.lm_head.output[:, -1].save()
    return logits


def swept(
    model: MambaTrace, tokens: Tensor, source_tokens: Tensor, site: Site, layer: int | None, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """`patched_logits` at every position of tokens [1,L], ``batch_size`` at a time: (positions, [k,V])."""
    for start in range(0, tokens.shape[1], batch_size):
        positions = list(range(start, min(start + batch_size, tokens.shape[1])))
        batch = torch.cat((source_tokens, tokens.expand(len(positions), -1)))  # [1+k,L]
        yield positions, patched_logits(model, batch, site, layer, positions)


def patched_logits(
    model: MambaTrace, batch: Tensor, site: Site, layer: int | None, positions: list[int]
) -> Tensor:
    """The logits at the last position where each row has the site's value of row 0 at one position.

    Args:
        model: the model.
        batch: token ids [1+k,L]: the source, then the prompt k times.
        site: the site.
        layer: its layer, or ``None`` where it has none.
        positions: k positions in ascending order, of which row i + 1 is patched at the i-th.

    Returns:
        [k,V].
    """
    place: Any = model.hook(site.path(layer))
    # The other positions' logits are not made, unless they are what is patched.
    keep = 0 if site.name == "lm_head" else 1
    with model.trace(batch, logits_to_keep=keep):
        if site.name == STATE:
            for row, position in enumerate(positions, start=1):
                h = place[position].output  # [1+k,E,N]
                h[row] = h[0]
        else:
            value = place.output  # [1+k,L,...]
            value[torch.arange(1, len(positions) + 1), positions] = value[0, positions]
        logits = model.lm_head.output[1:, -1].save()
    return logits


def checked_metric(metric: Metric | None) -> Metric:
    """``metric``, if it can be called. Raises `MetricError`."""
    if not callable(metric):
        raise MetricError(
            f"patch_grid needs a metric, a function from logits [B,V] to [B], not {metric!r}: "
            f"metric=logit_diff(model, answer, wrong) is one"
        )
    return metric


def measured(metric: Metric, logits: Tensor) -> Tensor:
    """The metric of logits [B,V], as float32 on the CPU: [B]. Raises `MetricError` for any other shape."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        raise MetricError(
            f"a metric takes the logits at the last position [B,V] and returns one number for each row [B]; "
            f"for {describe(logits)} this one returned {describe(values)}"
        )
    return values.detach().float().cpu()


# -- what was asked for ------------------------------------------------------------------------------------


def find_site(name: str) -> Site:
    """The site of a name or a hook name, if it has positions.

    Raises:
        UnknownSiteError: if there is none.
        PositionError: if it has no positions.
    """
    site = BY_NAME.get(name) or BY_HOOK.get(name)
    if site is None:
        one = site_of_place(name)
        known = list(POSITIONAL) + [BY_NAME[positional].hook for positional in POSITIONAL]
        if one is not None and one.name in POSITIONAL:
            hint = (
                f": that is one place, and a grid takes a site. {one.name} patches every layer and position."
            )
        else:
            hint = names.nearest(name, known) or "."
        raise UnknownSiteError(
            f"no site is called {name!r}{hint} A grid patches one of {', '.join(POSITIONAL)}"
        )
    if "L" not in site.axes:
        raise PositionError(
            f"{site.name} {describe_axes(site.axes)} has no positions to patch one by one. A grid patches "
            f"one of {', '.join(POSITIONAL)}"
        )
    return site


def site_of_place(name: str) -> Site | None:
    """The site of ``"h[5]"``, ``"layers[1].ssm.h"`` or ``"blocks.1.hook_h.5"``; else ``None``."""
    indexed = re.fullmatch(r"(\w+)\[.*\]", name)
    if indexed:
        return BY_NAME.get(indexed[1]) or BY_HOOK.get(indexed[1])
    try:
        return names.parse(name).site
    except UnknownSiteError:
        return None
