"""Short prompts that mixers go through as if they were long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from mamba_trace.modeling import unwatched


@contextlib.contextmanager
def in_stretches(monkeypatch: pytest.MonkeyPatch, shortest: int = 2) -> Iterator[list[int]]:
    """A block in which mixers that nobody looks into go through a prompt in stretches; it yields their lengths.

    Args:
        monkeypatch: changes the limits.
        shortest: how many positions a stretch has, or a few more.
    """
    own, lengths = unwatched.of_stretch, list[int]()

    def run(mixer: Any, nobody: Any, hidden_states: Tensor, past: Any) -> Tensor:
        lengths.append(hidden_states.shape[1])
        return own(mixer, nobody, hidden_states, past)

    with monkeypatch.context() as patch:
        patch.setattr(unwatched, "STRETCH", 1)
        patch.setattr(unwatched, "SHORTEST", shortest)
        patch.setattr(unwatched, "of_stretch", run)
        yield lengths
