"""Activation patching: which layer, at which position, holds what makes the model answer as it does.

Two prompts of the same length differ in a token or two, and the model answers them differently. A site's
value at one layer and position is taken from the run on one (``source``) and put into the run on the other
(``prompt``). Where the answer follows, the information was there. `patch_grid` asks this of every layer and
position at once.

Every cell is the result of an ordinary trace: a batch holds ``source`` in row 0 and ``prompt`` in all others,
one row for each position, and the site's value is copied from row 0 into each row at that row's position. So
no activations are kept between runs, and memory grows with ``batch_size`` alone.

Source: activation patching as in Vig et al. (arXiv 2004.12265) and Meng et al. (arXiv 2202.05262).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import names
from .errors import FileError, MetricError, PositionError, PromptError, UnknownSiteError
from .plotting import Heatmap, check_writable, plotly_figure, write_png
from .sites import BY_HOOK, BY_NAME, SITES, STATE, Site, describe_axes

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from .model import MambaTrace

#: Logits at the last position [B,V] -> one number for each row [B].
Metric = Callable[[Tensor], Tensor]
#: The sites a grid can be made of.
POSITIONAL = tuple(site.name for site in SITES if "L" in site.axes)


def logit_diff(model: MambaTrace, answer: str | int, wrong: str | int) -> Metric:
    """The metric of the seed experiments: the logit of one token minus that of another.

    Args:
        model: whose tokenizer turns strings into tokens.
        answer: a string that is one token (mind its leading space), or a token id.
        wrong: likewise.

    Returns:
        A function from logits [B,V] to differences [B].

    Raises:
        PromptError: if either is not one token of the vocabulary, or both are the same.

    Example::

        metric = logit_diff(model, " Emma", " Shelby")
    """
    plus, minus = single_token(model, answer), single_token(model, wrong)
    if plus == minus:
        raise PromptError(f"answer and wrong are both {answer!r} (token {plus}), so their logits never differ")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, plus] - logits[:, minus]  # [B]

    metric.__name__ = f"logit of {answer!r} minus logit of {wrong!r}"
    return metric


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The result of `patch_grid`.

    Attributes:
        values: [rows, L] float32: the metric of the run on ``prompt`` with the site's value at (row, position)
            taken from the run on ``source``. Rows are layers, or one for a site of the whole model.
        prompt_metric: the metric of the run on ``prompt``, nothing patched.
        source_metric: the metric of the run on ``source``.
        site: the site's name.
        metric: the metric's name.
        row_labels: the layers, or the site's name where it belongs to no layer.
        prompt_tokens, source_tokens: the string of the token at each position.
    """

    values: Tensor
    prompt_metric: float
    source_metric: float
    site: str
    metric: str
    row_labels: list[str]
    prompt_tokens: list[str]
    source_tokens: list[str]

    @property
    def labels(self) -> list[str]:
        """A label for each position: ``" school_8"``, or ``" Shelby-> Emma_10"`` where the prompts differ."""
        pairs = zip(self.prompt_tokens, self.source_tokens, strict=True)
        return [f"{p if p == s else f'{p}->{s}'}_{position}" for position, (p, s) in enumerate(pairs)]

    def normalized(self) -> Tensor:
        """The values on the scale where 0 is the metric of the run on prompt, and 1 that of the run on source.

        Returns:
            [rows, L] float32.

        Raises:
            MetricError: if the two runs have the same metric.
        """
        if math.isclose(self.prompt_metric, self.source_metric, rel_tol=1e-6):
            raise MetricError(
                f"prompt and source have the same metric ({self.metric}: {self.prompt_metric:+.6g}), so there is no "
                f"scale between them. Use prompts that the model answers differently, or look at .values"
            )
        return (self.values - self.prompt_metric) / (self.source_metric - self.prompt_metric)

    def figure(self) -> Figure:
        """The normalised grid as a plotly figure; ``grid.figure().write_html("h.html")`` keeps it.

        Raises:
            MissingExtraError: if plotly is not installed.
            MetricError: as `normalized`.
        """
        return plotly_figure(self.heatmap())

    def heatmap(self) -> Heatmap:
        """What the figure, the PNG and the table of the command line are drawn from."""
        site = BY_NAME[self.site]
        title = (
            f"Normalised metric after patching {site.name} ({site.hook})\n"
            f"{self.metric}: {self.prompt_metric:+.3f} on prompt (0), {self.source_metric:+.3f} on source (1)"
        )
        return Heatmap(
            values=self.normalized(),
            title=title,
            row_title="site" if site.scope == "model" else "layer",
            row_labels=self.row_labels,
            labels=self.labels,
            prompt_tokens=self.prompt_tokens,
            source_tokens=self.source_tokens,
        )

    def save(self, path: str | Path) -> Path:
        """Write ``.html`` (interactive, self-contained), ``.png``, or ``.json``, which `load` reads back.

        Raises:
            FileError: for another suffix, or where the file cannot be written.
            MissingExtraError: if the library that draws it is not installed.
        """
        path = check_writable(path)
        try:
            if path.suffix == ".html":
                self.figure().write_html(path, include_plotlyjs=True)
            elif path.suffix == ".png":
                write_png(self.heatmap(), path)
            else:
                content = {**asdict(self), "labels": self.labels, "values": self.values.tolist()}
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> PatchGrid:
        """The grid that `save` wrote as ``.json``, equal to the last bit.

        Raises:
            FileError: if there is no such file, or it holds no grid.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            content.pop("labels")
            return cls(**{**content, "values": torch.tensor(content["values"], dtype=torch.float32)})
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is no grid saved as .json by PatchGrid.save: {error}") from error


def patch_grid(
    model: MambaTrace,
    prompt: str | Tensor,
    source: str | Tensor,
    site: str = "h",
    metric: Metric | None = None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> PatchGrid:
    """Patch a site from the run on ``source`` into the run on ``prompt``, at every layer and position in turn.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        source: likewise, of as many tokens.
        site: a site's name or hook name: ``"h"``, ``"resid_pre"``, ``"hook_conv"``, ... ``h`` is the state carried
            on from a position, so patching it acts on everything after, too.
        metric: from the logits at the last position [B,V] to [B]; see `logit_diff`.
        batch_size: how many positions one forward patches, each in a row of its own.
        progress: show a progress bar on stderr.

    Returns:
        The grid: [n_layers, L], or [1, L] for a site of the whole model (embeddings, norm_f, lm_head).

    Raises:
        PromptError: before anything runs, if the prompts are not two single prompts of one length.
        UnknownSiteError: if there is no such site.
        PositionError: if the site has no positions.
        MetricError: if the metric does not return one number for each row.

    Example::

        grid = patch_grid(model, prompt, source, "resid_pre", logit_diff(model, " Emma", " Shelby"))
        grid.figure().show()
    """
    where = find_site(site)
    tokens, source_tokens = matching_tokens(model, prompt, source)  # [1,L] each
    metric = checked_metric(metric)
    if batch_size < 1:
        raise PromptError(f"batch_size={batch_size}: a forward patches at least one position")
    layers = [None] if where.scope == "model" else list(range(len(model.layers)))
    length = tokens.shape[1]
    values = torch.empty(len(layers), length)
    with torch.no_grad(), tqdm(total=values.numel(), desc=f"patching {where.name}", disable=not progress) as bar:
        source_metric, prompt_metric = measured(metric, plain_logits(model, torch.cat((source_tokens, tokens)))).tolist()
        for row, layer in enumerate(layers):
            for positions in torch.arange(length).split(batch_size):
                batch = torch.cat((source_tokens, tokens.expand(len(positions), -1)))  # [1+k,L]
                values[row, positions] = measured(metric, patched_logits(model, batch, where, layer, positions.tolist()))
                bar.update(len(positions))
    return PatchGrid(
        values=values,
        prompt_metric=prompt_metric,
        source_metric=source_metric,
        site=where.name,
        metric=getattr(metric, "__name__", type(metric).__name__),
        row_labels=[where.name if layer is None else str(layer) for layer in layers],
        prompt_tokens=token_strings(model, tokens),
        source_tokens=token_strings(model, source_tokens),
    )


# -- running -----------------------------------------------------------------------------------------------


def plain_logits(model: MambaTrace, tokens: Tensor) -> Tensor:
    """The logits at the last position [B,V] of tokens [B,L], nothing patched."""
    with model.trace(tokens, logits_to_keep=1):
        logits = model.lm_head.output[:, -1].save()
    return logits


def patched_logits(model: MambaTrace, batch: Tensor, site: Site, layer: int | None, positions: list[int]) -> Tensor:
    """The logits at the last position where each row has the site's value of row 0 at one position.

    Args:
        model: the model.
        batch: token ids [1+k,L]: the source, then the prompt k times.
        site: the site.
        layer: its layer, or ``None`` where it has none.
        positions: k positions in ascending order, of which row i + 1 is patched at the i-th.

    Returns:
        [k,V].
    """
    place: Any = model.hook(site.path(layer))
    # The other positions' logits are not made, unless they are what is patched.
    keep = 0 if site.name == "lm_head" else 1
    with model.trace(batch, logits_to_keep=keep):
        if site.name == STATE:
            for row, position in enumerate(positions, start=1):
                h = place[position].output  # [1+k,E,N]
                h[row] = h[0]
        else:
            value = place.output  # [1+k,L,...]
            value[torch.arange(1, len(positions) + 1), positions] = value[0, positions]
        logits = model.lm_head.output[1:, -1].save()
    return logits


def checked_metric(metric: Metric | None) -> Metric:
    """``metric``, if it can be called. Raises `MetricError`."""
    if not callable(metric):
        raise MetricError(
            f"patch_grid needs a metric, a function from logits [B,V] to [B], not {metric!r}: "
            f"metric=logit_diff(model, answer, wrong) is one"
        )
    return metric


def measured(metric: Metric, logits: Tensor) -> Tensor:
    """The metric of logits [B,V], as float32 on the CPU: [B]. Raises `MetricError` for any other shape."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise MetricError(
            f"a metric takes the logits at the last position [B,V] and returns one number for each row [B]; for "
            f"{tuple(logits.shape)} this one returned {got}"
        )
    return values.detach().float().cpu()


# -- what was asked for ------------------------------------------------------------------------------------


def find_site(name: str) -> Site:
    """The site of a name or a hook name, if it has positions.

    Raises:
        UnknownSiteError: if there is none.
        PositionError: if it has no positions.
    """
    site = BY_NAME.get(name) or BY_HOOK.get(name)
    if site is None:
        known = list(POSITIONAL) + [BY_NAME[one].hook for one in POSITIONAL]
        raise UnknownSiteError(
            f"no site is called {name!r}{names.nearest(name, known)} A grid patches one of {', '.join(POSITIONAL)}, "
            f"at every layer and position"
        )
    if "L" not in site.axes:
        raise PositionError(
            f"{site.name} {describe_axes(site.axes)} has no positions to patch one by one. A grid patches one of "
            f"{', '.join(POSITIONAL)}"
        )
    return site


def single_token(model: MambaTrace, token: str | int) -> int:
    """The id of one token of the vocabulary. Raises `PromptError`."""
    if isinstance(token, str):
        return model.to_single_token(token)
    size = model.config.vocab_size
    if not 0 <= token < size:
        raise PromptError(f"token {token} is not in the vocabulary, whose ids are 0 to {size - 1}")
    return int(token)


def matching_tokens(model: MambaTrace, prompt: str | Tensor, source: str | Tensor) -> tuple[Tensor, Tensor]:
    """Both prompts' token ids [1,L], if they have one length. Raises `PromptError`."""
    tokens, source_tokens = prompt_tokens(model, "prompt", prompt), prompt_tokens(model, "source", source)
    if tokens.shape != source_tokens.shape:
        ours, theirs = token_strings(model, tokens), token_strings(model, source_tokens)
        raise PromptError(
            f"prompt has {len(ours)} tokens and source {len(theirs)}, so their positions do not correspond. "
            f"Write both with the same number:\n{aligned(ours, theirs)}"
        )
    return tokens, source_tokens


def prompt_tokens(model: MambaTrace, role: str, prompt: str | Tensor) -> Tensor:
    """The token ids [1,L] of one prompt, on the CPU. Raises `PromptError`, which calls it by its ``role``."""
    if isinstance(prompt, str):
        tokens = model.to_tokens(prompt)
        unknown = getattr(model.tokenizer, "unk_token", None)
        if unknown and unknown not in prompt and (tokens == model.tokenizer.unk_token_id).any():
            raise PromptError(
                f"{role} has words that this tokenizer does not know: {prompt!r} is {token_strings(model, tokens)}. "
                f"Use words of its vocabulary, or pass token ids [1,L]"
            )
    elif isinstance(prompt, Tensor) and not prompt.is_floating_point():
        tokens = prompt.cpu()
    else:
        raise PromptError(f"{role} must be one string or a tensor of token ids [1,L], not {describe(prompt)}")
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise PromptError(f"{role} must be one prompt [1,L], not {describe(tokens)}; make one grid for each prompt")
    if tokens.shape[1] == 0:
        raise PromptError(f"{role} is empty: {prompt!r} has no tokens")
    for token in (int(tokens.min()), int(tokens.max())):
        single_token(model, token)
    return tokens.long()


def token_strings(model: MambaTrace, tokens: Tensor) -> list[str]:
    """The string of each token of [1,L]; its id where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(token) for token in tokens[0].tolist()]
    return model.to_str_tokens(tokens)


def describe(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def aligned(ours: list[str], theirs: list[str], before: int = 3, columns: int = 12) -> str:
    """Two tokenisations above each other, from shortly before their first difference.

    >>> print(aligned(["a", " b", " c"], ["a", " c"]))
      prompt:  'a'  ' b'  ' c'
      source:  'a'        ' c'
    """
    pairs: list[tuple[str, str]] = []
    for _, start, stop, other, end in difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False).get_opcodes():
        width = max(stop - start, end - other)
        left = [repr(token) for token in ours[start:stop]] + [""] * (width - stop + start)
        right = [repr(token) for token in theirs[other:end]] + [""] * (width - end + other)
        pairs += zip(left, right, strict=True)
    first = max(next(i for i, (left, right) in enumerate(pairs) if left != right) - before, 0)
    shown = pairs[first : first + columns]
    widths = [max(len(left), len(right)) for left, right in shown]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*shown, strict=True)]
    dots = ("... " if first else "", " ..." if first + columns < len(pairs) else "")
    return "\n".join(f"  {role}:  {dots[0]}{row}{dots[1]}".rstrip() for role, row in zip(("prompt", "source"), rows, strict=True))
