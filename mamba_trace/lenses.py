"""Lenses: what a model would say of each token if it stopped early, and what its state says by itself.

The layers of a Mamba communicate through the residual stream alone, as do those of a hybrid, and the final norm and
the unembedding read from it. So they can read it early, after any layer (the logit lens), and they can read a
single term of it: here what the state of a layer writes at a position, without the D term, the other layers and
the embedding (the state lens). `logit_lens` and `state_lens` do this for every layer and position of a prompt, in
one trace, and hold the vocabulary's logits of one layer at a time. The results keep the logits of the token
asked for and of the tokens with the largest logits.

The lenses differ in the scale of the final norm. The logit lens applies the norm to the stream as it is after
each layer, so its last row is the model's own prediction. The state lens freezes the norm's scale to what it
was at the end of the run, as in direct logit attribution, so its values add up, over layers and with the
other terms, to the model's logits.

Source: logit lens, nostalgebraist (2020), "interpreting GPT: the logit lens"; direct logit attribution,
Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; state, gate and output, Mamba
(arXiv 2312.00752), section 3.4 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import nnsight
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments.prompts import prompt_tokens, single_token, token_strings
from .arguments.selection import SSM, layer_numbers
from .errors import ArgumentError
from .modeling.block import times
from .modeling.effective import FrozenNorm, input_dtype, logits_factor, normed_in, ssm_factor, without_bias
from .results.heatmap import Heatmap
from .results.made import made_by
from .results.result import Result
from .tracing.frames import users_errors
from .tracing.one_run import refuse_inside_a_trace

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["LogitLens", "StateLens", "logit_lens", "state_lens"]


@dataclass(frozen=True, eq=False)
class Lens(Result):
    """What both lenses return. C is the number of rows, K the number of tokens kept for each cell.

    Attributes:
        logits: [C,L] float32 or better: the logit of ``token``, or of the first of ``top_ids`` without one.
        top_ids: [C,L,K] int64: the tokens with the largest logits, the largest first.
        top_logits: [C,L,K]: their logits.
        top_tokens: their strings, in the order of ``top_ids.flatten()``.
        token: the string of the token asked for, or ``None``.
        tokens: the string of the prompt's token at each position.
        row_labels: ``"embedding"`` or a layer, for each row.
    """

    logits: Tensor
    top_ids: Tensor
    top_logits: Tensor
    top_tokens: list[str]
    token: str | None
    tokens: list[str]
    row_labels: list[str]

    def _drawn(self, values: Tensor, top_values: Tensor, **words: Any) -> Heatmap:
        # The heatmap of values [C,L] under the given title. Each cell names its first token, unless a token
        # was asked for, and lists top_values [C,L,K], the same quantity of top_ids, when pointed at.
        shape = self.top_ids.shape
        tokens = np.array(self.top_tokens, dtype=object).reshape(shape).tolist()
        heatmap = Heatmap(
            values=values,
            row_title="layer",
            row_labels=self.row_labels,
            column_labels=[f"{token}_{position}" for position, token in enumerate(self.tokens)],
            texts=[[cell[0] for cell in row] for row in tokens] if self.token is None else None,
            prompt_tokens=self.tokens,
            **words,
        )
        hover = [
            [
                "\n".join([place, *(f"{token!r} {value:+.4g}" for token, value in zip(*cell, strict=True))])
                for place, *cell in zip(*row, strict=True)
            ]
            for row in zip(heatmap.hover_texts(), tokens, top_values.tolist(), strict=True)
        ]
        return replace(heatmap, hover=hover)


@dataclass(frozen=True, eq=False)
class LogitLens(Lens):
    """The result of `logit_lens`: see `Lens`. The last row are the model's own logits.

    Attributes:
        probabilities: [C,L]: the probability of ``token``, or of the first of ``top_ids`` without one.
        top_probabilities: [C,L,K]: the probabilities of ``top_ids``.
    """

    probabilities: Tensor
    top_probabilities: Tensor

    def heatmaps(self) -> list[Heatmap]:
        """One picture: the probabilities, layers by positions.

        Example::

            logit_lens(model, prompt).heatmaps()[0].values  # [n_layers+1,L]
        """
        what = "the most probable next token" if self.token is None else repr(self.token)
        words = {"title": f"Logit lens: probability of {what}", "value_title": "probability"}
        return [self._drawn(self.probabilities, self.top_probabilities, signed=False, **words)]


@dataclass(frozen=True, eq=False)
class StateLens(Lens):
    """The result of `state_lens`: see `Lens`. The logits are what the state adds to the model's logits."""

    def heatmaps(self) -> list[Heatmap]:
        """One picture: the logits, layers by positions.

        Example::

            state_lens(model, prompt, layer=1).heatmaps()[0].values  # [1,L]
        """
        what = "the token it raises most" if self.token is None else repr(self.token)
        title = f"State lens: what the state adds to the logit of {what}"
        return [self._drawn(self.logits, self.top_logits, title=title, value_title="logit")]


@users_errors
def logit_lens(model: MambaTrace, prompt: str | Tensor, *, token: str | int | None = None, top: int = 1) -> LogitLens:
    """What the model would predict at each position if it ended after the embedding, or after each layer.

    Each residual stream goes through the final norm and the unembedding, as the last one does.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        token: whose logit and probability to return: a string that is one token, or an id; ``None`` for
            the most probable token of each cell.
        top: how many of the most probable tokens to keep.

    Returns:
        Rows ``"embedding"``, ``"0"``, ``"1"``, ...: [n_layers+1,L].

    Raises:
        PromptError: before anything runs, if this is not one prompt or not one token.
        ArgumentError: if ``top`` is not from 1 to V.
        RuntimeError: inside a trace.

    Example::

        lens = logit_lens(model, prompt, token=" Emma")
        lens.probabilities[-1, -1]  # that of the model itself
        lens = logit_lens(model, prompt, top=3)
        lens.top_tokens[-3:]  # the model's answer, and the two behind it
    """
    refuse_inside_a_trace(model, "logit_lens")
    tokens = prompt_tokens(model, "prompt", prompt)
    cells = Cells(model, token, top, probable=True)
    with torch.no_grad(), model.trace(tokens, use_cache=False) as tracer:
        cells.add(vocabulary_logits(model, model.norm_f(model.layers[0].resid_pre.output)))
        for layer in model.layers:
            cells.add(vocabulary_logits(model, model.norm_f(layer.resid_post.output)))
        tracer.stop()
    rows = ["embedding", *map(str, range(len(model.layers)))]
    return LogitLens(
        **cells.fields(tokens, rows),
        probabilities=torch.stack(cells.probabilities),
        top_probabilities=torch.stack(cells.top_probabilities),
    )


@users_errors
def state_lens(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int | Sequence[int] | None = None,
    *,
    token: str | int | None = None,
    top: int = 1,
) -> StateLens:
    """What the state of each layer, read at each position, adds to the logits there.

    At position p the state writes ``out_proj(C_p h_p * SiLU(skip_p))`` into the residual stream, times the factor
    that some hybrids have: all that the mixer writes except the term of D and any bias. In Mamba-2 the mixer's own
    RMSNorm stands between the gate and out_proj (in some hybrids before the gate, in some there is none); its
    scales, one for each group, are frozen to their values in the run. The logits of that term are computed with the
    scale of the final norm frozen in the same way. Over all layers they add up, with the terms of D, the biases,
    the embedding and, in a hybrid, what attention and MLPs write, to the model's logits, as in
    `ActivationCache.logit_attrs`.

    Args:
        model, prompt: as in `logit_lens`.
        layer: one or several, which have an SSM; ``None`` for all that do.
        token: whose logit to return; ``None`` for the token that each cell raises most.
        top: how many of the tokens raised most to keep.

    Returns:
        A row for each layer: [C,L].

    Raises:
        PromptError, ArgumentError, RuntimeError: as `logit_lens`.
        LayerError: before anything runs, if the model has no such layer.
        UnknownSiteError: before anything runs, if a layer has no SSM, saying which do.

    Example::

        lens = state_lens(model, prompt, token=" Emma")
        lens.logits[:, -1].sum()  # what all states together add to the logit of " Emma"
        lens = state_lens(model, prompt, layer=1, top=3)
        lens.top_tokens[-3:]  # what the state of layer 1 raises at the last position
    """
    refuse_inside_a_trace(model, "state_lens")
    tokens = prompt_tokens(model, "prompt", prompt)
    cells = Cells(model, token, top)
    layers = layer_numbers(model, layer, SSM)
    model.dispatch()
    model._follow()
    norm = FrozenNorm.of(model.norm_f._module, model.config.hidden_size)
    inner = {number: FrozenNorm.inside(model.layers[number].ssm._module) for number in layers}
    with torch.no_grad(), model.trace(tokens, use_cache=False) as tracer:
        for number in layers:
            block = model.layers[number]
            written = times(wide(written_by_state(block.ssm, inner[number])), ssm_factor(block._module))  # [1,L,D]
            cells.add(vocabulary_logits(model, written * norm.weight.to(written.device), whole=False))
        stream = model.layers[-1].resid_post.output[0]  # [L,D]
        scale = nnsight.save(norm.scale(stream)[:, 0].cpu())  # [L]
        tracer.stop()
    cells.multiply(scale)
    return StateLens(**cells.fields(tokens, [str(number) for number in layers]))


# -- inside the trace --------------------------------------------------------------------------------------


def vocabulary_logits(model: MambaTrace, normed: Tensor, whole: bool = True) -> Tensor:
    """The unembedding [L,V] of a normed stream [1,L,D], in float32 or better.

    Args:
        model: the model, in a trace.
        normed: the stream, or a term of it.
        whole: whether it is the whole stream. A term of it adds no bias of the unembedding.
    """
    head = model.lm_head._module
    normed = normed.to(input_dtype(head))
    logits = (model.lm_head(normed) if whole else without_bias(head, model.lm_head, normed))[0]
    return times(wide(logits), logits_factor(model._module))


def written_by_state(ssm: Any, norm: FrozenNorm | None) -> Tensor:
    """What the state of a mixer adds to its output [1,L,D].

    Args:
        ssm: the mixer, in a trace.
        norm: its own norm, if it has one.
    """
    skip = ssm.skip.output  # [1,L,E]
    y = ssm.y.output
    gated = y * F.silu(skip.to(y.dtype))
    if norm is not None:
        gated = gated * norm.factors(getattr(ssm, normed_in(ssm._module)).output).to(gated)
    gated = gated.to(skip.dtype)
    # Whatever out_proj is, even with an adapter, its bias is its output for zeros.
    return ssm.out_proj(gated) - ssm.out_proj(torch.zeros_like(gated[:, :1]))


def wide(value: Tensor) -> Tensor:
    """A value in float32 or better."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Cells:
    """What is kept of the vocabulary's logits, row by row.

    Args:
        model: the model.
        token: the token asked for: a string, an id, or ``None``.
        top: how many tokens to keep for each cell.
        probable: keep probabilities, too.

    Raises:
        PromptError: if ``token`` is not a single token.
        ArgumentError: if ``top`` is not from 1 to V.
    """

    def __init__(self, model: MambaTrace, token: str | int | None, top: int, probable: bool = False) -> None:
        self.model, self.top, self.probable = model, top, probable
        self.chosen = None if token is None else single_token(model, token)
        size = model.config.vocab_size
        if type(top) is not int or not 1 <= top <= size:
            raise ArgumentError(f"top={top!r}: a lens keeps from 1 to {size} tokens, the size of the vocabulary")
        self.logits: list[Tensor] = []  # [L] each
        self.top_ids: list[Tensor] = []  # [L,K] each
        self.top_logits: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.top_probabilities: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Keep a row of the logits [L,V]."""
        largest, ids = logits.topk(self.top)  # [L,K]
        asked = largest[:, 0] if self.chosen is None else logits[:, self.chosen]  # [L]
        self.logits.append(asked.cpu())
        self.top_logits.append(largest.cpu())
        self.top_ids.append(ids.cpu())
        if self.probable:
            total = logits.logsumexp(-1)  # [L]
            self.probabilities.append((asked - total).exp().cpu())
            self.top_probabilities.append((largest - total[:, None]).exp().cpu())

    def multiply(self, factor: Tensor) -> None:
        """Multiply every logit at a position by ``factor`` [L], which is positive."""
        self.logits = [row * factor for row in self.logits]
        self.top_logits = [row * factor[:, None] for row in self.top_logits]

    def fields(self, tokens: Tensor, rows: list[str]) -> dict[str, Any]:
        """The fields of `Lens`, for a prompt's token ids [1,L]."""
        ids = torch.stack(self.top_ids)  # [C,L,K]
        unique, places = ids.unique(return_inverse=True)  # each token is decoded once
        strings = token_strings(self.model, unique[None])
        chosen = None if self.chosen is None else ids.new_tensor([[self.chosen]])
        return {
            "logits": torch.stack(self.logits),
            "top_ids": ids,
            "top_logits": torch.stack(self.top_logits),
            "top_tokens": [strings[place] for place in places.flatten().tolist()],
            "token": None if chosen is None else token_strings(self.model, chosen)[0],
            "tokens": token_strings(self.model, tokens),
            "row_labels": rows,
            "made": made_by(self.model),
        }
