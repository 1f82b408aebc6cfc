"""A misspelt field of a configuration is one that nobody reads: the model is built with its default.

A checkpoint's config.json may hold anything besides, so conversion keeps what it does not know. A
configuration that someone wrote for a new model has no reason to.

Contract: `check_names` refuses names that a format does not have, with the nearest that it has. In Hugging
Face's format, whose configurations take any attribute, it refuses those alone that are nearly a field's, or
another format's name for a field with another value.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import MambaConfig

from ..errors import CheckpointError
from ..hooked.cfg import READ
from ..names import nearest
from .config_fields import FIELDS, HARMLESS_SSM_OPTIONS, Config, KeyPath
from .config_formats import parse, read

# What each format has beyond FIELDS, at the top level; SOURCE_KEY is conversion's own.
BESIDES = {
    "original": "attn_cfg attn_layer_idx d_intermediate rms_norm fused_add_norm pad_vocab_size_multiple",
    "mamba_lens": "d_inner pad_vocab_size_multiple default_prepend_bos tokenizer_prepends_bos n_ctx device",
}
# What transformers, and the hub, write into every configuration.
STAMPS = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "mamba_trace_source"}
CLOSE = 0.8  # difflib's ratio from which a name is taken for a misspelt one


def check_names(config: Any) -> None:
    """Refuse a configuration with a misspelt field.

    Args:
        config: as for `convert_config`.

    Raises:
        CheckpointError: naming the field, and the nearest that the format has.

    >>> check_names({"d_model": 8, "n_layer": 1, "vocab_size": 20, "ssm_cfg": {"d_state": 2}})
    """
    format, raw = parse(config)
    if format == "huggingface":
        _check_huggingface(raw)
    else:
        _check_strictly(format, raw)


def _check_strictly(format: str, raw: Config) -> None:
    known: dict[str, set[str]] = {"": set(BESIDES[format].split())}
    accepted = STAMPS | (READ.keys() if format == "mamba_lens" else set())  # as model.cfg.to_dict() has them
    for field in FIELDS:
        path = field.path(format)
        if path is not None:
            known[""].add(path[0])
            if len(path) == 2:
                known.setdefault(path[0], set()).add(path[1])
    known.setdefault("ssm_cfg", set()).update(HARMLESS_SSM_OPTIONS)
    paths = {".".join(filter(None, (section, name))): name for section in known for name in known[section]}
    for section, names in known.items():
        holder = raw if not section else raw.get(section) or {}
        for name in holder if isinstance(holder, Mapping) else ():
            if name in names or (not section and (name in accepted or str(name).startswith("_"))):
                continue
            elsewhere = [path for path, end in paths.items() if end == name]
            hint = f"; it belongs where {elsewhere[0]} is" if elsewhere else _nearest(str(name), paths)
            has = ", ".join(sorted(known[section]))
            where = f"{section} of the {format} format" if section else f"the {format} format"
            raise CheckpointError(f"{where} has no field {name!r}{hint}. It has {has}")


def _nearest(name: str, paths: Mapping[str, str]) -> str:
    """`nearest` by the last part of a path, which is shown whole."""
    close = difflib.get_close_matches(name, paths.values(), n=1, cutoff=0.5)
    return f"; did you mean {next(path for path, end in paths.items() if end == close[0])}" if close else ""


def _check_huggingface(raw: Config) -> None:
    values = read("huggingface", raw)
    known = {field.name for field in fields(MambaConfig)}
    theirs = _other_names()
    for name in raw.keys() - known - STAMPS:
        field = theirs.get(name)
        if field is None and difflib.get_close_matches(name, known, n=1, cutoff=CLOSE):
            raise CheckpointError(f"a MambaConfig has no field {name!r}{nearest(name, sorted(known))}")
        if field in values and raw[name] != values[field]:
            raise CheckpointError(
                f"a MambaConfig has no field {name!r}: it is called {field}, which is {values[field]!r} here "
                f"and not {raw[name]!r}"
            )


def _other_names() -> dict[str, str]:
    """Hugging Face's name of a field by the one that another format has for it."""
    ends: list[tuple[KeyPath | None, str]] = [(field.original, field.name) for field in FIELDS]
    ends += [(field.mamba_lens, field.name) for field in FIELDS]
    found = {path[-1]: name for path, name in ends if path is not None and path[-1] != name}
    return {name: field for name, field in found.items() if name != "bias"} | {"rms_norm": "", "d_inner": ""}
