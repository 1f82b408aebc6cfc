"""A misspelt field of a configuration would be read by nothing: the model would be built with the default.

A checkpoint's config.json may hold anything, so conversion keeps every field that it does not know. When
somebody writes a configuration for a new model, an unknown field is a mistake.

Contract: `check_names` refuses fields that a format does not have and suggests the nearest one. Hugging
Face's configurations take any attribute, so there it refuses only names that are nearly those of a field, and
names that another format has for a field if they contradict that field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import CheckpointError
from ..modeling.architectures import ARCHITECTURES, Architecture
from ..names import nearest
from .config_fields import LAYERS, Config, aliases_of, architecture_in, fields_of, layer_in, ssm_options
from .config_formats import parse, read

# Top-level fields of each format that are in no table; those of `model.cfg.to_dict()` are in `aliases_of`.
BESIDES = {
    "original": "attn_cfg attn_layer_idx d_intermediate rms_norm fused_add_norm pad_vocab_size_multiple",
    "mamba_lens": "d_inner pad_vocab_size_multiple default_prepend_bos tokenizer_prepends_bos n_ctx device",
}
# What transformers, the hub and `convert_config` write into any configuration.
STAMPS = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "mamba_trace_source"}


def check_names(config: Any) -> None:
    """Refuse a configuration with a misspelt field.

    Args:
        config: as for `convert_config`.

    Raises:
        CheckpointError: naming the field, and the nearest field of the format.

    >>> check_names({"d_model": 8, "n_layer": 1, "vocab_size": 20, "ssm_cfg": {"d_state": 2}})
    """
    format, raw = parse(config)
    architecture = architecture_in(format, raw)
    if format == "huggingface":
        _check_huggingface(raw, architecture)
    else:
        _check_strictly(format, raw, architecture)


def _check_strictly(format: str, raw: Config, architecture: Architecture) -> None:
    """Refuse every field that the original or MambaLens's format does not have."""
    if format == "mamba_lens" or layer_in(raw) not in LAYERS:
        read(format, raw)  # refuses a model that is none of these before it is compared with their fields
    known: dict[str, set[str]] = {"": set(BESIDES[format].split()), "ssm_cfg": set()}
    if format == "original":
        known["ssm_cfg"] |= ssm_options(architecture)
    for path in filter(None, (field.path(format) for field in fields_of(architecture))):
        known[""].add(path[0])
        if len(path) == 2:
            known.setdefault(path[0], set()).add(path[1])
    aliases = aliases_of(architecture) if format == "mamba_lens" else {}
    accepted = STAMPS | aliases.keys()
    _check_aliases(raw, aliases, architecture)
    paths = {".".join(filter(None, (section, name))): name for section in known for name in known[section]}
    for section, names in known.items():
        holder = raw if not section else raw.get(section) or {}
        for name in holder if isinstance(holder, Mapping) else ():
            if name in names or (not section and (name in accepted or str(name).startswith("_"))):
                continue
            elsewhere = [path for path, end in paths.items() if end == name]
            hint = f"; it belongs where {elsewhere[0]} is" if elsewhere else _nearest(str(name), paths)
            where = f"{section} of the {format} format" if section else f"the {format} format"
            raise CheckpointError(f"{where} has no field {name!r}{hint}. It has {', '.join(sorted(names))}")


def _check_aliases(raw: Config, aliases: Mapping[str, str], architecture: Architecture) -> None:
    """Refuse a second name of a field that contradicts the first, which is the one that would be read."""
    first = {field.name: path[0] for field in fields_of(architecture) if (path := field.path("mamba_lens"))}
    for alias in aliases.keys() & raw.keys():
        name = first.get(aliases[alias])
        if name is None or name == alias or name not in raw:
            continue
        if isinstance(raw[name], int) and raw[alias] != raw[name]:
            raise CheckpointError(
                f"this configuration says {alias}={raw[alias]!r} and {name}={raw[name]!r}, which are two names of one "
                f"field: leave one of them out"
            )


def _nearest(name: str, paths: Mapping[str, str]) -> str:
    """As `nearest`, comparing only the last part of each path and showing the whole path."""
    close = difflib.get_close_matches(name, paths.values(), n=1, cutoff=0.5)
    return f"; did you mean {next(path for path, end in paths.items() if end == close[0])}" if close else ""


def _check_huggingface(raw: Config, architecture: Architecture) -> None:
    """Refuse what is nearly the name of a field, or another format's name of a field with another value."""
    values = read("huggingface", raw)
    config = architecture.config_class.__name__
    known = {field.name for field in fields(architecture.config_class)}
    if architecture.hybrid:  # some of its fields have two names, and some follow from others
        known |= architecture.config_class.attribute_map.keys() | architecture.config_class().to_dict().keys()
    # What one class has, older files of another have as well: a Mamba-2's has Mamba-1's time_step_scale.
    others = [other for other in ARCHITECTURES if architecture.hybrid or not other.hybrid]
    related = {field.name for other in others for field in fields(other.config_class)}
    paths = {field.name: field[1:3] for field in fields_of(architecture)}
    theirs = {path[-1]: name for name in paths for path in paths[name] if path and path[-1] != "bias"}
    theirs |= {"rms_norm": "", "d_inner": ""}
    for name in raw.keys() - known - related - STAMPS:
        field = theirs.get(name)
        if field is None and difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise CheckpointError(f"a {config} has no field {name!r}{nearest(name, sorted(known))}")
        if field in values and raw[name] != values[field]:
            raise CheckpointError(
                f"a {config} has no field {name!r}: it is called {field}, which is {values[field]!r} here "
                f"and not {raw[name]!r}"
            )
