"""What the first use of the compiled scan costs, where it has to be compiled and where it was before, the import and
wrapping a model.

python tests/benchmarks/first_use.py --json tests/benchmarks/first_use.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: The configurations of each family, in the authors' words.
FAMILIES = {"mamba": "{}", "mamba2": "{'ssm_cfg': {'layer': 'Mamba2'}}"}
CODE = """
import json, time
start = time.perf_counter()
import torch
from mamba_trace import MambaTrace
seconds = {"import": time.perf_counter() - start}
model = MambaTrace.from_config({"d_model": 64, "n_layer": 2, "vocab_size": 100} | %s)
tokens = torch.ones(1, 20, dtype=torch.long)
def measure(what, run):
    for which in ("first", "then"):
        start = time.perf_counter()
        run()
        seconds[f"{what}, {which}"] = time.perf_counter() - start
with torch.no_grad():
    measure("forward", lambda: model._module(tokens))
measure("forward and backward", lambda: model._module(tokens).logits.sum().backward())
from transformers import AutoModelForCausalLM
model._module.config.num_hidden_layers = 24
plain = AutoModelForCausalLM.from_config(model._module.config)
measure("wrapping 24 layers", lambda: MambaTrace(plain))
print(json.dumps(seconds))
"""


def measured(family: str) -> dict[str, dict[str, float]]:
    """Seconds by what was run, in an interpreter that finds nothing compiled and in the next one."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in ("nothing compiled yet", "compiled before"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", CODE % FAMILIES[family]]
            printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[what] = {name: round(seconds, 4) for name, seconds in json.loads(printed).items()}
            print(f"{family}, {what}")
            for name, seconds in found[what].items():
                print(f"  {name}: {seconds:.4g} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    found = {family: measured(family) for family in FAMILIES}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
