"""Attribution patching: a patching grid to first order, from two forwards and one backward.

To first order, a patch changes the metric by the difference between the two runs' values times the metric's
gradient, and one backward pass gives that gradient for every layer and position at once. The estimate is
exact where the model is linear in the value, and misleading where it saturates. The integrated variant
averages the gradient along the way from the prompt's embeddings to the source's, and so sees what lies
between.

Source: attribution patching, Nanda (2023) and Syed et al. (arXiv 2310.10348); gradients integrated over the
inputs, Hanna et al. (arXiv 2403.17806, EAP-IG).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..errors import MetricError
from ..sites import STATE
from ..tracing.sandbox import NO_GRADIENT, in_sandbox
from .changes import changes
from .metrics import measured
from .question import PROMPT, SOURCE, Question
from .run import Answers

if TYPE_CHECKING:
    from ..model import MambaTrace


def attributions(model: MambaTrace, question: Question, steps: int) -> Answers:
    """Estimate every cell: the prompt's metric, plus what the patch would add to first order.

    The gradient is averaged over ``steps`` points between prompt and source; 1 is the prompt itself. Raises
    `MetricError` if a metric has no gradient, and before anything runs in a server's sandbox, which has none.
    """
    if in_sandbox(model):
        raise MetricError(f"attribution_grid takes gradients, and {NO_GRADIENT}. patch_grid needs no gradients")
    model.dispatch()
    source, source_values, end = unpatched(model, question, SOURCE)
    if steps == 1:
        slopes = Slopes(model, question, source_values, None)
        prompt = slopes.add(None)
    else:
        prompt, prompt_values, start = unpatched(model, question, PROMPT)
        slopes = Slopes(model, question, source_values, prompt_values)
        for step in range(steps):
            slopes.add(torch.lerp(start, end, (step + 0.5) / steps))
    values = prompt[:, None, None] + slopes.sum.to(prompt.dtype).cpu() / steps
    return Answers(values, source, prompt, "every cell from forwards of the whole prompt and their backwards")


def unpatched(model: MambaTrace, question: Question, run: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The metrics [M] of a run, the site's value in each row of the grid [L,...], and embeddings [1,L,D]."""
    with torch.no_grad(), model.trace(question.tokens[run, None], use_cache=False):
        embeddings = model.embeddings.output.save()  # [1,L,D]
        values = nnsight.save([])
        for _, place in rows_of(model, question):
            values.append(place.output[0].clone())
        logits = model.hook("logits").output[:, question.looked_at].save()
    return question.measure(logits)[:, 0], values, embeddings


def rows_of(model: Any, question: Question) -> Iterator[tuple[int, Any]]:
    """Each row of the grid, with the place of the site in it."""
    for row in range(len(question.windows)):
        (layer,) = question.patched_layers(row)
        yield row, model.hook(question.site.path(layer))


class Slopes:
    """What patches would add to the metrics to first order, summed over runs: ``sum`` [M,rows,L], in float64.

    Args:
        model: the model.
        question: what is asked.
        source: the site's value in each row, in the run on the source [L,...].
        prompt: the same in the run on the prompt; ``None`` for the run whose gradient is taken.
    """

    def __init__(
        self, model: MambaTrace, question: Question, source: list[Tensor], prompt: list[Tensor] | None
    ) -> None:
        self.model, self.question, self.source, self.prompt = model, question, source, prompt
        shape = (len(question.metrics), len(question.windows), question.length)
        self.sum = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.changed = bool(changes(model))
        #: Where the runs can differ: at any position, if the user has changed the model.
        self.positions = range(question.length) if self.changed else question.positions
        self.metric = 0  # the number of the metric whose gradient is being taken
        self.ends: list[Tensor] = []  # where the backward pass ends

    def add(self, embeddings: Tensor | None) -> Tensor:
        """Add the slopes at ``embeddings`` [1,L,D], or at the prompt's own; returns the metrics there [M]."""
        model, question = self.model, self.question
        with torch.enable_grad():
            with model.trace(question.tokens[PROMPT, None], use_cache=False):
                start = model.embeddings.output if embeddings is None else embeddings
                self.ends = [rooted(model.embeddings, start)]
                for row, place in rows_of(model, question):
                    for positions, at in self.places(place):
                        value = at.output
                        if not value.requires_grad:  # an edit has put a constant here
                            rooted(at, value)
                            value = at.output
                        if self.changed:  # as an edit may have cut it off from the embeddings
                            self.ends.append(value)
                        value.register_hook(self.slope(row, positions, value.detach()))
                logits = model.hook("logits").output[:, question.looked_at].save()
            return self.take(logits[:, 0] if question.single else logits)

    def places(self, place: Any) -> Iterator[tuple[slice, Any]]:
        """The places whose values make up a row, each with its positions.

        The state has a place for each position, as its gradient there includes all that it is carried on to.
        """
        if self.question.site.name != STATE:
            yield slice(0, self.question.length), place
            return
        for position in self.positions:
            yield slice(position, position + 1), place[position]

    def take(self, logits: Tensor) -> Tensor:
        """Go backward from every metric of ``logits`` to `ends`; returns the metrics [M]."""
        metrics = self.question.metrics
        computed = [measured(metric, logits.clone()) for metric in metrics.values()]  # each may overwrite its own
        for number, (name, value) in enumerate(zip(metrics, computed, strict=True)):
            if not value.requires_grad:
                raise MetricError(f"{name} has no gradient, so nothing can be said to first order")
            self.metric = number
            # Only as far as the run's start: no gradient of a weight is made.
            more = number + 1 < len(computed)
            torch.autograd.grad(value.sum(), self.ends, retain_graph=more, allow_unused=True)
        self.ends = []
        return torch.stack([value.detach().cpu() for value in computed])[:, 0]

    def slope(self, row: int, positions: slice, here: Tensor) -> Any:
        """A hook for the gradient at one place, which adds up its slopes; ``here`` is the place's value."""
        source = self.source[row][positions]  # [k,...]
        difference = source - (here.view_as(source) if self.prompt is None else self.prompt[row][positions])

        def add(gradient: Tensor) -> None:
            slopes = (gradient.reshape(source.shape) * difference).flatten(1).double().sum(1)  # [k]
            self.sum[self.metric, row, positions] += slopes.cpu()

        return add


def rooted(place: Any, value: Tensor) -> Tensor:
    """In a trace, let the gradient of a place start there, with ``value``; returns the leaf that gets it."""
    root = value.detach().clone().requires_grad_()
    place.output = root  # the run gets a copy, which can be edited in place
    return root
