"""Hugging Face's MLPs and mixtures of experts, made hookable: the router's logits are a site."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .offers import Offers


class HookableMLP(nn.Module):
    """Mixin over Hugging Face's MLP, which it leaves as it is: the block offers what it returns."""

    scope = "mlp"


class HookableRouter(nn.Module):
    """Mixin over Hugging Face's router: the logits are offered before the experts are chosen by them.

    Attributes:
        weight: [X,D].
        top_k: how many experts each token has.
    """

    weight: nn.Parameter
    top_k: Any

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The logits of the experts [...,X]."""
        return nn.functional.linear(hidden_states, self.weight)

    @abstractmethod
    def chosen(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights of the chosen experts and their numbers [tokens,top_k], from logits [tokens,X]."""

    def forward(self, hidden_states: Tensor, offer: Offers | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The logits [tokens,X], and the weights and numbers of the chosen experts [tokens,top_k].

        Args:
            hidden_states: [B,L,D].
            offer: of the call of the experts' module.
        """
        logits = self.logits(hidden_states)
        if offer is not None:
            logits = offer("router_logits", logits)
        logits = logits.flatten(0, -2)
        return logits, *self.chosen(logits, hidden_states.dtype)


class HookableExperts(nn.Module):
    """Mixin over Hugging Face's mixture of experts: a router chooses, and the experts compute.

    Attributes:
        router_name: what Hugging Face calls the router.
    """

    scope = "moe"
    router_name = "router"
    experts: Any

    @property
    def sizes(self) -> dict[str, int]:
        """How many experts there are."""
        return {"X": self._modules[self.router_name].weight.shape[0]}  # type: ignore[union-attr,index,dict-item]

    def forward(self, hidden_states: Tensor) -> Tensor:
        offer = Offers(self)
        router: Any = self._modules[self.router_name]
        _, weights, numbers = router(offer.into(self.router_name, hidden_states), offer=offer)
        out = self.routed(hidden_states, weights, numbers)
        offer.close()
        return offer.result(out)

    def routed(self, hidden_states: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        """What the chosen experts return for each token, weighted and added [B,L,D]."""
        return self.combined(hidden_states.flatten(0, 1), weights, numbers).view(hidden_states.shape)

    def combined(self, tokens: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighted and added [tokens,...], as wide as their input.

        A fake tensor, of which a scan asks for no more than shapes, has no numbers by which to go to an expert.
        """
        return torch.empty_like(tokens) if isinstance(tokens, FakeTensor) else self.experts(tokens, numbers, weights)
