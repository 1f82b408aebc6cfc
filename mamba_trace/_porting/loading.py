"""Imports, loading and conversion of MambaLens and TransformerLens, as they are here."""

from __future__ import annotations

import ast

from .findings import Findings

LIBRARIES = ("mamba_lens", "transformer_lens")
CLASSES = ("HookedMamba", "HookedTransformer", "TransformerBridge")
LOADERS = ("from_pretrained", "from_pretrained_no_processing", "boot_transformers")
CONFIGS = {"MambaCfg", "MambaInitCfg"}
#: Converters of MambaLens: the function here, the format it gives, the argument it converts.
CONVERTERS = {
    "convert_original_config_to_hooked_mamba_config": ("convert_config", "mamba_lens", "cfg"),
    "convert_original_state_dict_to_hooked_state_dict": ("convert_state_dict", "mamba_lens", "state_dict"),
    "convert_hooked_mamba_config_to_original_config": ("convert_config", "original", "hooked_mamba_cfg"),
    "convert_hooked_state_dict_to_original_state_dict": ("convert_state_dict", "original", "state_dict"),
}
FOLDING = "weights are kept as they were trained; nothing is folded into them"
NOT_NEEDED = {
    "fold_ln": FOLDING,
    "fold_value_biases": FOLDING,
    "center_writing_weights": FOLDING,
    "center_unembed": FOLDING,
    "refactor_factored_attn_matrices": FOLDING,
    "initialize_params": "from_config initialises, with `seed=` for another draw",
    "default_padding_side": "padding never changes a result",
    "default_prepend_bos": "a prompt has the tokens that its tokenizer gives it",
}


def is_library(module: str | None) -> bool:
    """Whether an import is of one of the libraries."""
    return (module or "").partition(".")[0] in LIBRARIES


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def is_constructor(node: ast.AST | None) -> bool:
    """Whether a call makes a model from a configuration."""
    return isinstance(node, ast.Call) and called(node) in CLASSES


def is_loader(node: ast.AST | None) -> bool:
    """Whether a call loads a trained model."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = node.func.value
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    return node.func.attr in LOADERS and name in CLASSES


def loaded(node: ast.Call, needed: set[str], findings: Findings, weights: ast.expr | None = None) -> ast.expr:
    """The call of MambaTrace that loads, or makes, the same model.

    Args:
        node: the call of a loader or a constructor.
        needed: names to import, added to.
        findings: added to.
        weights: the state dict that is loaded into it afterwards.
    """
    needed.add("MambaTrace")
    arguments = list(node.args)
    keywords: list[ast.keyword] = []
    for keyword in node.keywords:
        if keyword.arg in NOT_NEEDED:
            text = f"{keyword.arg}={ast.unparse(keyword.value)}"
            findings.dropped(keyword.value, text, NOT_NEEDED[keyword.arg])
        elif keyword.arg in ("model_name", "pretrained_model_name", "cfg"):
            arguments.insert(0, keyword.value)
        else:
            keywords.append(keyword)
    if not is_loader(node):
        name = "from_config" if weights is None else "from_state_dict"
        function: ast.expr = ast.Attribute(ast.Name("MambaTrace"), name)
        arguments += [] if weights is None else [weights]
        keywords = [one for one in keywords if one.arg != "device" or not_the_cpu(one, findings)]
    else:
        function = ast.Name("MambaTrace")
        which = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else ""
        if isinstance(which, str) and which and "mamba" not in which.lower():
            findings.problem(node, f"{which} is no Mamba by its name, and MambaTrace loads nothing else")
    new = ast.Call(function, arguments, keywords)
    findings.call(node, ast.unparse(new))
    return new


def not_the_cpu(device: ast.keyword, findings: Findings) -> bool:
    """False: a model made here is on the CPU; its device is named in a note."""
    text = ast.unparse(device.value)
    if text not in ("'cpu'", "None"):
        findings.dropped(
            device.value, f"device={text}", f"made on the CPU: move it with model._module.to({text})"
        )
    return False


def converted(node: ast.Call, needed: set[str], findings: Findings) -> ast.expr:
    """The call of `mamba_trace.conversion` for one of MambaLens's converters."""
    function, format, argument = CONVERTERS[called(node)]
    needed.add(function)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    # MambaLens's functions for state dicts take the configuration first where they take both.
    position = 1 if argument == "state_dict" and len(node.args) > 1 else 0
    value = given.get(argument) or (node.args[position] if len(node.args) > position else ast.Constant(None))
    if isinstance(value, ast.Attribute) and value.attr == "cfg":
        value = ast.Attribute(value.value, "config")  # Hugging Face's, which cfg is a view of
    new = ast.Call(ast.Name(function), [value, ast.Constant(format)], [])
    findings.call(node, ast.unparse(new))
    return new


def imports(needed: set[str]) -> list[str]:
    """The import lines for names that the traces use."""
    lines = []
    if "SimpleNamespace" in needed:
        lines.append("from types import SimpleNamespace")
    if "MambaTrace" in needed:
        lines.append("from mamba_trace import MambaTrace")
    conversion = sorted(needed & {"convert_config", "convert_state_dict"})
    if conversion:
        lines.append(f"from mamba_trace.conversion import {', '.join(conversion)}")
    return lines
