# %% [markdown]
# # 10. Indirect objects, from the question to the circuit
#
# This is a small study of one shipped model, written as the appendix of a paper would be. At the end you will be able
# to build a set of prompts, patch many of them and report mean and spread, test single paths, claim a circuit, and
# measure with numbers whether the claim holds and where it stops.
#
# **Question.** In "Lately, Emma and Shelby had fun at school. Shelby gave an apple to" the model answers " Emma". How
# does it know?
#
# **Answer, in short.** Layer 1 does it, with four writes to its state. The token of the second name writes *both*
# names with a plus, the first of them through a tap of the convolution; the token two places after it writes the
# second name once more. The giver's token and the token two places after it write the giver's name with a minus. The
# last token reads the sum, in which one name is left.
#
# To study a large model instead, change the cell below to `MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`, and then the cell of the prompts, so that each name is one token and all
# prompts have the same length. The positions in the later cells are results for this model, not settings.

# %%
import json
import random
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image

import mamba_trace
from mamba_trace import MambaTrace
from mamba_trace.flow import knockout, knockout_conv
from mamba_trace.hidden_attention import contributions
from mamba_trace.interventions import ablate
from mamba_trace.means import mean_activation
from mamba_trace.patching import logit_diff, patch_grid
from mamba_trace.results.png import write_png

torch.set_grad_enabled(False)
model = MambaTrace.demo()
print(len(model.layers), "layers, state", tuple(model.layers[0].ssm._module.A_log.shape))

# %% [markdown]
# The model has eight layers, each with a state of 16 numbers for each of 128 channels. No gradient is needed here.
#
# ## 1. Prompts
#
# The model was trained on pairs of names; 400 pairs were held out, and `splits.json` beside the weights lists them.
# We use only these, in one sentence frame with slots, so that a position means the same in every prompt. A pair gives
# two prompts, one for each giver. The first 24 pairs are for **finding** the circuit, the next 40 for **testing** it.

# %%
PLACES, THINGS = ("school", "work", "home"), ("an apple", "an orange", "a book", "the key")
LEADS, VERBS = ("Lately", "Recently", "Today", "Once"), ("gave", "handed", "passed", "offered")
FRAME = "{lead}, {first} and {second} had fun at {place}. {giver} {verb} {thing} to"
SLOTS = "lead , first and second had fun at place . giver verb article thing to".split()
FIRST, SECOND, GIVER, END = SLOTS.index("first"), SLOTS.index("second"), SLOTS.index("giver"), len(SLOTS) - 1


class Prompts:
    """Prompts of some pairs of names. Rows 2i and 2i+1 differ only in who gives: the second name, the first."""

    def __init__(self, pairs, seed, frame=FRAME):
        rng = random.Random(seed)
        self.texts, self.right, self.wrong = [], [], []
        for pair in pairs:
            first, second = rng.sample(pair, 2)
            slots = {"lead": LEADS, "place": PLACES, "verb": VERBS, "thing": THINGS}
            words = {slot: rng.choice(choices) for slot, choices in slots.items()}
            for receiver, giver in ((first, second), (second, first)):
                self.texts.append(frame.format(first=first, second=second, giver=giver, **words))
                self.right.append(f" {receiver}")
                self.wrong.append(f" {giver}")
        self.right_ids = torch.tensor([model.to_single_token(name) for name in self.right])  # [B]
        self.wrong_ids = torch.tensor([model.to_single_token(name) for name in self.wrong])
        self.rows = torch.arange(len(self.texts))


held_out = json.loads((Path(mamba_trace.__file__).parent / "demo_model" / "splits.json").read_text())["held_out"]
finding, testing = Prompts(held_out[:24], seed=1), Prompts(held_out[24:64], seed=2)
for number in range(4):
    print(f"{finding.texts[number]} ->{finding.right[number]}")

# %% [markdown]
# ## 2. What the model does
#
# Three measures, since each alone can mislead, as section 5 shows. **Accuracy** is the share of prompts whose most
# probable next token, of all 344, is the right name. The **logit difference** compares the right name with the giver
# alone. The **margin** is the logit of the right name minus the largest of all other logits: it is positive exactly
# where the answer is right.


# %%
def measure(prompts, logits):
    """Accuracy, logit difference and margin for each prompt, from logits [B,V]: [3,B]."""
    right = logits[prompts.rows, prompts.right_ids]
    others = logits.clone()
    others[prompts.rows, prompts.right_ids] = -torch.inf
    margin = right - others.amax(-1)
    return torch.stack([(margin > 0).float(), right - logits[prompts.rows, prompts.wrong_ids], margin])


def rounded(value):
    return round(float(value), 1) + 0.0  # which makes -0.0 a 0.0


def show(name, measures):
    accuracy, difference, margin = measures
    spread = f"{rounded(difference.mean()):6.1f} ± {difference.std():.1f}"
    print(f"{name:44} {accuracy.mean():6.0%}    {spread}    {rounded(margin.mean()):6.1f}")


print(f"{'':44} right    logit diff.      margin")
for name, prompts in (("finding", finding), ("testing", testing)):
    with model.trace(prompts.texts):
        logits = model.lm_head.output[:, -1].save()  # [B,V]
    show(f"{name}, {len(prompts.texts)} prompts", measure(prompts, logits))

# %% [markdown]
# Every prompt of both sets is answered rightly, by a wide margin. (Here and below, ± is the standard deviation over
# prompts.)
#
# ## 3. Where: patching many prompts
#
# Two contrasts ask two questions. In the first, prompt and source differ only in **who gives**: patching shows where
# that is known. In the second, the source has **another first name**: patching shows where the first name itself is
# kept. For five pairs each we patch every layer and position, normalise each grid (0: as on the prompt, 1: as on the
# source), and report the mean and the standard deviation over pairs.

# %%
PAIRS = 5
contrasts = {"giver": [], "first name": []}  # of each pair: prompt, source, answer to prompt, answer to source
for i in range(0, 2 * PAIRS, 2):  # the second name gives, so the answer is the first
    contrasts["giver"].append((finding.texts[i], finding.texts[i + 1], finding.right[i], finding.right[i + 1]))
    old = finding.right[i]
    new = next(name for name in finding.right[i + 2 :] if name not in (old, finding.wrong[i]))
    contrasts["first name"].append((finding.texts[i], finding.texts[i].replace(old, new), old, new))


def mean_grid(contrast, site):
    """The grids of all pairs of a contrast: their mean as a grid, and the standard deviation [n_layers,L]."""
    grids = []
    for prompt, source, answer, other in contrasts[contrast]:
        metric = logit_diff(model, answer, other)
        grids.append(patch_grid(model, prompt, source, site, metric, progress=False))
    values = torch.stack([grid.normalized() for grid in grids])  # [pairs,n_layers,L]
    scale = {"prompt_metric": 0.0, "source_metric": 1.0}
    mean = replace(grids[0], values=values.mean(0), prompt_tokens=SLOTS, source_tokens=SLOTS, **scale)
    return mean, values.std(0)


grids = {}
questions = [("giver", site) for site in ("resid_pre", "h", "conv", "delta")] + [("first name", "h")]
for contrast, site in questions:
    grids[contrast, site] = grid, spread = mean_grid(contrast, site)
    print(f"contrast {contrast}, site {site}: largest std {spread.max():.2f}; means beyond ±0.1:")
    for layer, position in (grid.values.abs() > 0.1).nonzero().tolist():
        mean, std = grid.values[layer, position], spread[layer, position]
        print(f"    layer {layer} {SLOTS[position] + '_' + str(position):10} {mean:.2f} ± {std:.2f}")

# %% [markdown]
# The picture of the state, for the first contrast:

# %%
title = f"Who gives: patching h, mean over {PAIRS} pairs\n0: as on the prompt, 1: as on the source"
write_png(replace(grids["giver", "h"][0].heatmap(), title=title), "h.png")
Image("h.png")

# %% [markdown]
# How to read the numbers:
#
# - `resid_pre`: who gives is in the stream at the giver's token (_10) up to the input of layer 1, and from the input
#   of layer 2 on it is at the last token (_14). So **layer 1** carries it there, and nothing else does.
# - `h`: the state of layer 1 holds it: about half after the giver's token, all of it two tokens later. No state of
#   another layer matters.
# - `conv`: the two steps are two uses of the name in the convolution of layer 1, at the giver and, two positions
#   later, at the article. A tap of the convolution, which sees the last four tokens, takes the name there.
# - `delta`: nothing beyond 0.1. Who gives is in what is written, and not in the step size.
# - The first name is in the state of layer 1, but **only from the second name's token (_4) on**, not from its own
#   (_2).
#
# ## 4. What is written: the state as a sum
#
# The scan is linear in what tokens write. So what layer 1 says at the last token about a name is a sum over tokens,
# and `contributions` gives its terms, along the direction of each name in the unembedding (before the final norm).

# %%
terms = []
for number, text in enumerate(finding.texts[:32]):
    ids = torch.stack([finding.right_ids[number], finding.wrong_ids[number]])
    if number % 2:  # here the first name gives
        ids = ids.flip(0)
    directions = model.tokens_to_residual_directions(ids)  # [2,D]: of the first and of the second name
    terms.append(torch.cat([contributions(model, text, 1, residual_direction=d, rows=-1).values for d in directions]))
terms = torch.stack(terms)  # [32,2,L]

figure, axes = plt.subplots(2, figsize=(9, 5), sharex=True, sharey=True)
for start, panel in enumerate(axes):
    mean, std = terms[start::2].mean(0), terms[start::2].std(0)  # [2,L]
    giver = ("second", "first")[start]
    for name in range(2):
        label = f"the {('first', 'second')[name]} name"
        panel.bar(torch.arange(15) + 0.4 * name - 0.2, mean[name], 0.4, yerr=std[name], label=label, capsize=2)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(title=f"the {giver} name gives", ylabel="adds to the logit of")
    print(f"the {giver} name gives; added to the logits of (first, second) name by")
    for position in (FIRST, SECOND, SECOND + 2, GIVER, GIVER + 2):
        print(f"    {SLOTS[position]}_{position}: {rounded(mean[0, position]):+}, {rounded(mean[1, position]):+}")
axes[0].legend()
axes[1].set_xticks(range(15), [f"{slot}_{position}" for position, slot in enumerate(SLOTS)], rotation=45)
figure.tight_layout()

# %% [markdown]
# (Bars are means over 16 prompts, whiskers standard deviations.) The first name's own token writes nothing of it. The
# second name's token adds **both** names; the token two after it (_6) adds the second name once more, a little. The
# giver's token and the article two after it (_12) **take away the giver's name** and change the other much less. What
# is left is the receiver.
#
# This is the hypothesis: *a set of two names, minus the giver*. So far it only describes; next it is tested.
#
# ## 5. Paths: cut them one at a time
#
# `knockout` takes away what one token wrote from what the last token reads, in layer 1. `knockout_conv` cuts one tap.


# %%
def scores(prompts, edit=None, *arguments, **options):
    """The measures of the prompts under an edit, a function that is called inside the trace."""
    with model.trace(prompts.texts):
        if edit is not None:
            edit(*arguments, **options)
        logits = model.lm_head.output[:, -1].save()
    return measure(prompts, logits)


def show_by_answer(measures):
    first, second = (measures[0, start::2].mean() for start in (0, 1))
    print(f"{'':12}right where the answer is the first name {first:.0%}, the second {second:.0%}")


print(f"{'':44} right    logit diff.      margin")
show("nothing cut", scores(finding))
for position in (FIRST, SECOND, SECOND + 2, GIVER, GIVER + 1, GIVER + 2):
    cut = scores(finding, knockout, model, position, END, layers=1)
    show(f"state: {SLOTS[position]}_{position} -> to_{END}", cut)
for source, target in ((FIRST, SECOND), (SECOND, SECOND), (GIVER, GIVER), (GIVER, GIVER + 2)):
    cut = scores(finding, knockout_conv, model, source, target, layers=1)
    show(f"conv: {SLOTS[source]}_{source} -> {SLOTS[target]}_{target}", cut)
    if target == SECOND:
        show_by_answer(cut)

# %% [markdown]
# - Cutting the second name's write ends it: hardly any answer is right. Yet the logit difference falls little, since
#   the giver's name is still pushed down: a third token wins. **By the logit difference alone this path would look
#   unimportant**, which is why accuracy and margin stand beside it.
# - Cutting the first name's own write changes nothing, as patching said. Cutting the tap from the first name to the
#   second name's token ends nearly all answers that are the first name, and a part of the others.
# - The second name's own tap at its token is less needed. That fits section 4: token _6 writes the second name as
#   well.
# - Either of the two subtractions can be cut without an error, at half of the logit difference: each is enough.
#
# ## 6. Layers: zero and mean ablation disagree, and both are right
#
# Ablate the output of one layer, at all positions: to zero, or to its mean at each position over the prompts.

# %%
SITES = ("out_proj", "write", "C", "skip")
means = {site: mean_activation(model, finding.texts, site, over="prompts") for site in SITES}
print(f"{'':44} right    logit diff.      margin")
for layer in range(8):
    place = model.layers[layer].ssm.out_proj
    show(f"layer {layer} to its mean", scores(finding, ablate, place, means["out_proj"][layer]))
    if layer == 1:
        show("layer 1 to zero", scores(finding, ablate, place))


def both(layer):
    ablate(model.layers[1].ssm.out_proj)
    ablate(model.layers[layer].ssm.out_proj)


for layer in range(2, 8):
    show(f"layers 1 and {layer} to zero", scores(finding, both, layer))

# %% [markdown]
# With its mean in place of layer 1 the model fails. With *zero* it answers as well as before, if less clearly. This
# model was trained with whole layers left out at random (tutorial 9), and a layer that is left out adds zero. So zero
# is an input that it knows, and there is a **backup**; layer 2 is a part of it: with that at zero, too, 42 % are still
# right. With the mean the backup does not answer. Neither ablation is wrong: they ask different things. For "what does
# the model use when nothing is broken?" we take the mean.
#
# ## 7. The claim, and its test
#
# **First claim.** In layer 1: the writes of the second name's token, of the giver's token and of the token two after
# that to the state; what the last token reads and adds to the stream. Everything else is replaced by its mean at its
# position: the outputs of seven layers everywhere, the output of layer 1 at all positions but the last, and in layer
# 1 the writes of the twelve other tokens. The means come from the finding set, the prompts from the testing set.
# *Faithfulness* is the share that the circuit restores of the margin between "nothing kept" and "nothing ablated".


# %%
def keep_only(writes, layer=1, reader=True, means=means):
    """Mean-ablate all but some writes of a layer and its output at the last position; inside a trace."""
    for number, block in enumerate(model.layers):
        last = block.ssm.skip.output.shape[1] - 1
        if number == layer:
            if not reader:  # what the last token reads with, too
                ablate(block.ssm.skip, means["skip"][number], positions=last)
                ablate(block.ssm.C, means["C"][number], positions=last)
            ablate(block.ssm.write, means["write"][number], positions=[p for p in range(last + 1) if p not in writes])
        kept = slice(None, last) if number == layer else None
        ablate(block.ssm.out_proj, means["out_proj"][number], positions=kept)


FIRST_CLAIM = (SECOND, GIVER, GIVER + 2)
print(f"{'testing set':44} right    logit diff.      margin")
full, empty = scores(testing), scores(testing, keep_only, ())
show("everything", full)
show("nothing", empty)
circuit = scores(testing, keep_only, FIRST_CLAIM)
show(f"writes of {FIRST_CLAIM}", circuit)


def faithfulness(circuit):
    low, high = empty[2].mean(), full[2].mean()
    return f"{(circuit[2].mean() - low) / (high - low):.0%}"


print("faithfulness", faithfulness(circuit))
for left_out in FIRST_CLAIM:
    kept = [position for position in FIRST_CLAIM if position != left_out]
    show(f"    without {SLOTS[left_out]}_{left_out}", scores(testing, keep_only, kept))

# %% [markdown]
# On pairs that played no part in finding it, three writes answer every prompt. And each of them counts: without the
# second name's write hardly anything is right, without one of the subtractions some answers are lost and the margin
# falls.
#
# ## 8. Completeness, and a better claim
#
# The converse question: ablate only the circuit, and leave the rest of the model as it is. A complete circuit leaves
# nothing that works. As the answer may change the claim, we ask it on the finding set.


# %%
def without(writes):
    ablate(model.layers[1].ssm.write, means["write"][1], positions=list(writes))


CIRCUIT = (SECOND, SECOND + 2, GIVER, GIVER + 2)
print(f"{'finding set':44} right    logit diff.      margin")
for claim in (FIRST_CLAIM, CIRCUIT):
    left = scores(finding, without, claim)
    show(f"all but writes of {claim}", left)
    show_by_answer(left)
print("testing set")
show(f"all but writes of {CIRCUIT}", scores(testing, without, CIRCUIT))
circuit = scores(testing, keep_only, CIRCUIT)
show(f"writes of {CIRCUIT}", circuit)
print("faithfulness", faithfulness(circuit))
show("the same, C and gate of the reader at the mean", scores(testing, keep_only, CIRCUIT, reader=False))

# %% [markdown]
# The first claim was **faithful but not complete**: without its three writes most answers that are the *second* name
# are still right. Section 4 says how: token _6 writes the second name too. With it as the fourth, hardly any answer
# survives, so we change the claim to these four writes. On the testing set they leave as little, and their margin is
# closer to the model's. But that set has been looked at before: the fresh test of the four is in section 10. The last
# line says that what the last token reads *with*, its C and its gate, may be at the mean: it does not depend on the
# names.
#
# "The model needs this circuit" would still be false: with all of layer 1 at zero the backup of section 6 answers.
#
# ## 9. Controls that should fail
#
# The same test with parts of the same size: the writes one position later, and random sets of four positions. For
# these the claim predicts more than failure. A set without _4 and _6 knows no name and answers nothing; one with _6
# in place of _4 knows the second name alone, which is right at most half of the time; one with _4 and no subtraction
# knows two names and not who gives, so it should be right about half of the time; one with _4 and a subtraction should
# work. We draw until there are four sets of each kind.

# %%
print(f"{'testing set':44} right    logit diff.      margin")
shifted = [position + 1 for position in CIRCUIT]
show(f"writes of {tuple(shifted)}", scores(testing, keep_only, shifted))
rng = random.Random(0)
kinds = ("without _4 and _6", "with _6, without _4", "with _4, no subtraction", "with _4 and a subtraction")
groups = {kind: {} for kind in kinds}  # of each kind: the sets, and the share that is right
while min(map(len, groups.values())) < 4:
    drawn = tuple(sorted(rng.sample(range(END + 1), 4)))
    subtraction = GIVER in drawn or GIVER + 2 in drawn
    group = groups[kinds[2 + subtraction if SECOND in drawn else int(SECOND + 2 in drawn)]]
    if len(group) < 4 and drawn != CIRCUIT:
        group[drawn] = scores(testing, keep_only, drawn)[0].mean().item()
for kind, group in groups.items():
    print(f"{len(group)} random sets {kind}: right from {min(group.values()):.0%} to {max(group.values()):.0%}")

# %% [markdown]
# Shifted by one, the "circuit" is worth nothing. The random sets fall into the four groups as predicted, where "at most
# half" said little: 9 % to 32 % are right.
#
# ## 10. Does it hold in another sentence?
#
# The circuit is stated in roles: the second name, the giver, and two after each. In another frame of the training
# sentences the roles stand elsewhere, so the claim predicts other positions. New means, same test.

# %%
OTHER = "When {first} and {second} had lunch at {place}, {giver} {verb} {thing} to"
other = Prompts(held_out[64:88], seed=3, frame=OTHER)
tokens = model.to_str_tokens(other.texts[0])
roles = (3, 5, 9, 11)
print([f"{tokens[position]}_{position}" for position in roles], "of", repr(other.texts[0]))
other_means = {site: mean_activation(model, other.texts, site, over="prompts") for site in SITES}
print(f"{'another frame':44} right    logit diff.      margin")
show("everything", scores(other))
show(f"writes of {roles}", scores(other, keep_only, roles, means=other_means))
show("one position later", scores(other, keep_only, [p + 1 for p in roles], means=other_means))
show("nothing", scores(other, keep_only, (), means=other_means))

# %% [markdown]
# ## 11. Limits
#
# - One model of one seed, trained on eight sentence frames; two of them were studied. Another seed may solve the task
#   otherwise: the Mamba-2 and the hybrid that ship do (tutorial 7).
# - Mean ablation compares with the average prompt *of this frame*. What all prompts share, such as the fact that a
#   name is wanted at all, is in the means and is not explained by the circuit.
# - The taps of the convolution are evidence from section 5, one cut at a time. The test of sections 7 and 8 keeps
#   whole writes and does not split them by tap.
# - How layer 1 knows to write a plus in one place and a minus in another is not explained.
# - What the missing share of the margin is made of is not known: other writes of layer 1 and layers 2 to 7 are in it.
# - The backup was seen and not studied.
#
# To do the same on your question: write the cell of prompts, keep a testing set apart, and go through the sections in
# order. The numbers will be different; the controls should still fail.
