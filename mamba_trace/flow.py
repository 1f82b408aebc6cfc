"""Cutting the flow of information from some tokens to others, to see which way the answer takes.

A token reaches a later one of the same layer by two ways alone: through the state, which it writes and the
later token reads, and through the taps of the convolution, over the next few positions. Each can be cut
exactly, for chosen tokens and channels, while everything else stays as it was: the state carried, what other
tokens read, and what the target reads of other tokens.

The functions here are called inside a trace. They read and edit public sites, so they work on every backend,
in batches and invokes, and leave the kernels of the other layers alone. A cut of the scan is one more scan of
the same parameters over the sources alone, and no [B,L,E,N] tensor.

Contract: in each layer they ask for sites from x_in to y, in execution order, so what shall happen in one
layer must be given in one call of `apply`. In the same block, sites before x_in can be read earlier and sites
after y later; those between belong in another invoke or a `tracer.cache`.

Source: attention knock-out (Geva et al., arXiv 2304.14767), for Mamba in arXiv 2404.03646 and 2505.24244.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from .arguments.selection import (
    Channels,
    Layers,
    Positions,
    call_inputs,
    channel_mask,
    check_channels,
    check_padding,
    decay_groups,
    decay_rate,
    layer_numbers,
    position_numbers,
)
from .cuts import Cut, Pairs, ZeroDelta, edit_layer
from .tracing import SiteOrderError, need_a_trace

if TYPE_CHECKING:
    from .model import MambaTrace

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


def knockout(
    model: MambaTrace,
    source_positions: Positions,
    target_positions: Positions,
    layers: Layers = None,
    channels: Channels = None,
    *,
    scan: bool = True,
    conv: bool = False,
) -> None:
    """Cut what flows from source to target tokens through the state; to be called inside a trace.

    Several cuts in one layer of a trace are one call of `apply`: a second `knockout` there comes too late.

    For each target i and chosen channel e the part of ``y`` that comes from the sources is taken away::

        y_i -= sum over sources j <= i of C_i (A_bar_i ... A_bar_{j+1}) B_bar_j x_j

    The state goes on with all that was written to it, and every other token reads it as before. A source that
    is its own target (j = i) no longer reads what it has just written, ``C_i B_bar_i x_i``; its D term stays.

    Args:
        model: the model.
        source_positions: an int, a slice, several ints or a boolean mask [L]; negative counts from the end,
            and is the same token in each prompt of a left-padded batch (others warn, and so does one that is
            padding in some prompts). Positions are those of the forward call: what an earlier call has left
            in a cache is not cut.
        target_positions: likewise.
        layers: an int or several; all by default.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"`` (see `decay_groups`), indices, or
            a boolean mask [E].
        scan: cut the way through the state.
        conv: cut the way through the convolution too, as `knockout_conv` does. By way of tokens between
            them, which are neither sources nor targets, sources still reach the targets.

    Raises:
        PositionError: for a position that no prompt has, or if no source is at or before a target: before
            anything is computed, where the block has not asked for a site yet.
        LayerError: for a layer that the model does not have.
        SiteValueError: for channels that it does not have, or outside of a trace.
        SiteOrderError: if the block has gone past a layer's ssm_input (x_in with ``conv``), as it has after
            another cut there.

    An edit of B, C or delta made by an earlier invoke is taken into account. One of A_bar, B_bar, write
    or h[p] in the same layer is not: what is taken away is what the sources' own writes would be at the
    target, carried by delta and A.

    Source:
        The formula of Mamba knockout (arXiv 2505.24244), on the attention matrix of arXiv 2403.01590. Here it
        is exact: one more scan, over the sources alone, is subtracted.

    Example::

        with model.trace(prompt):
            knockout(model, source_positions=10, target_positions=-1, layers=[2, 3], channels="slow")
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    _make("knockout", model, [Cut(source_positions, target_positions, channels, scan, conv)], layers)


def knockout_conv(
    model: MambaTrace,
    source_positions: Positions,
    target_positions: Positions,
    layers: Layers = None,
    channels: Channels = None,
) -> None:
    """Cut what flows from source to target tokens through the convolution's taps; inside a trace.

    For each target i and chosen channel e::

        conv_i -= sum over sources j with i-K < j <= i of weight[:, K-1-(i-j)] x_in_j

    so with a convolution over K = 4 positions a token is reached by itself (j = i) and the three before it.

    Args:
        model, source_positions, target_positions, layers, channels: as in `knockout`.

    Raises:
        PositionError: as `knockout`, also if no source is within the last K positions of a target.
        LayerError, SiteValueError, SiteOrderError: as `knockout`.

    Source:
        Mamba (arXiv 2312.00752), section 3.4: the convolution before the SSM.

    Example::

        with model.trace(prompt):
            knockout_conv(model, source_positions=10, target_positions=[11, 12, 13])
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    cut = Cut(source_positions, target_positions, channels, scan=False, conv=True)
    _make("knockout_conv", model, [cut], layers)


def zero_delta(
    model: MambaTrace, positions: Positions, layers: Layers = None, channels: Channels = None
) -> None:
    """Set delta to 0 at some tokens: they neither decay the state nor write to it; inside a trace.

    The token still reads the state of those before it, and its D term stays.

    Args:
        model, layers, channels: as in `knockout`.
        positions: the tokens, as ``source_positions`` there.

    Raises:
        PositionError, LayerError, SiteValueError: as `knockout`.
        SiteOrderError: if the block has gone past a layer's delta.

    Source:
        Mamba (arXiv 2312.00752), section 3.5.2: delta = 0 keeps the state and ignores the input.

    Example::

        with model.trace(prompt):
            zero_delta(model, positions=10, layers=1)
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    _make("zero_delta", model, [ZeroDelta(positions, channels)], layers)


def apply(
    model: MambaTrace, edits: Cut | ZeroDelta | Iterable[Cut | ZeroDelta], layers: Layers = None
) -> None:
    """Make several cuts in the same layers; inside a trace.

    Together they cut the union of what each cuts: a flow that is in two of them is taken away once. What is
    taken from the scan is what flows there with the convolution cut and delta zeroed.

    Args:
        model: the model.
        edits: `Cut` and `ZeroDelta`, one or several, in any order.
        layers: an int or several; all by default.

    Raises:
        PositionError, LayerError, SiteValueError, SiteOrderError: as `knockout`.

    Example::

        from mamba_trace.flow import Cut, ZeroDelta, apply

        with model.trace(prompt):
            apply(model, [Cut(10, -1, conv=True), Cut(1, [-1, -2], "fast"), ZeroDelta(6)], layers=[2, 3])
            logits = model.lm_head.output.save()  # [B,L,V]
    """
    _make("apply", model, [edits] if isinstance(edits, (Cut, ZeroDelta)) else list(edits), layers)


def _make(verb: str, model: MambaTrace, edits: list[Cut | ZeroDelta], layers: Layers) -> None:
    need_a_trace(verb)
    numbers = layer_numbers(model, layers)
    for edit in edits:
        check_channels(model, edit.channels)
    call = call_inputs(model, model.layers[numbers[0]])
    if call is not None:
        for edit in edits:
            _check(edit, *call, model.config.conv_kernel)
    for layer in numbers:
        masks = [channel_mask(model, layer, edit.channels) for edit in edits]
        try:
            edit_layer(model.layers[layer].ssm, edits, masks)
        except SiteOrderError as error:
            raise SiteOrderError(
                f"{error}. If another cut went past it, make all cuts of a layer in one call, "
                f"flow.apply(model, [Cut(...), Cut(...)], layers), and earlier layers first"
            ) from error


def _check(edit: Cut | ZeroDelta, length: int, mask: Tensor | None, taps: int) -> None:
    if isinstance(edit, ZeroDelta):
        position_numbers("positions", edit.positions, length)
        check_padding("positions", edit.positions, mask)
        return
    Pairs.of(edit, length, taps)
    check_padding("source_positions", edit.source_positions, mask)
    check_padding("target_positions", edit.target_positions, mask)
