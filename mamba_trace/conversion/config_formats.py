"""The same Mamba is described by three kinds of configuration, which share no field name.

    original      a dict, the config.json of state-spaces/mamba: d_model, n_layer, vocab_size before
                  padding, ssm_cfg {d_state, d_conv, expand, dt_rank, dt_min, ...}
    huggingface   transformers' MambaConfig: hidden_size, num_hidden_layers, vocab_size after padding
    mamba_lens    MambaLens's MambaCfg: d_model, n_layers, d_state, ..., initializer_cfg {dt_min, ...}

Where each format keeps each value is in config_fields.py.

Contract: `parse` turns any accepted configuration into a plain dict and says its format; `read` takes the
values out of such a dict and raises `CheckpointError` for a model that Hugging Face's Mamba cannot express;
`write` puts values into such a dict and changes nothing that is equal already.
"""

import dataclasses
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import MambaConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from ..errors import CheckpointError
from ..names import nearest
from .config_fields import FIELDS, FORMATS, HARMLESS_SSM_OPTIONS, MOST_LAYERS, REQUIRED, Config, KeyPath

EXPECTED = (
    "original: d_model, n_layer and vocab_size, no model_type; huggingface: model_type 'mamba'; "
    "mamba_lens: d_model, n_layers and vocab_size"
)
DT_INIT = ("random", "constant")
NEEDED = {int: "a whole number of at least 1", bool: "true or false", float: "a number"}
NEEDED[str] = " or ".join(map(repr, DT_INIT))


def parse(config: Any, source: str | None = None) -> tuple[str, Config]:
    """The format of a configuration (dict, MambaConfig, object with attributes), and a plain copy of it."""
    if isinstance(config, PreTrainedConfig):
        raw = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        raw = dataclasses.asdict(config)
    elif isinstance(config, Mapping):
        raw = deepcopy(dict(config))
    elif hasattr(config, "__dict__") and not isinstance(config, type):
        raw = deepcopy(vars(config))
    else:
        given = type(config).__name__
        raise CheckpointError(f"expected a configuration (dict, MambaConfig or MambaCfg), found {given}")
    format = check_format(source) if source is not None else detect(raw)
    if format == "huggingface":
        return format, _plain_huggingface(raw)
    return format, _plain_mamba_lens(raw) if format == "mamba_lens" else raw


def check_format(format: str) -> str:
    """`format` itself, if it is one of FORMATS; otherwise a `CheckpointError`."""
    if format not in FORMATS:
        raise CheckpointError(f"unknown format {format!r}; the formats are {', '.join(map(repr, FORMATS))}")
    return format


def detect(raw: Mapping[str, Any]) -> str:
    """The format of a configuration given as a mapping; a `CheckpointError` if it is none of FORMATS."""
    model_type = raw.get("model_type")
    if model_type == "mamba":
        return "huggingface"
    if model_type is not None:
        raise CheckpointError(
            f"this configuration says model_type {model_type!r}; only Mamba-1 is supported so far "
            f"(model_type 'mamba', or the original state-spaces format without a model_type)"
        )
    if {"d_model", "vocab_size"} <= raw.keys():
        if "n_layers" in raw or {"n_layer", "ssm_config"} <= raw.keys():
            return "mamba_lens"
        if "n_layer" in raw:
            return "original"
    keys = ", ".join(sorted(map(str, raw))[:12]) or "nothing"
    hint = " If it is a Hugging Face Mamba-1 configuration, add model_type='mamba'."
    raise CheckpointError(
        f"not a Mamba configuration. Found the keys {keys}. Expected {EXPECTED}.{hint if 'hidden_size' in raw else ''}"
    )


def huggingface(raw: Config) -> MambaConfig:
    """The MambaConfig that a plain dict describes; a `CheckpointError` if transformers rejects a value."""
    layers = declared_layers(raw)
    if layers > MOST_LAYERS:
        raise CheckpointError(f"the configuration declares {layers} layers; at most {MOST_LAYERS} are built")
    try:
        return MambaConfig.from_dict(raw)
    except Exception as error:  # an unknown dtype is an AttributeError, other faults a KeyError or TypeError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers' MambaConfig rejects this configuration: {reason}") from error


def declared_layers(raw: Mapping[str, Any]) -> int:
    """The number of layers that a configuration of any format declares; 0 if it declares none."""
    named = (raw.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers"))
    return max((layers for layers in named if isinstance(layers, int)), default=0)


def _plain_huggingface(raw: Config) -> Config:
    """The fields in FIELDS, and those that differ from a fresh MambaConfig's.

    Where and by which version of transformers the configuration was loaded is left out.
    """
    defaults, fields = MambaConfig().to_dict(), huggingface(raw).to_dict()
    dropped = ("transformers_version", "_name_or_path", "intermediate_size")
    kept = {k: v for k, v in fields.items() if k not in dropped and (k not in defaults or defaults[k] != v)}
    mapped = {field.name: fields[field.name] for field in FIELDS if field.name in fields}
    return kept | mapped | {"model_type": "mamba"}


def _plain_mamba_lens(raw: Config) -> Config:
    """A dict with MambaCfg's names and JSON values, also from the dict that MambaLens itself exports.

    The defaults in MambaLens 0.0.4's MambaInitCfg are tuples of one element, because of a trailing comma; the
    element is taken.
    """
    raw = raw | raw.pop("ssm_config", {})
    if "n_layer" in raw:
        raw["n_layers"] = raw.pop("n_layer")
    if "device" in raw:
        raw["device"] = str(raw["device"])
    if "initializer_cfg" not in raw:
        return raw
    initializer = raw["initializer_cfg"]
    initializer = dict(initializer if isinstance(initializer, Mapping) else vars(initializer))
    for name, value in initializer.items():
        if isinstance(value, (tuple, list)) and len(value) == 1:
            initializer[name] = value[0]
    return raw | {"initializer_cfg": initializer}


def read(format: str, raw: Config) -> Config:
    """The values that a configuration holds, keyed by Hugging Face names.

    A value that it leaves out gets its default. Two kinds of values stay out of the result: those that the
    format has no place for, and the original format's initializer_cfg, which state-spaces/mamba keeps
    elsewhere.
    """
    _reject(format, raw)
    values = {}
    for field in FIELDS:
        path = field.path(format)
        if path is None:
            continue
        value = _get(raw, path)
        if value is not REQUIRED:
            values[field.name] = value
        elif field.default is REQUIRED:
            raise CheckpointError(f"the {format} configuration has no {'.'.join(path)}")
        elif not (format == "original" and path[0] == "initializer_cfg"):
            values[field.name] = field.default
    if values["time_step_rank"] == "auto" and isinstance(values["hidden_size"], int):
        values["time_step_rank"] = math.ceil(values["hidden_size"] / 16)
    _check_types(format, values)
    floats = [field.name for field in FIELDS if field.kind is float and field.name in values]
    values |= {name: float(values[name]) for name in floats}
    if format != "huggingface":
        multiple = raw.get("pad_vocab_size_multiple", 8)
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise CheckpointError(f"pad_vocab_size_multiple must be at least 1, found {multiple!r}")
        values["vocab_size"] = math.ceil(values["vocab_size"] / multiple) * multiple
    return values


def defaults(format: str) -> Config:
    """What a format means by values that it has no place for."""
    values = {field.name: field.default for field in FIELDS if field.default is not REQUIRED}
    # MambaLens's lm_head is a parameter of its own, never tied to the embedding.
    return values | ({"tie_word_embeddings": False} if format == "mamba_lens" else {})


def _get(raw: Config, path: KeyPath) -> Any:
    """The value at a path; REQUIRED if nothing is there."""
    value: Any = raw
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return REQUIRED
        value = value[key]
    return value


def _check_types(format: str, values: Config) -> None:
    """Raise for a value of the wrong type, under the name that the format gives its field."""
    for field in FIELDS:
        if field.name not in values:
            continue
        value, path = values[field.name], ".".join(field.path(format) or (field.name,))
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {
            int: whole and value >= 1,
            bool: isinstance(value, bool),
            float: whole or (isinstance(value, float) and math.isfinite(value)),
            str: value in DT_INIT,
        }
        if not fits[field.kind]:
            raise CheckpointError(f"{path} must be {NEEDED[field.kind]}, found {value!r:.60}")
        if field.name == "layer_norm_epsilon" and value < 0:
            raise CheckpointError(f"{path} must not be negative, found {value!r:.60}")


def _reject(format: str, raw: Config) -> None:
    """Raise for a model that Hugging Face's Mamba cannot express."""
    sections = {"original": ("ssm_cfg", "attn_cfg", "initializer_cfg"), "mamba_lens": ("initializer_cfg",)}
    for section in sections.get(format, ()):
        if not isinstance(raw.get(section) or {}, Mapping):
            raise CheckpointError(f"{section} must be an object of settings, found {raw[section]!r:.60}")
    if format == "huggingface":
        return _reject_huggingface(raw)
    problem = _beyond_mamba(raw) if format == "original" else None
    if format == "mamba_lens":
        inner, expand, width = raw.get("d_inner", -1), raw.get("expand", 2), raw.get("d_model")
        whole = isinstance(expand, int) and isinstance(width, int)  # if not, `_check_types` says so
        if whole and inner not in (-1, expand * width):
            problem = f"d_inner is {inner}, but expand * d_model is {expand * width}"
    if problem:
        only = "only Mamba-1 with RMSNorm, as Hugging Face's MambaForCausalLM has it, is supported so far"
        raise CheckpointError(f"{problem}; {only}")


def _reject_huggingface(raw: Config) -> None:
    """Raise for an activation or a dtype that does not exist."""
    act, dtype = raw.get("hidden_act", "silu"), raw.get("dtype")
    if not isinstance(act, str) or act not in ACT2FN:
        raise CheckpointError(
            f"hidden_act {act!r:.60} is no activation of transformers{nearest(str(act), sorted(ACT2FN))}. A "
            "Mamba has 'silu'"
        )
    known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise CheckpointError(f"dtype {dtype!r:.60} is no dtype of weights, as float32 and bfloat16 are")


def _beyond_mamba(raw: Config) -> str | None:
    """What in a configuration of the original format makes another model of it; None if nothing does."""
    ssm = raw.get("ssm_cfg") or {}
    known = HARMLESS_SSM_OPTIONS | {field.original[1] for field in FIELDS if field.original[0] == "ssm_cfg"}
    if ssm.get("layer", "Mamba1") != "Mamba1":
        return f"ssm_cfg.layer is {ssm['layer']!r}"
    if raw.get("attn_layer_idx"):
        return f"attn_layer_idx is {raw['attn_layer_idx']!r}: some layers are attention"
    if raw.get("d_intermediate"):
        return f"d_intermediate is {raw['d_intermediate']!r}: the blocks have an MLP"
    if raw.get("rms_norm", True) is not True:
        return f"rms_norm is {raw['rms_norm']!r}: the norms are LayerNorm"
    unknown = sorted(ssm.keys() - known)
    return f"ssm_cfg has options that Mamba-1 does not have: {', '.join(unknown)}" if unknown else None


def template(format: str, values: Config) -> Config:
    """A configuration with only what each one of that format must have, for `write` to complete."""
    sizes = {
        "vocab_size": values["vocab_size"],
        "pad_vocab_size_multiple": 1 if values["vocab_size"] % 8 else 8,
    }
    if format == "original":
        sizes |= {"d_model": values["hidden_size"], "n_layer": values["num_hidden_layers"], "ssm_cfg": {}}
        flags = ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings")
        return sizes | dict.fromkeys(flags, True)
    if format == "huggingface":
        return {"model_type": "mamba"}
    known = {field.mamba_lens: values[field.name] for field in FIELDS if field.mamba_lens}
    flat = {path[0]: value for path, value in known.items() if len(path) == 1}
    initializer = {path[1]: value for path, value in known.items() if len(path) == 2}
    rest = {"default_prepend_bos": True, "tokenizer_prepends_bos": False, "n_ctx": 2048, "device": "cpu"}
    inner = values["expand"] * values["hidden_size"]
    return flat | sizes | rest | {"d_inner": inner, "initializer_cfg": initializer}


def write(format: str, base: Config, values: Config) -> Config:
    """A copy of `base`, a configuration of `format`, that holds `values`; only what differs is touched."""
    out = deepcopy(base)
    current = {} if format == "huggingface" else read(format, out)
    for field in FIELDS:
        path, value = field.path(format), values[field.name]
        if path is None or (field.name in current and current[field.name] == value):
            continue
        if format == "original" and path[0] == "initializer_cfg" and "initializer_cfg" not in out:
            continue  # mamba_ssm takes it as an argument of its own, and rejects a config.json that has it
        if len(path) == 2 and out.get(path[0]) is None:
            out[path[0]] = {}
        (out if len(path) == 1 else out[path[0]])[path[-1]] = value
    if format != "huggingface" and values["vocab_size"] % out.get("pad_vocab_size_multiple", 8):
        out["pad_vocab_size_multiple"] = 1
    if format == "mamba_lens" and out.get("d_inner", -1) != -1:
        out["d_inner"] = values["expand"] * values["hidden_size"]
    return out


def check_expressible(format: str, raw: Config, to: str) -> None:
    """Raise for a model that would compute other numbers when built from its configuration in format `to`."""
    values = read(format, raw)
    if format == "huggingface" and raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"the {to} format has only silu, found hidden_act {raw['hidden_act']!r}")
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    if to == "mamba_lens" and epsilon != 1e-5:
        raise CheckpointError(f"MambaLens's RMSNorm has an epsilon of 1e-05, found {epsilon}")
