"""What the layers write into the residual stream, and what the stream says on the way, from a cache.

The stream out of a Mamba is a sum: the embedding and every layer's ``out_proj``. In a hybrid it is the sum of the
stream into layer 0, which is the embedding times a factor, and of each `ssm_out`, `attn_out` and `mlp_out`. The
logits are linear in it but for one number at each position, the scale of the final RMSNorm. With that number frozen
at its value in the run, every term has a logit of its own, and these add up to the logits (direct logit
attribution). The logit lens reads the partial sums instead, each with its own norm, as if the model ended there.
Logits are those that the model returns, of which ``lm_head`` may give a multiple.

Source: TransformerLens's ActivationCache, whose method names and shapes these are; logit lens: nostalgebraist
(2020). A block of Mamba adds to the stream once, so a block has no middle; in a hybrid it may have one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..arguments.selection import layers_with
from ..errors import LayerError, PositionError, PromptError, UnknownSiteError
from ..modeling.block import times
from ..modeling.effective import FrozenNorm, input_dtype, logits_factor, n_outputs, token_directions
from ..names import layer_index
from ..sites import BY_NAME
from ..tracing.placement import input_device

#: Which positions: all, one (whose axis is dropped), a range as (start, stop), a slice, or several.
PositionSlice = int | slice | Sequence[int] | None


class Directions:
    """The directions of tokens in the residual stream; mixed into the model class."""

    def tokens_to_residual_directions(self: Any, tokens: Any) -> Tensor:
        """The direction in the residual stream, after the final norm, that raises each token's logit.

        Args:
            tokens: token ids of any shape, one id, or a string that is one token.

        Returns:
            Rows of ``lm_head``'s weight, with an adapter's part of it and times the factor with which the model
            makes logits of its output: the shape of ``tokens``, then [D].

        Raises:
            PromptError: if a string is not one token, an id is not in the vocabulary, or these are no ids.

        Example::

            model.tokens_to_residual_directions(" Emma")  # [D]
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        try:
            ids = torch.as_tensor(tokens, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise PromptError(
                f"tokens are ids of any shape, or a string that is one token, not {tokens!r}; of several "
                f"strings give the ids, [model.to_single_token(string) for string in strings]"
            ) from None
        self.dispatch()
        self._follow()
        head, width = self.lm_head._module, self.config.hidden_size
        size = n_outputs(head, width)
        known = ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < size
        if ids.is_floating_point() or not known:
            raise PromptError(f"token ids are integers from 0 to {size - 1}, not {tokens!r}")
        return token_directions(head, ids, width, logits_factor(self._module))


class ResidualAnalyses(Mapping[Any, Tensor]):
    """Mixed into `ActivationCache`. C is the number of components stacked in front of B, L and D.

    These arguments mean the same in every method:

    * ``layer``: the stream into this layer; ``None``, -1 or ``n_layers`` for the stream out of the last;
    * ``pos_slice``: which positions; a single int drops the axis L;
    * ``apply_ln``: apply the norm before ``layer``, as `apply_ln_to_stack` does;
    * ``return_labels``: return the pair of the tensor and the names of its components.

    Every method raises `UnknownSiteError` if a value that it needs is not in this cache.
    """

    model: Any
    has_batch_dim: bool

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
            incl_mid: the stream in the middle of each block before ``layer``, too, where blocks have a middle.
            layer, apply_ln, pos_slice, return_labels: see the class.

        Returns:
            [C,B,L,D] where C is ``layer + 1``, and more with ``incl_mid``, in float32 or better.

        Raises:
            UnknownSiteError: for ``incl_mid`` where no block has a middle, as in a Mamba.

        Example::

            cache.accumulated_resid(return_labels=True)[1]  # ["0_pre", "1_pre", "final_post"]
        """
        layout = self.model._layout
        mid = layout.with_site(BY_NAME["resid_mid"]) if incl_mid else []
        if incl_mid and not mid:
            blocks = "block of this model" if layout.hybrid else "block of Mamba"
            raise UnknownSiteError(f"a {blocks} adds to the residual stream once: it has no resid_mid")
        last, n_layers = self._layer(layer), len(self.model.layers)
        streams = {}
        for number in range(min(last + 1, n_layers)):
            streams[f"{number}_pre"] = self._stream(number)
            if number in mid and number < last:
                streams[f"{number}_mid"] = self["resid_mid", number]
        if last == n_layers:
            streams["final_post"] = self._stream(last)
        return self._stacked(streams, last, apply_ln, pos_slice, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        apply_ln: bool = False,
        pos_slice: PositionSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """The terms that add up to the residual stream into ``layer``: the embedding and each out_proj.

        In a hybrid they are the stream into layer 0 (the embedding times the model's factor), and what the SSM,
        attention and the MLP or experts of each layer add, with the model's factors: ``"embed"``, ``"0_ssm_out"``,
        ``"0_mlp_out"``, ``"1_attn_out"``, ... The sum is exact, to rounding, in a run where nobody edited the
        stream itself.

        Args:
            incl_embeds: whether the embedding is one of the terms.
            layer, apply_ln, pos_slice, return_labels: see the class.

        Returns:
            [C,B,L,D] where C is ``layer + 1``, in a hybrid the number of terms, in float32 or better.

        Example::

            cache.decompose_resid().sum(0)  # cache["resid_post", -1]
        """
        last = self._layer(layer)
        hybrid = self.model._layout.hybrid
        terms = {"embed": self["resid_pre", 0] if hybrid else self["embed"]} if incl_embeds else {}
        for number in range(last):
            parts = self._terms(number) if hybrid else ["out_proj"]
            terms |= {f"{number}_{part}": self[part, number] for part in parts}
        if not terms:
            raise LayerError("nothing but the embedding goes into layer 0: incl_embeds=False leaves nothing")
        return self._stacked(terms, last, apply_ln, pos_slice, return_labels)

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, pos_slice: PositionSlice = None
    ) -> Tensor:
        """Apply the norm before ``layer`` with its scale as in the run: linear, unlike the norm itself.

        Args:
            residual_stack: terms of the stream [C,B,L,D], or a single position of them [C,B,D].
            layer, pos_slice: see the class.

        Returns:
            A tensor of the shape of ``residual_stack``.

        Raises:
            PromptError: if ``residual_stack`` does not have the positions and prompts of this cache.
            CheckpointError: if the norm was replaced by something that is not an RMSNorm.

        Example::

            parts = cache.decompose_resid()  # [C,B,L,D]
            cache.apply_ln_to_stack(parts)
        """
        last = self._layer(layer)
        self.model._follow()
        norm = [*(block.norm for block in self.model.layers), self.model.norm_f][last]._module
        stream = positions_of(self._normed(last), pos_slice)
        if residual_stack.shape[-stream.dim() :] != stream.shape:
            raise PromptError(
                f"terms of the stream are [C, ...] with {tuple(stream.shape)} behind it, not "
                f"{tuple(residual_stack.shape)}: give pos_slice if they are of some positions"
            )
        factors = FrozenNorm.of(norm, stream.shape[-1]).factors(stream)  # [B,L,D]
        return residual_stack * factors.to(residual_stack.device)

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: PositionSlice = None,
    ) -> Tensor:
        """Direct logit attribution: what each term of the final residual stream adds to a token's logit.

        Args:
            residual_stack: terms of the stream [C,B,L,D], e.g. from `decompose_resid`, before any norm.
            tokens: one token for all (a string or an id), one for each prompt [B], or [B,L].
            incorrect_tokens: tokens in the same forms, whose logits are subtracted.
            pos_slice: see the class.

        Returns:
            [C,B,L]. Over the terms of `decompose_resid` they add up to the logits, without the bias of an
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

    def logit_lens(self, layer: int | None = None, pos_slice: PositionSlice = None, return_labels: bool = False) -> Any:
        """The logits that the model would have if it ended before each layer: streams, norm_f, lm_head.

        Args:
            layer, pos_slice, return_labels: see the class. With a large vocabulary, ``pos_slice=-1`` keeps
                this small.

        Returns:
            [C,B,L,V], the last of which are the model's logits.

        Example::

            cache.logit_lens(pos_slice=-1).argmax(-1)  # [C,B]
        """
        streams, labels = self.accumulated_resid(layer, pos_slice=pos_slice, return_labels=True)
        self.model._follow()
        head, norm = self.model.lm_head._module, self.model.norm_f._module
        normed = norm(streams.to(input_device(norm)))
        logits = times(head(normed.to(input_device(head), input_dtype(head))), logits_factor(self.model._module))
        return (logits, labels) if return_labels else logits

    # -- parts -----------------------------------------------------------------------------------------

    def _layer(self, layer: int | None) -> int:
        """The number of a layer into which a stream goes; ``n_layers`` for the stream out of the last."""
        n_layers = len(self.model.layers)
        if layer in (None, -1):
            return n_layers
        return layer_index(layer, n_layers, f"layer={layer}", range(n_layers + 1))

    def _stream(self, layer: int) -> Tensor:
        n_layers = len(self.model.layers)
        return self["resid_pre", layer] if layer < n_layers else self["resid_post", n_layers - 1]

    def _normed(self, layer: int) -> Tensor:
        """The input of the norm before ``layer``: the stream, and what a shared transformer adds to it there."""
        layout = self.model._layout
        shared = layer < len(layout.layers) and layout.has(BY_NAME["shared_out"], layer)
        return self["layer_input", layer] if shared else self._stream(layer)

    def _terms(self, layer: int) -> list[str]:
        """The sites of what a layer of a hybrid adds to the stream, in execution order."""
        sites = [BY_NAME[name] for name in ("ssm_out", "attn_out", "mlp_out")]
        return [site.name for site in sites if layer in layers_with(self.model._layout, site)]

    def _stacked(
        self, parts: dict[str, Tensor], layer: int, apply_ln: bool, pos_slice: PositionSlice, labels: bool
    ) -> Any:
        """Components of the stream, by label, as one tensor [C,...], with the list of labels if asked for."""
        # At least float32: a half precision model keeps its stream in float32, so sums of terms must be too.
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts.values()), torch.float32)
        device = list(parts.values())[-1].device  # layers may be on several
        stack = torch.stack([positions_of(part, pos_slice).to(device, dtype) for part in parts.values()])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice)
        return (stack, list(parts)) if labels else stack

    def _directions(self, tokens: Any, stack: Tensor) -> Tensor:
        """The directions of tokens, in a shape that multiplies a stack [C,B,L,D], [C,B,D] or [C,L,D]."""
        directions = self.model.tokens_to_residual_directions(tokens).to(stack)
        axes, inner = directions.dim() - 1, stack.shape[1:-1]
        if axes == 1 and len(inner) == 2 and self.has_batch_dim and len(directions) == inner[0]:
            directions = rearrange(directions, "B D -> B 1 D")  # one for each prompt, at every position
        elif axes and directions.shape[:-1] != inner:
            raise PromptError(
                f"tokens are one for all, one for each of the prompts, or of shape {tuple(inner)}, not "
                f"{tuple(directions.shape[:-1])}"
            )
        return directions


def positions_of(value: Tensor, pos_slice: PositionSlice) -> Tensor:
    """Some positions of a value [...,L,D]; a single int drops the axis."""
    if pos_slice is None:
        return value
    length = value.shape[-2]
    if isinstance(pos_slice, int):
        if not -length <= pos_slice < length:
            raise PositionError(
                f"pos_slice={pos_slice}: this run has {length} positions, from {-length} to {length - 1}"
            )
        return value.select(-2, pos_slice)
    if isinstance(pos_slice, tuple):
        pos_slice = slice(*pos_slice)
    return value[..., pos_slice, :]
