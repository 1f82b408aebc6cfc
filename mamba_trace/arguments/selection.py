"""Which layers, tokens and channels a function is to act on, checked before it acts.

Functions that edit a run take positions as an int, a slice or several ints, channels as indices, a mask or a
group by how fast they forget, and layers as numbers. What they are given is checked here against the model
and the forward call, as early as these are known, so that nothing is ever cut that does not exist.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import LayerError, MambaTraceError, PositionError, SiteValueError
from ..modeling.past import ends
from ..scan.reference import accumulation_dtype
from ..tracing import SiteOrderError, expect
from ..tracing.frames import users_frame

if TYPE_CHECKING:
    from ..model import MambaTrace

#: Indices: one, a slice, several, or a boolean mask of all. Negative ones count from the end.
Indices = int | slice | Sequence[int] | Sequence[bool] | Tensor
#: Tokens of one forward call.
Positions = Indices
#: Channels of d_inner: all, a group of `decay_groups`, or indices.
Channels = Indices | str | None
#: Layers: all, one, or several; negative counts from the end.
Layers = None | int | Sequence[int]

#: The thirds of a layer's channels, beginning with those that keep their state longest.
GROUPS = ("slow", "medium", "fast")


# -- layers ------------------------------------------------------------------------------------------------


def layer_numbers(model: MambaTrace, layers: Layers) -> list[int]:
    """The layers in ascending order, each once. Raises `LayerError`."""
    n_layers = len(model.layers)
    if layers is None:
        return list(range(n_layers))
    given = _listed(layers)
    if not all(hasattr(layer, "__index__") and not isinstance(layer, bool) for layer in given):
        raise LayerError(
            f"layers={layers!r}: give one integer or several, from 0 to {n_layers - 1}; None is all"
        )
    for layer in given:
        if not -n_layers <= layer < n_layers:
            raise LayerError(f"layers={layers!r}: this model has layers 0 to {n_layers - 1}, and no {layer}")
    if not given:
        raise LayerError(f"layers={layers!r} names no layer; this model has layers 0 to {n_layers - 1}")
    return sorted({layer % n_layers for layer in given})


def layer_number(model: MambaTrace, layer: int) -> int:
    """One layer, counted from 0. Raises `LayerError`."""
    n_layers = len(model.layers)
    plain: Any = layer.tolist() if hasattr(layer, "tolist") else layer
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise LayerError(f"layer={layer!r}: give one layer, an integer from 0 to {n_layers - 1}")
    return layer_numbers(model, layer)[0]


# -- positions ---------------------------------------------------------------------------------------------


def position_numbers(role: str, positions: Positions, length: int) -> list[int]:
    """The positions of a call of ``length``, as `chosen_indices`.

    Args:
        role: what messages call them.
        positions: an int, a slice, several ints or a boolean mask [L].
        length: L.

    Raises:
        PositionError: for one that the call does not have or that is no integer, or if there is none.
    """
    counted = f"Positions count the tokens of one forward call, and this one has {length}"
    return chosen_indices(positions, length, lambda reason: PositionError(f"{role}={reason}. {counted}"))


def call_inputs(*envoys: Any) -> tuple[int, Tensor | None] | None:
    """The length L and the attention mask [B,L] of the forward call, inside a trace.

    Args:
        envoys: the model or blocks, of whose inputs the first that can still be served are read.

    Returns:
        ``(L, mask or None)``, or ``None`` if the run has gone past all of them.
    """
    for envoy in envoys:
        try:
            expect(f"{envoy.path}.input")
        except SiteOrderError:
            continue
        args, inputs = envoy.inputs
        named = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
        first = next((value for value in named if value is not None), args[0] if args else None)
        if isinstance(first, Tensor):
            mask = inputs.get("attention_mask")
            return first.shape[1], None if mask is None else mask[:, -first.shape[1] :]
    return None


def check_padding(role: str, positions: Positions, mask: Tensor | None) -> None:
    """Warn, at the user's line, of positions that are padding where tokens may be meant; mask [B,L].

    These are columns of a left-padded prompt counted from 0, of a right-padded one counted from the end, and
    of either those that are further from where it is counted than a row has tokens.

    Raises:
        PositionError: for a position that is padding in every row.
    """
    if mask is None or isinstance(mask, FakeTensor) or mask.is_meta:
        return
    length = mask.shape[-1]
    rows = [
        (left, right)
        for left, right in zip(*(side.tolist() for side in ends(mask == 0)), strict=True)
        if left < length
    ]
    message = None
    for side, offsets in (("left", [left for left, _ in rows]), ("right", [right for _, right in rows])):
        if any(offsets):
            tokens = [length - left - right for left, right in rows]
            told = str(offsets[0]) if len(set(offsets)) == 1 else str(offsets)
            padded = f"{role}={positions!r}: this invoke is {side}-padded by {told}"
            message = message or _told(padded, side, _reach(positions, length), tokens)
    if message is not None:
        frame = users_frame(sys._getframe())
        warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def _told(padded: str, side: str, reach: Reach, tokens: list[int]) -> str | None:
    # What to warn of, for one side of padding.
    ends_here = reach.back if side == "left" else reach.forth
    if ends_here > max(tokens):
        raise PositionError(f"{padded}, and its longest prompt has {max(tokens)} tokens")
    if side == "left" and reach.from_start:
        return (
            f"{padded}, so column p is not its token p. Add the padding to the position, or count from the "
            f"end with a negative one"
        )
    if side == "right" and reach.from_end:
        return (
            f"{padded}, so column -p is not its token p from the end. Subtract the padding from the "
            f"position, or count from the start"
        )
    if ends_here > min(tokens):
        return (
            f"{padded}, and where a prompt has fewer than {ends_here} tokens this is padding. The shortest "
            f"has {min(tokens)}"
        )
    return None


class Reach(NamedTuple):
    """How positions are counted.

    Attributes:
        from_start, from_end: whether any is counted from 0, or from the end.
        back, forth: how many tokens a prompt must have to have all of them that are counted from the end, and
            those that are counted from the start.
    """

    from_start: bool
    from_end: bool
    back: int
    forth: int


def _reach(positions: Positions, length: int) -> Reach:
    if not isinstance(positions, slice):
        listed = _listed(positions)
        if listed and all(isinstance(one, bool) for one in listed):
            listed = [at for at, chosen in enumerate(listed) if chosen]
        return Reach(
            any(one >= 0 for one in listed), any(one < 0 for one in listed), -min(listed), max(listed) + 1
        )
    bounds = (positions.start or None, positions.stop)
    from_start = any(bound is not None and bound >= 0 for bound in bounds)
    from_end = any(bound is not None and bound < 0 for bound in bounds)
    # A slice is clipped, as Python's are: that one token of it is there is enough.
    chosen = range(length)[positions]
    back = 0 if from_start else length - max(chosen)
    forth = 0 if from_end else min(chosen) + 1
    return Reach(from_start, from_end, back, forth)


# -- channels ----------------------------------------------------------------------------------------------


def decay_rate(model: MambaTrace, layer: int) -> Tensor:
    """How fast each channel of a layer forgets: the mean over its states of -A.

    A state is multiplied by exp(delta A) at each token, so this is per unit of delta.

    Args:
        model: the model, inside a trace or not.
        layer: its layer; negative counts from the end.

    Returns:
        [E] float32 (float64 in a float64 model), positive, without a gradient.

    Raises:
        LayerError: if there is no such layer.

    Source:
        Mamba (arXiv 2312.00752), section 3.2: A_bar = exp(delta A).

    Example::

        decay_rate(model, layer=1).argmin()  # the channel that remembers longest
    """
    layer = layer_number(model, layer)
    model.dispatch()
    mixer = model.layers[layer].ssm._module
    A_log = mixer.A_log.detach()  # [E,N]
    # Where weights are offloaded. Not if they are at hand since the mixer is running: to fetch them then
    # would take them away from it.
    if A_log.is_meta:
        with align_module_device(mixer):
            A_log = mixer.A_log.detach()
    return A_log.to(accumulation_dtype(A_log)).exp().mean(-1)


def decay_groups(model: MambaTrace, layer: int) -> dict[str, Tensor]:
    """The channels of a layer in thirds by `decay_rate`.

    Args:
        model, layer: as for `decay_rate`.

    Returns:
        ``"slow"``, ``"medium"`` and ``"fast"``: channel indices int64, ascending, each channel in one group.

    Raises:
        LayerError: if there is no such layer.

    Example::

        slow = decay_groups(model, layer=1)["slow"]
    """
    order = decay_rate(model, layer).argsort(stable=True)
    return {name: part.sort().values for name, part in zip(GROUPS, order.tensor_split(3), strict=True)}


def check_channels(model: MambaTrace, channels: Channels) -> None:
    """Refuse what are no channels of this model. Raises `SiteValueError`."""
    if not isinstance(channels, str):
        _channel_flags(model, channels)
    elif channels not in GROUPS:
        raise SiteValueError(
            f"channels={channels!r}: the groups by decay are {', '.join(map(repr, GROUPS))}; other channels "
            f"are given as indices or a boolean mask [E]"
        )


def channel_mask(model: MambaTrace, layer: int, channels: Channels) -> Tensor:
    """Channels of a layer, which `check_channels` let pass, as a boolean mask [E]."""
    if not isinstance(channels, str):
        return torch.tensor(_channel_flags(model, channels), device="cpu")
    index = decay_groups(model, layer)[channels]
    mask = torch.zeros(model.config.intermediate_size, dtype=torch.bool, device=index.device)
    return mask.index_fill(0, index, True)


def _channel_flags(model: MambaTrace, channels: Any) -> list[bool]:
    # For each channel, whether it is one of them. Numbers and not tensors: under fake tensors there are none.
    width = model.config.intermediate_size
    if channels is None:
        return [True] * width
    counted = f"Channels count along E (d_inner), of size {width}"
    found = chosen_indices(channels, width, lambda reason: SiteValueError(f"channels={reason}. {counted}"))
    chosen = set(found)
    return [channel in chosen for channel in range(width)]


# -- indices -----------------------------------------------------------------------------------------------


def chosen_indices(asked: Indices, size: int, error: Callable[[str], MambaTraceError]) -> list[int]:
    """The indices along an axis that were asked for, from 0, in the order given and none twice.

    Args:
        asked: an integer, a slice, several integers or a boolean mask; lists, tensors and arrays alike.
        size: how many there are.
        error: makes the exception that is raised, from what was asked and what is wrong with it.
    """
    several = list(range(size)[asked]) if isinstance(asked, slice) else _listed(asked)
    wanted = f"{asked!r}: give an integer, a slice, several integers or a boolean mask of {size}"
    flags = [isinstance(one, bool) for one in several]
    if any(flags) and not all(flags):
        raise error(wanted)
    if any(flags):
        if len(several) != size:
            raise error(f"a boolean mask of {len(several)}, but there are {size}")
        several = [at for at, one in enumerate(several) if one]
    try:
        found = [operator.index(one) for one in several]
    except TypeError as wrong:
        raise error(wanted) from wrong
    if not found:
        raise error(f"{asked!r}, which is none of the {size} that there are")
    for one in found:
        if not -size <= one < size:
            raise error(f"{one}, but there are {size}, from {-size} to {size - 1}")
    return list(dict.fromkeys(one % size for one in found))


def _listed(asked: Any) -> list[Any]:
    plain = asked.tolist() if hasattr(asked, "tolist") else asked
    return list(plain) if isinstance(plain, Iterable) else [plain]
