# %% [markdown]
# # 1. A first trace
#
# A Mamba language model reads its prompt one token at a time. What it remembers of the tokens before stands in a
# state in each layer, and that state is updated at every token. This package lets you read and edit that state, and
# every other value between the embeddings and the logits, in a few lines of ordinary [nnsight](https://nnsight.net)
# code.
#
# At the end of this tutorial you will be able to
#
# - read any value of a forward pass, and edit it,
# - tell the state after one token, `h[p]`, from the record of all states, `h`,
# - run several prompts in one forward pass, and carry a value from one of them to another,
# - look into every step of a generation,
# - take gradients with respect to any value,
# - see what your trace has cost.
#
# You need to know PyTorch and what a transformer is. How a Mamba works is explained where it is needed.

# %% [markdown]
# ## The model
#
# A small trained model ships with the package, so nothing is downloaded. It has learned one task: in "Lately, Emma
# and Shelby had fun at school. Shelby gave an apple to" the next word is the one of the two names that is not giving.
#
# To use a large model instead, change the line `model = ...` of the next cell to `model =
# MambaTrace("state-spaces/mamba-370m")` or `MambaTrace("state-spaces/mamba2-370m")`. Everything below works without
# another change, but the numbers and the tokens will be other ones.

# %%
import torch

from mamba_trace import MambaTrace

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"

print("layers:", model.cfg.n_layers)
print("D, width of the residual stream:", model.cfg.d_model)
print("E, channels of a layer's SSM:   ", model.cfg.d_inner)
print("N, numbers of state per channel:", model.cfg.d_state)
print(dict(enumerate(model.to_str_tokens(prompt))))

# %% [markdown]
# The model is Hugging Face's own `MambaForCausalLM`, with its parameters. The prompt has 15 tokens. The second
# "Shelby", the one who gives, is token 10, and the last token, " to", is token 14.
#
# ## Read
#
# `with model.trace(prompt):` runs the model once. Inside the block, `.output` of a place in the model is the value
# that stands there in this run, and `.save()` keeps it after the block. `ssm.h[10]` in layer 1 is the state after
# token 10.

# %%
with model.trace(prompt):
    delta = model.layers[1].ssm.delta.output.save()  # [B,L,E]: how strongly each token writes to the state
    h = model.layers[1].ssm.h[10].output.save()  # [B,E,N]: the state after token 10
    y = model.layers[1].ssm.y.output.save()  # [B,L,E]: what each token reads from the state
    logits = model.lm_head.output.save()  # [B,L,V]

for name, value in {"delta": delta, "h[10]": h, "y": y, "logits": logits}.items():
    print(f"{name:7}", list(value.shape))
print("next token:", repr(model.to_string(logits[0, -1].argmax())))

# %% [markdown]
# The values are plain tensors, with a batch of one prompt in front. The model completes the sentence with " Emma",
# which is right. Places must be asked for in the order in which the model computes them: delta before the states, a
# layer before the next one. If you ask in another order, your line raises an error that says so.
#
# To see something, we read one quantity in all layers: delta, the step size. Where delta is large in a channel, the
# channel lets go of more of what it held and writes more of the token that is read. The mean over channels says at
# which tokens a layer writes most.

# %%
from IPython.display import Image

from mamba_trace.results.heatmap import Heatmap
from mamba_trace.results.png import write_png

with model.trace(prompt):
    deltas = [layer.ssm.delta.output[0].mean(-1) for layer in model.layers].save()  # [L] each

picture = Heatmap(
    values=torch.stack(list(deltas)),
    title="Mean step size delta",
    row_title="layer",
    row_labels=[str(layer) for layer in range(len(deltas))],
    column_labels=[f"{token}_{p}" for p, token in enumerate(model.to_str_tokens(prompt))],
    value_title="delta",
    signed=False,
)
write_png(picture, "delta.png")
Image("delta.png")

# %% [markdown]
# Layer 1 stands out: it writes most at the three names in the prompt (tokens 2, 4 and 10), and little elsewhere. This
# is a first hint where the model remembers who was there and who gives.
#
# ## Edit
#
# Assign to `.output`, or to a part of it, and the model goes on with your value. Here the state of layer 1 after
# token 12 is set to zero: the model forgets in this layer whatever it had read up to " an".

# %%
with model.trace(prompt):
    model.layers[1].ssm.h[12].output[:] = 0
    edited_y = model.layers[1].ssm.y.output.save()
    edited = model.lm_head.output[:, -1].save()

print("next token:", repr(model.to_string(edited[0].argmax())))
changed = (edited_y - y).abs().amax(dim=(0, 2)) > 1e-3
print("positions where y changed:", changed.nonzero().flatten().tolist())

# %% [markdown]
# Without this state the model does not know the names, and answers with a name that does not occur in the prompt. And
# `h[12]` is *carried*: every token from 12 on reads what came of the edit, so `y` changed at 12, 13 and 14.
#
# The whole `h`, without a position, is a record of all states at once, [B,L,E,N]. It is good for reading. An edit of
# the record at one position changes what that token reads, and is not carried on:

# %%
with model.trace(prompt):
    model.layers[1].ssm.h.output[:, 12] = 0
    edited_y = model.layers[1].ssm.y.output.save()
    edited = model.lm_head.output[:, -1].save()

print("next token:", repr(model.to_string(edited[0].argmax())))
changed = (edited_y - y).abs().amax(dim=(0, 2)) > 1e-3
print("positions where y changed:", changed.nonzero().flatten().tolist())

# %% [markdown]
# Now only `y` at token 12 changed, and the answer stayed. If you want to change what the model remembers, edit
# `h[p]`.
#
# ## Several prompts
#
# An *invoke* adds a prompt to the batch, with reads and edits of its own. Inside it, every value has only the rows of
# this prompt. Both prompts run in one forward pass.

# %%
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"

with model.trace() as tracer:
    with tracer.invoke(prompt):
        first = model.lm_head.output[:, -1].save()  # [1,V]
    with tracer.invoke(source):
        second = model.lm_head.output[:, -1].save()
    with tracer.invoke("Emma and Shelby had fun at the park. Emma gave an apple to"):  # one token less
        third = model.lm_head.output[:, -1].save()

for logits in (first, second, third):
    print(repr(model.to_string(logits[0].argmax())))

# %% [markdown]
# The answers follow the giver. The third prompt is shorter, so it was padded on the left. Padding changes no result,
# but position 0 is then no token of the prompt: in such a batch count from the end, with `h[-1]`, `h[-2]`.
#
# ## Carry a state from one prompt to another
#
# Values of one invoke can be used in another if both wait for each other at a *barrier*: the first one reads the
# state, both reach the barrier, and the second one puts the state into its own run.

# %%
with model.trace() as tracer:
    barrier = tracer.barrier(2)
    with tracer.invoke(source):
        state = model.layers[1].ssm.h[12].output  # the state of a run in which Emma gives
        barrier()
    with tracer.invoke(prompt):
        barrier()
        model.layers[1].ssm.h[12].output = state
        patched = model.lm_head.output[:, -1].save()

print("next token:", repr(model.to_string(patched[0].argmax())))

# %% [markdown]
# The prompt still says that Shelby gives, but the model answers " Shelby", as if Emma gave. So the state of layer 1
# after token 12 holds who gave. This is activation patching, and [tutorial 2](02_activation_patching.ipynb) does it
# for every layer and position.
#
# ## Generate
#
# `model.generate` runs the model step by step, and `tracer.iter` goes with it. The first step reads the whole prompt,
# every later one a single token, so `h[-1]` is always the newest state.

# %%
start = "Lately, Emma and Shelby had fun at school. Shelby"

with model.generate(start, max_new_tokens=5, do_sample=False) as tracer:
    sizes, tokens = [].save(), [].save()
    for _ in tracer.iter[:5]:
        sizes.append(model.layers[1].ssm.h[-1].output.norm().item())
        tokens.append(model.lm_head.output[0, -1].argmax().item())

for size, token in zip(sizes, tokens, strict=True):
    print(f"norm of the state {size:4.1f}, next token {model.to_string(token)!r}")

# %% [markdown]
# The model goes on with a verb and a thing, and then names the one who does not give. The norm of this state falls
# from step to step, since these tokens are no names: they write little into it, and each of them lets what it holds
# decay a bit.
#
# A step can be edited like any run. Below, step 2 reads the token " a", and what layer 1 remembers at that moment is
# set to zero.

# %%
with model.generate(start, max_new_tokens=5, do_sample=False) as tracer:
    tokens = [].save()
    for step in tracer.iter[:5]:
        if step == 2:
            model.layers[1].ssm.h[-1].output[:] = 0
        tokens.append(model.lm_head.output[0, -1].argmax().item())

print(model.to_string(tokens))

# %% [markdown]
# The sentence is as before up to " to", since verbs and things need no memory of names. But the name at the end is no
# longer one of the two.
#
# ## Gradients
#
# Every value has a gradient. `with number.backward():` inside the block runs the backward pass, and there `.grad` of
# any value that you have read can be saved. In a backward pass the order is reversed: what the model computed last
# has its gradient first. The number here is the logit of " Emma" minus the logit of " Shelby".

# %%
emma, shelby = model.to_single_token(" Emma"), model.to_single_token(" Shelby")

with model.trace(prompt):
    embeddings = model.embeddings.output  # [B,L,D]
    h = model.layers[1].ssm.h[12].output.save()  # [B,E,N]
    last = model.lm_head.output[0, -1]
    difference = (last[emma] - last[shelby]).save()
    with difference.backward():
        h_gradient = h.grad.save()  # [B,E,N]
        embeddings_gradient = embeddings.grad.save()  # [B,L,D]

norms = embeddings_gradient[0].norm(dim=-1)
print(f"logit of ' Emma' minus logit of ' Shelby': {difference.item():.1f}")
print("where the gradient of the embeddings is largest:")
for p in norms.argsort(descending=True)[:4].tolist():
    print(f"  token {p:2} {model.to_str_tokens(prompt)[p]!r}: {norms[p]:.1f}")

# %% [markdown]
# The answer reacts most to the tokens at and beside the names. The gradient of `h[12]` has the shape of the state.
# Its product with a change of the state estimates, to first order, what this change does to the number. We try it on
# the change that we made at the barrier:

# %%
with model.trace(source):
    source_h = model.layers[1].ssm.h[12].output.save()
    last = model.lm_head.output[0, -1].save()

estimate = ((source_h - h) * h_gradient).sum()
print(f"estimated change: {estimate.item():.1f}")

with model.trace(prompt):
    model.layers[1].ssm.h[12].output = source_h
    last = model.lm_head.output[0, -1].save()
print(f"true change:      {(last[emma] - last[shelby] - difference).item():.1f}")

# %% [markdown]
# The estimate has the right sign and about half of the size. To swap the state is a large step, and over such a step
# the model is not linear. How good such estimates are for a whole grid of layers and positions is the subject of
# tutorial 6.
#
# ## What it cost
#
# Reading and editing states slows nothing down except where you look. The model asks your trace what it wants in a
# layer, and runs its fastest kernels where that is nothing. `model.last_run` reports what the last forward pass ran.

# %%
with model.trace(prompt):
    model.layers[1].ssm.h[12].output[:] = 0
model.last_run

# %% [markdown]
# In layer 1 the scan stopped after 13 positions, handed its state to your code, and went on with what came back over
# the last 2. In all other layers nothing was wanted, so they ran two fused kernels each. [Tutorial
# 4](04_kernels.ipynb) explains this report.
#
# ## All places
#
# The model itself, at the end of a cell, lists every place that can be read and edited, in the order in which a trace
# asks for them. `mamba-trace sites --model demo` prints the same table on the command line.

# %%
model

# %% [markdown]
# B is the batch, L the positions, and R, in `delta_1`, a small rank through which delta is computed. The column with
# hook names is for those who come from MambaLens or TransformerLens.
#
# ## Where to go from here
#
# - [Tutorial 2](02_activation_patching.ipynb): which layer and which token hold the answer.
# - [Tutorial 3](03_from_mamba_lens_and_transformer_lens.ipynb): the names and calls of MambaLens and TransformerLens.
# - [Tutorial 5](05_information_flow.ipynb): by which way a name gets from one token to another.
