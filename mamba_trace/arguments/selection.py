"""Which layers and tokens a function acts on, checked before it acts; `channels` does the same for channels.

Functions that edit a run take positions as an int, a slice or several ints, and layers as numbers. They are
checked here against the model and the forward call as soon as both are known, so that a function never acts on
something that does not exist.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import LayerError, MambaTraceError, PositionError, SiteOrderError, UnknownSiteError
from ..modeling.past import ends
from ..names import layer_index
from ..names.layouts import absent, part_of, site_in
from ..sites import BY_NAME, STATE, Layout, Site
from ..tracing import expect
from ..tracing.frames import warn_user
from .model import ArgumentModel

#: Indices: one, a slice, several, or a boolean mask of all. Negative ones count from the end.
Indices = int | slice | Sequence[int] | Sequence[bool] | Tensor
#: Tokens of one forward call.
Positions = Indices
#: Layers: all, one, or several; negative counts from the end.
Layers = None | int | Sequence[int]
#: What stands for a layer's SSM where a function asks for layers that have one.
SSM = BY_NAME[STATE]


# -- layers --------------------------------------------------------------------------------------


def layer_numbers(model: ArgumentModel, layers: Layers, site: Site | None = None) -> list[int]:
    """The layers in ascending order, each once.

    Args:
        model: the model.
        layers: what the user gave; ``None`` for all that have the site.
        site: what the layers must have, if anything; `SSM` for layers with an SSM.

    Raises:
        LayerError: if the model has no such layers.
        UnknownSiteError: if one of them lacks the site, or all do.
    """
    n_layers, asked = len(model.layers), f"layers={layers!r}"
    if layers is None:
        return all_with(model._layout, site) if site is not None else list(range(n_layers))
    several = "one integer or several; None is all"
    numbers = {layer_index(layer, n_layers, asked, named_by=several) for layer in _listed(layers)}
    if not numbers:
        raise LayerError(f"{asked} names no layer; this model has layers 0 to {n_layers - 1}")
    return [checked_layer(model._layout, number, site, asked) for number in sorted(numbers)]


def layer_number(model: ArgumentModel, layer: int, site: Site | None = None) -> int:
    """One layer, counted from 0, that has the site if one is given. Raises as `layer_numbers`."""
    plain, asked = layer.tolist() if hasattr(layer, "tolist") else layer, f"layer={layer!r}"
    number = layer_index(plain, len(model.layers), asked, named_by="one integer")
    return checked_layer(model._layout, number, site, asked)


def checked_layer(layout: Layout, layer: int, site: Site | None, asked: str) -> int:
    """``layer`` if it has the site. Raises `UnknownSiteError`, quoting what was ``asked``."""
    if site is not None and site_in(layout, site, layer) is None:
        raise absent(layout, site, layer, asked)
    return layer


def layers_with(layout: Layout, site: Site) -> list[int]:
    """The layers that have a site, also where it is another site's value, as `ssm_out` may be `out_proj`'s."""
    return [layer for layer in range(len(layout.layers)) if site_in(layout, site, layer) is not None]


def all_with(layout: Layout, site: Site) -> list[int]:
    """`layers_with`. Raises `UnknownSiteError` if there are none."""
    found = layers_with(layout, site)
    if not found:
        kinds = " and ".join(dict.fromkeys(kind.name for kind in layout.layers))
        raise UnknownSiteError(f"no layer of this model has {part_of(site)!r}: its layers are {kinds}")
    return found


# -- positions ---------------------------------------------------------------------------------------------


def position_numbers(role: str, positions: Positions, length: int) -> list[int]:
    """The positions of a forward call of ``length`` tokens, as `chosen_indices` returns them.

    Args:
        role: the name of the argument, for messages.
        positions: an int, a slice, several ints or a boolean mask [L].
        length: L.

    Raises:
        PositionError: if one is not an integer or outside the call, or if there is none.
    """
    counted = f"Positions count the tokens of one forward call, and this one has {length}"
    return chosen_indices(positions, length, lambda reason: PositionError(f"{role}={reason}. {counted}"))


def call_inputs(*envoys: Any) -> tuple[int, Tensor | None] | None:
    """The length L and the attention mask [B,L] of the forward call, inside a trace.

    Args:
        envoys: the model or blocks. The inputs of the first that the run has not passed are read.

    Returns:
        ``(L, mask or None)``, or ``None`` if the run has passed all of them.
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
            mask = mask_in(inputs)
            return first.shape[1], None if mask is None else mask[:, -first.shape[1] :]
    return None


def mask_in(inputs: Mapping[str, Any]) -> Tensor | None:
    """The mask [B,S] of tokens among the arguments of a model or a block; attention's own masks are of pairs."""
    masks = [inputs.get("mamba_attention_mask"), inputs.get("attention_mask")]
    masks += [mask.get("linear_attention") for mask in masks if isinstance(mask, Mapping)]
    return next((mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2), None)


def check_padding(role: str, positions: Positions, mask: Tensor | None) -> None:
    """Warn, at the user's line, about positions that are padding where tokens may be meant; mask [B,L].

    Such positions count from the padded end of a prompt, or reach further from the other end than a row has
    tokens.

    Raises:
        PositionError: for a position that is padding in every row.
    """
    if mask is None or isinstance(mask, FakeTensor) or mask.is_meta:
        return
    length = mask.shape[-1]
    padding = zip(*(side.tolist() for side in ends(mask == 0)), strict=True)
    rows = [(left, right) for left, right in padding if left < length]
    tokens = [length - left - right for left, right in rows]
    for side, offsets in (("left", [left for left, _ in rows]), ("right", [right for _, right in rows])):
        if not any(offsets):
            continue
        told = str(offsets[0]) if len(set(offsets)) == 1 else str(offsets)
        warning = _misread(
            side, positions, length, tokens, f"{role}={positions!r}: this invoke is {side}-padded by {told}"
        )
        if warning is not None:
            warn_user(warning)
            return


def _misread(side: str, positions: Positions, length: int, tokens: list[int], padded: str) -> str | None:
    """What to warn about ``positions`` in rows of so many ``tokens``, padded on ``side``; or ``None``."""
    counts_from, tokens_needed = _reach(positions, length)
    needed = tokens_needed["end" if side == "left" else "start"]
    if needed > max(tokens):
        raise PositionError(f"{padded}, and its longest prompt has {max(tokens)} tokens")
    if side == "left" and "start" in counts_from:
        return (
            f"{padded}, so column p is not its token p. Add the padding to the position, or count from the "
            f"end with a negative one"
        )
    if side == "right" and "end" in counts_from:
        return (
            f"{padded}, so column -p is not its token p from the end. Subtract the padding from the "
            f"position, or count from the start"
        )
    if needed > min(tokens):
        return (
            f"{padded}, and where a prompt has fewer than {needed} tokens this is padding. The shortest has "
            f"{min(tokens)}"
        )
    return None


def _reach(positions: Positions, length: int) -> tuple[set[str], dict[str, int]]:
    """Where positions count from ("start", "end"), and how many tokens a prompt needs counted from each."""
    if isinstance(positions, slice):
        bounds = [bound for bound in (positions.start or None, positions.stop) if bound is not None]
        counted = {"start" if bound >= 0 else "end" for bound in bounds}
        # A slice is clipped, as Python's are, so it is enough that one of its tokens is there.
        chosen = range(length)[positions]
        needed = {
            "end": 0 if "start" in counted else length - max(chosen),
            "start": 0 if "end" in counted else min(chosen) + 1,
        }
        return counted, needed
    listed = _listed(positions)
    if listed and all(isinstance(item, bool) for item in listed):
        listed = [at for at, chosen in enumerate(listed) if chosen]
    counted = {"start" if position >= 0 else "end" for position in listed}
    return counted, {"end": -min(listed), "start": max(listed) + 1}


# -- indices -----------------------------------------------------------------------------------------------


def chosen_indices(asked: Indices, size: int, error: Callable[[str], MambaTraceError]) -> list[int]:
    """The chosen indices along an axis, counted from 0, in the order given and each once.

    Args:
        asked: an integer, a slice, several integers or a boolean mask; lists, tensors and arrays alike.
        size: the size of the axis.
        error: makes the exception to raise from a text that quotes what was asked and says what is wrong.
    """
    several = list(range(size)[asked]) if isinstance(asked, slice) else _listed(asked)
    wanted = f"{asked!r}: give an integer, a slice, several integers or a boolean mask of {size}"
    flags = [isinstance(item, bool) for item in several]
    if any(flags) and not all(flags):
        raise error(wanted)
    if any(flags):
        if len(several) != size:
            raise error(f"a boolean mask of {len(several)}, but there are {size}")
        several = [at for at, item in enumerate(several) if item]
    try:
        numbers = [operator.index(item) for item in several]
    except TypeError as wrong:
        raise error(wanted) from wrong
    if not numbers:
        raise error(f"{asked!r}, which is none of the {size} that there are")
    for number in numbers:
        if not -size <= number < size:
            raise error(f"{number}, but there are {size}, from {-size} to {size - 1}")
    return list(dict.fromkeys(number % size for number in numbers))


def _listed(asked: Any) -> list[Any]:
    plain = asked.tolist() if hasattr(asked, "tolist") else asked
    return list(plain) if isinstance(plain, Iterable) else [plain]
