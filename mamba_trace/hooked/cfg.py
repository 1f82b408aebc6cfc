"""Analysis code asks ``model.cfg.n_layers`` and ``model.cfg.E``; Hugging Face says ``num_hidden_layers``.

Contract: `LensConfig` is a view. It stores nothing: every attribute is looked up in the model's Hugging Face
configuration (device and dtype in its parameters) at the moment it is read, so it follows changes of either,
and it cannot be assigned to. It has the names of MambaLens's `MambaCfg`, taken from the architecture's table of
configuration fields, and MambaLens's one-letter sizes. A name that only another architecture has is an error that
says so. Of a hybrid, whose parts have a width and heads each, it shows the sizes under the letters of the sites, and
refuses the names that could mean two of them.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..conversion.config_fields import INNER_WIDTH, UNNAMED, aliases_of, fields_of
from ..conversion.formats import unnamed_settings
from ..modeling.architectures import ARCHITECTURES, BY_TYPE, axis_sizes
from ..names import nearest
from ..tables import html_table

Read = Callable[[Any], Any]

#: Names that other models have and no Mamba does, with the reason.
ABSENT = {
    "n_key_value_heads": "a Mamba has no attention heads",
    "d_mlp": "a Mamba block has no MLP; its inner width is d_inner",
}
#: The reason why one architecture lacks a name that another has, where there is more to say.
LACKED = {
    ("selective", "n_heads"): "a Mamba has no attention heads, and only a Mamba-2 has heads of its own",
    ("selective", "d_head"): "a Mamba has no attention heads, and only a Mamba-2 has heads of its own",
    ("dual", "dt_rank"): "in a Mamba-2 delta_1 has one number for each of the n_heads heads",
    ("dual", "D_delta"): "in a Mamba-2 delta_1 has one number for each of the n_heads heads",
}
#: The names of the sizes of a hybrid's parts, by the letter of the axis; a model has those that one of its layers has.
SIZES = {
    "E": ("d_inner", "E"),
    "N": ("d_state", "N"),
    "R": ("dt_rank", "R", "D_delta"),
    "K": ("d_conv", "D_conv"),
    "H": ("H",),
    "P": ("P",),
    "G": ("n_groups", "G"),
    "Q": ("Q",),
    "U": ("n_key_value_heads", "U"),
    "W": ("W",),
    "X": ("n_experts", "X"),
}
#: Why a hybrid does not have a name, where there is more to say.
LACKED_BY_HYBRIDS = {
    "n_heads": "the heads of the SSM are model.cfg.H, and the query heads of attention model.cfg.Q",
    "d_head": "a head of the SSM has model.cfg.P channels, and a head of attention model.cfg.W",
    "d_mlp": "an MLP, a shared MLP and experts have widths of their own, which model.config has",
    "initializer_cfg": "transformers initialises a hybrid by settings of its own, which model.config has",
    **dict.fromkeys(("expand", "bias", "conv_bias"), "each hybrid has a field of its own for it in model.config"),
}


def _named(model_type: str, depth: int) -> dict[str, str]:
    """MambaLens's name -> Hugging Face's, at the top level of a configuration (1) or in its initializer_cfg (2)."""
    paths = ((field.mamba_lens, field.name) for field in fields_of(BY_TYPE[model_type]))
    return {path[-1]: name for path, name in paths if path and len(path) == depth}


def _field(name: str) -> Read:
    return lambda model: getattr(model.config, name)


def _size(axis: str) -> Read:
    return lambda model: axis_sizes(model._module)[axis]


def _initializer(model: Any) -> Any:
    names, unnamed = _named(model.config.model_type, 2), unnamed_settings(model.config)
    values = (unnamed[name] if name in UNNAMED else getattr(model.config, name) for name in names.values())
    return initializer_class(tuple(names))(*values)


@functools.cache
def initializer_class(names: tuple[str, ...]) -> Any:
    """The class of ``initializer_cfg``: a named tuple, which is read-only."""
    made: Any = namedtuple("InitializerConfig", names)  # type: ignore[misc]
    made.__doc__ = "How a model made from scratch is initialised: read-only, under MambaLens's names."
    return made


@functools.cache
def reads_of(model_type: str) -> Mapping[str, Read]:
    """Name -> how it is read from a model of this architecture, in the order of `LensConfig.to_dict`."""
    names = _named(model_type, 1) | aliases_of(BY_TYPE[model_type])
    return {
        **{name: _size("E") if theirs == INNER_WIDTH else _field(theirs) for name, theirs in names.items()},
        "n_ctx": lambda model: None,
        **_OF_ALL,
        "initializer_cfg": _initializer,
    }


_OF_ALL: dict[str, Read] = {
    "device": lambda model: model.device,
    "dtype": lambda model: model._module.dtype,
    "default_prepend_bos": lambda model: model.default_prepend_bos,
    "tokenizer_prepends_bos": lambda model: model.tokenizer_prepends_bos,
}


def _longest(model: Any) -> int | None:
    return getattr(model.config, "max_position_embeddings", None) if model.attention_layers else None


@functools.cache
def _reads_of_hybrid(axes: str) -> Mapping[str, Read]:
    """As `reads_of`, for a hybrid whose layers have these axes."""
    sizes = {name: _size(axis) for axis, names in SIZES.items() if axis in axes for name in names}
    stream = {"d_model": "hidden_size", "D": "hidden_size", "n_layers": "num_hidden_layers"}
    stream |= {"n_layer": "num_hidden_layers"}
    vocabulary = dict.fromkeys(("vocab_size", "d_vocab", "V"), "vocab_size")
    fields = {name: _field(theirs) for name, theirs in (stream | vocabulary).items()}
    return fields | sizes | {"eps": _epsilon, "n_ctx": _longest} | _OF_ALL


def _epsilon(model: Any) -> float:
    return model.norm_f._module.variance_epsilon


class LensConfig:
    """``model.cfg``: the configuration under MambaLens's names, read-only.

    ===============================================  =======================================================
    ``d_model``, ``D``                               width of the residual stream
    ``n_layers``, ``n_layer``                        number of blocks
    ``d_inner``, ``E``                               width inside a block, ``expand`` times ``d_model``
    ``d_state``, ``N``                               size of the state of each of the E channels
    ``dt_rank``, ``D_delta``                         width of ``delta_1``; not in Mamba-2
    ``n_heads``, ``H``; ``d_head``, ``P``            heads of a Mamba-2, and channels of each; only there
    ``n_groups``, ``G``                              groups of B and C, which share heads; only in Mamba-2
    ``dt_limit``, ``chunk_size``                     Hugging Face's ``time_step_limit``; only in Mamba-2
    ``inner_eps``                                    epsilon of the norms on delta_1, B and C; Falcon-Mamba's
    ``d_conv``, ``D_conv``                           taps of the convolution
    ``vocab_size``, ``d_vocab``, ``V``               rows of the embedding, padding included
    ``expand``, ``bias``, ``conv_bias``, ``eps``     as Hugging Face's ``expand``, ``use_bias``,
                                                     ``use_conv_bias``, ``layer_norm_epsilon``
    ``n_ctx``                                        ``None``: a Mamba has no longest prompt
    ``device``, ``dtype``                            of the first parameter; the meta device before loading
    ``default_prepend_bos``                          what `to_tokens` does by default
    ``tokenizer_prepends_bos``                       whether the tokenizer itself puts it before every text
    ``initializer_cfg``                              ``initializer_range``, ``dt_min``, ``dt_max``, ...
    ===============================================  =======================================================

    and in a hybrid, with ``d_inner`` and the other sizes of its SSM if it has one:

    ===============================================  =======================================================
    ``H``; ``P``                                     heads of the SSM, and channels of each
    ``Q``; ``n_key_value_heads``, ``U``; ``W``       heads of queries, heads of keys, and channels of each
    ``n_experts``, ``X``                             experts that a router chooses from
    ``n_ctx``                                        the longest prompt of the training, where attention is
    ===============================================  =======================================================

    Raises:
        AttributeError: for any other name, with the nearest in the message, and for every assignment.

    Example::

        model = MambaTrace.demo()
        assert model.cfg.n_layers == len(model.layers) and model.cfg.E == 2 * model.cfg.D
    """

    __slots__ = ("_model",)

    _model: Any

    def __init__(self, model: Any) -> None:
        object.__setattr__(self, "_model", model)

    def __reduce__(self) -> tuple:
        return LensConfig, (self._model,)

    @property
    def _reads(self) -> Mapping[str, Read]:
        architecture = self._model.architecture
        if architecture.hybrid:
            return _reads_of_hybrid("".join(axis_sizes(self._model._module)))
        return reads_of(architecture.model_type)

    @property
    def huggingface(self) -> Any:
        """The Hugging Face configuration behind the view, ``model.config``."""
        return self._model.config

    def to_dict(self) -> dict[str, Any]:
        """Every name with its current value; ``initializer_cfg`` as a dict.

        Example::

            MambaTrace.demo().cfg.to_dict()["d_model"]  # 64
        """
        values = {name: read(self._model) for name, read in self._reads.items()}
        if "initializer_cfg" in values:
            values["initializer_cfg"] = values["initializer_cfg"]._asdict()
        return values

    def __getattr__(self, name: str) -> Any:
        if name in self._reads:
            return self._reads[name](self._model)
        raise AttributeError(f"model.cfg has no {name!r}{self._instead(name)}. It has: {', '.join(self._reads)}")

    def _instead(self, name: str) -> str:
        architecture, of_parts = self._model.architecture, [name for names in SIZES.values() for name in names]
        why = LACKED_BY_HYBRIDS.get(name) if architecture.hybrid else ABSENT.get(name)
        if why := why or (None if architecture.hybrid else LACKED.get((architecture.family, name))):
            return f": {why}"
        if architecture.hybrid and name in of_parts:
            return ", as no layer of it has such a part: model.layer_kinds says what stands in each layer"
        pure = [other for other in ARCHITECTURES if not other.hybrid]
        if theirs := [other.name for other in pure if name in reads_of(other.model_type)]:
            return f", which only a {' or a '.join(theirs)} has: this is a {architecture.name}"
        if name in of_parts:
            return ", which only a hybrid has: its layers have attention or experts, too"
        if hasattr(self._model.config, name) and not name.startswith("_"):
            return f", a Hugging Face name: it is model.config.{name}"
        return nearest(name, list(self._reads))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"model.cfg.{name} cannot be set: model.cfg only shows what model.config and the parameters are. "
            f"{_way_out(name)}"
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __dir__(self) -> list[str]:
        return [*self._reads, "huggingface", "to_dict"]

    def __repr__(self) -> str:
        lines = (f"  {name}: {value!r}" for name, value in self.to_dict().items())
        return "\n".join(["LensConfig, a view of model.config:", *lines])

    def _repr_html_(self) -> str:
        rows = ([name, repr(value)] for name, value in self.to_dict().items())
        return html_table("LensConfig, a view of model.config", ["name", "value"], rows)


def _way_out(name: str) -> str:
    if name == "default_prepend_bos":
        return "Set model.default_prepend_bos"
    if name in ("device", "dtype"):
        return f"Load the model with {name}=..., or move it with model.to(...)"
    return "Make a model of another size with MambaTrace.from_config"
