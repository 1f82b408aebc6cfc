"""What a cut is, and the checks that need no more than the model's sizes and the length of the forward call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..arguments.channels import Channels, Heads
from ..arguments.selection import Positions, check_padding, position_numbers
from ..errors import ArgumentError, PositionError


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut of what flows from source to target tokens. The attributes are the arguments of `knockout`.

    Raises:
        ArgumentError: if nothing is to be cut, or only attention, and in some channels or heads of the SSM.
    """

    source_positions: Positions
    target_positions: Positions
    channels: Channels = None
    scan: bool = True
    conv: bool = False
    heads: Heads = None
    attention: bool | None = None

    def __post_init__(self) -> None:
        """Raise an `ArgumentError` if there is nothing to cut."""
        if not (self.of_ssm or self.attention):
            raise ArgumentError("scan=False and conv=False: nothing would be cut; one of them must be true")
        if not self.of_ssm and (self.channels is not None or self.heads is not None):
            raise ArgumentError(
                "channels= and heads= choose a part of the SSM, and with scan=False and conv=False only attention is "
                "cut, in all of its heads; for one head edit its pattern, ablate(model.layers[l].attn.pattern, heads=1)"
            )

    @property
    def of_ssm(self) -> bool:
        """Whether it cuts something of the SSM."""
        return self.scan or self.conv


@dataclass(frozen=True, eq=False)
class ZeroDelta:
    """Tokens that the state is carried past unchanged. The attributes are the arguments of `zero_delta`."""

    positions: Positions
    channels: Channels = None
    heads: Heads = None

    of_ssm, attention = True, False


def check_positions(edit: Cut | ZeroDelta, length: int, mask: Tensor | None, taps: int) -> None:
    """Refuse an edit at positions that a call does not have, and warn of padding.

    Args:
        edit: the edit.
        length: L of the call.
        mask: its attention mask [B,L], if it has one.
        taps: K, the width of the convolution.

    Raises:
        PositionError: as `knockout`.
    """
    if isinstance(edit, ZeroDelta):
        position_numbers("positions", edit.positions, length)
        check_padding("positions", edit.positions, mask)
        return
    sources_and_targets(edit, length, taps)
    check_padding("source_positions", edit.source_positions, mask)
    check_padding("target_positions", edit.target_positions, mask)


def sources_and_targets(cut: Cut, length: int, taps: int) -> tuple[frozenset[int], frozenset[int]]:
    """The sources and targets of a cut in a call of ``length`` tokens; ``taps`` is the convolution's width K.

    Raises:
        PositionError: as `knockout`.
    """
    sources = frozenset(position_numbers("source_positions", cut.source_positions, length))
    targets = frozenset(position_numbers("target_positions", cut.target_positions, length))
    asked = f"source_positions={cut.source_positions!r}, target_positions={cut.target_positions!r}"
    if min(sources) > max(targets):
        raise PositionError(f"{asked}: every source comes after every target, and information flows forward")
    only_conv = not (cut.scan or cut.attention)
    if only_conv and not any(target - lag in sources for target in targets for lag in range(taps)):
        raise PositionError(
            f"{asked}: no source is in reach of the convolution, which looks at the target itself "
            f"and the {taps - 1} positions before it"
        )
    return sources, targets
