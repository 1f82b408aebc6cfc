"""Hugging Face's blocks and their norm, made hookable: what stands in one layer, and what it adds to the stream.

There are four kinds of block, by what they add to the residual stream and when:

* `HookableBlock`: one part, after a norm. The part is the SSM; in a Nemotron-H it may be attention or an MLP;
* `TwoStepBlock`: the SSM or attention, and then an MLP or experts (Jamba, Bamba, Granite 4);
* `ParallelBlock`: the SSM and attention side by side, and then an MLP (Falcon-H1);
* `SharedBlock`: the SSM, to whose input a shared transformer adds (Zamba, Zamba2).

A class of a block says by `parts_named` what Hugging Face calls its parts.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..scan.norm import rms_norm
from ..scan.reference import accumulation_dtype, in_dtype
from ..sites import Kind
from ..tracing import Visit, take_note_of_mask, uncompiled
from .offers import Offers, add_sites
from .starting import Starting, columns_read
from .unwatched import of_block


class HookableRMSNorm(nn.Module):
    """Mixin over Hugging Face's RMSNorm, which rounds float64 to float32: this one does not."""

    weight: nn.Parameter
    variance_epsilon: float
    #: Whether it multiplies by its weight before it rounds to the model's dtype.
    wide_weight = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, wide_weight=self.wide_weight)


@functools.cache
def steps_of(path: str) -> tuple[str, ...]:
    """The names on the way to a module."""
    return tuple(path.split("."))


class Block(nn.Module):
    """What all blocks share.

    Attributes:
        parts_named: the package's name of a part of the block -> the name of the module.
        returned: how many values Hugging Face's block returns in a tuple; 0 if it returns a tensor.
        gradient_checkpointing: whether the block is run again in the backward pass.
    """

    scope = "block"
    parts_named: ClassVar[dict[str, str]] = {"norm": "norm", "ssm": "mixer"}
    returned = 0
    gradient_checkpointing: bool

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.gradient_checkpointing and Visit(self).tracing):
            return super().__call__(*args, **kwargs)
        # It would run the block again in the backward pass, without the edits of the trace.
        self.gradient_checkpointing = False
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.gradient_checkpointing = True

    def part(self, name: str) -> Any:
        """A part of the block by the package's name of it, or ``None``."""
        path = self.parts_named.get(name)
        module: Any = self if path else None
        for step in steps_of(path) if path else ():
            module = None if module is None else module._modules.get(step)
        scope = PART_SCOPES.get(name)
        return module if scope is None or getattr(module, "scope", None) == scope else None

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What stands in this layer."""

    @property
    def reads_on(self) -> bool:
        """Whether it returns no more than the columns that are read behind it (`starting.columns_read`)."""
        return False

    def run(self, offer: Offers, name: str, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What a part of the block returns for ``value``."""
        return offer.called(self.part(name), self.parts_named[name], value, *args, **kwargs)

    def ended(self, offer: Offers, resid: Tensor) -> Any:
        """What the block returns, where ``resid`` [B,L,D] is the stream out of it."""
        resid = offer("resid_post", resid)
        offer.close()
        resid = offer.result(resid)
        return (resid, *[None] * (self.returned - 1)) if self.returned else resid


#: What the modules are that stand for these parts of a block: the scope of their sites.
PART_SCOPES = {"ssm": "mixer", "attn": "attn", "moe": "moe", "mlp": "mlp"}
#: What people call a layer with one of these parts.
CALLED = {"ssm": "SSM", "attn": "attention", "mlp": "MLP", "moe": "MoE"}


def called(*parts: str) -> str:
    """What people call a layer with these parts.

    >>> called("ssm", "attn")
    'SSM and attention'
    """
    return " and ".join(CALLED[part] for part in parts)


class HookableBlock(Block):
    """Mixin over a block with one part: residual stream -> norm -> part -> residual stream."""

    residual_in_fp32 = False

    @property
    def kind(self) -> Kind:
        name = next(name for name in PART_SCOPES if self.part(name) is not None)
        if name == "ssm":
            return ssm_kind(self.part("ssm"))
        out = "attn_out" if name == "attn" else "mlp_out"
        return Kind(called(name), (name, out), None)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        offer = Offers(self)
        run = functools.partial(self.added, offer, hidden_states, cache, attention_mask, kwargs)
        mixer = None if offer.open else self.part("ssm")
        out = run() if mixer is None else of_block(offer.visit, mixer, hidden_states, cache, attention_mask, run)
        return self.ended(offer, out)

    def added(
        self, offer: Offers, hidden_states: Tensor, cache: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """The residual stream behind the block [B,L,D]."""
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        layer_input = offer("layer_input", resid)  # [B,L,D]
        normalized = self.run(offer, "norm", in_dtype(layer_input, self.part("norm").weight.dtype))  # [B,L,D]
        if self.residual_in_fp32:
            resid = in_dtype(resid, accumulation_dtype(resid))
        if self.reads_on:
            resid = columns_read(cache, resid, self.part("ssm").layer_idx)
        return resid + self.term(offer, normalized, cache, attention_mask, kwargs)

    @property
    def reads_on(self) -> bool:
        return self.part("ssm") is not None

    def term(
        self, offer: Offers, normalized: Tensor, cache: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """What the part adds to the stream [B,L,D]."""
        take_note_of_mask(offer.visit.interleaver, attention_mask)
        return self.run(offer, "ssm", normalized, cache=cache, attention_mask=attention_mask)


def ssm_kind(mixer: Any, *parts: str, name: str = "SSM", early: tuple[str, ...] = ()) -> Kind:
    """The kind of a layer with an SSM and the parts beside it."""
    return Kind(name, parts, mixer.family, mixer.lacks, early, mixer.norm_first, tuple(mixer.own_axes.items()))


class MlpBlock(Block):
    """What blocks share whose second half is an MLP, experts or both.

    Attributes:
        residual_multiplier: what both terms are multiplied by.
    """

    parts_named: ClassVar[dict[str, str]] = {
        "norm": "input_layernorm",
        "ssm": "mamba",
        "attn": "self_attn",
        "norm_2": "pre_ff_layernorm",
        "mlp": "feed_forward",
        "moe": "feed_forward",
    }
    residual_multiplier: Any = 1.0

    def second_half(self, offer: Offers, resid: Tensor) -> Any:
        """From the middle of the block to its end, where ``resid`` [B,L,D] is the stream in the middle."""
        resid = offer("resid_mid", resid)
        normalized = self.run(offer, "norm_2", offer("mlp_input", resid))
        term = offer("mlp_out", times(self.fed(offer, normalized), self.residual_multiplier))
        return self.ended(offer, resid + term)

    def fed(self, offer: Offers, normalized: Tensor) -> Tensor:
        """What the MLP or the experts return [B,L,D]."""
        return self.run(offer, "moe" if self.part("mlp") is None else "mlp", normalized)


class TwoStepBlock(MlpBlock):
    """Mixin over a block of two halves: the SSM or attention, then an MLP, experts or both."""

    @property
    def kind(self) -> Kind:
        moe = ("moe",) if self.part("moe") is not None else ()
        second = ("mid", *moe, "mlp_out")
        if self.part("ssm") is not None:
            return ssm_kind(self.part("ssm"), "ssm_out", *second)
        return Kind("attention", ("attn", "attn_out", *second), None)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        offer = Offers(self)
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        normalized = self.run(offer, "norm", offer("layer_input", resid))  # [B,L,D]
        if self.part("ssm") is not None:
            out = self.run(offer, "ssm", normalized, cache=cache, attention_mask=attention_mask)
            term = offer("ssm_out", times(out, self.residual_multiplier))
        else:
            out, _ = self.run(offer, "attn", normalized, attention_mask=attention_mask, cache=cache, **kwargs)
            term = offer("attn_out", times(out, self.residual_multiplier))
        return self.second_half(offer, resid + term)


class ParallelBlock(MlpBlock):
    """Mixin over a block whose first half is the SSM and attention side by side, each with a factor of its own."""

    attention_in_multiplier: Any
    ssm_out_multiplier: Any
    attn_out_multiplier: Any

    @property
    def kind(self) -> Kind:
        parts = ("ssm_out", "attn", "attn_out", "mid", "mlp_out")
        return ssm_kind(self.part("ssm"), *parts, name=called("ssm", "attn"))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        mamba_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        offer = Offers(self)
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        normalized = self.run(offer, "norm", offer("layer_input", resid))  # [B,L,D]
        out = self.run(offer, "ssm", normalized, cache=cache, attention_mask=mamba_attention_mask)
        first = offer("ssm_out", times(out, self.ssm_out_multiplier))
        scaled = times(normalized, self.attention_in_multiplier)
        out, _ = self.run(offer, "attn", scaled, attention_mask=attention_mask, cache=cache, **kwargs)
        second = offer("attn_out", times(out, self.attn_out_multiplier))
        return self.second_half(offer, resid + (first + second))


class ZambaBlock(Block):
    """Mixin over a Zamba's block with an SSM alone, which may stand inside of a `SharedBlock`."""

    parts_named: ClassVar[dict[str, str]] = {"norm": "input_layernorm", "ssm": "mamba"}

    reads_on = True

    @property
    def kind(self) -> Kind:
        return ssm_kind(self.part("ssm"))

    def forward(
        self,
        hidden_states: Tensor,
        original_hidden_states: Tensor | None = None,
        layer_idx: int | None = None,
        attention_mask: Tensor | None = None,
        causal_mask: Tensor | None = None,
        cache: Any = None,
        transformer_hidden_states: Tensor | None = None,
        outer: Offers | None = None,
        **kwargs: Any,
    ) -> Any:
        """The residual stream behind the SSM [B,L,D].

        Args:
            hidden_states: the stream before it [B,L,D].
            attention_mask: which columns are tokens [B,L].
            transformer_hidden_states: what a shared transformer adds to the SSM's input.
            outer: the sites of the `SharedBlock` that this block stands in.
        """
        sites = Offers(self) if outer is None else outer
        resid = hidden_states if outer is not None else sites("resid_pre", hidden_states)
        into_ssm = resid if transformer_hidden_states is None else resid + transformer_hidden_states
        layer_input = sites("layer_input", into_ssm)
        offer = sites if outer is None else Offers(self)  # made once a worker may have come from outside
        normalized = self.run(offer, "norm", layer_input)
        term = self.run(offer, "ssm", normalized, cache=cache, attention_mask=attention_mask)
        resid = columns_read(cache, resid, self.part("ssm").layer_idx) + term
        return self.ended(sites, resid) if outer is None else resid


class SharedBlock(Block):
    """Mixin over a block with an SSM to whose input a transformer adds, the weights of which layers share.

    What the transformer adds is no term of the residual stream. The SSM and its norm stand in a block of their own
    inside of this one; their sites are this one's.

    Attributes:
        shared: the name of the transformer's module.
    """

    shared = "shared_transf"
    reads_on = True
    linear: nn.Linear
    mamba_decoder: Any

    def made_hookable(self) -> None:
        """Take note that the block inside has no sites of its own."""
        self.mamba_decoder.scope = None
        add_sites(self.mamba_decoder, (), {})

    @property
    def kind(self) -> Kind:
        name = f"{called('ssm')} with a shared transformer"
        return ssm_kind(self.part("ssm"), "attn", "shared_out", name=name, early=("attn", "shared_out"))

    def forward(
        self,
        hidden_states: Tensor,
        original_hidden_states: Any = None,
        layer_idx: int | None = None,
        attention_mask: Tensor | None = None,
        causal_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        offer = Offers(self)
        resid = offer("resid_pre", hidden_states)  # [B,L,D]
        if isinstance(cache, Starting):
            layer = self.mamba_decoder.mamba.layer_idx
            original_hidden_states = cache.original(layer, original_hidden_states, len(resid))
        transformer: Any = self._modules[self.shared]
        read = transformer(
            offer.into(self.shared, resid),
            original_hidden_states=original_hidden_states,
            layer_idx=layer_idx,
            attention_mask=causal_mask,
            cache=cache,
            **kwargs,
        )
        added = offer("shared_out", self.linear(read))  # [B,L,D]
        return self.ended(
            offer,
            self.mamba_decoder(
                offer.into("mamba_decoder", resid),
                transformer_hidden_states=added,
                attention_mask=attention_mask,
                cache=cache,
                outer=offer,
            ),
        )


def times(value: Tensor, factor: Any) -> Tensor:
    """``value`` multiplied by a factor of the model, and ``value`` itself where that is 1."""
    return value if factor == 1 else value * factor
