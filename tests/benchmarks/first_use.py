"""What the first use of the compiled scan costs: where it has to be compiled, and where it was before; and the import.

python tests/benchmarks/first_use.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

CODE = """
import time
start = time.perf_counter()
import torch
from mamba_trace import MambaTrace
print(f"  import: {time.perf_counter() - start:.1f} s")
model = MambaTrace.from_config({"d_model": 64, "n_layer": 2, "vocab_size": 100})
tokens = torch.ones(1, 20, dtype=torch.long)
def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
with torch.no_grad():
    forward = [seconds(lambda: model._module(tokens)) for _ in range(2)]
backward = [seconds(lambda: model._module(tokens).logits.sum().backward()) for _ in range(2)]
for what, (first, then) in (("forward", forward), ("forward and backward", backward)):
    print(f"  {what}: {first:.2f} s the first time, {1000 * then:.1f} ms then")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what in ("nothing compiled yet", "compiled before"):
            print(what, flush=True)
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)


if __name__ == "__main__":
    main()
