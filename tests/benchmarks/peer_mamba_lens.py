"""MambaLens as a contender: it runs in an environment of its own, and is timed in turn with the others.

MambaLens cannot be installed beside nnsight 0.8 and transformers 5 (`tests/record_mamba_lens.py` says how to
install it elsewhere). So this file has two halves. As a program, run by the interpreter of MambaLens's own
environment, it builds a HookedMamba with random weights in float32, says so in one line of JSON, and obeys
one-line requests on its standard input, each answered by one line of JSON ({"ms": 12.3}):

    forward 128     the forward of a prompt of 128 tokens
    edit 128        the same through run_with_hooks, with the state at the hook --hook set to zeros
    cache 128       run_with_cache, which keeps everything
    grid FILE       the patching heatmap of hook_h by a forward for each cell, answered by {"ms", "values"};
                    FILE is what `torch.save` wrote of {"weights": its state dict, "prompt", "source":
                    tokens [1,L], "tokens": [plus, minus]}
    quit

`MambaLens` is the other half, for the benchmark: it starts that program and passes the requests on. The
program sleeps while it waits, so only one of the two processes computes at any time.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timing import Contender, Milliseconds
from torch import Tensor

PACKAGES = ("mamba-lens", "transformer-lens", "transformers", "torch")
#: Seconds between the processes' turns: OpenMP's threads spin for some milliseconds before they sleep.
REST = 0.05


class MambaLens:
    """The benchmark's half: a running program, until it is closed.

    Args:
        python: the interpreter of the environment that has MambaLens.
        shape: num_hidden_layers, hidden_size, state_size and vocab_size of the model.
        hook: the name of the hook that "edit" zeroes.
        threads: of its PyTorch.

    Raises:
        RuntimeError: if the program ends before it was told to; its own message is on stderr.

    Example::

        with MambaLens(".mamba_lens/bin/python", SHAPES["mamba"], "blocks.12.hook_h.5", threads=2) as peer:
            run = peer.contender("edit", 128)
            run()  # Milliseconds
    """

    def __init__(self, python: str, shape: Mapping[str, int], hook: str, threads: int) -> None:
        arguments = ["--shape", json.dumps(dict(shape)), "--hook", hook, "--threads", str(threads)]
        self._program = subprocess.Popen(
            [python, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, str] = self._answer()["versions"]

    def contender(self, kind: str, length: int) -> Contender:
        """``kind`` ("forward", "edit" or "cache") at ``length`` tokens; it reports its own `Milliseconds`."""

        def run() -> Milliseconds:
            time.sleep(REST)
            answer = self._ask(f"{kind} {length}")
            time.sleep(REST)
            return Milliseconds(answer["ms"])

        return run

    def grid(self, file: Path) -> tuple[Milliseconds, Tensor]:
        """The time and the values [n_layers,L] of a patching heatmap; ``file`` as in the request."""
        time.sleep(REST)
        answer = self._ask(f"grid {file}")
        return Milliseconds(answer["ms"]), torch.tensor(answer["values"])

    def __enter__(self) -> MambaLens:
        return self

    def __exit__(self, *_: Any) -> None:
        self._program.communicate("quit\n" if self._program.poll() is None else None)

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._program.stdin is not None
        self._program.stdin.write(request + "\n")
        self._program.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._program.stdout is not None
        line = self._program.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._program.args[0]} ended with {self._program.wait()}; see above")
        return json.loads(line)


# -- the program -----------------------------------------------------------------------------------------


def hooked_mamba(shape: Mapping[str, int]) -> Any:
    """A HookedMamba with random weights, its step sizes between 0.001 and 0.1 as in a trained one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its custom_fwd is torch's old spelling
        import mamba_lens  # type: ignore[import-not-found, unused-ignore]

    cfg = mamba_lens.MambaCfg(
        d_model=shape["hidden_size"],
        n_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        d_state=shape["state_size"],
        device="cpu",
    )
    model = mamba_lens.HookedMamba(cfg, tokenizer=None)
    for name, parameter in model.named_parameters():
        if name.endswith("W_delta_2.bias"):
            parameter.data.uniform_(-6.9, -2.25)  # softplus: 0.001 to 0.1
    return model


def tasks(model: Any, hook: str, length: int) -> dict[str, Callable[[], Any]]:
    """What can be asked for at one length; the hook is checked to change the logits."""
    vocabulary = model.embedding.num_embeddings
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))  # [1,L]

    def zero(value: Tensor, hook: Any) -> Tensor:
        value[:] = 0
        return value

    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(tokens),
        "edit": lambda: model.run_with_hooks(tokens, fwd_hooks=[(hook, zero)]),
        "cache": lambda: model.run_with_cache(tokens)[1],
    }
    if torch.equal(found["forward"](), found["edit"]()):
        raise ValueError(f"zeroing {hook} changes nothing at {length} tokens")
    return found


def patching_heatmap(model: Any, asked: Mapping[str, Any]) -> Tensor:
    """The logit difference with each hook_h from the source's run, a forward for each cell [n_layers,L]."""
    plus, minus = asked["tokens"]
    _, cache = model.run_with_cache(asked["source"])
    values = torch.zeros(model.cfg.n_layers, asked["prompt"].shape[1])
    for layer in range(values.shape[0]):
        for position in range(values.shape[1]):
            name = f"blocks.{layer}.hook_h.{position}"
            patch = functools.partial(lambda h, hook, name: cache[name], name=name)
            logits = model.run_with_hooks(asked["prompt"], fwd_hooks=[(name, patch)])[0, -1]
            values[layer, position] = logits[plus] - logits[minus]
    return values


def answer_grid(model: Any, file: str) -> dict[str, Any]:
    """What the request "grid FILE" is answered."""
    asked = torch.load(file)
    model.load_state_dict(asked["weights"])
    start = time.perf_counter()
    values = patching_heatmap(model, asked)
    return {"ms": 1000 * (time.perf_counter() - start), "values": values.tolist()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=json.loads, required=True, help="the model's sizes, as JSON")
    parser.add_argument("--hook", required=True, help='what "edit" zeroes')
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = hooked_mamba(arguments.shape)
    versions = {name: version(name) for name in PACKAGES}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), file=answers, flush=True)
    known: dict[int, dict[str, Callable[[], Any]]] = {}
    for line in sys.stdin:
        kind, *rest = line.split()
        if kind == "quit":
            break
        if kind == "grid":
            print(json.dumps(answer_grid(model, " ".join(rest))), file=answers, flush=True)
            continue
        length = int(rest[0])
        if length not in known:
            known[length] = tasks(model, arguments.hook, length)
        start = time.perf_counter()
        result = known[length][kind]()
        elapsed = time.perf_counter() - start
        del result
        print(json.dumps({"ms": 1000 * elapsed}), file=answers, flush=True)


if __name__ == "__main__":
    main()
