"""What a forward of each hybrid costs beside Hugging Face's own, and an edit of one state beside that.

Every contender runs in turn within each repeat, and what counts is the ratio of their medians (`timing` says why).
Both models have the same random weights in float32 and the same ways of attention and of experts. One shape is
tiny, where nothing but overhead is left, and one is about as large as mamba-130m: width 768 and, so that all seven
take little time, eight layers.

    python tests/benchmarks/hybrids.py --json tests/benchmarks/hybrids.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timing import measure, summary, table
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
from hybrid_models import PLAIN, make_hybrid

from mamba_trace import MambaTrace

PACKAGES = ("mamba_trace", "torch", "nnsight", "transformers", "numba")
BESIDE = {
    "hugging face": "hugging face",
    "untraced": "hugging face",
    "trace, empty": "untraced",
    "trace, edit h[5]": "untraced",
    "hugging face, decode step": "hugging face, decode step",
    "decode step": "hugging face, decode step",
}
SSM, ATTENTION = "linear_attention", "full_attention"
#: What the larger shape changes in the tiny configurations of the tests.
WIDE: dict[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "num_hidden_layers": 8,
}
DUAL: dict[str, Any] = {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_d_conv": 4}
LARGE: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": [SSM, "mlp", SSM, ATTENTION, SSM, "mlp", SSM, "mlp"],
        "mamba_num_heads": 24,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "head_dim": 64,
        "chunk_size": 256,
    },
    "falcon_h1": {**DUAL, "mamba_d_ssm": 1536, "head_dim": 64, "mamba_chunk_size": 256},
    "granitemoehybrid": {
        **DUAL,
        "layer_types": [SSM] * 7 + [ATTENTION],
        "mamba_chunk_size": 256,
        "num_local_experts": 0,
        "shared_intermediate_size": 2048,
    },
    "jamba": {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_dt_rank": 48, "num_experts": 1, "attn_layer_period": 8},
    "bamba": {**DUAL, "attn_layer_indices": [7], "head_dim": 64, "mamba_chunk_size": 256},
    "zamba2": {
        "layers_block_type": [SSM, SSM, SSM, "hybrid"] * 2,
        "n_mamba_heads": 24,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "chunk_size": 256,
        "adapter_rank": 16,
    },
    "zamba": {
        "layers_block_type": [SSM, SSM, SSM, "hybrid"] * 2,
        "n_mamba_heads": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 48,
    },
}


def models(model_type: str, shape: str) -> tuple[Any, MambaTrace]:
    """Hugging Face's module, and ours over another with the same weights."""
    changes = {} if shape == "tiny" else {**WIDE, **LARGE[model_type]}
    if model_type == "nemotron_h":  # its list of layers is as long as it has layers
        changes.pop("num_hidden_layers", None)
    module = make_hybrid(model_type, **changes)
    return module, MambaTrace(copy.deepcopy(module))


def rows_of(model_type: str, shape: str, length: int, repeats: int) -> dict[str, dict[str, Any]]:
    """The times of one hybrid."""
    plain, model = models(model_type, shape)
    size = plain.config.vocab_size
    tokens = torch.randint(1, size, (1, length), generator=torch.Generator().manual_seed(0))
    layer = model.ssm_layers[len(model.ssm_layers) // 2]
    expected = plain(tokens).logits  # a Zamba's are in the hundreds
    torch.testing.assert_close(model._module(tokens).logits, expected, rtol=1e-3, atol=3e-4 * float(expected.std()))

    def empty() -> None:
        with model.trace(tokens):
            pass

    def edit() -> None:
        with model.trace(tokens):
            model.layers[layer].ssm.h[5].output[:] = 0

    runs = {
        "hugging face": lambda: plain(tokens),
        "untraced": lambda: model._module(tokens),
        "trace, empty": empty,
        "trace, edit h[5]": edit,
        "hugging face, decode step": decode(plain, tokens),
        "decode step": decode(model._module, tokens),
    }
    return summary(measure(runs, repeats), BESIDE)


def decode(module: Any, tokens: Tensor) -> Any:
    """A step on a cache that stays as it is after the prompt: it is copied."""
    cache = module(tokens, use_cache=True).cache
    return lambda: module(tokens[:, -1:], cache=copy.deepcopy(cache), use_cache=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--architectures", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    parser.add_argument("--length", type=int, default=128, help="tokens of the prompt of the larger shape")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the scan")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = {package: version(package) for package in PACKAGES}
    print(f"python {platform.python_version()}, {versions}, {args.threads} threads")
    result: dict[str, Any] = {"versions": versions, "threads": args.threads, "shapes": {}}
    with torch.no_grad():
        for shape, length, repeats in (("tiny", 16, 3 * args.repeats), ("large", args.length, args.repeats)):
            for model_type in args.architectures:
                rows = rows_of(model_type, shape, length, repeats)
                result["shapes"].setdefault(shape, {})[model_type] = rows
                print(table(f"{model_type}, {shape}, L = {length}", rows, digits=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
