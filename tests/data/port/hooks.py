# ruff: noqa: RUF005, UP031, UP032
"""Hooks of every kind, in the order in which somebody thought of them."""

import functools

import torch
from mamba_lens import HookedMamba
from transformer_lens import utils

model = HookedMamba.from_pretrained("state-spaces/mamba-130m")
tokens = torch.tensor([[3, 1, 7, 9, 4, 2]])
N_LAYERS = 3


def halve(value, hook):
    """Half of it."""
    return value * 0.5


def clear_first(value, hook):
    value[:, 0] = 0.0


def shift(value, hook, by=0.1):
    value = value + by
    value[:, -1] -= 2 * by
    return value


def louder_in_the_middle(value, hook):
    if hook.layer() == 1:
        return value * 2


def only_looks(value, hook):
    value = value * 1000


out_of_order = model.run_with_hooks(
    tokens,
    fwd_hooks=[
        ("blocks.2.hook_y", halve),
        ("blocks.0.hook_h.3", lambda h, hook: torch.zeros_like(h)),
        (utils.get_act_name("resid_pre", 1), clear_first),
        ("blocks.0.hook_h.1", functools.partial(shift, by=-0.2)),
        ("hook_embed", shift),
        ("blocks.2.hook_y", shift),
        ("blocks." + str(N_LAYERS - 1) + ".hook_normalized_input", only_looks),
    ],
)
every_state = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: "hook_h." in name, halve)])
some_layers = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_conv", halve) for layer in (2, 1)])
two_lists = [("blocks.{}.hook_skip".format(i), halve) for i in range(N_LAYERS)]
mixed = model.run_with_hooks(tokens, fwd_hooks=two_lists + [("blocks.1.hook_h.2", clear_first)])

faded = model.run_with_hooks(
    tokens,
    fwd_hooks=[(f"blocks.{i}.hook_C", lambda C, hook, i=i: C * (i + 0.5)) for i in range(N_LAYERS)]
    + [("blocks.0.hook_B", halve)],
)
seen = {}


def record(value, hook):
    seen[hook.name] = value.detach().clone()


model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_B_bar", record), ("blocks.1.hook_A", record)])

branched = model.run_with_hooks(
    tokens, fwd_hooks=[(f"blocks.{layer}.hook_out_proj", louder_in_the_middle) for layer in range(3)]
)
made_up = []
for layer in [2, 0]:
    made_up.append((f"blocks.{layer}.hook_after_skip", louder_in_the_middle))
    made_up.append((f"blocks.{layer}.hook_ssm_input", halve))
run_time = model.run_with_hooks(tokens, fwd_hooks=made_up)

with model.hooks(fwd_hooks=[("blocks.0.hook_delta_2", halve)]):
    inside = model(tokens)
    best = model(tokens)[0, -1].argmax()
for layer in range(N_LAYERS):
    model.add_hook("blocks.%d.hook_delta" % layer, halve)
added = model(tokens)
model.reset_hooks()
plain = model(tokens)
loss = model(tokens, return_type="loss")
logits_too, loss_too = model(tokens, return_type="both")
by_length = [model(tokens[:, :length])[0, -1] for length in range(2, 5)]
