"""Ablation and steering: what a model does without a part of itself, or with a direction added to it.

To ask whether a part matters, set it to zero, to its mean over other prompts, or to its value in another run.
To ask whether a direction means something, add it. Each is an edit of one site that is easy to get wrong
without noticing: positions and channels are an outer product, some sites have no positions, and PyTorch
broadcasts a vector along whatever axis is last. `ablate` and `steer` make the edit inside a trace and refuse
what does not fit the site. They work like any other edit: in every invoke, at every step of ``generate`` and
under ``model.edit``. `means.mean_activation` computes the means for mean ablation.

Source: zero, mean and resample ablation as in Wang et al. (arXiv 2211.00593), section 2; steering by adding a
direction as in Turner et al. (arXiv 2308.10248).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .arguments.channels import GROUPS, Heads, head_numbers
from .arguments.prompts import describe
from .arguments.selection import Indices, check_padding, chosen_indices
from .errors import PositionError, SiteValueError
from .names import public_path
from .sites import AXES, PUBLIC_PART, describe_axes
from .tracing import mask_of_call, need_a_trace
from .tracing.envoys import PositionEnvoy, SiteEnvoy

__all__ = ["ablate", "steer"]

#: The axis of channels is the first of these that a site has, if it has no heads of an SSM.
CHANNEL_AXES = "EDRNVWX"
#: The axis of heads is the first of these that a site has: of an SSM, of queries, or of keys and values.
HEAD_AXES = "HQU"


def ablate(
    place: Any,
    value: float | Tensor = 0.0,
    *,
    positions: Indices | None = None,
    channels: Indices | None = None,
    heads: Heads = None,
) -> None:
    """Replace a site, at some positions and channels, by zero, a mean, or its value in another run.

    Call it inside a trace, where the place would be edited by hand.

    Args:
        place: a site, ``model.layers[3].ssm.y``, ``model.layers[1].ssm.h[5]`` or ``model.hook("...")``. An
            edit of ``h[p]`` changes all later states; an edit of the whole ``h`` only changes ``y`` there.
        value: a number, or a floating tensor that broadcasts to the site's shape, from the last axis as in
            PyTorch: a mean [E] from `means.mean_activation`, or the same site of another run [B,L,E]
            (resample ablation). Only the part at these positions and channels is used.
        positions: an integer, a slice, several integers or a boolean mask [L]; ``None`` for all. They count
            the tokens of this forward call; a decode step of ``generate`` has one. In a prompt padded on the
            left, positions from 0 on count the padding; negative ones are the same token in every row.
        channels: in the same forms, along the axis E of the site, or D, R, N, V, W (a number of each head of
            attention) or X (an expert of a router) if it has no E. Of a state they take all n.
            `flow.decay_groups` has the slow and the fast channels of a layer. In a state of Mamba-2 [B,H,P,N]
            channel e is number e % P of head e // P; sites with one number for a head, such as delta, and
            attention's pattern have no channels.
        heads: of Mamba-2 or of attention, in place of channels and in the same forms: along the axis H of the
            site, Q (query heads, also in ``z`` and ``pattern``) or U (heads of keys and values), or all channels of
            these heads along E.

    Raises:
        SiteValueError: if ``place`` is not a site, ``value`` does not broadcast, there is no such channel or
            head, or outside of a trace.
        PositionError: if there is no such position, or the site has no positions (as ``h[p]``).
        SiteOrderError: if the run has gone past this site.

    Example::

        from mamba_trace.interventions import ablate
        from mamba_trace.means import mean_activation

        means = mean_activation(model, [prompt, source], "y")
        with model.trace(source):
            other = model.layers[2].ssm.y.output.save()  # [B,L,E]
        with model.trace(prompt):
            ablate(model.layers[0].ssm.y, positions=[3, 10], channels=slice(0, 64))
            ablate(model.layers[1].ssm.h[10])
            ablate(model.layers[1].ssm.y, means[1])
            ablate(model.layers[2].ssm.y, other, positions=-1)  # in a hybrid also layers[l].attn.z, heads=1
            logits = model.lm_head.output.save()
    """
    target = Target.of(place, "ablate")
    need_a_trace("ablate")
    target.check_value(value)
    target.check_part(channels, heads)
    current = place.output
    index = target.index(current, positions, channels, heads)
    if isinstance(value, Tensor):
        current[index] = target.broadcast(value, current)[index]
    else:
        current[index] = float(value)


def steer(
    place: Any,
    direction: Tensor,
    scale: float | Tensor = 1.0,
    *,
    positions: Indices | None = None,
    heads: Heads = None,
) -> None:
    """Add a direction to a site, at every position or at some.

    Call it inside a trace. In ``generate`` a line of a trace acts on the first forward call, which reads the
    prompt; under ``tracer.iter`` it acts at every step, on the prompt and on each new token. If you know the
    number of steps, give it: lines after an open ``tracer.iter[:]`` do not run, and nnsight warns of that. To
    steer a state, take ``h[-1]``: what is added there is carried on to later states.

    Args:
        place: as in `ablate`.
        direction: a floating tensor of the site's axes without B and L: [D] for the residual stream, [E] for
            ``ssm.y``, [E,N] for ``ssm.h[p]``, in Mamba-2 [H,P,N].
        scale: its factor: a number, or a tensor with one element.
        positions, heads: as in `ablate`. Only the part of the direction in these heads is added.

    Raises:
        SiteValueError: if ``place`` is not a site, the direction has another shape, ``scale`` is not one
            number, there is no such head, or outside of a trace.
        PositionError: if there is no such position, or the site has no positions (as ``h[p]``).
        SiteOrderError: if the run has gone past this site.

    Example::

        direction = model.tokens_to_residual_directions(" Emma")  # [D]
        with model.generate(prompt, max_new_tokens=5, min_new_tokens=5) as tracer:
            for step in tracer.iter[:5]:
                steer(model.layers[3].resid_post, direction, scale=4.0)
            ids = tracer.result.save()  # [B,L+5]

        with model.edit() as (tracer, steered):
            for step in tracer.iter[:]:
                steer(steered.layers[3].resid_post, direction, scale=4.0)
        ids = steered.generate(prompt, max_new_tokens=5)
    """
    target = Target.of(place, "steer")
    need_a_trace("steer")
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise SiteValueError(f"{target}: a direction is a floating tensor, not {describe(direction)}")
    target.check_scale(scale)
    target.check_part(None, heads)
    current = place.output
    target.check_direction(direction, current.shape)
    index = target.index(current, positions, None, heads)
    current[index] = current[index] + (scale * direction).to(current).expand(current.shape)[index]


@dataclass(frozen=True)
class Target:
    """The site that an intervention edits.

    Attributes:
        path: as users write it.
        axes: of its value.
        sizes: the sizes that its own mixer, attention or router fixes; empty for a site of a block or of the model.
    """

    path: str
    axes: str
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Any, verb: str) -> Target:
        """The target of a user's ``place``. Raises `SiteValueError` if that is not a site."""
        if isinstance(place, (PositionEnvoy, SiteEnvoy)):
            site = place._site if isinstance(place, PositionEnvoy) else place
            part = site.parent._module if site.site.scope in PUBLIC_PART else None
            return cls(public_path(place.path), place._axes, getattr(part, "sizes", {}))
        path = getattr(place, "path", None)
        named = describe(place) if path is None else public_path(path)
        raise SiteValueError(
            f"{verb} takes a site, such as model.layers[3].ssm.y or model.layers[1].ssm.h[5], and not its "
            f"output; this is {named}. `mamba-trace sites` lists them"
        )

    def __str__(self) -> str:
        return f"{self.path} {describe_axes(self.axes)}"

    def check_value(self, value: Any) -> None:
        """Raise a `SiteValueError` unless a value is a number or a floating tensor."""
        if isinstance(value, Real) and not isinstance(value, bool):
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            hint = "; take the mean of one layer, means[layer]" if isinstance(value, dict) else ""
            raise SiteValueError(f"{self} is ablated to a number or a floating tensor, not {describe(value)}{hint}")

    def broadcast(self, value: Tensor, current: Tensor) -> Tensor:
        """``value`` in the shape, dtype and place of ``current``. Raises `SiteValueError`."""
        fits = len(value.shape) <= len(current.shape) and all(
            given in (1, size) for given, size in zip(value.shape[::-1], current.shape[::-1], strict=False)
        )
        if not fits:
            raise SiteValueError(
                f"{self} has shape {tuple(current.shape)} here, and {tuple(value.shape)} does not broadcast "
                f"to it: axes are matched from the last, and each is of the same size or 1"
            )
        return value.to(current).expand(current.shape)

    def check_scale(self, scale: Any) -> None:
        """Raise a `SiteValueError` unless a scale is a number, or a tensor with one element."""
        if isinstance(scale, Tensor):
            fits, given = scale.shape in ((), (1,)) and scale.dtype != torch.bool, describe(scale)
        else:
            fits, given = isinstance(scale, Real) and not isinstance(scale, bool), repr(scale)
        if not fits:
            raise SiteValueError(f"{self}: scale= is one number, the factor of the direction, not {given}")

    def check_direction(self, direction: Tensor, shape: Sequence[int]) -> None:
        """Raise a `SiteValueError` unless a direction has the axes of the site but B and L."""
        kept = "".join(axis for axis in self.axes if axis not in "BL")
        wanted = tuple(size for axis, size in zip(self.axes, shape, strict=True) if axis in kept)
        if tuple(direction.shape) != wanted:
            raise SiteValueError(
                f"{self} is steered by a direction of shape {wanted} {describe_axes(kept)}, not "
                f"{tuple(direction.shape)}. The same direction is added in every row and at every position"
            )

    def check_part(self, channels: Indices | None, heads: Heads) -> None:
        """Raise a `SiteValueError` for channels or heads of a site that has none."""
        if channels is not None and heads is not None:
            raise SiteValueError(f"{self}: channels={channels!r} and heads={heads!r}: give one of them")
        if channels is not None and "H" in self.axes and "P" not in self.axes:
            raise SiteValueError(
                f"{self}: channels={channels!r}: the {self.sizes['P']} channels of a head share this value: give "
                f"heads=, of which there are {self.sizes['H']}"
            )
        if channels is not None and not set(CHANNEL_AXES + "H") & set(self.axes):
            raise SiteValueError(f"{self}: channels={channels!r}: this site has no channels: give heads=")
        if heads is None:
            return
        if "E" in self.sizes:
            head_numbers(heads, self.sizes, f"{self}: ")
        has_heads = set(HEAD_AXES) & set(self.axes) or "E" in self.axes
        if not self.sizes or not has_heads:
            raise SiteValueError(f"{self}: heads={heads!r}: this site has no axis of heads or of their channels")
        self.of_heads(heads)

    def index(
        self, current: Tensor, positions: Indices | None, channels: Indices | None, heads: Heads
    ) -> tuple[Any, ...]:
        """The index of positions, channels or heads or their outer product in the site's value ``current``.

        Raises:
            PositionError, SiteValueError: if there are no such positions, channels or heads.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        if positions is not None:
            if "L" not in self.axes:
                raise PositionError(f"{self} has no axis of positions: leave positions= out")
            axis = self.axes.index("L")
            length = current.shape[axis]
            chosen = chosen_indices(positions, length, self.no_position)
            check_padding("positions", positions, mask_of_call(length))
            index[axis] = torch.tensor(chosen, dtype=torch.long, device=current.device)  # [l]
        if channels is not None or heads is not None:
            part = self.of_heads(heads) if heads is not None else self.of_channels(channels, current.shape)
            for letter, numbers in part.items():
                index[self.axes.index(letter)] = torch.tensor(numbers, dtype=torch.long, device=current.device)  # [C]
            if positions is not None:
                index[self.axes.index("L")].unsqueeze_(-1)  # [l,1]
        return tuple(index)

    def of_heads(self, heads: Indices) -> dict[str, list[int]]:
        """The indices of heads along the axes of the site, by letter. Raises `SiteValueError`."""
        letter = next((axis for axis in HEAD_AXES if axis in self.axes), None)
        if letter is not None and letter != "H":
            return {letter: chosen_indices(heads, self.sizes[letter], partial(self.no_head, letter))}
        chosen = head_numbers(heads, self.sizes, f"{self}: ")
        if letter == "H":
            return {"H": chosen}
        P = self.sizes["P"]
        return {"E": [channel for head in chosen for channel in range(head * P, head * P + P)]}

    def of_channels(self, channels: Any, shape: Sequence[int]) -> dict[str, list[int]]:
        """The indices of channels along the axes of the site, by letter. Raises `SiteValueError`."""
        by_head = "H" in self.axes
        letter = "E" if by_head else next(axis for axis in CHANNEL_AXES if axis in self.axes)
        if isinstance(channels, str):
            raise self.no_channel(letter, self.named_channels(letter, channels))
        size = self.sizes["E"] if by_head else shape[self.axes.index(letter)]
        chosen = chosen_indices(channels, size, partial(self.no_channel, letter))
        if not by_head:
            return {letter: chosen}
        P = self.sizes["P"]
        return {"H": [channel // P for channel in chosen], "P": [channel % P for channel in chosen]}

    def no_position(self, reason: str) -> PositionError:
        """The error for positions that cannot be picked."""
        return PositionError(
            f"{self}: positions={reason}. Positions count the tokens of one forward call: every decode step "
            f"of generate has 1, which is 0 or -1"
        )

    def no_head(self, letter: str, reason: str) -> SiteValueError:
        """The error for heads of attention that cannot be picked."""
        counted = f"Heads count along {letter} ({AXES[letter]}), of size {self.sizes[letter]}"
        return SiteValueError(f"{self}: heads={reason}. {counted}")

    def no_channel(self, letter: str, reason: str) -> SiteValueError:
        """The error for channels that cannot be picked."""
        return SiteValueError(f"{self}: channels={reason}. Channels count along {letter} ({AXES[letter]})")

    def named_channels(self, letter: str, channels: str) -> str:
        """Why channels are not chosen by name, and how to choose the channels of a group by decay."""
        layer = re.search(r"layers\[(\d+)\]", self.path)
        if channels not in GROUPS or letter != "E" or layer is None:
            return f"{channels!r}: give an integer, a slice, several integers or a boolean mask"
        return f"{channels!r}: give decay_groups(model, {layer[1]})[{channels!r}], of mamba_trace.flow"
