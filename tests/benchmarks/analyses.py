"""What gradients and caches cost: beside Hugging Face, and beside what no implementation can do without.

*Gradients*: of one logit, to the residual stream into every layer, every delta and, one by one, every state h[p] of
every layer; and to all parameters besides. Beside it stands a forward and twice its matmuls. Hugging Face's own
backward pass reaches the parameters and the residual streams alone.

*Caches*: `run_with_cache` of every value there is. Beside it stand a forward and a copy of as many bytes, and, for
Mamba-1, MambaLens's own, where it is installed in an environment of its own (`peer_mamba_lens`).

The models are those of `forward`.

    python tests/benchmarks/analyses.py --json tests/benchmarks/analyses.json \\
        --mamba-lens .mamba_lens/bin/python
    python tests/benchmarks/analyses.py --architectures mamba2 --lengths 128
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from forward import PACKAGES, SHAPES, floor, in_words, mamba_lens, models, prompt
from peer_mamba_lens import MambaLens
from timing import Contender, measure, summary, table
from torch import Tensor

from mamba_trace import MambaTrace

BESIDE = {
    "forward and its matmuls twice": "forward and its matmuls twice",
    "hugging face, gradients of the streams": "forward and its matmuls twice",
    "hugging face, and of all parameters": "forward and its matmuls twice",
    "gradients of the streams": "forward and its matmuls twice",
    "gradients of streams, deltas and states": "forward and its matmuls twice",
    "gradients of those and of all parameters": "forward and its matmuls twice",
    "forward and a copy of its values": "forward and a copy of its values",
    "run_with_cache": "forward and a copy of its values",
    "mambalens, run_with_cache": "run_with_cache",
}


def gradients(plain: Any, model: MambaTrace, tokens: Tensor) -> dict[str, Contender]:
    """Backward passes from one logit."""
    matmuls, length = floor(plain, tokens.shape[1]), tokens.shape[1]

    def least() -> None:
        with torch.no_grad():
            model._module(tokens)
            for _ in range(2):
                matmuls()

    def theirs(parameters: bool) -> list[Tensor]:
        streams: list[Tensor] = []

        def keep(module: Any, given: Any) -> None:
            streams.append(given[0])

        handles = [block.register_forward_pre_hook(keep) for block in plain.backbone.layers]
        logit = plain(tokens, use_cache=False).logits[0, -1, 5]
        for handle in handles:
            handle.remove()
        return list(torch.autograd.grad(logit, [*streams, *(plain.parameters() if parameters else ())]))

    def ours(inside: bool, parameters: bool = False) -> list[Tensor]:
        with model.trace(tokens, use_cache=False):
            values = [].save()
            for layer in model.layers:
                values.append(layer.resid_pre.output)
                if inside:
                    values.append(layer.ssm.delta.output)
                    for position in range(length):
                        values.append(layer.ssm.h[position].output)
            logit = model.logits.output[0, -1, 5].save()
        return list(torch.autograd.grad(logit, [*values, *(model._module.parameters() if parameters else ())]))

    return {
        "forward and its matmuls twice": least,
        "hugging face, gradients of the streams": lambda: theirs(False),
        "hugging face, and of all parameters": lambda: theirs(True),
        "gradients of the streams": lambda: ours(False),
        "gradients of streams, deltas and states": lambda: ours(True),
        "gradients of those and of all parameters": lambda: ours(True, parameters=True),
    }


def caches(model: MambaTrace, tokens: Tensor, lens: MambaLens | None = None) -> dict[str, Contender]:
    """Every value of a run."""

    def cached() -> Any:
        with torch.no_grad():
            return model.run_with_cache(tokens)[1]

    kept = list(cached().values())

    def least() -> list[Tensor]:
        with torch.no_grad():
            model._module(tokens)
            return [value.clone() for value in kept]

    theirs = {} if lens is None else {"mambalens, run_with_cache": lens.contender("cache", tokens.shape[1])}
    return {"forward and a copy of its values": least, "run_with_cache": cached, **theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128], help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--mamba-lens", metavar="PYTHON", help="the interpreter of MambaLens's environment")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(in_words(versions))
    results: dict[str, Any] = {"versions": versions, "threads": options.threads, "architectures": {}}
    for architecture in options.architectures:
        torch.manual_seed(0)
        plain, model = models(architecture, SHAPES[architecture])
        found = results["architectures"][architecture] = {}
        with mamba_lens(options.mamba_lens if architecture == "mamba" else None, options.threads) as lens:
            if lens is not None:
                results["versions of mamba lens"] = lens.versions
            for length in options.lengths:
                with torch.no_grad():
                    tokens = prompt(plain, model, length)
                rows = summary(measure(gradients(plain, model, tokens), options.repeats), BESIDE)
                rows |= summary(measure(caches(model, tokens, lens), options.repeats), BESIDE)
                print(table(f"{architecture}, L = {length}, {options.repeats} repeats", rows), flush=True)
                found[length] = rows
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
