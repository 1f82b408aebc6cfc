"""Activation patching: which layer, at which position, holds what makes the model answer as it does.

Two prompts of the same length differ in a token or two, and the model answers them differently. A site's
value at one layer and position is taken from the run on one (``source``) and put into the run on the other
(``prompt``). Where the answer follows, the information was there. `patch_grid` asks this of every layer and
position at once.

No layer and no position before a patch is computed again: a cell's run starts at its own, from what the
unpatched run left there, and cells run together as rows of a batch (see `sweep`). Each is what a trace of
its own would give, to rounding. Where something that was done to the model may look at all of a run (a
lasting edit, a PyTorch hook, a module of the user's own), each cell is such a trace; the grid's ``plan`` says
so.

Source: activation patching as in Vig et al. (arXiv 2004.12265) and Meng et al. (arXiv 2202.05262).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from .. import names
from ..arguments.prompts import matching_tokens, token_strings
from ..arguments.run_arguments import refuse_inside_a_trace
from ..errors import FileError, LayerError, MetricError, PositionError, PromptError, UnknownSiteError
from ..sites import BY_HOOK, BY_NAME, SITES, Site, describe_axes
from .attribution import attributions
from .metrics import Metric, log_prob, logit, logit_diff, named_metrics, prob
from .plan import Limits
from .question import Question
from .result import PatchGrid
from .run import Answers, answers, on_server

if TYPE_CHECKING:
    from ..model import MambaTrace

__all__ = ["Metric", "PatchGrid", "attribution_grid", "log_prob", "logit", "logit_diff", "patch_grid", "prob"]

#: The sites a grid can be made of.
POSITIONAL = tuple(site.name for site in SITES if "L" in site.axes)
#: Bytes that a forward's activations may take, and the states that cells start from.
MEMORY = 2**29


@overload
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    metric: Metric | None = ...,
    *,
    metric_positions: int | Sequence[int] = ...,
    window: int = ...,
    batch_size: int | None = ...,
    memory: int = ...,
    keep: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
    distribute: bool = ...,
    remote: bool | str = ...,
) -> PatchGrid: ...
@overload
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    *,
    metric: Mapping[str, Metric],
    metric_positions: int | Sequence[int] = ...,
    window: int = ...,
    batch_size: int | None = ...,
    memory: int = ...,
    keep: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
    distribute: bool = ...,
    remote: bool | str = ...,
) -> dict[str, PatchGrid]: ...
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    metric_positions: int | Sequence[int] = -1,
    window: int = 1,
    batch_size: int | None = None,
    memory: int = MEMORY,
    keep: str | os.PathLike[str] | None = None,
    progress: bool = True,
    distribute: bool = True,
    remote: bool | str = False,
) -> PatchGrid | dict[str, PatchGrid]:
    """Patch a site from the run on ``source`` into that on ``prompt``, at every layer and position in turn.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        source: likewise, of as many tokens.
        site: a site's name or hook name: ``"h"``, ``"resid_pre"``, ``"hook_conv"``, ... ``h`` is the state
            carried on from a position, so patching it acts on everything after, too.
        metric: from the logits at the last position [B,V] to [B], see `logit_diff`; or a dict of several by
            name, which are measured in the same runs. Each number comes from its own row alone: rows
            are other cells. It may do what it likes to the logits that it gets.
        metric_positions: the position whose logits the metric gets, or a list of m: then it gets [B,m,V], in
            ascending order of position.
        window: how many layers are patched together: row l patches ``window`` layers around l, of an even
            number one more after it than before, and those at the ends fewer.
        batch_size: the most cells that share a forward; ``None`` for as many as ``memory`` permits. On a
            model with lasting edits or PyTorch hooks, or with another forward or module in the place of its
            own, every cell has a forward to itself, as each of these may look at positions and rows.
        memory: bytes that the activations of one forward may take, the states that cells start from, and the
            residual streams of cells that are under way: each of the three. Beside them there are those
            of one run, [n_layers,L,D], and what a forward of both prompts takes.
        keep: a folder where finished cells are kept. After an interrupt the same call goes on from there.
        progress: show a progress bar on stderr, with the time that is left.
        distribute: where a launcher (torchrun, accelerate launch) started several processes, share the cells
            among them; each of them gets the whole grid, the same to the last bit as from one process.
        remote: compute it on an NDIF server, in one session, as ``model.session(remote=...)`` does: ``True``,
            a URL or ``"local"``. Only the grid comes back; nothing is kept and no progress shown. It takes a
            trusted request: the sandbox of ndif 0.1.2 breaks off a run that starts from given states.

    Returns:
        The grid: [n_layers, L], or [1, L] for a site of the whole model (embeddings, norm_f, lm_head). With
        several metrics, a dict of a grid for each.

    Raises:
        PromptError: before anything runs, if the prompts are not two single prompts of one length.
        UnknownSiteError: if there is no such site.
        PositionError: if the site has no positions, or the prompt not those that the metric looks at.
        MetricError: if the metric does not return one number for each row.
        FileError: if ``keep`` cannot be written, holds another grid's cells, or is on a server.
        ProcessesError: if the processes that share a grid do not all ask for the same.

    Example::

        grid = patch_grid(model, prompt, source, "resid_pre", logit_diff(model, " Emma", " Shelby"))
        grid.figure().show()
    """
    metrics = named_metrics(metric, "patch_grid")
    question = asked(model, prompt, source, site, metrics, metric_positions, window)
    refuse_inside_a_trace(model, "patch_grid")
    if batch_size is not None and counted("batch_size", batch_size) < 1:
        raise PromptError(f"batch_size={batch_size}: a forward patches at least one cell")
    if counted("memory", memory) < 1:
        raise PromptError(f"memory={memory}: that is a number of bytes")
    limits = Limits(batch_size, memory)
    if remote and keep is not None:
        raise FileError(
            f"keep={str(keep)!r}: with remote= the cells are on the server, and none are kept here"
        )
    if remote:
        found = on_server(model, remote, answers, question, limits, None, False, False)
    else:
        found = answers(model, question, limits, keep, progress, distribute)
    grids = grids_of(model, question, found, "patching")
    return grids if isinstance(metric, Mapping) else next(iter(grids.values()))


@overload
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    metric: Metric | None = ...,
    *,
    metric_positions: int | Sequence[int] = ...,
    steps: int = ...,
    remote: bool | str = ...,
) -> PatchGrid: ...
@overload
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    *,
    metric: Mapping[str, Metric],
    metric_positions: int | Sequence[int] = ...,
    steps: int = ...,
    remote: bool | str = ...,
) -> dict[str, PatchGrid]: ...
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    metric_positions: int | Sequence[int] = -1,
    steps: int = 1,
    remote: bool | str = False,
) -> PatchGrid | dict[str, PatchGrid]:
    """`patch_grid` to first order: from two forwards and one backward, for all layers and positions.

    A cell is m + sum((v_source - v_prompt) * dm/dv), with m the metric of the run on ``prompt`` and v the
    site's value there; the gradient of ``h`` at a position includes all that the state is carried on to.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        source: likewise, of as many tokens.
        site: a site's name or hook name, as in `patch_grid`.
        metric: as in `patch_grid`; it must be differentiable.
        metric_positions: as in `patch_grid`.
        steps: with more than 1, the gradient is the mean over so many runs on embeddings between the prompt's
            and the source's (integrated gradients): so many forwards and backwards, two forwards more.
        remote: as in `patch_grid`. A sandboxed server has no backward pass.

    Returns:
        The grid: [n_layers, L], or [1, L] for a site of the whole model. With several metrics, a dict of a
        grid for each. ``grid.correlation(patched)`` says how far it agrees with what `patch_grid` found.

    Raises:
        As `patch_grid`; MetricError also if a metric has no gradient.

    Source:
        Attribution patching (Syed et al., arXiv 2310.10348); EAP-IG (Hanna et al., arXiv 2403.17806).

    Example::

        metric = logit_diff(model, " Emma", " Shelby")
        estimate = attribution_grid(model, prompt, source, "h", metric)
        print(estimate.correlation(patch_grid(model, prompt, source, "h", metric)))
    """
    metrics = named_metrics(metric, "attribution_grid")
    question = asked(model, prompt, source, site, metrics, metric_positions, window=1)
    refuse_inside_a_trace(model, "attribution_grid")
    if torch.is_inference_mode_enabled():
        raise MetricError(
            "attribution_grid takes gradients, which torch.inference_mode() has none of: leave it"
        )
    if counted("steps", steps) < 1:
        raise PromptError(f"steps={steps}: a gradient is taken at one point at least")
    if remote:
        found = on_server(model, remote, attributions, question, steps)
    else:
        found = attributions(model, question, steps)
    grids = grids_of(model, question, found, "attribution" if steps == 1 else "integrated gradients")
    return grids if isinstance(metric, Mapping) else next(iter(grids.values()))


def asked(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str,
    metrics: Mapping[str, Metric],
    metric_positions: int | Sequence[int],
    window: int,
) -> Question:
    """What a grid asks, checked before anything runs. Raises as `patch_grid` does."""
    where = find_site(site)
    tokens, source_tokens = matching_tokens(model, prompt, source)  # [1,L] each
    n_layers = len(model.layers)
    if not 1 <= counted("window", window) <= n_layers:
        raise LayerError(f"window={window}: this model has {n_layers} layers to patch together")
    return Question(
        tokens=torch.cat((source_tokens, tokens)),
        site=where,
        n_layers=n_layers,
        window=window,
        metrics=metrics,
        looked_at=positions_of_metric(metric_positions, tokens.shape[1]),
        single=isinstance(metric_positions, int),
    )


def positions_of_metric(positions: int | Sequence[int], length: int) -> list[int]:
    """The positions that a metric looks at, from 0 and ascending. Raises `PositionError`."""
    several = [positions] if isinstance(positions, int) else positions
    if not isinstance(several, Sequence) or not all(type(position) is int for position in several):
        raise PositionError(f"metric_positions={positions!r}: give an integer, or a list of several")
    for position in several:
        if not -length <= position < length:
            raise PositionError(
                f"metric_positions has {position}, and the prompt has {length} positions: {-length} to "
                f"{length - 1}"
            )
    found = sorted({position % length for position in several})
    if not found or len(found) < len(several):
        raise PositionError(
            f"metric_positions={positions!r} {'names one twice' if found else 'is empty'}: a metric looks at "
            f"the logits of one position or of several"
        )
    return found


def counted(name: str, number: int) -> int:
    """An argument that is a number of things. Raises `PromptError` for what is no integer."""
    if type(number) is not int:
        raise PromptError(f"{name}={number!r}: that is an integer")
    return number


def grids_of(model: MambaTrace, question: Question, found: Answers, method: str) -> dict[str, PatchGrid]:
    """The results, by the name of the metric."""
    source_tokens, tokens = (token_strings(model, row[None]) for row in question.tokens)
    site = question.site
    return {
        name: PatchGrid(
            values=found.values[m],
            prompt_metric=float(found.prompt[m]),
            source_metric=float(found.source[m]),
            site=site.name,
            metric=name,
            row_labels=[site.name]
            if site.scope == "model"
            else [str(row) for row in range(question.n_layers)],
            prompt_tokens=tokens,
            source_tokens=source_tokens,
            window=question.window,
            method=method,
            plan=found.plan,
        )
        for m, name in enumerate(question.metrics)
    }


# -- what was asked for ------------------------------------------------------------------------------------


def find_site(name: str) -> Site:
    """The site of a name or a hook name, if it has positions.

    Raises:
        UnknownSiteError: if there is none.
        PositionError: if it has no positions.
    """
    if not isinstance(name, str):
        raise UnknownSiteError(
            f"site={name!r}: a grid is of one site, named by a string such as 'h'. Make a grid for each"
        )
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
