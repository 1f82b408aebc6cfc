"""What MambaLens itself computes on a tiny seeded model, recorded once as an independent reference.

MambaLens cannot be installed beside nnsight 0.8 and transformers 5, so the tests read its numbers from
`tests/data/mamba_lens.safetensors`, which this script writes. It runs in a virtual environment of its own:

    pip install "torch==2.13.0" "mamba-lens==0.0.4" "transformer-lens<3" "pyarrow<20" "datasets<4"
    python tests/record_mamba_lens.py

The model is a HookedMamba in float32 on the CPU. B=2, L=9, D=24, E=48, N=8, R=3 and V=56 (50, padded) all
differ, so that no axis passes for another. The file (the same bytes on every run) holds

    weights.<name>                    the state dict as MambaLens names it
    original.<name>                   the same as MambaLens converts it to the original format
    tokens [B,L] int64, logits [B,L,V]
    value.<hook name>                 the value of every hook in the clean run
    intervention.<k>.logits [B,L,V]   the logits with the edits of intervention k
    intervention.<k>.<i>.tensor       the tensor of its edit i, for the operations that take one
    grad.<hook name>                  d(logits[:, -1, token].sum()) / d(the value that the hook carries on)

and, under the metadata key "spec", a JSON object: versions, config, original_config, hook_names (in firing
order), interventions (each {"edits": [{"hook", "op", ...}]}), gradient ({"token", "hooks"}) and ignored (the
hooks of which an edit does not reach the logits, found by editing each). Operations, t the edit's tensor:

    scale              value * factor
    add, replace       value + t, or t              t has the value's shape
    zero               zeros of the value's shape
    add_at_position    value[:, position] += t      in place; t has the shape of value[:, position]
    replace_first_row  value[0] = t                 in place; t has the shape of value[0]

A `replace` tensor is the hook's value on other tokens, each element times a random factor in [0.5, 1.5): an
activation patch that keeps signs and range.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # its custom_fwd is torch's old spelling
    import mamba_lens  # type: ignore[import-not-found, unused-ignore]

Values = dict[str, Tensor]
Hook = Callable[..., Any]
Operation = tuple[str, str] | tuple[str, str, float]  # hook name, operation, factor or position

FILE = Path(__file__).parent / "data" / "mamba_lens.safetensors"
SEED = 20240501
N_LAYERS, B, L, VOCAB = 3, 2, 9, 50
GRADIENT_TOKEN = 17
DIFFERENTIATED = ("hook_h.", "hook_ssm_input", "hook_resid_pre")
VISIBLE = 1e-3  # an edit moves some logit by more than this share of the largest one

OF_MODEL: list[Operation] = [
    ("hook_embed", "replace"),
    ("hook_embed", "add_at_position", 2),
    ("hook_norm", "scale", 0.75),
    ("hook_norm", "add_at_position", 3),
    ("hook_logits", "add"),
    ("hook_logits", "replace_first_row"),
]
OF_BLOCK: dict[str, list[tuple[Any, ...]]] = {  # kind of hook: (layer, operation, factor or position)
    "resid_pre": [(1, "scale", 0.5), (2, "replace_first_row")],
    "layer_input": [(0, "add_at_position", 4), (1, "replace_first_row"), (2, "add")],
    "normalized_input": [(0, "add"), (1, "add_at_position", 0)],
    "skip": [(0, "scale", -1.5), (2, "replace_first_row")],
    "in_proj": [(0, "replace"), (1, "add_at_position", 5)],
    "conv": [(1, "zero"), (2, "add_at_position", 6)],
    "ssm_input": [(0, "scale", 1.75), (1, "add_at_position", 3)],
    "A": [(1, "scale", 0.25), (2, "replace")],
    "delta_1": [(0, "add"), (2, "scale", 2.0)],
    "delta_2": [(0, "replace"), (1, "add_at_position", 1)],
    "delta": [(0, "scale", 2.5), (2, "replace_first_row")],
    "B": [(0, "replace"), (1, "add_at_position", 7)],
    "C": [(1, "scale", -1.0), (2, "replace_first_row")],
    "A_bar": [(0, "scale", 0.5), (2, "replace")],
    "B_bar": [(0, "add_at_position", 4), (1, "zero")],
    "h_start": [(0, "add"), (2, "replace_first_row")],
    "h.0": [(0, "add"), (1, "replace")],
    "h.4": [(0, "zero"), (1, "replace_first_row"), (2, "scale", -2.0)],
    "h.8": [(1, "replace"), (2, "add")],
    "y": [(0, "replace"), (2, "add_at_position", 8)],
    "ssm_output": [(1, "zero"), (2, "replace_first_row")],
    "after_skip": [(0, "scale", 0.5), (1, "add_at_position", 2)],
    "out_proj": [(1, "zero"), (2, "replace")],
    "resid_post": [(0, "add_at_position", 1), (2, "replace")],
}
TOGETHER: list[list[Operation]] = [
    [("blocks.1.hook_h.2", "replace"), ("blocks.1.hook_h.6", "scale", 2.0)],
    [("blocks.0.hook_h.2", "replace_first_row"), ("blocks.0.hook_h.6", "zero")],
    [("blocks.2.hook_h.3", "add"), ("blocks.2.hook_h.4", "scale", 0.5), ("blocks.2.hook_h.5", "add")],
    [("blocks.1.hook_A_bar", "scale", 0.5), ("blocks.1.hook_h.3", "add")],
    [("blocks.0.hook_delta", "replace"), ("blocks.0.hook_C", "add_at_position", 5)],
    [("blocks.2.hook_A", "scale", 2.0), ("blocks.2.hook_B_bar", "replace_first_row")],
    [("blocks.1.hook_h_start", "add"), ("blocks.1.hook_h.0", "scale", 0.5), ("blocks.1.hook_y", "add")],
    [("blocks.1.hook_layer_input", "add_at_position", 2), ("blocks.1.hook_out_proj", "scale", 1.5)],
    [("blocks.2.hook_resid_pre", "add_at_position", 4), ("blocks.2.hook_layer_input", "add_at_position", 4)],
    [("blocks.0.hook_skip", "replace"), ("blocks.0.hook_ssm_input", "replace_first_row")],
    [("blocks.0.hook_h.4", "add"), ("blocks.2.hook_h.5", "replace")],
    [("blocks.0.hook_delta_1", "replace"), ("blocks.1.hook_B", "zero"), ("blocks.2.hook_ssm_output", "add")],
    [("hook_embed", "replace_first_row"), ("blocks.1.hook_A_bar", "replace"), ("hook_logits", "scale", 2.0)],
]


def alone() -> list[Operation]:
    """The interventions of one edit: every kind of hook, in several layers."""
    return OF_MODEL + [(f"blocks.{n}.hook_{kind}", *op) for kind, ops in OF_BLOCK.items() for n, *op in ops]


def tiny_model(generator: torch.Generator) -> Any:
    """A HookedMamba whose every weight matters: no norm weight or D of one, state and conv far from zero."""
    init = mamba_lens.MambaInitCfg(0.02, True, 1, "random", 1.0, 0.02, 0.5, 1e-4)
    sizes = {"d_model": 24, "n_layers": N_LAYERS, "vocab_size": VOCAB, "d_state": 8, "dt_rank": 3}
    cfg = mamba_lens.MambaCfg(**sizes, d_conv=4, expand=2, device="cpu", initializer_cfg=init)
    model = mamba_lens.HookedMamba(cfg, tokenizer=None)
    for name, parameter in model.named_parameters():
        parameter.data = tiny_weight(name, parameter.data, init, generator)
    model.lm_head.weight.data = model.embedding.weight.data.clone()  # the original format ties them
    return model


def tiny_weight(name: str, old: Tensor, init: Any, generator: torch.Generator) -> Tensor:
    """A random weight of old's shape; `name` (as in MambaLens's state dict) decides its scale."""
    noise = torch.randn(old.shape, generator=generator)
    uniform = torch.rand(old.shape, generator=generator)
    if name.endswith("A_log"):
        return old + 0.2 * noise  # about log(1..N)
    if name.endswith("W_delta_2.bias"):  # the inverse of softplus, of a log-uniform step size
        dt = torch.exp(math.log(init.dt_min) + uniform * math.log(init.dt_max / init.dt_min))
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith("norm.weight"):
        return 0.5 + uniform
    if name.endswith(("W_D", "embedding.weight")):
        return noise
    if name.endswith("conv1d.bias"):
        return 0.2 * noise
    fan_in = math.prod(old.shape[1:])
    return 1.1 * noise / math.sqrt(fan_in)


def run_and_save(model: Any, tokens: Tensor) -> tuple[Tensor, Values]:
    """The logits [B,L,V] and every hook's value, in the order in which the hooks fire."""
    values: Values = {}

    def save(value: Tensor, hook: Any) -> None:
        values[hook.name] = value.detach().clone()

    logits = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, save)])
    return logits, values


def edit_tensor(operation: Operation, clean: Values, other: Values, generator: torch.Generator) -> Tensor | None:
    """The tensor that the operation takes, or None; for a value of zeros (h_start) it is plain noise."""
    name, op, *rest = operation
    value = clean[name]
    size = float(value.square().mean().sqrt()) or 1.0
    noise = size * torch.randn(value.shape, generator=generator)
    factor = 0.5 + torch.rand(value.shape, generator=generator)
    replacement = other[name] * factor if other[name].any() else noise
    if op == "add":
        return 0.5 * noise
    if op == "add_at_position":
        return noise[:, int(rest[0])].contiguous()
    if op == "replace":
        return replacement
    if op == "replace_first_row":
        return replacement[0].contiguous()
    return None


def as_hook(operation: Operation, tensor: Tensor | None) -> tuple[str, Hook]:
    """The operation as TransformerLens takes it: a hook's name and fn(value, hook)."""
    name, op, *rest = operation

    def edit(value: Tensor, hook: Any) -> Tensor:
        if op == "scale":
            return value * rest[0]
        if op == "zero":
            return torch.zeros_like(value)
        assert tensor is not None
        if op == "add":
            return value + tensor
        if op == "replace":
            return tensor.clone()
        if op == "add_at_position":
            value[:, int(rest[0])] += tensor
        elif op == "replace_first_row":
            value[0] = tensor
        else:
            raise ValueError(f"unknown operation {op!r}")
        return value

    return name, edit


def as_json(operation: Operation) -> dict[str, Any]:
    name, op, *rest = operation
    argument = {"scale": "factor", "add_at_position": "position"}.get(op)
    return {"hook": name, "op": op} | ({argument: rest[0]} if argument else {})


def change(edited: Tensor, clean: Tensor) -> float:
    """The largest change of a logit, as a share of the largest clean one."""
    return float((edited - clean).abs().max() / clean.abs().max())


def record_interventions(
    model: Any, tokens: Tensor, clean: Values, other: Values, generator: torch.Generator
) -> tuple[Values, list[dict[str, Any]]]:
    """Every intervention's tensors, and its description for the spec; raises where one is not visible."""
    tensors: Values = {}
    described = []
    for k, operations in enumerate([[operation] for operation in alone()] + TOGETHER):
        hooks = []
        for i, operation in enumerate(operations):
            tensor = edit_tensor(operation, clean, other, generator)
            hooks.append(as_hook(operation, tensor))
            if tensor is not None:
                tensors[f"intervention.{k}.{i}.tensor"] = tensor
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        if not change(logits, clean["hook_logits"]) > VISIBLE:
            raise AssertionError(f"intervention {k} {operations} does not visibly change the logits")
        tensors[f"intervention.{k}.logits"] = logits.clone()
        described.append({"edits": [as_json(operation) for operation in operations]})
    return tensors, described


def ignored_hooks(model: Any, tokens: Tensor, clean: Values, generator: torch.Generator) -> list[str]:
    """The hooks whose value can be edited without any effect on the logits."""
    ignored = []
    for name in clean:
        operation = (name, "add")
        hook = as_hook(operation, edit_tensor(operation, clean, clean, generator))
        if not change(model.run_with_hooks(tokens, fwd_hooks=[hook]), clean["hook_logits"]) > VISIBLE:
            ignored.append(name)
    return ignored


def record_gradients(model: Any, tokens: Tensor, names: list[str]) -> Values:
    """d(logits[:, -1, GRADIENT_TOKEN].sum()) with respect to the value that each named hook carries on."""
    carried: Values = {}

    def keep(value: Tensor, hook: Any) -> None:
        carried[hook.name] = value

    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
        scalar = logits[:, -1, GRADIENT_TOKEN].sum()
        return dict(zip(names, torch.autograd.grad(scalar, [carried[name] for name in names]), strict=True))


def main() -> None:
    """Write FILE and say what is in it."""
    torch.set_num_threads(1)  # one order of summation
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(SEED)
    model = tiny_model(generator)
    tokens, other_tokens = torch.randint(VOCAB, (2, B, L), generator=generator)
    logits, clean = run_and_save(model, tokens)
    _, other = run_and_save(model, other_tokens)
    edited, interventions = record_interventions(model, tokens, clean, other, generator)
    ignored = ignored_hooks(model, tokens, clean, generator)
    names = [name for name in clean if any(kind in name for kind in DIFFERENTIATED)]
    original = mamba_lens.convert_hooked_state_dict_to_original_state_dict(model.cfg, model.state_dict())

    spec = {
        "versions": {"mamba-lens": version("mamba-lens"), "torch": torch.__version__.split("+")[0]},
        "config": vars(model.cfg) | {"initializer_cfg": vars(model.cfg.initializer_cfg)},
        "original_config": mamba_lens.convert_hooked_mamba_config_to_original_config(model.cfg),
        "hook_names": list(clean),
        "interventions": interventions,
        "gradient": {"token": GRADIENT_TOKEN, "hooks": names},
        "ignored": ignored,
    }
    tensors = {f"weights.{name}": weight for name, weight in model.state_dict().items()}
    tensors |= {f"original.{name}": weight for name, weight in original.items()}
    tensors |= {"tokens": tokens, "logits": logits} | edited
    tensors |= {f"value.{name}": value for name, value in clean.items()}
    tensors |= {f"grad.{name}": gradient for name, gradient in record_gradients(model, tokens, names).items()}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, FILE, metadata={"spec": json.dumps(spec, sort_keys=True)})
    counts = f"{len(clean)} hooks, {len(interventions)} interventions, {len(names)} gradients"
    print(f"{FILE.name}: {FILE.stat().st_size} bytes, {counts}, ignored edits: {ignored or 'none'}")


if __name__ == "__main__":
    main()
