"""What a forward and a trace cost, beside the fastest that this machine could be and beside the peers.

Every contender runs in turn within each repeat, and what counts is the ratio of their medians (`timing` says
why). The *floor* is the bare matmuls of the model (in_proj, x_proj, dt_proj and out_proj of every layer, and
lm_head) by PyTorch's own linear layers: nothing that calls those can be faster than 1.0 of it. The *lower floor* is
the same matmuls as `scan.linear` computes them, by oneDNN where that is faster. Hugging Face runs on our weights in
this process; MambaLens, where it is installed in an environment of its own, in one beside it (`peer_mamba_lens`).

The model has the shape of mamba-130m, or with ``--architecture mamba2`` that of mamba2-130m, random weights in
float32, batch 1. One mixer of it is timed alone, beside its own matmuls, and a decode step. A second model is so
small that nothing but what a trace itself costs is left: it is compared with nnsight around Hugging Face's own module.

    python tests/benchmarks/forward.py --lengths 20 128 512 --threads 2 --json out.json \\
        --mamba-lens .mamba_lens/bin/python
    python tests/benchmarks/forward.py --architecture mamba2 --json out.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import torch
import torch.nn.functional as F
from peer_mamba_lens import MambaLens
from timing import Contender, measure, summary, table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from mamba_trace import MambaTrace
from mamba_trace.scan.linear import linear

SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 24, "hidden_size": 768, "state_size": 16, "vocab_size": 50280},
    "mamba2": {
        "num_hidden_layers": 24, "hidden_size": 768, "state_size": 128, "vocab_size": 50288, "num_heads": 24,
        "head_dim": 64, "n_groups": 1, "tie_word_embeddings": True, "initializer_range": 0.02,
    },
}  # fmt: skip
SHORT = 128  # tokens; a shorter prompt is timed more often, as whatever disturbs it weighs more
LAYER, POSITION = 12, 5  # what the traces look at
TINY: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 2, "hidden_size": 64, "state_size": 16, "vocab_size": 100},
    "mamba2": {
        "num_hidden_layers": 2, "hidden_size": 64, "state_size": 16, "vocab_size": 100, "num_heads": 8, "head_dim": 16,
        "n_groups": 1,
    },
}  # fmt: skip
TINY_LENGTH, TINY_REPEATS = 8, 20  # a trace of it takes a millisecond or two: repeats of it in each repeat
PACKAGES = ("mamba_trace", "torch", "nnsight", "transformers", "numba")

#: What multiplies vectors by a weight.
Multiply = Callable[[Tensor, Tensor], Tensor]

#: What each contender's time is divided by, and what that says.
BESIDE = {
    "floor": "floor",
    "lower floor": "floor",
    "mamba lens": "floor",
    "mamba lens, edit h[5]": "mamba lens",
    "hugging face": "floor",
    "untraced": "floor",
    "trace, empty": "untraced",
    "trace, edit h[5]": "untraced",
    "trace, read every h[p]": "untraced",
    "trace, read h": "untraced",
    "mixer's floor": "mixer's floor",
    "mixer's lower floor": "mixer's floor",
    "hugging face's mixer": "mixer's floor",
    "mixer": "mixer's floor",
    "hugging face, decode step": "hugging face, decode step",
    "decode step": "hugging face, decode step",
}
#: The same for the tiny model.
TINY_BESIDE = {
    "nnsight on hugging face, empty trace": "nnsight on hugging face, empty trace",
    "trace, empty": "nnsight on hugging face, empty trace",
    "hugging face": "hugging face",
    "untraced": "hugging face",
}


def models(
    architecture: str, shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[Any, MambaTrace]:
    """Hugging Face's module and ours, on the same weights in the same memory."""
    config = AutoConfig.for_model(architecture, **shape)
    ours = MambaTrace.from_config(config, tokenizer)
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(ours._module.state_dict(), assign=True)
    return plain.eval(), ours


def prompt(plain: PreTrainedModel, model: MambaTrace, length: int) -> Tensor:
    """Random tokens [1,L], on which both models are checked to agree."""
    vocabulary = plain.config.vocab_size
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model._module(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    return tokens


def floor(module: Any, length: int, logits: int | None = None, multiply: Multiply = F.linear) -> Contender:
    """The matmuls of a forward over ``length`` tokens, of which ``logits`` get logits, and nothing else."""
    mixers = [block.mixer for block in module.backbone.layers]
    layers = [(layer, length) for layer in linears(*mixers)] + [(module.lm_head, logits or length)]
    return matmuls(layers, multiply)


def linears(*mixers: Any) -> list[Any]:
    """The projections of mixers: two in Mamba-2."""
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return [getattr(mixer, name) for mixer in mixers for name in names if hasattr(mixer, name)]


def matmuls(layers: list[tuple[Any, int]], multiply: Multiply = F.linear) -> Contender:
    """Each linear layer on random vectors, as many as stand beside it."""
    steps = [(torch.randn(1, length, layer.in_features), layer.weight) for layer, length in layers]

    def run() -> None:
        for x, weight in steps:
            multiply(x, weight)

    return run


def traces(model: MambaTrace, tokens: Tensor) -> dict[str, Contender]:
    """What a user writes, from nothing to every state of a layer; tokens [1,L]."""
    length = tokens.shape[1]

    def empty() -> None:
        with model.trace(tokens):
            pass

    def edit() -> None:
        with model.trace(tokens):
            model.layers[LAYER].ssm.h[POSITION].output[:] = 0

    def read_each() -> list[Tensor]:
        with model.trace(tokens):
            states = nnsight.save([])
            for position in range(length):
                states.append(model.layers[LAYER].ssm.h[position].output)
        assert len(states) == length
        return states

    def read_whole() -> Tensor:
        with model.trace(tokens):
            states = model.layers[LAYER].ssm.h.output.save()
        assert states.shape[1] == length
        return states

    return {
        "trace, empty": empty,
        "trace, edit h[5]": edit,
        "trace, read every h[p]": read_each,
        "trace, read h": read_whole,
    }


def parts(plain: Any, model: MambaTrace, tokens: Tensor) -> dict[str, Contender]:
    """One mixer alone, and one step of generation after the prompt."""
    theirs, ours = plain.backbone.layers[LAYER].mixer, model._module.backbone.layers[LAYER].mixer
    length = tokens.shape[1]
    stream = torch.randn(1, length, plain.config.hidden_size)
    inner = [(layer, length) for layer in linears(ours)]
    caches = []
    for module in (plain, model._module):
        caches.append(DynamicCache(config=plain.config))
        module(tokens, cache=caches[-1], use_cache=True)
    return {
        "mixer's floor": matmuls(inner),
        "mixer's lower floor": matmuls(inner, linear),
        "hugging face's mixer": lambda: theirs(stream),
        "mixer": lambda: ours(stream),
        "hugging face, decode step": lambda: plain(tokens[:, -1:], cache=caches[0], use_cache=True),
        "decode step": lambda: model._module(tokens[:, -1:], cache=caches[1], use_cache=True),
    }


def contenders(plain: PreTrainedModel, model: MambaTrace, lens: MambaLens | None, length: int) -> dict[str, Contender]:
    """All that are timed at one length, in the order in which they run."""
    tokens = prompt(plain, model, length)
    runs = {"floor": floor(plain, length), "lower floor": floor(plain, length, multiply=linear)}
    if lens is not None:
        runs["mamba lens"] = lens.contender("forward", length)
        runs["mamba lens, edit h[5]"] = lens.contender("edit", length)
    runs["hugging face"] = lambda: plain(tokens)
    runs["untraced"] = lambda: model._module(tokens)
    return {**runs, **traces(model, tokens), **parts(plain, model, tokens)}


def tiny_contenders(architecture: str) -> dict[str, Contender]:
    """A trace that asks for nothing, of nnsight's own class around Hugging Face's module and of ours."""
    # nnsight asks for a tokenizer; a prompt of tokens uses none.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")), pad_token="[UNK]"
    )
    plain, model = models(architecture, TINY[architecture], tokenizer)
    tokens = prompt(plain, model, TINY_LENGTH)
    wrapped = nnsight.TransformersModel(plain, task="text-generation", tokenizer=tokenizer)

    def theirs() -> None:
        with wrapped.trace(tokens):
            pass

    def ours() -> None:
        with model.trace(tokens):
            pass

    return {
        "nnsight on hugging face, empty trace": theirs,
        "trace, empty": ours,
        "hugging face": lambda: plain(tokens),
        "untraced": lambda: model._module(tokens),
    }


def mamba_lens(python: str | None, threads: int) -> AbstractContextManager[MambaLens | None]:
    """MambaLens in the environment of the interpreter ``python``; without one, nothing."""
    if python is None:
        print("no --mamba-lens PYTHON is given: its rows are left out")
        return contextlib.nullcontext()
    return MambaLens(python, SHAPES["mamba"], f"blocks.{LAYER}.hook_h.{POSITION}", threads)


def in_words(versions: dict[str, str]) -> str:
    """Names and version numbers on one line."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=list(SHAPES), default="mamba")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128, 512], help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each contender, at L >= 128")
    parser.add_argument("--mamba-lens", metavar="PYTHON", help="interpreter of an environment that has it")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    repeats, tiny_repeats = arguments.repeats, TINY_REPEATS * arguments.repeats
    if min(arguments.lengths) <= POSITION or repeats < 2:
        parser.error(f"a length is at least {POSITION + 1}, and there are at least 2 repeats")
    if arguments.mamba_lens is not None and arguments.architecture != "mamba":
        parser.error("MambaLens has Mamba-1 alone")
    architecture, shape = arguments.architecture, SHAPES[arguments.architecture]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(in_words(versions), f"{arguments.threads} threads", sep=", ")
    results: dict[str, Any] = {"versions": versions, "threads": arguments.threads, "shape": shape}

    rows = summary(measure(tiny_contenders(architecture), tiny_repeats), TINY_BESIDE)
    print(table(f"tiny model, L = {TINY_LENGTH}, {tiny_repeats} repeats", rows, digits=2), flush=True)
    results["tiny"] = {"shape": TINY[architecture], "length": TINY_LENGTH, "repeats": tiny_repeats, "contenders": rows}

    plain, model = models(architecture, shape)
    results["lengths"] = {}
    with mamba_lens(arguments.mamba_lens, arguments.threads) as lens:
        if lens is not None:
            results["versions of mamba lens"] = lens.versions
            print("beside it:", in_words(lens.versions))
        for length in arguments.lengths:
            more = repeats * max(1, SHORT // length)
            rows = summary(measure(contenders(plain, model, lens, length), more), BESIDE)
            print(table(f"L = {length}, {more} repeats", rows), flush=True)
            results["lengths"][length] = {"repeats": more, "contenders": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
