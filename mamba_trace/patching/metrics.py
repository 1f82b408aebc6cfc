"""What an experiment measures: one number for each row, from the logits.

A metric is a function from the logits at one position [B,V] (or at several, [B,m,V]) to [B]. Any function
will do; the ones here are usual and differentiable, and their names say in a picture what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments.prompts import describe, single_token
from ..errors import MetricError, PromptError

if TYPE_CHECKING:
    from ..model import MambaTrace

#: Logits at the last position [B,V] -> one number for each row [B].
Metric = Callable[[Tensor], Tensor]


def logit_diff(model: MambaTrace, answer: str | int, wrong: str | int) -> Metric:
    """The logit of one token minus the logit of another, which the experiments of the literature measure.

    Args:
        model: the model whose tokenizer turns strings into tokens.
        answer, wrong: strings that are one token each (mind their leading space), or token ids.

    Returns:
        A function from logits [...,V] to differences [...].

    Raises:
        PromptError: if either is not one token of the vocabulary, or both are the same.

    Example::

        metric = logit_diff(model, " Emma", " Shelby")
    """
    plus, minus = single_token(model, answer), single_token(model, wrong)
    if plus == minus:
        raise PromptError(f"answer and wrong are both {answer!r} (token {plus}), so their logits never differ")
    return LogitDiff(f"logit of {answer!r} minus logit of {wrong!r}", plus, minus)


def logit(model: MambaTrace, answer: str | int) -> Metric:
    """The logit of one token.

    Args:
        model: the model whose tokenizer turns strings into tokens.
        answer: a string that is one token, or a token id.

    Returns:
        A function from logits [...,V] to logits [...].

    Raises:
        PromptError: if it is not one token of the vocabulary.

    Example::

        metric = logit(model, " Emma")
    """
    return Logit(f"logit of {answer!r}", single_token(model, answer))


def log_prob(model: MambaTrace, answer: str | int) -> Metric:
    """The log probability of one token in nats; arguments, shapes and errors as `logit`.

    Example::

        metric = log_prob(model, " Emma")
    """
    return LogProb(f"log probability of {answer!r}", single_token(model, answer))


def prob(model: MambaTrace, answer: str | int) -> Metric:
    """The probability of one token; arguments, shapes and errors as `logit`.

    Example::

        metric = prob(model, " Emma")
    """
    return Prob(f"probability of {answer!r}", single_token(model, answer))


@dataclass(frozen=True)
class Logit:
    """The logit of a token, from logits [...,V] to [...]. Unlike a closure, it can be sent to a server.

    Attributes:
        name: what is measured, in words.
        token: the token's id.
    """

    name: str
    token: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those whose logits are all that it looks at; none where it looks at all."""
        return (self.token,) if type(self) is Logit else ()

    def among(self, tokens: list[int]) -> Logit:
        """The same of the logits of some ``tokens`` [...,tokens]."""
        return replace(self, token=tokens.index(self.token))

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[..., self.token]


class LogProb(Logit):
    """The log probability of a token."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[..., self.token]


class Prob(Logit):
    """The probability of a token."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)[..., self.token]


@dataclass(frozen=True)
class LogitDiff(Logit):
    """The logit of a token minus the logit of another, ``minus``."""

    minus: int

    @property
    def tokens(self) -> tuple[int, ...]:
        return (self.token, self.minus) if type(self) is LogitDiff else ()

    def among(self, tokens: list[int]) -> Logit:
        return replace(self, token=tokens.index(self.token), minus=tokens.index(self.minus))

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[..., self.token] - logits[..., self.minus]


def of_few_logits(metrics: Mapping[str, Metric]) -> tuple[list[int], dict[str, Metric]] | None:
    """The tokens whose logits are all that ``metrics`` look at, and the same metrics of those logits [...,tokens].

    ``None`` if they look at more, or nobody can know.

    Example::

        tokens, metrics = of_few_logits({"difference": logit_diff(model, " Emma", " Shelby")})
        metrics["difference"](torch.rand(9, len(tokens)))  # [9]
    """
    known = {name: metric for name, metric in metrics.items() if isinstance(metric, Logit) and metric.tokens}
    if len(known) < len(metrics):
        return None
    tokens = sorted({token for metric in known.values() for token in metric.tokens})
    return tokens, {name: metric.among(tokens) for name, metric in known.items()}


def name_of(metric: Metric) -> str:
    """The name of a metric in pictures."""
    return getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__


def named_metrics(metric: Metric | Mapping[str, Metric] | None, caller: str) -> dict[str, Metric]:
    """One or several metrics, by name. Raises `MetricError` for anything that cannot be called."""
    if callable(metric):
        return {name_of(metric): metric}
    if not isinstance(metric, Mapping) or not metric or not all(map(callable, metric.values())):
        raise MetricError(
            f"{caller} needs a metric, a function from logits [B,V] to [B], or a dict of several, not "
            f"{metric!r}: metric=logit_diff(model, answer, wrong) is one"
        )
    return dict(metric)


def measured(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's values for logits [B,V] or [B,m,V], in float32 or better: [B]. Raises `MetricError`."""
    values = metric(logits)
    dense = isinstance(values, Tensor) and values.layout == torch.strided and values.is_meta == logits.is_meta
    if not dense or values.shape != logits.shape[:1] or values.is_complex():
        axes = "[B,V]" if logits.dim() == 2 else "[B,m,V]"
        each = isinstance(values, Tensor) and logits.dim() == 3 and values.shape == logits.shape[:2]
        hint = ". To average over the m positions: lambda logits: metric(logits).mean(-1)" if each else ""
        raise MetricError(
            f"a metric takes the logits it looks at {axes} and returns one number for each row [B]; "
            f"for {describe(logits)} this one returned {describe(values)}{hint}"
        )
    return values if values.dtype.itemsize >= 4 and values.is_floating_point() else values.float()
