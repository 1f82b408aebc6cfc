"""Which columns of a call are padding, and what is said of a position that is."""

from __future__ import annotations

import re

import pytest
import torch

from mamba_trace.tracing.mask import ends, told_of_padding

MASKS = {
    "left": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
}


def test_flags_are_counted_from_both_ends() -> None:
    flags = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert [side.tolist() for side in ends(flags)] == [[2, 0, 4], [1, 0, 4]]


@pytest.mark.parametrize(
    ("side", "position", "told"),
    [
        ("left", 1, r"h\[1\]: this invoke is left-padded by \[2, 1\], so column 1 is not its token 1\. Add"),
        ("left", -1, None),
        ("left", -4, "left-padded by .*, and where a prompt is that much shorter this is padding"),
        ("right", -1, r"right-padded by \[2, 0\], so column -1 is not its token -1 from the end\. Subtract"),
        ("right", 1, None),
        ("right", 3, "right-padded by .*, and where a prompt is that much shorter this is padding"),
    ],
)
def test_a_position_in_a_padded_prompt(side: str, position: int, told: str | None) -> None:
    said = told_of_padding(f"h[{position}]", position, MASKS[side])
    assert said is None if told is None else re.search(told, str(said))


def test_a_row_without_tokens_and_a_mask_without_numbers_say_nothing() -> None:
    assert told_of_padding("h[1]", 1, torch.tensor([[0, 0, 0], [1, 1, 1]])) is None
    assert told_of_padding("h[1]", 1, MASKS["left"].to("meta")) is None
