"""Which tokens each token reads through the state of a layer: the attention matrix hidden in a Mamba.

The scan is linear in its input x, so y_i = sum over j <= i of alpha[i,j] x_j in every channel, with

    alpha[i,j] = C_i (A_bar_i ... A_bar_{j+1}) B_bar_j

a causal attention matrix for each channel, and in Mamba-2 for each head, whose channels share it.
`hidden_attention` computes it. `contributions` computes the terms alpha[i,j] x_j that add up to y_i, by their
norm or along a direction. `attention_maps` shows it for all layers of a hybrid, beside the patterns of attention.

One trace, which stops after the layer, reads the parameters of its scan; `scan.pairs` makes the matrix of
them in blocks. The [E,N,L,L] tensor of the formula is never made. No tensor exceeds 32 MiB except those of
[L,E], the result, and the [L,N] of one channel. The result is [L,L]; only where every channel is asked for is
it [L,L,E], or [L,L,H].

Source: The Hidden Attention of Mamba Models (Ali et al., arXiv 2403.01590); for Mamba-2 the matrix of arXiv
2405.21060, section 3, with the step size of the token that is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nnsight
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments.channels import Channels, Heads, mixer_sizes
from ..arguments.prompts import prompt_tokens
from ..arguments.selection import SSM, Layers, Positions, all_with, checked_layer, layer_number, layer_numbers
from ..errors import ArgumentError, SiteValueError
from ..modeling.block import times
from ..modeling.effective import ssm_factor
from ..results.made import made_by
from ..sites import BY_NAME
from ..tracing.frames import users_errors
from ..tracing.one_run import refuse_inside_a_trace
from .maps import MEASURES, NORM, PATTERN, AttentionMaps, Contributions, HiddenAttention, TokenPairs
from .scanned import Scanned, check_direction, read_scan, through_out_proj, tokens_asked, what_is_asked

if TYPE_CHECKING:
    from ..model import MambaTrace

__all__ = [
    "AttentionMaps",
    "Contributions",
    "HiddenAttention",
    "TokenPairs",
    "attention_maps",
    "contributions",
    "hidden_attention",
]


@users_errors
def hidden_attention(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int,
    *,
    channels: Channels = None,
    heads: Heads = None,
    rows: Positions | None = None,
    columns: Positions | None = None,
    reduce: str | None = "mean",
) -> HiddenAttention:
    """The attention matrix of one layer's scan: alpha[i,j] = C_i (A_bar_i ... A_bar_{j+1}) B_bar_j.

    In every channel the sum over columns of alpha[i,j] x_j, x the site ``ssm_input``, is y_i, the site ``y``.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        layer: the layer, which has an SSM; negative counts from the end.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"`` (see `flow.decay_groups`), indices,
            or a boolean mask [E].
        heads: of Mamba-2, in place of channels: ``None`` for all, indices, or a boolean mask [H].
        rows, columns: the positions i that read and the positions j that are read: an int, a slice, several
            ints or a boolean mask [L]; all by default.
        reduce: over channels: ``"mean"``, ``"abs_mean"`` (of absolute values), or ``None`` to keep them all.

    Returns:
        ``values`` [rows, columns] or [rows, columns, channels], float32 (float64 in a float64 model), on the
        CPU. A column after its row is 0. In Mamba-2 ``reduce=None`` keeps [rows, columns, heads], unless
        ``channels`` are given, since alpha is the same in all channels of a head.

    Raises:
        PromptError: if the prompt is not one prompt.
        LayerError: if there is no such layer, or ``layer`` is not one layer.
        UnknownSiteError: if the layer has no SSM, saying which layers have one. `attention_maps` has the patterns of
            attention as well.
        PositionError: for rows or columns that the prompt does not have.
        SiteValueError: for channels or heads that the layer does not have.
        ArgumentError: for another ``reduce``.
        RuntimeError: inside a trace.

    Source:
        The Hidden Attention of Mamba Models (arXiv 2403.01590).

    Example::

        attention = hidden_attention(model, prompt, layer=1, channels="slow", rows=-1)
        attention.values  # [1,L]: what the last token reads
        attention.save("attention.html")
    """
    refuse_inside_a_trace(model, "hidden_attention")
    if reduce not in MEASURES:
        raise ArgumentError(f"reduce={reduce!r} is none of {', '.join(map(repr, MEASURES))}")
    ids, asked = what_is_asked(model, prompt, layer, channels, heads, rows, columns)
    scan = Scanned.of(model, ids, asked)
    pairs = scan.pairs(of_x=False)
    if reduce is None:
        values = scan.of_channels(pairs.each())
    elif reduce == "mean":
        values = pairs.along(scan.by_head(torch.full_like(scan.x, 1 / len(asked["channels"]))))
    else:
        values = pairs.summed(torch.abs) / len(asked["channels"])
    return HiddenAttention(values=values.cpu(), measure=MEASURES[reduce], made=made_by(model), **asked)


@users_errors
def contributions(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int,
    *,
    y_direction: Tensor | None = None,
    residual_direction: Tensor | None = None,
    channels: Channels = None,
    heads: Heads = None,
    rows: Positions | None = None,
    columns: Positions | None = None,
) -> Contributions:
    """How much of each token's y comes from each token: alpha[i,j] x_j, which summed over j is y_i.

    Args:
        model, prompt, layer, channels, heads, rows, columns: as for `hidden_attention`.
        y_direction: measure contributions by their dot product with this direction [E]; summed over j that is
            the dot product of y_i with it.
        residual_direction: measure them by what they write to the residual stream along this direction [D],
            through the token's gate and out_proj, in Mamba-2 also through the mixer's norm with its scales
            frozen to those of the run, and times the factor that some hybrids have. Summed over j that is what y_i
            writes: the site ``ssm_out`` less what the D term and a bias write.

    Returns:
        ``values`` [rows, columns], float32 (float64 in a float64 model), on the CPU: norms over channels
        where no direction is given. A column after its row is 0.

    Raises:
        SiteValueError: if a direction has another length or both are given, or for channels or heads that
            the layer does not have.
        PromptError, LayerError, UnknownSiteError, PositionError, RuntimeError: as `hidden_attention`.

    Source:
        The matrix of arXiv 2403.01590.

    Example::

        directions = model.tokens_to_residual_directions(
            torch.tensor([model.to_single_token(" Emma"), model.to_single_token(" Shelby")])
        )  # [2,D]
        found = contributions(model, prompt, 1, residual_direction=directions[0] - directions[1], rows=-1)
        found.values  # [1,L]: from which tokens layer 1 has what it says in favour of Emma
    """
    refuse_inside_a_trace(model, "contributions")
    if y_direction is not None and residual_direction is not None:
        raise SiteValueError("contributions are measured along one direction: y_direction or residual_direction")
    layer = layer_number(model, layer, SSM)
    check_direction("y_direction", y_direction, "E d_inner", mixer_sizes(model, layer)["E"])
    check_direction("residual_direction", residual_direction, "D d_model", model.config.hidden_size)
    ids, asked = what_is_asked(model, prompt, layer, channels, heads, rows, columns)
    scan = Scanned.of(model, ids, asked, gated=residual_direction is not None)
    pairs = scan.pairs(of_x=True)
    if residual_direction is not None:
        written = through_out_proj(model, layer, residual_direction, scan.skip)  # [E]
        written = times(written.to(scan.x.dtype), ssm_factor(model.layers[layer]._module))
        along = F.silu(scan.skip.to(scan.x.dtype)) * written  # [L,E]
        if (frozen := scan.frozen()) is not None:
            along = along * frozen.to(along)
        values, measure = pairs.along(scan.by_head(along)), "alpha x along a direction of the residual stream"
    elif y_direction is not None:
        along = y_direction.to(scan.x).expand_as(scan.x)
        values, measure = pairs.along(scan.by_head(along)), "alpha x along a direction of y"
    else:
        values, measure = pairs.summed(torch.square).sqrt(), NORM
    return Contributions(values=values.cpu(), measure=measure, made=made_by(model), **asked)


@users_errors
def attention_maps(
    model: MambaTrace,
    prompt: str | Tensor,
    layers: Layers = None,
    *,
    rows: Positions | None = None,
    columns: Positions | None = None,
    reduce: str = "mean",
) -> AttentionMaps:
    """Which tokens each token reads, in every layer: the hidden attention of its SSM and the pattern of its attention.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        layers: one or several; by default all that have an SSM or attention. A layer with both has two maps.
        rows, columns: as in `hidden_attention`.
        reduce: over the channels of an SSM: ``"mean"`` of alpha, or ``"abs_mean"`` of its absolute values. Of a
            pattern it is the mean over heads. The rows of a pattern sum to 1, those of an SSM to any number.

    Returns:
        ``values`` [maps, rows, columns], float32 (float64 in a float64 model), on the CPU.

    Raises:
        PromptError: if the prompt is not one prompt.
        LayerError: if there is no such layer.
        UnknownSiteError: if a layer has neither, as an MLP.
        PositionError: for rows or columns that the prompt does not have.
        ArgumentError: for another ``reduce``.
        RuntimeError: inside a trace.

    Example::

        maps = attention_maps(model, prompt, rows=-1)
        maps.values  # [maps,1,L]: what the last token reads
        maps.save("maps.html")
    """
    refuse_inside_a_trace(model, "attention_maps")
    if reduce not in ("mean", "abs_mean"):
        raise ArgumentError(f"reduce={reduce!r} is neither 'mean' nor 'abs_mean'")
    ids = prompt_tokens(model, "prompt", prompt)
    places = mixing(model, layers)
    asked = tokens_asked(model, ids, rows, columns)
    with torch.no_grad(), model.trace(ids, use_cache=False) as tracer:
        maps = nnsight.save([map_of(model, layer, kind, asked, reduce) for layer, kind in places])
        tracer.stop()
    return AttentionMaps(
        values=torch.stack(maps),
        layers=[layer for layer, _ in places],
        kinds=[kind for _, kind in places],
        measures=[str(MEASURES[reduce]) if kind == "SSM" else PATTERN for _, kind in places],
        made=made_by(model),
        **asked,
    )


def mixing(model: MambaTrace, layers: Layers) -> list[tuple[int, str]]:
    """The layers and kinds of the maps, in execution order. Raises `LayerError` or `UnknownSiteError`."""
    layout, pattern = model._layout, BY_NAME["pattern"]
    both = {"SSM": SSM, "attention": pattern}
    places = []
    for layer in layer_numbers(model, layers):
        kind = layout.layers[layer]
        there = sorted((kind.order(site), name) for name, site in both.items() if kind.has(site))
        if layers is not None and not there:
            checked_layer(layout, layer, SSM, f"layers={layers!r}")
        places += [(layer, name) for _, name in there]
    if not places:
        all_with(layout, SSM)
    return places


def map_of(model: MambaTrace, layer: int, kind: str, asked: dict[str, Any], reduce: str) -> Tensor:
    """One map [rows,columns], in a trace of one prompt."""
    block = model.layers[layer]
    if kind == "attention":
        pattern = block.attn.pattern.output[0].mean(0)  # [L,L]
        return pattern[asked["rows"]][:, asked["columns"]].cpu()
    E = mixer_sizes(model, layer)["E"]
    asked = asked | {"layer": layer, "channels": list(range(E))}
    scan = Scanned.made(model, asked, read_scan(block.ssm))
    pairs = scan.pairs(of_x=False)
    if reduce == "mean":
        return pairs.along(scan.by_head(torch.full_like(scan.x, 1 / E))).cpu()
    return (pairs.summed(torch.abs) / E).cpu()
