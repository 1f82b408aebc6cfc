# %% [markdown]
# # 7. Mamba-2 and hybrids
#
# The other tutorials use a Mamba-1. This one is about the two kinds of models that came after it. At the end you will
# be able to
#
# - read and edit the state of a single head of a Mamba-2,
# - say what its convolution covers that Mamba-1's does not, and how fast each head forgets,
# - find the attention layers of a hybrid, look at their patterns, and ablate one head,
# - patch attention and SSM of one model side by side, and show through which of them the answer goes.
#
# Two small trained models ship with the package for this. They learned the same task as the Mamba-1 of the other
# tutorials: in "Emma and Shelby had fun at school. Shelby gave an apple to" the next word is the other name.
#
# To use a large model instead, change the cell below: `mamba2 = MambaTrace("state-spaces/mamba2-370m")`. The sections
# on Mamba-2 then run without another change, but the layers and heads that they single out will be others.

# %%
import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace
from mamba_trace.flow import knockout
from mamba_trace.hidden_attention import attention_maps
from mamba_trace.interventions import ablate
from mamba_trace.patching import logit_diff, patch_grid

torch.set_grad_enabled(False)
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
END = 14  # the last token, " to"

mamba2 = MambaTrace.demo("mamba2")
for name in ("D", "E", "H", "P", "G", "N"):
    print(name, "=", getattr(mamba2.cfg, name))


def show(value, width=5):
    """A number with two decimals, and without the sign of a zero."""
    return f"{round(float(value), 2) + 0.0:{width}.2f}"


# %% [markdown]
# These letters name the axes of every site: D is the width of the residual stream; E = H P are the channels of the
# SSM, in H heads of P channels. G groups of heads share B and C (here all heads form one group), and N is the size of
# the state of each channel.
#
# ## Heads
#
# In Mamba-1 each channel has its own step size, delta, and each number of the state its own decay. In Mamba-2 a head
# of P channels has **one** delta and **one** decay. The sites have the same names; their shapes say it:

# %%
with mamba2.trace(prompt):
    ssm = mamba2.layers[0].ssm
    delta = ssm.delta.output.save()
    A = ssm.A.output.save()
    A_bar = ssm.A_bar.output.save()
    B = ssm.B.output.save()
    h = ssm.h[12].output.save()
    y = ssm.y.output.save()
shapes = {
    "delta": (delta, "B L H"),
    "A": (A, "H"),
    "A_bar": (A_bar, "B L H"),
    "B": (B, "B L G N"),
    "h[12]": (h, "B H P N"),
}
for name, (value, axes) in (shapes | {"y": (y, "B L E")}).items():
    print(f"{name:6} {axes:8} {list(value.shape)}")

# %% [markdown]
# (One `with` block asks for sites in the order in which the model computes them; `print(model)` shows it.)
#
# `A_bar` is what each head keeps of its state when a token comes: 1 is everything, 0 nothing. Here it is for every
# head and token of layer 0.

# %%
tokens = mamba2.to_str_tokens(prompt)
figure, axes = plt.subplots(figsize=(9, 3.2))
image = axes.imshow(A_bar[0].T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
axes.set_xticks(range(len(tokens)), [f"{token}_{i}" for i, token in enumerate(tokens)], rotation=45, ha="right")
axes.set(ylabel="head", title="Layer 0 of the Mamba-2: what each head keeps of its state at each token (A_bar)")
figure.colorbar(image)
figure.tight_layout()
kept = A_bar[0, 5:].prod(0)  # [H]
print("kept of what was there after token 4, at the last token:")
print("  ".join(f"head {head}: {share:.2f}" for head, share in enumerate(kept)))

# %% [markdown]
# Bright heads remember, dark ones forget, and the same head does the one at some tokens and the other at others: that
# is the selection that gives these models their name. The product over tokens 5 to 14 says how much of what a head
# held after " Shelby_4" is still there at the end: most of it in head 4, next to nothing in head 3.
#
# Which of the heads matter? First patch the whole state, as in tutorial 2:

# %%
metric = logit_diff(mamba2, " Emma", " Shelby")
grid = patch_grid(mamba2, prompt, source, "h", metric, progress=False)
grid

# %% [markdown]
# Layer 0 holds most of who gives, from token 12 on. Now the same state after token 12, one head at a time. `h` is
# [B,H,P,N], so a head is an index. Beside it, each head's channels of `y` are ablated at the last token, where they
# are read; the number is the logit difference that is left.

# %%
with mamba2.trace(source):
    from_source = mamba2.layers[0].ssm.h[12].output.save()  # [B,H,P,N]
for head in range(8):
    with mamba2.trace(prompt):
        mamba2.layers[0].ssm.h[12].output[:, head] = from_source[:, head]
        patched = mamba2.lm_head.output[:, -1].save()
    with mamba2.trace(prompt):
        ablate(mamba2.layers[0].ssm.y, heads=head, positions=-1)
        ablated = mamba2.lm_head.output[:, -1].save()
    moved = (metric(patched).item() - grid.prompt_metric) / (grid.source_metric - grid.prompt_metric)
    answer = mamba2.to_string(ablated[0].argmax())
    print(f"head {head}: patched {show(moved)}   ablated at the end: {metric(ablated).item():5.1f}, answer{answer}")
print(f"all of it:      {show(grid.normalized()[0, 12])}   nothing ablated:    {grid.prompt_metric:5.1f}")

# %% [markdown]
# Heads 3, 1 and 5 carry who gives, in this order, and the other heads next to nothing of it. Head 3 is the one with
# the shortest memory in the picture above; it does not need a long one, since the giver is written shortly before the
# end. Ablating it takes away more than half of the logit difference. Yet the answer stays right without any single
# head. Ablating head 0 even raises the difference, although patching it does nothing: patching asks which heads tell
# the two prompts apart, ablation which heads move the result at all.
#
# ## The convolution covers B and C
#
# In Mamba-1, B, C and delta are computed *from* the convolved x. In Mamba-2, B and C come out of `in_proj` beside x
# and go through the same convolution; delta does not. Hence four sites that Mamba-1 lacks: `B_in` and `C_in` before
# it, `B_conv` and `C_conv` after it. An edit of `ssm_input` is an edit of x alone here. Where does the giver's name
# go through?

# %%
print("convolution over", mamba2.layers[0].ssm._module.conv1d.weight.shape[0], "columns: E + 2 G N = 128 + 32")
for site in ("x_in", "B_in", "C_in", "conv", "B_conv", "C_conv", "delta"):
    values = patch_grid(mamba2, prompt, source, site, metric, layers=0, progress=False).normalized()[0]
    print(f"{site:7}", "  ".join(f"_{p}: {show(values[p])}" for p in (10, 11, 12)))

# %% [markdown]
# The giver stands at token 10. Before the convolution its name is in x at token 10 and hardly in B or C. After it, it
# is in x at tokens 11 and 12: the taps have taken it there, and from there it is written to the state. So mainly
# *what* is written differs between the two prompts; delta has a tenth of it, and B and C next to nothing.
#
# ## Hybrids: attention beside the SSM
#
# Most new state space models have some attention. `MambaTrace.demo("hybrid")` is a Nemotron-H: each of its layers is
# an SSM *or* attention. (Falcon-H1 has both in every layer; the sites are the same.)

# %%
hybrid = MambaTrace.demo("hybrid")
for number, kind in enumerate(hybrid.layer_kinds):
    print(number, kind)
print("SSM layers", hybrid.ssm_layers, " attention layers", hybrid.attention_layers)

# %% [markdown]
# `attention_maps` shows them all in one figure: for an SSM its hidden attention (tutorial 5), which may have any
# sign, for attention its pattern, the mean over heads.

# %%
maps = attention_maps(hybrid, prompt, layers=[1, 2, 6])
maps

# %% [markdown]
# The SSM of layer 1 reads nothing from the names: their columns (2, 4, 10) are almost empty. The attention of layer 2
# goes across the sentence: in its last row, that of the token " to", it reads the two names at the beginning, and the
# verb. Here is this row for each of its four heads. A pattern is made only in a layer where somebody asks for it;
# elsewhere a fused kernel runs.

# %%
with hybrid.trace(prompt):
    pattern = hybrid.layers[2].attn.pattern.output.save()  # [B,Q,L,S]: Q query heads
    logits = hybrid.logits.output[:, -1].save()  # [B,V]
print("the answer:", repr(hybrid.to_string(logits[0].argmax())))
for head in range(4):
    read = pattern[0, head, END]
    largest = read.topk(3).indices.sort().values.tolist()
    print(f"head {head}:", "  ".join(f"{tokens[p]}_{p} {read[p]:.2f}" for p in largest))

# %% [markdown]
# All four heads read the first name, the second name or both, and " gave" at position 11. Why the verb, and not the
# giver before it? Patching answers. (In a hybrid, take `model.logits`: in some architectures the model scales what
# `lm_head` puts out.)
#
# ## 96 % through one cell
#
# Patch from the prompt in which Emma gives. Rows of a grid are the layers that have the site.

# %%
metric = logit_diff(hybrid, " Emma", " Shelby")
for site in ("h", "ssm_out", "attn_out"):
    grid = patch_grid(hybrid, prompt, source, site, metric, progress=False)
    print(f"{site}: layers {grid.layers}; cells of at least 0.15:")
    for row, p in (grid.normalized() >= 0.15).nonzero().tolist():
        print(f"    layer {grid.layers[row]}, {tokens[p]}_{p}: {show(grid.normalized()[row, p])}")
grid  # the last of the three: attn_out

# %% [markdown]
# - `h`: **no cell**. In the Mamba-1 and the Mamba-2 the state of some layer holds who gives. Here no state does.
# - `ssm_out`: what layer 0 adds at the giver's token (_10), then what layer 1 adds at the verb (_11). A step of one
#   token is within reach of the convolution of layer 1, which needs no state.
# - `attn_out`: of the cells of two layers and fifteen tokens only one counts: layer 2 at the last token. It moves the
#   logit difference 96 % of the way. The giver's name, which the SSMs have brought to the verb, is read there by
#   attention.
# - Layers 3 and 7 at the end have some of it too: they work on what attention has put there. Cells of a grid are no
#   shares of a whole and need not sum to 1.
#
# The grid of `h` asks about the giver alone. A harder test: take away all memory of all SSMs. With `A_bar` at 0 a
# state holds nothing but what its own token has just written.

# %%
for name, tested in (("hybrid", hybrid), ("Mamba-2", mamba2)):
    with tested.trace(prompt):
        for layer in tested.ssm_layers:
            ablate(tested.layers[layer].ssm.A_bar)
        forgetful = tested.lm_head.output[:, -1].save()  # in both of these models the logits
    left = logit_diff(tested, " Emma", " Shelby")(forgetful).item()
    print(f"{name} without memory: logit difference {left:.1f}, answer{tested.to_string(forgetful[0].argmax())}")

# %% [markdown]
# Without any memory in its SSMs the hybrid still gives the right answer, with most of its logit difference (it was
# 13.4). The Mamba-2 no longer knows the names. So on this prompt what the hybrid's SSMs contribute from token to
# token goes through their convolutions.
#
# Is it *where* attention looks that differs between the prompts, or *what* it finds? Patch its parts, in layer 2:

# %%
for site in ("attn.q", "attn.k", "attn.v", "attn.z"):
    values = patch_grid(hybrid, prompt, source, site, metric, layers=2, progress=False).normalized()[0]
    cells = [f"{tokens[p]}_{p} {show(v)}" for p, v in enumerate(values) if v >= 0.15]
    print(f"{site}:", *(cells or ["no cell of at least 0.15"]))

# %% [markdown]
# The query asks the same in both prompts: no cell. Three quarters are in the *values* at the verb, one quarter in its
# *keys*: attention reads there who gives, and also looks at the verb more or less by who it is. `z`, what the heads
# have read, again has all of the 96 %.
#
# ## Ablate a head of attention
#
# `z` has an axis of heads: [B,L,Q,W]. Take away one head in layer 2, then pairs, then all:

# %%
for heads in (0, 1, 2, 3, [0, 3], [1, 2], [0, 1, 2, 3]):
    with hybrid.trace(prompt):
        ablate(hybrid.layers[2].attn.z, heads=heads)
        ablated = hybrid.logits.output[:, -1].save()
    answer = hybrid.to_string(ablated[0].argmax())
    print(f"without {heads!s:12} logit difference {metric(ablated).item():5.1f}, answer{answer}")

# %% [markdown]
# No single head is needed: the four share the work. Heads 0 and 3, the two that read the first name most, are needed
# together, and 1 and 2 are not.
#
# ## Knock-out through the SSM and through attention
#
# In a hybrid information has two ways from one token to another. `knockout` cuts the flow through the SSMs, and warns
# if attention goes on carrying it. With `attention=False` you say that you mean it, with `attention=True` both are
# cut.

# %%
print("cut from -> to the last token     SSM only                  SSM and attention")
for position in (2, 4, 10, 11):
    line = f"{tokens[position]}_{position}".ljust(30)
    for attention in (False, True):
        with hybrid.trace(prompt):
            knockout(hybrid, position, END, attention=attention)
            cut = hybrid.logits.output[:, -1].save()
        line += f"{metric(cut).item():8.1f} {hybrid.to_string(cut[0].argmax()):16}"
    print(line)

# %% [markdown]
# Without the SSM's flow nothing changes. With attention cut as well, the first name is lost if its own token (_2) is
# cut, and most of who gives if the *verb* (_11) is cut, as patching said; cutting the giver's own token (_10) changes
# next to nothing. Cutting the second name raises the difference, as it should: it is the wrong answer.
#
# **What to take along.** The same sentences, learned by three architectures, are solved in three ways. Who gives is
# held by the state of layer 1 in the Mamba-1, mainly by three heads of layer 0 in the Mamba-2, and by attention in
# the hybrid, to which the SSMs serve as a short convolution. With one vocabulary for all of them, the code above was
# the same each time.
