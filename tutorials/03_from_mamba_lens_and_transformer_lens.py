# %% [markdown]
# # 3. From MambaLens and TransformerLens
#
# You know MambaLens or TransformerLens and have scripts with hook names in them. This tutorial goes through the
# patching experiment of [tutorial 2](02_activation_patching.ipynb) name by name.
#
# At the end you will be able to
#
# - use hook names, `run_with_cache` and `run_with_hooks` here, and write the same as a trace,
# - find configuration and weights under the names that you know,
# - tell three edits of the state apart that are easily confused,
# - let `mamba-trace port` translate a script.

# %% [markdown]
# ## The model
#
# To use a large model, change `model = ...` in this cell to `MambaTrace("state-spaces/mamba-370m")` or
# `MambaTrace("state-spaces/mamba2-370m")`: it answers to the same calls.

# %%
import torch

from mamba_trace import MambaTrace, names

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
emma, shelby = model.to_single_token(" Emma"), model.to_single_token(" Shelby")

# %% [markdown]
# ## Names
#
# Every place has a path, which is how a trace spells it, and a hook name. Both are accepted wherever a name is asked
# for.

# %%
for name in ("blocks.1.hook_h.12", "blocks.1.hook_resid_pre", "blocks.1.mixer.dt_proj.hook_out", "hook_logits"):
    print(f"{name:31} is model.{names.to_path(name)}")
print()
print(names.to_hook_name("layers[1].ssm.h[12]"), "in MambaLens")
print(names.to_bridge_name("layers[1].ssm.delta_2"), "in TransformerLens 4")
print()
print(len(model.hook_names(n_positions=15)), "hook names for a prompt of 15 tokens; the first ones:")
print(model.hook_names(n_positions=15)[:4])

# %% [markdown]
# The names of MambaLens and those of TransformerLens 4 can be mixed. The state after token 12 has a name of its own,
# `blocks.1.hook_h.12`, as in MambaLens. Nothing has to be set up for it: the name is an address, whatever the length
# of the prompt.
#
# ## The same experiment
#
# The two calls of the experiment, `run_with_cache` and `run_with_hooks`, are there, with their arguments. So the loop
# of MambaLens's README runs on this model as it stands. (It begins at token 9 here, since the prompts are the same up
# to there.)

# %%
from functools import partial

prompt_tokens, source_tokens = model.to_tokens(prompt), model.to_tokens(source)
source_logits, source_cache = model.run_with_cache(source_tokens)


def h_patching_hook(h, hook, layer, position):  # h [B,E,N]
    return source_cache[hook.name]


first, length = 9, prompt_tokens.shape[1]
result = torch.zeros(model.cfg.n_layers, length)
for layer in range(model.cfg.n_layers):
    for position in range(first, length):
        patching_hook = partial(h_patching_hook, layer=layer, position=position)
        logits = model.run_with_hooks(
            prompt_tokens, fwd_hooks=[(f"blocks.{layer}.hook_h.{position}", patching_hook)]
        )  # [B,L,V]
        result[layer, position] = (logits[0, -1, emma] - logits[0, -1, shelby]).item()

print("logit difference, layer 1, tokens 9 to 14:", [f"{value:+.1f}" for value in result[1, first:].tolist()])

# %% [markdown]
# At token 9 the patch changes nothing, and the model says " Emma". From token 12 on it says " Shelby".
#
# `patch_grid` computes the same numbers in one call, and draws them:

# %%
from mamba_trace.patching import logit_diff, patch_grid

grid = patch_grid(model, prompt, source, "hook_h", logit_diff(model, " Emma", " Shelby"), progress=False)
print("same numbers:", torch.allclose(grid.values[:, first:], result[:, first:], atol=1e-3))
grid

# %% [markdown]
# ## A hook, and the trace that does the same
#
# A hook is a function that is called when the value comes by. In a trace the same is written in the place where you
# stand, with ordinary variables. `model.hook(name)` is the place of a hook name, if you would rather keep the name.


# %%
def halve(h, hook):
    return h / 2


with_hook = model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.hook_h.12", halve)])

with model.trace(prompt):
    model.layers[1].ssm.h[12].output *= 0.5
    with_trace = model.lm_head.output.save()

with model.trace(prompt):
    model.hook("blocks.1.hook_h.12").output *= 0.5
    with_name = model.lm_head.output.save()

print("same logits:", torch.allclose(with_hook, with_trace) and torch.allclose(with_hook, with_name))

# %% [markdown]
# | in MambaLens and TransformerLens | here, besides the same call | with a difference |
# |---|---|---|
# | `HookedMamba.from_pretrained(name)` | `MambaTrace(name)` | `from mamba_trace import mamba_lens` has `HookedMamba` |
# | `logits, cache = model.run_with_cache(prompt)` | `with model.trace(prompt):` and `.save()` | what is not kept costs nothing: give `names_filter` |
# | `model.run_with_hooks(prompt, fwd_hooks=[(name, fn)])` | `with model.trace(prompt):` and an assignment | hooks always end with the run |
# | `cache["blocks.1.hook_h.12"]` | `model.layers[1].ssm.h[12].output` | `cache["h", 1]` has all states, [B,L,E,N] |
# | `fast_conv=True, fast_ssm=True` | nothing | ignored: kernels run wherever nobody looks |
# | `model.generate(tokens, ...)` | `with model.generate(prompt, ...) as tracer:` | sites are there in every step |
# | `model.to_tokens(text)` | the same | no BOS token unless you say `prepend_bos=True` |
#
# The last row matters for positions. MambaLens puts a BOS token first, and so does its twin here,
# `mamba_lens.HookedMamba`. `MambaTrace` does not, as a trace sees exactly the text that you give it.
#
# ## Configuration and weights
#
# `model.cfg` has the sizes under the names of both libraries. `model.blocks[l]` has the weights, cut as MambaLens
# cuts them. They are views of Hugging Face's parameters, so an edit of one edits the model.

# %%
cfg = model.cfg
print("d_model", cfg.d_model, "| n_layers", cfg.n_layers, "| d_state", cfg.d_state, "| E", cfg.E, "| N", cfg.N)

block = model.blocks[1]
for name in ("W_B", "W_C", "W_delta_1"):
    print(f"blocks[1].{name}: {list(getattr(block, name).shape)}")

whole = model.layers[1].ssm.in_proj.weight  # Hugging Face's parameter: skip_proj and in_proj in one
print(
    "a view of the parameter:",
    block.skip_proj.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(),
)

# %% [markdown]
# ## Three edits that are easily confused
#
# Each token does three things with the state: it adds something to it, the sum is carried on to the next token, and
# it reads from the sum. All three have the shape of a state, and an edit of each means something else.
#
# | an edit at position p of | in MambaLens | in TransformerLens 4 | changes |
# |---|---|---|---|
# | `ssm.h[p]` | `blocks.l.hook_h.p` | (none) | the state *carried*: what token p and all later tokens read |
# | `ssm.h_read.output[:, p]` | (none) | `blocks.l.mixer.hook_ssm_state` | the state as token p *reads* it, and nothing later |
# | `ssm.write.output[:, p]` | (none) | `blocks.l.mixer.hook_ssm_write` | what token p *adds*: seen by p and all later tokens, who keep what came before p |
#
# So the hook of TransformerLens that is called "state" is not MambaLens's `hook_h`. Here each of the three is set to
# zero in layer 1 at token 10, the giver, and we look at which tokens read something else than before.

# %%
from IPython.display import Image

from mamba_trace.results.heatmap import Heatmap
from mamba_trace.results.png import write_png

with model.trace(prompt):
    y = model.layers[1].ssm.y.output.save()  # [1,L,E]: what each token reads

changes, answers = {}, {}
with model.trace(prompt):
    model.layers[1].ssm.h[10].output[:] = 0
    changes["h[10]"] = (model.layers[1].ssm.y.output - y)[0].norm(dim=-1).save()
    answers["h[10]"] = model.lm_head.output[0, -1].argmax().save()
with model.trace(prompt):
    model.layers[1].ssm.h_read.output[:, 10] = 0
    changes["h_read[:, 10]"] = (model.layers[1].ssm.y.output - y)[0].norm(dim=-1).save()
    answers["h_read[:, 10]"] = model.lm_head.output[0, -1].argmax().save()
with model.trace(prompt):
    model.layers[1].ssm.write.output[:, 10] = 0
    changes["write[:, 10]"] = (model.layers[1].ssm.y.output - y)[0].norm(dim=-1).save()
    answers["write[:, 10]"] = model.lm_head.output[0, -1].argmax().save()

for name, change in changes.items():
    read_otherwise = (change > 0.01).nonzero().flatten().tolist()
    print(f"{name:14} read otherwise by tokens {read_otherwise}, answer {model.to_string(answers[name])!r}")

picture = Heatmap(
    values=torch.stack(list(changes.values())),
    title="Change of what each token reads in layer 1, after three edits at token 10",
    row_title="set to zero",
    row_labels=list(changes),
    column_labels=[f"{token}_{p}" for p, token in enumerate(model.to_str_tokens(prompt))],
    value_title="norm of the change",
    signed=False,
)
write_png(picture, "edits.png")
Image("edits.png")

# %% [markdown]
# - After the edit of `h[10]` every token from 10 on reads something else, most of all the last one. The layer has
#   lost everything that it had read so far, both first names included, so the model answers with a name that is not
#   in the prompt.
# - The edit of `h_read` reaches token 10 alone, and the answer stays.
# - The edit of `write` takes away only what token 10 itself added. The tokens after it notice, but less: the names
#   from before are still there, and token 12 writes the giver once more (see tutorial 2). The answer stays.
#
# Had one of these been done under another's name, the study would have said something else. This is why no name
# stands for two of them.
#
# ## Port a script
#
# `mamba-trace port script.py --out ported.py` rewrites a script without running it: it changes imports, loading and
# names, and keeps all other code and every comment. In Python the same is `port_file`.

# %%
from pathlib import Path

from mamba_trace.porting import port_file

Path("script.py").write_text(
    """\
import torch
import mamba_lens
from transformer_lens.hook_points import HookPoint

model = mamba_lens.HookedMamba.from_pretrained("state-spaces/mamba-370m", device="cuda")
prompt = model.to_tokens("Lately, Emma and Shelby had fun at school. Shelby gave an apple to")
source = model.to_tokens("Lately, Emma and Shelby had fun at school. Emma gave an apple to")
emma, shelby = model.to_single_token(" Emma"), model.to_single_token(" Shelby")
_, cache = model.run_with_cache(source)

def patch(h, hook: HookPoint):
    return cache[hook.name]  # [B,E,N]

for position in range(prompt.shape[1]):
    name = f"blocks.1.hook_h.{position}"
    logits = model.run_with_hooks(prompt, fwd_hooks=[(name, patch)], fast_ssm=False)
    print(position, round((logits[0, -1, emma] - logits[0, -1, shelby]).item()))
""",
    encoding="utf-8",
)
report = port_file("script.py")
print(report.script)

# %% [markdown]
# The imports are changed, and a flag that is not needed is gone. The rest is as it was.
#
# `print(report)` lists what became of every line. It also has the trace that each hook could be:

# %%
for block in report.blocks:
    print(block.code)

# %% [markdown]
# The loop may stay as it is, or you write such a trace in its place. Now the ported script is run as it is. Only its
# model is replaced by the small one.

# %%
import runpy

ported = report.script.replace('from_pretrained("state-spaces/mamba-370m", device="cuda")', "demo()")
Path("ported.py").write_text(ported, encoding="utf-8")
done = runpy.run_path("ported.py")
print(
    "tokens 0 and 11:", done["model"].to_str_tokens(done["prompt"])[0], done["model"].to_str_tokens(done["prompt"])[11]
)

# %% [markdown]
# The numbers are those of layer 1 in the grid above, one position later: as in MambaLens, `HookedMamba` puts a BOS
# token in front, so the giver is token 11 here.
#
# ## Where to go from here
#
# - `mamba-trace port blocks.3.hook_h.5` on the command line translates a single name.
# - [Tutorial 4](04_kernels.ipynb): what runs where flags used to choose.
