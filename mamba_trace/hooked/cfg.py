"""Analysis code asks ``model.cfg.n_layers`` and ``model.cfg.E``; Hugging Face says ``num_hidden_layers``.

Contract: `LensConfig` is a view. It stores nothing: every attribute is looked up in the model's Hugging Face
configuration (device and dtype in its parameters) at the moment it is read, so it follows changes of either,
and it cannot be assigned to. It has the names of MambaLens's `MambaCfg`, taken from the table of
configuration fields, and MambaLens's one-letter sizes.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

from ..conversion.config_fields import FIELDS, LENS_ALIASES, N_RESIDUALS
from ..conversion.formats import residuals_per_layer
from ..names import nearest

Read = Callable[[Any], Any]

# MambaLens's name -> Hugging Face's, of the values at the top level of a MambaCfg and of its initializer_cfg.
_TOP, _INITIALIZER = (
    {field.mamba_lens[-1]: field.name for field in FIELDS if field.mamba_lens and len(field.mamba_lens) == depth}
    for depth in (1, 2)
)
InitializerConfig = namedtuple("InitializerConfig", _INITIALIZER)  # type: ignore[misc]
InitializerConfig.__doc__ = "How a model made from scratch is initialised: read-only, under MambaLens's names."

#: Names that other models have and a Mamba does not, with the reason.
ABSENT = {
    **dict.fromkeys(("n_heads", "d_head", "n_key_value_heads"), "a Mamba has no attention heads"),
    "d_mlp": "a Mamba block has no MLP; its inner width is d_inner",
}


def _field(name: str) -> Read:
    return lambda model: getattr(model.config, name)


def _initializer(model: Any) -> Any:
    residuals = residuals_per_layer(model.config)
    return InitializerConfig(
        *(residuals if name == N_RESIDUALS else getattr(model.config, name) for name in _INITIALIZER.values())
    )


#: Name -> how it is read from a model, in the order of `LensConfig.to_dict`.
READ: dict[str, Read] = {
    **{name: _field(theirs) for name, theirs in (_TOP | LENS_ALIASES).items()},
    "n_ctx": lambda model: None,
    "device": lambda model: model.device,
    "dtype": lambda model: model._module.dtype,
    "default_prepend_bos": lambda model: model.default_prepend_bos,
    "tokenizer_prepends_bos": lambda model: model.tokenizer_prepends_bos,
    "initializer_cfg": _initializer,
}


class LensConfig:
    """``model.cfg``: the configuration under MambaLens's names, read-only.

    ===============================================  =======================================================
    ``d_model``, ``D``                               width of the residual stream
    ``n_layers``, ``n_layer``                        number of blocks
    ``d_inner``, ``E``                               width inside a block, ``expand`` times ``d_model``
    ``d_state``, ``N``                               size of the state of each of the E channels
    ``dt_rank``, ``D_delta``                         width of ``delta_1``
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
    def huggingface(self) -> Any:
        """The Hugging Face configuration behind the view, ``model.config``."""
        return self._model.config

    def to_dict(self) -> dict[str, Any]:
        """Every name with its current value; ``initializer_cfg`` as a dict.

        Example::

            MambaTrace.demo().cfg.to_dict()["d_model"]  # 64
        """
        values = {name: read(self._model) for name, read in READ.items()}
        return values | {"initializer_cfg": values["initializer_cfg"]._asdict()}

    def __getattr__(self, name: str) -> Any:
        if name in READ:
            return READ[name](self._model)
        raise AttributeError(f"model.cfg has no {name!r}{self._instead(name)}. It has: {', '.join(READ)}")

    def _instead(self, name: str) -> str:
        if name in ABSENT:
            return f": {ABSENT[name]}"
        if hasattr(self._model.config, name) and not name.startswith("_"):
            return f", a Hugging Face name: it is model.config.{name}"
        return nearest(name, list(READ))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"model.cfg.{name} cannot be set: model.cfg only shows what model.config and the parameters are. "
            f"{_way_out(name)}"
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __contains__(self, name: object) -> bool:
        return name in READ

    def __iter__(self) -> Iterator[str]:
        return iter(READ)

    def __dir__(self) -> list[str]:
        return [*READ, "huggingface", "to_dict"]

    def __repr__(self) -> str:
        lines = (f"  {name}: {value!r}" for name, value in self.to_dict().items())
        return "\n".join(["LensConfig, a view of model.config:", *lines])


def _way_out(name: str) -> str:
    if name == "default_prepend_bos":
        return "Set model.default_prepend_bos"
    if name in ("device", "dtype"):
        return f"Load the model with {name}=..., or move it with model.to(...)"
    return "Make a model of another size with MambaTrace.from_config"
