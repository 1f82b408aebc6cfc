# %% [markdown]
# # 6. Attribution patching, steering and lenses
#
# Patching (tutorial 2) runs the model again for every cell of its grid. This tutorial is about three tools that ask
# less, or ask something else. At the end you will be able to
#
# - estimate a whole patching grid from one backward pass, and say where to trust the estimate,
# - steer what a model generates, through the residual stream and through the state,
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
print(
    f"{'site':10} largest patched cell   estimate there with steps = 1     2     4     correlation   1       2       4"
)
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
# - `resid_pre` at token 10, where the prompts differ, is the largest error: 0.15 in place of 1.00. The whole network
#   lies between this cell and the metric. Two steps repair most of it, four nearly all.
# - `h` and `conv` have the right cells from the start. With four steps their scale is right to about a tenth as well.
# - `delta` has nothing to find: its largest cell moves the metric by 0.02. Here steps make the estimate *worse*; they
#   average gradients on a way on which everything changes, and patching changes delta alone. Look at the size of a
#   grid before you believe its correlation.
#
# In short: take attribution to *find* where to look, `steps=` to sharpen it, and `patch_grid` for the numbers that
# you report.
#
# How much work does it save? For this tiny model, none worth the name. For 24 layers of mamba-130m's width and 17
# positions, `tests/benchmarks/patching.json` records 0.78 s for `attribution_grid` and 3.66 s for `patch_grid`.
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
    print(
        f"scale {scale:4}: the first step {steered(prompt, 7, scale)!r:10} both steps: {steered(prompt, 7, scale, 2)!r}"
    )

# %% [markdown]
# At 10, about the norm of the stream itself, the model says " Mary", and goes on with a full stop as it should. At
# 40, with the direction added in both steps, it says the name twice: a direction that is strong enough decides every
# word.
#
# The sweep in full, at three layers: the probabilities of the two names after the prompt.

# %%
scales = torch.arange(0, 21, 1.0)
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True)
for panel, layer in zip(panels, (0, 3, 7), strict=True):
    rows = []
    for scale in scales.tolist():
        with torch.no_grad(), model.trace(prompt):
            steer(model.layers[layer].resid_post, direction, scale=scale, positions=-1)
            rows.append(model.lm_head.output[0, -1].softmax(-1)[[emma, mary]].save())
    curves = torch.stack(rows)  # [scales,2]
    panel.plot(scales, curves[:, 0], label="' Emma'")
    panel.plot(scales, curves[:, 1], label="' Mary'")
    panel.set(title=f"after layer {layer}", xlabel="scale")
    crossing = scales[(curves[:, 1] > curves[:, 0]).nonzero()[0, 0]].item()
    print(
        f"layer {layer}: ' Mary' overtakes ' Emma' at scale {crossing:.0f}; its probability at 20 is {curves[-1, 1]:.2f}"
    )
panels[0].set_ylabel("probability")
panels[0].legend()
figure.tight_layout()

# %% [markdown]
# After layers 3 and 7 the curves cross at about the same scale: the layers between them do little at this position.
# After layer 0 a smaller push is enough to move the model away from " Emma". But between the two names there is a gap
# where neither is probable, so a third token is, and the probability of " Mary" grows slowly. There the direction
# still passes through layer 1, which finds the answer and was not made for such input. Steer late if you want a word,
# early if you want to see what the model makes of it.
#
# ## Steering the state
#
# The state can be steered as well. There a direction is what two runs differ in: the state of layer 1 at the end, for
# a prompt with Mary in place of Emma, minus that of our prompt, [E,N]. What is added to `h[-1]` is carried on. Does
# it also work in *another* sentence, about other people?

# %%
with_mary = prompt.replace("Emma", "Mary")
with torch.no_grad(), model.trace(with_mary):
    h_mary = model.layers[1].ssm.h[-1].output[0].save()
with torch.no_grad(), model.trace(prompt):
    h_emma = model.layers[1].ssm.h[-1].output[0].save()
difference = h_mary - h_emma  # [E,N]
elsewhere = "When Paul and John had lunch at work, John handed a letter to"
for scale in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0):
    said = []
    for text in (prompt, elsewhere):
        with torch.no_grad(), model.generate(text, max_new_tokens=2, min_new_tokens=2, do_sample=False) as tracer:
            for _ in tracer.iter[:1]:
                steer(model.layers[1].ssm.h[-1], difference, scale=scale)
            ids = tracer.result.save()
        said.append(model.to_string(ids[0, -2:]))
    print(f"scale {scale:4}: Emma and Shelby -> {said[0]!r:12} Paul and John -> {said[1]!r}")

# %% [markdown]
# At scale 1 the first line only says that the difference was taken rightly: it turns one state into the other. The
# second is a finding: the same difference, made from one pair of prompts, puts " Mary" into a sentence about Paul and
# John. So the state of layer 1 holds names in a form that does not depend on who else is there. Half-way, at 0.5, the
# model says a third name in the first sentence: states in between are not meaningful just because their ends are.
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
of_states = [state_lens(model, prompt, token=name) for name in (" Emma", " Shelby")]
for row, label in enumerate(of_states[0].row_labels):
    emma_gets, shelby_gets = (round(lens.logits[row, END].item(), 1) + 0.0 for lens in of_states)
    print(f"state of layer {label}: adds {emma_gets:5.1f} to ' Emma', {shelby_gets:5.1f} to ' Shelby'")
together = of_states[0].logits[:, END].sum().item()
print(f"all states together: {together:.1f} of the logit {lenses[0].logits[-1, END]:.1f} of ' Emma'")
of_states[0]

# %% [markdown]
# Of the logit of " Emma" nearly all comes from one state, that of layer 1. It adds to " Shelby" too, but a third as
# much: both names are in this state, one of them weakened. (How, is the subject of tutorial 10.) In the picture the
# same state raises " Emma" at the full stop (_9), too. There the next word is the giver, who may be either of the
# two.
#
# **What to take along.** Attribution and patching agree here on *where*, and both lenses agree on *when*: layer 1, at
# the last token. That is no proof. The logit lens reads early what the later layers were meant to read, and the state
# lens sees only what goes straight to the logits; tutorial 10 shows how such a finding is tested.
