"""Whether run time is linear in the length of the prompt, and what an edit of a state takes in memory.

*Time*: microseconds per token of an untraced forward, and of a trace that zeroes the state after one
position, at lengths that double from 128 to 65,536 tokens, beside those of the bare matmuls, which are linear
in length but for what caches and fresh memory cost. All lengths run in turn within each repeat (`timing` says
why).

*Memory*: the most that a run holds at once beyond the model (`allocations` says how it is counted), beside an
untraced forward's, and its largest single tensor, beside one of shape [B,L,E,N].

The model has a few layers of mamba-130m's width, random weights in float32, batch 1. Its vocabulary is small
and the logits are those of the last token, so that neither hides what the layers take.

    python tests/benchmarks/scaling.py --threads 2 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from forward import floor
from timing import Contender, measure
from torch import Tensor
from transformers import MambaConfig

from mamba_trace import MambaTrace

sys.path.insert(0, str(Path(__file__).parents[1]))
from allocations import PeakMemory

SHAPE = {"hidden_size": 768, "state_size": 16, "vocab_size": 1024}
POSITION = 5  # whose state is edited
LENGTHS = [128 * 2**doubling for doubling in range(10)]  # 128 to 65,536
BESIDE = 1024  # the length beside whose time per token the others' is put
MIB = 2**20


def small_model(n_layers: int) -> MambaTrace:
    """``n_layers`` layers of mamba-130m's width."""
    return MambaTrace.from_config(MambaConfig(num_hidden_layers=n_layers, **SHAPE))


def contenders(model: MambaTrace, length: int) -> dict[str, Contender]:
    """What is run at one length; only the last asks for the whole trajectory [B,L,E,N]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, length), generator=generator)  # [1,L]
    middle = model.layers[len(model.layers) // 2]

    def empty() -> None:
        with model.trace(tokens, logits_to_keep=1):
            pass

    def edit() -> None:
        with model.trace(tokens, logits_to_keep=1):
            middle.ssm.h[POSITION].output[:] = 0

    def read_whole() -> Tensor:
        with model.trace(tokens, logits_to_keep=1):
            states = middle.ssm.h.output.save()
        assert states.shape[1] == length
        return states

    return {
        "floor": floor(model._module, length, logits=1),
        "untraced": lambda: model._module(tokens, logits_to_keep=1),
        "trace, empty": empty,
        "trace, edit h[5]": edit,
        "trace, read h": read_whole,
    }


# -- time ------------------------------------------------------------------------------------------------


def times_per_token(model: MambaTrace, lengths: list[int], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Of the matmuls, the untraced forward and the edit, at each length: us per token, median and best."""
    kinds = ("floor", "untraced", "trace, edit h[5]")
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


def peaks(model: MambaTrace, length: int) -> dict[str, dict[str, float]]:
    """Of each contender: MiB at the peak, beside the untraced forward's, and MiB of its largest tensor."""
    runs = contenders(model, length)
    found = {name: PeakMemory.of(run) for name, run in runs.items() if name != "floor"}
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
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, for the times")
    parser.add_argument("--layers", type=int, default=1, help="of the model that is timed")
    parser.add_argument("--memory-length", type=int, default=2048, help="tokens, for the memory")
    parser.add_argument("--memory-layers", type=int, default=4, help="of the model whose memory is measured")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs at each length")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    lengths, length = sorted({*arguments.lengths, BESIDE}), arguments.memory_length
    if min(*lengths, length) <= POSITION:
        parser.error(f"a length is at least {POSITION + 1}")
    torch.set_num_threads(arguments.threads)

    memory = peaks(small_model(arguments.memory_layers), length)
    trajectory = length * 2 * SHAPE["hidden_size"] * SHAPE["state_size"] * 4 / MIB
    print(f"memory: {arguments.memory_layers} layers, L = {length}; [B,L,E,N] takes {trajectory:.0f} MiB")
    print(table_of_peaks(memory), flush=True)

    times = times_per_token(small_model(arguments.layers), lengths, arguments.repeats)
    print(f"time: {arguments.layers} layer(s), {arguments.repeats} repeats, ratios to L = {BESIDE}")
    print(table_of_times(times))
    if arguments.json is not None:
        memory_numbers = {"layers": arguments.memory_layers, "length": length, "contenders": memory}
        time_numbers = {"layers": arguments.layers, "repeats": arguments.repeats, "contenders": times}
        results: dict[str, Any] = {"threads": arguments.threads, "shape": SHAPE}
        results |= {"memory": memory_numbers, "time": time_numbers}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
