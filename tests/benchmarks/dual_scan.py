"""Mamba-2's scan beside the matrix products of its layer, at the shape of mamba2-130m.

The products are those of in_proj and out_proj: no implementation can do without them. "gated" is what a layer runs
where nothing inside is wanted (the scan, D, the gate and the last state), "scan" the bare scan, "backward" its
forward and backward pass.

    PYTHONPATH=. python tests/benchmarks/dual_scan.py --threads 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Contender, measure, summary, table
from torch import Tensor

from mamba_trace.scan import DUAL

D, E, H, P, N, G = 768, 1536, 24, 64, 128, 1
LENGTHS = [1, 128, 512]


def inputs(length: int) -> dict[str, Tensor]:
    """The arguments of the gated scan for one prompt: views of what in_proj and the convolution give."""
    g = torch.Generator().manual_seed(0)
    skip, conv, delta = torch.randn(1, length, 2 * E + 2 * G * N + H, generator=g).split([E, E + 2 * G * N, H], -1)
    x, B, C = F.silu(conv).split([E, G * N, G * N], dim=-1)
    return {
        "x": x.unflatten(-1, (H, P)),
        "delta": F.softplus(delta - 3),
        "A": -1 - 15 * torch.rand(H, generator=g),
        "B": B.unflatten(-1, (G, N)),
        "C": C.unflatten(-1, (G, N)),
        "D": torch.ones(H),
        "skip": skip.unflatten(-1, (H, P)),
        "h_start": torch.randn(1, H, P, N, generator=g),
    }


def contenders(length: int, kernels: str) -> dict[str, Contender]:
    """What is timed at a length, by name."""
    given = inputs(length)
    bare = {name: tensor for name, tensor in given.items() if name not in ("D", "skip")}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in bare.items()}
    g = torch.Generator().manual_seed(1)
    stream = torch.randn(1, length, D, generator=g)
    in_proj, out_proj = torch.randn(2 * E + 2 * G * N + H, D, generator=g), torch.randn(D, E, generator=g)

    @torch.no_grad()
    def products() -> Tensor:
        return F.linear(F.linear(stream, in_proj)[..., :E], out_proj)

    @torch.no_grad()
    def gated() -> tuple[Tensor, Tensor]:
        return DUAL.gated_scan(**given, kernels=kernels)

    @torch.no_grad()
    def scan() -> tuple[Tensor, Tensor]:
        return DUAL.selective_scan(**bare, kernels=kernels)

    def backward() -> tuple[Tensor, ...]:
        y, h_last = DUAL.selective_scan(**leaves, kernels=kernels)
        return torch.autograd.grad(y.sum() + h_last.sum(), list(leaves.values()))

    return {"products": products, "gated": gated, "scan": scan, "backward": backward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for length in options.lengths:
        times = measure(contenders(length, options.kernels), options.repeats)
        found[length] = summary(times, dict.fromkeys(times, "products"))
        print(table(f"{length} positions, {options.threads} threads", found[length], digits=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
