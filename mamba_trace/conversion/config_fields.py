"""The same value has another name and place in each format of configuration.

Contract: FIELDS lists every value that a Mamba's configurations share, with its place in each format and what
leaving it out means. It is data: config_formats.py reads and writes by it. Values on their way from one
format to another are keyed by their Hugging Face names; N_RESIDUALS is the only one that has no field there.
"""

from typing import Any, NamedTuple

FORMATS = ("original", "huggingface", "mamba_lens")
EXPECTED = (
    "original: d_model, n_layer and vocab_size, no model_type; huggingface: model_type 'mamba'; "
    "mamba_lens: d_model, n_layers and vocab_size"
)
N_RESIDUALS = "n_residuals_per_layer"
DT_INIT = ("random", "constant")
KeyPath = tuple[str, ...]
Config = dict[str, Any]


class Field(NamedTuple):
    """One value: its Hugging Face name, its place in the other formats, and what leaving it out means."""

    name: str
    original: KeyPath
    mamba_lens: KeyPath | None
    default: Any

    def path(self, format: str) -> KeyPath | None:
        """The keys that lead to this value in a configuration of `format`; None where it has no place."""
        if format == "huggingface":
            return None if self.name == N_RESIDUALS else (self.name,)
        return self.original if format == "original" else self.mamba_lens


def _ssm(name: str, key: str, default: Any) -> Field:
    return Field(name, ("ssm_cfg", key), (key,), default)


def _time_step(name: str, key: str, default: Any) -> Field:
    return Field(name, ("ssm_cfg", key), ("initializer_cfg", key), default)


def _initializer(name: str, default: Any) -> Field:
    return Field(name, ("initializer_cfg", name), ("initializer_cfg", name), default)


REQUIRED = object()
FIELDS = (
    Field("hidden_size", ("d_model",), ("d_model",), REQUIRED),
    Field("num_hidden_layers", ("n_layer",), ("n_layers",), REQUIRED),
    Field("vocab_size", ("vocab_size",), ("vocab_size",), REQUIRED),
    _ssm("state_size", "d_state", 16),
    _ssm("conv_kernel", "d_conv", 4),
    _ssm("expand", "expand", 2),
    _ssm("time_step_rank", "dt_rank", "auto"),
    _ssm("use_bias", "bias", False),
    _ssm("use_conv_bias", "conv_bias", True),
    Field("residual_in_fp32", ("residual_in_fp32",), None, True),
    Field("tie_word_embeddings", ("tie_embeddings",), None, True),
    Field("layer_norm_epsilon", ("norm_epsilon",), None, 1e-5),
    _time_step("time_step_init_scheme", "dt_init", "random"),
    _time_step("time_step_scale", "dt_scale", 1.0),
    _time_step("time_step_min", "dt_min", 0.001),
    _time_step("time_step_max", "dt_max", 0.1),
    _time_step("time_step_floor", "dt_init_floor", 1e-4),
    _initializer("initializer_range", 0.02),
    _initializer("rescale_prenorm_residual", True),
    _initializer(N_RESIDUALS, 1),
)
POSITIVE_INTS: tuple[str, ...] = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "state_size",
    "conv_kernel",
    "expand",
    "time_step_rank",
    N_RESIDUALS,
)
BOOLS = (
    "use_bias",
    "use_conv_bias",
    "residual_in_fp32",
    "tie_word_embeddings",
    "rescale_prenorm_residual",
)
MOST_LAYERS = 4096  # a configuration lists its layers one by one, and building one takes 30 ms
FLOATS = (
    "layer_norm_epsilon",
    "initializer_range",
    "time_step_scale",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
)

# What state-spaces' Mamba-1 block accepts in ssm_cfg beyond the table, with no bearing on its numbers.
HARMLESS_SSM_OPTIONS = {"layer", "use_fast_path", "layer_idx", "device", "dtype"}
