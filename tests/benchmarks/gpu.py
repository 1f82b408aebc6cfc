"""What a forward, a trace, a heatmap and decoding cost on a GPU, beside mamba_ssm's own model.

Every contender runs in turn within each repeat, and what counts is the ratio of their medians (`timing` says
why). Each time is taken from an idle GPU until it is idle again. The models have the shapes of mamba-130m,
mamba-370m, mamba2-130m and mamba2-370m, random weights, batch 1; mamba_ssm's rows are left out where it does not
import.

    python tests/benchmarks/gpu.py --lengths 128 512 2048 --json out.json
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from forward import LAYER, POSITION, traces
from timing import Contender, Milliseconds, Rows, measure, summary, table
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from mamba_trace import MambaTrace
from mamba_trace.patching import patch_grid
from mamba_trace.scan import cuda, triton

DEVICE = torch.device("cuda:0")
VOCABULARY = 50280
SHAPES: dict[str, dict[str, Any]] = {
    "130m": {"num_hidden_layers": 24, "hidden_size": 768, "state_size": 16},
    "370m": {"num_hidden_layers": 48, "hidden_size": 1024, "state_size": 16},
    "mamba2-130m": {"num_hidden_layers": 24, "hidden_size": 768, "state_size": 128, "num_heads": 24},
    "mamba2-370m": {"num_hidden_layers": 48, "hidden_size": 1024, "state_size": 128, "num_heads": 32},
}
#: What the configurations of all Mamba-2 shapes have in common.
DUAL = {"head_dim": 64, "n_groups": 1, "chunk_size": 256, "tie_word_embeddings": True, "residual_in_fp32": True}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEATMAPS, POSITIONS = ("370m", "mamba2-370m"), 17  # 48 layers x 17 positions
PROMPT, NEW_TOKENS = 16, 128
PACKAGES = ("mamba_trace", "torch", "transformers", "nnsight", "mamba-ssm", "causal-conv1d", "triton")


def synchronised(run: Contender) -> Contender:
    """``run``, measuring itself on the GPU."""

    def timed() -> Milliseconds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return Milliseconds(begin.elapsed_time(end))

    return timed


def ours(shape: dict[str, Any], dtype: torch.dtype, kernels: str) -> MambaTrace:
    """A model of ``shape`` with random weights on the GPU."""
    fields = {**shape, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = Mamba2Config(**fields, **DUAL) if "num_heads" in shape else MambaConfig(**fields)
    module = AutoModelForCausalLM.from_config(config)
    return MambaTrace(module.to(DEVICE, dtype).eval(), kernels=kernels)


def theirs(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """mamba_ssm's model of the same shape, or ``None`` where it cannot be had."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = TheirConfig(
            d_model=shape["hidden_size"],
            n_layer=shape["num_hidden_layers"],
            vocab_size=VOCABULARY,
            ssm_cfg={"layer": "Mamba2"} if "num_heads" in shape else {},
        )
        model = MambaLMHeadModel(config, device=DEVICE, dtype=dtype).eval()
        model(torch.zeros(1, 8, dtype=torch.long, device=DEVICE))
        return model
    except Exception as error:
        print(f"mamba_ssm's rows are left out: {type(error).__name__}: {error}".splitlines()[0])
        return None


def random_tokens(length: int, seed: int = 0) -> Tensor:
    """Token ids [1,L] on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (1, length), generator=generator).to(DEVICE)


def prefill(model: MambaTrace, other: Any, length: int) -> dict[str, Contender]:
    """A forward over a prompt, and traces of it."""
    tokens = random_tokens(length)
    runs: dict[str, Contender] = {"untraced": lambda: model._module(tokens, use_cache=False)}
    if other is not None:
        runs["mamba_ssm"] = lambda: other(tokens)
    return {**runs, **traces(model, tokens)}


def decode(model: MambaTrace, other: Any) -> dict[str, Contender]:
    """``NEW_TOKENS`` greedy tokens after a prompt."""
    tokens = random_tokens(PROMPT)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}

    def traced() -> None:
        with model.generate(tokens, **options):
            pass

    runs: dict[str, Contender] = {
        "untraced": lambda: model._module.generate(tokens, **options),
        "generate, empty": traced,
    }
    if other is not None:
        length = PROMPT + NEW_TOKENS
        runs["mamba_ssm"] = lambda: other.generate(tokens, max_length=length)
        runs["mamba_ssm, CUDA graph"] = lambda: other.generate(tokens, max_length=length, cg=True)
    return runs


def heatmap(model: MambaTrace, length: int) -> dict[str, Contender]:
    """The state of every layer at every position patched, beside one forward."""
    prompt, source = random_tokens(length), random_tokens(length, seed=1)

    def grid() -> None:
        patch_grid(model, prompt, source, "h", lambda logits: logits[:, 1] - logits[:, 2], progress=False)

    return {"untraced": lambda: model._module(prompt, use_cache=False), "heatmap of h": grid}


def timed(title: str, runs: dict[str, Contender], repeats: int) -> Rows:
    """Measure, print and return the rows of ``runs``: ``untraced`` beside mamba_ssm, others beside it."""
    times = measure({name: synchronised(run) for name, run in runs.items()}, repeats)
    beside = dict.fromkeys(runs, "untraced")
    if "mamba_ssm" in runs:
        beside["untraced"] = beside["mamba_ssm"] = "mamba_ssm"
    rows = summary(times, beside)
    print(table(title, rows, digits=2), flush=True)
    return rows


def versions() -> dict[str, str]:
    """What is installed of what matters, and the GPU."""
    found = {"python": platform.python_version(), "gpu": torch.cuda.get_device_name(DEVICE)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    for name, module in (("cuda", cuda), ("triton", triton)):
        found[f"kernels={name}"] = module.unavailable(DEVICE) or "available"
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens of the prompt")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernels", default="auto", help="which scan runs: auto or a backend")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py measures on a CUDA device, and PyTorch finds none")
    if min(arguments.lengths) <= POSITION or arguments.repeats < 2:
        parser.error(f"a length is at least {POSITION + 1}, and there are at least 2 repeats")
    torch.manual_seed(0)
    results: dict[str, Any] = {"versions": versions(), "kernels": arguments.kernels, "layer": LAYER}
    print("\n".join(f"{name}: {value}" for name, value in results["versions"].items()))
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            results[f"{shape}, {dtype}"] = measured(shape, dtype, arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def measured(shape: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured of one shape in one dtype."""
    model = ours(SHAPES[shape], DTYPES[dtype], arguments.kernels)
    other = theirs(SHAPES[shape], DTYPES[dtype])
    title, found = f"{shape}, {dtype}", {}
    for length in arguments.lengths:
        runs = prefill(model, other, length)
        found[f"prefill {length}"] = timed(f"{title}: prefill of {length}", runs, arguments.repeats)
    few = max(2, arguments.repeats // 5)
    found["decode"] = timed(f"{title}: {NEW_TOKENS} tokens after {PROMPT}", decode(model, other), few)
    for name, row in found["decode"].items():
        row["tokens_per_second"] = round(1000 * NEW_TOKENS / row["ms"], 1)
        print(f"  {name:24}{row['tokens_per_second']:9.1f} tokens/s")
    if shape in HEATMAPS:
        cells = f"{SHAPES[shape]['num_hidden_layers']} x {POSITIONS}"
        found["heatmap"] = timed(f"{title}: heatmap of {cells}", heatmap(model, POSITIONS), few)
    return found


if __name__ == "__main__":
    main()
