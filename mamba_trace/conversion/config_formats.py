"""The same Mamba is described by three kinds of configuration, which share no field name.

    original      a dict, the config.json of state-spaces/mamba: d_model, n_layer, vocab_size before
                  padding, ssm_cfg {layer, d_state, d_conv, expand, dt_rank, dt_min, ...}
    huggingface   transformers' MambaConfig, FalconMambaConfig or Mamba2Config: hidden_size,
                  num_hidden_layers, vocab_size after padding
    mamba_lens    MambaLens's MambaCfg: d_model, n_layers, d_state, ..., initializer_cfg {dt_min, ...}

Where each format keeps each value is in config_fields.py, by model type. The original format has a model type
for each ssm_cfg.layer, and MambaLens has Mamba-1 only.

Contract: `parse` turns any accepted configuration into a plain dict and says its format; `read` takes the
values out of such a dict and raises `CheckpointError` for a model that Hugging Face's Mamba cannot express;
`write` puts values into such a dict and changes nothing that is equal already.
"""

import dataclasses
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from ..errors import CheckpointError
from ..modeling.architectures import BY_TYPE, Architecture
from .checkpoint_index import decoded
from .config_fields import FORMATS, MOST_LAYERS, REQUIRED, Config, KeyPath, architecture_in, fields_of
from .config_refusals import check_types, heads_of, reject, reject_another_class, reject_remote_code

MODEL_TYPES = ", ".join(map(repr, BY_TYPE))
EXPECTED = (
    "original: d_model, n_layer and vocab_size, no model_type; huggingface: model_type, one of "
    f"{MODEL_TYPES}; mamba_lens: d_model, n_layers and vocab_size"
)


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
    raw = decoded(raw)
    named = source == "huggingface" and raw.get("model_type") is not None
    format = check_format(source) if source is not None and not named else detect(raw)
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
    if isinstance(model_type, str) and model_type in BY_TYPE:
        return "huggingface"
    if model_type is not None:
        remote = ", and its auto_map names code of its own, which this package does not run" * ("auto_map" in raw)
        raise CheckpointError(
            f"this configuration says model_type {model_type!r}{remote}; only {MODEL_TYPES} are supported, and "
            f"state-spaces' original format without a model_type"
        )
    if {"d_model", "vocab_size"} <= raw.keys():
        if "n_layers" in raw or {"n_layer", "ssm_config"} <= raw.keys():
            return "mamba_lens"
        if "n_layer" in raw:
            return "original"
    keys = ", ".join(sorted(map(str, raw))[:12]) or "nothing"
    hint = " If it is a Hugging Face configuration, add its model_type; to a Mamba-1's add model_type='mamba'."
    raise CheckpointError(
        f"not a Mamba configuration. Found the keys {keys}. Expected {EXPECTED}.{hint if 'hidden_size' in raw else ''}"
    )


def huggingface(raw: Config) -> PreTrainedConfig:
    """The configuration that a plain dict describes; a `CheckpointError` if transformers rejects a value."""
    layers = declared_layers(raw)
    if layers > MOST_LAYERS:
        raise CheckpointError(f"the configuration declares {layers} layers; at most {MOST_LAYERS} are built")
    architecture = architecture_in("huggingface", raw)
    reject_remote_code(raw, architecture)
    reject_another_class(raw, architecture)  # first: the fields of one often make no sense in the other
    config_class = architecture.config_class
    try:
        return config_class.from_dict(raw)
    except Exception as error:  # an unknown dtype is an AttributeError, other faults a KeyError or TypeError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers' {config_class.__name__} rejects this configuration: {reason}") from error


def declared_layers(raw: Mapping[str, Any]) -> int:
    """The number of layers that a configuration of any format declares; 0 if it declares none."""
    named = (raw.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers"))
    return max((layers for layers in named if isinstance(layers, int)), default=0)


def _plain_huggingface(raw: Config) -> Config:
    """The fields of the table, and those that differ from a fresh configuration's of the same class.

    Where and by which version of transformers the configuration was loaded is left out, and so is the width
    inside a block where transformers computes it.
    """
    architecture = architecture_in("huggingface", raw)
    defaults, fields = architecture.config_class().to_dict(), huggingface(raw).to_dict()
    if architecture.hybrid:  # all of it, since some defaults follow from other fields
        return {name: value for name, value in fields.items() if name not in ("transformers_version", "_name_or_path")}
    dropped = {"transformers_version", "_name_or_path", "intermediate_size" if "intermediate_size" in defaults else ""}
    kept = {k: v for k, v in fields.items() if k not in dropped and (k not in defaults or defaults[k] != v)}
    mapped = {field.name: fields[field.name] for field in fields_of(architecture) if field.name in fields}
    return kept | mapped | {"model_type": architecture.model_type}


def _plain_mamba_lens(raw: Config) -> Config:
    """A dict with MambaCfg's names and JSON values, also from the dict that MambaLens itself exports.

    The defaults in MambaLens 0.0.4's MambaInitCfg are tuples of one element, because of a trailing comma; the
    element is taken.
    """
    raw = raw | raw.pop("ssm_config", {})
    if "n_layer" in raw:
        layers = raw.pop("n_layer")
        if raw.setdefault("n_layers", layers) != layers:
            raise CheckpointError(
                f"this configuration says n_layer={layers!r} and n_layers={raw['n_layers']!r}, which are two names of "
                f"one field: leave one of them out"
            )
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
    values = _held(format, raw)
    if architecture_in(format, raw).model_type == "mamba2":
        values["num_heads"] = heads_of(format, values)
    return values


def _held(format: str, raw: Config) -> Config:
    """As `read`, without what follows from several values together."""
    architecture = architecture_in(format, raw)
    reject(format, raw, architecture)
    values: Config = {}
    for field in fields_of(architecture):
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
    if values.get("time_step_rank") == "auto" and isinstance(values["hidden_size"], int):
        values["time_step_rank"] = math.ceil(values["hidden_size"] / 16)
    check_types(format, architecture, values)
    if format != "huggingface":
        multiple = raw.get("pad_vocab_size_multiple", 8)
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise CheckpointError(f"pad_vocab_size_multiple must be at least 1, found {multiple!r}")
        values["vocab_size"] = math.ceil(values["vocab_size"] / multiple) * multiple
    return values


def defaults(format: str, architecture: Architecture) -> Config:
    """What a format means by values that it has no place for."""
    values = {field.name: field.default for field in fields_of(architecture) if field.default is not REQUIRED}
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


def template(format: str, values: Config, architecture: Architecture) -> Config:
    """A configuration with only what each one of that format must have, for `write` to complete."""
    dual = architecture.model_type == "mamba2"
    multiples = (16, 8) if dual else (8,)
    multiple = next((multiple for multiple in multiples if values["vocab_size"] % multiple == 0), 1)
    sizes = {"vocab_size": values["vocab_size"], "pad_vocab_size_multiple": multiple}
    if format == "original":
        sizes |= {"d_model": values["hidden_size"], "n_layer": values["num_hidden_layers"]}
        more = {"d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}}
        flags = ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings")
        return sizes | (more if dual else {"ssm_cfg": {}}) | dict.fromkeys(flags, True)
    if format == "huggingface":
        # The special tokens of gpt-neox-20b's tokenizer; a fresh Mamba2Config has those of Codestral's.
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
        return {"model_type": architecture.model_type} | (tokens if dual else {})
    known = {field.mamba_lens: values[field.name] for field in fields_of(architecture) if field.mamba_lens}
    flat = {path[0]: value for path, value in known.items() if len(path) == 1}
    initializer = {path[1]: value for path, value in known.items() if len(path) == 2}
    rest = {"default_prepend_bos": True, "tokenizer_prepends_bos": False, "n_ctx": 2048, "device": "cpu"}
    inner = values["expand"] * values["hidden_size"]
    return flat | sizes | rest | {"d_inner": inner, "initializer_cfg": initializer}


def write(format: str, base: Config, values: Config) -> Config:
    """A copy of `base`, a configuration of `format`, that holds `values`; only what differs is touched."""
    out = deepcopy(base)
    current = {} if format == "huggingface" else _held(format, out)
    for field in fields_of(architecture_in(format, out)):
        path, value = field.path(format), values[field.name]
        if field.kind is tuple:
            value = list(value)  # as JSON has it
        if path is None or (field.name in current and current[field.name] == values[field.name]):
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
    values, architecture = read(format, raw), architecture_in(format, raw)
    if to not in architecture.formats:
        owner = "MambaLens has Mamba-1 only" if to == "mamba_lens" else "state-spaces' mamba_ssm has no such model"
        raise CheckpointError(
            f"{architecture.name} has no {to} format: {owner}. It has {' and '.join(map(repr, architecture.formats))}"
        )
    if format == "huggingface" and raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"the {to} format has only silu, found hidden_act {raw['hidden_act']!r}")
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    if to == "mamba_lens" and epsilon != 1e-5:
        raise CheckpointError(f"MambaLens's RMSNorm has an epsilon of 1e-05, found {epsilon}")
    if to == "original" and architecture.model_type == "mamba2" and epsilon != 1e-5:
        raise CheckpointError(f"the norms of mamba_ssm's Mamba-2 have an epsilon of 1e-05, found {epsilon}")
