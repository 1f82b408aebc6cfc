"""The cuts of one layer: which of its sites are read and edited, in execution order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..arguments.selection import position_numbers
from ..errors import SiteValueError
from ..modeling.past import masked
from ..scan.reference import accumulation_dtype
from ..tracing import mask_of_call
from .cuts import Cut, ZeroDelta, sources_and_targets

#: Positions and channels [E] (or heads [H], or groups [G]): each of these positions in each of these channels.
Product = tuple[frozenset[int], Tensor]


def edit_layer(ssm: Any, edits: Sequence[tuple[Cut | ZeroDelta, Tensor]]) -> None:
    """Make edits, each with its channels [E], in the mixer ``ssm`` (an envoy)."""
    convs = [(edit, mask) for edit, mask in edits if isinstance(edit, Cut) and edit.conv]
    scans = [(edit, mask) for edit, mask in edits if isinstance(edit, Cut) and edit.scan]
    zeros = [(edit, mask) for edit, mask in edits if isinstance(edit, ZeroDelta)]
    if convs:
        cut_taps(ssm, convs)
    if scans:
        x = without_padding(ssm.ssm_input.output)  # [B,L,E]
    if zeros or scans:
        delta = without_padding(ssm.delta.output)  # [B,L,E], in Mamba-2 [B,L,H]
    if zeros:
        length, width = delta.shape[1:]
        where = [
            (frozenset(position_numbers("positions", edit.positions, length)), any_of_each(mask, width))
            for edit, mask in zeros
        ]
        delta = delta.masked_fill(union(range(length), where, delta.device), 0)
        ssm.delta.output = delta
    if scans:
        cut_scan(ssm, scans, x, delta)


def cut_reads(attn: Any, cuts: Sequence[Cut]) -> None:
    """Take what flows through attention out of what each head reads: the pattern is 0 there, in all heads.

    Args:
        attn: the attention, an envoy.
        cuts: cuts.
    """
    pattern = attn.pattern.output  # [B,Q,L,S]
    length, past = pattern.shape[2], pattern.shape[3] - pattern.shape[2]
    cut = torch.zeros(pattern.shape[2:], dtype=torch.bool, device=pattern.device)
    for sources, targets in (sources_and_targets(each, length, 1) for each in cuts):
        # What comes after a target is not read in any case.
        cut[[[target] for target in targets], [past + source for source in sources]] = True
    attn.pattern.output = pattern.masked_fill(cut, 0)


def cut_scan(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]], x: Tensor, delta: Tensor) -> None:
    """Take what flows through the state out of y.

    Targets with the same sources share a scan, from the first source to the last target.

    Args:
        ssm: the mixer.
        cuts: cuts, each with its channels [E].
        x: [B,L,E].
        delta: [B,L,E], in Mamba-2 [B,L,H].
    """
    A, B, C = ssm.A.output, *map(without_padding, (ssm.B.output, ssm.C.output))
    mixer = ssm._module
    pairs = [sources_and_targets(cut, x.shape[1], mixer.sizes["K"]) for cut, _ in cuts]
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
        written = x[:, span].masked_fill(~union(range(start, stop), sources, x.device), 0)
        flow, _ = mixer.scans.selective_scan(
            mixer.by_head(written), delta[:, span], A, B[:, span], C[:, span], kernels=mixer.kernels
        )
        y = subtract(y, reached, mixer.by_channel(flow[:, [target - start for target in reached]]))
    ssm.y.output = y


def cut_taps(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]]) -> None:
    """Take what flows through the convolution out of its output: of x, and in Mamba-2 of B and C too.

    The heads of a group share B and C. These are cut in every group that a chosen channel is in.

    Args:
        ssm: the mixer.
        cuts: cuts, each with its channels [E].
    """
    mixer = ssm._module
    columns = [without_padding(getattr(ssm, name).output) for name in mixer.columns_in]  # [B,L,E], [B,L,G,N] twice
    pairs = [sources_and_targets(cut, columns[0].shape[1], mixer.sizes["K"]) for cut, _ in cuts]
    for name, values, weight in zip(mixer.columns_out, columns, taps_of(mixer), strict=True):
        width = values.shape[2]  # E or G
        masks = [any_of_each(channels, width) for _, channels in cuts]
        site = getattr(ssm, name)
        rest = site.output
        weight = weight.to(device=values.device, dtype=accumulation_dtype(rest))  # [K,E] or [K,G,N]
        site.output = without_taps(rest, values, weight, list(zip(pairs, masks, strict=True)))


def without_taps(
    conv: Tensor,
    columns: Tensor,
    weight: Tensor,
    cuts: Sequence[tuple[tuple[frozenset[int], frozenset[int]], Tensor]],
) -> Tensor:
    """A convolution's output less what cuts take from it.

    Args:
        conv, columns: its output and input [B,L,W,...].
        weight: [K,W,...].
        cuts: the sources and targets of each cut, and where it is made [W].
    """
    rest = conv.to(weight.dtype)
    for lag in range(len(weight)):
        where = [
            (frozenset(target for target in targets if target - lag in sources), mask)
            for (sources, targets), mask in cuts
        ]
        reached = sorted(frozenset[int]().union(*(targets for targets, _ in where)))
        if reached:
            flow = weight[-1 - lag] * columns[:, [target - lag for target in reached]]  # [B,reached,W,...]
            kept = ~union(reached, where, columns.device)
            rest = subtract(rest, reached, flow.masked_fill(kept.view(*kept.shape, *(1,) * (flow.dim() - 3)), 0))
    return rest.to(conv.dtype)


def without_padding(value: Tensor) -> Tensor:
    """A site's value [B,L,...] with zeros on padding, where an edit made before may have put something else."""
    mask = mask_of_call(value.shape[1])
    return value if mask is None or bool(mask.all()) else masked(value, mask.to(value.device))


def subtract(value: Tensor, positions: Sequence[int], flow: Tensor) -> Tensor:
    """``value`` [B,L,...] without ``flow`` [B,l,...] at the positions."""
    index = torch.tensor(positions, device=value.device)
    return value.index_add(1, index, flow.to(value.dtype), alpha=-1)


def any_of_each(channels: Tensor, width: int) -> Tensor:
    """Channels [E] as the heads or groups [width] that they lie in; the same where ``width`` is E."""
    return channels.unflatten(0, (width, -1)).any(-1)


def union(rows: Sequence[int], where: Sequence[Product], device: torch.device) -> Tensor:
    """Mask [rows,E]: the positions ``rows`` and channels that are in any of the products."""
    mask = torch.zeros(len(rows), where[0][1].shape[0], dtype=torch.bool, device=device)
    for positions, channels in where:
        chosen = torch.tensor([row in positions for row in rows], device=device)
        mask = mask | (chosen[:, None] & channels.to(device))
    return mask


def taps_of(mixer: Any) -> list[Tensor]:
    """The weight of a mixer's convolution, by the parts of its channels: [K,E], and in Mamba-2 twice [K,G,N].

    Raises:
        SiteValueError: if conv1d is adapted, so that its taps are not its weight.
    """
    conv1d = mixer.conv1d
    if type(conv1d) is not nn.Conv1d:
        raise SiteValueError(
            f"conv1d of layer {mixer.layer_idx} is a {type(conv1d).__name__}, whose taps cannot be told from "
            f"its weight: merge the adapter into the model before cutting them"
        )
    with align_module_device(conv1d):  # where it is offloaded
        return [part[0] for part in mixer.split(conv1d.weight[:, 0].T[None])]
