# ruff: noqa: F722
"""Which layer's state, after which token, holds who gave the apple?"""

from functools import partial

import torch
from jaxtyping import Float
from mamba_lens import HookedMamba
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

model = HookedMamba.from_pretrained("state-spaces/mamba-370m", device="cpu")
clean = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
dirty = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
clean_tokens = model.to_tokens(clean)
dirty_tokens = model.to_tokens(dirty)
L = len(clean_tokens[0])


def difference(logits: Float[torch.Tensor, "B L V"]) -> float:
    right, wrong = model.to_single_token(" Emma"), model.to_single_token(" Shelby")
    return (logits[0, -1, right] - logits[0, -1, wrong]).item()


dirty_logits, dirty_cache = model.run_with_cache(dirty_tokens)
low = difference(dirty_logits)
high = difference(model(clean_tokens))


def patch_state(h: Float[torch.Tensor, "B E N"], hook: HookPoint, layer: int, position: int):
    return dirty_cache[hook.name]


grid = torch.zeros(model.cfg.n_layers, L)
for layer in tqdm(range(model.cfg.n_layers)):
    for position in range(L):
        hook_name = f"blocks.{layer}.hook_h.{position}"
        hook_fn = partial(patch_state, layer=layer, position=position)
        patched = model.run_with_hooks(clean_tokens, fwd_hooks=[(hook_name, hook_fn)], fast_ssm=True, fast_conv=True)
        grid[layer, position] = 1 - (difference(patched) - low) / (high - low)
