"""The patching heatmap of the state, beside MambaLens's, and beside the matmuls that no sweep can do without.

A model of mamba-130m's shape with random weights, 24 layers x 17 positions, or with ``--architecture mamba2`` of
mamba2-130m's, where the same matmuls are the floor (MambaLens has no Mamba-2). MambaLens (in an environment of
its own, see `peer_mamba_lens`) runs a forward for each of the 408 cells, on the same weights, and the values
are compared. *floor* is the matmuls of the positions that a patch can change, layer by layer.

Two pairs of prompts are swept: one that differs from the first token on, so that no cell can be left out, and
one that differs in one token in the middle, as prompts do that ask who did something.

With the architecture of a hybrid, *whole forwards* is what the same heatmap takes with a forward of the whole prompt
for each cell, as cells run in a model with edits.

    python tests/benchmarks/patching.py --mamba-lens .mamba_lens/bin/python --sites h resid_pre conv
    python tests/benchmarks/patching.py --architecture mamba2 --sites h resid_pre conv
    python tests/benchmarks/patching.py --architecture nemotron_h --sites attn.k
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from forward import PACKAGES, SHAPES, in_words, mamba_lens
from timing import Contender, measure, summary, table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_state_dict
from mamba_trace.patching import Metric, attribution_grid, logit_diff, patch_grid
from mamba_trace.patching.changes import Change
from mamba_trace.patching.grid import asked
from mamba_trace.patching.whole import Whole

LENGTH, DIFFERS = 17, 10
PLUS, MINUS = 5, 6
BESIDE = {"floor": "floor", "patch_grid": "floor", "attribution_grid": "floor", "whole forwards": "patch_grid"}
#: Hybrids, smaller than any that was released.
HYBRIDS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"] * 4,
        "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 1,
        "ssm_state_size": 64,
    },
    "falcon_h1": {
        "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 768, "mamba_n_heads": 12,
        "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64,
    },
}  # fmt: skip


def shape_of(architecture: str) -> dict[str, Any]:
    """The fields of the configuration that is measured."""
    return HYBRIDS.get(architecture) or SHAPES[architecture]


def floor(model: MambaTrace, layers: list[int], first: int) -> Contender:
    """The matmuls of every cell's run and its logits, for prompts that differ from ``first`` on.

    Args:
        model: the model.
        layers: those where runs start, the rows of the heatmap.
        first: the first position where they do.
    """
    positions = range(first, LENGTH)
    tokens = sum(LENGTH - position for position in positions)  # of the runs that start in one layer
    steps: list[tuple[Tensor, Tensor]] = []  # input [tokens,width], weight
    for layer, block in enumerate(model.layers):
        linears = [module for module in block._module.modules() if isinstance(module, torch.nn.Linear)]
        rows = sum(start <= layer for start in layers)
        for linear in linears:
            steps.append((torch.randn(rows * tokens, linear.in_features), linear.weight))
    head = model._module.lm_head
    steps.append((torch.randn(len(layers) * len(positions), head.in_features), head.weight))

    def run() -> None:
        for x, weight in steps:
            F.linear(x, weight)

    return run


def model_of(architecture: str) -> MambaTrace:
    """A model of the shape of the smallest that was released, with random weights."""
    config = AutoConfig.for_model(architecture, **shape_of(architecture))
    if architecture in HYBRIDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MambaTrace(AutoModelForCausalLM.from_config(config).eval())
    return MambaTrace.from_config(config)


def whole_forwards(model: MambaTrace, pair: tuple[Tensor, Tensor], site: str, metric: Metric) -> None:
    """The grid with a forward of the whole prompt for each cell that the prompts' difference reaches."""
    question = asked("patch_grid", model, *pair, site, metric, -1, 1)
    with torch.no_grad():
        way = Whole(model, question, [Change("nothing")])
        list(way.cells([job for job in way.jobs if job.positions.start in question.positions]))


def prompts(architecture: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Pairs of prompt and source [1,L], by the first position at which they differ."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = HYBRIDS.get(architecture, SHAPES["mamba"])["vocab_size"]
    first, second = torch.randint(0, vocabulary, (2, 1, LENGTH), generator=generator)
    one = first.clone()
    one[:, DIFFERS] = second[:, DIFFERS]
    return {0: (first, second), DIFFERS: (first, one)}


def beside_mamba_lens(lens: Any, model: MambaTrace, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """MambaLens's time for the same heatmap, and how far its values are from ours."""
    ours = patch_grid(model, *pair, "h", logit_diff(model, PLUS, MINUS), progress=False).values
    weights = convert_state_dict(model._module.state_dict(), "mamba_lens")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.pt"
        asked = {"weights": weights, "prompt": pair[0], "source": pair[1], "tokens": [PLUS, MINUS]}
        torch.save(asked, file)
        ms, theirs = lens.grid(file)
    difference, spread = (theirs - ours).abs().max(), ours.max() - ours.min()
    return {"ms": round(float(ms)), "largest difference": float(difference), "spread": float(spread)}


def compared(
    model: MambaTrace, pair: tuple[Tensor, Tensor], site: str, first: int, lens: Any, repeats: int
) -> dict[str, Any]:
    """All times for one pair of prompts, printed and returned."""
    metric = logit_diff(model, PLUS, MINUS)
    layers = asked("patch_grid", model, *pair, site, metric, -1, 1).layers
    runs: dict[str, Contender] = {
        "floor": floor(model, layers, first),
        "patch_grid": functools.partial(patch_grid, model, *pair, site, metric, progress=False),
        "attribution_grid": functools.partial(attribution_grid, model, *pair, site, metric),
    }
    if model.architecture.hybrid:
        runs["whole forwards"] = functools.partial(whole_forwards, model, pair, site, metric)
    rows = summary(measure(runs, repeats, warm_up=1), BESIDE)
    title = f"{site}, prompts that differ from token {first} on, {repeats} repeats"
    print(table(title, rows, digits=0), flush=True)
    if lens is None:
        return {"contenders": rows}
    found = beside_mamba_lens(lens, model, pair)
    found["ratio"] = round(found["ms"] / rows["patch_grid"]["ms"], 2)
    print(
        f"  MambaLens: {found['ms']} ms, {found['ratio']} x patch_grid; values differ by at most "
        f"{found['largest difference']:.1e} of {found['spread']:.2g}",
        flush=True,
    )
    return {"contenders": rows, "mamba lens": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--architecture", choices=["mamba", "mamba2", *HYBRIDS], default="mamba")
    parser.add_argument("--sites", nargs="+", default=["h"], help="what is patched; after the first on one pair alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--mamba-lens", metavar="PYTHON", help="interpreter of an environment that has it")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if arguments.mamba_lens and arguments.architecture != "mamba":
        parser.error("MambaLens has Mamba-1 only")
    site, *others = arguments.sites
    if arguments.mamba_lens and site != "h":
        parser.error("MambaLens is compared on the state")
    torch.set_num_threads(arguments.threads)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(in_words(versions), f"{arguments.threads} threads", arguments.architecture, sep=", ")
    model = model_of(arguments.architecture)
    results: dict[str, Any] = {"versions": versions, "threads": arguments.threads}
    results["shape"] = shape_of(arguments.architecture)
    results["architecture"] = arguments.architecture
    results |= {"length": LENGTH, "repeats": arguments.repeats, "first difference": {}}
    with mamba_lens(arguments.mamba_lens, arguments.threads) as lens:
        for first, pair in prompts(arguments.architecture).items():
            found = compared(model, pair, site, first, lens, arguments.repeats)
            results["first difference"][str(first)] = found
    pair = prompts(arguments.architecture)[0]
    results["site"] = site
    results["other sites"] = {other: compared(model, pair, other, 0, None, arguments.repeats) for other in others}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
