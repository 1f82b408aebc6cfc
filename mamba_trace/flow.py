"""Cutting the flow of information from some tokens to others, to see which way the answer takes.

A token reaches a later one of the same layer in only two ways: through the state, which it writes and the
later token reads, and through the taps of the convolution, over the next few positions. Each can be cut
exactly, for chosen tokens and channels, while everything else stays as it was: the state carried, what other
tokens read, and what the target reads of other tokens.

The functions here are called inside a trace. They read and edit public sites, so they work on every backend,
in batches and invokes, and leave the kernels of the other layers alone. The scan is linear in x, so what the
sources contribute to y is one more scan of the same parameters, from a zero state, over x with everything but
the sources set to zero. It needs no [B,L,E,N] tensor and runs from the first source to the last target only.

Contract: in each layer the functions ask for sites from x_in to y, in execution order. So all cuts of one
layer must be made in one call of `apply`. In the same block, sites before x_in can be read earlier and sites
after y later; the sites between belong in another invoke or a `tracer.cache`.

Source: attention knock-out (Geva et al., arXiv 2304.14767), for Mamba in arXiv 2404.03646 and 2505.24244.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

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
from .errors import ArgumentError, PositionError, SiteValueError
from .modeling.past import masked
from .scan import selective_scan
from .scan.reference import accumulation_dtype
from .tracing import SiteOrderError, mask_of_call, need_a_trace

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

#: Positions and channels [E]: each of these positions in each of these channels.
Product = tuple[frozenset[int], Tensor]


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut of what flows from source to target tokens. The attributes are the arguments of `knockout`.

    Raises:
        ArgumentError: if neither the scan nor the convolution is to be cut.
    """

    source_positions: Positions
    target_positions: Positions
    channels: Channels = None
    scan: bool = True
    conv: bool = False

    def __post_init__(self) -> None:
        """Raise an `ArgumentError` if there is nothing to cut."""
        if not (self.scan or self.conv):
            raise ArgumentError("scan=False and conv=False: nothing would be cut; one of them must be true")


@dataclass(frozen=True, eq=False)
class ZeroDelta:
    """Tokens that the state is carried past unchanged. The attributes are the arguments of `zero_delta`."""

    positions: Positions
    channels: Channels = None


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
        layers: an int or several; all by default.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"`` (see `decay_groups`), indices, or
            a boolean mask [E].
        scan: cut the way through the state.
        conv: cut the way through the convolution too, as `knockout_conv` does. Through tokens between them,
            which are neither sources nor targets, sources still reach the targets.

    Raises:
        PositionError: for a position that no prompt has, or if no source is at or before a target. Raised
            before anything is computed if the block has not asked for a site yet.
        LayerError: for a layer that the model does not have.
        SiteValueError: for channels that it does not have, or outside of a trace.
        SiteOrderError: if the block has gone past a layer's ssm_input (x_in with ``conv``).
        ArgumentError: if neither ``scan`` nor ``conv`` is true.

    Source:
        The formula of Mamba knockout (arXiv 2505.24244), on the attention matrix of arXiv 2403.01590.

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


def zero_delta(model: MambaTrace, positions: Positions, layers: Layers = None, channels: Channels = None) -> None:
    """Set delta to 0 at some tokens: they neither decay the state nor write to it; inside a trace.

    The token still reads the state left by the tokens before it, and its D term stays.

    Args:
        model, layers, channels: as in `knockout`.
        positions: the tokens, in the forms of ``source_positions`` there.

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


def apply(model: MambaTrace, edits: Cut | ZeroDelta | Iterable[Cut | ZeroDelta], layers: Layers = None) -> None:
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


# -- checked before anything is computed, then made layer by layer -----------------------------------------


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
            _edit_layer(model.layers[layer].ssm, list(zip(edits, masks, strict=True)))
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
    _pairs(edit, length, taps)
    check_padding("source_positions", edit.source_positions, mask)
    check_padding("target_positions", edit.target_positions, mask)


def _pairs(cut: Cut, length: int, taps: int) -> tuple[frozenset[int], frozenset[int]]:
    # The sources and targets in a call of `length` tokens; `taps` is the convolution's width K.
    sources = frozenset(position_numbers("source_positions", cut.source_positions, length))
    targets = frozenset(position_numbers("target_positions", cut.target_positions, length))
    asked = f"source_positions={cut.source_positions!r}, target_positions={cut.target_positions!r}"
    if min(sources) > max(targets):
        raise PositionError(f"{asked}: every source comes after every target, and information flows forward")
    if not cut.scan and not any(target - lag in sources for target in targets for lag in range(taps)):
        raise PositionError(
            f"{asked}: no source is in reach of the convolution, which looks at the target itself "
            f"and the {taps - 1} positions before it"
        )
    return sources, targets


def _edit_layer(ssm: Any, edits: Sequence[tuple[Cut | ZeroDelta, Tensor]]) -> None:
    # Make edits, each with its channels [E], in the mixer `ssm` (an envoy). Sites in execution order.
    convs = [(edit, mask) for edit, mask in edits if isinstance(edit, Cut) and edit.conv]
    scans = [(edit, mask) for edit, mask in edits if isinstance(edit, Cut) and edit.scan]
    zeros = [(edit, mask) for edit, mask in edits if isinstance(edit, ZeroDelta)]
    if convs:
        _cut_taps(ssm, convs)
    if scans:
        x = _without_padding(ssm.ssm_input.output)  # [B,L,E]
    if zeros or scans:
        delta = _without_padding(ssm.delta.output)  # [B,L,E]
    if zeros:
        length = delta.shape[1]
        where = [(frozenset(position_numbers("positions", e.positions, length)), mask) for e, mask in zeros]
        delta = delta.masked_fill(_union(range(length), where, delta.device), 0)
        ssm.delta.output = delta
    if scans:
        _cut_scan(ssm, scans, x, delta)


def _cut_scan(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]], x: Tensor, delta: Tensor) -> None:
    # x, delta [B,L,E]. Targets with the same sources share a scan, from the first source to the last target.
    A, B, C = ssm.A.output, *map(_without_padding, (ssm.B.output, ssm.C.output))  # [E,N], [B,L,N], [B,L,N]
    pairs = [_pairs(cut, x.shape[1], ssm._module.conv_kernel_size) for cut, _ in cuts]
    together: dict[tuple[int, ...], list[int]] = {}
    for target in sorted(frozenset[int]().union(*(targets for _, targets in pairs))):
        key = tuple(index for index, (_, targets) in enumerate(pairs) if target in targets)
        together.setdefault(key, []).append(target)
    y = ssm.y.output  # [B,L,E]
    for key, targets in together.items():
        sources: list[Product] = [(pairs[index][0], cuts[index][1]) for index in key]
        start, stop = min(min(positions) for positions, _ in sources), targets[-1] + 1
        reached = [target for target in targets if target >= start]
        if not reached:
            continue
        span = slice(start, stop)
        written = x[:, span].masked_fill(~_union(range(start, stop), sources, x.device), 0)
        kernels = ssm._module.kernels
        flow, _ = selective_scan(written, delta[:, span], A, B[:, span], C[:, span], kernels=kernels)
        y = _subtract(y, reached, flow[:, [target - start for target in reached]])
    ssm.y.output = y


def _cut_taps(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]]) -> None:
    x_in = _without_padding(ssm.x_in.output)  # [B,L,E]
    conv = ssm.conv.output  # [B,L,E]
    dtype = accumulation_dtype(conv)
    weight = _conv_weight(ssm._module).to(device=x_in.device, dtype=dtype)  # [E,K]
    pairs = [_pairs(cut, x_in.shape[1], weight.shape[1]) for cut, _ in cuts]
    rest = conv.to(dtype)
    for lag in range(weight.shape[1]):
        where = [
            (frozenset(target for target in targets if target - lag in sources), channels)
            for (sources, targets), (_, channels) in zip(pairs, cuts, strict=True)
        ]
        reached = sorted(frozenset[int]().union(*(targets for targets, _ in where)))
        if reached:
            flow = weight[:, -1 - lag] * x_in[:, [target - lag for target in reached]]  # [B,reached,E]
            rest = _subtract(rest, reached, flow.masked_fill(~_union(reached, where, x_in.device), 0))
    ssm.conv.output = rest.to(conv.dtype)


def _without_padding(value: Tensor) -> Tensor:
    # A site's value [B,L,...] with zeros on padding, where an edit made before may have put something else.
    mask = mask_of_call(value.shape[1])
    return value if mask is None or bool(mask.all()) else masked(value, mask.to(value.device))


def _subtract(value: Tensor, positions: Sequence[int], flow: Tensor) -> Tensor:
    # value [B,L,E] without flow [B,l,E] at the positions.
    index = torch.tensor(positions, device=value.device)
    return value.index_add(1, index, flow.to(value.dtype), alpha=-1)


def _union(rows: Sequence[int], where: Sequence[Product], device: torch.device) -> Tensor:
    # Mask [rows,E]: the positions `rows` and channels that are in any of the products.
    mask = torch.zeros(len(rows), where[0][1].shape[0], dtype=torch.bool, device=device)
    for positions, channels in where:
        chosen = torch.tensor([row in positions for row in rows], device=device)
        mask = mask | (chosen[:, None] & channels.to(device))
    return mask


def _conv_weight(mixer: Any) -> Tensor:
    # [E,K]
    conv1d = mixer.conv1d
    if type(conv1d) is not nn.Conv1d:
        raise SiteValueError(
            f"conv1d of layer {mixer.layer_idx} is a {type(conv1d).__name__}, whose taps cannot be told from "
            f"its weight: merge the adapter into the model before cutting them"
        )
    with align_module_device(conv1d):  # where it is offloaded
        return conv1d.weight[:, 0]
