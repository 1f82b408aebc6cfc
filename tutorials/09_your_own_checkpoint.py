# %% [markdown]
# # 9. Your own checkpoint
#
# At the end of this tutorial you will be able to
#
# - load a Mamba in any of three formats, and convert one into another without changing a bit,
# - make a model from a configuration, train it with plain PyTorch, and trace it,
# - save it so that plain `transformers` loads it, and load it here again,
# - trace a model with a LoRA adapter of PEFT,
# - read the messages with which a checkpoint is refused.
#
# Your own checkpoint goes into the cell below: a folder, or the name of a repository on the hub. With a large public
# model it would be `model = MambaTrace("state-spaces/mamba-370m")` or `MambaTrace("state-spaces/mamba2-370m")`; both
# are in the original format, and `state-spaces/mamba-370m-hf` is the first of them in Hugging Face's. The training
# further down is made for the small model that ships.

# %%
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_state_dict, detect_state_dict_format
from mamba_trace.errors import MambaTraceError

model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
print(type(model._module).__name__, f"{model._module.num_parameters():,} parameters")

# %% [markdown]
# `model._module` is Hugging Face's own class, with its own parameters. Everything that takes such a module takes this
# one.
#
# ## Three formats
#
# The same weights go by different names: in Hugging Face's checkpoints (`state-spaces/mamba-370m-hf`), in the
# original ones of Mamba's authors (`state-spaces/mamba-370m`), and in MambaLens's state dicts. `convert_state_dict`
# goes from each to each, and recognises what it gets.

# %%
weights = model._module.state_dict()
formats = {name: convert_state_dict(weights, name) for name in ("huggingface", "original", "mamba_lens")}
for name, converted in formats.items():
    print(f"{name} ({len(converted)} tensors, recognised as {detect_state_dict_format(converted)})")
    for key in [key for key in converted if "embedding" in key or (".0." in key and not key.endswith("bias"))][:10]:
        print(f"    {key:40} {tuple(converted[key].shape)}")
back = convert_state_dict(formats["mamba_lens"], "huggingface")
print("there and back, equal to the last bit:", all(torch.equal(weights[key], back[key]) for key in weights))

# %% [markdown]
# The first two differ in the name of the embedding alone, which is enough for a checkpoint of one kind not to load as
# the other. MambaLens splits matrices: `in_proj` into x and the gate (`skip_proj`), `x_proj` into delta, B and C.
#
# ## A folder in the original format
#
# Such a folder has a `config.json` with `d_model` and `n_layer` and no `model_type`, weights, and often no tokenizer.
# We write one and load it: nothing has to be converted first. The tokenizer is given.

# %%
import transformers

transformers.logging.set_verbosity_error()  # it would say below that its own kernels are slow

folder = Path("original")
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text(json.dumps({"d_model": 64, "n_layer": 8, "vocab_size": 344, "rms_norm": True}))
torch.save(formats["original"], folder / "pytorch_model.bin")

loaded = MambaTrace("original", tokenizer=model.tokenizer)
with model.trace(prompt):
    expected = model.lm_head.output.save()
with loaded.trace(prompt):
    logits = loaded.lm_head.output.save()
print("the same logits:", torch.allclose(logits, expected, atol=1e-4))
try:
    transformers.AutoModelForCausalLM.from_pretrained("original")
except ValueError as error:
    print("transformers alone:", str(error)[:77])

# %% [markdown]
# A configuration and a state dict that you hold in memory load in the same way, with
# `MambaTrace.from_state_dict(config, weights)`.
#
# ## From scratch
#
# `from_config` makes a new model, initialised as Mamba's authors do, here with two layers. Its module trains like any
# other. The task is small enough for seconds: sentences with two of eight names and one of three places.

# %%
NAMES, PLACES = "Emma Shelby Mary John Alice Bob Tom James".split(), "school work home".split()
config = {"d_model": 32, "n_layer": 2, "vocab_size": len(model.tokenizer)}
scratch = MambaTrace.from_config(config, tokenizer=model.tokenizer, seed=0)
rng = random.Random(0)


def train(module, places, steps):
    """Train a module on sentences about these places; returns the loss of each step."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        pairs = [rng.sample(NAMES, 2) for _ in range(16)]
        ids = model.to_tokens([f"Lately, {a} and {b} had fun at {rng.choice(places)}" for a, b in pairs])
        loss = module(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


losses = train(scratch._module, PLACES, steps=40)
figure, axes = plt.subplots(figsize=(6, 2.5))
axes.plot(losses)
axes.set(xlabel="step", ylabel="loss", title="A Mamba of two layers, from scratch")
figure.tight_layout()
print(f"loss: {losses[0]:.1f} at the first step, {losses[-1]:.1f} at the last")

# %% [markdown]
# The loss falls and then stays: which names and which place come next cannot be known. What the model has learned can
# be read in a trace of it, right after the training; nothing has to be loaded again.

# %%
ATTEMPT = "Lately, Tom and Alice had fun at"


def places(traced):
    """The probability of each place after the attempt."""
    with torch.no_grad(), traced.trace(ATTEMPT):
        probabilities = traced.lm_head.output[0, -1].softmax(-1).save()
    return {place: round(probabilities[traced.to_single_token(f" {place}")].item(), 1) for place in PLACES}


with torch.no_grad(), scratch.trace(ATTEMPT):
    state = scratch.layers[1].ssm.h[-1].output.save()  # [B,E,N]
    logits = scratch.lm_head.output.save()
said = [model.to_string(token) for token in logits[0].argmax(-1)]
print("after 'Lately, Tom and Alice' the next tokens:", said[4:-1])
print("places:", places(scratch), " state:", list(state.shape))

# %% [markdown]
# The fixed words come right, and the three places share the probability, as they did in the sentences.
#
# ## Save, and load in plain transformers
#
# Save the module and the tokenizer with Hugging Face's own `save_pretrained`. One line before it deserves an
# explanation. Mamba's initialisation divides `out_proj` by the square root of the number of layers, and the
# configuration says so. transformers 5.24 does that division again when it *loads* such a checkpoint. This package
# does not, but your colleague's script would get another model than the one you saved. Once a model is trained,
# switch the setting off.

# %%
scratch._module.config.rescale_prenorm_residual = False
scratch._module.save_pretrained("mine")
scratch.tokenizer.save_pretrained("mine")
print(sorted(path.name for path in Path("mine").iterdir()))

plain = transformers.AutoModelForCausalLM.from_pretrained("mine")
tokenizer = transformers.AutoTokenizer.from_pretrained("mine")
with torch.no_grad():
    of_plain = plain(**tokenizer(ATTEMPT, return_tensors="pt")).logits
again = MambaTrace("mine")
again.dispatch()  # weights are loaded at the first run, or here
kept = zip(scratch._module.parameters(), again._module.parameters(), strict=True)
print(type(plain).__name__, "in transformers gives the same logits:", torch.allclose(of_plain, logits, atol=1e-4))
print("loaded here again: the weights are equal to the last bit:", all(torch.equal(old, new) for old, new in kept))

# %% [markdown]
# ## An adapter
#
# PEFT's LoRA is added to the module, before or after wrapping. It trains the adapter alone, here on sentences in
# which everybody is at work. Traces go through the adapter without another word: what runs is what is there at that
# moment. (PEFT itself does not allow `out_proj` and `conv1d` as targets in a Mamba.)

# %%
import warnings

from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for something by its old name
torch.manual_seed(0)  # of the adapter's first weights
lora = get_peft_model(again._module, LoraConfig(r=4, target_modules=["in_proj", "x_proj"]))
trainable = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
print("before:", places(again))
train(lora, ["work"], steps=40)
print("after: ", places(again), f" trained {trainable:,} of {again._module.num_parameters():,} parameters")
with lora.disable_adapter():
    print("off:   ", places(again))
print(again.last_run)

# %% [markdown]
# The adapter moves probability to " work"; with it switched off the model is the old one. The last lines say what
# ran. An adapter on `in_proj` and `x_proj` costs no kernel, since those are called as modules in any case.
#
# ## What is refused, and how it says so
#
# A checkpoint is checked before a model is built. Each of these would otherwise end in a model that is silently
# wrong, in a long stack of calls, or in foreign code that runs.


# %%
class Code:
    def __reduce__(self):
        return print, ("this would have been run",)


def without(key):
    return {name: value for name, value in formats["original"].items() if name != key}


Path("pickled").mkdir(exist_ok=True)
(Path("pickled") / "config.json").write_text((folder / "config.json").read_text())
torch.save({"backbone.embedding.weight": Code()}, "pickled/pytorch_model.bin")
config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, bos_token_id=0, eos_token_id=0)
gpt2 = transformers.GPT2LMHeadModel(config)
small = {"d_model": 64, "n_layer": 8, "vocab_size": 344}
attempts = {
    "a weight is missing": lambda: MambaTrace.from_state_dict(small, without("backbone.layers.3.mixer.D")),
    "another width": lambda: MambaTrace.from_state_dict(small | {"d_model": 128}, formats["original"]),
    "a misspelt field": lambda: MambaTrace.from_config({"d_model": 64, "n_layer": 2, "vocab_sise": 344}),
    "an unknown layer": lambda: MambaTrace.from_config(small | {"ssm_cfg": {"layer": "Mamba3"}}),
    "another architecture": lambda: MambaTrace(gpt2),
    "a pickle with code": lambda: MambaTrace("pickled", dispatch=True),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except MambaTraceError as error:
        message = str(error)
        print(f"{name}: {type(error).__name__}\n    {message[:240]}{'...' if len(message) > 240 else ''}")

# %% [markdown]
# Each message says what was found and what was expected, and where there is a remedy, which one.
#
# ## The script that trained the models that ship
#
# `tutorials/train_demo.py` made the three models behind `MambaTrace.demo()`, from nothing, on two CPU cores. It is
# one file that you can change: the sentences, the tokenizer (one token for each word), the architecture, the
# training.
#
# ```bash
# python tutorials/train_demo.py --out demo_model
# python tutorials/train_demo.py --out demo_model_mamba2 --architecture mamba2
# python tutorials/train_demo.py --out demo_model_hybrid --architecture hybrid --layer-drop 0
# ```
#
# It prints the number of parameters, a progress bar with the loss and the share of right answers, and at the end, for
# sentences with pairs of names that never occurred in training, the share that is answered right and the logit
# differences of the two prompts of these tutorials. The folder that it writes loads in plain transformers and with
# `MambaTrace("demo_model")`. To try it in seconds, add `--steps 3 --layers 2 --eval-sentences 50`: the answers will
# be wrong, but every part has run.
#
# Two of its choices show in the tutorials. `--layer-drop 0.2` leaves out each layer with that probability in
# training, so that the models can do without a layer (tutorial 10 finds the backup). And a token for each word makes
# positions easy to read; a large model's tokenizer will split some names, and `model.to_single_token(" Emma")` tells
# you which.
