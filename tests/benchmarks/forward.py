"""What a forward and a trace cost, beside the fastest that this machine could be and beside Hugging Face.

A time in milliseconds says little: it differs between machines, and between minutes of a busy one. So every
contender runs in one process, on one set of weights, in turn within each repeat, and what counts is the
ratio of their medians. The *floor* is the bare matmuls of the model (in_proj, x_proj, dt_proj and out_proj
of every layer, and lm_head): no implementation can be faster than 1.0 of it.

The model has the shape of mamba-130m, random weights in float32, batch 1.

    python tests/benchmarks/forward.py --lengths 20 128 512 --threads 2 --json out.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from mamba_trace import MambaTrace

SHAPE = {"num_hidden_layers": 24, "hidden_size": 768, "state_size": 16, "vocab_size": 50280}
LAYER, POSITION = 12, 5  # what the traces look at
PACKAGES = ("mamba_trace", "torch", "nnsight", "transformers", "numba")

Contender = Callable[[], Any]
#: What each contender's time is divided by, and what that says.
BESIDE = {
    "floor": "floor",
    "hugging face": "floor",
    "untraced": "floor",
    "trace, empty": "untraced",
    "trace, edit h[5]": "untraced",
    "trace, read every h[p]": "untraced",
    "trace, read h": "untraced",
}


def models() -> tuple[MambaForCausalLM, MambaTrace]:
    """Hugging Face's module and ours, on the same weights in the same memory."""
    config = MambaConfig(**SHAPE)
    ours = MambaTrace.from_config(config)
    with torch.device("meta"):
        plain = MambaForCausalLM(config)
    plain.load_state_dict(ours._module.state_dict(), assign=True)
    return plain.eval(), ours


def floor(module: MambaForCausalLM, length: int) -> Contender:
    """The matmuls of a forward over ``length`` tokens, and nothing else."""
    mixers = [block.mixer for block in module.backbone.layers]
    steps: list[tuple[Tensor, Tensor]] = []  # input [1,L,width], weight
    for mixer in mixers:
        for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            steps.append((torch.randn(1, length, linear.in_features), linear.weight))
    steps.append((torch.randn(1, length, module.lm_head.in_features), module.lm_head.weight))

    def run() -> None:
        for x, weight in steps:
            F.linear(x, weight)

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


def contenders(plain: MambaForCausalLM, model: MambaTrace, length: int) -> dict[str, Contender]:
    """All that are timed at one length, in the order in which they run."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model._module(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    return {
        "floor": floor(plain, length),
        "hugging face": lambda: plain(tokens),
        "untraced": lambda: model._module(tokens),
        **traces(model, tokens),
    }


def measure(runs: dict[str, Contender], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each contender in each repeat; every repeat starts with another one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            result = runs[name]()
            elapsed = time.perf_counter() - start
            del result
            if repeat >= 0:
                times[name].append(1000 * elapsed)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float | str]]:
    """Of each contender: median, best run, spread (middle half, in medians), ratio of medians, of bests.

    On a machine that others use too, the ratio of the best runs is what noise disturbs least.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = {name: min(values) for name, values in times.items()}
    rows: dict[str, dict[str, float | str]] = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {
            "ms": round(medians[name], 2),
            "best": round(best[name], 2),
            "spread": round((high - low) / medians[name], 3),
            "ratio": round(medians[name] / medians[BESIDE[name]], 3),
            "best_ratio": round(best[name] / best[BESIDE[name]], 3),
            "beside": BESIDE[name],
        }
    return rows


def table(length: int, repeats: int, rows: dict[str, dict[str, Any]]) -> str:
    """One length's numbers for people."""
    lines = [f"L = {length}, {repeats} repeats"]
    lines.append(f"  {'':24}{'ms':>9}{'best':>9}{'spread':>9}   ratio  of bests")
    for name, row in rows.items():
        ratios = f"{row['ratio']:8.2f}{row['best_ratio']:10.2f} x {row['beside']}" if name != "floor" else ""
        lines.append(f"  {name:24}{row['ms']:9.1f}{row['best']:9.1f}{row['spread']:9.0%}{ratios}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128, 512], help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if min(arguments.lengths) <= POSITION or arguments.repeats < 2:
        parser.error(f"a length is at least {POSITION + 1}, and there are at least 2 repeats")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(", ".join(f"{name} {number}" for name, number in versions.items()), f"{arguments.threads} threads")
    plain, model = models()
    results: dict[str, Any] = {"versions": versions, "threads": arguments.threads, "shape": SHAPE}
    results["lengths"] = {}
    for length in arguments.lengths:
        times = measure(contenders(plain, model, length), arguments.repeats)
        rows = summary(times)
        results["lengths"][length] = {"repeats": arguments.repeats, "contenders": rows}
        print(table(length, arguments.repeats, rows), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
