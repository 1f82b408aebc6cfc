"""What came before this call: a cache's convolution columns and state, and which tokens are padding.

Hugging Face keeps, for each layer, the last K columns that entered the convolution and the state after the
last token. Padding belongs in neither, on whichever side it is, and what an edit puts there goes no further:
the answer of a prompt never depends on how long the others of its batch are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import PromptError


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

    def convolution(self, x_in: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the convolution takes: this call's columns [B,L,E], and those before them [B,E,K] or ``None``.

        The cache then holds the last K up to now.
        """
        if self.cache is None:
            return x_in, None
        layer, kernel = self.mixer.layer_idx, self.mixer.conv_kernel_size
        if isinstance(self.cache, StartingStates):
            return next_to_the_past(x_in, mask, self.cache.convolution(layer))
        before = self.cache.get_conv_state(layer, state_idx=0)
        # The cache overwrites its tensors in place.
        before = None if before is None else before[..., -kernel:].clone()
        recent = x_in if self.cache.is_recording_past(layer) else last_real(x_in, mask, kernel, before)
        self.cache.update_conv_state(recent.transpose(1, 2), layer, conv_kernel_size=kernel)
        return next_to_the_past(x_in, mask, before)

    def keep_columns(self, columns: Tensor, mask: Tensor | None) -> None:
        """Store the last K of the columns [B,E,L] or [B,E,K+L] that the convolution saw, edits included."""
        layer, kernel = self.mixer.layer_idx, self.mixer.conv_kernel_size
        if (
            self.cache is None
            or isinstance(self.cache, StartingStates)
            or self.cache.is_recording_past(layer)
        ):
            return
        recent = F.pad(columns, (kernel, 0))[..., -kernel:]
        if mask is not None:
            steps = torch.arange(1, mask.shape[1] + 1, device=columns.device)
            after = mask.shape[1] - (mask * steps).amax(-1)  # [B]: the padding behind the last token
            ends = columns.shape[-1] - after[:, None] + torch.arange(kernel, device=columns.device)  # [B,K]
            index = ends[:, None].expand(-1, columns.shape[1], -1)
            recent = F.pad(columns, (kernel, 0)).gather(-1, index)
        self.cache.update_conv_state(recent, layer, conv_kernel_size=kernel)

    def mask(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """`attention_mask_of` this call, whose hidden states are ``tokens`` [B,L,D]."""
        layer = self.mixer.layer_idx
        started = isinstance(self.cache, StartingStates) or (
            self.cache is not None and self.cache.get_conv_state(layer, state_idx=0) is not None
        )
        return attention_mask_of(mask, tokens.shape[0], tokens.shape[1], started, first=layer == 0)

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


def attention_mask_of(
    mask: Tensor | None, rows: int, length: int, started: bool = False, first: bool = True
) -> Tensor | None:
    """Which columns of this call are tokens: booleans [B,L], or ``None`` where none is known to be padding.

    Args:
        mask: 1 on tokens and 0 on padding, of the tokens in a cache too where there are any; this call's are
            the last columns.
        rows, length: B and L of this call.
        started: whether there are tokens before these, in a cache.
        first: whether this is the first layer. Its batch is the mask's; in later ones somebody may have added
            rows, which is right where no token is padding.

    Raises:
        PromptError: if the mask has another shape, other values than 0 and 1, or padding between tokens.
    """
    if mask is None:
        return None
    wrong = mask.dim() != 2 or mask.shape[1] < length or (mask.shape[1] > length and not started)
    if wrong or (first and mask.shape[0] != rows):
        raise PromptError(
            f"attention_mask is 1 on each token and 0 on padding, of the shape {[rows, length]} of the "
            f"tokens (with a cache it may cover the tokens in it too), not {list(mask.shape)}"
        )
    mask = mask[:, mask.shape[1] - length :]
    # On a GPU a look at it would wait for the device.
    if mask.device.type == "cpu" and not isinstance(mask, FakeTensor):
        if bool((mask == 1).all()):
            return None
        check_values(mask)
        check_gaps(mask)
    if mask.shape[0] != rows:
        raise PromptError(f"attention_mask has {mask.shape[0]} rows, and this layer is given {rows}")
    return mask != 0


def check_values(mask: Tensor) -> None:
    """Raises `PromptError` where a mask holds anything but 0 and 1."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise PromptError(
            f"attention_mask has the value {wrong[0].item()}, and it is 1 on tokens and 0 on padding: tokens "
            f"cannot be weighed"
        )


def check_gaps(mask: Tensor) -> None:
    """Raises `PromptError` where a mask [B,L] of zeros and ones has padding between tokens."""
    before, after = ends(mask == 0)
    real = (mask != 0).sum(-1)
    gaps = ((before + real + after != mask.shape[-1]) & (real > 0)).nonzero()[:, 0].tolist()
    if gaps:
        raise PromptError(
            f"attention_mask of row {gaps[0]} is 0 between tokens: {mask[gaps[0]].tolist()}. Padding stands "
            f"before the tokens or after them. Leave a token out of the prompt, or let the state pass it by "
            f"with mamba_trace.flow.zero_delta"
        )


def ends(flags: Tensor) -> tuple[Tensor, Tensor]:
    """How many flags [B,L] are set one after the other from the start on [B], and up to the end [B]."""
    count = flags.long()
    return count.cumprod(-1).sum(-1), count.flip(-1).cumprod(-1).sum(-1)


def told_of_padding(asked: str, position: int, mask: Tensor) -> str | None:
    """What to tell a user who asks for a position that is padding, or another token than it seems.

    Args:
        asked: what the user asked for, for the message.
        position: a column of the call; negative counts from the end.
        mask: of the rows that the user asks about [B,L].
    """
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return None
    length = mask.shape[1]
    before, after = (side.tolist() for side in ends(mask == 0))
    rows = [(left, right) for left, right in zip(before, after, strict=True) if left < length]
    for side, padding, shifted in (("left", 0, position >= 0), ("right", 1, position < 0)):
        offsets = [row[padding] for row in rows]
        if not any(offsets):
            continue
        told = str(offsets[0]) if len(set(offsets)) == 1 else str(offsets)
        padded = f"{asked}: this invoke is {side}-padded by {told}"
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


# -- padding stays padding ---------------------------------------------------------------------------------


def masked(value: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """``value`` [B,L,...] with ``fill`` on padding, whatever stood there, NaN too; mask [B,L]."""
    if mask is None:
        return value
    return value.masked_fill(~mask.reshape(*mask.shape, *[1] * (value.dim() - 2)), fill)


def offered(offer: Any, name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    """``value`` [B,L,...] offered at site ``name``; padding is zero again after an edit of it."""
    looked_at = mask is not None and offer.wants(name)
    served = offer(name, value)
    return masked(served, mask) if looked_at else served


def kept_at_padding(served: Tensor, state: Tensor, mask: Tensor | None, position: int) -> Tensor:
    """The state [B,E,N] that goes on from ``position``: on padding ``state``, which no edit changes.

    Args:
        served: what an edit made of it.
        state: what the scan reached.
        mask: [B,L], or ``None``.
    """
    return served if mask is None else torch.where(mask[:, position, None, None], served, state)


@contextlib.contextmanager
def seen_by(conv1d: nn.Module, mask: Tensor | None, kernel: int) -> Iterator[list[Tensor]]:
    """What the convolution ``conv1d`` sees, after edits of its input: zeros on padding, whatever they say.

    Args:
        conv1d: the module, or an adapter around it.
        mask: [B,L], or ``None``.
        kernel: how many columns of a cache come before the call's, 0 for none: [B,E,K+L] goes in.

    Yields:
        A list that holds the columns [B,E,K+L] once the module was called.
    """
    real = mask
    if mask is not None and kernel:
        real = moved_next_to_the_past(mask.new_ones(len(mask), kernel), mask, mask)
    convolutions = [module for module in conv1d.modules() if isinstance(module, nn.Conv1d)]
    seen: list[Tensor] = []

    def guarded(own: Any) -> Any:
        def run(columns: Tensor, *rest: Any) -> Tensor:
            if real is not None and columns.shape[-1] == real.shape[-1]:
                columns = columns.masked_fill(~real[:, None], 0)
            seen[:] = seen or [columns]  # what comes first is the input, and not what an adapter makes of it
            return own(columns, *rest)

        return run

    # nnsight serves the input inside the call of the module, so this is the first place behind an edit of it.
    for module in convolutions:
        module.__dict__["_conv_forward"] = guarded(module._conv_forward)
    try:
        yield seen
    finally:
        for module in convolutions:
            del module.__dict__["_conv_forward"]


# -- the columns of the convolution ------------------------------------------------------------------------


def next_to_the_past(
    x_in: Tensor, mask: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x_in [B,L,E] and the columns before it [B,E,K], with those right before the first token of each row.

    Padding that stands between them changes places with them; tokens stay where they are.
    """
    if before is None or mask is None or (mask.device.type == "cpu" and _all_begin(mask)):
        return x_in, before
    kernel = before.shape[-1]
    columns = moved_next_to_the_past(before.transpose(1, 2).to(x_in.dtype), x_in, mask)
    return columns[:, kernel:].contiguous(), columns[:, :kernel].transpose(1, 2).contiguous()


def _all_begin(mask: Tensor) -> bool:
    # Whether no row begins with padding. A fake mask has no numbers, and its shapes are the same either way.
    return isinstance(mask, FakeTensor) or bool(mask[:, 0].all())


def moved_next_to_the_past(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """``before`` [B,K,...] and ``after`` [B,L,...] as [B,K+L,...], the left padding of each row first."""
    kernel, length = before.shape[1], after.shape[1]
    padding = left_padding(mask)[:, None]  # [B,1]
    at = torch.arange(kernel + length, device=mask.device)
    index = torch.where(at < padding, at + kernel, torch.where(at < padding + kernel, at - padding, at))
    return torch.cat((before, after), dim=1)[torch.arange(len(mask), device=mask.device)[:, None], index]


def left_padding(mask: Tensor) -> Tensor:
    """How many columns of padding each row of a mask [B,L] begins with [B]; 0 where it has no token."""
    padding = (mask.cumsum(-1) == 0).sum(-1)
    return padding.masked_fill(padding == mask.shape[1], 0)


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
    end = (mask * steps).amax(-1)  # [B]: one past the last real token
    start = left_padding(mask)[:, None]  # [B,1]: the first one
    index = end[:, None] - kernel + torch.arange(kernel, device=x_in.device)  # [B,K]
    rows = index[..., None].expand(-1, -1, width)
    recent = x_in.gather(1, rows.clamp(min=0, max=length - 1))
    # What is before the first token is in the history, with no padding between.
    past = (index - start + kernel)[..., None].expand(-1, -1, width).clamp(min=0, max=kernel - 1)
    return torch.where((index < start)[..., None], history.gather(1, past), recent)
