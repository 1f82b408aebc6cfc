"""What came before a call of a mixer that nobody looks into, in the memory that its kernels read and overwrite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from ..scan import cpu
from ..scan.room import Room
from .discretisation import Discretisation
from .past import check_rows
from .starting import StartingRuns


def what_came_before(mixer: Any, cache: Any, value: Tensor) -> Anew | None:
    """What came before a call of a mixer with the input ``value``; ``None`` where a kernel cannot start from it."""
    if cache is None:
        return Anew(mixer)
    return InRuns(mixer, cache) if isinstance(cache, StartingRuns) else Lent.of(cache, mixer, value)


class Anew:
    """What came before a call that starts from nothing, and what each of its stretches hands on to the next.

    Args:
        mixer: whose call it is.

    Attributes:
        columns: memory for the last K columns [B,channels,K].
        state: the last state [B,...,N] as the scans have it; ``None`` for zeros.
        begun: whether ``columns`` has those that came before.
    """

    room: Room | None = None  # for the values that are made after it
    columns: Tensor | None = None
    state: Tensor | None = None
    begun = False

    def __init__(self, mixer: Any) -> None:
        self.mixer = mixer

    def memory(self) -> tuple[Tensor, ...]:
        """What a call leaves for what comes after it: nothing, or the last columns and the last state."""
        return ()

    def to_be_written(self, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
        """The `memory` of a call that kernels are about to run, of these shapes."""
        return ()

    def remember(self) -> None:
        """Keep what came before the call, for `undo`."""

    def undo(self) -> None:
        """Go back to what came before the call."""
        self.columns, self.state, self.begun = None, None, False

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """SiLU of the convolution of ``columns`` [B,L,channels] behind those that came before."""
        if self.columns is None:
            self.columns = columns.new_empty(columns.shape[0], columns.shape[-1], self.mixer.conv_kernel_size)
        if self.begun and columns.shape[1] == 1:
            return cpu.conv_update(columns, weight, bias, self.columns)
        before = self.columns.clone() if self.begun else None
        self.begun = True
        return cpu.convolved(columns, weight, bias, before, activate=True, columns=self.columns)

    def scanned(self, x: Tensor, skip: Tensor, discretise: Callable[[], Discretisation]) -> Tensor:
        """What the mixer's fused scan returns [B,L,E].

        Args:
            x, skip: its input and the gate [B,L,E].
            discretise: makes its parameters.
        """
        mixer, parameters = self.mixer, discretise()
        steps, A, B, C, D = parameters.steps(), parameters.make_A(), parameters.B, parameters.C, mixer.D_of_scans()
        by_channel: Tensor = mixer.by_channel(self.gated(mixer.by_head(x), steps, A, B, C, D, mixer.by_head(skip)))
        return by_channel

    def gated(self, *inputs: Tensor) -> Tensor:
        """What `ScanFamily.gated_scan` returns for the mixer's ``inputs``, after what came before."""
        gated: Tensor
        gated, self.state = self.mixer.scans.gated_update(*inputs, self.state)
        return gated

    def arrived(self, state: Tensor) -> None:
        """Take note of the last state of a stretch [B,...,N], where another scan has run it."""
        self.state = state.clone(memory_format=torch.contiguous_format)

    def ended(self) -> None:
        """Take note that the call has ended."""


class Begun(Anew):
    """A layer of a cache that holds nothing yet, which an unwatched mixer gives its memory, with the values in it."""

    def __init__(self, mixer: Any, layer: Any) -> None:
        super().__init__(mixer)
        self.layer = layer

    def memory(self) -> tuple[Tensor, ...]:
        if self.columns is None or self.state is None:  # another call has filled the layer
            return self.layer.conv_states[0], self.mixer.from_cache(self.layer.recurrent_states[0])
        return self.columns, self.state

    def to_be_written(self, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
        self.columns, self.state = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
        return self.memory()

    def ended(self) -> None:
        # As its `lazy_initialization`, which fills new memory with zeros first.
        layer, columns, state = self.layer, self.columns, self.mixer.to_cache(self.state)
        assert columns is not None
        flags = (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state)
        try:
            if layer.device is None:
                layer.dtype, layer.device = columns.dtype, columns.device
            layer.conv_kernel_size[0] = self.mixer.conv_kernel_size
            layer.conv_states[0], layer.recurrent_states[0] = columns, state
            for flag in flags:
                flag[0] = True
        except BaseException:  # an interrupt, too
            for flag in flags:
                flag[0] = False
            raise


class Lent(Begun):
    """The memory that a cache has for one layer, which an unwatched mixer reads and overwrites where it lies."""

    def __init__(self, mixer: Any, layer: Any) -> None:
        super().__init__(mixer, layer)
        self.columns, self.state = layer.conv_states[0], mixer.from_cache(layer.recurrent_states[0])
        self.begun = layer.has_previous_state[0]

    @classmethod
    def of(cls, cache: Any, mixer: Any, value: Tensor) -> Anew | None:
        """That of a mixer's layer for its input ``value`` [B,L,D], or `Begun` where there is none yet.

        ``None`` if the cache does more than to store, in float32, what it is given.
        """
        if not isinstance(cache, Cache):
            return None
        layer: Any = cache.layers[mixer.layer_idx]
        if not stores_what_it_is_given(type(cache), type(layer)) or layer.record_past:
            return None
        made = layer.is_conv_states_initialized[0], layer.is_recurrent_states_initialized[0]
        if not all(made):
            return None if any(made) else Begun(mixer, layer)
        columns: Tensor = layer.conv_states[0]
        check_rows(columns, value.shape[0])
        return cls(mixer, layer) if in_floats(columns) and in_floats(layer.recurrent_states[0]) else None

    def to_be_written(self, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
        changed(self.layer.conv_states[0])
        changed(self.layer.recurrent_states[0])
        self.layer.has_previous_state[0] = True
        return self.memory()

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        changed(self.layer.conv_states[0])
        convolved = super().convolved(columns, weight, bias)
        self.layer.has_previous_state[0] = True
        return convolved

    def gated(self, *inputs: Tensor) -> Tensor:
        changed(self.layer.recurrent_states[0])
        return super().gated(*inputs)

    def arrived(self, state: Tensor) -> None:
        assert self.state is not None
        self.state.copy_(state)

    def ended(self) -> None:
        """Take note that the call has ended: all is where it belongs."""

    def remember(self) -> None:
        assert self.columns is not None
        assert self.state is not None
        self.remembered = self.columns.clone(), self.state.clone(), self.begun

    def undo(self) -> None:
        assert self.columns is not None
        assert self.state is not None
        columns, state, self.begun = self.remembered
        self.columns.copy_(columns)
        self.state.copy_(state)
        self.layer.has_previous_state[0] = self.begun


class InRuns(Anew):
    """Where the runs of a sweep start, which are the same in all rows.

    Args:
        mixer: whose call it is.
        cache: of the sweep.
    """

    def __init__(self, mixer: Any, cache: StartingRuns) -> None:
        super().__init__(mixer)
        self.cache, self.layer, self.room = cache, mixer.layer_idx, cache.room

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        before = self.cache.convolution(self.layer, len(columns))
        runs, room = self.cache.runs, self.room
        return cpu.causal_conv_runs(columns, weight, bias, before, runs, activate=True, room=room)

    def gated(self, *inputs: Tensor) -> Tensor:
        states = self.cache.state(self.layer, len(inputs[0]))
        runs, how = self.cache.runs, {"kernels": self.mixer.kernels, "room": self.room}
        gated: Tensor = self.mixer.scans.gated_runs(*inputs, states, runs, **how)
        return self.cache.columns_read(gated, self.layer)


def stores_what_it_is_given(cache: type[Cache], layer: type) -> bool:
    """Whether caches and layers of these classes do no more than to store: nothing in ways of their own."""
    theirs: Any = LinearAttentionLayer
    return (
        cache.get_conv_state is Cache.get_conv_state
        and cache.update_conv_state is Cache.update_conv_state
        and cache.update_recurrent_state is Cache.update_recurrent_state
        and layer.__module__ == theirs.__module__  # they differ in how memory is made
        and getattr(layer, "update_conv_state", None) is theirs.update_conv_state
        and getattr(layer, "update_recurrent_state", None) is theirs.update_recurrent_state
    )


def in_floats(tensor: Tensor) -> bool:
    """Whether a tensor is in float32 and lies in memory without gaps."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


def changed(tensor: Tensor) -> None:
    """Tell autograd that a kernel overwrites a tensor."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
