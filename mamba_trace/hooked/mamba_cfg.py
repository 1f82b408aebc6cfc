"""Configurations and state dicts as MambaLens's functions take and return them.

Contract: the conversions are those of `mamba_trace.conversion`, under MambaLens's names with its arguments;
`MambaCfg` has the fields and defaults of MambaLens's, and converts back to what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..conversion import convert_config, convert_state_dict
from .cfg import LensConfig

# -- configurations ----------------------------------------------------------------------------------------


def best_device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class MambaInitCfg:
    """How a model is initialised: MambaLens's names, with the values of Mamba's authors.

    ``n_residuals_per_layer`` is how often a layer adds to the residual stream; ``dt_init`` is ``"random"`` or
    ``"constant"``.
    """

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    n_residuals_per_layer: int = 1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4


@dataclass
class _Fields:
    d_model: int
    n_layers: int
    vocab_size: int
    d_state: int = 16
    expand: int = 2
    dt_rank: int | str = "auto"
    d_conv: int = 4
    pad_vocab_size_multiple: int = 8
    conv_bias: bool = True
    bias: bool = False
    default_prepend_bos: bool = True
    tokenizer_prepends_bos: bool = False
    n_ctx: int = 2048
    device: torch.device | str = field(default_factory=best_device)
    initializer_cfg: MambaInitCfg = field(default_factory=MambaInitCfg)
    d_inner: int = -1
    mamba_trace_source: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.initializer_cfg, Mapping):
            self.initializer_cfg = MambaInitCfg(**self.initializer_cfg)
        if self.d_inner == -1:
            self.d_inner = int(self.expand * self.d_model)
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple


class MambaCfg(_Fields):
    """The configuration of a model: MambaLens's names and defaults, with sizes completed when it is made.

    ``dt_rank="auto"`` becomes ceil(d_model / 16), ``d_inner=-1`` becomes expand times d_model, and
    ``vocab_size`` is padded. ``n_layer`` and ``initializer_config``, the names in MambaLens's README, are
    accepted for ``n_layers`` and ``initializer_cfg``. ``device`` is a GPU where there is one.

    Example::

        cfg = MambaCfg(d_model=64, n_layers=2, vocab_size=100)
        model = HookedMamba(cfg=cfg, initialize_params=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for theirs, ours in (("n_layer", "n_layers"), ("initializer_config", "initializer_cfg")):
            if kwargs.get(theirs) is not None:
                kwargs[ours] = kwargs[theirs]
            kwargs.pop(theirs, None)
        super().__init__(*args, **kwargs)

    n_layer = property(lambda self: self.n_layers)
    D = property(lambda self: self.d_model)
    E = property(lambda self: self.d_inner)
    N = property(lambda self: self.d_state)
    D_delta = property(lambda self: self.dt_rank)
    D_conv = property(lambda self: self.d_conv)
    V = property(lambda self: self.vocab_size)


def plain(cfg: Any) -> Any:
    """A configuration that can be converted: the one behind ``model.cfg``, or ``cfg`` itself."""
    return cfg.huggingface if isinstance(cfg, LensConfig) else cfg


def convert_original_config_to_hooked_mamba_config(cfg: Any, device: Any = None) -> MambaCfg:
    """A new `MambaCfg`, which keeps what it has no field for: converted back, it is ``cfg`` again.

    Args:
        cfg: the ``config.json`` of state-spaces/mamba as a dict, or a configuration in any other format.
        device: the device of the model to be made; a GPU where there is one.

    Raises:
        CheckpointError: if it is not the configuration of a Mamba-1.

    Example::

        convert_original_config_to_hooked_mamba_config({"d_model": 64, "n_layer": 2, "vocab_size": 100})
    """
    if isinstance(cfg, MambaCfg):
        return cfg
    converted = convert_config(plain(cfg), "mamba_lens")
    known = {each.name: converted[each.name] for each in fields(MambaCfg) if each.name in converted}
    return MambaCfg(**known | {"device": best_device() if device is None else device})


def convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg: Any) -> dict[str, Any]:
    """The configuration in the original format, which state-spaces/mamba's own code takes.

    Args:
        hooked_mamba_cfg: ``model.cfg``, or a `MambaCfg`.

    Raises:
        CheckpointError: if it is not the configuration of a Mamba-1.

    Example::

        convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg=model.cfg)["n_layer"]
    """
    return convert_config(plain(hooked_mamba_cfg), "original", keep_source=False)


# -- state dicts -------------------------------------------------------------------------------------------


def convert_original_state_dict_to_hooked_state_dict(
    cfg: Any = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A new state dict with the same values under MambaLens's names, in_proj and x_proj split.

    Args:
        cfg: not needed; a state dict given here is converted.
        state_dict: in the original format, or Hugging Face's.

    Raises:
        CheckpointError: if keys or shapes do not fit together.

    Example::

        convert_original_state_dict_to_hooked_state_dict(original)["blocks.0.W_B.weight"]  # [N,E]
    """
    return convert_state_dict(cfg if state_dict is None else state_dict, "mamba_lens")


def convert_hooked_state_dict_to_original_state_dict(
    cfg: Any = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A new state dict with the same values under the original names, in_proj and x_proj joined.

    Args:
        cfg: not needed; a state dict given here is converted.
        state_dict: under MambaLens's names: ``model.state_dict()`` of a `HookedMamba`.

    Raises:
        CheckpointError: if keys or shapes do not fit together.

    Example::

        convert_hooked_state_dict_to_original_state_dict(cfg=model.cfg, state_dict=model.state_dict())
    """
    return convert_state_dict(cfg if state_dict is None else state_dict, "original")
