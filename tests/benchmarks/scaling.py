"""Whether run time is linear in the length of the prompt, and what an edit of a state takes in memory.

*Time*: microseconds per token of an untraced forward, and of a trace that zeroes the state after the middle
position, at lengths that double from 128 to 65,536 tokens, beside those of the bare matmuls, which are linear
in length but for what caches and fresh memory cost. All lengths run in turn within each repeat (`timing` says
why).

*Memory*: the most that a run holds at once beyond the model (`allocations` says how it is counted), beside an
untraced forward's, and its largest single tensor.

The models have a few layers of the width of mamba-130m and mamba2-130m, random weights in float32, batch 1. Their
vocabulary is small and the logits are those of the last token, so that neither hides what the layers take.

    python tests/benchmarks/scaling.py --threads 2 --json out.json
    python tests/benchmarks/scaling.py --architectures mamba2 --lengths 2048 16384
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from forward import SHAPES, floor
from timing import Contender, measure
from torch import Tensor
from transformers import AutoConfig

from mamba_trace import MambaTrace

sys.path.insert(0, str(Path(__file__).parents[1]))
from allocations import PeakMemory

VOCABULARY = 1024
LENGTHS = [128 * 2**doubling for doubling in range(10)]  # 128 to 65,536
BESIDE = 2048  # the length beside whose time per token the others' is put
EDIT, READ = "trace, edit h[L/2]", "trace, read h"
MIB = 2**20


def small_model(architecture: str, n_layers: int) -> MambaTrace:
    """``n_layers`` layers of the width of mamba-130m or mamba2-130m."""
    shape = SHAPES[architecture] | {"num_hidden_layers": n_layers, "vocab_size": VOCABULARY}
    return MambaTrace.from_config(AutoConfig.for_model(architecture, **shape))


def contenders(model: MambaTrace, length: int) -> dict[str, Contender]:
    """What is run at one length; only the last asks for the whole trajectory [B,L,...,N]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)  # [1,L]
    middle = model.layers[len(model.layers) // 2]

    def empty() -> None:
        with model.trace(tokens, logits_to_keep=1):
            pass

    def edit() -> None:
        with model.trace(tokens, logits_to_keep=1):
            middle.ssm.h[length // 2].output[:] = 0

    def read_whole() -> Tensor:
        with model.trace(tokens, logits_to_keep=1):
            states = middle.ssm.h.output.save()
        assert states.shape[1] == length
        return states

    return {
        "floor": floor(model._module, length, logits=1),
        "untraced": lambda: model._module(tokens, logits_to_keep=1),
        "trace, empty": empty,
        EDIT: edit,
        READ: read_whole,
    }


# -- time ------------------------------------------------------------------------------------------------


def times_per_token(model: MambaTrace, lengths: list[int], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Of the matmuls, the untraced forward and the edit, at each length: us per token, median and best."""
    kinds = ("floor", "untraced", EDIT)
    runs = {(kind, length): contenders(model, length)[kind] for length in lengths for kind in kinds}
    times = measure(runs, repeats, warm_up=1)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for (kind, length), values in times.items():
        per_token = [1000 * value / length for value in values]
        found[kind].append({"length": length, "us": statistics.median(per_token), "best": min(per_token)})
    for rows in found.values():
        (beside,) = (row for row in rows if row["length"] == BESIDE)
        for row in rows:
            row["ratio"] = row["us"] / beside["us"]
            row["best_ratio"] = row["best"] / beside["best"]
    return found


def table_of_times(found: dict[str, list[dict[str, float]]]) -> str:
    """The times for people, a line for each length."""
    lines = [f"  {'us/token':>8}" + "".join(f"{kind:>36}" for kind in found)]
    lines.append(f"  {'L':>8}" + f"{'median':>10}{'best':>8}{'ratio':>8}{'of bests':>10}" * len(found))
    for rows in zip(*found.values(), strict=True):
        cells = (f"{row['us']:10.2f}{row['best']:8.2f}{row['ratio']:8.2f}{row['best_ratio']:10.2f}" for row in rows)
        lines.append(f"  {rows[0]['length']:8}" + "".join(cells))
    return "\n".join(lines)


# -- memory ----------------------------------------------------------------------------------------------


def peaks(model: MambaTrace, length: int, whole: bool) -> dict[str, dict[str, float]]:
    """Of each contender: MiB at the peak, beside the untraced forward's, and MiB of its largest tensor.

    Args:
        model: the model.
        length: of the prompt.
        whole: whether the contender is there that asks for the whole trajectory.
    """
    runs = contenders(model, length)
    left_out = ("floor",) if whole else ("floor", READ)
    found = {name: PeakMemory.of(run) for name, run in runs.items() if name not in left_out}
    beside = found["untraced"].peak
    return {
        name: {"peak": memory.peak / MIB, "ratio": memory.peak / beside, "largest": memory.largest / MIB}
        for name, memory in found.items()
    }


def table_of_peaks(found: dict[str, dict[str, float]]) -> str:
    """The memory for people."""
    lines = [f"  {'MiB':24}{'peak':>9}{'ratio':>9}{'largest':>9}"]
    for name, row in found.items():
        lines.append(f"  {name:24}{row['peak']:9.1f}{row['ratio']:9.3f}{row['largest']:9.1f}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, for the times")
    parser.add_argument("--layers", type=int, default=1, help="of the model that is timed")
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[2048, 16384, 65536], help="tokens")
    parser.add_argument("--memory-layers", type=int, default=4, help="of the model whose memory is measured")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs at each length")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    lengths, memory_lengths = sorted({*arguments.lengths, BESIDE}), sorted({*arguments.memory_lengths})
    torch.set_num_threads(arguments.threads)

    results: dict[str, Any] = {"threads": arguments.threads, "architectures": {}}
    for architecture in arguments.architectures:
        shape = SHAPES[architecture]
        memory = {}
        for length in memory_lengths:
            memory[length] = found = peaks(
                small_model(architecture, arguments.memory_layers), length, length == memory_lengths[0]
            )
            print(f"{architecture}, memory: {arguments.memory_layers} layers, L = {length}")
            print(table_of_peaks(found), flush=True)
        times = times_per_token(small_model(architecture, arguments.layers), lengths, arguments.repeats)
        title = f"{arguments.layers} layer(s), {arguments.repeats} repeats, ratios to L = {BESIDE}"
        print(f"{architecture}, time: {title}")
        print(table_of_times(times), flush=True)
        results["architectures"][architecture] = {
            "shape": shape | {"vocab_size": VOCABULARY},
            "memory": {"layers": arguments.memory_layers, "lengths": memory},
            "time": {"layers": arguments.layers, "repeats": arguments.repeats, "contenders": times},
        }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
