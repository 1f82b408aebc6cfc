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

from transformers import MambaConfig

from ..errors import CheckpointError
from ..names import nearest
from .config_fields import FIELDS, HARMLESS_SSM_OPTIONS, LENS_ALIASES, Config
from .config_formats import parse, read

# Top-level fields of each format that are not in FIELDS; those of `model.cfg.to_dict()` are in LENS_ALIASES.
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
    if format == "huggingface":
        _check_huggingface(raw)
    else:
        _check_strictly(format, raw)


def _check_strictly(format: str, raw: Config) -> None:
    """Refuse every field that the original or MambaLens's format does not have."""
    known: dict[str, set[str]] = {"": set(BESIDES[format].split()), "ssm_cfg": set(HARMLESS_SSM_OPTIONS)}
    for path in filter(None, (field.path(format) for field in FIELDS)):
        known[""].add(path[0])
        if len(path) == 2:
            known.setdefault(path[0], set()).add(path[1])
    accepted = STAMPS | (LENS_ALIASES.keys() if format == "mamba_lens" else set())
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


def _nearest(name: str, paths: Mapping[str, str]) -> str:
    """As `nearest`, comparing only the last part of each path and showing the whole path."""
    close = difflib.get_close_matches(name, paths.values(), n=1, cutoff=0.5)
    return f"; did you mean {next(path for path, end in paths.items() if end == close[0])}" if close else ""


def _check_huggingface(raw: Config) -> None:
    """Refuse what is nearly the name of a field, or another format's name of a field with another value."""
    values = read("huggingface", raw)
    known = {field.name for field in fields(MambaConfig)}
    theirs = {path[-1]: field.name for field in FIELDS for path in field[1:3] if path and path[-1] != "bias"}
    theirs |= {"rms_norm": "", "d_inner": ""}
    for name in raw.keys() - known - STAMPS:
        field = theirs.get(name)
        if field is None and difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise CheckpointError(f"a MambaConfig has no field {name!r}{nearest(name, sorted(known))}")
        if field in values and raw[name] != values[field]:
            raise CheckpointError(
                f"a MambaConfig has no field {name!r}: it is called {field}, which is {values[field]!r} here "
                f"and not {raw[name]!r}"
            )
