"""The next-token loss on its own; tests/test_run_with.py compares it with Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from conftest import agree

from mamba_trace.errors import PromptError
from mamba_trace.hooked.losses import next_token_loss


def test_a_loss_needs_two_tokens_of_one_length() -> None:
    logits, tokens = torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.long)
    agree(next_token_loss(logits, tokens), torch.tensor(5.0).log())
    with pytest.raises(PromptError, match="has a next one"):
        next_token_loss(logits[:, :1], tokens[:, :1])
    with pytest.raises(PromptError, match="has a next one"):
        next_token_loss(logits, tokens, torch.tensor([[0, 1]]))
    with pytest.raises(PromptError, match=r"\(1, 2, 5\) and \(1, 3\)"):
        next_token_loss(logits, torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(PromptError, match="another shape"):
        next_token_loss(logits, tokens, torch.ones(2))
