# %% [markdown]
# # 6. Attribution patching, steering and lenses
#
# Patching (tutorial 2) runs the model again for every cell of its grid. This tutorial is about three tools that ask
# less, or ask something else. At the end you will be able to
#
# - estimate a whole patching grid from one backward pass, and say where to trust the estimate,
# - steer what a model says, through the residual stream and through the state,
# - read out what the model would say after each layer, and what each state adds to the answer.
#
# To use a large model instead, change the cell below: `model = MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`. Look again at the layers, positions and scales chosen further down, which
# suit the small model.

# %%
import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace
from mamba_trace.interventions import steer
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.patching import attribution_grid, logit_diff, patch_grid

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
metric = logit_diff(model, " Emma", " Shelby")
tokens = model.to_str_tokens(prompt)
END = len(tokens) - 1
print(list(enumerate(tokens)))

# %% [markdown]
# In the prompt Shelby gives, so the answer is " Emma"; in the source Emma gives. They differ in token 10.
#
# ## Attribution: a grid from one backward pass
#
# A cell of a patching grid is the metric after *one* value was replaced by the source's. To first order that is the
# metric plus (the source's value minus the prompt's) times the gradient. `attribution_grid` computes all cells in
# that way, from two forwards and one backward, whatever the size of the model.

# %%
grid = patch_grid(model, prompt, source, "h", metric, progress=False)
estimate = attribution_grid(model, prompt, source, "h", metric)
print(f"correlation of the two grids: {estimate.correlation(grid):.3f}")
estimate

# %% [markdown]
# The estimate finds the right cells: the state of layer 1 from token 10 on, and nothing else. The correlation over
# all cells is close to 1. But a correlation does not see the *scale*. Compare the row of layer 1:

# %%
for name, found in (("patched", grid), ("estimated", estimate)):
    print(f"{name:9}", "  ".join(f"{tokens[p]}_{p} {found.normalized()[1, p]:.2f}" for p in range(10, 15)))

# %% [markdown]
# Patching flips the answer (1.00), and the estimate says that it goes little more than half of the way. A gradient is
# taken where the model stands now, at the prompt, and the way to the source is long. Where the metric bends along the
# way, the estimate is wrong.
#
# ## Where it errs, and `steps=`
#
# With `steps=n` the gradients are averaged over n points between the embeddings of both prompts (integrated
# gradients). That takes n forwards and backwards, which is still independent of the number of cells.

# %%
print("site       largest patched cell   estimate there with steps = 1     2     4     correlation   1       2       4")
for site in ("h", "resid_pre", "conv", "delta"):
    patched = grid if site == "h" else patch_grid(model, prompt, source, site, metric, progress=False)
    cells = patched.normalized()
    layer, position = divmod(cells.abs().argmax().item(), cells.shape[1])
    estimates = [attribution_grid(model, prompt, source, site, metric, steps=steps) for steps in (1, 2, 4)]
    there = " ".join(f"{e.normalized()[layer, position]:5.2f}" for e in estimates)
    correlations = "  ".join(f"{e.correlation(patched):6.3f}" for e in estimates)
    largest = f"layer {layer}, _{position}: {cells[layer, position]:5.2f}"
    print(f"{site:10} {largest:40} {there:22} {correlations:>35}")

# %% [markdown]
# - `resid_pre` at token 10, where the prompts differ, is the largest error: 0.15 in place of 1.00. Layers 1 to 7
#   lie between this cell and the metric. Two steps repair most of it, four nearly all.
# - `h` and `conv` have the right cells from the start. With four steps their scale is right to about a tenth as well.
# - `delta` has nothing to find: its largest cell is 0.02 of the way. Here steps make the estimate *worse*; they
#   average gradients on a way on which everything changes, and patching changes delta alone. Look at the size of a
#   grid before you believe its correlation.
#
# In short: take attribution to *find* where to look, `steps=` to sharpen it, and `patch_grid` for the numbers that
# you report.
#
# How much work does it save? For 24 layers of mamba-130m's width and 17 positions, `tests/benchmarks/patching.json`
# records 0.78 s for `attribution_grid` and 3.66 s for `patch_grid`.
#
# ## Steering: add a direction while the model generates
#
# `steer` adds a direction to a site. Here: from " Emma" to " Mary", a name that does not occur in the prompt.
# `tokens_to_residual_directions` gives the direction in the residual stream that a token's logit reads. What is
# written under `tracer.iter` acts in each of its steps: below in the first step alone, which reads the prompt and
# chooses the next word, or in both. The direction has length 1, so the scale is in units of the stream.

# %%
emma, mary = (model.to_single_token(f" {name}") for name in ("Emma", "Mary"))
toward_mary = model.tokens_to_residual_directions(torch.tensor([emma, mary])).detach()  # [2,D]
direction = toward_mary[1] - toward_mary[0]
direction = direction / direction.norm()


def steered(prompt, layer, scale, steps=1):
    """The text that is generated while a direction is added at the last position of the first steps."""
    with torch.no_grad(), model.generate(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False) as tracer:
        for _ in tracer.iter[:steps]:
            steer(model.layers[layer].resid_post, direction, scale=scale, positions=-1)
        ids = tracer.result.save()  # [B,L+2]
    return model.to_string(ids[0, -2:])


with model.trace(prompt):
    stream = model.layers[7].resid_post.output[0, -1].save()
print(f"norm of the stream after the last layer: {stream.norm():.1f}")
for scale in (0.0, 5.0, 10.0, 20.0, 40.0):
    both = steered(prompt, 7, scale, steps=2)
    print(f"scale {scale:4}: the first step {steered(prompt, 7, scale)!r:10} both steps: {both!r}")

# %% [markdown]
# At 10, about the norm of the stream itself, the model says " Mary", and goes on with a full stop as it should. At
# 40, with the direction added in both steps, it says the name twice: strong enough, it decides every word.
#
# The sweep in full, at three layers: the norm of the stream, and the probabilities of the two names after the prompt.

# %%
scales = torch.arange(0, 21, 1.0)
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True)
for panel, layer in zip(panels, (0, 3, 7), strict=True):
    rows = []
    for scale in scales.tolist():
        with torch.no_grad(), model.trace(prompt):
            norm = model.layers[layer].resid_post.output[0, -1].norm().save()
            steer(model.layers[layer].resid_post, direction, scale=scale, positions=-1)
            rows.append(model.lm_head.output[0, -1].softmax(-1).save())
    curves = torch.stack(rows)  # [scales,V]
    panel.plot(scales, curves[:, emma], label="' Emma'")
    panel.plot(scales, curves[:, mary], label="' Mary'")
    panel.set(title=f"after layer {layer}", xlabel="scale")
    at = (curves[:, mary] > curves[:, emma]).nonzero()[0, 0].item()
    first = model.to_string(curves[at].argmax()[None])
    print(f"layer {layer}, norm {norm:.1f}: ' Mary' overtakes ' Emma' at scale {scales[at]:.0f}, where", end=" ")
    print(f"{first!r} comes first with {curves[at].max():.2f}; ' Mary' at 20: {curves[-1, mary]:.2f}")
panels[0].set_ylabel("probability")
panels[0].legend()
figure.tight_layout()

# %% [markdown]
# After layers 3 and 7 the curves cross at the same scale, a little below the norm of the stream. After layer 0 the push
# that overtakes is smaller in absolute terms, but twice the stream. There, and after layer 3, a third name comes first
# where the curves cross. After layer 0 " Mary" grows slowly from there: the direction still passes through layer 1,
# which finds the answer. Steer late if you want a word, early if you want to see what the model makes of it.
#
# ## Steering the state
#
# The state can be steered as well. There a direction is what two runs differ in: the state of layer 1 at the end, for
# a prompt with another name in place of Emma, minus that of our prompt, [E,N]. What is added to `h[-1]` is carried on.
# Does it also work in *another* sentence, about other people? Row 0 of the batch below is our prompt, from Emma to
# Mary. The others are 20 differences between five names, each in five other sentences. (`steer` adds one direction to
# all rows, so here we add by hand.)

# %%
people = ("Mary", "Emma", "Sean", "Jenny", "Maria")
pairs = [("Amy", "Wendy"), ("Paul", "George"), ("Steven", "Pam"), ("Kevin", "Dennis"), ("Cindy", "Keith")]
with torch.no_grad(), model.trace([prompt.replace("Emma", name) for name in people]):
    states = model.layers[1].ssm.h[-1].output.save()  # [5,E,N]
moves = [(1, 0)] + [(old, new) for old in range(5) for new in range(5) if old != new for _ in pairs]
texts = [prompt] + 20 * [f"When {one} and {two} had lunch at work, {two} handed a letter to" for one, two in pairs]
old, new = torch.tensor(moves).T
wanted = torch.tensor([model.to_single_token(f" {name}") for name in people])[new]
for scale in (0.0, 0.5, 1.0, 2.0):
    with torch.no_grad(), model.trace(texts):
        model.layers[1].ssm.h[-1].output[:] += scale * (states[new] - states[old])  # [101,E,N]
        said = model.lm_head.output[:, -1].argmax(-1).save()
    print(f"scale {scale}: our prompt {model.to_string(said[:1])!r}, elsewhere the new name in", end=" ")
    print(f"{(said == wanted)[1:].sum()} of {len(texts) - 1}")

# %% [markdown]
# At scale 1 our prompt only says that the difference was taken rightly: it turns one state into the other. Half-way
# the model says a third name: states in between are not meaningful just because their ends are. Elsewhere the new
# name comes out in little more than a third of the rows, and with twice the difference in 60 of 100. So the state of
# layer 1 holds names in a form that sentences share in part. A single other sentence would not have told.
#
# ## Logit lens: what would the model say after each layer?
#
# Each layer adds to the residual stream, and the final norm and the unembedding read it. `logit_lens` lets them read
# it earlier. In the picture each cell names the most probable token there.

# %%
logit_lens(model, prompt)

# %% [markdown]
# Most columns begin with the token that stands there and end with what follows it. Some change in one step (the
# last), some over several layers, and some stay pale to the end: after " an" any of the things that begin with a
# vowel may follow.
#
# Now the last position, for both names:

# %%
lenses = [logit_lens(model, prompt, token=name) for name in (" Emma", " Shelby")]
top = logit_lens(model, prompt)
for row, label in enumerate(top.row_labels):
    first = top.top_tokens[row * len(tokens) + END]
    values = "  ".join(f"{lens.token} {lens.logits[row, END]:5.1f}" for lens in lenses)
    print(f"after {label:9}: most probable {first!r:8} logits: {values}")

# %% [markdown]
# After the embedding and after layer 0 the stream says " to", the token that stands there. With layer 1 the answer is
# there at once: " Emma" gets almost all of its final logit in this one layer. The layers after it add little.
#
# ## State lens: what does each state add?
#
# `state_lens` takes a single term of the stream: what the *state* of a layer writes at each position, without the
# other layers, the embedding and the D term. It reads the term with the scale that the final norm had in the run, so
# the values add up.

# %%
names = (" Emma", " Shelby", " Tom", " Mary", " Alice")
of_states = [state_lens(model, prompt, token=name) for name in names]
print("added to the logit of ", *(f"{name!r:>9}" for name in names))
for row, label in enumerate(of_states[0].row_labels):
    print(
        f"by the state of layer {label}",
        *(f"{round(lens.logits[row, END].item(), 1) + 0.0:8.1f}" for lens in of_states),
    )
together = of_states[0].logits[:, END].sum().item()
print(f"all states together: {together:.1f} of the logit {lenses[0].logits[-1, END]:.1f} of ' Emma'")
of_states[0]

# %% [markdown]
# Of the logit of " Emma" nearly all comes from one state, that of layer 1. It adds to " Shelby", too, but no more than
# to " Tom", who is not in the prompt; Mary and Alice, who are absent as well, lose. So 4.7 does not show that Shelby
# is left in this state: a lens value means something only beside a baseline. (How the giver is taken away, is the
# subject of tutorial 10.) The same state raises " Emma" at the full stop (_9), before the giver, who may be either.
#
# **What to take along.** Attribution and patching agree here on *where*, and both lenses agree on *when*: layer 1, at
# the last token. That is no proof. The logit lens reads early what the later layers were meant to read, and the state
# lens sees only what goes straight to the logits; tutorial 10 shows how such a finding is tested.
