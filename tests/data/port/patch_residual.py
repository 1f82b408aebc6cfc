"""The same question of the residual stream into each block."""

from functools import partial

import mamba_lens
import torch
from transformer_lens.hook_points import HookPoint

model = mamba_lens.HookedMamba.from_pretrained("state-spaces/mamba-370m", device="cpu")
clean_tokens = model.to_tokens("Lately, Emma and Shelby had fun at school. Shelby gave an apple to")
dirty_tokens = model.to_tokens("Lately, Emma and Shelby had fun at school. Emma gave an apple to")
right, wrong = model.to_single_token(" Emma"), model.to_single_token(" Shelby")


def difference(logits):
    return (logits[0, -1, right] - logits[0, -1, wrong]).item()


dirty_logits, dirty_cache = model.run_with_cache(dirty_tokens)
clean_logits = model(clean_tokens)
low, high = difference(dirty_logits), difference(clean_logits)


def patch_residual(resid: torch.Tensor, hook: HookPoint, position: int, layer: int) -> torch.Tensor:
    dirty_resid = dirty_cache[hook.name]
    resid[:, position, :] = dirty_resid[:, position, :]
    return resid


grid = torch.zeros(model.cfg.n_layers, len(clean_tokens[0]))
for layer in range(model.cfg.n_layers):
    for position in range(len(clean_tokens[0])):
        name = f"blocks.{layer}.hook_resid_pre"
        patched = model.run_with_hooks(
            clean_tokens,
            fwd_hooks=[(name, partial(patch_residual, layer=layer, position=position))],
        )
        grid[layer, position] = 1 - (difference(patched) - low) / (high - low)
