"""What a token of a generation costs, beside its bare matmuls and beside Hugging Face, on one thread and on two.

Each contender generates `STEPS` tokens after a prompt of `LENGTH`; the *floor* is the matmuls of that: of the prompt
once, and of one token `STEPS` - 1 times; it and the *lower floor* are as in `forward`. A token's matmuls read every
weight for one vector, so memory decides. The models are those of `forward`.

    python tests/benchmarks/decode.py --json tests/benchmarks/decode.json
    python tests/benchmarks/decode.py --architectures mamba2 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from forward import LAYER, PACKAGES, SHAPES, Multiply, floor, in_words, models, prompt
from timing import Contender, measure, summary, table

from mamba_trace import MambaTrace
from mamba_trace.scan.linear import linear

LENGTH, STEPS = 8, 17
BESIDE = {
    "floor": "floor",
    "lower floor": "floor",
    "hugging face": "floor",
    "untraced": "floor",
    "trace, empty": "floor",
    "trace, edit h at each step": "floor",
}


def matmuls_of_a_generation(plain: Any, multiply: Multiply = F.linear) -> Contender:
    """Those of the prompt once, and of one token for each that is generated but the last."""
    first, step = floor(plain, LENGTH, logits=1, multiply=multiply), floor(plain, 1, multiply=multiply)

    def run() -> None:
        first()
        for _ in range(STEPS - 1):
            step()

    return run


def contenders(plain: Any, model: MambaTrace) -> dict[str, Contender]:
    """All that are timed with one number of threads."""
    tokens = prompt(plain, model, LENGTH)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}

    def empty() -> None:
        with model.generate(tokens, **settings):
            pass

    def edit() -> None:
        with model.generate(tokens, **settings) as tracer:
            for _ in tracer.iter[:STEPS]:
                model.layers[LAYER].ssm.h[-1].output[:] *= 0.5

    return {
        "floor": matmuls_of_a_generation(plain),
        "lower floor": matmuls_of_a_generation(plain, linear),
        "hugging face": lambda: plain.generate(tokens, **settings),
        "untraced": lambda: model._module.generate(tokens, **settings),
        "trace, empty": empty,
        "trace, edit h at each step": edit,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=6, help="timed runs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(in_words(versions))
    results: dict[str, Any] = {"versions": versions, "prompt": LENGTH, "new tokens": STEPS, "architectures": {}}
    for architecture in options.architectures:
        torch.manual_seed(0)
        plain, model = models(architecture, SHAPES[architecture])
        found = results["architectures"][architecture] = {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            found[threads] = summary(measure(contenders(plain, model), options.repeats), BESIDE)
            title = f"{architecture}, {threads} threads, {STEPS} tokens, {options.repeats} repeats"
            print(table(title, found[threads]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
