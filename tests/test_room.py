"""Memory that a sweep's layers share."""

from __future__ import annotations

import torch

from mamba_trace.scan.room import Room


def test_a_value_of_more_rows_has_the_same_memory() -> None:
    room = Room(rows=5)
    first = room.take("y", (2, 7, 3), rows=2)
    address = first.data_ptr()
    for rows in (2, 3, 5):
        value = room.take("y", (rows, 7, 3), rows)
        assert value.shape == (rows, 7, 3)
        assert value.is_contiguous()
        assert value.data_ptr() == address
    assert room.take("x", (5, 7, 3), 5).data_ptr() != address


def test_a_batch_beyond_the_largest_gets_memory_of_its_own() -> None:
    room = Room(rows=1)
    room.take("y", (1, 2), 1)
    value = room.take("y", (3, 2), 3)
    assert value.shape == (3, 2)
    assert value.dtype == torch.float32
