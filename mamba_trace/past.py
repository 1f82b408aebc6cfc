"""What came before this call: a cache's convolution columns and state, and which tokens are padding.

Hugging Face keeps, for each layer, the last K columns that entered the convolution and the state after the
last token. Padding belongs in neither, on whichever side it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class StartingStates:
    """Where a forward call starts in the middle of a prompt: given as its ``cache``, and left as it is.

    Unlike a Hugging Face cache it is not brought up to date, and layers may have different numbers of rows.
    Several rows may start from one place, which is kept once. No token of a call that starts here is padding.

    Attributes:
        columns: of each layer, the last K columns of x_in before each place [k,E,K].
        states: of each layer, the state before each place [k,E,N].
        places: of each layer, the place that each row starts from: integers [B].
    """

    columns: list[Tensor]
    states: list[Tensor]
    places: list[Tensor]

    def add(self, columns: Tensor, state: Tensor) -> None:
        """Add a layer, each row of which starts from its own columns [B,K,E] and state [B,E,N]."""
        self.columns.append(columns.transpose(1, 2).contiguous())
        self.states.append(state.clone())
        self.places.append(torch.arange(len(state), device=state.device))

    def convolution(self, layer: int) -> Tensor:
        """The columns before the call [B,E,K]."""
        return self.columns[layer][self.places[layer]]

    def state(self, layer: int) -> Tensor:
        """The state before the call [B,E,N]."""
        return self.states[layer][self.places[layer]]


class PastStates:
    """What one mixer's layer of a Hugging Face cache holds, and how it is brought up to date.

    Args:
        mixer: the mixer.
        cache: the model's cache, `StartingStates`, or ``None``.
    """

    def __init__(self, mixer: Any, cache: Any) -> None:
        self.mixer, self.cache = mixer, cache

    def convolution(self, x_in: Tensor, mask: Tensor | None) -> Tensor | None:
        """The columns before this call's [B,E,K], or ``None``; the cache then holds the last K up to now."""
        if self.cache is None:
            return None
        layer, kernel = self.mixer.layer_idx, self.mixer.conv_kernel_size
        if isinstance(self.cache, StartingStates):
            return self.cache.convolution(layer)
        before = self.cache.get_conv_state(layer, state_idx=0)
        # The cache overwrites its tensors in place.
        before = None if before is None else before[..., -kernel:].clone()
        recent = x_in if self.cache.is_recording_past(layer) else last_real(x_in, mask, kernel, before)
        self.cache.update_conv_state(recent.transpose(1, 2), layer, conv_kernel_size=kernel)
        return before

    def state(self) -> Tensor | None:
        """The cached state to start from [B,E,N], or ``None`` for zeros."""
        if isinstance(self.cache, StartingStates):
            return self.cache.state(self.mixer.layer_idx)
        if self.cache is not None:
            layer = self.cache.layers[self.mixer.layer_idx]
            if layer.is_recurrent_states_initialized[0]:
                return layer.recurrent_states[0].clone()
        return None

    def keep(self, h: Tensor) -> None:
        """Store the state after the last token of this call."""
        if self.cache is not None and not isinstance(self.cache, StartingStates):
            self.cache.update_recurrent_state(h, self.mixer.layer_idx)


def attention_mask_of(mask: Tensor | None, length: int, cache: Any = None) -> Tensor | None:
    """The mask [B,L] of this call's tokens, or ``None`` where none of them is known to be padding.

    Args:
        mask: of the cached tokens too, where there are any; this call's are the last ones.
        length: the number L of this call's.
        cache: what the call starts from.
    """
    if mask is None or isinstance(cache, StartingStates):
        return None
    mask = mask[:, -length:]
    # On a GPU a look at it would wait for the device.
    looked_at = mask.device.type == "cpu" and not isinstance(mask, FakeTensor)
    return None if looked_at and bool(mask.all()) else mask


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    """``value`` [B,L,...] with the columns of padding set to zero; mask [B,L]."""
    return value if mask is None else (value * mask[..., None]).to(value.dtype)


def last_real(x_in: Tensor, mask: Tensor | None, kernel: int, before: Tensor | None) -> Tensor:
    """The last ``kernel`` real tokens' columns of each row, reaching back into ``before``.

    Args:
        x_in: [B,L,E].
        mask: attention mask [B,L], or ``None``.
        kernel: the width K of the convolution.
        before: the columns before ``x_in`` [B,E,K], or ``None`` for zeros.

    Returns:
        [B,K,E].
    """
    batch, length, width = x_in.shape
    history = (
        x_in.new_zeros(batch, kernel, width) if before is None else before.transpose(1, 2).to(x_in.dtype)
    )
    if mask is None:
        return torch.cat((history, x_in[:, -kernel:]), dim=1)[:, -kernel:]
    steps = torch.arange(1, length + 1, device=x_in.device)
    end = ((mask != 0) * steps).amax(-1)  # [B]: one past the last real token
    index = end[:, None] - kernel + torch.arange(kernel, device=x_in.device)  # [B,K]; negative reaches back
    rows = index[..., None].expand(-1, -1, width)
    recent = x_in.gather(1, rows.clamp(min=0, max=length - 1))
    return torch.where(rows < 0, history.gather(1, (rows + kernel).clamp(min=0, max=kernel - 1)), recent)
