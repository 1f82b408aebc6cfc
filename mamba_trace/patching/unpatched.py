"""The two runs that nothing is patched in: what cells start from, and the values that are patched in.

The residual stream of the run on the prompt is kept for every layer, [n_layers,L,D]. States are larger by
far, so they are made stretch by stretch, each going on from where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..modeling.past import StartingStates
from ..sites import BY_NAME, STATE, Site

if TYPE_CHECKING:
    from ..model import MambaTrace

#: Rows of the batch that holds both prompts.
SOURCE, PROMPT = 0, 1
#: The last site that a mixer's in_proj depends on.
BEFORE_MIXER = list(BY_NAME).index("norm")


@dataclass(frozen=True)
class Unpatched:
    """What is kept of both runs.

    Attributes:
        streams: of each layer, the residual stream into it in the run on the prompt [L,D].
        projected: of each layer, what in_proj makes of it [L,2E], if no patch changes that and there
            is memory for it; else empty.
        logits: of the runs on source and prompt, at the positions that a metric looks at [2,m,V].
    """

    streams: list[Tensor]
    projected: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Stretch:
    """What there is at ``positions``, of each layer.

    Attributes:
        positions: k of them.
        columns: the last K columns of x_in before each position, in the run on the prompt [k,E,K].
        states: the state before each position, in the run on the prompt [k,E,N].
        values: the site's value at each position in the run on the source [k,...].
    """

    positions: range
    columns: list[Tensor]
    states: list[Tensor]
    values: list[Tensor]

    def add(self, model: Any, layer: int, site: Site, past: StartingStates | None) -> None:
        """In a trace of source and prompt over the positions, add what there is in a layer."""
        width = model.config.conv_kernel
        names = sorted({"x_in", site.name, STATE}, key=list(BY_NAME).index)
        at = {name: model.hook(BY_NAME[name].path(layer)).output for name in names}  # [2,k,...] each
        x_in, h = after(past, layer, at["x_in"], width), at[STATE]  # [2,K+k,E], [2,k,E,N]
        first = torch.zeros_like(h[:, 0]) if past is None else past.states[layer]  # [2,E,N]
        self.columns.append(x_in[PROMPT].unfold(0, width, 1)[:-1].clone())
        self.states.append(torch.cat((first[PROMPT, None], h[PROMPT, :-1])))
        self.values.append(at[site.name][SOURCE].clone())

    def start(self, places: list[Tensor]) -> StartingStates:
        """Where rows start that are, of each layer, at these places among the positions [B]."""
        found = [place.to(state.device) for place, state in zip(places, self.states, strict=True)]
        return StartingStates(self.columns, self.states, found)


def run_unpatched(
    model: MambaTrace, tokens: Tensor, looked_at: list[int], site: Site | None
) -> tuple[Unpatched, Stretch | None]:
    """Run source and prompt, tokens [2,L], and keep the streams, and the logits at ``looked_at``.

    With a site, what cells start from is kept as well, at every position.
    """
    stretch = Stretch(range(tokens.shape[1]), [], [], []) if site is not None else None
    with model.trace(tokens, use_cache=False):
        streams, projected = nnsight.save([]), nnsight.save([])
        for layer in range(len(model.layers)):
            block = model.layers[layer]
            streams.append(block.resid_pre.output[PROMPT].clone())
            if stretch is not None and site is not None:
                if list(BY_NAME).index(site.name) > BEFORE_MIXER:
                    projected.append(block.ssm.in_proj.output[PROMPT].clone())
                stretch.add(model, layer, site, None)
        model.norm_f.input = model.norm_f.input[:, looked_at]
        logits = model.lm_head.output.save()
    return Unpatched(streams, projected, logits), stretch


def stretches(
    model: MambaTrace, tokens: Tensor, spans: Sequence[range], wanted: Sequence[bool], site: Site
) -> Iterator[Stretch | None]:
    """Run source and prompt, tokens [2,L], span by span: each goes on from where the one before it ended.

    Only one is held at a time. What a span starts from does not depend on which of them are wanted, not even
    in its last bits, so that cells are the same whoever computes them, and when.

    Args:
        model: the model.
        tokens: [2,L].
        spans: positions, without gaps.
        wanted: which spans are; for the others there is ``None``.
        site: whose values are patched in.
    """
    past = run_across(model, tokens, range(spans[0].start), None) if spans[0].start else None
    for number, span in enumerate(spans):
        yield run_stretch(model, tokens, span, site, past) if wanted[number] else None
        if any(wanted[number + 1 :]):
            past = run_across(model, tokens, span, past)


def run_across(
    model: MambaTrace, tokens: Tensor, positions: range, past: StartingStates | None
) -> StartingStates:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep nothing but where these end."""
    ends = StartingStates([], [], [])
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            ssm = model.layers[layer].ssm
            x_in = after(past, layer, ssm.x_in.output, model.config.conv_kernel)
            ends.add(x_in[:, -model.config.conv_kernel :], ssm.h[-1].output)
        tracer.stop()
    return ends


def run_stretch(
    model: MambaTrace, tokens: Tensor, positions: range, site: Site, past: StartingStates | None
) -> Stretch:
    """Run ``positions`` of tokens [2,L] from where ``past`` ended, and keep what cells start from."""
    stretch = Stretch(positions, [], [], [])
    with model.trace(tokens[:, positions.start : positions.stop], cache=past, use_cache=False) as tracer:
        for layer in range(len(model.layers)):
            stretch.add(model, layer, site, past)
        tracer.stop()
    return stretch


def after(past: StartingStates | None, layer: int, x_in: Tensor, width: int) -> Tensor:
    """x_in [2,k,E] after the ``width`` columns before it, which are zeros at the start: [2,K+k,E]."""
    if past is None:
        return torch.nn.functional.pad(x_in, (0, 0, width, 0))
    return torch.cat((past.columns[layer].transpose(1, 2), x_in), dim=1)
