"""Which columns of a forward call are padding, and what to tell a user who asks for one of them."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def ends(flags: Tensor) -> tuple[Tensor, Tensor]:
    """How many flags [B,L] are set one after the other from the start of each row [B], and to its end [B]."""
    count = flags.long()
    return count.cumprod(-1).sum(-1), count.flip(-1).cumprod(-1).sum(-1)


def told_of_padding(asked: str, position: int, mask: Tensor) -> str | None:
    """The warning for a user who asks for a position that is padding, or another token than they may think.

    Args:
        asked: what the user asked for, as it appears in the message.
        position: a column of the call; a negative position counts from the end.
        mask: the attention mask [B,L] of the rows that the user asks about.

    Returns:
        The warning, or ``None`` where there is nothing to warn of.
    """
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return None
    length = mask.shape[1]
    before, after = (side.tolist() for side in ends(mask == 0))
    rows = [(left, right) for left, right in zip(before, after, strict=True) if left < length]
    for side, offsets, shifted in (
        ("left", [left for left, _ in rows], position >= 0),
        ("right", [right for _, right in rows], position < 0),
    ):
        if not any(offsets):
            continue
        padding = str(offsets[0]) if len(set(offsets)) == 1 else str(offsets)
        padded = f"{asked}: this invoke is {side}-padded by {padding}"
        if shifted and side == "left":
            return (
                f"{padded}, so column {position} is not its token {position}. Add the padding to the "
                f"position, or count from the end with a negative one"
            )
        if shifted:
            return (
                f"{padded}, so column {position} is not its token {position} from the end. Subtract the "
                f"padding from the position, or count from the start"
            )
        if any(not left <= position % length < length - right for left, right in rows):
            return f"{padded}, and where a prompt is that much shorter this is padding"
    return None
