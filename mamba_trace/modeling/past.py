"""What came before this call: a cache's convolution columns and state, and which tokens are padding.

For each layer Hugging Face keeps the last K columns that entered the convolution, and the state after the
last token. Padding belongs in neither, on whichever side it is, and an edit on padding goes no further: the
answer to a prompt never depends on how long the other prompts of its batch are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import PromptError
from ..scan.runs import Runs
from ..tracing.mask import ends
from .starting import Starting, StartingRuns


class CachedLayer(Protocol):
    """What a cache has to know of a mixer."""

    layer_idx: int
    conv_kernel_size: int


class PastStates:
    """What a cache holds for one mixer's layer, and how it is brought up to date.

    Args:
        mixer: the mixer.
        cache: the model's cache, what `starting` has for one, or ``None``.
        attention_mask: of the call, as the user gave it. ``mask`` says which columns are tokens: booleans
            [B,L], or ``None`` where none is known to be padding.
        tokens: the mixer's input [B,L,D].

    Raises:
        PromptError: if the mask has another shape, other values than 0 and 1, or padding between tokens.
    """

    def __init__(self, mixer: CachedLayer, cache: Any, attention_mask: Tensor | None, tokens: Tensor) -> None:
        self.mixer, self.layer, self.kernel = mixer, mixer.layer_idx, mixer.conv_kernel_size
        self.fixed = cache if isinstance(cache, Starting) else None
        self.cache: Any = cache if self.fixed is None else None
        self.rows = len(tokens)
        self.mask = None if attention_mask is None else self._checked(attention_mask, tokens)

    @property
    def runs(self) -> Runs | None:
        """Where the runs are, if the rows are several; what came before is then that of each run."""
        return None if self.fixed is None else self.fixed.runs

    def in_runs(self, call: Callable[[PastStates, Tensor], Tensor], value: Tensor) -> Tensor:
        """What ``call(past, value)`` returns [B,L,...], by itself for each run where the rows are several.

        Args:
            call: takes what came before, and the value at the columns that come after it.
            value: of this call [B,L,...].
        """
        if not isinstance(self.fixed, StartingRuns):
            return call(self, value)
        parts = ((PastStates(self.mixer, start, None, value), value[:, s]) for s, start in self.fixed.parts)
        return self.fixed.runs.joined(call(past, own) for past, own in parts)

    def _checked(self, mask: Tensor, tokens: Tensor) -> Tensor | None:
        rows, length, _ = tokens.shape
        started = self.fixed is not None or self._columns() is not None  # the mask may cover a cache's tokens
        wrong = mask.dim() != 2 or mask.shape[1] < length or (mask.shape[1] > length and not started)
        # Before later layers a sweep may have added rows, which is right as long as no token is padding.
        if wrong or (self.layer == 0 and mask.shape[0] != rows):
            raise PromptError(
                f"attention_mask is 1 on each token and 0 on padding, of the shape {[rows, length]} of the "
                f"tokens (with a cache it may cover the tokens in it too), not {list(mask.shape)}"
            )
        mask = mask if mask.shape[1] == length else mask[:, mask.shape[1] - length :]
        # On a GPU a look at it would wait for the device.
        if mask.device.type == "cpu" and not isinstance(mask, FakeTensor):
            if _whole.holds(mask, self.layer):
                return None
            check_values(mask)
            check_gaps(mask)
        if mask.shape[0] != rows:
            raise PromptError(f"attention_mask has {mask.shape[0]} rows, and this layer is given {rows}")
        return mask != 0

    def _columns(self) -> Tensor | None:
        """The columns before this call [B,channels,K], or before each run of it, or ``None``."""
        if self.fixed is not None:
            return self.fixed.convolution(self.layer, self.rows)
        return None if self.cache is None else self.cache.get_conv_state(self.layer, state_idx=0)

    def convolution(self, x_in: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the convolution takes: this call's columns [B,L,channels], and those before [B,channels,K] or ``None``.

        The cache then holds the last K up to now.
        """
        own, before = x_in, self._columns()
        if self.cache is None:
            return next_to_the_past(x_in, self.mask, before)
        if before is not None:
            check_rows(before, self.rows)
            before = before[..., -self.kernel :].clone()  # the cache overwrites its tensors in place
        x_in, before = next_to_the_past(x_in, self.mask, before)
        if self.cache.is_recording_past(self.layer):
            self._update(own.transpose(1, 2))
            return x_in, before
        # In every decode step, where einops would take as long as the copy itself.
        columns = (x_in if self.mask is not None else x_in[:, -self.kernel :]).transpose(1, 2)  # [B,channels,l]
        if before is not None:
            columns = torch.cat((before.to(columns.dtype), columns), dim=-1)
        self.keep_columns(columns)
        return x_in, before

    def keep_columns(self, columns: Tensor) -> None:
        """Store the last K columns, of [B,channels,L] or [B,channels,K+L] that the convolution sees, edits included."""
        if self.cache is not None and not self.cache.is_recording_past(self.layer):
            self._update(last_columns(columns, self.mask, self.kernel))

    def _update(self, columns: Tensor) -> None:
        self.cache.update_conv_state(columns, self.layer, conv_kernel_size=self.kernel)

    def state(self) -> Tensor | None:
        """The cached state to start from [B,...,N], or that of each run, or ``None`` for zeros."""
        if self.fixed is not None:
            return self.fixed.state(self.layer, self.rows)
        own = self._own_state()
        return None if own is None else own.clone()

    def keep(self, h: Tensor | None) -> None:
        """Store the state after the last token of this call."""
        if self.cache is not None and h is not None:
            self.cache.update_recurrent_state(h, self.layer)

    def _own_state(self) -> Tensor | None:
        layer = None if self.cache is None else self.cache.layers[self.layer]
        return layer.recurrent_states[0] if layer is not None and layer.is_recurrent_states_initialized[0] else None


class WholeMask:
    """The last mask without padding: a run gives each of its layers the same, which is looked through once."""

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[Tensor], int] | None = None  # the mask, and the last layer that was given it

    def holds(self, mask: Tensor, layer: int) -> bool:
        """Whether a mask on the CPU is 1 everywhere. It is looked through where it, or the run, is another one."""
        last = self.last  # at once: another thread may run another model
        again = last is not None and last[0]() is mask and last[1] < layer
        if not again and not bool((mask == 1).all()):
            return False
        self.last = weakref.ref(mask), layer
        return True


_whole = WholeMask()


def check_rows(columns: Tensor, rows: int) -> None:
    """Raise `PromptError` where a call has another number of rows than the ``columns`` [B,channels,K] of its cache."""
    if len(columns) != rows:
        raise PromptError(
            f"the cache holds {len(columns)} rows, and this call has {rows}: its rows go on from those of the cache"
        )


def check_values(mask: Tensor) -> None:
    """Raise `PromptError` where a mask holds anything but 0 and 1."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise PromptError(
            f"attention_mask has the value {wrong[0].item()}, and it is 1 on tokens and 0 on padding: tokens "
            f"cannot be weighed"
        )


def check_gaps(mask: Tensor) -> None:
    """Raise `PromptError` where a mask [B,L] of zeros and ones has padding between tokens."""
    before, after = ends(mask == 0)
    real = (mask != 0).sum(-1)
    gaps = ((before + real + after != mask.shape[-1]) & (real > 0)).nonzero()[:, 0].tolist()
    if gaps:
        raise PromptError(
            f"attention_mask of row {gaps[0]} is 0 between tokens: {mask[gaps[0]].tolist()}. Padding stands "
            f"before the tokens or after them. Leave a token out of the prompt, or let the state pass it by "
            f"with mamba_trace.flow.zero_delta"
        )


# -- padding stays padding ---------------------------------------------------------------------------------


def masked(value: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """``value`` [B,L,...] with ``fill`` on padding, whatever stood there, NaN too; mask [B,L]."""
    if mask is None:
        return value
    return value.masked_fill(~mask.reshape(*mask.shape, *[1] * (value.dim() - 2)), fill)


@contextlib.contextmanager
def seen_by(conv1d: nn.Module, mask: Tensor | None, kernel: int) -> Iterator[list[Tensor]]:
    """Watch the columns that a convolution is given, edits of its input included; padding stays zero there.

    Args:
        conv1d: the module, or an adapter around it.
        mask: [B,L], or ``None``.
        kernel: how many columns of a cache come before the call's, 0 for none.

    Yields:
        A list that holds the columns [B,channels,kernel+L] once the module was called.
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
            seen[:] = seen or [columns]  # the first is the input, a later one what an adapter makes of it
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


def next_to_the_past(x_in: Tensor, mask: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x_in [B,L,channels] and the columns before it [B,channels,K], those right before the first token of each row.

    Padding that stands between them changes places with them; tokens stay where they are.
    """
    # A fake mask has no numbers, and the shapes are the same either way.
    known = mask is not None and mask.device.type == "cpu"
    if before is None or mask is None or (known and (isinstance(mask, FakeTensor) or bool(mask[:, 0].all()))):
        return x_in, before
    kernel = before.shape[-1]
    columns = moved_next_to_the_past(rearrange(before, "b e k -> b k e").to(x_in.dtype), x_in, mask)
    return columns[:, kernel:].contiguous(), rearrange(columns[:, :kernel], "b k e -> b e k").contiguous()


def moved_next_to_the_past(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """``before`` [B,K,...] and ``after`` [B,L,...] as [B,K+L,...], the left padding of each row first."""
    kernel, length = before.shape[1], after.shape[1]
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # [B,1]: to the left of the first token
    padding = padding.masked_fill(padding == length, 0)  # a row without a token keeps its order
    at = torch.arange(kernel + length, device=mask.device)
    index = torch.where(at < padding, at + kernel, torch.where(at < padding + kernel, at - padding, at))
    return torch.cat((before, after), dim=1)[torch.arange(len(mask), device=mask.device)[:, None], index]


def last_columns(columns: Tensor, mask: Tensor | None, kernel: int) -> Tensor:
    """The last ``kernel`` columns [B,channels,K] up to the last token of each row; zeros where there are fewer.

    Args:
        columns: [B,channels,n], those of the call and what came before them, with no padding between.
        mask: of the call's L columns, which are the last of ``columns`` [B,L], or ``None``.
        kernel: the width K of the convolution.
    """
    if mask is None:
        missing = kernel - columns.shape[-1]
        return F.pad(columns, (missing, 0)) if missing > 0 else columns[..., -kernel:]
    columns = F.pad(columns, (kernel, 0))
    behind = (mask.flip(-1).cumsum(-1) == 0).sum(-1)  # [B]: the padding behind the last token
    first = columns.shape[-1] - kernel - behind
    index = first[:, None] + torch.arange(kernel, device=columns.device)  # [B,K]
    return columns.gather(-1, index[:, None].expand(-1, columns.shape[1], -1))
