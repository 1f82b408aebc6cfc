"""What a run says of one layer's scan, as `scan.pairs` takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..arguments.channels import Channels, Heads, channel_mask, check_channels, mixer_sizes
from ..arguments.prompts import describe, prompt_tokens, token_strings
from ..arguments.selection import SSM, Positions, layer_number, position_numbers
from ..errors import SiteValueError
from ..modeling.effective import FrozenNorm, normed_in
from ..scan.pairs import HeadPairs, ScanPairs

if TYPE_CHECKING:
    from ..model import MambaTrace


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
        PromptError, LayerError, UnknownSiteError, PositionError, SiteValueError: as `hidden_attention`.
    """
    ids = prompt_tokens(model, "prompt", prompt)
    layer = layer_number(model, layer, SSM)
    check_channels(model, channels, heads, layer)
    P = mixer_sizes(model, layer).get("P")
    chosen = channel_mask(model, layer, channels, heads).nonzero().flatten().tolist()
    return ids, {
        "layer": layer,
        "channels": chosen,
        "heads": None if P is None or channels is not None else [channel // P for channel in chosen[::P]],
        **tokens_asked(model, ids, rows, columns),
    }


def tokens_asked(model: MambaTrace, ids: Tensor, rows: Positions | None, columns: Positions | None) -> dict[str, Any]:
    """The fields of `TokenPairs` that say which tokens of ids [1,L] its values belong to. Raises `PositionError`."""
    some, others = (slice(None) if positions is None else positions for positions in (rows, columns))
    return {
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
        norm: the mixer's own norm, if it was asked for and there is one.
        normed: the input of that norm [L,E], which lets the layer run on to there.
        P: the channels of a head in Mamba-2; ``None`` in Mamba-1.
    """

    asked: dict[str, Any]
    skip: Tensor
    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    norm: FrozenNorm | None
    normed: Tensor | None
    P: int | None

    @classmethod
    def of(cls, model: MambaTrace, ids: Tensor, asked: dict[str, Any], gated: bool = False) -> Scanned:
        """Run token ids [1,L] up to the scan of the layer, or up to the input of the mixer's own norm if ``gated``."""
        ssm = model.layers[asked["layer"]].ssm
        norm = FrozenNorm.inside(ssm._module) if gated else None
        with torch.no_grad(), model.trace(ids) as tracer:
            read = nnsight.save([*read_scan(ssm), None if norm is None else normed_value(ssm)])
            tracer.stop()
        return cls.made(model, asked, read[:-1], norm, read[-1])

    @classmethod
    def made(
        cls,
        model: MambaTrace,
        asked: dict[str, Any],
        read: list[Tensor],
        norm: FrozenNorm | None = None,
        normed: Tensor | None = None,
    ) -> Scanned:
        """Of what `read_scan` has read."""
        skip, x, delta, A, B, C = read
        x, B, C = (value.to(delta.dtype) for value in (x, B, C))
        return cls(asked, skip, x, delta, A, B, C, norm, normed, mixer_sizes(model, asked["layer"]).get("P"))

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

    def frozen(self) -> Tensor | None:
        """What the mixer's own norm multiplies each channel by [L,E], with its scales as in the run."""
        return None if self.norm is None or self.normed is None else self.norm.factors(self.normed)

    def of_channels(self, values: Tensor) -> Tensor:
        """What `pairs` has of each [rows,columns,...], by the channels or heads that were asked for."""
        if self.P is None or self.asked["heads"] is not None:
            return values
        return values[..., [self.heads.index(channel // self.P) for channel in self.asked["channels"]]]


def read_scan(ssm: Any) -> list[Tensor]:
    """The sites skip, ssm_input, delta, A, B and C of a mixer without their batch axis; in a trace of one prompt."""
    skip, x, delta = (site.output[0] for site in (ssm.skip, ssm.ssm_input, ssm.delta))
    return [skip, x, delta, ssm.A.output, ssm.B.output[0], ssm.C.output[0]]


def normed_value(ssm: Any) -> Tensor:
    """The input [L,E] of a mixer's own norm; in a trace of one prompt."""
    value: Tensor = getattr(ssm, normed_in(ssm._module)).output[0]
    return value


def check_direction(name: str, direction: Any, axis: str, size: int) -> None:
    """Raise a `SiteValueError` unless a direction is ``None`` or a floating tensor [size]."""
    if direction is None:
        return
    if not isinstance(direction, Tensor) or direction.shape != (size,) or not direction.is_floating_point():
        raise SiteValueError(f"{name} takes a floating tensor of shape [{size}] [{axis}], not {describe(direction)}")


def through_out_proj(model: MambaTrace, layer: int, direction: Tensor, skip: Tensor) -> Tensor:
    """What each channel of out_proj's input adds to the mixer's output along a direction [D]: [E]."""
    # Through the module itself, which may be adapted, quantised or offloaded.
    out_proj = model.layers[layer].ssm.out_proj._module
    with torch.enable_grad():
        gated = torch.zeros_like(skip[:1]).requires_grad_()  # [1,E]
        written = out_proj(gated)  # [1,D]
        (along,) = torch.autograd.grad(written, gated, direction.detach().to(written)[None])
    return along[0]
