"""Gradients by hooks of the backward pass."""

import torch
from mamba_lens import HookedMamba

model = HookedMamba.from_pretrained("state-spaces/mamba-130m")
tokens = torch.tensor([[3, 1, 7, 9, 4, 2]])
gradients = {}


def keep(grad, hook):
    gradients[hook.name] = grad.clone()


wanted = ["blocks.1.hook_h.2", "blocks.0.hook_y"]
with model.hooks(bwd_hooks=[(wanted[0], keep), ("blocks.0.hook_y", keep)]):
    logits = model(tokens)
    score = logits[0, -1, :5].sum()
    score.backward()

model.add_hook("blocks.2.hook_resid_post", keep, dir="bwd")
loss = model(tokens, return_type="loss")
loss.backward()
model.reset_hooks()
