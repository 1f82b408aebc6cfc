"""Activation patching: which layer, at which position, holds what makes the model answer as it does.

Two prompts of the same length differ in a token or two, and the model answers them differently. A site's
value at one layer and position is taken from the run on ``source`` and put into the run on ``prompt``. Where
the answer follows, the information was there. `patch_grid` asks this of every layer and position at once, and
`attribution_grid` estimates it from gradients.

Source: activation patching as in Vig et al. (arXiv 2004.12265) and Meng et al. (arXiv 2202.05262).
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..arguments.prompts import matching_tokens, token_strings
from ..arguments.selection import Layers, layer_numbers
from ..errors import ArgumentError, FileError, LayerError, MetricError
from ..results.made import made_by
from ..tracing.frames import users_errors
from ..tracing.one_run import check_model, refuse_inside_a_trace
from .attribution import attributions
from .metrics import Metric, named_metrics
from .plan import Limits
from .question import Question, find_site, layers_of_rows, metric_positions_of
from .result import PatchGrid
from .run import Answers, answers, on_server

if TYPE_CHECKING:
    from ..model import MambaTrace

#: Bytes for the activations of a forward; `patch_grid` says what else may take as many.
MEMORY = 2**30


class PatchOptions(TypedDict, total=False):
    """The arguments of `patch_grid` that do not change what it returns."""

    metric_positions: int | Sequence[int]
    window: int
    layers: Layers
    batch_size: int | None
    memory: int
    keep: str | os.PathLike[str] | None
    resume: PatchGrid | Mapping[str, PatchGrid] | None
    progress: bool
    distribute: bool
    remote: bool | str


class AttributionOptions(TypedDict, total=False):
    """The arguments of `attribution_grid` that do not change what it returns."""

    metric_positions: int | Sequence[int]
    layers: Layers
    steps: int
    remote: bool | str


@overload
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    metric: Metric | None = ...,
    **options: Unpack[PatchOptions],
) -> PatchGrid: ...
@overload
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    *,
    metric: Mapping[str, Metric],
    **options: Unpack[PatchOptions],
) -> dict[str, PatchGrid]: ...
@users_errors
def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    metric_positions: int | Sequence[int] = -1,
    window: int = 1,
    layers: Layers = None,
    batch_size: int | None = None,
    memory: int = MEMORY,
    keep: str | os.PathLike[str] | None = None,
    resume: PatchGrid | Mapping[str, PatchGrid] | None = None,
    progress: bool = True,
    distribute: bool = True,
    remote: bool | str = False,
) -> PatchGrid | dict[str, PatchGrid]:
    """Patch a site from the run on ``source`` into the run on ``prompt``, at every layer and position.

    Cells of the grid run together as rows of a batch, each from its own layer and position on, and equal what
    a trace of each would give, to rounding. Where something that was done to the model may look at a whole
    run (a lasting edit, a PyTorch hook, a forward or module of the user's own), every cell is such a trace;
    the grid's ``plan`` says so.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        source: a string or token ids, with as many tokens.
        site: a site's name or hook name: ``"h"``, ``"resid_pre"``, ``"hook_conv"``, ``"attn.q"``, ... ``h`` is the
            state carried on from a position, so patching it acts on everything after that position, too. In a
            hybrid it may be any site with positions, and rows are the layers that have it.
        metric: from the logits at the last position [B,V] to [B], see `logit_diff`; or a dict of several by
            name, which are measured in the same runs. Each number must come from its own row only, as the
            other rows are other cells. A metric may overwrite the logits that it gets.
        metric_positions: the position whose logits the metric gets, or a list of m positions: then it gets
            [B,m,V], in ascending order of position.
        window: how many layers of the model are patched together: row l patches those that have the site of
            ``window`` layers around l, with an even number one more after it than before. Rows at the ends
            patch fewer, and so do those in a hybrid near layers without the site.
        layers: which layers the rows are: one or several; ``None`` for all that have the site.
        batch_size: the most cells that share a forward; ``None`` for as many as ``memory`` permits.
        memory: bytes that the activations of one forward may take. The states that cells start from may take
            as many again, and so may the logits of its cells. One run's streams [n_layers,L,D] and a forward of
            both prompts come on top.
        keep: a folder where finished cells are kept. After an interrupt the same call goes on from there.
        resume: what an interrupted call of the same question left: the attribute ``partial`` of its
            KeyboardInterrupt, or what was saved of it. Cells that are nan there are computed.
        progress: whether to show a progress bar on stderr, with the time that is left.
        distribute: whether the processes that a launcher started (torchrun, accelerate launch) share the
            cells. Each of them gets the whole grid, the same to the last bit as from one process.
        remote: compute it on an NDIF server, in one session, as ``model.session(remote=...)`` does: ``True``,
            a URL or ``"local"``. Only the grid comes back; nothing is kept and no progress shown.

    Returns:
        The grid [rows,L], with a row for each layer that has the site; ``grid.layers`` has their numbers. A site
        of the whole model (embeddings, norm_f, lm_head, logits) has one row. With several metrics, a dict with a
        grid for each.

    Raises:
        PromptError: before anything runs, if the prompts are not two single prompts of one length.
        UnknownSiteError: if there is no such site, or no layer of this model has it, or one of ``layers`` lacks it.
        PositionError: if the site has no positions, or belongs to two of them, as ``pattern`` does, or the prompt
            lacks a position that the metric looks at.
        LayerError: if the model has fewer layers than ``window``, or not one of ``layers``.
        ArgumentError: if ``window``, ``batch_size`` or ``memory`` is no integer, or less than 1.
        MetricError: if the metric does not return one number for each row.
        FileError: if ``keep`` cannot be written, holds another grid's cells, or is given with ``remote``.
        ArgumentError: if ``resume`` is a grid of another question, or given with ``remote``.
        ProcessesError: if the processes that share a grid ask for different ones.
        KeyboardInterrupt: on Ctrl-C, with what was done: ``error.partial`` is the grid, or the dict, that would have
            been returned, nan in cells that were not computed. It can be saved, loaded and given as ``resume``.

    Example::

        grid = patch_grid(model, prompt, source, "resid_pre", logit_diff(model, " Emma", " Shelby"))
        grid.figure().show()
    """
    question = asked("patch_grid", model, prompt, source, site, metric, metric_positions, window, layers)
    if batch_size is not None and integer("batch_size", batch_size) < 1:
        raise ArgumentError(f"batch_size={batch_size}: a forward patches at least one cell")
    if integer("memory", memory) < 1:
        raise ArgumentError(f"memory={memory}: that is a number of bytes")
    limits = Limits(batch_size, memory)
    if remote:
        if keep is not None:
            raise FileError(f"keep={str(keep)!r}: with remote= the cells are on the server, and none are kept here")
        if resume is not None:
            raise ArgumentError("resume= with remote=: the cells of a server's grid all come from there")
        computed = on_server(model, remote, answers, question, limits, None, False, False)
        return results(model, question, computed, "patching", metric)
    begun = None if resume is None else begun_answers(model, question, resume)
    try:
        computed = answers(model, question, limits, keep, progress, distribute, begun)
    except KeyboardInterrupt as interrupt:
        if isinstance(left := getattr(interrupt, "partial", None), Answers):
            interrupt.partial = results(model, question, left, "patching", metric, partial=True)  # type: ignore[attr-defined]
        raise
    return results(model, question, computed, "patching", metric)


@overload
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    metric: Metric | None = ...,
    **options: Unpack[AttributionOptions],
) -> PatchGrid: ...
@overload
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = ...,
    *,
    metric: Mapping[str, Metric],
    **options: Unpack[AttributionOptions],
) -> dict[str, PatchGrid]: ...
@users_errors
def attribution_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | Mapping[str, Metric] | None = None,
    *,
    metric_positions: int | Sequence[int] = -1,
    layers: Layers = None,
    steps: int = 1,
    remote: bool | str = False,
) -> PatchGrid | dict[str, PatchGrid]:
    """Estimate `patch_grid` to first order, at all layers and positions, from two forwards and one backward.

    A cell is m + sum((v_source - v_prompt) * dm/dv), with m the metric of the run on ``prompt`` and v the
    site's value there; the gradient of ``h`` at a position includes everything that the state is carried on
    to.

    Args:
        model, prompt, source, site, metric_positions, layers, remote: as in `patch_grid`. A sandboxed request is
            refused, as it has no gradients.
        metric: as in `patch_grid`; it must be differentiable.
        steps: the number of runs whose gradients are averaged. With more than 1 they run on embeddings
            between the prompt's and the source's (integrated gradients): ``steps`` forwards and backwards,
            and two more forwards.

    Returns:
        The grid or grids, as `patch_grid`. ``grid.correlation(patched)`` says how far an estimate agrees with
        what `patch_grid` computed.

    Raises:
        ArgumentError: as `patch_grid`, and if ``steps`` is no integer or less than 1.
        MetricError: as `patch_grid`, and if a metric has no gradient.
        PromptError, UnknownSiteError, PositionError, LayerError: as `patch_grid`.

    Source:
        Attribution patching (Syed et al., arXiv 2310.10348); EAP-IG (Hanna et al., arXiv 2403.17806).

    Example::

        metric = logit_diff(model, " Emma", " Shelby")
        estimate = attribution_grid(model, prompt, source, "h", metric)
        print(estimate.correlation(patch_grid(model, prompt, source, "h", metric)))
    """
    question = asked("attribution_grid", model, prompt, source, site, metric, metric_positions, 1, layers)
    if torch.is_inference_mode_enabled():
        raise MetricError("attribution_grid takes gradients, which torch.inference_mode() has none of: leave it")
    if integer("steps", steps) < 1:
        raise ArgumentError(f"steps={steps}: a gradient is taken at one point at least")
    if remote:
        computed = on_server(model, remote, attributions, question, steps)
    else:
        computed = attributions(model, question, steps)
    return results(model, question, computed, "attribution" if steps == 1 else "integrated gradients", metric)


def asked(
    caller: str,
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str,
    metric: Metric | Mapping[str, Metric] | None,
    metric_positions: int | Sequence[int],
    window: int,
    layers: Layers = None,
) -> Question:
    """What a call of ``caller`` asks, checked before anything runs. Raises as `patch_grid` does."""
    check_model(model, caller)
    metrics = named_metrics(metric, caller)
    layout = model._layout
    patched = find_site(site, layout)
    chosen = None if layers is None else layer_numbers(model, layers)
    rows = layers_of_rows(layout, patched, chosen, f"layers={layers!r}")
    tokens, source_tokens = matching_tokens(model, prompt, source)  # [1,L] each
    n_layers = len(model.layers)
    if not 1 <= integer("window", window) <= n_layers:
        raise LayerError(f"window={window}: this model has {n_layers} layers to patch together")
    looked_at = metric_positions_of(metric_positions, tokens.shape[1])
    refuse_inside_a_trace(model, caller)
    return Question(
        tokens=torch.cat((source_tokens, tokens)),
        site=patched,
        layout=layout,
        layers=rows,
        window=window,
        metrics=metrics,
        looked_at=looked_at,
        single=isinstance(metric_positions, int),
    )


def integer(name: str, number: int) -> int:
    """The value of an argument that counts something. Raises `ArgumentError` if it is no integer."""
    if type(number) is not int:
        raise ArgumentError(f"{name}={number!r}: that is an integer")
    return number


def begun_answers(model: MambaTrace, question: Question, begun: PatchGrid | Mapping[str, PatchGrid]) -> Answers:
    """What interrupted grids have. Raises `ArgumentError` if they are of another question."""
    grids = {begun.metric: begun} if isinstance(begun, PatchGrid) else begun
    if not (isinstance(grids, Mapping) and grids and all(isinstance(grid, PatchGrid) for grid in grids.values())):
        raise ArgumentError(
            f"resume= takes the grid of a call that was interrupted, its error.partial, or a dictionary of such grids "
            f"by the names of their metrics, not {reprlib.repr(begun)}"
        )
    source_tokens, tokens = (token_strings(model, row[None]) for row in question.tokens)
    wanted = {"site": question.site.name, "window": question.window, "layers": question.layers, "method": "patching"}
    wanted |= {"prompt_tokens": tokens, "source_tokens": source_tokens}
    for name in question.metrics:
        if (grid := grids.get(name)) is None:
            raise ArgumentError(f"resume= has no grid of the metric {name!r}: it has {', '.join(map(repr, grids))}")
        for key, value in wanted.items():
            if getattr(grid, key) != value:
                raise ArgumentError(
                    f"resume= is a grid of another question: its {key} is {getattr(grid, key)!r}, and this call's "
                    f"{value!r}"
                )
    asked = [grids[name] for name in question.metrics]
    runs = ([getattr(grid, f"{run}_metric") for grid in asked] for run in ("source", "prompt"))
    source, prompt = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in runs)
    return Answers(torch.stack([grid.values for grid in asked]), source, prompt)


def results(
    model: MambaTrace, question: Question, computed: Answers, method: str, metric: Any, partial: bool = False
) -> PatchGrid | dict[str, PatchGrid]:
    """The grid of each metric by name, or the grid alone where the user gave one ``metric``."""
    source_tokens, tokens = (token_strings(model, row[None]) for row in question.tokens)
    site = question.site
    grids = {
        name: PatchGrid(
            values=computed.values[number],
            prompt_metric=float(computed.prompt[number]),
            source_metric=float(computed.source[number]),
            site=site.name,
            metric=name,
            row_labels=[site.name] if site.scope == "model" else list(map(str, question.layers)),
            prompt_tokens=tokens,
            source_tokens=source_tokens,
            window=question.window,
            method=method,
            plan=computed.plan,
            layers=question.layers,
            partial=partial,
            made=made_by(model),
        )
        for number, name in enumerate(question.metrics)
    }
    return grids if isinstance(metric, Mapping) else next(iter(grids.values()))
