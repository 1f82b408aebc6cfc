"""Attribution patching: a patching grid to first order, from two forwards and one backward.

What a patch does to the metric is about the difference between the two runs' values, times the metric's
gradient: one backward pass gives that for every layer and position at once. It is exact where the model is
linear in the value, and misleading where it saturates; the integrated variant takes the mean of the gradient
along the way from the prompt's embeddings to the source's, which sees what lies between.

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
from .changes import changes
from .metrics import measured
from .question import Question
from .run import Answers
from .unpatched import PROMPT, SOURCE

if TYPE_CHECKING:
    from ..model import MambaTrace


def attributions(model: MambaTrace, question: Question, steps: int) -> Answers:
    """The metric of every cell to first order: the prompt's, and what the patch would add.

    Args:
        model: the model.
        question: what is asked.
        steps: points on the way from prompt to source whose gradients are averaged; 1 for the prompt's own.

    Raises:
        MetricError: if a metric has no gradient.
    """
    model.dispatch()
    source, source_values, ends = unpatched(model, question, SOURCE)
    if steps == 1:
        slopes = Slopes(model, question, source_values, None)
        prompt = slopes.add(None)
    else:
        prompt, prompt_values, start = unpatched(model, question, PROMPT)
        slopes = Slopes(model, question, source_values, prompt_values)
        for step in range(steps):
            slopes.add(torch.lerp(start, ends, (step + 0.5) / steps))
    values = prompt[:, None, None] + slopes.sum.to(prompt.dtype).cpu() / steps
    return Answers(values, source, prompt, "every cell from forwards of the whole prompt and their backwards")


def unpatched(model: MambaTrace, question: Question, row: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of one run: the metrics [M], the site's values [L,...] in the grid's rows, the embeddings [1,L,D]."""
    with torch.no_grad(), model.trace(question.tokens[row, None], use_cache=False):
        embeddings = model.embeddings.output.save()  # [1,L,D]
        values = nnsight.save([])
        for _, place in rows_of(model, question):
            values.append(place.output[0].clone())
        logits = model.lm_head.output[:, question.looked_at].save()
    return question.measure(logits)[:, 0], values, embeddings


def rows_of(model: Any, question: Question) -> Iterator[tuple[int, Any]]:
    """The rows of the grid, and where the site is in each."""
    for row in range(len(question.windows)):
        yield row, model.hook(question.site.path(None if question.site.scope == "model" else row))


class Slopes:
    """What patches would add to the metrics to first order, summed over runs.

    Args:
        model: the model.
        question: what is asked.
        source: the site's value in each row in the run on the source [L,...].
        prompt: likewise on the prompt; ``None`` where it is that of the run whose gradient is taken.

    Attributes:
        sum: [M,rows,L], in float64.
    """

    def __init__(
        self, model: MambaTrace, question: Question, source: list[Tensor], prompt: list[Tensor] | None
    ) -> None:
        self.model, self.question, self.source, self.prompt = model, question, source, prompt
        self.sum = torch.zeros(
            (len(question.metrics), len(question.windows), question.length), dtype=torch.float64, device="cpu"
        )
        self.changed = bool(changes(model))
        #: Where a difference of the runs can be: with what a user has added, it may be at any position.
        self.positions = range(question.length) if self.changed else question.positions
        self.metric = 0  # whose gradient is being taken
        self.ends: list[Tensor] = []  # of the backward pass

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
                logits = model.lm_head.output[:, question.looked_at].save()
            return self.take(logits[:, 0] if question.single else logits)

    def places(self, place: Any) -> Iterator[tuple[slice, Any]]:
        """Where to ask for the value of a row, with the positions it is of.

        The state has a place for each position, whose gradient is that of all that it is carried on to.
        """
        if self.question.site.name != STATE:
            yield slice(0, self.question.length), place
            return
        for position in self.positions:
            yield slice(position, position + 1), place[position]

    def take(self, logits: Tensor) -> Tensor:
        """Go backward from every metric of ``logits`` to `ends`; returns the metrics [M].

        A metric may do anything to the logits that it gets, so each gets its own.
        """
        metrics = self.question.metrics
        found = [measured(metric, logits.clone()) for metric in metrics.values()]
        for number, (name, value) in enumerate(zip(metrics, found, strict=True)):
            if not value.requires_grad:
                raise MetricError(f"{name} has no gradient, so nothing can be said to first order")
            self.metric = number
            # With respect to where the run starts: no gradient of a weight is made.
            keep = number + 1 < len(found)
            torch.autograd.grad(value.sum(), self.ends, retain_graph=keep, allow_unused=True)
        self.ends = []
        return torch.stack([value.detach().cpu() for value in found])[:, 0]

    def slope(self, row: int, positions: slice, here: Tensor) -> Any:
        """What adds up the slopes at one place when its gradient comes, where its value is ``here``."""
        source = self.source[row][positions]  # [k,...]
        difference = source - (here.view_as(source) if self.prompt is None else self.prompt[row][positions])

        def add(gradient: Tensor) -> None:
            slopes = (gradient.reshape(source.shape) * difference).flatten(1).double().sum(1)  # [k]
            self.sum[self.metric, row, positions] += slopes.cpu()

        return add


def rooted(place: Any, value: Tensor) -> Tensor:
    """In a trace: have a place's gradient start there, with ``value``; returns what it is taken to."""
    root = value.detach().clone().requires_grad_()
    place.output = root  # of which the run gets a copy, to be edited in place
    return root
