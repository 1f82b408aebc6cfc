"""What TransformerLens 4 does with the models that ship here: run in an environment of its own, and recorded.

    python -m venv lens && lens/bin/pip install torch transformers transformer-lens
    lens/bin/python tests/benchmarks/peer_transformer_lens.py --json tests/benchmarks/transformer_lens.json

Nothing of this package is imported. A row says what happened, in numbers or in the name of the error:

* ``logits``: the largest difference from Hugging Face's, on the prompt about the apple;
* ``generate``: whether eight greedy tokens are those of Hugging Face's forward without a cache;
* ``positions changed``: where a mixer's output changes when ``hook_ssm_state`` is set to zero at position 3;
* ``effective attention`` and ``state``: what its two analyses of a state space layer give.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = Path(__file__).parents[2] / "mamba_trace"
MODELS = {"mamba": "demo_model", "mamba2": "demo_model_mamba2", "nemotron_h": "demo_model_hybrid"}
PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
NEW_TOKENS = 8
POSITION = 3


def said(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of its error and the first line of the message."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def row(folder: Path) -> dict[str, Any]:
    """What happens with one model."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    wanted = plain(tokens).logits
    found: dict[str, Any] = {"logits": said(lambda: (bridge(tokens) - wanted).abs().max().item())}
    greedy = tokens
    for _ in range(NEW_TOKENS):
        greedy = torch.cat([greedy, plain(greedy, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found["generate"] = said(lambda: torch.equal(generated(bridge, tokens), greedy))
    _, cache = bridge.run_with_cache(tokens)
    layer = next((i for i, block in enumerate(bridge.blocks) if ssm_of(block) is not None), 0)
    found["effective attention"] = said(lambda: list(cache.compute_ssm_effective_attention(layer).shape))
    found["state"] = said(lambda: list(cache.compute_ssm_state(layer, POSITION).shape))
    found["positions changed"] = said(lambda: changed(bridge, tokens, layer))
    return found


def ssm_of(block: Any) -> Any:
    """The mixer of a block that has a state space layer, or None."""
    mixer = getattr(block, "mixer", None)
    return mixer if mixer is not None and hasattr(mixer, "hook_ssm_state") else None


def generated(bridge: Any, tokens: Tensor) -> Tensor:
    """Greedy tokens after the prompt, by its own `generate` with its own defaults."""
    return bridge.generate(
        tokens,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        stop_at_eos=False,
        return_type="tokens",
        verbose=False,
    )


def changed(bridge: Any, tokens: Tensor, layer: int) -> list[int]:
    """The positions where the output of a mixer differs once its state is set to zero at one of them."""
    for block in bridge.blocks:
        if ssm_of(block) is not None:
            block.mixer.eager_scan = True
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        kept.append(value.detach().clone())
        return value

    def zero(state: Tensor, hook: Any) -> Tensor:
        axis = next(axis for axis in range(1, state.ndim) if state.shape[axis] == tokens.shape[1])
        state = state.clone()
        state.select(axis, POSITION).zero_()
        return state

    name = f"blocks.{layer}.mixer"
    bridge.run_with_hooks(tokens, fwd_hooks=[(f"{name}.hook_out", keep)])
    bridge.run_with_hooks(tokens, fwd_hooks=[(f"{name}.hook_ssm_state", zero), (f"{name}.hook_out", keep)])
    apart = (kept[1] - kept[0]).abs().amax((0, 2))
    return apart.gt(1e-6).nonzero().flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    packages = ("transformer-lens", "transformers", "torch")
    result: dict[str, Any] = {"versions": {package: version(package) for package in packages}, "models": {}}
    with torch.no_grad():
        for name, folder in MODELS.items():
            result["models"][name] = said(lambda folder=folder: row(PACKAGE / folder))
            print(name, result["models"][name], flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
