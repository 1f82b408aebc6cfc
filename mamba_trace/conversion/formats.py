"""The configuration of one Mamba comes in three formats, and none of their libraries reads another's.

Contract: `convert_config` converts in every direction, and a round trip gives back what went in. Nothing is
lost if a format has no place for it (an unpadded vocabulary, fused_add_norm, unknown keys, n_ctx, generation
settings): the configuration that was converted travels inside the result under SOURCE_KEY, and is brought up
to date with later edits on the way back. A `CheckpointError` says what was found and what was expected. State
dicts are converted in weight_formats.py.
"""

from copy import deepcopy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..errors import CheckpointError
from . import config_formats as formats
from .config_fields import FORMATS, N_RESIDUALS, UNNAMED, Config, architecture_in

SOURCE_KEY = "mamba_trace_source"
STAMPS = ("architectures", "dtype")  # set by save_pretrained; no edits of the user's


class Link(NamedTuple):
    """One configuration in a chain of conversions, and whether it was made for trained weights."""

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
        config: a dict, a transformers MambaConfig, FalconMambaConfig or Mamba2Config, or an object with
            MambaLens's MambaCfg attributes.
        to: "original", "huggingface" or "mamba_lens".
        source: the format of `config`; detected when None.
        trained: whether the result will be used with existing weights. If rescale_prenorm_residual is set, as
            it is by default in state-spaces and MambaLens, transformers 5 divides `out_proj.weight` by
            sqrt(n_layer) even when it *loads* weights. A Hugging Face result for trained weights has it off;
            it matters for initialisation only.
        keep_source: keep what `to` has no place for under SOURCE_KEY (at the top level; in the original
            format inside attn_cfg, which mamba_ssm reads for attention layers only). With False, a mamba_lens
            result has only the fields of MambaCfg, which accepts it, and an original one only those of
            mamba_ssm.

    Returns:
        A MambaConfig, FalconMambaConfig or Mamba2Config for "huggingface", a dict otherwise; always a copy. A
        mamba_lens dict is in MambaCfg's names with initializer_cfg a dict, device a string, and MambaLens's
        accidental tuples of one replaced by their element.

    Raises:
        CheckpointError: not the configuration of a Mamba, or one that `to` cannot express: Falcon-Mamba has
            Hugging Face's format only, and MambaLens's has Mamba-1 only.

    >>> convert_config({"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "huggingface").vocab_size
    50280
    """
    formats.check_format(to)
    format, raw = formats.parse(config, source)
    trained = trained and to == "huggingface"
    links = _chain(format, raw)
    if format == to:
        formats.read(format, raw)
        if to != "huggingface":
            return raw
        same = deepcopy(config) if isinstance(config, PreTrainedConfig) else formats.huggingface(raw)
        if trained and hasattr(same, "rescale_prenorm_residual"):
            same.rescale_prenorm_residual = False
        return same
    formats.check_expressible(format, raw, to)
    converted = _convert(links, to, trained, keep_source)
    return formats.huggingface(converted) if to == "huggingface" else converted


def residuals_per_layer(config: Any) -> int:
    """The initialisation setting n_residuals_per_layer, which MambaConfig has no field for; 1 if not set.

    >>> from transformers import MambaConfig
    >>> residuals_per_layer(MambaConfig())
    1
    """
    return unnamed_settings(config)[N_RESIDUALS]


def unnamed_settings(config: Any) -> Config:
    """The settings of the initialisation that Hugging Face's configurations have no field for, by their names.

    >>> from transformers import Mamba2Config
    >>> unnamed_settings(Mamba2Config())["A_init_range"]
    (1.0, 16.0)
    """
    values = _values(_chain(*formats.parse(config)))
    return {name: values[name] for name in UNNAMED if name in values}


def _convert(links: list[Link], to: str, trained: bool, keep_source: bool) -> Config:
    """Convert the first link; if it was once in format `to`, the result is that one with later edits."""
    format, raw, _ = links[0]
    position = next((i for i, link in enumerate(links) if link.format == to), None)
    earlier = None if position is None else links[position].raw
    unedited = position is not None and _unstamped(_replay(links[: position + 1])) == _unstamped(raw)
    if earlier is not None and unedited and not (trained and earlier["rescale_prenorm_residual"]):
        return earlier if keep_source else _without_source(to, earlier)
    values = _values(links)
    if trained:
        values["rescale_prenorm_residual"] = False
    base = (
        formats.template(to, values, architecture_in(format, raw)) if earlier is None else _without_source(to, earlier)
    )
    out = formats.write(to, base, values)
    return _with_source(to, out, format, raw, trained) if keep_source else out


def _replay(links: list[Link]) -> Config:
    """The result of converting the last link again along the chain, to the format of the first link."""
    format, raw, _ = links[-1]
    for link in reversed(links[:-1]):
        raw = _convert(_chain(format, raw), link.format, link.trained, keep_source=True)
        if link.format == "huggingface":  # as `parse` gave it the first time
            raw = formats.parse(raw)[1]
        format = link.format
    return raw


def _unstamped(raw: Any) -> Any:
    """`raw` without what save_pretrained adds to every Hugging Face configuration in it."""
    if not isinstance(raw, dict):
        return raw
    stamps = STAMPS if "model_type" in raw else ()
    return {key: _unstamped(value) for key, value in raw.items() if key not in stamps}


def _values(links: list[Link]) -> Config:
    """Every value of a configuration, each from the first link that has a place for it."""
    values = formats.defaults(links[-1].format, architecture_in(links[-1].format, links[-1].raw))
    for link in reversed(links):
        held = formats.read(link.format, link.raw)
        if link.trained and not held["rescale_prenorm_residual"]:
            del held["rescale_prenorm_residual"]  # switched off by the conversion, not by the user
        values |= held
    return values


def _chain(format: str, raw: Config) -> list[Link]:
    """A configuration and those that it was converted from, the latest first."""
    links = []
    while True:
        holder = (raw.get("attn_cfg") or {}) if format == "original" else raw
        source = holder.get(SOURCE_KEY)
        whole = isinstance(source, dict) and source.keys() == {"format", "trained", "config"}
        if source and not (whole and source["format"] in FORMATS and isinstance(source["config"], dict)):
            raise CheckpointError(f"{SOURCE_KEY} is not what convert_config put there: {source!r:.60}. Remove it")
        links.append(Link(format, raw, bool(source and source["trained"])))
        if not source:
            return links
        now, before = architecture_in(format, raw), architecture_in(source["format"], source["config"])
        if now is not before:
            raise CheckpointError(
                f"this is the configuration of a {now.name}, and {SOURCE_KEY} says that it was converted from that "
                f"of a {before.name}. Give the configuration that belongs to the weights"
            )
        format, raw = source["format"], source["config"]


def _with_source(to: str, out: Config, format: str, raw: Config, trained: bool) -> Config:
    """`out` with the configuration that it was converted from."""
    source = {SOURCE_KEY: {"format": format, "trained": trained, "config": deepcopy(raw)}}
    return out | ({"attn_cfg": (out.get("attn_cfg") or {}) | source} if to == "original" else source)


def _without_source(format: str, raw: Config) -> Config:
    """A copy of `raw` without the configuration that it was converted from."""
    out = {key: value for key, value in deepcopy(raw).items() if key != SOURCE_KEY}
    if format == "original" and SOURCE_KEY in (out.get("attn_cfg") or {}):
        del out["attn_cfg"][SOURCE_KEY]
        if not out["attn_cfg"]:
            del out["attn_cfg"]
    return out
