# ruff: noqa: E741
"""Caches, and the ways to say what is in them."""

import torch
from mamba_lens import HookedMamba
from transformer_lens import utils

model = HookedMamba.from_pretrained("state-spaces/mamba-130m")
tokens = torch.tensor([[3, 1, 7, 9, 4, 2]])

logits, cache = model.run_with_cache(tokens)
y = cache["blocks.2.hook_y"]
matrix = cache["blocks.1.hook_A"]
last = cache["blocks.1.hook_h.5"]
first = cache["blocks.1.hook_h.0"]
short = cache["resid_pre", 0]
act = cache[utils.get_act_name("resid_post", 2)]
final = cache["hook_norm"]

_, looped = model.run_with_cache(tokens, return_type=None)
states = [[looped[f"blocks.{l}.hook_h.{p}"] for p in range(6)] for l in range(3)]
streams = [looped[f"blocks.{l}.hook_resid_pre"] for l in range(3)]
gate = looped["blocks.1.hook_skip"]
alone = looped["blocks.2.hook_h.4"]
for name in ["hook_embed", "blocks.0.hook_delta"]:
    print(looped[name].shape)
backwards = [looped[f"blocks.0.hook_h.{5 - p}"] for p in range(3)]

_, filtered = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_y"))
ys = list(filtered.items())
_, listed = model.run_with_cache(tokens, names_filter=["blocks.1.hook_conv", "blocks.0.hook_C"])
conv, C = listed["blocks.1.hook_conv"], listed["blocks.0.hook_C"]
_, by_layer = model.run_with_cache(tokens, names_filter=[f"blocks.{layer}.hook_resid_post" for layer in range(3)])
lens = torch.stack([by_layer["resid_post", layer] for layer in range(3)])
from_the_end = by_layer["resid_post", -1]
everything = model.run_with_cache(tokens)[1]
sizes = {name: tuple(value.shape) for name, value in everything.items()}
squeezed_logits, squeezed = model.run_with_cache(tokens, remove_batch_dim=True)
squeezed_y, squeezed_A = squeezed["blocks.0.hook_y"], squeezed["blocks.0.hook_A"]
stream, early = model.run_with_cache(tokens, stop_at_layer=2)
early_y = [early[f"blocks.{layer}.hook_y"] for layer in range(2)]


def hooked_cache(prompt):
    with model.hooks(fwd_hooks=[("blocks.0.hook_y", lambda y, hook: y * 2)]):
        edited_logits, edited = model.run_with_cache(prompt, names_filter="blocks.1.hook_y")
    return edited_logits, edited["blocks.1.hook_y"]


edited_logits, edited_y = hooked_cache(tokens)

with model.hooks(fwd_hooks=[("blocks.0.hook_y", lambda y, hook: y * 2)]):
    _, edited_cache = model.run_with_cache(tokens)
edited_streams = [edited_cache[f"blocks.{layer}.hook_resid_post"] for layer in range(3)]
edited_states = [edited_cache[f"blocks.2.hook_h.{p}"] for p in range(6)]
edited_ends = [edited_cache[f"blocks.{layer}.hook_h.5"] for layer in range(2)]
edited_norm = edited_cache["hook_norm"]
