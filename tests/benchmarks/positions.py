"""A loop over positions that reads and edits a site, beside the same loop in nnsight on Hugging Face.

People write ``site.output[:, p]`` in a loop over p. Each turn asks the run for the place again, so what a
further read costs counts, and it must not grow with the number of reads. *read* keeps each position's vector,
*edit* zeroes it, *both* does both, *saved* saves each before it is zeroed, and *state* edits h[p] at each
position, which plain nnsight cannot. The peer is nnsight's own wrapper on Hugging Face's module, on the
output of a block. What counts is the time of a loop beyond that of an empty trace, for each position: it
stays the same where time is linear.

    python tests/benchmarks/positions.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from timing import Contender, measure
from transformers import MambaConfig, MambaForCausalLM

from mamba_trace import MambaTrace

LENGTHS = (500, 1000, 2000)


def loops(place: Any, run: Any, length: int) -> dict[str, Contender]:
    """The loops over ``place``, whose output is [1,L,D], in traces that ``run`` opens."""

    def empty() -> None:
        with run():
            pass

    def read() -> None:
        with run():
            rows = nnsight.save([])
            for position in range(length):
                rows.append(place.output[:, position])

    def edit() -> None:
        with run():
            for position in range(length):
                place.output[:, position] = 0

    def both() -> None:
        with run():
            rows = []
            for position in range(length):
                rows.append(place.output[:, position].clone())
                place.output[:, position] = 0

    def saved() -> None:
        with run():
            for position in range(length):
                place.output[:, position].save()
                place.output[:, position] = 0

    return {"empty": empty, "read": read, "edit": edit, "both": both, "saved": saved}


def contenders(length: int) -> dict[str, Contender]:
    """What is run at one length."""
    config = MambaConfig(hidden_size=256, num_hidden_layers=2, vocab_size=100)
    model = MambaTrace.from_config(config)
    plain = MambaForCausalLM(model.config).eval()
    plain.load_state_dict(model._module.state_dict())
    peer = TransformersModel(plain, tokenizer=MambaTrace.demo().tokenizer, task="text-generation")
    tokens = torch.arange(length)[None] % 100  # [1,L]
    ours = loops(model.layers[0].resid_post, lambda: model.trace(tokens), length)
    theirs = loops(peer.backbone.layers[0], lambda: peer.trace(tokens), length)

    def state() -> None:
        with model.trace(tokens):
            for position in range(length):
                model.layers[0].ssm.h[position].output[:] *= 0.5

    return ours | {"state": state} | {f"{name}, nnsight": run for name, run in theirs.items()}


def per_position(times: dict[str, list[float]], length: int) -> dict[str, float]:
    """Microseconds for each position beyond an empty trace: the medians of the differences in each repeat."""
    found = {}
    for name, values in times.items():
        empty = times["empty, nnsight" if name.endswith("nnsight") else "empty"]
        differences = [value - beside for value, beside in zip(values, empty, strict=True)]
        found[name] = round(1000 * statistics.median(differences) / length, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    with torch.no_grad():
        for length in options.lengths:
            times = measure(contenders(length), options.repeats, warm_up=1)
            found[length] = per_position(times, length)
    print("us for each position" + "".join(f"{length:>9}" for length in found))
    for name in found[options.lengths[0]]:
        print(f"  {name:18}" + "".join(f"{row[name]:9.1f}" for row in found.values()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
