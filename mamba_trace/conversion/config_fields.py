"""Every value of a Mamba's configuration has another name and another place in each format.

Contract: FIELDS is the one table of these values: for each its place in every format, its type, and the
default that applies where a configuration leaves it out. The table is data; config_formats.py reads and
writes configurations by it. While values travel from one format to another they are keyed by their Hugging
Face names; only N_RESIDUALS has no field there. LENS_ALIASES adds the second names that `model.cfg` knows for
some fields.
"""

from typing import Any, NamedTuple

FORMATS = ("original", "huggingface", "mamba_lens")
N_RESIDUALS = "n_residuals_per_layer"
REQUIRED = object()
MOST_LAYERS = 4096  # a MambaConfig lists its layers one by one, and transformers takes 30 ms to build each
KeyPath = tuple[str, ...]
Config = dict[str, Any]


class Field(NamedTuple):
    """One value of a configuration.

    Attributes:
        name: its Hugging Face name.
        original, mamba_lens: the keys that lead to it in those formats; None if the format has no place for
            it.
        default: what it is where a configuration leaves it out, or REQUIRED.
        kind: int for a whole number of at least 1, bool, float, or str for the time steps' initialisation
            scheme.
    """

    name: str
    original: KeyPath
    mamba_lens: KeyPath | None
    default: Any
    kind: type

    def path(self, format: str) -> KeyPath | None:
        """The keys that lead to this value in a configuration of `format`; None if it has no place there."""
        if format == "huggingface":
            return None if self.name == N_RESIDUALS else (self.name,)
        return self.original if format == "original" else self.mamba_lens


def _ssm(name: str, key: str, default: Any, kind: type) -> Field:
    return Field(name, ("ssm_cfg", key), (key,), default, kind)


def _time_step(name: str, key: str, default: Any, kind: type = float) -> Field:
    return Field(name, ("ssm_cfg", key), ("initializer_cfg", key), default, kind)


def _initializer(name: str, default: Any, kind: type) -> Field:
    return Field(name, ("initializer_cfg", name), ("initializer_cfg", name), default, kind)


FIELDS = (
    Field("hidden_size", ("d_model",), ("d_model",), REQUIRED, int),
    Field("num_hidden_layers", ("n_layer",), ("n_layers",), REQUIRED, int),
    Field("vocab_size", ("vocab_size",), ("vocab_size",), REQUIRED, int),
    _ssm("state_size", "d_state", 16, int),
    _ssm("conv_kernel", "d_conv", 4, int),
    _ssm("expand", "expand", 2, int),
    _ssm("time_step_rank", "dt_rank", "auto", int),
    _ssm("use_bias", "bias", False, bool),
    _ssm("use_conv_bias", "conv_bias", True, bool),
    Field("residual_in_fp32", ("residual_in_fp32",), None, True, bool),
    Field("tie_word_embeddings", ("tie_embeddings",), None, True, bool),
    Field("layer_norm_epsilon", ("norm_epsilon",), None, 1e-5, float),
    _time_step("time_step_init_scheme", "dt_init", "random", str),
    _time_step("time_step_scale", "dt_scale", 1.0),
    _time_step("time_step_min", "dt_min", 0.001),
    _time_step("time_step_max", "dt_max", 0.1),
    _time_step("time_step_floor", "dt_init_floor", 1e-4),
    _initializer("initializer_range", 0.02, float),
    _initializer("rescale_prenorm_residual", True, bool),
    _initializer(N_RESIDUALS, 1, int),
)

#: Further names that `model.cfg` has for a field, as MambaLens does, with Hugging Face's name of it.
LENS_ALIASES = {
    "n_layer": "num_hidden_layers",
    "d_inner": "intermediate_size",
    "d_vocab": "vocab_size",
    "eps": "layer_norm_epsilon",
    "D": "hidden_size",
    "E": "intermediate_size",
    "N": "state_size",
    "D_delta": "time_step_rank",
    "D_conv": "conv_kernel",
    "V": "vocab_size",
}

# What state-spaces' Mamba-1 block accepts in ssm_cfg beyond the table; it has no bearing on any number.
HARMLESS_SSM_OPTIONS = {"layer", "use_fast_path", "layer_idx", "device", "dtype"}
