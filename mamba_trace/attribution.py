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

from .errors import MetricError
from .metrics import measured
from .sites import STATE
from .sweep import PROMPT, SOURCE, Answers, Question

if TYPE_CHECKING:
    from .model import MambaTrace


def attributions(model: MambaTrace, question: Question, steps: int) -> Answers:
    """The metric of every cell to first order: the prompt's, and what the patch would add.

    Args:
        model: the model.
        question: what is asked.
        steps: points on the way from prompt to source whose gradients are averaged; 1 for the prompt's own.

    Raises:
        MetricError: if a metric has no gradient.
    """
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
    return Answers(values, source, prompt)


def unpatched(model: MambaTrace, question: Question, row: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of one run: the metrics [M], the site's values [L,...] in the grid's rows, the embeddings [1,L,D]."""
    with torch.no_grad(), model.trace(question.tokens[row, None], use_cache=False):
        embeddings = model.embeddings.output.save()  # [1,L,D]
        values = nnsight.save([])
        for _, _, value in places(model, question, whole=True):
            values.append(value[0].clone())
        logits = model.lm_head.output[:, question.looked_at].save()
    return question.measure(logits)[:, 0], values, embeddings


def places(model: Any, question: Question, whole: bool) -> Iterator[tuple[int, slice, Tensor]]:
    """In a trace: the site's value [1,L,...] in each row of the grid, with the positions it is of.

    The state is one value with ``whole``, and else one [1,E,N] for each position, whose gradient is that of
    all that it is carried on to.
    """
    site = question.site
    for row in range(len(question.windows)):
        place = model.hook(site.path(None if site.scope == "model" else row))
        if site.name != STATE or whole:
            yield row, slice(0, question.length), place.output
            continue
        for position in question.positions:
            yield row, slice(position, position + 1), place[position].output


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
            len(question.metrics), len(question.windows), question.length, dtype=torch.float64
        )
        self.metric = 0  # whose gradient is being taken

    def add(self, embeddings: Tensor | None) -> Tensor:
        """Add the slopes at ``embeddings`` [1,L,D], or at the prompt's own; returns the metrics there [M]."""
        model, question = self.model, self.question
        with torch.enable_grad():
            with model.trace(question.tokens[PROMPT, None], use_cache=False):
                if embeddings is not None:
                    model.embeddings.output = embeddings
                start = model.embeddings.output
                if not start.requires_grad:
                    start.requires_grad_()
                nnsight.save(start)
                for row, positions, value in places(model, question, whole=False):
                    value.register_hook(self.slope(row, positions, value.detach()))
                logits = model.lm_head.output[:, question.looked_at].save()
            logits = logits[:, 0] if question.single else logits
            found = [measured(metric, logits) for metric in question.metrics.values()]
            for number, (name, value) in enumerate(zip(question.metrics, found, strict=True)):
                if not value.requires_grad:
                    raise MetricError(f"{name} has no gradient, so nothing can be said to first order")
                self.metric = number
                # With respect to where the run starts: no gradient of a weight is made.
                torch.autograd.grad(value.sum(), start, retain_graph=number + 1 < len(found))
        return torch.stack([value.detach().cpu() for value in found])[:, 0]

    def slope(self, row: int, positions: slice, here: Tensor) -> Any:
        """What adds up the slopes at one place when its gradient comes, where its value is ``here``."""
        source = self.source[row][positions]  # [k,...]
        difference = source - (here.view_as(source) if self.prompt is None else self.prompt[row][positions])

        def add(gradient: Tensor) -> None:
            slopes = (gradient.reshape(source.shape) * difference).flatten(1).double().sum(1)  # [k]
            self.sum[self.metric, row, positions] += slopes.cpu()

        return add
