"""The runs on source and prompt in which nothing is patched: what cells start from, and are patched with.

The residual stream of the run on the prompt is kept for every layer, [n_layers,L,D], and so are the keys and values
of attention in both runs, once. States are far larger, so they are made for one span of positions at a time, each run
going on from where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from ..modeling.mixer import HookableMixer
from ..modeling.starting import StartingRuns, StartingStates, of_layer
from ..scan.room import Room
from ..scan.runs import Runs
from ..sites import BY_NAME, STATE, Site
from ..tracing.worker import reading
from .question import PROMPT, SOURCE

if TYPE_CHECKING:
    from ..model import MambaTrace


@dataclass(frozen=True)
class Attended:
    """What layers read of the runs on source and prompt beside the stream: of attention keys and values, by layer.

    Attributes:
        keys, values: rotated and multiplied, at every position [2,U,L,W]; ``None`` for a layer without attention.
        length: how many positions the prompt has, L.
        embeddings: of the tokens [2,L,D], where a shared transformer reads them.
    """

    keys: list[Tensor | None]
    values: list[Tensor | None]
    length: int
    embeddings: Tensor | None = None

    @classmethod
    def of(cls, cache: Any, layers: Sequence[int], n_layers: int, length: int, embeddings: Tensor | None) -> Attended:
        """What Hugging Face's ``cache`` keeps of the layers with attention."""
        kept = [cache.layers[layer] if layer in layers else None for layer in range(n_layers)]
        keys, values = ([getattr(layer, name, None) for layer in kept] for name in ("keys", "values"))
        return cls(keys, values, length, embeddings)

    def of_run(self, run: int) -> Attended:
        """Those of the source alone, or of the prompt [1,...]."""
        keys, values = (
            [None if part is None else part[run, None] for part in parts] for parts in (self.keys, self.values)
        )
        return Attended(keys, values, self.length, None if self.embeddings is None else self.embeddings[run, None])


@dataclass(frozen=True)
class Unpatched:
    """What is kept of both runs.

    Attributes:
        streams: the residual stream into each layer, in the run on the prompt [L,D].
        projected: in_proj's output in each layer, in the run on the prompt [L,...]. ``None`` where a patch
            changes it or there is no SSM, and everywhere if states are made span by span to save memory.
        attended: what attention reads of both runs.
        logits: the logits of the runs on source and prompt, where a metric looks at them [2,m,V].
    """

    streams: list[Tensor]
    projected: list[Tensor | None]
    attended: Attended
    logits: Tensor


@dataclass(frozen=True)
class CellStarts:
    """What the cells at some positions start from and are patched with, in each layer.

    Attributes:
        positions: the k positions.
        columns: the last K columns of the convolution before each position, in the run on the prompt: those
            of x_in, in Mamba-2 of x_in, B_in and C_in together [k,channels,K]. ``None`` without an SSM.
        states: the state before each position, in the run on the prompt [k,...,N]. ``None`` without an SSM.
        values: the site's value at each position, in the run on the source [k,...]. ``None`` in a layer that is not
            patched.
        devices: where each layer runs.
    """

    positions: range
    columns: list[Tensor | None] = field(default_factory=list)
    states: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)

    def add(self, model: Any, layer: int, site: Site, past: StartingStates | None) -> None:
        """Add a layer, in a trace that runs source and prompt over the positions, starting from ``past``."""
        layout = model._layout
        kind, mixer = layout.layers[layer], mixer_of(model, layer)
        names = {*mixer.columns_in, STATE} if mixer is not None else set()
        names |= {site.name} if layout.has(site, layer) else set()
        in_order = sorted((BY_NAME[name] for name in names), key=kind.order)
        with reading():
            at = {one.name: model.hook(one.path(layer)).output for one in in_order}  # [2,k,...] each
        columns = states = None
        if mixer is not None:
            whole, h = after(past, layer, [at[name] for name in mixer.columns_in], mixer), at[STATE]
            first = torch.zeros_like(h[:, 0]) if past is None else of_layer(past.states[layer])  # [2,...,N]
            columns = whole[PROMPT].unfold(0, mixer.conv_kernel_size, 1)[:-1].clone()
            states = torch.cat((first[PROMPT, None], h[PROMPT, :-1]))
        self.columns.append(columns)
        self.states.append(states)
        self.values.append(at[site.name][SOURCE].clone() if site.name in at else None)

    def start(self, places: list[Tensor], attended: Attended) -> StartingStates:
        """Start rows here; ``places`` [B] are the rows' indices among the positions, for each layer."""
        prompt = attended.of_run(PROMPT)
        before = [self.positions.start + max(place.tolist(), default=0) for place in places]
        there = [place.to(device) for place, device in zip(places, self.devices, strict=True)]
        at = [place + self.positions.start for place in there]
        kept = (prompt.keys, prompt.values)
        return StartingStates(self.columns, self.states, there, *kept, at, before, attended.length, prompt.embeddings)

    def start_runs(
        self, positions: range, runs: Runs, attended: Attended, read: Tensor | None, rows: int
    ) -> StartingRuns:
        """Start rows each of which is several ``runs``, one from each of ``positions`` on.

        Behind the last layer they are read in the columns ``read``; in all of them if ``None``. No layer has more
        than so many ``rows``.
        """
        at = range(positions.start - self.positions.start, positions.stop - self.positions.start)
        of_cells = CellStarts(
            positions,
            [None if kept is None else kept[at.start : at.stop] for kept in self.columns],
            [None if kept is None else kept[at.start : at.stop] for kept in self.states],
            devices=self.devices,
        )
        places = torch.arange(len(positions), device="cpu")
        starts = of_cells.start([places] * len(self.devices), attended)
        return StartingRuns(starts, runs, read, Room(rows))


def run_unpatched(
    model: MambaTrace, tokens: Tensor, looked_at: list[int], site: Site | None
) -> tuple[Unpatched, CellStarts | None]:
    """Run source and prompt, tokens [2,L]; keep the streams, and the logits at the positions ``looked_at``.

    With a site, what cells start from is kept in the same run, at every position.
    """
    starts = CellStarts(range(tokens.shape[1])) if site is not None else None
    attention, n_layers = model.attention_layers, len(model.layers)
    cache = DynamicCache(config=model.config) if attention else None
    shared = any(kind.has(BY_NAME["shared_out"]) for kind in model._layout.layers)
    with model.trace(tokens, cache=cache, use_cache=cache is not None):
        streams, projected = nnsight.save([]), nnsight.save([])
        embeddings = nnsight.save(model.embeddings.output.clone() if shared else None)
        for layer in range(n_layers):
            block = model.layers[layer]
            streams.append(block.resid_pre.output[PROMPT].clone())
            keep = starts is not None and site is not None and leaves_projection(model, site, layer)
            projected.append(block.ssm.in_proj.output[PROMPT].clone() if keep else None)
            if starts is not None and site is not None:
                starts.add(model, layer, site, None)
        model.norm_f.input = model.norm_f.input[:, looked_at]
        logits = model.hook("logits").output.save()
        if cache is not None:  # in NDIF's sandbox the one above is not the one that was filled
            cache = nnsight.save(model.output.cache)
    if starts is not None:
        starts.devices[:] = [stream.device for stream in streams]
    attended = Attended.of(cache, attention, n_layers, tokens.shape[1], embeddings)
    return Unpatched(streams, projected, attended, logits), starts


def leaves_projection(model: MambaTrace, site: Site, layer: int) -> bool:
    """Whether a patch of a site in a layer with an SSM leaves the input of its in_proj as it is."""
    kind = model._layout.layers[layer]
    return kind.family is not None and kind.has(site) and kind.order(site) > kind.order(BY_NAME["norm"])


def starts_by_span(
    model: MambaTrace,
    tokens: Tensor,
    spans: Sequence[range],
    wanted: Sequence[bool],
    site: Site,
    unpatched: Unpatched,
) -> Iterator[CellStarts | None]:
    """Run source and prompt, tokens [2,L], span by span, each from where the one before it ended.

    Yields what the cells of each wanted span start from, ``None`` for the others, and holds one at a time.
    What a span starts from does not depend on which spans are wanted, not even in its last bits, so a cell is
    the same whoever computes it, and when.
    """
    past = run_across(model, tokens, range(spans[0].start), None, unpatched) if spans[0].start else None
    for number, span in enumerate(spans):
        yield run_span(model, tokens, span, site, past, unpatched) if wanted[number] else None
        if any(wanted[number + 1 :]):
            past = run_across(model, tokens, span, past, unpatched)


def run_span(
    model: MambaTrace,
    tokens: Tensor,
    positions: range,
    site: Site,
    past: StartingStates | None,
    unpatched: Unpatched,
) -> CellStarts:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep what cells start from."""
    starts = CellStarts(positions, devices=[stream.device for stream in unpatched.streams])
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            starts.add(model, layer, site, past)
        tracer.stop()
    return starts


def run_across(
    model: MambaTrace, tokens: Tensor, positions: range, past: StartingStates | None, unpatched: Unpatched
) -> StartingStates:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep only where this run ends."""
    attended = unpatched.attended
    ends = StartingStates([], [], [], attended.keys, attended.values, length=attended.length)
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            mixer, columns, state = mixer_of(model, layer), None, None
            if mixer is not None:
                ssm = model.layers[layer].ssm
                parts = [getattr(ssm, name).output for name in mixer.columns_in]
                columns = after(past, layer, parts, mixer)[:, -mixer.conv_kernel_size :]
                state = ssm.h[-1].output
            ends.add(columns, state, torch.tensor([positions.stop] * 2, device=unpatched.streams[layer].device))
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
    return torch.cat((of_layer(past.columns[layer]).transpose(1, 2), own), dim=1)


def mixer_of(model: Any, layer: int) -> HookableMixer | None:
    """The mixer of a layer, if it has one."""
    return None if model._layout.layers[layer].family is None else model.layers[layer].ssm._module
