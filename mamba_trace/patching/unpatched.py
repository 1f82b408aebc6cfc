"""The runs on source and prompt in which nothing is patched: what cells start from, and are patched with.

The residual stream of the run on the prompt is kept for every layer, [n_layers,L,D]. States are far larger,
so they are made for one span of positions at a time, each run going on from where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..modeling.mixer import HookableMixer
from ..modeling.past import StartingStates
from ..sites import BY_NAME, STATE, Site
from .question import PROMPT, SOURCE

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Unpatched:
    """What is kept of both runs.

    Attributes:
        streams: the residual stream into each layer, in the run on the prompt [L,D].
        projected: in_proj's output in each layer, in the run on the prompt [L,...]. Empty where a patch
            changes it, or where states are made span by span to save memory.
        logits: the logits of the runs on source and prompt, where a metric looks at them [2,m,V].
    """

    streams: list[Tensor]
    projected: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class CellStarts:
    """What the cells at some positions start from and are patched with, in each layer.

    Attributes:
        positions: the k positions.
        columns: the last K columns of the convolution before each position, in the run on the prompt: those
            of x_in, in Mamba-2 of x_in, B_in and C_in together [k,channels,K].
        states: the state before each position, in the run on the prompt [k,...,N].
        values: the site's value at each position, in the run on the source [k,...].
    """

    positions: range
    columns: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, model: Any, layer: int, site: Site, past: StartingStates | None) -> None:
        """Add a layer, in a trace that runs source and prompt over the positions, starting from ``past``."""
        mixer = mixer_of(model, layer)
        names = sorted({*mixer.columns_in, site.name, STATE}, key=lambda name: BY_NAME[name].index)
        at = {name: model.hook(BY_NAME[name].path(layer)).output for name in names}  # [2,k,...] each
        columns, h = after(past, layer, [at[name] for name in mixer.columns_in], mixer), at[STATE]
        first = torch.zeros_like(h[:, 0]) if past is None else past.states[layer]  # [2,...,N]
        self.columns.append(columns[PROMPT].unfold(0, mixer.conv_kernel_size, 1)[:-1].clone())
        self.states.append(torch.cat((first[PROMPT, None], h[PROMPT, :-1])))
        self.values.append(at[site.name][SOURCE].clone())

    def start(self, places: list[Tensor]) -> StartingStates:
        """Start rows here; ``places`` [B] are the rows' indices among the positions, for each layer."""
        there = [place.to(state.device) for place, state in zip(places, self.states, strict=True)]
        return StartingStates(self.columns, self.states, there)


def run_unpatched(
    model: MambaTrace, tokens: Tensor, looked_at: list[int], site: Site | None
) -> tuple[Unpatched, CellStarts | None]:
    """Run source and prompt, tokens [2,L]; keep the streams, and the logits at the positions ``looked_at``.

    With a site, what cells start from is kept in the same run, at every position.
    """
    starts = CellStarts(range(tokens.shape[1])) if site is not None else None
    with model.trace(tokens, use_cache=False):
        streams, projected = nnsight.save([]), nnsight.save([])
        for layer in range(len(model.layers)):
            block = model.layers[layer]
            streams.append(block.resid_pre.output[PROMPT].clone())
            if starts is not None and site is not None:
                if site.index > BY_NAME["norm"].index:  # a patch behind it leaves in_proj's input
                    projected.append(block.ssm.in_proj.output[PROMPT].clone())
                starts.add(model, layer, site, None)
        model.norm_f.input = model.norm_f.input[:, looked_at]
        logits = model.lm_head.output.save()
    return Unpatched(streams, projected, logits), starts


def starts_by_span(
    model: MambaTrace, tokens: Tensor, spans: Sequence[range], wanted: Sequence[bool], site: Site
) -> Iterator[CellStarts | None]:
    """Run source and prompt, tokens [2,L], span by span, each from where the one before it ended.

    Yields what the cells of each wanted span start from, ``None`` for the others, and holds one at a time.
    What a span starts from does not depend on which spans are wanted, not even in its last bits, so a cell is
    the same whoever computes it, and when.
    """
    past = run_across(model, tokens, range(spans[0].start), None) if spans[0].start else None
    for number, span in enumerate(spans):
        yield run_span(model, tokens, span, site, past) if wanted[number] else None
        if any(wanted[number + 1 :]):
            past = run_across(model, tokens, span, past)


def run_span(
    model: MambaTrace, tokens: Tensor, positions: range, site: Site, past: StartingStates | None
) -> CellStarts:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep what cells start from."""
    starts = CellStarts(positions)
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            starts.add(model, layer, site, past)
        tracer.stop()
    return starts


def run_across(model: MambaTrace, tokens: Tensor, positions: range, past: StartingStates | None) -> StartingStates:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep only where this run ends."""
    ends = StartingStates([], [], [])
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            ssm, mixer = model.layers[layer].ssm, mixer_of(model, layer)
            columns = after(past, layer, [getattr(ssm, name).output for name in mixer.columns_in], mixer)
            ends.add(columns[:, -mixer.conv_kernel_size :], ssm.h[-1].output)
        tracer.stop()
    return ends


def after(past: StartingStates | None, layer: int, parts: Sequence[Tensor], mixer: HookableMixer) -> Tensor:
    """The convolution's columns [2,K+k,channels]: the K before the call, zeros at the start, and ``parts``.

    Args:
        past: where the call started.
        layer: the layer.
        parts: the call's own columns, at each of the mixer's ``columns_in`` [2,k,...].
        mixer: the layer's mixer.
    """
    own = torch.cat([part.flatten(2) for part in parts], dim=-1) if len(parts) > 1 else parts[0]
    if past is None:
        return torch.nn.functional.pad(own, (0, 0, mixer.conv_kernel_size, 0))
    return torch.cat((past.columns[layer].transpose(1, 2), own), dim=1)


def mixer_of(model: Any, layer: int) -> HookableMixer:
    """The mixer of a layer."""
    return model.layers[layer].ssm._module
