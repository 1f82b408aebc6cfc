"""What a run spends its time on beside its matmuls: other compiled kernels, and the rest.

The rest is Python and PyTorch's small operations, and where there are layers to be looked into, handing tensors to the
kernels. The models are those of `forward`; a prompt is run
untraced, and a generation as in `decode`. Of a grid, the shares are those of its three parts (`patching.phases`), of
reads and a cache those of what a read consists of, and of a gradient those that PyTorch's profiler finds.

    python tests/benchmarks/shares.py
    python tests/benchmarks/shares.py --architectures mamba2 --lengths 128
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from analyses import gradients
from decode import LENGTH, STEPS, matmuls_of_a_generation
from forward import SHAPES, floor, models, prompt, traces
from patching import model_of, prompts

from mamba_trace.modeling import stretches
from mamba_trace.patching import logit_diff, patch_grid, phases
from mamba_trace.scan.cpu import several, team
from mamba_trace.scan.cpu.operators import kernels_in
from mamba_trace.scan.linear import linear
from mamba_trace.scan.recurrence import Selective

PARTS = ("run_unpatched", "run_patched_layers", "run_to_the_end")
#: What a read of a state consists of, beside the calls of nnsight and Python around it.
READS: dict[str, tuple[Any, str]] = {
    "copies": (stretches, "copied"),
    "comparisons": (stretches, "same_contents"),
    "scans with states": (Selective, "states"),
}
#: The names of operations by what they are, as PyTorch's profiler has them.
OPERATIONS = {
    "matmuls": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "scans": ("Scan", "_Recomputed"),
}


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def of_kernels(run: Callable[[], Any], matmuls: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The shares of a run: matmuls, all in turn with it, other kernels, each with a clock around it, and the rest."""
    launch, together = team.launch, several.Together.run
    multiply = [kernels_in(module).forward.compiled for module in (".few_vectors", ".blas")]
    spent = 0.0

    def timed(function: Any, *given: Any) -> None:
        nonlocal spent
        taken = seconds(lambda: launch(function, *given))
        spent += 0 if function in multiply else taken

    def one_by_one(self: several.Together) -> None:
        for kernel, block, count in self.launches:
            block[0] = 0
            team.launch(kernel.compiled, block, count)

    run()
    found: dict[str, list[float]] = {"matmuls": [], "all": []}
    for _ in range(repeats):
        found["matmuls"].append(seconds(matmuls))
        found["all"].append(seconds(run))
    team.launch, several.Together.run = timed, one_by_one
    try:
        whole = sum(seconds(run) for _ in range(repeats))
    finally:
        team.launch, several.Together.run = launch, together
    of = {name: median(times) for name, times in found.items()}
    shares = {"matmuls": of["matmuls"] / of["all"], "kernels": spent / whole}
    return {"milliseconds": 1000 * of["all"], **shares, "rest": 1 - sum(shares.values())}


def of_a_generation(plain: Any, model: Any, repeats: int) -> dict[str, float]:
    """The shares of `STEPS` new tokens after `LENGTH`."""
    tokens = prompt(plain, model, LENGTH)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    matmuls = matmuls_of_a_generation(plain, linear)
    return of_kernels(lambda: model._module.generate(tokens, **settings), matmuls, repeats)


def spent_in(parts: dict[str, tuple[Any, str]], run: Callable[[], Any]) -> dict[str, float]:
    """The shares of a second run that are spent in functions, each an attribute of an object."""
    run()
    spent = dict.fromkeys(parts, 0.0)

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(part)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    own = {name: getattr(*where) for name, where in parts.items()}
    for name, where in parts.items():
        setattr(*where, timed(name, own[name]))
    try:
        whole = seconds(run)
    finally:
        for name, where in parts.items():
            setattr(*where, own[name])
    return {"milliseconds": 1000 * whole} | {name: taken / whole for name, taken in spent.items()}


def of_a_grid(architecture: str) -> dict[str, float]:
    """The shares of the parts of a heatmap of h."""
    model = model_of(architecture)
    metric = logit_diff(model, 5, 6)
    parts = {name: (phases, name) for name in PARTS}
    return spent_in(parts, lambda: patch_grid(model, *prompts(architecture)[0], "h", metric, progress=False))


def of_reads(model: Any, tokens: Any, run: Callable[[], Any]) -> dict[str, float]:
    """The shares of a run that reads states one by one: a forward of its own, what its reads cost, and the rest."""
    shares = spent_in(READS, run)
    forward = 1000 * min(seconds(lambda: model._module(tokens)) for _ in range(3))
    shares["a forward"] = forward / shares["milliseconds"]
    return shares | {"rest": 1 - sum(share for name, share in shares.items() if name != "milliseconds")}


def of_a_gradient(plain: Any, model: Any, length: int) -> dict[str, float]:
    """The shares of the gradients of streams, deltas and states, forward and backward."""
    run = gradients(plain, model, prompt(plain, model, length))["gradients of streams, deltas and states"]
    run()
    with torch.autograd.profiler.profile() as profile:
        run()
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    shares = {"milliseconds": whole / 1000}
    for kind, names in OPERATIONS.items():
        shares[kind] = sum(e.self_cpu_time_total for e in events if e.key.startswith(names)) / whole
    return shares | {"rest": 1 - sum(shares[kind] for kind in OPERATIONS)}


def show(title: str, shares: dict[str, float]) -> None:
    """Print one line."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "milliseconds")
    print(f"{title}: {shares['milliseconds']:.0f} ms; {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128, 512], help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each way")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for architecture in options.architectures:
        torch.manual_seed(0)
        plain, model = models(architecture, SHAPES[architecture])
        with torch.no_grad():
            for length in options.lengths:
                tokens = prompt(plain, model, length)
                run = functools.partial(model._module, tokens)
                show(
                    f"{architecture}, L = {length}",
                    of_kernels(run, floor(plain, length, multiply=linear), options.repeats),
                )
                read = traces(model, tokens)["trace, read every h[p]"]
                show(f"{architecture}, every h[p], L = {length}", of_reads(model, tokens, read))
            tokens = prompt(plain, model, 128)
            everything = functools.partial(model.run_with_cache, tokens)
            show(f"{architecture}, a cache of all, L = 128", of_reads(model, tokens, everything))
            show(f"{architecture}, {STEPS} new tokens", of_a_generation(plain, model, options.repeats))
            show(f"{architecture}, a grid of h", of_a_grid(architecture))
        show(f"{architecture}, gradients, L = 20", of_a_gradient(plain, model, 20))


if __name__ == "__main__":
    main()
