"""A configuration may describe a model that no class of Hugging Face's computes, or hold values of no meaning.

Contract: `reject` refuses such a model, `check_types` such a value, and `heads_of` heads that do not fill a
Mamba-2. Each `CheckpointError` has the names of the configuration's own format.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..errors import CheckpointError
from ..modeling.architectures import ARCHITECTURES, Architecture
from ..names import nearest
from .config_fields import LAYERS, NOT_OF_MAMBA_LENS, ONLY_SSM_OPTIONS, Config, fields_of, layer_in, ssm_options

DT_INIT = ("random", "constant")
NEEDED: dict[Any, str] = {
    int: "a whole number of at least 1",
    bool: "true or false",
    float: "a number",
    tuple: "two numbers, the lower one first",
    float | None: "a positive number, or null",
    str: " or ".join(map(repr, DT_INIT)),
}


def check_types(format: str, architecture: Architecture, values: Config) -> None:
    """Bring numbers to one type, and raise for a value of the wrong type, under the format's name of its field."""
    for field in fields_of(architecture):
        if field.name not in values:
            continue
        value, path = values[field.name], ".".join(field.path(format) or (field.name,))
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and math.isfinite(value))
        fits = {
            int: whole and value >= 1,
            bool: isinstance(value, bool),
            float: number,
            tuple: _is_pair(value),
            float | None: value is None or (number and value > 0),
            str: value in DT_INIT if isinstance(value, str) else False,
        }
        if not fits[field.kind]:
            raise CheckpointError(f"{path} must be {NEEDED[field.kind]}, found {value!r:.60}")
        if field.kind is float and field.name.endswith(("epsilon", "eps")) and value < 0:
            raise CheckpointError(f"{path} must not be negative, found {value!r:.60}")
        if field.kind is tuple:
            values[field.name] = tuple(map(float, value))
        elif field.kind in (float, float | None) and value is not None:
            values[field.name] = float(value)


def _is_pair(value: Any) -> bool:
    """Whether it is two numbers in order, the second of which may be infinite."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in value):
        return False
    return math.isfinite(value[0]) and value[0] <= value[1]


def heads_of(format: str, values: Config) -> int:
    """The number of heads of a Mamba-2; a `CheckpointError` if they do not fill its width or its groups."""
    inner, width, groups = values["expand"] * values["hidden_size"], values["head_dim"], values["n_groups"]
    heads = values.get("num_heads", inner // width)
    head_dim, n_groups = ("head_dim", "n_groups") if format == "huggingface" else ("ssm_cfg.headdim", "ssm_cfg.ngroups")
    if heads * width != inner:
        raise CheckpointError(
            f"{head_dim} is {width}, and a Mamba-2 of width {inner} (expand times d_model) has no whole number "
            f"of such heads{f': num_heads is {heads}' if format == 'huggingface' else ''}"
        )
    if heads % groups:
        raise CheckpointError(f"{n_groups} is {groups}, and the {heads} heads cannot be divided into such groups")
    return heads


def reject(format: str, raw: Config, architecture: Architecture) -> None:
    """Raise for a model that Hugging Face's classes cannot express."""
    sections = {"original": ("ssm_cfg", "attn_cfg", "initializer_cfg"), "mamba_lens": ("initializer_cfg",)}
    for section in sections.get(format, ()):
        if not isinstance(raw.get(section) or {}, Mapping):
            raise CheckpointError(f"{section} must be an object of settings, found {raw[section]!r:.60}")
    if format == "huggingface":
        return _reject_huggingface(raw, architecture)
    problem = _beyond(raw, architecture) if format == "original" else None
    if format == "mamba_lens":
        inner, expand, width = raw.get("d_inner", -1), raw.get("expand", 2), raw.get("d_model")
        whole = isinstance(expand, int) and isinstance(width, int)  # if not, `check_types` says so
        if whole and inner not in (-1, expand * width):
            problem = f"d_inner is {inner}, but expand * d_model is {expand * width}"
        for name in NOT_OF_MAMBA_LENS.keys() & raw.keys():
            raise CheckpointError(
                f"a configuration with {name} is that of a {NOT_OF_MAMBA_LENS[name]}, and MambaLens's format has "
                "Mamba-1 only. Give the configuration in Hugging Face's format, model.config"
            )
    if problem:
        raise CheckpointError(f"{problem}; {_only(architecture)}")


def _only(architecture: Architecture) -> str:
    """What is supported in place of a model that a configuration describes."""
    model = architecture.model_class.__name__
    return f"only {architecture.name} with RMSNorm, as Hugging Face's {model} has it, is supported"


def reject_another_class(raw: Config, architecture: Architecture) -> None:
    """Raise for a Hugging Face configuration that names another architecture's class."""
    for other in ARCHITECTURES:
        if other is not architecture and other.model_class.__name__ in (raw.get("architectures") or ()):
            raise CheckpointError(
                f"the configuration says model_type {architecture.model_type!r}, and architectures "
                f"{other.model_class.__name__}, which is a {other.name}. The weights of one, loaded as the other, "
                f"compute something else: correct the one of the two that is wrong"
            )


def reject_remote_code(raw: Config, architecture: Architecture) -> None:
    """Raise for a Hugging Face configuration whose model is a class of the checkpoint's own."""
    named = raw.get("auto_map")
    model = named.get("AutoModelForCausalLM") if isinstance(named, Mapping) else None
    ours = architecture.model_class.__name__
    if model is not None and str(model).rpartition(".")[2] != ours:
        raise CheckpointError(
            f"the auto_map of the configuration says that its model is {model!r:.80}, code of the checkpoint's own, "
            f"which this package does not run. If transformers' {ours} loads these weights without "
            f"trust_remote_code, take auto_map out of the configuration"
        )


def _reject_huggingface(raw: Config, architecture: Architecture) -> None:
    """Raise for an activation or a dtype that does not exist, and for another architecture's class."""
    reject_another_class(raw, architecture)
    act, dtype = raw.get("hidden_act", "silu"), raw.get("dtype")
    if not isinstance(act, str) or act not in ACT2FN:
        raise CheckpointError(
            f"hidden_act {act!r:.60} is no activation of transformers{nearest(str(act), sorted(ACT2FN))}. A "
            "Mamba has 'silu'"
        )
    known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise CheckpointError(f"dtype {dtype!r:.60} is no dtype of weights, as float32 and bfloat16 are")


def _beyond(raw: Config, architecture: Architecture) -> str | None:
    """What in a configuration of the original format makes another model of it; None if nothing does."""
    ssm, model_type = raw.get("ssm_cfg") or {}, architecture.model_type
    layer = layer_in(raw)
    if not isinstance(layer, str) or layer not in LAYERS:
        known = ", ".join(map(repr, LAYERS))  # of more than one architecture
        raise CheckpointError(f"ssm_cfg.layer is {layer!r}, and the layers that can be loaded are {known}")
    if raw.get("attn_layer_idx"):
        return f"attn_layer_idx is {raw['attn_layer_idx']!r}: some layers are attention"
    if raw.get("d_intermediate"):
        return f"d_intermediate is {raw['d_intermediate']!r}: the blocks have an MLP"
    if raw.get("rms_norm", True) is not True:
        return f"rms_norm is {raw['rms_norm']!r}: the norms are LayerNorm"
    for name, (right, meaning) in ONLY_SSM_OPTIONS[model_type].items():
        if ssm.get(name, right) != right:
            return f"ssm_cfg.{name} is {ssm[name]!r}: {meaning}"
    if model_type == "mamba2" and (problem := _beyond_mamba2(raw, ssm)):
        return problem
    unknown = sorted(map(str, ssm.keys() - ssm_options(architecture)))
    if not unknown:
        return None
    problem = f"ssm_cfg has options that {architecture.name} does not have: {', '.join(unknown)}"
    for other in ARCHITECTURES:
        if "original" in other.formats and set(unknown) <= ssm_options(other):
            raise CheckpointError(
                f"{problem}. A {other.name} has them: ssm_cfg.layer, {layer!r} here and 'Mamba1' where it is left out, "
                f"says which of the two it is"
            )
    return problem


def _beyond_mamba2(raw: Config, ssm: Config) -> str | None:
    """As `_beyond`, for what is compared with other values of the configuration."""
    width, expand, inner = raw.get("d_model"), ssm.get("expand", 2), ssm.get("d_ssm")
    whole = isinstance(expand, int) and isinstance(width, int)  # if not, `check_types` says so
    if inner is not None and whole and inner != expand * width:
        return f"ssm_cfg.d_ssm is {inner!r}, but expand * d_model is {expand * width}: a part of the mixer is an MLP"
    if raw.get("norm_epsilon", 1e-5) != 1e-5:
        return f"norm_epsilon is {raw['norm_epsilon']!r}, and the mixer's own norm keeps an epsilon of 1e-05"
    return None
