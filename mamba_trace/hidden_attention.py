"""Which tokens each token reads through the state of a layer: the attention matrix hidden in a Mamba.

The scan is linear in its input x, so y_i = sum over j <= i of alpha[i,j] x_j in every channel, with

    alpha[i,j] = C_i (A_bar_i ... A_bar_{j+1}) B_bar_j

a causal attention matrix for each channel, and in Mamba-2 for each head, whose channels share it.
`hidden_attention` computes it. `contributions` computes the terms alpha[i,j] x_j that add up to y_i, by their
norm or along a direction.

One trace, which stops after the layer, reads the parameters of its scan; `scan.pairs` makes the matrix of
them in blocks. The [E,N,L,L] tensor of the formula is never made. No tensor exceeds 32 MiB except those of
[L,E], the result, and the [L,N] of one channel. The result is [L,L]; only where every channel is asked for is
it [L,L,E], or [L,L,H].

Source: The Hidden Attention of Mamba Models (Ali et al., arXiv 2403.01590); for Mamba-2 the matrix of arXiv
2405.21060, section 3, with the step size of the token that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nnsight
import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments.channels import Channels, Heads, channel_mask, check_channels, mixer_sizes
from .arguments.prompts import describe, prompt_tokens, token_strings
from .arguments.selection import Positions, layer_number, position_numbers
from .errors import ArgumentError, SiteValueError
from .modeling.effective import FrozenNorm
from .results.heatmap import Heatmap
from .results.result import Result
from .scan.pairs import HeadPairs, ScanPairs
from .tracing.one_run import refuse_inside_a_trace

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["Contributions", "HiddenAttention", "contributions", "hidden_attention"]

#: What the numbers are, in words, by how the attention matrices of several channels are reduced.
MEASURES = {"mean": "mean of alpha", "abs_mean": "mean of |alpha|", None: "alpha"}
NORM = "norm of alpha x"


@dataclass(frozen=True, eq=False)
class TokenPairs(Result):
    """A number for every pair of a token that reads and a token that is read.

    Attributes:
        values: [rows, columns], or [rows, columns, channels or heads]; 0 where the column is after the row.
        layer: the layer.
        measure: what the numbers are, in words.
        channels: the channels of d_inner that they cover, ascending.
        rows: the positions i that read, ascending.
        columns: the positions j that are read, ascending.
        tokens: the string of the token at each position of the prompt.
        heads: in Mamba-2 the heads whose channels they are, ascending, and the last axis of ``values`` if it has
            three; ``None`` in Mamba-1, and where channels were asked for by other means than by head.
    """

    values: Tensor
    layer: int
    measure: str
    channels: list[int]
    rows: list[int]
    columns: list[int]
    tokens: list[str]
    heads: list[int] | None = None
    _title: ClassVar[str]

    def heatmaps(self) -> list[Heatmap]:
        """One picture: each row's number for each column; the mean over channels where they were kept.

        Example::

            hidden_attention(model, prompt, 1).heatmaps()[0].values  # [L,L]
        """
        apart = self.values.dim() == 3
        measure = f"mean of {self.measure}" if apart else self.measure
        unit, count = ("channel", len(self.channels)) if self.heads is None else ("head", len(self.heads))
        rows, columns = (
            [f"{self.tokens[position]}_{position}" for position in positions] for positions in (self.rows, self.columns)
        )
        return [
            Heatmap(
                values=self.values.mean(-1) if apart else self.values,
                title=f"{self._title}, layer {self.layer}\n{measure}, {count} {unit}{'s' * (count != 1)}",
                row_title="token that reads",
                row_labels=rows,
                column_title="Token that is read",
                column_labels=columns,
                value_title=measure,
                signed=measure not in (MEASURES["abs_mean"], NORM),
            )
        ]


@dataclass(frozen=True, eq=False)
class HiddenAttention(TokenPairs):
    """The result of `hidden_attention`: alpha[i,j]. See `TokenPairs`."""

    _title = "Hidden attention"


@dataclass(frozen=True, eq=False)
class Contributions(TokenPairs):
    """The result of `contributions`: the part of y_i that comes from x_j. See `TokenPairs`."""

    _title = "Contributions to y"


def hidden_attention(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int,
    *,
    channels: Channels = None,
    heads: Heads = None,
    rows: Positions | None = None,
    columns: Positions | None = None,
    reduce: str | None = "mean",
) -> HiddenAttention:
    """The attention matrix of one layer's scan: alpha[i,j] = C_i (A_bar_i ... A_bar_{j+1}) B_bar_j.

    In every channel the sum over columns of alpha[i,j] x_j, x the site ``ssm_input``, is y_i, the site ``y``.

    Args:
        model: the model.
        prompt: a string or token ids [1,L].
        layer: the layer; negative counts from the end.
        channels: ``None`` for all, ``"slow"``, ``"medium"`` or ``"fast"`` (see `flow.decay_groups`), indices,
            or a boolean mask [E].
        heads: of Mamba-2, in place of channels: ``None`` for all, indices, or a boolean mask [H].
        rows, columns: the positions i that read and the positions j that are read: an int, a slice, several
            ints or a boolean mask [L]; all by default.
        reduce: over channels: ``"mean"``, ``"abs_mean"`` (of absolute values), or ``None`` to keep them all.

    Returns:
        ``values`` [rows, columns] or [rows, columns, channels], float32 (float64 in a float64 model), on the
        CPU. A column after its row is 0. In Mamba-2 ``reduce=None`` keeps [rows, columns, heads], unless
        ``channels`` are given, since alpha is the same in all channels of a head.

    Raises:
        PromptError: if the prompt is not one prompt.
        LayerError: if there is no such layer, or ``layer`` is not one layer.
        PositionError: for rows or columns that the prompt does not have.
        SiteValueError: for channels or heads that the layer does not have.
        ArgumentError: for another ``reduce``.
        RuntimeError: inside a trace.

    Source:
        The Hidden Attention of Mamba Models (arXiv 2403.01590).

    Example::

        attention = hidden_attention(model, prompt, layer=1, channels="slow", rows=-1)
        attention.values  # [1,L]: what the last token reads
        attention.save("attention.html")
    """
    refuse_inside_a_trace(model, "hidden_attention")
    if reduce not in MEASURES:
        raise ArgumentError(f"reduce={reduce!r} is none of {', '.join(map(repr, MEASURES))}")
    ids, asked = what_is_asked(model, prompt, layer, channels, heads, rows, columns)
    scan = Scanned.of(model, ids, asked)
    pairs = scan.pairs(of_x=False)
    if reduce is None:
        values = scan.of_channels(pairs.each())
    elif reduce == "mean":
        values = pairs.along(scan.by_head(torch.full_like(scan.x, 1 / len(asked["channels"]))))
    else:
        values = pairs.summed(torch.abs) / len(asked["channels"])
    return HiddenAttention(values=values.cpu(), measure=MEASURES[reduce], **asked)


def contributions(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int,
    *,
    y_direction: Tensor | None = None,
    residual_direction: Tensor | None = None,
    channels: Channels = None,
    heads: Heads = None,
    rows: Positions | None = None,
    columns: Positions | None = None,
) -> Contributions:
    """How much of each token's y comes from each token: alpha[i,j] x_j, which summed over j is y_i.

    Args:
        model, prompt, layer, channels, heads, rows, columns: as for `hidden_attention`.
        y_direction: measure contributions by their dot product with this direction [E]; summed over j that is
            the dot product of y_i with it.
        residual_direction: measure them by what they write to the residual stream along this direction [D],
            through the token's gate and out_proj, in Mamba-2 also through the mixer's norm with its scales
            frozen to those of the run. Summed over j that is what y_i writes: out_proj's output less what the D
            term and a bias write.

    Returns:
        ``values`` [rows, columns], float32 (float64 in a float64 model), on the CPU: norms over channels
        where no direction is given. A column after its row is 0.

    Raises:
        SiteValueError: if a direction has another length or both are given, or for channels or heads that
            the layer does not have.
        PromptError, LayerError, PositionError, RuntimeError: as `hidden_attention`.

    Source:
        The matrix of arXiv 2403.01590.

    Example::

        directions = model.tokens_to_residual_directions(
            torch.tensor([model.to_single_token(" Emma"), model.to_single_token(" Shelby")])
        )  # [2,D]
        found = contributions(model, prompt, 1, residual_direction=directions[0] - directions[1], rows=-1)
        found.values  # [1,L]: from which tokens layer 1 has what it says in favour of Emma
    """
    refuse_inside_a_trace(model, "contributions")
    if y_direction is not None and residual_direction is not None:
        raise SiteValueError("contributions are measured along one direction: y_direction or residual_direction")
    check_direction("y_direction", y_direction, "E d_inner", mixer_sizes(model)["E"])
    check_direction("residual_direction", residual_direction, "D d_model", model.config.hidden_size)
    ids, asked = what_is_asked(model, prompt, layer, channels, heads, rows, columns)
    norm = None if residual_direction is None else FrozenNorm.inside(model.layers[asked["layer"]].ssm._module)
    scan = Scanned.of(model, ids, asked, gated=norm is not None)
    pairs = scan.pairs(of_x=True)
    if residual_direction is not None:
        written = through_out_proj(model, asked["layer"], residual_direction, scan.skip)  # [E]
        along = F.silu(scan.skip.to(scan.x.dtype)) * written.to(scan.x.dtype)  # [L,E]
        if norm is not None and scan.after_skip is not None:
            along = along * norm.factors(scan.after_skip).to(along)
        values, measure = pairs.along(scan.by_head(along)), "alpha x along a direction of the residual stream"
    elif y_direction is not None:
        along = y_direction.to(scan.x).expand_as(scan.x)
        values, measure = pairs.along(scan.by_head(along)), "alpha x along a direction of y"
    else:
        values, measure = pairs.summed(torch.square).sqrt(), NORM
    return Contributions(values=values.cpu(), measure=measure, **asked)


# -- one layer's scan --------------------------------------------------------------------------------------


def what_is_asked(
    model: MambaTrace,
    prompt: str | Tensor,
    layer: int,
    channels: Channels,
    heads: Heads,
    rows: Positions | None,
    columns: Positions | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The token ids [1,L], and the fields of `TokenPairs` that say what its values belong to.

    Raises:
        PromptError, LayerError, PositionError, SiteValueError: as `hidden_attention`.
    """
    ids = prompt_tokens(model, "prompt", prompt)
    layer = layer_number(model, layer)
    check_channels(model, channels, heads)
    P = mixer_sizes(model).get("P")
    chosen = channel_mask(model, layer, channels, heads).nonzero().flatten().tolist()
    some, others = (slice(None) if positions is None else positions for positions in (rows, columns))
    return ids, {
        "layer": layer,
        "channels": chosen,
        "heads": None if P is None or channels is not None else [channel // P for channel in chosen[::P]],
        "rows": sorted(position_numbers("rows", some, ids.shape[1])),
        "columns": sorted(position_numbers("columns", others, ids.shape[1])),
        "tokens": token_strings(model, ids),
    }


@dataclass(frozen=True)
class Scanned:
    """What a run of one prompt says of a layer's scan, in the shapes of the model's family.

    Attributes:
        asked: what `what_is_asked` returned.
        skip, x: the sites skip and ssm_input [L,E].
        delta, A, B, C: the sites of these names, without their batch axis.
        after_skip: that site [L,E], if it was asked for, which lets the layer run on to there.
        P: the channels of a head in Mamba-2; ``None`` in Mamba-1.
    """

    asked: dict[str, Any]
    skip: Tensor
    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    after_skip: Tensor | None
    P: int | None

    @classmethod
    def of(cls, model: MambaTrace, ids: Tensor, asked: dict[str, Any], gated: bool = False) -> Scanned:
        """Run token ids [1,L] up to the scan of the layer, or up to its gate if ``gated``."""
        ssm = model.layers[asked["layer"]].ssm
        with torch.no_grad(), model.trace(ids) as tracer:
            skip, x, delta = (site.output[0] for site in (ssm.skip, ssm.ssm_input, ssm.delta))
            A, B, C = ssm.A.output, ssm.B.output[0], ssm.C.output[0]
            read = nnsight.save([skip, x, delta, A, B, C, ssm.after_skip.output[0] if gated else None])
            tracer.stop()
        skip, x, delta, A, B, C, after_skip = read
        x, B, C = (value.to(delta.dtype) for value in (x, B, C))
        return cls(asked, skip, x, delta, A, B, C, after_skip, mixer_sizes(model).get("P"))

    def pairs(self, of_x: bool) -> ScanPairs | HeadPairs:
        """Its pairs in the channels asked for: alpha x if ``of_x``, otherwise alpha."""
        asked, channels = self.asked, self.asked["channels"]
        x = self.x if of_x else torch.ones_like(self.x)
        wanted = {"rows": asked["rows"], "columns": asked["columns"]}
        if self.P is None:
            return ScanPairs(self.delta[:, channels], x[:, channels], self.A[channels], self.B, self.C, **wanted)
        others = torch.ones_like(x[0], dtype=torch.bool).index_fill(0, torch.tensor(channels, device=x.device), False)
        heads, each = self.heads, self.delta.shape[1] // self.B.shape[1]
        x = x.masked_fill(others, 0).unflatten(-1, (-1, self.P))[:, heads]  # [L,h,P]
        groups = [head // each for head in heads]
        return HeadPairs(self.delta[:, heads], x, self.A[heads], self.B, self.C, **wanted, groups=groups)

    @property
    def heads(self) -> list[int]:
        """The heads that the channels asked for lie in, ascending."""
        assert self.P is not None
        return sorted({channel // self.P for channel in self.asked["channels"]})

    def by_head(self, weight: Tensor) -> Tensor:
        """A weight [L,E] as `pairs` takes it: in the channels asked for, or in their heads [L,h,P]."""
        if self.P is None:
            return weight[:, self.asked["channels"]]
        return weight.unflatten(-1, (-1, self.P))[:, self.heads]

    def of_channels(self, values: Tensor) -> Tensor:
        """What `pairs` has of each [rows,columns,...], by the channels or heads that were asked for."""
        if self.P is None or self.asked["heads"] is not None:
            return values
        return values[..., [self.heads.index(channel // self.P) for channel in self.asked["channels"]]]


def check_direction(name: str, direction: Any, axis: str, size: int) -> None:
    """Raise a `SiteValueError` unless a direction is ``None`` or a floating tensor [size]."""
    if direction is None:
        return
    if not isinstance(direction, Tensor) or direction.shape != (size,) or not direction.is_floating_point():
        raise SiteValueError(f"{name} takes a floating tensor of shape [{size}] [{axis}], not {describe(direction)}")


def through_out_proj(model: MambaTrace, layer: int, direction: Tensor, skip: Tensor) -> Tensor:
    """What each channel of out_proj's input writes along a direction [D] of the residual stream: [E]."""
    # Through the module itself, which may be adapted, quantised or offloaded.
    out_proj = model.layers[layer].ssm.out_proj._module
    with torch.enable_grad():
        gated = torch.zeros_like(skip[:1]).requires_grad_()  # [1,E]
        written = out_proj(gated)  # [1,D]
        (along,) = torch.autograd.grad(written, gated, direction.detach().to(written)[None])
    return along[0]
