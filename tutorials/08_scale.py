# %% [markdown]
# # 8. Larger models, longer jobs: devices, processes, offload, remote
#
# At the end of this tutorial you will be able to
#
# - run a model that does not fit on one device, over several devices, main memory and disk,
# - interrupt a patching sweep and go on where it stopped, and divide it among processes and machines,
# - write the activations of a data set to disk, batch by batch,
# - send a trace to a server.
#
# All of it is shown on one CPU with the small model that ships, and what is run here is what you would run elsewhere.
# The command that starts two processes is shown with what it printed; those for GPUs and several machines were not
# run here.
#
# To use a large model, change the cell below: `MODEL = "state-spaces/mamba-370m"` or `MODEL =
# "state-spaces/mamba2-370m"`, and `demo = MambaTrace(MODEL)` in place of the lines that make and save the demo. The
# code counts the layers by itself.

# %%
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mamba_trace import MambaTrace
from mamba_trace.errors import MambaTraceError
from mamba_trace.patching import logit_diff, patch_grid

logging.getLogger("accelerate").setLevel(logging.ERROR)  # it would remark that weights are offloaded, as we want it

demo = MambaTrace.demo()
demo._module.save_pretrained("saved")  # a folder as you would download it
demo.tokenizer.save_pretrained("saved")
MODEL = "saved"

prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
print(sorted(path.name for path in Path(MODEL).iterdir()))

# %% [markdown]
# ## Several devices, main memory, disk
#
# `device_map=` is accelerate's: `"auto"` fills the GPUs first, then main memory, then the disk. Here it is written by
# hand for a machine without a GPU: the lower half of the layers on the CPU, the upper half on disk, from where a
# layer's weights are read when it runs. On two GPUs the same map would say `0` and `1`.

# %%
n_layers = len(demo.layers)
device_map = {"": "cpu"} | {f"backbone.layers.{layer}": "disk" for layer in range(n_layers // 2, n_layers)}
model = MambaTrace(MODEL, device_map=device_map, offload_folder="offload")

with torch.no_grad(), model.trace(prompt):
    state = model.layers[n_layers - 1].ssm.h[10].output.save()  # a layer that is on disk
    model.layers[n_layers - 1].ssm.h[12].output[:] *= 0.5
    logits = model.lm_head.output[0, -1].save()
with torch.no_grad(), demo.trace(prompt):
    expected = demo.layers[n_layers - 1].ssm.h[10].output.save()
print("the next token:", repr(model.to_string(logits.argmax())))
print("the state equals that of the whole model in memory:", torch.allclose(state, expected, atol=1e-5))
on_disk = sum(parameter.is_meta for parameter in model._module.parameters())
print(f"{on_disk} of {len(list(model._module.parameters()))} parameters are on disk")

# %% [markdown]
# Sites are read and edited in a layer on disk as anywhere else; on several GPUs each site is on its layer's device,
# and a tensor that you assign is moved there. `model.last_run` says what offloading costs: the convolution of such a
# layer runs as a module of its own, so that its weights can be fetched.

# %%
print(model.last_run)

# %% [markdown]
# ## A sweep that survives an interrupt
#
# `patch_grid(..., keep="folder")` writes finished cells to a folder. To show it, here is a metric that interrupts the
# run in its fifth call, as Ctrl-C or a job's time limit would. (`batch_size=15` makes the forwards small, so that
# there are several; by default as many cells run together as `memory=` permits.)


# %%
class Difference:
    """The logit difference of two tokens, interrupted in one of its calls."""

    def __init__(self, answer, wrong, interrupted_in=None):
        self.calls, self.interrupted_in = 0, interrupted_in
        self.answer, self.wrong = demo.to_single_token(answer), demo.to_single_token(wrong)

    def __call__(self, logits):
        self.calls += 1
        if self.calls == self.interrupted_in:
            raise KeyboardInterrupt
        return logits[:, self.answer] - logits[:, self.wrong]


first = Difference(" Emma", " Shelby", interrupted_in=5)
try:
    patch_grid(demo, prompt, source, "h", first, keep="sweep", batch_size=15, progress=False)
except KeyboardInterrupt:
    print(f"interrupted after {first.calls} calls of the metric; kept so far:")
print("\n".join(sorted(path.name for path in Path("sweep").iterdir())))

# %% [markdown]
# One call measured the two unpatched runs, three measured finished cells, and the fifth was interrupted. The cells of
# three forwards are on disk, and beside them what the question was. The same call goes on from there:

# %%
second = Difference(" Emma", " Shelby")
grid = patch_grid(demo, prompt, source, "h", second, keep="sweep", batch_size=15, progress=False)
at_once = Difference(" Emma", " Shelby")
whole = patch_grid(demo, prompt, source, "h", at_once, batch_size=15, progress=False)
print(f"calls of the metric: {second.calls} to finish, {at_once.calls} for the whole grid at once")
print("complete:", grid.complete, " equal to the whole grid:", torch.allclose(grid.values, whole.values, atol=1e-4))
grid

# %% [markdown]
# The folder belongs to this question. Another one is refused, so cells of two experiments never mix:

# %%
try:
    patch_grid(demo, source, prompt, "h", Difference(" Emma", " Shelby"), keep="sweep", progress=False)
except MambaTraceError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Several processes
#
# Processes that a launcher starts divide the cells of a grid among them, and every one returns the whole grid.
# Nothing changes in a script but the command that starts it. The command line works in the same way:
#
# ```bash
# torchrun --standalone --nproc_per_node 2 -m mamba_trace patch --keep sweep --batch-size 10 --out grid.json
# ```
#
# shows one progress bar and prints the grid once:
#
# ```text
# patching h on 2 processes: 100%|██████████|, 120/120 [00:00<00:00]
# model        demo
# prompt       Lately, Emma and Shelby had fun at school. Shelby gave an apple to
# source       Lately, Emma and Shelby had fun at school. Emma gave an apple to
# metric       logit of ' Emma' minus logit of ' Shelby'
# of prompt    +10.8482
# ...
# layer 1 +1.00 +1.01 +1.00
# ...
# wrote grid.json
# ```
#
# Look at the words "on 2 processes": if they are missing, the launcher has started one (`accelerate launch --cpu
# --num_processes 2` does that without a machine file), which then does all the work. With 8 GPUs, and with 2 machines
# of 8:
#
# ```bash
# torchrun --standalone --nproc_per_node 8 -m mamba_trace patch --model state-spaces/mamba-2.8b-hf --keep sweep
# accelerate launch --multi_gpu --num_processes 8 --num_machines 1 --module mamba_trace patch --keep sweep
# torchrun --nnodes 2 --node_rank R --nproc_per_node 8 --master_addr IP --master_port 29500 -m mamba_trace patch
# ```
#
# On CPUs set `OMP_NUM_THREADS` to the cores of a process, or they fight for them. With `keep` on a disk that all
# share, a killed process loses only the cells that it had not finished.
#
# ## Activations of a data set, batch by batch
#
# A dictionary or a probe is trained on activations of many prompts. Hold one batch at a time, write each to a file of
# its own, and skip files that exist: then this too can be interrupted. Padding must not be written; the mask says
# what is padding. `tracer.stop()` ends the forward at the layer, since nothing above it is needed.

# %%
names = ("Emma", "Shelby", "Mary", "John", "Alice", "Bob")
texts = [f"{a} met {b} at the park, so {b} gave {a}" for a in names for b in names if a != b]
texts += [f"Lately, {a} and {b} had fun at school. {a} gave a book to" for a in names for b in names if a != b]
LAYER, BATCH = 1, 16
folder = Path("activations")
folder.mkdir(exist_ok=True)


def write_batch(number, batch):
    """The residual stream after a layer for all tokens of some prompts, without padding."""
    path = folder / f"batch-{number:04}.safetensors"
    if path.exists():
        return
    ids = demo.to_tokens(batch)  # [B,L], padded on the left
    with torch.no_grad(), demo.trace(ids, use_cache=False) as tracer:
        mask = demo.inputs[1]["attention_mask"].save()  # [B,L]: 0 on padding
        stream = demo.layers[LAYER].resid_post.output.save()  # [B,L,D]
        tracer.stop()
    kept = mask.bool()
    prompt_number = torch.arange(len(batch))[:, None].expand_as(kept)[kept] + number * BATCH
    unfinished = path.with_suffix(".part")
    save_file({"resid_post": stream[kept], "token": ids[kept], "prompt": prompt_number}, unfinished)
    unfinished.rename(path)  # a file is there as a whole or not at all


for number, start in enumerate(range(0, len(texts), BATCH)):
    write_batch(number, texts[start : start + BATCH])
files = sorted(folder.iterdir())
print(len(texts), "prompts in", len(files), "files")
for path in files:
    with safe_open(path, "pt") as file:
        print(path.name, {key: file.get_slice(key).get_shape() for key in ("resid_post", "token", "prompt")})

# %% [markdown]
# The forward uses the fast kernels here, since `resid_post` is there in any case. To divide the batches among
# processes, let process r of n take every n-th:
#
# ```python
# from accelerate import PartialState
#
# state = PartialState(cpu=True)  # on GPUs PartialState()
# batches = list(enumerate(range(0, len(texts), BATCH)))
# for number, start in batches[state.process_index :: state.num_processes]:
#     write_batch(number, texts[start : start + BATCH])
# state.destroy_process_group()
# ```
#
# To read them, go from file to file, so that no more than one is in memory. Here is the mean of the stream over all
# tokens:

# %%
total, count = torch.zeros(demo.cfg.d_model, dtype=torch.float64), 0
for path in files:
    with safe_open(path, "pt") as file:
        rows = file.get_tensor("resid_post")
        total, count = total + rows.double().sum(0), count + len(rows)
print(f"mean over {count} tokens; its norm is {(total / count).norm():.2f}")

# %% [markdown]
# ## A server
#
# An [NDIF](https://ndif.us) server that has this package runs a trace for you; the weights never come to your
# machine. The same line of code does it: `remote=True` for the server of your configuration, or its address.
# `remote="local"` makes the round trip without a server: the trace is packed, sent to itself, and only what is saved
# comes back.

# %%
remote = MambaTrace(MODEL)  # reads the configuration and the tokenizer, not the weights
with remote.trace(prompt, remote="local"):
    state = remote.layers[1].ssm.h[10].output.save()
    last = remote.lm_head.output[:, -1].save()
print("state:", list(state.shape), " next token:", repr(remote.to_string(last.argmax())))
over_there = patch_grid(remote, prompt, source, "h", logit_diff(remote, " Emma", " Shelby"), layers=1, remote="local")
print("row of layer 1:", [round(value, 1) for value in over_there.normalized()[0, 10:].tolist()])

# %% [markdown]
# A grid is one request, and its cells run on the server. Only the grid comes back. `tutorials/deployment.md` says
# what an operator installs, and what differs for requests that the server does not trust: they have no gradients and
# no `patch_grid`.
#
# **What to take along.** Offload with `device_map`, divide with `torchrun`, go on with `keep=`, send with `remote=`:
# in each case the code of the experiment stays what it was in tutorial 2.
