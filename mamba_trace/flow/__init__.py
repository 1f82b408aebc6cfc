"""Cutting the flow of information from some tokens to others, to see which way the answer takes.

A token reaches a later one of the same layer of a Mamba in only two ways: through the state, which it writes and
the later token reads, and through the taps of the convolution, over the next few positions. Each can be cut
exactly, for chosen tokens and channels, while everything else stays as it was: the state carried, what other
tokens read, and what the target reads of other tokens. In a hybrid there is a third way, attention, beside the SSM
or in other layers. It goes on carrying what is cut of the SSM unless it is cut as well.

The functions here are called inside a trace. They read and edit public sites, so they work on every backend,
in batches and invokes, and leave the kernels of the other layers alone. The scan is linear in x, so what the
sources contribute to y is one more scan of the same parameters, from a zero state, over x with everything but
the sources set to zero. It needs no [B,L,E,N] tensor and runs from the first source to the last target only.

Contract: in each layer the functions ask for sites from x_in to y, and with ``attention`` for its pattern, in
execution order. So all cuts of one
layer must be made in one call of `apply`. In the same block, sites before x_in can be read earlier and sites
after y later; the sites between belong in another invoke or a `tracer.cache`.

Source: attention knock-out (Geva et al., arXiv 2304.14767), for Mamba in arXiv 2404.03646 and 2505.24244.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..arguments.channels import (
    Channels,
    Heads,
    channel_mask,
    check_channels,
    check_whole_heads,
    decay_groups,
    decay_rate,
    mixer_sizes,
)
from ..arguments.selection import SSM, Layers, Positions, all_with, call_inputs, layer_numbers
from ..errors import ArgumentError, SiteOrderError
from ..names import spans
from ..names.layouts import absent
from ..sites import BY_NAME
from ..tracing import need_a_trace
from ..tracing.frames import warn_user
from ..tracing.one_run import check_model
from .cuts import Cut, ZeroDelta, check_positions
from .layers import cut_reads, edit_layer

if TYPE_CHECKING:
    from ..model import MambaTrace

__all__ = [
    "Cut",
    "ZeroDelta",
    "apply",
    "decay_groups",
    "decay_rate",
    "knockout",
    "knockout_conv",
    "zero_delta",
]

#: What stands for a layer's attention.
PATTERN = BY_NAME["pattern"]


def knockout(
    model: MambaTrace,
    source_positions: Positions,
    target_positions: Positions,
    layers: Layers = None,
    channels: Channels = None,
    *,
    heads: Heads = None,
    scan: bool = True,
    conv: bool = False,
    attention: bool | None = None,
) -> None:
    """Cut what flows from source to target tokens through the state; to be called inside a trace.

    This is the flow of the SSM alone. In a hybrid, attention in the same layer or in others still carries from the
    sources to the targets, unless ``attention`` is true.

    For each target i and chosen channel e the part of ``y`` that comes from the sources is taken away::

        y_i -= sum over sources j <= i of C_i (A_bar_i ... A_bar_{j+1}) B_bar_j x_j

    The state goes on with all that was written to it, and every other token reads it as before. A source that
    is also a target (j = i) no longer reads what it has just written, ``C_i B_bar_i x_i``; its D term stays.
    Edits of B, C and delta by an earlier invoke are taken into account; edits of A_bar, B_bar, write or h[p]
    in the same layer are not: what is taken away is what the sources' own writes would be at the target,
    carried by delta and A. A second `knockout` in a layer comes too late: make both by one call of `apply`.

    Args:
        model: the model.
        source_positions, target_positions: an int, a slice, several ints or a boolean mask [L]. They count
            the tokens of this forward call; what an earlier call has left in a cache is not cut. In a
            left-padded batch a negative number is the same token in each prompt; others warn, and so does a
            position that is padding in some prompts.
        layers: an int or several; by default all that have an SSM, or with ``attention`` attention.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"`` (see `decay_groups`), indices, or
            a boolean mask [E].
        heads: of Mamba-2, in place of channels: ``None`` for all, indices, or a boolean mask [H].
        scan: cut the way through the state.
        conv: cut the way through the convolution too, as `knockout_conv` does. Through tokens between them,
            which are neither sources nor targets, sources still reach the targets.
        attention: cut what the targets read of the sources through attention as well, in all heads: the pattern is
            set to 0 there, and what else a target reads stays as it was. ``None`` does not cut it, and warns
            in a hybrid that has attention; ``False`` does not, and does not warn.

    Raises:
        PositionError: for a position that no prompt has, or if no source is at or before a target. Raised
            before anything is computed if the block has not asked for a site yet.
        LayerError: for a layer that the model does not have.
        UnknownSiteError: for a layer that has nothing to cut, as an MLP has no SSM, or a model without such layers.
        SiteValueError: for channels or heads that it does not have, or outside of a trace.
        SiteOrderError: if the block has gone past a layer's ssm_input (x_in with ``conv``), or its pattern.
        ArgumentError: if none of ``scan``, ``conv`` and ``attention`` is true, or only ``attention`` and channels
            or heads are given.

    Source:
        The formula of Mamba knockout (arXiv 2505.24244), on the attention matrix of arXiv 2403.01590.

    Example::

        with model.trace(prompt):
            knockout(model, source_positions=10, target_positions=-1, layers=[2, 3], channels="slow")
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    _make("knockout", model, [Cut(source_positions, target_positions, channels, scan, conv, heads, attention)], layers)


def knockout_conv(
    model: MambaTrace,
    source_positions: Positions,
    target_positions: Positions,
    layers: Layers = None,
    channels: Channels = None,
    *,
    heads: Heads = None,
) -> None:
    """Cut what flows from source to target tokens through the convolution's taps; inside a trace.

    For each target i and chosen channel e::

        conv_i -= sum over sources j with i-K < j <= i of weight[:, K-1-(i-j)] x_in_j

    so with a convolution over K = 4 positions a token is reached by itself (j = i) and the three before it.
    In Mamba-1 the scan's B, C and delta are made of what is left. In Mamba-2 the convolution runs over B and C as
    well, B_conv and C_conv are cut in the same way, and delta is not convolved. The heads of a group share B and
    C: these are cut in every group that a chosen channel is in, which the group's other heads notice.

    Args:
        model, source_positions, target_positions, layers, channels, heads: as in `knockout`.

    Raises:
        PositionError: as `knockout`, also if no source is within the last K positions of a target.
        LayerError, UnknownSiteError, SiteValueError, SiteOrderError: as `knockout`.

    Source:
        Mamba (arXiv 2312.00752), section 3.4: the convolution before the SSM.

    Example::

        with model.trace(prompt):
            knockout_conv(model, source_positions=10, target_positions=[11, 12, 13])
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    cut = Cut(source_positions, target_positions, channels, scan=False, conv=True, heads=heads)
    _make("knockout_conv", model, [cut], layers)


def zero_delta(
    model: MambaTrace,
    positions: Positions,
    layers: Layers = None,
    channels: Channels = None,
    *,
    heads: Heads = None,
) -> None:
    """Set delta to 0 at some tokens: they neither decay the state nor write to it; inside a trace.

    The token still reads the state left by the tokens before it, and its D term stays.

    Args:
        model, heads: as in `knockout`.
        layers: an int or several; by default all that have an SSM.
        channels: the same; in Mamba-2 those of whole heads, since the channels of a head share one delta.
        positions: the tokens, in the forms of ``source_positions`` there.

    Raises:
        PositionError, LayerError, UnknownSiteError, SiteValueError: as `knockout`.
        SiteOrderError: if the block has gone past a layer's delta.

    Source:
        Mamba (arXiv 2312.00752), section 3.5.2: delta = 0 keeps the state and ignores the input.

    Example::

        with model.trace(prompt):
            zero_delta(model, positions=10, layers=1)
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    _make("zero_delta", model, [ZeroDelta(positions, channels, heads)], layers)


def apply(model: MambaTrace, edits: Cut | ZeroDelta | Iterable[Cut | ZeroDelta], layers: Layers = None) -> None:
    """Make several cuts in the same layers; inside a trace.

    Together they cut the union of what each cuts: a flow that is in two of them is taken away once. What is
    taken from the scan is what flows there with the convolution cut and delta zeroed.

    Args:
        model: the model.
        edits: `Cut` and `ZeroDelta`, one or several, in any order.
        layers: an int or several; by default all that have something to cut. In a layer that has only the SSM or
            only attention, what there is of each edit is made; there must be something of each.

    Raises:
        PositionError, LayerError, UnknownSiteError, SiteValueError, SiteOrderError: as `knockout`.
        ArgumentError: for edits of another kind.

    Example::

        from mamba_trace.flow import Cut, ZeroDelta, apply

        with model.trace(prompt):
            apply(model, [Cut(10, -1, conv=True), Cut(1, [-1, -2], "fast"), ZeroDelta(6)], layers=[2, 3])
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    several = (
        [edits] if isinstance(edits, (Cut, ZeroDelta)) else list(edits) if isinstance(edits, Iterable) else [edits]
    )
    if not all(isinstance(edit, (Cut, ZeroDelta)) for edit in several):
        raise ArgumentError(f"apply takes Cut and ZeroDelta, one or several, not {edits!r}: apply(model, Cut(1, 4))")
    _make("apply", model, several, layers)


# -- checked before anything is computed, then made layer by layer -----------------------------------------


def _make(verb: str, model: MambaTrace, edits: list[Cut | ZeroDelta], layers: Layers) -> None:
    check_model(model, verb)
    need_a_trace(verb)
    numbers = layers_to_cut(model, edits, layers)
    with_ssm = [number for number in numbers if number in model.ssm_layers]
    for edit in (edit for edit in edits if edit.of_ssm):
        check_channels(model, edit.channels, edit.heads, with_ssm[0])
        if isinstance(edit, ZeroDelta):
            check_whole_heads(model, edit.channels, with_ssm[0])
    call = call_inputs(model, model.layers[numbers[0]])
    if call is not None:
        for edit in edits:
            check_positions(edit, *call, mixer_sizes(model, with_ssm[0])["K"] if edit.of_ssm else 1)
    warn_of_attention(model, edits)
    for layer in numbers:
        try:
            make_in(model, layer, edits)
        except SiteOrderError as error:
            raise SiteOrderError(
                f"{error}. If another cut went past it, make all cuts of a layer in one call, "
                f"flow.apply(model, [Cut(...), Cut(...)], layers), and earlier layers first"
            ) from error


def layers_to_cut(model: MambaTrace, edits: list[Cut | ZeroDelta], layers: Layers) -> list[int]:
    """The layers in ascending order, in each of which every edit finds something. Raises as `knockout`."""
    layout, parts = model._layout, []
    for edit in edits:
        parts.append([site for site, cut in ((SSM, edit.of_ssm), (PATTERN, edit.attention)) if cut])
    if layers is None:
        if not edits:
            return all_with(layout, SSM)
        found = {layer for sites in parts for site in sites for layer in layout.with_site(site)}
        return sorted(found) or all_with(layout, parts[0][0])
    numbers = layer_numbers(model, layers)
    for layer in numbers:
        for sites in parts:
            if not any(layout.has(site, layer) for site in sites):
                raise absent(layout, sites[0], layer, f"layers={layers!r}")
    return numbers


def make_in(model: MambaTrace, layer: int, edits: list[Cut | ZeroDelta]) -> None:
    """Make in a layer what there is to make of each edit, in execution order."""
    kind, block = model._layout.layers[layer], model.layers[layer]
    of_ssm = [edit for edit in edits if edit.of_ssm] if kind.has(SSM) else []
    reads = [edit for edit in edits if isinstance(edit, Cut) and edit.attention] if kind.has(PATTERN) else []
    attention_first = "attn" in kind.early
    if reads and attention_first:
        cut_reads(block.attn, reads)
    if of_ssm:
        edit_layer(block.ssm, [(edit, channel_mask(model, layer, edit.channels, edit.heads)) for edit in of_ssm])
    if reads and not attention_first:
        cut_reads(block.attn, reads)


def warn_of_attention(model: MambaTrace, edits: list[Cut | ZeroDelta]) -> None:
    """Warn, at the user's line, of the way through attention where a cut leaves it and does not say so."""
    left = model.attention_layers
    if left and any(isinstance(edit, Cut) and edit.scan and edit.attention is None for edit in edits):
        warn_user(
            f"only the flow through the SSM is cut: attention, in layers {spans(left)}, still carries from these "
            f"sources to these targets. attention=True cuts it, too; attention=False if this is meant"
        )
