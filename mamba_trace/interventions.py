"""Ablation and steering: what a model does without a part of itself, or with a direction added to it.

Whether a part matters is asked by taking it away: by setting it to zero, to its mean over other prompts, or
to its value in another run. Whether a direction means something is asked by adding it. Each is an edit of one
site, in which it is easy to be wrong without noticing: positions and channels are an outer product, some
sites have no positions, and PyTorch broadcasts a vector along whatever axis is last. `ablate` and `steer`
make the edit inside a trace and refuse what does not fit the place. They are edits like any other, in every
invoke, at every step of ``generate`` and under ``model.edit``, and carry on what an edit of that place
carries on. `mean_activation` runs prompts of its own and returns the means.

Source: zero, mean and resample ablation as in Wang et al. (arXiv 2211.00593), section 2; steering by adding a
direction as in Turner et al. (arXiv 2308.10248).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .envoys import PositionEnvoy, SiteEnvoy
from .errors import LayerError, MambaTraceError, PositionError, PromptError, SiteValueError, UnknownSiteError
from .names import nearest, public_path
from .prompts import describe
from .run_arguments import prompt_of
from .selection import layer_numbers
from .sites import AXES, BY_HOOK, BY_NAME, Site, describe_axes

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["ablate", "mean_activation", "steer"]

#: Indices along an axis: one, a slice, several, or a boolean mask of all. Negative ones count from the end.
Chosen = int | slice | Sequence[int] | Sequence[bool] | Tensor | None
#: Which axis of a site is its channels: the first of these that it has.
CHANNEL_AXES = "EDRNV"


def ablate(
    place: Any, value: float | Tensor = 0.0, *, positions: Chosen = None, channels: Chosen = None
) -> None:
    """Replace a site, at some positions and channels, by zero, a mean, or its value in another run.

    Call it inside a trace, where the place would be edited by hand.

    Args:
        place: a site, ``model.layers[3].ssm.y``, ``model.layers[1].ssm.h[5]`` or ``model.hook("...")``. What
            is done to ``h[p]`` is carried on; to the whole ``h`` it is not, and changes ``y`` there alone.
        value: a number; or a floating tensor that broadcasts to the site's shape, from the last axis as in
            PyTorch, of which the part that is replaced is taken: a mean [E] from `mean_activation`, or the
            same site of another run [B,L,E] (resample ablation).
        positions: an integer, a slice, several integers or a boolean mask [L]; ``None`` for all. They count
            the tokens of this forward call: a decode step of ``generate`` has one, and in a prompt padded on
            the left those from 0 on count the padding, while negative ones are the same token in every row.
        channels: likewise, along the axis E of the site, or D, R, N or V where it has no E; all n of a state.

    Raises:
        SiteValueError: if ``place`` is no site, ``value`` does not broadcast, or there is no such channel.
        PositionError: if there is no such position, or the site has no positions (``h[p]`` is of one).
        SiteOrderError: if the run has gone past this site.

    Example::

        means = mean_activation(model, [prompt, source], "y")
        with model.trace(source):
            other = model.layers[2].ssm.y.output.save()  # [B,L,E]
        with model.trace(prompt):
            ablate(model.layers[0].ssm.y, positions=[3, 10], channels=slice(0, 64))
            ablate(model.layers[1].ssm.h[10])
            ablate(model.layers[1].ssm.y, means[1])
            ablate(model.layers[2].ssm.y, other, positions=-1)
            logits = model.lm_head.output.save()
    """
    target = Target.of(place, "ablate")
    target.check_value(value)
    current = place.output
    index = target.index(current, positions, channels)
    if isinstance(value, Tensor):
        current[index] = target.broadcast(value, current)[index]
    else:
        current[index] = float(value)


def steer(place: Any, direction: Tensor, scale: float | Tensor = 1.0, *, positions: Chosen = None) -> None:
    """Add a direction to a site, at every position or at some.

    Call it inside a trace. In ``generate`` a line of a trace acts on the first forward call, which reads the
    prompt; under ``tracer.iter`` it acts at every step, on the prompt and on each new token. An open
    ``tracer.iter[:]`` ends with the generation, lines after it do not run and nnsight warns of that, so for a
    fixed number of steps give it. A state is steered at ``h[-1]``, and carries on what was added to it.

    Args:
        place: as in `ablate`.
        direction: a floating tensor of the site's axes without B and L: [D] for the residual stream, [E] for
            ``ssm.y``, [E,N] for ``ssm.h[p]``.
        scale: its factor.
        positions: as in `ablate`.

    Raises:
        SiteValueError: if ``place`` is no site, or the direction has another shape.
        PositionError: if there is no such position, or the site has no positions (``h[p]`` is of one).
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
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise SiteValueError(f"{target}: a direction is a floating tensor, not {describe(direction)}")
    current = place.output
    target.check_direction(direction, current.shape)
    index = target.index(current, positions, None)
    current[index] = current[index] + (scale * direction).to(current)


@dataclass(frozen=True)
class Target:
    """The place that an intervention is made at.

    Attributes:
        path: what users call it.
        axes: the axes of its value.
    """

    path: str
    axes: str

    @classmethod
    def of(cls, place: Any, verb: str) -> Target:
        """The target of a user's ``place``. Raises `SiteValueError` where that is no site."""
        if isinstance(place, PositionEnvoy):
            return cls(public_path(place.path), place._site.site.axes.replace("L", ""))
        if isinstance(place, SiteEnvoy):
            return cls(public_path(place.path), place.site.axes)
        path = getattr(place, "path", None)
        named = describe(place) if path is None else public_path(path)
        raise SiteValueError(
            f"{verb} takes a site, such as model.layers[3].ssm.y or model.layers[1].ssm.h[5], and not its "
            f"output; this is {named}. `mamba-trace sites` lists them"
        )

    def __str__(self) -> str:
        return f"{self.path} {describe_axes(self.axes)}"

    def check_value(self, value: Any) -> None:
        """Raises `SiteValueError` unless a value is a number or a floating tensor."""
        if isinstance(value, Real) and not isinstance(value, bool):
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            hint = "; of means take that of one layer, means[layer]" if isinstance(value, dict) else ""
            raise SiteValueError(
                f"{self} is ablated to a number or a floating tensor, not {describe(value)}{hint}"
            )

    def broadcast(self, value: Tensor, current: Tensor) -> Tensor:
        """``value`` in the shape, dtype and place of ``current``. Raises `SiteValueError`."""
        fits = len(value.shape) <= len(current.shape) and all(
            one in (1, size) for one, size in zip(value.shape[::-1], current.shape[::-1], strict=False)
        )
        if not fits:
            raise SiteValueError(
                f"{self} has shape {tuple(current.shape)} here, and {tuple(value.shape)} does not broadcast "
                f"to it: axes are matched from the last, and each is of the same size or 1"
            )
        return value.to(current).expand(current.shape)

    def check_direction(self, direction: Tensor, shape: Sequence[int]) -> None:
        """Raises `SiteValueError` unless a direction has the axes of a site of ``shape`` without B and L."""
        kept = "".join(axis for axis in self.axes if axis not in "BL")
        wanted = tuple(size for axis, size in zip(self.axes, shape, strict=True) if axis in kept)
        if tuple(direction.shape) != wanted:
            raise SiteValueError(
                f"{self} is steered by a direction of shape {wanted} {describe_axes(kept)}, not "
                f"{tuple(direction.shape)}. One and the same is added in every row and at every position"
            )

    def index(self, current: Tensor, positions: Chosen, channels: Chosen) -> tuple[Any, ...]:
        """What picks positions, channels or their outer product out of the site's value ``current``.

        Raises:
            PositionError, SiteValueError: if there are no such positions or channels.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        if positions is not None:
            if "L" not in self.axes:
                raise PositionError(f"{self} has no axis of positions: leave positions= out")
            axis = self.axes.index("L")
            found = picked(positions, current.shape[axis], self.no_position)
            index[axis] = torch.tensor(found, dtype=torch.long, device=current.device)  # [P]
        if channels is not None:
            letter = next(one for one in CHANNEL_AXES if one in self.axes)
            axis = self.axes.index(letter)
            found = picked(channels, current.shape[axis], lambda reason: self.no_channel(letter, reason))
            index[axis] = torch.tensor(found, dtype=torch.long, device=current.device)  # [C]
            if positions is not None:
                index[self.axes.index("L")].unsqueeze_(-1)  # [P,1]
        return tuple(index)

    def no_position(self, reason: str) -> PositionError:
        """The error for positions that cannot be picked."""
        return PositionError(
            f"{self}: positions={reason}. Positions count the tokens of one forward call: every decode step "
            f"of generate has 1, which is 0 or -1"
        )

    def no_channel(self, letter: str, reason: str) -> SiteValueError:
        """The error for channels that cannot be picked."""
        return SiteValueError(f"{self}: channels={reason}. Channels count along {letter} ({AXES[letter]})")


def picked(asked: Any, size: int, error: Callable[[str], MambaTraceError]) -> list[int]:
    """The indices along an axis of ``size`` that a user asks for, negative ones as they are.

    Args:
        asked: an integer, a slice, several integers or a boolean mask; lists, tensors and arrays alike.
        size: how many there are.
        error: makes the exception, from what was asked and what is wrong with it.
    """
    plain = asked.tolist() if hasattr(asked, "tolist") else asked
    if isinstance(asked, slice):
        plain = range(size)[asked]
    several = [plain] if isinstance(plain, int) else plain
    if isinstance(several, (list, tuple)) and several and all(isinstance(one, bool) for one in several):
        if len(several) != size or plain is not several:
            raise error(f"a boolean mask of {len(several)}, but there are {size}")
        several = [at for at, one in enumerate(several) if one]
    try:
        found = [operator.index(one) for one in several]
    except TypeError as wrong:
        raise error(f"{asked!r}: give an integer, a slice, several integers or a mask of {size}") from wrong
    if not found:
        raise error(f"{asked!r}, which is none of the {size} that there are")
    for one in found:
        if not -size <= one < size:
            raise error(f"{one}, but there are {size}, from {-size} to {size - 1}")
    return found


# -- means -------------------------------------------------------------------------------------------------


def mean_activation(
    model: MambaTrace,
    prompts: str | Sequence[str] | Tensor,
    site: str,
    layers: int | Sequence[int] | None = None,
    *,
    over: str = "positions",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
) -> dict[int | None, Tensor]:
    """The mean of a site over prompts, padding left out: what `ablate` takes for mean ablation.

    Args:
        model: the model.
        prompts: a string, a list of strings, or token ids [B,L] or [L].
        site: a site's name or hook name: ``"y"``, ``"resid_post"``, ``"h"``, ``"hook_conv"``, ...
        layers: one or several; ``None`` for all. A site of the whole model (``"embeddings"``) has none.
        over: ``"positions"``: over all tokens of all prompts, each with the same weight. ``"prompts"``: at
            each position apart, for prompts of one length.
        attention_mask: [B,L], 0 on the padding of token ids; strings bring their own.
        batch_size: how many prompts one forward runs. A site with axes B, L, E and N is held for one layer
            and one batch at a time.

    Returns:
        The mean by layer, counted from 0 (by ``None`` for a site of the whole model), on the CPU and in
        float32 or better: the site's axes without B and L, such as [E]; with ``over="prompts"`` without B,
        such as [L,E], of which ``means[1][5]`` is for ``h[5]``.

    Raises:
        UnknownSiteError: before anything runs, if there is no such site.
        LayerError: likewise, if the model has no such layer.
        SiteValueError: likewise, if the site is the same for every prompt.
        PromptError: likewise, if these are no prompts, or not of one length where they must be.

    Example::

        means = mean_activation(model, [prompt, source], "y", layers=[1, 2])
        with model.trace(prompt):
            ablate(model.layers[1].ssm.y, means[1])  # mean ablation of a layer's scan
            logits = model.lm_head.output.save()
    """
    averaged = averaged_site(site)
    sums = {layer: Sum() for layer in averaged_layers(model, averaged, layers)}
    if over not in ("positions", "prompts"):
        raise ValueError(f"over={over!r} is neither 'positions' nor 'prompts'")
    if batch_size < 1:
        raise PromptError(f"batch_size={batch_size}: a forward runs at least one prompt")
    rows = prompt_rows(model, prompts)
    if over == "prompts":
        check_one_length(model, rows, attention_mask)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        mask = None if attention_mask is None else attention_mask[part]
        add_batch(model, rows[part], mask, averaged, over, sums)
    return {layer: one.mean() for layer, one in sums.items()}


class Sum:
    """A running sum over rows, in float64 on the CPU from one batch to the next."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.dtype = torch.float32

    def add(self, rows: Tensor) -> None:
        """Add rows [n,...]."""
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        total = rows.detach().sum(0, dtype=self.dtype).cpu().double()
        self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    def mean(self) -> Tensor:
        """The mean of all rows [...]."""
        assert self.total is not None
        return (self.total / self.count).to(self.dtype)


def add_batch(
    model: MambaTrace, rows: Any, mask: Tensor | None, site: Site, over: str, sums: dict[int | None, Sum]
) -> None:
    """Run some prompts, and add what a site holds to the sum of each layer."""
    inputs = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad(), model.trace(rows, use_cache=False, **inputs) as tracer:
        kept = model.inputs[1].get("attention_mask")  # [B,L] or None
        for layer, one in sums.items():
            value = model.hook(site.path(layer)).output
            if over == "positions" and "L" in site.axes:
                everything = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
                value = value[everything if kept is None else kept.to(value.device) != 0]  # [n,...]
            one.add(value)
        tracer.stop()


def averaged_site(name: str) -> Site:
    """The site of a name or hook name. Raises `UnknownSiteError`, and `SiteValueError` where it has no B."""
    site = BY_NAME.get(name) or BY_HOOK.get(name)
    if site is None:
        raise UnknownSiteError(
            f"no site is called {name!r}{nearest(str(name), [*BY_NAME, *BY_HOOK])}. A mean is of one site at "
            f"several layers: site='y', layers=[1, 2]"
        )
    if "B" not in site.axes:
        raise SiteValueError(f"{name} {describe_axes(site.axes)} is the same for every prompt: read it once")
    return site


def averaged_layers(
    model: MambaTrace, site: Site, layers: int | Sequence[int] | None
) -> list[int] | list[None]:
    """The layers in ascending order, counted from 0. Raises `LayerError`."""
    if site.scope != "model":
        return layer_numbers(model, layers)
    if layers is not None:
        raise LayerError(f"{site.name} belongs to no layer: leave layers={layers!r} out")
    return [None]


def prompt_rows(model: MambaTrace, prompts: Any) -> list[str] | Tensor:
    """Prompts as a list of strings or token ids [B,L]. Raises `PromptError`."""
    rows = prompt_of(model, prompts, None)
    if isinstance(rows, Tensor):
        return rows if rows.dim() == 2 else rows[None]
    rows = [rows] if isinstance(rows, str) else list(rows)
    if not all(isinstance(one, str) for one in rows):
        raise PromptError(f"prompts are strings or a tensor of token ids [B,L], not a list of {rows[0]!r}")
    return rows


def check_one_length(model: MambaTrace, rows: list[str] | Tensor, mask: Tensor | None) -> None:
    """Raises `PromptError` where prompts have several lengths, or padding."""
    if isinstance(rows, Tensor):
        lengths = {rows.shape[1]} if mask is None else {rows.shape[1], *mask.sum(-1).tolist()}
    else:
        lengths = {model.to_tokens(one).shape[1] for one in rows}
    if len(lengths) > 1:
        raise PromptError(
            f"over='prompts' averages at each position, and these prompts have {min(lengths)} to "
            f"{max(lengths)} tokens: give prompts of one length without padding, or over='positions'"
        )
