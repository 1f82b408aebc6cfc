"""Lenses: what a model would say of each token if it stopped early, and what its state says by itself.

Between the layers of a Mamba there is nothing but the residual stream, and the final norm and the
unembedding read from it alone. So they can read it early, after any layer (the logit lens), and they can read
a single term of it: here what the state of a layer writes at a position, without the D term, the other layers
and the embedding (the state lens). `logit_lens` and `state_lens` do this for every layer and position of a
prompt, in one trace, and hold the vocabulary's logits of one layer at a time. Of them the results keep the
token asked for and the tokens with the largest.

The two count differently. After each layer the logit lens applies the final norm to the stream as it is
there, so its last row is the model's own prediction. The state lens freezes the norm's scale to what it was
at the end of the run, as in direct logit attribution, so its values add up, over layers and with the other
terms, to the model's logits.

Source: logit lens, nostalgebraist (2020), "interpreting GPT: the logit lens"; direct logit attribution,
Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; state, gate and output, Mamba
(arXiv 2312.00752), section 3.4 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments.prompts import prompt_tokens, single_token, token_strings
from .arguments.run_arguments import refuse_inside_a_trace
from .arguments.selection import layer_numbers
from .errors import PromptError
from .modeling.effective import epsilon_of, input_dtype, norm_weight, without_bias
from .results.heatmap import Heatmap
from .results.results import Result

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["LogitLens", "StateLens", "logit_lens", "state_lens"]


@dataclass(frozen=True, eq=False)
class Lens(Result):
    """What both lenses return. C is the number of rows, K the number of tokens kept of each cell.

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

    def _drawn(self, title: str, value_title: str, values: Tensor, top_values: Tensor) -> Heatmap:
        """The heatmap of ``values`` [C,L]; its cells name the first token unless one was asked for.

        Args:
            title, value_title, values: as of `Heatmap`.
            top_values: the same of ``top_ids`` [C,L,K], for who points at a cell.
        """
        n_rows, length, kept = self.top_ids.shape
        flat = zip(self.top_tokens, top_values.flatten().tolist(), strict=True)
        said = [(token, f"{token!r} {value:+.4g}") for token, value in flat]
        cells = [
            [said[kept * cell : kept * (cell + 1)] for cell in range(length * row, length * (row + 1))]
            for row in range(n_rows)
        ]
        heatmap = Heatmap(
            values=values,
            title=title,
            row_title="layer",
            row_labels=self.row_labels,
            column_title="Position",
            column_labels=[f"{token}_{position}" for position, token in enumerate(self.tokens)],
            texts=[[cell[0][0] for cell in row] for row in cells] if self.token is None else None,
            prompt_tokens=self.tokens,
            value_title=value_title,
        )
        hover = [
            ["\n".join([place, *(line for _, line in cell)]) for place, cell in zip(places, row, strict=True)]
            for places, row in zip(heatmap.hover_texts(), cells, strict=True)
        ]
        return replace(heatmap, hover=hover)


@dataclass(frozen=True, eq=False)
class LogitLens(Lens):
    """The result of `logit_lens`: see `Lens`, of which the last row are the model's own logits.

    Attributes:
        probabilities: [C,L]: the probability of ``token``, or of the first of ``top_ids`` without one.
        top_probabilities: [C,L,K]: those of ``top_ids``.
    """

    probabilities: Tensor
    top_probabilities: Tensor

    def heatmaps(self) -> list[Heatmap]:
        """One picture: the probabilities, layers by positions.

        Example::

            logit_lens(model, prompt).heatmaps()[0].values  # [n_layers+1,L]
        """
        what = "the most probable next token" if self.token is None else repr(self.token)
        title = f"Logit lens: probability of {what}"
        return [self._drawn(title, "probability", self.probabilities, self.top_probabilities)]


@dataclass(frozen=True, eq=False)
class StateLens(Lens):
    """The result of `state_lens`: see `Lens`, whose logits are here what the state adds to the model's."""

    def heatmaps(self) -> list[Heatmap]:
        """One picture: the logits, layers by positions.

        Example::

            state_lens(model, prompt, layer=1).heatmaps()[0].values  # [1,L]
        """
        what = "the token it raises most" if self.token is None else repr(self.token)
        title = f"State lens: what the state adds to the logit of {what}"
        return [self._drawn(title, "logit", self.logits, self.top_logits)]


def logit_lens(
    model: MambaTrace, prompt: str | Tensor, *, token: str | int | None = None, top: int = 1
) -> LogitLens:
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
        PromptError: before anything runs, if these are no single prompt, no single token, or ``top`` is not
            from 1 to V.
        RuntimeError: inside a trace.

    Example::

        lens = logit_lens(model, prompt, token=" Emma")
        lens.probabilities[-1, -1]  # that of the model itself
        lens = logit_lens(model, prompt, top=3)
        lens.top_tokens[-3:]  # the model's answer, and the two behind it
    """
    refuse_inside_a_trace(model, "logit_lens")
    tokens, chosen = prompt_tokens(model, "prompt", prompt), wanted_token(model, token)
    cells = Cells(chosen, checked_top(model, top), probable=True)
    with torch.no_grad(), model.trace(tokens, use_cache=False) as tracer:
        cells.add(vocabulary_logits(model, model.norm_f(model.embeddings.output)))
        for layer in model.layers:
            cells.add(vocabulary_logits(model, model.norm_f(layer.resid_post.output)))
        tracer.stop()
    rows = ["embedding", *map(str, range(len(model.layers)))]
    return LogitLens(
        **cells.fields(model, tokens, rows),
        probabilities=torch.stack(cells.probabilities),
        top_probabilities=torch.stack(cells.top_probabilities),
    )


def state_lens(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int | Sequence[int] | None = None,
    *,
    token: str | int | None = None,
    top: int = 1,
) -> StateLens:
    """What the state of each layer, read at each position, adds to the logits there.

    At position p the state writes ``out_proj(C_p h_p * SiLU(skip_p))`` into the residual stream: what the
    layer writes but for the term of D and any bias. Its logits are those of that term of the final stream,
    with the scale of the final norm frozen to what it was: over all layers they add up, with the terms of D,
    the biases and the embedding, to the model's logits, as in `ActivationCache.logit_attrs`.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        layer: one or several; ``None`` for all.
        token: whose logit to return: a string that is one token, or an id; ``None`` for the token that each
            cell raises most.
        top: how many of the tokens raised most to keep.

    Returns:
        A row for each layer: [C,L].

    Raises:
        PromptError: before anything runs, if these are no single prompt, no single token, or ``top`` is not
            from 1 to V.
        LayerError: likewise, if the model has no such layer.
        RuntimeError: inside a trace.

    Example::

        lens = state_lens(model, prompt, token=" Emma")
        lens.logits[:, -1].sum()  # what all states together add to the logit of " Emma"
        lens = state_lens(model, prompt, layer=1, top=3)
        lens.top_tokens[-3:]  # what the state of layer 1 raises at the last position
    """
    refuse_inside_a_trace(model, "state_lens")
    tokens, chosen = prompt_tokens(model, "prompt", prompt), wanted_token(model, token)
    cells = Cells(chosen, checked_top(model, top))
    layers = layer_numbers(model, layer)
    norm = FrozenNorm(model)
    with torch.no_grad(), model.trace(tokens, use_cache=False) as tracer:
        for one in layers:
            written = norm.weigh(written_by_state(model.layers[one].ssm))  # [1,L,D]
            cells.add(vocabulary_logits(model, written, whole=False))
        norm.freeze(model.layers[-1].resid_post.output)
        tracer.stop()
    cells.multiply(norm.scale)
    return StateLens(**cells.fields(model, tokens, [str(one) for one in layers]))


# -- inside the trace --------------------------------------------------------------------------------------


def vocabulary_logits(model: MambaTrace, normed: Tensor, whole: bool = True) -> Tensor:
    """The unembedding [L,V] of a normed stream [1,L,D], in float32 or better.

    Args:
        model: the model, in a trace.
        normed: the stream, or a term of it.
        whole: whether it is the stream: a bias of the unembedding is no part of what a term adds.
    """
    head = model.lm_head._module
    normed = normed.to(input_dtype(head))
    logits = (model.lm_head(normed) if whole else without_bias(head, model.lm_head, normed))[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def written_by_state(ssm: Any) -> Tensor:
    """What the state of a mixer writes into the residual stream [1,L,D]."""
    skip = ssm.skip.output  # [1,L,E]
    y = ssm.y.output
    gated = (y * F.silu(skip.to(y.dtype))).to(skip.dtype)
    # Whatever out_proj is by now, an adapter included, its bias is what it makes of zeros.
    return ssm.out_proj(gated) - ssm.out_proj(torch.zeros_like(gated[:, :1]))


class FrozenNorm:
    """The final norm as a linear map: its weight at once, its scale when the stream it divides is there."""

    def __init__(self, model: MambaTrace) -> None:
        model.dispatch()
        model._follow()
        norm: Any = model.norm_f._module
        self.weight, self.epsilon = norm_weight(norm, model.config.hidden_size), epsilon_of(norm)  # [D]
        self.scale = torch.ones((), dtype=torch.float32, device="cpu")

    def weigh(self, written: Tensor) -> Tensor:
        """A term of the stream [1,L,D] times the weight, in float32 or better."""
        return written.to(torch.promote_types(written.dtype, torch.float32)) * self.weight.to(written.device)

    def freeze(self, stream: Tensor) -> None:
        """Take the scale [L] of the final stream [1,L,D]."""
        wide = stream[0].to(torch.promote_types(stream.dtype, torch.float32))
        self.scale = (wide.pow(2).mean(-1) + self.epsilon).rsqrt().cpu()


class Cells:
    """What is kept of the vocabulary's logits, row by row.

    Args:
        chosen: the token asked for, or ``None``.
        top: how many tokens to keep of each cell.
        probable: keep probabilities, too.
    """

    def __init__(self, chosen: int | None, top: int, probable: bool = False) -> None:
        self.chosen, self.top, self.probable = chosen, top, probable
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
        """Multiply every logit at a position with ``factor`` [L], which is positive."""
        self.logits = [one * factor for one in self.logits]
        self.top_logits = [one * factor[:, None] for one in self.top_logits]

    def fields(self, model: MambaTrace, tokens: Tensor, rows: list[str]) -> dict[str, Any]:
        """The fields of `Lens`."""
        ids = torch.stack(self.top_ids)  # [C,L,K]
        return {
            "logits": torch.stack(self.logits),
            "top_ids": ids,
            "top_logits": torch.stack(self.top_logits),
            "top_tokens": strings_of(model, ids.flatten()),
            "token": None
            if self.chosen is None
            else token_strings(model, ids.new_tensor([[self.chosen]]))[0],
            "tokens": token_strings(model, tokens),
            "row_labels": rows,
        }


def strings_of(model: MambaTrace, ids: Tensor) -> list[str]:
    """The string of each of many tokens [n], each decoded once."""
    unique, places = ids.unique(return_inverse=True)
    strings = token_strings(model, unique[None])
    return [strings[place] for place in places.tolist()]


# -- what was asked for ------------------------------------------------------------------------------------


def wanted_token(model: MambaTrace, token: str | int | None) -> int | None:
    """The id of a token. Raises `PromptError`."""
    return None if token is None else single_token(model, token)


def checked_top(model: MambaTrace, top: int) -> int:
    """``top``. Raises `PromptError` where the vocabulary has not as many tokens."""
    size = model.config.vocab_size
    if not 1 <= top <= size:
        raise PromptError(f"top={top}: a lens keeps from 1 to {size} tokens, the size of the vocabulary")
    return top
