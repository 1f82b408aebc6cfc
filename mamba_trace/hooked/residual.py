"""What the layers write into the residual stream, and what it says on the way, from a cache.

The stream out of a Mamba is a sum: the embedding and every layer's ``out_proj``. The logits are linear in it
but for one number at each position, the scale of the final RMSNorm. With that number frozen to what it was in
the run, every term has a logit of its own, and these add up to the logits (direct logit attribution). The
logit lens reads the partial sums instead, each with a norm of its own, as if the model ended there.

Source: TransformerLens's ActivationCache, whose method names and shapes these are; logit lens: nostalgebraist
(2020). A block of Mamba adds to the stream once, so there is no middle of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LayerError, PromptError, UnknownSiteError
from ..modeling.effective import epsilon_of, input_dtype, norm_weight
from ..tracing.placement import input_device

#: Which positions: all, one (whose axis goes), a range as (start, stop), a slice, or several.
PositionSlice = int | slice | Sequence[int] | None


class ResidualAnalyses:
    """Mixed into `ActivationCache`. C is the number of components stacked in front of B, L and D."""

    model: Any
    has_batch_dim: bool

    if TYPE_CHECKING:

        def __getitem__(self, key: Any) -> Tensor: ...

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before each layer up to ``layer``, and after the last one.

        Args:
            layer: the last stream is the one into this layer; ``None``, -1 or ``n_layers``: out of the last.
            incl_mid: must be false: a block of Mamba has no middle.
            apply_ln: as `apply_ln_to_stack`.
            pos_slice: which positions; one as an int has no axis L.
            return_labels: return their names too.

        Returns:
            [C,B,L,D] where C is ``layer + 1``, in float32 or better; or the pair of it and the labels.

        Raises:
            UnknownSiteError: if a stream is not in this cache.

        Example::

            cache.accumulated_resid(return_labels=True)[1]  # ["0_pre", "1_pre", "final_post"]
        """
        if incl_mid:
            raise UnknownSiteError("a block of Mamba adds to the residual stream once: it has no resid_mid")
        last, n_layers = self._layer(layer), len(self.model.layers)
        streams = [self._stream(one) for one in range(last + 1)]
        labels = [f"{one}_pre" if one < n_layers else "final_post" for one in range(last + 1)]
        return self._stacked(streams, labels, last, apply_ln, pos_slice, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """The terms that add up to the residual stream into ``layer``: the embedding and each out_proj.

        The sum is exact, to rounding, in a run where nobody edited the stream itself.

        Args:
            layer: the stream into this layer; ``None``, -1 or ``n_layers``: out of the last.
            apply_ln: as `apply_ln_to_stack`.
            pos_slice: which positions; one as an int has no axis L.
            incl_embeds: whether the embedding is among them.
            return_labels: return their names too.

        Returns:
            [C,B,L,D] where C is ``layer + 1``, in float32 or better; or the pair of it and the labels.

        Raises:
            UnknownSiteError: if a term is not in this cache.

        Example::

            cache.decompose_resid().sum(0)  # cache["resid_post", -1]
        """
        last = self._layer(layer)
        terms = [self["embed"]] * incl_embeds + [self["out_proj", one] for one in range(last)]
        labels = ["embed"] * incl_embeds + [f"{one}_out_proj" for one in range(last)]
        if not terms:
            raise LayerError("nothing but the embedding goes into layer 0: incl_embeds=False leaves nothing")
        return self._stacked(terms, labels, last, apply_ln, pos_slice, return_labels)

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, pos_slice: PositionSlice = None
    ) -> Tensor:
        """The norm before ``layer`` with its scale as it was in the run: linear, unlike the norm itself.

        Args:
            residual_stack: terms of the stream [C,B,L,D], or a single position of them [C,B,D].
            layer: whose norm; ``None``, -1 or ``n_layers``: the final one.
            pos_slice: which positions ``residual_stack`` is of.

        Returns:
            Its shape.

        Raises:
            PromptError: if it is not of the positions and prompts of this cache.
            CheckpointError: if the norm was replaced by something that is no RMSNorm.

        Example::

            parts = cache.decompose_resid()  # [C,B,L,D]
            cache.apply_ln_to_stack(parts)
        """
        last = self._layer(layer)
        self.model._follow()
        norms = [block.norm for block in self.model.layers] + [self.model.norm_f]
        norm = norms[last]._module
        stream = positions_of(self._stream(last), pos_slice)
        if residual_stack.shape[-stream.dim() :] != stream.shape:
            raise PromptError(
                f"terms of the stream are [C, ...] with {tuple(stream.shape)} behind it, not "
                f"{tuple(residual_stack.shape)}: give pos_slice if they are of some positions"
            )
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
        scale = (wide.pow(2).mean(-1, keepdim=True) + epsilon_of(norm)).rsqrt()  # [B,L,1]
        weight = norm_weight(norm, stream.shape[-1]).to(scale)
        return residual_stack * (scale * weight).to(residual_stack.device)

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: PositionSlice = None,
    ) -> Tensor:
        """Direct logit attribution: what each term of the final residual stream adds to a token's logit.

        Args:
            residual_stack: terms of the stream [C,B,L,D], e.g. `decompose_resid`, before any norm.
            tokens: one token for all (a string or an id), one for each prompt [B], or [B,L].
            incorrect_tokens: likewise; then it is the difference of the two logits.
            pos_slice: which positions ``residual_stack`` is of.

        Returns:
            [C,B,L]. Over the terms of `decompose_resid` they add up to the logits, less the bias of an
            ``lm_head`` that has one.

        Raises:
            PromptError: if the tokens do not fit.

        Example::

            terms = cache.decompose_resid(pos_slice=-1)  # [C,B,D]
            cache.logit_attrs(terms, " Emma", " Shelby", pos_slice=-1)  # [C,B]
        """
        scaled = self.apply_ln_to_stack(residual_stack, None, pos_slice)
        directions = self._directions(tokens, scaled)
        if incorrect_tokens is not None:
            directions = directions - self._directions(incorrect_tokens, scaled)
        return (scaled * directions).sum(-1)

    def logit_lens(
        self, layer: int | None = None, pos_slice: PositionSlice = None, return_labels: bool = False
    ) -> Any:
        """The logits that the model would have if it ended before each layer: streams, norm_f, lm_head.

        Args:
            layer: as in `accumulated_resid`.
            pos_slice: which positions; with a large vocabulary, -1 keeps this small.
            return_labels: return the names of the streams too.

        Returns:
            [C,B,L,V], of which the last are the model's logits; or the pair of it and the labels.

        Raises:
            UnknownSiteError: if a stream is not in this cache.

        Example::

            cache.logit_lens(pos_slice=-1).argmax(-1)  # [C,B]
        """
        streams, labels = self.accumulated_resid(layer, pos_slice=pos_slice, return_labels=True)
        self.model._follow()
        head, norm = self.model.lm_head._module, self.model.norm_f._module
        normed = norm(streams.to(input_device(norm)))
        logits = head(normed.to(input_device(head), input_dtype(head)))
        return (logits, labels) if return_labels else logits

    # -- parts -----------------------------------------------------------------------------------------

    def _layer(self, layer: int | None) -> int:
        n_layers = len(self.model.layers)
        last = n_layers if layer in (None, -1) else int(layer)
        if not 0 <= last <= n_layers:
            raise LayerError(
                f"layer={layer}: this model has layers 0 to {n_layers - 1}; -1 is after the last"
            )
        return last

    def _stream(self, layer: int) -> Tensor:
        n_layers = len(self.model.layers)
        return self["resid_pre", layer] if layer < n_layers else self["resid_post", n_layers - 1]

    def _stacked(
        self,
        parts: list[Tensor],
        labels: list[str],
        layer: int,
        apply_ln: bool,
        pos_slice: PositionSlice,
        return_labels: bool,
    ) -> Any:
        # At least float32: in half precision the stream itself is kept in it, and a sum of terms must be too.
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
        device = parts[-1].device  # layers may be on several
        stack = torch.stack([positions_of(part, pos_slice).to(device, dtype) for part in parts])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice)
        return (stack, labels) if return_labels else stack

    def _directions(self, tokens: Any, stack: Tensor) -> Tensor:
        # What can be multiplied with the stack [C,B,L,D], or [C,B,D], or [C,L,D].
        directions = self.model.tokens_to_residual_directions(tokens).to(stack)
        axes, inner = directions.dim() - 1, stack.shape[1:-1]
        if axes == 1 and len(inner) == 2 and self.has_batch_dim and len(directions) == inner[0]:
            directions = directions.unsqueeze(1)  # one for each prompt
        elif axes and directions.shape[:-1] != inner:
            raise PromptError(
                f"tokens are one for all, one for each of the prompts, or of shape {tuple(inner)}, not "
                f"{tuple(directions.shape[:-1])}"
            )
        return directions


def positions_of(value: Tensor, pos_slice: PositionSlice) -> Tensor:
    """Some positions of a value [...,L,D]; one given as an int has no axis."""
    if pos_slice is None:
        return value
    if isinstance(pos_slice, int):
        return value.select(-2, pos_slice)
    if isinstance(pos_slice, tuple):
        pos_slice = slice(*pos_slice)
    return value[..., pos_slice, :]
