"""Every value of a Mamba's configuration has another name and another place in each format.

Contract: `fields_of` gives the table of these values for an architecture: for each value its place in every format,
its type, and the default that applies where a configuration leaves it out. A hybrid, which has Hugging Face's format
only, has a table of what is in all of them. The defaults are those of the
authors' mamba_ssm, never of Hugging Face's classes: a fresh Mamba2Config is a Codestral. The tables are data;
config_formats.py reads and writes configurations by them. While values travel from one format to another they
are keyed by their Hugging Face names; those in UNNAMED have no field there. LENS_ALIASES adds the second names
that `model.cfg` knows for some fields.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..modeling.architectures import BY_TYPE, Architecture

FORMATS = ("original", "huggingface", "mamba_lens")
N_RESIDUALS = "n_residuals_per_layer"
#: Settings of the initialisation that Hugging Face's configurations have no field for.
UNNAMED = (N_RESIDUALS, "A_init_range", "conv_init")
REQUIRED = object()
MOST_LAYERS = 4096  # a MambaConfig lists its layers one by one, and transformers takes 30 ms to build each
KeyPath = tuple[str, ...]
Config = dict[str, Any]


class Field(NamedTuple):
    """One value of a configuration.

    Attributes:
        name: its Hugging Face name.
        original, mamba_lens: the keys that lead to it in those formats; None if the format has no place for
            it. The last key of ``mamba_lens`` is also its name in `model.cfg`, for all model types.
        default: what it is where a configuration leaves it out, or REQUIRED.
        kind: int for a whole number of at least 1, bool, float, tuple for a pair of numbers in order,
            ``float | None``, or str for the time steps' initialisation scheme.
    """

    name: str
    original: KeyPath | None
    mamba_lens: KeyPath | None
    default: Any
    kind: Any

    def path(self, format: str) -> KeyPath | None:
        """The keys that lead to this value in a configuration of `format`; None if it has no place there."""
        if format == "huggingface":
            return None if self.name in UNNAMED else (self.name,)
        return self.original if format == "original" else self.mamba_lens


def _ssm(name: str, key: str, default: Any, kind: Any, lens: str = "") -> Field:
    return Field(name, ("ssm_cfg", key), (lens or key,), default, kind)


def _time_step(name: str, key: str, default: Any, kind: Any = float) -> Field:
    return Field(name, ("ssm_cfg", key), ("initializer_cfg", key), default, kind)


def _initializer(name: str, default: Any, kind: Any) -> Field:
    return Field(name, ("initializer_cfg", name), ("initializer_cfg", name), default, kind)


_SIZES = (
    Field("hidden_size", ("d_model",), ("d_model",), REQUIRED, int),
    Field("num_hidden_layers", ("n_layer",), ("n_layers",), REQUIRED, int),
    Field("vocab_size", ("vocab_size",), ("vocab_size",), REQUIRED, int),
)
_BIASES = (_ssm("use_bias", "bias", False, bool), _ssm("use_conv_bias", "conv_bias", True, bool))
_MODEL = (
    Field("residual_in_fp32", ("residual_in_fp32",), None, True, bool),
    Field("tie_word_embeddings", ("tie_embeddings",), None, True, bool),
    Field("layer_norm_epsilon", ("norm_epsilon",), None, 1e-5, float),
)
_TIME_STEPS = (
    _time_step("time_step_min", "dt_min", 0.001),
    _time_step("time_step_max", "dt_max", 0.1),
    _time_step("time_step_floor", "dt_init_floor", 1e-4),
)
_INITIALIZER = (
    _initializer("initializer_range", 0.02, float),
    _initializer("rescale_prenorm_residual", True, bool),
    _initializer(N_RESIDUALS, 1, int),
)
FIELDS = (
    *_SIZES,
    _ssm("state_size", "d_state", 16, int),
    _ssm("conv_kernel", "d_conv", 4, int),
    _ssm("expand", "expand", 2, int),
    _ssm("time_step_rank", "dt_rank", "auto", int),
    *_BIASES,
    *_MODEL,
    _time_step("time_step_init_scheme", "dt_init", "random", str),
    _time_step("time_step_scale", "dt_scale", 1.0),
    *_TIME_STEPS,
    *_INITIALIZER,
)
FIELDS_OF: dict[str, tuple[Field, ...]] = {
    "mamba": FIELDS,
    "falcon_mamba": (*FIELDS, Field("mixer_rms_eps", None, ("inner_eps",), 1e-6, float)),
    "mamba2": (
        *_SIZES,
        _ssm("state_size", "d_state", 128, int),
        _ssm("conv_kernel", "d_conv", 4, int),
        _ssm("expand", "expand", 2, int),
        _ssm("head_dim", "headdim", 64, int, lens="d_head"),
        Field("num_heads", None, ("n_heads",), REQUIRED, int),  # expand * d_model / headdim
        _ssm("n_groups", "ngroups", 1, int, lens="n_groups"),
        _ssm("chunk_size", "chunk_size", 256, int),
        _ssm("time_step_limit", "dt_limit", (0.0, math.inf), tuple),
        *_BIASES,
        *_MODEL,
        *_TIME_STEPS,
        _time_step("A_init_range", "A_init_range", (1.0, 16.0), tuple),
        _time_step("conv_init", "conv_init", None, float | None),
        *_INITIALIZER,
    ),
}

#: What the configurations of all hybrids have; transformers checks what else is in them.
FIELDS_OF_HYBRIDS = (
    Field("hidden_size", None, ("d_model",), REQUIRED, int),
    Field("vocab_size", None, ("vocab_size",), REQUIRED, int),
    Field("tie_word_embeddings", None, None, False, bool),
)

#: Stands for the width inside a block, which not all of Hugging Face's configurations have a field for.
INNER_WIDTH = "E"
#: Further names that `model.cfg` has for a field, as MambaLens does, with Hugging Face's name of it.
LENS_ALIASES = {
    "n_layer": "num_hidden_layers",
    "d_inner": INNER_WIDTH,
    "d_vocab": "vocab_size",
    "eps": "layer_norm_epsilon",
    "D": "hidden_size",
    "E": INNER_WIDTH,
    "N": "state_size",
    "D_delta": "time_step_rank",
    "D_conv": "conv_kernel",
    "V": "vocab_size",
    "H": "num_heads",
    "P": "head_dim",
    "G": "n_groups",
}
#: Names of `model.cfg` that tell the configuration of another model type than Mamba-1's.
NOT_OF_MAMBA_LENS = {"n_heads": "Mamba-2", "inner_eps": "Falcon-Mamba"}

# What state-spaces' blocks accept in ssm_cfg beyond the tables, by model type; it has no bearing on any number.
HARMLESS_SSM_OPTIONS = {
    "mamba": {"layer", "use_fast_path", "layer_idx", "device", "dtype"},
    "mamba2": {"layer", "use_mem_eff_path", "sequence_parallel", "layer_idx", "device", "dtype"},
}
# The options of state-spaces' Mamba-2 with another value than this one make a model that Hugging Face's is not.
ONLY_SSM_OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "mamba": {},
    "mamba2": {
        "rmsnorm": (True, "the mixer has no norm of its own"),
        "norm_before_gate": (False, "the mixer's norm comes before the gate"),
        "D_has_hdim": (False, "D has a number for each channel, and not for each head"),
        "process_group": (None, "the weights are spread over several processes"),
    },
}

#: ssm_cfg.layer of the original format, and the model type; a configuration without it is the first.
LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}


def architecture_in(format: str, raw: Mapping[str, Any]) -> Architecture:
    """The architecture that a plain configuration of a format describes.

    A layer of the original format that has none counts as Mamba-1, whose `read` refuses it by its name.
    """
    if format == "huggingface":
        return BY_TYPE[raw.get("model_type", "mamba")]
    layer = layer_in(raw) if format == "original" else None
    return BY_TYPE[LAYERS.get(layer, "mamba") if isinstance(layer, str) else "mamba"]


def layer_in(raw: Mapping[str, Any]) -> Any:
    """The layer that a configuration of the original format names; ``"Mamba1"`` if it names none."""
    ssm = raw.get("ssm_cfg")
    return ssm.get("layer", "Mamba1") if isinstance(ssm, Mapping) else "Mamba1"


def fields_of(architecture: Architecture) -> tuple[Field, ...]:
    """The table of the values of an architecture's configurations."""
    return FIELDS_OF_HYBRIDS if architecture.hybrid else FIELDS_OF[architecture.model_type]


def ssm_options(architecture: Architecture) -> set[str]:
    """The options that ssm_cfg of the original format has for an architecture."""
    model_type = architecture.model_type
    paths = (field.original for field in fields_of(architecture))
    known = {path[1] for path in paths if path and path[0] == "ssm_cfg"}
    known |= HARMLESS_SSM_OPTIONS[model_type] | ONLY_SSM_OPTIONS[model_type].keys()
    return known | ({"d_ssm"} if model_type == "mamba2" else set())


def aliases_of(architecture: Architecture) -> dict[str, str]:
    """The `LENS_ALIASES` whose field the architecture has."""
    ours = {INNER_WIDTH, *(field.name for field in fields_of(architecture))}
    return {name: theirs for name, theirs in LENS_ALIASES.items() if theirs in ours}
