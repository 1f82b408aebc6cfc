"""Caches of a sweep: forward calls that continue in the middle of a prompt, again and again from the same places."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..scan.room import Room
from ..scan.runs import Runs


class Starting(ABC):
    """A read-only cache: unlike Hugging Face's it is never updated. No token of a call that starts from it is padding.

    Attributes:
        length: how many positions the prompt has, S.
        runs: where the runs are, if each row of the call is several.
    """

    length: int
    runs: Runs | None = None

    @abstractmethod
    def convolution(self, layer: int, rows: int) -> Tensor:
        """The columns before a call with some ``rows`` [B,channels,K], or before each of its runs [runs,channels,K]."""

    @abstractmethod
    def state(self, layer: int, rows: int) -> Tensor:
        """The state before a call with some ``rows`` [B,...,N], or before each of its runs [runs,...,N]."""

    @abstractmethod
    def original(self, layer: int, given: Tensor, rows: int) -> Tensor:
        """The embeddings of each row's tokens [B,L,D] in a layer with some ``rows``, where ``given`` are the call's."""


@dataclass(frozen=True)
class StartingStates(Starting):
    """The convolution columns, states, keys and values from which a forward call continues.

    Layers may have different numbers of rows. Several rows may start from one place, which is kept once. Where only
    one place is kept, all rows start there.

    Attributes, each a list over the layers, but for ``length`` and ``embeddings``:
        columns: the last K columns of the convolution before each place [k,channels,K]; ``None`` without an SSM.
        states: the state before each place [k,...,N]; ``None`` without an SSM.
        places: the place that each row starts from: integers [B].
        keys, values: of attention over the whole prompt, rotated and multiplied: [B,U,S,W], or [1,U,S,W] for all
            rows; ``None`` without attention. Empty where no layer has any.
        positions: the position in the prompt of each row's first token: integers [B], or [1] where it is one place. A
            row reads the keys before it.
        before: the largest of these positions.
        length: how many positions the prompt has, S.
        embeddings: of the prompt's tokens [1,S,D], which a shared transformer reads; ``None`` where none does, and
            where the call is given its own tokens.
    """

    columns: list[Tensor | None]
    states: list[Tensor | None]
    places: list[Tensor]
    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    length: int = 0
    embeddings: Tensor | None = None

    def add(self, columns: Tensor | None, state: Tensor | None, positions: Tensor | None = None) -> None:
        """Add a layer, each row of which starts from its own columns [B,K,channels] and state [B,...,N].

        Args:
            columns, state: ``None`` for a layer without an SSM.
            positions: in the prompt, of each row's first token [B]; needed where there is no state.
        """
        if positions is None:
            positions = torch.zeros(len(of_layer(state)), dtype=torch.long, device=of_layer(state).device)
        self.columns.append(None if columns is None else rearrange(columns, "b k e -> b e k").contiguous())
        self.states.append(None if state is None else state.clone())
        self.places.append(torch.arange(len(positions), device=positions.device))
        self.positions.append(positions)
        self.before.append(max(positions.tolist(), default=0))

    def convolution(self, layer: int, rows: int) -> Tensor:
        return self._of_rows(self.columns, layer, rows)

    def state(self, layer: int, rows: int) -> Tensor:
        return self._of_rows(self.states, layer, rows)

    def _of_rows(self, kept: list[Tensor | None], layer: int, rows: int) -> Tensor:
        of_places = of_layer(kept[layer])
        if len(of_places) == 1:
            return of_places.expand(rows, *of_places.shape[1:])
        return of_places[self.places[layer]]

    def at(self, place: int) -> StartingStates:
        """Where all rows start from one place."""

        def cut(values: list[Any]) -> list[Any]:
            return [None if value is None else value[place : place + 1] for value in values]

        columns, states, positions = cut(self.columns), cut(self.states), cut(self.positions)
        before = [int(positions[0])] * len(positions)  # the same in all layers
        rest = (self.length, self.embeddings)
        return StartingStates(columns, states, [], self.keys, self.values, positions, before, *rest)

    # -- attention -------------------------------------------------------------------------------------

    def update(self, k: Tensor, v: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that the rows of a call read: those before it, as far as any row needs them, and its own.

        Args:
            k, v: of the call [B,U,L,W].
            layer: the layer.
        """
        past = (self.keys[layer], self.values[layer])
        before, rows = self.before[layer], len(k)
        kept = [of_layer(part)[:, :, :before].to(own.dtype) for part, own in zip(past, (k, v), strict=True)]
        k, v = (torch.cat((part.expand(rows, -1, -1, -1), own), dim=2) for part, own in zip(kept, (k, v), strict=True))
        return k, v

    def readable(self, layer: int, length: int) -> Tensor:
        """Which of the keys of `update` each position of a call of ``length`` may read: booleans [B,1,length,S]."""
        positions, before = self.positions[layer], self.before[layer]
        earlier = torch.arange(before, device=positions.device) < positions[:, None]  # [B,S]
        own = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        parts = (earlier[:, None].expand(-1, length, -1), own.expand(len(positions), -1, -1))
        return torch.cat(parts, dim=-1)[:, None]

    def rotary(self, layer: int, length: int, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the positions of each row [B,length,W], where ``embeddings`` are those of the prompt."""
        at = self._positions_of_rows(layer, length)
        cos, sin = (whole[0].to(at.device)[at] for whole in embeddings)
        return cos, sin

    def original(self, layer: int, given: Tensor, rows: int) -> Tensor:
        if self.embeddings is None:
            return given
        at = self._positions_of_rows(layer, given.shape[1])
        return self.embeddings[0].to(at.device)[at].expand(rows, -1, -1)

    def _positions_of_rows(self, layer: int, length: int) -> Tensor:
        """The positions of each row in the prompt [B,length]; past its end, the last again."""
        steps = torch.arange(length, device=self.positions[layer].device)
        return (self.positions[layer][:, None] + steps).clamp(max=self.length - 1)


@dataclass(frozen=True)
class StartingRuns(Starting):
    """The cache of a call each of whose rows is several runs, one behind the other.

    Attributes:
        starts: where the runs start, a place for each, which is the same in all rows.
        runs: where they are in a row.
        read: the columns of the call behind the last layer that anybody reads, one by one; ``None`` for all of them.
        room: memory for what layers make that nobody looks into.
    """

    starts: StartingStates
    runs: Runs
    read: Tensor | None = None
    room: Room | None = None

    def columns_read(self, value: Tensor, layer: int) -> Tensor:
        """Of a value in a layer [B,L,...] the columns that are read behind it."""
        last = len(self.starts.columns) - 1
        return value if self.read is None or layer != last else value[:, self.read.to(value.device)]

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.starts.length

    @functools.cached_property
    def parts(self) -> list[tuple[slice, StartingStates]]:
        """The positions of each run, and where it starts."""
        return [(span, self.starts.at(place)) for place, span in enumerate(self.runs.spans)]

    def convolution(self, layer: int, rows: int) -> Tensor:
        return of_layer(self.starts.columns[layer])

    def state(self, layer: int, rows: int) -> Tensor:
        return of_layer(self.starts.states[layer])

    def original(self, layer: int, given: Tensor, rows: int) -> Tensor:
        return torch.cat([start.original(layer, given[:, span], rows) for span, start in self.parts], dim=1)


def columns_read(cache: Any, value: Tensor, layer: int) -> Tensor:
    """Of a value in a layer [B,L,...] the columns that are read behind it: all, where a cache says nothing else."""
    return cache.columns_read(value, layer) if isinstance(cache, StartingRuns) else value


def of_layer(value: Tensor | None) -> Tensor:
    """What is kept of a layer that has the part."""
    assert value is not None
    return value
