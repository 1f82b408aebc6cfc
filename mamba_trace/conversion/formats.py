"""Checkpoints of one and the same Mamba come in three formats, and none of their libraries reads another's.

    original      state-spaces/mamba: config.json without model_type, `backbone.embedding.weight`
    huggingface   transformers' MambaForCausalLM: `backbone.embeddings.weight`; what this package runs
    mamba_lens    MambaLens: `blocks.N.*`, with in_proj and x_proj split into their parts

Contract: `convert_config` and `convert_state_dict` convert in every direction, and a round trip gives back
what went in, bit for bit. What a format has no place for (an unpadded vocabulary, fused_add_norm, unknown
keys, n_ctx, generation settings) is not lost: the configuration that was converted travels inside the result
under SOURCE_KEY, and is brought up to date with later edits on the way back. `CheckpointError` says what was
found and what was expected.
"""

from copy import deepcopy
from typing import Any, NamedTuple

from transformers import MambaConfig

from ..errors import CheckpointError
from . import config_formats as formats
from .config_fields import FORMATS, N_RESIDUALS, Config
from .weight_formats import check_state_dict, convert_state_dict, detect_state_dict_format

__all__ = [
    "FORMATS",
    "SOURCE_KEY",
    "check_state_dict",
    "convert_config",
    "convert_state_dict",
    "detect_config_format",
    "detect_state_dict_format",
    "residuals_per_layer",
]

SOURCE_KEY = "mamba_trace_source"
STAMPS = ("architectures", "dtype")  # set by save_pretrained; no edits of the user's


class Link(NamedTuple):
    """A configuration of a chain of conversions, and whether it was made for trained weights."""

    format: str
    raw: Config
    trained: bool


def detect_config_format(config: Any) -> str:
    """One of FORMATS for a dict, MambaConfig or object with attributes; else `CheckpointError`.

    >>> detect_config_format({"d_model": 768, "n_layer": 24, "vocab_size": 50277})
    'original'
    """
    return formats.parse(config)[0]


def convert_config(
    config: Any, to: str, *, source: str | None = None, trained: bool = False, keep_source: bool = True
) -> Any:
    """The same model's configuration in another format.

    Args:
        config: a dict, a transformers MambaConfig, or an object with MambaLens's MambaCfg attributes.
        to: "original", "huggingface" or "mamba_lens".
        source: the format of `config`; detected when None.
        trained: the result will be used with existing weights. transformers 5 divides `out_proj.weight` by
            sqrt(n_layer) even when it *loads* weights, if rescale_prenorm_residual is set, which state-spaces
            and MambaLens set by default: with trained=True a Hugging Face result has it off. It concerns
            nothing but initialisation.
        keep_source: put what `to` has no place for under SOURCE_KEY (top level; in the original format inside
            attn_cfg, which mamba_ssm reads for attention layers only). With False, a mamba_lens result has
            only the fields of MambaCfg, and can be given to it, and an original one those of mamba_ssm.

    Returns:
        MambaConfig for "huggingface", a dict otherwise; always a copy. A mamba_lens dict is in MambaCfg's
        names with initializer_cfg a dict, device a string, and MambaLens's accidental tuples of one replaced
        by their element.

    Raises:
        CheckpointError: not a Mamba-1 configuration, or one that `to` cannot express.

    >>> convert_config({"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "huggingface").vocab_size
    50280
    """
    formats.check_format(to)
    format, raw = formats.parse(config, source)
    trained = trained and to == "huggingface"
    if format == to:
        return _same(config, format, raw, trained)
    formats.check_expressible(format, raw, to)
    converted = _convert(format, raw, to, trained, keep_source)
    return formats.huggingface(converted) if to == "huggingface" else converted


def residuals_per_layer(config: Any) -> int:
    """The initialisation setting n_residuals_per_layer, which MambaConfig has no field for; 1 if not set.

    >>> residuals_per_layer(MambaConfig())
    1
    """
    return _values(_chain(*formats.parse(config)))[N_RESIDUALS]


def _same(config: Any, format: str, raw: Config, trained: bool) -> Any:
    """A copy of `config` in the format that it has."""
    formats.read(format, raw)
    if format != "huggingface":
        return raw
    copy = deepcopy(config) if isinstance(config, MambaConfig) else formats.huggingface(raw)
    if trained:
        copy.rescale_prenorm_residual = False
    return copy


def _convert(format: str, raw: Config, to: str, trained: bool, keep_source: bool) -> Config:
    """Convert; a configuration that was once in format `to` is that one again, up to later edits."""
    links = _chain(format, raw)
    position = next((i for i, link in enumerate(links) if link.format == to), None)
    earlier = None if position is None else links[position].raw
    unedited = position is not None and _unstamped(_replay(links[: position + 1])) == _unstamped(raw)
    if earlier is not None and unedited and not (trained and earlier["rescale_prenorm_residual"]):
        return earlier if keep_source else _without_source(to, earlier)
    values = _values(links)
    if trained:
        values["rescale_prenorm_residual"] = False
    base = formats.template(to, values) if earlier is None else _without_source(to, earlier)
    out = formats.write(to, base, values)
    return _with_source(to, out, format, raw, trained) if keep_source else out


def _replay(links: list[Link]) -> Config:
    """What the last of the links becomes when converted to each earlier one's format in turn."""
    format, raw, _ = links[-1]
    for link in reversed(links[:-1]):
        raw = _convert(format, raw, link.format, link.trained, keep_source=True)
        format = link.format
    return raw


def _unstamped(raw: Any) -> Any:
    """`raw` without what save_pretrained adds to every Hugging Face configuration in it."""
    if not isinstance(raw, dict):
        return raw
    stamps = STAMPS if raw.get("model_type") == "mamba" else ()
    return {key: _unstamped(value) for key, value in raw.items() if key not in stamps}


def _values(links: list[Link]) -> Config:
    """Every value, from the first link that has a place for it."""
    values = formats.defaults(links[-1].format)
    for link in reversed(links):
        found = formats.read(link.format, link.raw)
        if link.trained and not found["rescale_prenorm_residual"]:
            del found["rescale_prenorm_residual"]  # switched off by the conversion, not by the user
        values |= found
    return values


def _chain(format: str, raw: Config) -> list[Link]:
    """A configuration and the ones that it was converted from, latest first."""
    links = []
    while True:
        holder = (raw.get("attn_cfg") or {}) if format == "original" else raw
        source = holder.get(SOURCE_KEY)
        if source and not _is_source(source):
            raise CheckpointError(
                f"{SOURCE_KEY} is not what convert_config put there: {source!r:.60}. Remove it"
            )
        links.append(Link(format, raw, bool(source and source["trained"])))
        if not source:
            return links
        format, raw = source["format"], source["config"]


def _is_source(source: Any) -> bool:
    """Whether a value under SOURCE_KEY has the shape that `_with_source` gives it."""
    if not isinstance(source, dict) or source.keys() != {"format", "trained", "config"}:
        return False
    return source["format"] in FORMATS and isinstance(source["config"], dict)


def _with_source(to: str, out: Config, format: str, raw: Config, trained: bool) -> Config:
    """`out` with the configuration that it was converted from."""
    source = {SOURCE_KEY: {"format": format, "trained": trained, "config": deepcopy(raw)}}
    if to == "original":
        return out | {"attn_cfg": (out.get("attn_cfg") or {}) | source}
    return out | source


def _without_source(format: str, raw: Config) -> Config:
    """A copy of `raw` without the configuration that it was converted from."""
    out = {key: value for key, value in deepcopy(raw).items() if key != SOURCE_KEY}
    if format == "original" and SOURCE_KEY in (out.get("attn_cfg") or {}):
        del out["attn_cfg"][SOURCE_KEY]
        if not out["attn_cfg"]:
            del out["attn_cfg"]
    return out
