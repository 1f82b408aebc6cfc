# %% [markdown]
# # 4. Which kernel runs, and why
#
# A fast Mamba runs most of a layer in two fused kernels, the convolution and the scan. What happens inside a kernel
# is in no tensor, so nobody can look at it. Other tools have flags that choose between speed and hooks, and a flag
# that is set wrongly makes a hook silently never fire. Here are no flags: before each stage of a layer the model asks
# the running trace what it wants there, and takes the fastest kernel that can serve it.
#
# At the end of this tutorial you will be able to
#
# - read `model.last_run`, which says what ran and why,
# - predict what a read or an edit costs,
# - check any result against the plain PyTorch definition,
# - say what is computed in which precision.

# %% [markdown]
# ## A run without wishes
#
# To use a large model, change `model = ...` in this cell to `MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`. On a GPU the reports then name its kernels.

# %%
import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"

with model.trace(prompt):
    logits = model.lm_head.output.save()
model.last_run

# %% [markdown]
# `last_run` is about the last forward pass. Nothing was asked for inside a layer, so every layer ran the same two
# kernels of the `cpu` backend: the convolution with its SiLU, and the scan with everything around it, which is the
# softplus of delta, the D term and the gate.
#
# ## What a wish costs
#
# Now one layer is asked for different things. Each function below reads or edits a site of layer 1, and the report of
# this layer is printed.

# %%
from mamba_trace.flow import knockout


def skip(ssm):
    ssm.skip.output


def conv(ssm):
    ssm.conv.output


def delta(ssm):
    ssm.delta.output


def y(ssm):
    ssm.y.output


def one_state(ssm):
    ssm.h[10].output[:] = 0


def two_states(ssm):
    ssm.h[4].output
    ssm.h[10].output


def all_states(ssm):
    ssm.h.output


def read_A_bar(ssm):
    ssm.A_bar.output


def edit_A_bar(ssm):
    ssm.A_bar.output[:, 5] = 1


def conv1d_module(ssm):
    ssm.conv1d.output


def knocked_out(ssm):
    knockout(model, source_positions=10, target_positions=-1, layers=1)


wishes = [skip, conv, delta, y, one_state, two_states, all_states, read_A_bar, edit_A_bar, conv1d_module, knocked_out]
for wish in wishes:
    with model.trace(prompt):
        wish(model.layers[1].ssm)
    print(f"{wish.__name__:13}  {model.last_run[1]}")

# %% [markdown]
# Line by line:
#
# - `skip` is computed before the scan and goes into it. To look at it costs nothing. The same holds for `x_in`,
#   `ssm_input`, `delta_1`, `delta_2`, `B` and `C`.
# - `conv` lies between the convolution and its SiLU, so these two are done one after the other. The scan does not
#   care.
# - `delta` and `y` lie inside the fused scan. Softplus, D term and gate are then done beside the bare scan.
# - A state after token 10 divides the scan: 11 positions, then your code, then 4 more from the state that comes back.
#   Two states make three pieces. No tensor with all states exists.
# - All states at once are written out by a scan that keeps its trajectory.
# - An `A_bar` that is only read is computed beside the scan. Once it is *edited*, the scan must take the given
#   matrices, which is the slowest kernel. This is decided after your code, by looking whether the value was changed.
# - `conv1d` is the PyTorch module itself. Whoever wants its output gets it called.
# - `knockout` reads `delta` and edits `y`, so the layer runs the bare scan. (What the source contributes it computes
#   itself, which is one more scan from the source to the target.)
#
# All of this is about layer 1 alone:

# %%
with model.trace(prompt):
    model.layers[1].ssm.h[10].output[:] = 0
model.last_run

# %% [markdown]
# ## Check against the definition
#
# `kernels="reference"` runs everything in plain PyTorch, line by line as the formulas are written. It is slow, and
# the definition that all other backends are tested against. If you ever doubt a result, run it again this way.

# %%
reference = MambaTrace.demo(kernels="reference")


def results(model):
    """Values with an edit on the way, and a gradient."""
    with model.trace(prompt):
        model.layers[1].ssm.h[12].output[:] *= 0.5
        h = model.layers[4].ssm.h[10].output.save()
        logits = model.lm_head.output.save()
        with logits[0, -1].max().backward():
            gradient = h.grad.save()
    return {"h": h, "logits": logits, "gradient of h": gradient}


ours, theirs = results(model), results(reference)
for name in ours:
    scale = theirs[name].abs().max()
    print(f"{name:13} equal to 5 digits:", bool((ours[name] - theirs[name]).abs().max() < 1e-5 * scale))
print()
print("reference, layer 1:", reference.last_run[1])

# %% [markdown]
# Values and gradients agree. A loaded model can be switched, too, by `model.kernels = "reference"`. A name that does
# not exist, or a backend that cannot run here, is refused before anything runs:

# %%
from mamba_trace.errors import BackendError

try:
    model.kernels = "fast"
except BackendError as error:
    print(error)

# %% [markdown]
# With `auto`, the default, each call takes the best backend of its device: `cpu` on a processor; on a GPU `cuda`, if
# mamba-ssm is installed, or else `triton`. `mamba-trace info` on the command line lists what your machine has, and
# how the rest is installed.
#
# ## Roughly how long
#
# The picture below times some traces of a prompt of 256 random tokens on the machine that made this notebook. Yours
# will give other numbers.

# %%
import time

tokens = torch.randint(0, model.cfg.d_vocab, (1, 256), generator=torch.Generator().manual_seed(0))


def nothing(model):
    with model.trace(tokens):
        model.lm_head.output.save()


def edit_one_state(model):
    with model.trace(tokens):
        model.layers[1].ssm.h[5].output[:] = 0


def read_the_whole_h(model):
    with model.trace(tokens):
        model.layers[1].ssm.h.output.save()


def read_each_of_256_states(model):
    with model.trace(tokens):
        for p in range(256):
            model.layers[1].ssm.h[p].output.save()


def shortest_time(run, model):
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            run(model)
            times.append(time.perf_counter() - start)
    return min(times)


runs = [nothing, edit_one_state, read_the_whole_h, read_each_of_256_states]
seconds = {run.__name__.replace("_", " "): shortest_time(run, model) for run in runs}
seconds["nothing, kernels='reference'"] = shortest_time(nothing, reference)

figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
unit = seconds["nothing"]
axis.barh(list(seconds), [value / unit for value in seconds.values()], color="tab:blue")
axis.invert_yaxis()
axis.set(title="Time of a trace of 256 tokens", xlabel="multiples of a trace that wants nothing")
plt.show()

# %% [markdown]
# To edit one state, or to read the whole `h` of a layer, takes little longer than to want nothing. To read each of
# 256 states takes several times as long: the scan is cut into 256 pieces, with a visit of your code after each. In so
# small a model these visits take most of the time. In a model of the usual width they add about a tenth. If you want
# to read many states and edit none, ask for `h`.
#
# The reference takes several times as long even where nothing is wanted.
#
# ## Precision
#
# A model may be loaded in half precision. The weights and most activations are then bfloat16. But a recurrence adds
# up over the whole prompt, so delta, the state and the scan stay in float32, whatever the model's type.

# %%
half = MambaTrace.demo(dtype=torch.bfloat16)
with half.trace(prompt):
    ssm_input = half.layers[1].ssm.ssm_input.output.save()
    delta = half.layers[1].ssm.delta.output.save()
    h = half.layers[1].ssm.h[10].output.save()
    half_logits = half.lm_head.output.save()

for name, value in {"ssm_input": ssm_input, "delta": delta, "h[10]": h, "logits": half_logits}.items():
    print(f"{name:9} {value.dtype}")
print("next token:", repr(half.to_string(half_logits[0, -1].argmax())))
print("layer 1:", half.last_run[1])

# %% [markdown]
# The same kernels ran, and the answer is the same. If you assign a tensor of another type to a site, it is cast.
#
# The `cpu` kernels add up in float32, so a float64 model (`dtype=torch.float64`) runs the reference, in float64
# throughout.
#
# ## Generation
#
# In each step of a generation the model reads one token, and the scan is one update of the state:

# %%
with model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False):
    pass
model.last_run

# %% [markdown]
# The report is that of the last step. The step started from the state that the steps before had left in the cache,
# and ran the same kernels over a single position. All sites are there in each step, at the same cost as in a prompt.
#
# ## Where to go from here
#
# - [Tutorial 5](05_information_flow.ipynb) uses these sites to follow a name through the model.
# - The README's section on speed has recorded measurements of models of normal size, beside Hugging Face and
#   MambaLens.
