"""Which channels of a mixer a function acts on: by number, by head, or by how fast they forget.

In Mamba-2 the channels of a head share one delta and one A, so that they forget at one rate. Channel e is number
e % P of head e // P. Groups by decay are made of whole heads there.
"""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from torch import Tensor

from ..errors import SiteValueError
from ..scan.reference import accumulation_dtype
from ..tracing.one_run import refuse_inside_a_trace
from ..tracing.placement import parameter_of
from .model import ArgumentModel
from .prompts import prompt_tokens
from .selection import SSM, Indices, all_with, chosen_indices, layer_number

#: Channels of d_inner: all, a group of `decay_groups`, or indices.
Channels = Indices | str | None
#: Heads of a Mamba-2: all, or indices.
Heads = Indices | None

#: The thirds of a layer's channels, beginning with the channels that keep their state longest.
GROUPS = ("slow", "medium", "fast")


def mixer_sizes(model: ArgumentModel, layer: int | None = None) -> dict[str, int]:
    """The size of each axis letter that a layer's mixer fixes, and K, the width of the convolution.

    Args:
        model: the model.
        layer: one that has an SSM; the first of these if it is ``None``.

    Raises:
        UnknownSiteError: if no layer has one.
    """
    layer = all_with(model._layout, SSM)[0] if layer is None else layer
    sizes: dict[str, int] = model.layers[layer].ssm._module.sizes
    return sizes


# -- by how fast they forget -------------------------------------------------------------------------------


def decay_rate(model: ArgumentModel, layer: int, prompt: str | Tensor | None = None) -> Tensor:
    """How fast each channel of a layer forgets: the mean of -A over its states, or of -delta A over a prompt.

    A state is multiplied by exp(delta A) at each token, so -A is a rate per unit of delta. In Mamba-2 the heads
    differ in delta more than in A: give a prompt to order them by what they do. The channels of a head have
    the head's rate.

    Args:
        model: the model, inside a trace or not.
        layer: its layer; negative counts from the end.
        prompt: a string or token ids [1,L], over whose tokens -delta A is averaged; not inside a trace.

    Returns:
        [E] float32 (float64 in a float64 model), positive, without a gradient.

    Raises:
        LayerError: if there is no such layer.
        UnknownSiteError: if it has no SSM.
        PromptError: if the prompt is not one prompt.
        RuntimeError: inside a trace, with a prompt.

    Source:
        Mamba (arXiv 2312.00752), section 3.2, and Mamba-2 (arXiv 2405.21060), section 6: A_bar = exp(delta A).

    Example::

        decay_rate(model, layer=1).argmin()  # the channel that remembers longest
        decay_rate(model, layer=1, prompt=prompt)  # of each channel, as fast as the tokens of this prompt make it
    """
    layer = layer_number(model, layer, SSM)
    if prompt is not None:
        refuse_inside_a_trace(model, "decay_rate with a prompt")
    tokens = None if prompt is None else prompt_tokens(model, "prompt", prompt)
    model.dispatch()
    if tokens is None:
        A_log = parameter_of(model.layers[layer].ssm._module, "A_log")
        rate = of_states(A_log.to(accumulation_dtype(A_log)).exp())
    else:
        rate = rate_over(model, layer, tokens)
    return rate.repeat_interleave(mixer_sizes(model, layer).get("P", 1))


def rate_over(model: ArgumentModel, layer: int, tokens: Tensor) -> Tensor:
    """The mean of -delta A over token ids [1,L]: [E], or [H] in Mamba-2."""
    ssm = model.layers[layer].ssm
    with torch.no_grad(), model.trace(tokens, use_cache=False) as tracer:
        delta = ssm.delta.output[0].mean(0)  # [E] or [H]
        rate = nnsight.save(delta * of_states(-ssm.A.output))
        tracer.stop()
    return rate


def of_states(A: Tensor) -> Tensor:
    """The mean over the states of a channel [E,N] -> [E]; in Mamba-2 [H] has one number for a head's states."""
    return A.mean(-1) if A.dim() == 2 else A


def decay_groups(model: ArgumentModel, layer: int, prompt: str | Tensor | None = None) -> dict[str, Tensor]:
    """The channels of a layer in thirds by `decay_rate`; in Mamba-2 thirds of the heads, with all their channels.

    Args:
        model, layer, prompt: as for `decay_rate`.

    Returns:
        ``"slow"``, ``"medium"`` and ``"fast"``: channel indices int64, ascending, each channel in one group.

    Raises:
        LayerError, UnknownSiteError, PromptError, RuntimeError: as `decay_rate`.

    Example::

        slow = decay_groups(model, layer=1)["slow"]
    """
    rate = decay_rate(model, layer, prompt)
    P = mixer_sizes(model, layer_number(model, layer)).get("P", 1)
    order = rate[::P].argsort(stable=True)  # of heads, or channels
    thirds = zip(GROUPS, order.tensor_split(3), strict=True)
    within = torch.arange(P, device=order.device)
    return {name: (part.sort().values[:, None] * P + within).flatten() for name, part in thirds}


# -- as arguments ------------------------------------------------------------------------------------------


def check_channels(model: ArgumentModel, channels: Channels, heads: Heads = None, layer: int | None = None) -> None:
    """Refuse channels and heads that a layer does not have, as in `mixer_sizes`. Raises `SiteValueError`."""
    if channels is not None and heads is not None:
        raise SiteValueError(f"channels={channels!r} and heads={heads!r}: both choose channels; give one of them")
    if not isinstance(channels, str):
        channel_flags(model, channels, heads, layer)
        return
    if channels not in GROUPS:
        raise SiteValueError(
            f"channels={channels!r}: the groups by decay are {', '.join(map(repr, GROUPS))}; other channels "
            f"are given as indices or a boolean mask [E]"
        )
    sizes = mixer_sizes(model, layer)
    units, count = ("heads", sizes["H"]) if "H" in sizes else ("channels", sizes["E"])
    if GROUPS.index(channels) >= count:
        raise SiteValueError(f"channels={channels!r}: a layer of {count} {units} has no such third")


def channel_mask(model: ArgumentModel, layer: int, channels: Channels, heads: Heads = None) -> Tensor:
    """Channels of a layer, already accepted by `check_channels`, as a boolean mask [E]."""
    if not isinstance(channels, str):
        return torch.tensor(channel_flags(model, channels, heads, layer), device="cpu")
    index = decay_groups(model, layer)[channels]
    mask = torch.zeros(mixer_sizes(model, layer)["E"], dtype=torch.bool, device=index.device)
    return mask.index_fill(0, index, True)


def channel_flags(model: ArgumentModel, channels: Any, heads: Any, layer: int | None = None) -> list[bool]:
    """For each channel, whether it is chosen; no tensor, since under fake tensors there are no numbers."""
    sizes = mixer_sizes(model, layer)
    width, P = sizes["E"], sizes.get("P", 1)
    if heads is not None:
        of_heads = set(head_numbers(heads, sizes))
        return [channel // P in of_heads for channel in range(width)]
    if channels is None:
        return [True] * width
    counted = f"Channels count along E (d_inner), of size {width}"
    chosen = set(chosen_indices(channels, width, lambda reason: SiteValueError(f"channels={reason}. {counted}")))
    return [channel in chosen for channel in range(width)]


def head_numbers(heads: Indices, sizes: dict[str, int], asked: str = "") -> list[int]:
    """Heads as numbers from 0, in the order given.

    Args:
        heads: an int, a slice, several ints or a boolean mask [H].
        sizes: those of the mixer.
        asked: what the message begins with.

    Raises:
        SiteValueError: if the mixer has no such heads, or none at all.
    """
    if "H" not in sizes:
        raise SiteValueError(
            f"{asked}heads={heads!r}: a mixer of Mamba-1 or Falcon-Mamba has 0 heads, and a delta for each channel: "
            f"give channels=, which count along E (d_inner), of size {sizes['E']}"
        )
    counted = f"Heads count along H (heads), of size {sizes['H']}, each of {sizes['P']} channels"
    return chosen_indices(heads, sizes["H"], lambda reason: SiteValueError(f"{asked}heads={reason}. {counted}"))


def check_whole_heads(model: ArgumentModel, channels: Channels, layer: int | None = None) -> None:
    """Refuse channels that are part of a head, whose delta is that of all of it. Raises `SiteValueError`."""
    P = mixer_sizes(model, layer).get("P", 1)
    if channels is None or isinstance(channels, str):
        return
    flags = channel_flags(model, channels, None, layer)
    for start in range(0, len(flags), P):
        if len(set(flags[start : start + P])) > 1:
            raise SiteValueError(
                f"channels={channels!r}: the channels of a head share one delta, and these have some of head "
                f"{start // P}, which is channels {start} to {start + P - 1}: give heads=, or whole heads"
            )
