# %% [markdown]
# # 2. Activation patching
#
# Two prompts differ in one word, and the model answers them differently. Somewhere between that word and the answer
# the model must hold what makes the difference. Activation patching finds out where: run the model on one prompt, but
# replace one value in the middle by the value from a run on the other prompt. Where that changes the answer, the
# value held what matters.
#
# At the end of this tutorial you will be able to
#
# - make the two heatmaps that such a study of a Mamba begins with, of the residual stream and of the state,
# - read them, and say where a name is held and when it moves,
# - choose a metric, a site and a window, and know what a grid costs.
#
# [Tutorial 1](01_first_trace.ipynb) explains traces, which this one uses.

# %% [markdown]
# ## The question
#
# To use a large model, change `model = ...` in the next cell to `MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`. The names Emma and Shelby are one token each for them, too. What the text
# below says of layers and tokens is true of the small model that ships with the package.

# %%
import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
emma, shelby = model.to_single_token(" Emma"), model.to_single_token(" Shelby")


def logit_difference(logits):  # [V] -> a number
    return (logits[emma] - logits[shelby]).item()


for text in (prompt, source):
    with model.trace(text):
        last = model.lm_head.output[0, -1].save()
    print(f"{logit_difference(last):+.1f}  {text}{model.to_string(last.argmax())}")

# %% [markdown]
# The metric is the logit of " Emma" minus the logit of " Shelby" at the last token. It is large and positive where
# Shelby gives, and large and negative where Emma gives. The prompts have the same length and differ in token 10
# alone, the giver. So each position means the same in both.
#
# ## The plain loop
#
# First the experiment in its plainest form: for each layer and each position from the changed token on, one run on
# `prompt` in which one value comes from the run on `source`. Two kinds of value are patched, one after the other:
#
# - `resid_pre[:, p]`, the residual stream into a layer at one token, as one would in a transformer;
# - `ssm.h[p]`, the state of a layer after one token. It has no counterpart in a transformer: it is all that this
#   layer remembers of the tokens up to p.

# %%
with model.trace(source):
    streams = [layer.resid_pre.output for layer in model.layers].save()  # [1,L,D] each
with model.trace(source):
    states = [layer.ssm.h.output for layer in model.layers].save()  # [1,L,E,N] each

with model.trace(prompt):
    last = model.lm_head.output[0, -1].save()

n_layers, n_positions = len(streams), streams[0].shape[1]
first = (model.to_tokens(prompt) != model.to_tokens(source)).nonzero()[0, 1].item()
of_stream = torch.full((n_layers, n_positions), logit_difference(last))
of_state = of_stream.clone()
for number, layer in enumerate(model.layers):
    for p in range(first, n_positions):  # before it both runs are the same
        with model.trace(prompt):
            layer.resid_pre.output[:, p] = streams[number][:, p]
            last = model.lm_head.output[0, -1].save()
        of_stream[number, p] = logit_difference(last)
        with model.trace(prompt):
            layer.ssm.h[p].output = states[number][:, p]
            last = model.lm_head.output[0, -1].save()
        of_state[number, p] = logit_difference(last)

figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for axis, values, title in zip(axes, (of_stream, of_state), ("resid_pre", "h"), strict=True):
    image = axis.imshow(values, cmap="RdBu", vmin=-13, vmax=13)
    axis.set(title=f"logit difference after patching {title}", xlabel="position", ylabel="layer")
figure.colorbar(image, ax=axes, shrink=0.6)
plt.show()

# %% [markdown]
# Dark blue is the answer on `prompt`, red the answer on `source`. Most patches change nothing: before token 10 both
# runs are the same anyway, so these cells have the unpatched value, and after it most layers hold nothing that
# matters.
#
# ## The same in one call
#
# `patch_grid` computes such a grid for any site. It gives the same numbers as the loop:

# %%
from mamba_trace.patching import attribution_grid, log_prob, logit, logit_diff, patch_grid, prob

metric = logit_diff(model, " Emma", " Shelby")
stream_grid = patch_grid(model, prompt, source, "resid_pre", metric, progress=False)
state_grid = patch_grid(model, prompt, source, "h", metric, progress=False)

print("resid_pre: same as the loop:", torch.allclose(stream_grid.values, of_stream, atol=1e-3))
print("h:         same as the loop:", torch.allclose(state_grid.values, of_state, atol=1e-3))

# %% [markdown]
# (`progress=False` leaves out the progress bar, which has no place in a stored notebook.)
#
# A grid at the end of a cell shows its picture. Pictures are normalised: 0 means "as on prompt", 1 means "as on
# source".

# %%
stream_grid

# %% [markdown]
# **The residual stream.** Into layers 0 and 1, who gives is in the stream at token 10, the word itself, and nowhere
# else. Into layer 2 and all later layers it is in the stream at token 14, " to", where the answer is read, and
# nowhere else. So the information jumps from token 10 to token 14 inside layer 1.

# %%
state_grid

# %% [markdown]
# **The state.** This is the jump. Only the state of layer 1 matters, and only from token 10 on. After token 12 it
# holds all of it: exchange this state, and the model answers as if Emma gave.
#
# After tokens 10 and 11 it is only a bit more than half. The rest comes at token 12. That is strange at first sight,
# since " an" is the same word in both prompts. Another site explains it: `write` is what each token adds to the
# state.

# %%
write_grid = patch_grid(model, prompt, source, "write", metric, progress=False)
for name, grid in (("h", state_grid), ("write", write_grid)):
    percent = (100 * grid.normalized()[1, 10:]).round().int().tolist()
    print(f"{name:5} of layer 1, tokens 10 to 14, in percent: {percent}")

# %% [markdown]
# Two tokens write who gives into the state: token 10 itself, and token 12, two tokens later. Before the state, each
# layer of a Mamba has a short convolution, through which a token sees the three tokens before it. So " an" knows the
# name two tokens back, and writes it again. [Tutorial 5](05_information_flow.ipynb) cuts these ways one by one.
#
# ## What normalised means
#
# `grid.values` has the metric of each patched run. `grid.normalized()` puts it on a scale between the two unpatched
# runs: (value - on prompt) / (on source - on prompt). Since both ends are measured, the scale is the same for every
# pair of prompts. Values above 1 or below 0 can occur: a patch can push the answer further than the source itself.

# %%
print(f"on prompt {state_grid.prompt_metric:+.2f}, on source {state_grid.source_metric:+.2f}")
value = state_grid.values[1, 10].item()
share = (value - state_grid.prompt_metric) / (state_grid.source_metric - state_grid.prompt_metric)
print(f"h[10] of layer 1 patched: {value:+.2f}, normalised {share:.2f}")

# %% [markdown]
# ## The choice of the metric
#
# A metric is any function from the logits of the last token [B,V] to a number for each row [B]. Several can be
# measured in the same runs, given as a dict.

# %%
grids = patch_grid(
    model,
    prompt,
    source,
    "h",
    {
        "logit difference": metric,
        "logit of ' Emma'": logit(model, " Emma"),
        "log probability of ' Emma'": log_prob(model, " Emma"),
        "probability of ' Emma'": prob(model, " Emma"),
    },
    progress=False,
)
for name, grid in grids.items():
    percent = (100 * grid.normalized()[1, 10:13]).round().int().tolist()
    print(f"{name:26} layer 1, tokens 10 to 12, in percent: {percent}")

# %% [markdown]
# Every metric finds the same cells and says that the state after token 12 holds all. They disagree about the half-way
# state after token 10. With it the logit difference is already slightly negative, so the model answers " Shelby". The
# probability of " Emma" is then nearly 0 and cannot fall much further, so this metric says 94 percent. The log
# probability has a long way to go from there, so it says 22. The logit difference is closest to a linear scale, and
# it is blind to what raises or lowers both names alike, which is why the literature uses it.
#
# ## Another question
#
# Where is the name that will be the answer? Now the source has another first name, and the metric compares " Emma"
# with that name.

# %%
other = "Lately, Mary and Shelby had fun at school. Shelby gave an apple to"
patch_grid(model, prompt, other, "h", logit_diff(model, " Emma", " Mary"), progress=False)

# %% [markdown]
# Again it is the state of layer 1. The name is token 2, but it enters the state only at token 4, the second name: the
# state after token 3 has nothing of it. From there it is held over ten tokens without loss, up to the last one.
#
# ## Windows
#
# In large models a fact is often held by several layers at once, and no single layer changes the answer. `window=3`
# patches each layer together with the one before and the one after it.

# %%
patch_grid(model, prompt, source, "h", metric, window=3, progress=False)

# %% [markdown]
# Here the window adds nothing: rows 0, 1 and 2 are those whose window contains layer 1, and all three show what layer
# 1 alone shows.
#
# ## What a grid costs
#
# The loop above ran the whole model for each cell. `patch_grid` computes much less, because a patch changes nothing
# before its layer and its position:

# %%
print(state_grid.plan)

# %% [markdown]
# Each cell starts at its own layer and position from the values of the unpatched run. Many cells run together as rows
# of one batch, and `memory=` says how large it may be. Cells whose value is the same in both runs, here all those
# before token 10, are not computed at all. In a large grid give `keep="folder"`: finished cells are kept there, and
# after an interrupt the same call goes on from them.
#
# Where even this is too much, a gradient estimates the whole grid from two forwards and one backward.

# %%
estimate = attribution_grid(model, prompt, source, "h", metric)
print(f"correlation with patching: {estimate.correlation(state_grid):.3f}")
percent = (100 * estimate.normalized()[1, 10:]).round().int().tolist()
print(f"layer 1, tokens 10 to 14, in percent: {percent}")

# %% [markdown]
# The estimate finds the right cells, in the right proportion, but its numbers are about half of the true ones: for
# such a large change the model is not linear. Tutorial 6 says how to improve it and when to trust it.
#
# ## Keep the result
#
# A grid holds its numbers and labels, and no model. It can be written as data, as a picture or as an interactive
# page, and read back to the last bit.

# %%
from mamba_trace.patching.result import PatchGrid

state_grid.save("state.safetensors")
state_grid.save("state.html")
same = PatchGrid.load("state.safetensors")
print(same.caption())
print("equal:", torch.equal(same.values, state_grid.values))

# %% [markdown]
# The command line makes both heatmaps of this tutorial, with an interactive page: `mamba-trace patch --site
# h,resid_pre --out page.html`. For your own question there are `--model`, `--prompt`, `--source`, `--answer` and
# `--wrong`.
#
# ## Where to go from here
#
# - [Tutorial 3](03_from_mamba_lens_and_transformer_lens.ipynb): this experiment as MambaLens writes it.
# - [Tutorial 5](05_information_flow.ipynb): by which way the name gets into the state, and out again.
