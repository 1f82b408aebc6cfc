"""The language-modelling loss of given logits, averaged over real tokens only.

Logits at one position predict the token at the next. In a padded batch some of these pairs contain padding: a
pair counts only if both of its tokens are real.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments.padding import checked_mask, remembered
from ..errors import PromptError


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, per_token: bool = False) -> Tensor:
    """Cross entropy, in nats, of each next token.

    Args:
        logits: [B,L,V], any floating dtype; half precision is computed in float32.
        tokens: the token ids [B,L] that the logits were computed from.
        mask: attention mask [B,L], 1 on tokens and 0 on padding. Tokens from ``to_tokens`` know theirs; other
            tokens without a mask all count.
        per_token: return the loss of every pair instead of their mean.

    Returns:
        The mean over pairs of real tokens, a scalar; or [B,L-1], which is 0 where either token is padding.

    Raises:
        PromptError: if the shapes disagree, or no prompt has two tokens.

    Example::

        tokens = model.to_tokens("Lately, Emma and Shelby had fun")
        loss = next_token_loss(model.run_with_hooks(tokens), tokens)
    """
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise PromptError(
            f"a loss takes logits [B,L,V] and their tokens [B,L], not {tuple(logits.shape)} and {tuple(tokens.shape)}"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise PromptError(f"the mask {tuple(mask.shape)} of tokens {tuple(tokens.shape)} has another shape")
    mask = remembered(tokens) if mask is None else checked_mask(mask, tuple(tokens.shape))
    targets = tokens[:, 1:].to(logits.device)  # [B,L-1]
    counted = torch.ones_like(targets, dtype=torch.bool)
    if mask is not None:
        real = mask.to(logits.device).bool()
        counted = real[:, 1:] & real[:, :-1]
    if not bool(counted.any()):
        raise PromptError("no token of this prompt has a next one, so there is no loss: give two or more")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = -wide.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [B,L-1]
    losses = torch.where(counted, losses, 0.0)
    return losses if per_token else losses.sum() / counted.sum()
