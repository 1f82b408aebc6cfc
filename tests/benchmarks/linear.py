"""What a linear layer takes by our loop and by oneDNN, beside PyTorch's own choice, for several sizes.

All run over so many weights of one size that no cache holds them, as the layers of a model do. `scan.linear` goes by
these numbers, which are others on a processor of AMD.

    python tests/benchmarks/linear.py --json tests/benchmarks/linear.json
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import measure, summary, table
from torch import Tensor

from mamba_trace.scan.linear import by_kernel, by_onednn, least_numbers, made_by_amd, most_vectors

#: Inputs and outputs: a tiny layer, one at the threshold, those of mamba-130m, an in_proj of mamba-1.4b and of 2.8b.
SIZES = [(64, 256), (1536, 80), (256, 512), (768, 3072), (1536, 768), (768, 50280), (2048, 8192), (2560, 10240)]
ROWS = [1, 4, 8, 20, 40, 64, 128, 512]
BYTES = 64_000_000  # of weights that are multiplied in turn: more than any cache holds
BESIDE = {"pytorch": "pytorch", "onednn": "pytorch", "kernel": "pytorch"}


def over(multiply: Callable[..., Tensor], x: Tensor, weights: list[Tensor]) -> None:
    """Multiply by one weight after the other."""
    for weight in weights:
        multiply(x, weight, None)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {"threads": options.threads, "made by AMD": made_by_amd(), "sizes": {}}
    results |= {"most vectors": most_vectors(), "least numbers": str(least_numbers())}
    results["versions"] = {"python": platform.python_version(), "torch": version("torch")}
    for inputs, outputs in SIZES:
        weights = [torch.randn(outputs, inputs) for _ in range(min(400, 1 + BYTES // (4 * outputs * inputs)))]
        found = results["sizes"][f"{inputs} -> {outputs}"] = {}
        for rows in ROWS:
            x = torch.randn(1, rows, inputs)
            ways = {"pytorch": F.linear, "onednn": by_onednn, "kernel": by_kernel}
            runs = {name: functools.partial(over, multiply, x, weights) for name, multiply in ways.items()}
            found[rows] = summary(measure(runs, options.repeats), BESIDE)
            print(table(f"{inputs} -> {outputs}, {rows} rows, {len(weights)} weights", found[rows]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
