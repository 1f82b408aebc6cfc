"""What is cut in one layer: which sources, targets and channels, and the edits of its sites that do it.

`edit_layer` asks for the sites of one mixer in execution order, from x_in to y, and takes what the sources
contribute away from the targets' convolution and y. A contribution to y is that of one more scan over x with
everything but the sources set to zero, from a zero state: the scan is linear in x. So it needs no [B,L,E,N]
tensor and costs what a scan of the positions from the first source to the last target costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from .arguments.selection import Channels, Positions, position_numbers
from .errors import PositionError, SiteValueError
from .modeling.past import masked
from .scan import selective_scan
from .scan.reference import accumulation_dtype
from .tracing import mask_of_call

#: Positions and channels [E]: every one of the former with every one of the latter.
Product = tuple[frozenset[int], Tensor]


@dataclass(frozen=True, eq=False)
class Cut:
    """What flows from source to target tokens, cut: see `knockout`.

    Attributes:
        source_positions, target_positions: an int, a slice, several ints or a boolean mask [L]; negative
            counts from the end.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"``, indices, or a boolean mask [E].
        scan: cut what flows through the state.
        conv: cut what flows through the taps of the convolution.

    Raises:
        ValueError: if neither is to be cut.
    """

    source_positions: Positions
    target_positions: Positions
    channels: Channels = None
    scan: bool = True
    conv: bool = False

    def __post_init__(self) -> None:
        """Raise a `ValueError` if there is nothing to cut."""
        if not (self.scan or self.conv):
            raise ValueError("scan=False and conv=False: nothing would be cut; one of them must be true")


@dataclass(frozen=True, eq=False)
class ZeroDelta:
    """Tokens that the state is carried past unchanged: see `zero_delta`.

    Attributes:
        positions, channels: as the two of `Cut`.
    """

    positions: Positions
    channels: Channels = None


@dataclass(frozen=True)
class Pairs:
    """The positions of a `Cut` in a call of known length: every source with every target."""

    sources: frozenset[int]
    targets: frozenset[int]

    @classmethod
    def of(cls, cut: Cut, length: int, taps: int) -> Pairs:
        """Those of ``cut`` in a call of ``length``; ``taps`` is the convolution's width K.

        Raises:
            PositionError: for a position that the call does not have, or if nothing flows that could be cut.
        """
        sources = frozenset(position_numbers("source_positions", cut.source_positions, length))
        targets = frozenset(position_numbers("target_positions", cut.target_positions, length))
        pairs = cls(sources, targets)
        asked = f"source_positions={cut.source_positions!r}, target_positions={cut.target_positions!r}"
        if min(sources) > max(targets):
            raise PositionError(
                f"{asked}: every source comes after every target, and information flows forward"
            )
        if not cut.scan and not any(pairs.targets_at(lag) for lag in range(taps)):
            raise PositionError(
                f"{asked}: no source is in reach of the convolution, which looks at the target itself "
                f"and the {taps - 1} positions before it"
            )
        return pairs

    def targets_at(self, lag: int) -> frozenset[int]:
        """The targets with a source ``lag`` positions before them."""
        return frozenset(target for target in self.targets if target - lag in self.sources)


def edit_layer(ssm: Any, edits: Sequence[Cut | ZeroDelta], channels: Sequence[Tensor]) -> None:
    """Make ``edits`` in the mixer ``ssm`` (an envoy), inside a trace; ``channels``: the mask [E] of each."""
    each = list(zip(edits, channels, strict=True))
    convs = [(edit, mask) for edit, mask in each if isinstance(edit, Cut) and edit.conv]
    scans = [(edit, mask) for edit, mask in each if isinstance(edit, Cut) and edit.scan]
    zeros = [(edit, mask) for edit, mask in each if isinstance(edit, ZeroDelta)]
    if convs:
        _cut_taps(ssm, convs)
    # Edits that were made before may have put something in the place of padding, where it counts for nothing.
    if scans:
        x = without_padding(ssm.ssm_input.output)  # [B,L,E]
    if zeros or scans:
        delta = without_padding(ssm.delta.output)  # [B,L,E]
    if zeros:
        length = delta.shape[1]
        where = [(frozenset(position_numbers("positions", e.positions, length)), mask) for e, mask in zeros]
        delta = delta.masked_fill(_union(range(length), where, delta.device), 0)
        ssm.delta.output = delta
    if scans:
        _cut_scan(ssm, scans, x, delta)


def _cut_scan(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]], x: Tensor, delta: Tensor) -> None:
    # x, delta [B,L,E]. Targets with the same sources share a scan, from the first source to the last target.
    A, B, C = ssm.A.output, *map(without_padding, (ssm.B.output, ssm.C.output))  # [E,N], [B,L,N], [B,L,N]
    each = [(Pairs.of(cut, x.shape[1], ssm._module.conv_kernel_size), channels) for cut, channels in cuts]
    together: dict[tuple[int, ...], list[int]] = {}
    for target in sorted(frozenset[int]().union(*(pairs.targets for pairs, _ in each))):
        key = tuple(index for index, (pairs, _) in enumerate(each) if target in pairs.targets)
        together.setdefault(key, []).append(target)
    y = ssm.y.output  # [B,L,E]
    for key, targets in together.items():
        sources: list[Product] = [(each[index][0].sources, each[index][1]) for index in key]
        start, stop = min(min(positions) for positions, _ in sources), targets[-1] + 1
        reached = [target - start for target in targets if target >= start]
        if not reached:
            continue
        span = slice(start, stop)
        written = x[:, span].masked_fill(~_union(range(start, stop), sources, x.device), 0)
        scanned = selective_scan(
            written, delta[:, span], A, B[:, span], C[:, span], kernels=ssm._module.kernels
        )
        y = _subtract(y, [start + at for at in reached], scanned[0][:, reached])
    ssm.y.output = y


def _cut_taps(ssm: Any, cuts: Sequence[tuple[Cut, Tensor]]) -> None:
    x_in = without_padding(ssm.x_in.output)  # [B,L,E]
    each = [(Pairs.of(cut, x_in.shape[1], ssm._module.conv_kernel_size), channels) for cut, channels in cuts]
    conv = ssm.conv.output  # [B,L,E]
    dtype = accumulation_dtype(conv)
    weight = _conv_weight(ssm._module).to(device=x_in.device, dtype=dtype)  # [E,K]
    rest = conv.to(dtype)
    for lag in range(weight.shape[1]):
        where = [(pairs.targets_at(lag), channels) for pairs, channels in each]
        targets = sorted(frozenset[int]().union(*(positions for positions, _ in where)))
        if targets:
            flow = weight[:, -1 - lag] * x_in[:, [target - lag for target in targets]]  # [B,targets,E]
            rest = _subtract(rest, targets, flow.masked_fill(~_union(targets, where, x_in.device), 0))
    ssm.conv.output = rest.to(conv.dtype)


def without_padding(value: Tensor) -> Tensor:
    """A site's value [B,L,...], inside a trace, with zeros on the padding of the running forward call."""
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
