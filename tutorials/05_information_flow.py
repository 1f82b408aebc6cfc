# %% [markdown]
# # 5. Information flow
#
# Patching ([tutorial 2](02_activation_patching.ipynb)) says where information is: in this model, who gives is at
# token 10, then in the state of layer 1, then at the last token. This tutorial asks which way it takes from there to
# there. In a transformer one would look at attention patterns and cut attention from one token to another. A Mamba
# has no attention, but its tokens reach each other in only two ways, and each of them can be cut and measured
# exactly.
#
# At the end of this tutorial you will be able to
#
# - cut what one token reads from another, through the state or through the convolution,
# - see the attention matrix that is hidden in a Mamba, and what it carries towards an answer,
# - switch single tokens off by their step size delta,
# - tell channels with a long memory from channels with a short one,
# - draw the path that a name takes.

# %% [markdown]
# ## The two ways
#
# In each layer of a Mamba a token takes in what came before in two places:
#
# 1. The **convolution** mixes each token with the three before it. Nothing else reaches a token here.
# 2. The **state**. Token j writes `delta_j B_j x_j` to it, later tokens let it decay, and token i reads it with
#    `C_i`. What i reads from j is then a number times `x_j`, in each channel. These numbers are the *hidden
#    attention*.
#
# All that is between tokens passes through one of these. First the model and the question. To use a large model,
# change `model = ...` in this cell to `MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`. The text below then asks its questions of the wrong layer: put the one
# that your heatmap shows in place of `LAYER`.

# %%
import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace
from mamba_trace.flow import Cut, ZeroDelta, apply, decay_groups, decay_rate, knockout

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
tokens = model.to_str_tokens(prompt)
L, LAYER = len(tokens), 1
emma, shelby = model.to_single_token(" Emma"), model.to_single_token(" Shelby")

with model.trace(prompt):
    last = model.lm_head.output[0, -1].save()
base = (last[emma] - last[shelby]).item()
print(f"logit of ' Emma' minus logit of ' Shelby': {base:.1f}")
print("  ".join(f"{p}{token}" for p, token in enumerate(tokens)))

# %% [markdown]
# The last token, 14, must end up with the answer. The verb phrase, "Shelby gave an apple", has the giver at token 10.
#
# ## Cut what the last token reads
#
# `knockout(model, source, target, layers)` is called inside a trace. It takes away what the target token reads from
# the source token through the state, and changes nothing else. Here the last token no longer reads the giver in layer
# 1:

# %%
with model.trace(prompt):
    knockout(model, source_positions=10, target_positions=-1, layers=LAYER)
    last = model.lm_head.output[0, -1].save()
print(f"{(last[emma] - last[shelby]).item():.1f} instead of {base:.1f}")

# %% [markdown]
# More than half is gone. To see every source token in every layer, we make many such cuts. `Cut` describes a cut,
# `apply` makes it, and each invoke runs the prompt with another one. So 15 cuts are one forward pass of 15 rows.


# %%
def differences(edits, layers):
    """The logit difference with each of the edits, one row of a batch each."""
    found = {}
    with torch.no_grad(), model.trace() as tracer:
        for number, edit in enumerate(edits):
            with tracer.invoke(prompt):
                apply(model, edit, layers)
                last = model.lm_head.output[0, -1]
                found[number] = (last[emma] - last[shelby]).save()
    return torch.stack([found[number] for number in range(len(edits))])


to_last = [Cut(p, -1) for p in range(L)]
lost = torch.stack([base - differences(to_last, layer) for layer in range(model.cfg.n_layers)])

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
image = axis.imshow(lost, cmap="RdBu", vmin=-6, vmax=6, aspect="auto")
axis.set(title="Loss of logit difference when the last token no longer reads a token", ylabel="layer")
axis.set_xticks(range(L), [f"{token}_{p}" for p, token in enumerate(tokens)], rotation=45, ha="right")
figure.colorbar(image, label="what is lost")
plt.show()

# %% [markdown]
# Only layer 1 matters, as in the patching grid. There the last token reads three tokens that speak for " Emma" (4, 10
# and 12), a little from token 11, and one that speaks against it (token 6: without it the answer is even clearer).
#
# Token 4 is the second first name. Tokens 10 and 12 belong to the verb phrase: the giver, and " an".

# %%
for sources in ([10], [12], [10, 12], [10, 11, 12]):
    value = differences([Cut(sources, -1)], LAYER).item()
    print(f"without what the last token reads of {sources!s:12}: {value:.1f}")

# %% [markdown]
# Without tokens 10, 11 and 12 nearly all is gone: the model no longer knows which of the two is giving. But how does
# " an" come to know the giver?
#
# ## Cut the taps of the convolution
#
# Through the convolution a token sees itself and the three tokens before it. `Cut(..., scan=False, conv=True)` cuts
# single taps (`knockout(..., conv=True)` cuts both ways at once). Token 10 reaches tokens 10 to 13. We cut each of
# these taps in layer 1.

# %%
targets = [10, 11, 12, 13]
for target, value in zip(
    targets, differences([Cut(10, t, scan=False, conv=True) for t in targets], LAYER), strict=True
):
    print(f"tap from {tokens[10]!r} to {tokens[target]!r:9} cut: {value:.1f}")

both = [Cut(10, -1), Cut(10, 12, scan=False, conv=True)]
print(f"tap to ' an' cut, and the last token does not read token 10: {differences([both], LAYER).item():.1f}")

# %% [markdown]
# Two of the taps matter. One is token 10's own, with which it writes itself to the state. The other goes to " an",
# and cutting it costs as much as not reading " an" at all. So " an" writes the giver's name, which the convolution
# has brought to it. If this tap is cut and token 10 is not read, little is left of the answer.
#
# This is a general trap: whoever cuts only the state of a Mamba leaves a way open for three tokens.
#
# ## Hidden attention
#
# Cutting asks what happens without a read. The hidden attention shows the reads themselves: row i, column j has the
# factor with which token i reads `x_j`, as the mean over channels.

# %%
from mamba_trace.hidden_attention import contributions, hidden_attention

hidden_attention(model, prompt, LAYER)

# %% [markdown]
# The last row is what " to" reads: mostly tokens 4, 10 and 12, and itself. Unlike attention in a transformer the
# numbers may be negative, and a row does not sum to 1. The row of the full stop, token 9, is strong as well. A large
# number says that something is read, not that it is used for the answer: whether it is, the cuts say.
#
# A factor does not say what is read. `contributions` multiplies it with `x_j` and follows the result through the gate
# and `out_proj` into the residual stream. There it takes its part along a direction, here the one that raises " Emma"
# and lowers " Shelby".

# %%
directions = model.tokens_to_residual_directions(torch.tensor([emma, shelby]))  # [2,D]
toward_emma = directions[0] - directions[1]
found = contributions(model, prompt, LAYER, residual_direction=toward_emma, rows=-1)

order = found.values[0].abs().argsort(descending=True)[:5].tolist()
for p in order:
    print(f"token {p:2} {tokens[p]!r:10} {found.values[0, p].item():+.1f}")

# %% [markdown]
# Without any cut this finds the same tokens: 10, 4 and 12 for " Emma", and 6 against. That tokens 4, 10 and 12 are
# alike in size, agrees with the cuts.
#
# ## Switch a token off by delta
#
# delta is the step size of a token. With delta = 0 a token neither writes to the state nor lets it decay: for the
# state it is not there. Layer 1 uses this by itself. These are its mean deltas, in thousandths:

# %%
with model.trace(prompt):
    delta = model.layers[LAYER].ssm.delta.output[0].mean(-1).save()
print({f"{p}{token}": round(1000 * value) for p, (token, value) in enumerate(zip(tokens, delta.tolist(), strict=True))})

# %% [markdown]
# It is large at the names, and small where nothing has to be remembered. `zero_delta`, or `ZeroDelta` in `apply`,
# sets it to 0:

# %%
zeroed = differences([ZeroDelta(p) for p in range(L)], LAYER)
for p in (2, 4, 6, 8, 10, 12):
    print(
        f"delta of token {p:2} {tokens[p]!r:10} zero: {zeroed[p]:5.1f}    not read by the last token: {base - lost[1, p]:5.1f}"
    )

# %% [markdown]
# The two mostly agree, since only the last token uses what these tokens write. They differ at token 10: with its
# delta at zero the token does not write, but it does not erase either. The state then keeps what it would have
# replaced.
#
# ## Long and short memory
#
# A channel forgets with each token by the factor A_bar = exp(delta A). `decay_rate` is delta times -A, as the mean
# over the states of a channel and over the tokens of the prompt that you give. `decay_groups` divides the channels
# into thirds by it. (Without a prompt the groups are made by A alone. In this model A differs little between
# channels, and delta much, so give the prompt.)

# %%
with model.trace(prompt):
    A_bar = model.layers[LAYER].ssm.A_bar.output[0].save()  # [L,E,N], in Mamba-2 [L,H]
left = A_bar[5:].prod(dim=0).reshape(A_bar.shape[1], -1).mean(dim=-1)  # what is left of token 4 at the end
left = left.repeat_interleave(model.cfg.d_inner // len(left))  # [E]: the channels of a head have the head's
rate = decay_rate(model, LAYER, prompt)  # [E]

for name, channels in decay_groups(model, LAYER, prompt).items():
    giver, second = differences([Cut([10, 12], -1, channels), Cut(4, -1, channels)], LAYER).tolist()
    print(f"{name} channels: decay {rate[channels].mean():.2f}, left of token 4 {left[channels].mean():.0%}")
    print(f"    the last token does not read tokens 10 and 12 in them: {giver:5.1f}")
    print(f"    the last token does not read token 4 in them:          {second:5.1f}")

# %% [markdown]
# The last token reads the giver (tokens 10 and 12) through the channels of medium decay: without these the answer is
# nearly gone, without one of the other two thirds it is hardly touched. It reads token 4 through the fast channels:
# without these it prefers " Shelby". Fast is relative here. Of what token 4 has written to these channels, 15 percent
# are left at the end of this short prompt, and that is enough.
#
# ## The path
#
# Now all the ways of layer 1 in one picture. Each arc is one cut: above the line what a token reads from the state,
# below the line what the convolution brings to it. Its width is what the cut costs. First, all of them are computed.

# %%
scan_cuts = [Cut(j, i) for j in range(L) for i in range(j, L)]
conv_cuts = [Cut(j, i, scan=False, conv=True) for j in range(L) for i in range(j, min(j + 4, L))]
costs = base - torch.cat([differences(scan_cuts, LAYER), differences(conv_cuts, LAYER)])

figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
for cut, cost in zip(scan_cuts + conv_cuts, costs.tolist(), strict=True):
    j, i = cut.source_positions, cut.target_positions
    if abs(cost) < 1:
        continue
    side = 1 if cut.scan else -1
    colour = "tab:blue" if cost > 0 else "tab:red"
    if i == j:  # a token's own tap
        axis.plot([j, j], [0, 0.35 * side], color=colour, linewidth=abs(cost), solid_capstyle="round")
        continue
    angle = torch.linspace(0, torch.pi, 50)
    x, y = (i + j) / 2 - (i - j) / 2 * angle.cos(), (0.3 + 0.17 * (i - j)) * angle.sin() * side
    axis.plot(x, y, color=colour, linewidth=abs(cost), alpha=0.7, solid_capstyle="round")
for p, token in enumerate(tokens):
    axis.text(p, 0, f" {token} ", ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "0.7"})
axis.text(0, 1.5, "through the state", fontsize=10)
axis.text(0, -0.9, "through the convolution", fontsize=10)
axis.set(title="Layer 1: what each cut costs the answer (blue: carries it, red: works against it)", ylim=(-1.1, 2.3))
axis.axis("off")
plt.show()

# %% [markdown]
# All ways run from left to right. Two things remain to be checked: that the thin arcs, and those that are too thin to
# be drawn, matter as little together as they do alone, and that no other layer carries the giver.

# %%
others = [p for p in range(L) if p not in (4, 10, 12)]
only = differences([Cut(others, -1)], LAYER).item()
print(f"the last token reads only tokens 4, 10 and 12 in layer 1: {only:.1f}")

elsewhere = [layer for layer in range(model.cfg.n_layers) if layer != LAYER]
without = differences([Cut(10, range(11, L), conv=True)], elsewhere).item()
print(f"nothing of token 10 reaches a later token in any other layer: {without:.1f}")

# %% [markdown]
# Both times the answer is as clear as before. So, by which path does the giver's name get from the verb phrase to the
# end?
#
# - In layer 1 the giver, token 10, writes itself to the state. The tap of the convolution that reaches two tokens
#   back brings it to " an" as well, and " an" writes it a second time.
# - The state of layer 1 carries both writes past " apple" to the end, mostly in its channels of medium decay. No
#   token between reads them to any effect.
# - The last token reads both, and what it reads raises " Emma" and lowers " Shelby". From layer 2 on the answer stays
#   at this token, as the heatmap of tutorial 2 shows.
#
# The first names take the same kind of path: the same tap, over two tokens, brings " Emma" to token 4, which writes
# to the state.
#
# ## Where to go from here
#
# - Tutorial 7 asks the same of a Mamba-2 and of a hybrid with attention, where `attention=True` cuts the third way.
# - Tutorial 10 makes a small study of it: many prompts instead of one.
