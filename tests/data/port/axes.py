"""States and writes of a Mamba-1 as TransformerLens 4 has them: channels before positions, [B,E,L,N]."""

from functools import partial

import torch
from transformer_lens import TransformerBridge

model = TransformerBridge.boot_transformers("state-spaces/mamba-130m-hf")
for block in model.blocks:
    block.mixer.eager_scan = True
tokens = torch.tensor([[3, 1, 7, 9, 4, 2], [5, 5, 8, 1, 0, 6]])
STATE, WRITE = "blocks.1.mixer.hook_ssm_state", "blocks.0.mixer.hook_ssm_write"
seen, gradients = {}, {}


def clear_a_position(s, hook):
    s[:, :, 3] = 0


def keep_a_channel(s, hook, channel):
    kept = torch.zeros_like(s)
    kept[:, channel] = s[:, channel]
    return kept


def record(s, hook):
    seen[hook.name] = s.detach().clone()
    seen[f"{hook.name} flat"] = s.view(len(s), -1).detach().clone()


def by_place(value, hook):
    if "ssm" in hook.name:
        value[:, :, 2] *= 3
    elif hook.name.endswith("hook_y"):
        value[:, 2] = 0


plain = model(tokens)
in_place = model.run_with_hooks(tokens, fwd_hooks=[(STATE, clear_a_position)])
returned = model.run_with_hooks(tokens, fwd_hooks=[(WRITE, partial(keep_a_channel, channel=2))])
short = model.run_with_hooks(tokens, fwd_hooks=[(WRITE, lambda w, hook: w * torch.arange(6)[:, None])])
read = model.run_with_hooks(tokens, fwd_hooks=[(WRITE, record), (STATE, record), ("blocks.2.hook_y", record)])
triples = []
for layer in range(3):
    for kind in ("state", "write"):
        triples.append((f"blocks.{layer}.mixer.hook_ssm_{kind}", by_place))
    triples.append((f"blocks.{layer}.hook_y", by_place))
mixed = model.run_with_hooks(tokens, fwd_hooks=triples)
by_two = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith(("hook_y", "state")), by_place)])
by_test = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("ssm_write"), by_place)])

with model.hooks(fwd_hooks=[(STATE, clear_a_position)]):
    inside, edited = model.run_with_cache(tokens, names_filter=[STATE, "blocks.1.hook_y"])
edited_state, edited_y = edited[STATE][:, :, 3], edited["blocks.1.hook_y"]
model.add_hook(WRITE, clear_a_position)
added = model(tokens)
model.reset_hooks()


def keep_gradient(gradient, hook):
    gradients[hook.name] = gradient.clone()
    gradient = gradient.clone()
    gradient[:, :, 1] = 0
    return gradient


with model.hooks(bwd_hooks=[(STATE, keep_gradient), (WRITE, keep_gradient)]):
    model(tokens)[:, -2:, :5].sum().backward()

logits, cache = model.run_with_cache(tokens)
state, write = cache[STATE][:, :, 3], cache["blocks.0.mixer.hook_ssm_write"]
per_layer = [cache[f"blocks.{layer}.mixer.hook_ssm_state"][0, :, 2] for layer in range(3)]
shapes = {name: tuple(value.shape) for name, value in cache.items() if "ssm_" in name}
norms = {name: value[:, :, 1].norm() for name, value in cache.items() if "ssm_" in name}
_, one = model.run_with_cache(tokens[:1], remove_batch_dim=True)
one_state = one[STATE][:, 3]
written = model.run_with_cache(tokens, names_filter=lambda name: "ssm_write" in name)[1][WRITE][:, :, 1]
both = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(("ssm_write", "hook_y")))[1]
both_norms = {name: value[:, :, 1].norm() for name, value in both.items() if "ssm_" in name}
stopped, early = model.run_with_cache(tokens, stop_at_layer=2)
early_state = early[STATE][:, :, 4]
projected = early["blocks.1.mixer.in_proj.hook_out"]
y = model.run_with_cache(tokens, names_filter="blocks.2.hook_y")[1]["blocks.2.hook_y"]
del early, cache, one
