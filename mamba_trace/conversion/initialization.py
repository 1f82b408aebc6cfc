"""A Mamba trained from scratch learns only if it starts where Mamba's authors start it.

transformers' own initialisation differs from theirs (conv biases of zero, no n_residuals_per_layer), and
takes its numbers from the global random state. Here every parameter starts as in state-spaces/mamba
(mamba_ssm/modules/mamba_simple.py and models/mixer_seq_simple.py; section 3.6 of arXiv:2312.00752 for delta):

    embeddings            normal, standard deviation initializer_range; a tied lm_head is the same parameter
    Linear, conv1d        uniform within 1/sqrt(fan_in), torch's default; conv1d is depthwise: d_conv
    out_proj.weight       the same, over sqrt(n_residuals_per_layer * n_layer) if rescale_prenorm_residual
    biases of Linear      0
    conv1d.bias           uniform within 1/sqrt(d_conv), torch's default, which the original leaves alone
    dt_proj.weight        uniform within, or constantly, R**-0.5 * dt_scale (dt_init "random" or "constant")
    dt_proj.bias          softplus^-1(dt), dt log-uniform in [dt_min, dt_max], at least dt_init_floor
    A_log                 log(1 .. N) in every channel
    D, norms              1

and in Mamba-2 (mamba_ssm/modules/mamba2.py), which has no x_proj and dt_proj:

    dt_bias               as dt_proj.bias, one number for each head
    A_log                 log(a), a uniform in A_init_range, [1, 16] by default; transformers has log(1 .. H)
    conv1d.weight         uniform within conv_init, if that is set

Contract: `initialize` draws in float32 on the CPU from a generator of its own, parameter by parameter in the
model's order, and casts. The result depends on the config and the seed only, whatever the model's dtype and
devices, and the global random state is neither read nor changed.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InitializationError
from .config_fields import FIELDS_OF, UNNAMED

Draw = Callable[[Tensor, Any, torch.Generator], Tensor]


def initialize(model: PreTrainedModel, *, seed: int, **unnamed: Any) -> None:
    """Initialise every parameter of a Mamba in place, as state-spaces/mamba does.

    Args:
        model: has parameters of any dtype on any device but meta; their values do not matter. Its config
            gives the settings initializer_range, rescale_prenorm_residual and time_step_*.
        seed: equal seeds give equal parameters.
        **unnamed: settings that its config has no field for: ``n_residuals_per_layer``, how many times each
            layer adds to the residual stream, 1 if not given, and in Mamba-2 ``A_init_range`` and ``conv_init``.

    Raises:
        InitializationError: parameters on the meta device, a setting out of its range, or a parameter that
            Mamba does not have. The model is left as it was.

    >>> model = MambaForCausalLM(MambaConfig(num_hidden_layers=2))    # doctest: +SKIP
    >>> initialize(model, seed=0)                                     # doctest: +SKIP
    """
    settings = _settings(model.config, unnamed)
    _check(settings)
    parameters = list(model.named_parameters())  # a tied lm_head is listed once, as the embedding
    draws = [_draw_for(name, parameter, DRAWS_OF[settings.model_type]) for name, parameter in parameters]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rescale = math.sqrt(settings.n_residuals_per_layer * settings.num_hidden_layers)
    with torch.no_grad():
        for (name, parameter), draw in zip(parameters, draws, strict=True):
            value = draw(torch.empty(parameter.shape, dtype=torch.float32, device="cpu"), settings, generator)
            if name.endswith("out_proj.weight") and settings.rescale_prenorm_residual:
                value /= rescale
            parameter.copy_(value)


def _settings(config: Any, unnamed: Mapping[str, Any]) -> SimpleNamespace:
    """The values in the table of an architecture: from its config, or else from ``unnamed``, or the default."""
    fields = FIELDS_OF[config.model_type]
    if unknown := unnamed.keys() - {field.name for field in fields if field.name in UNNAMED}:
        raise InitializationError(f"the initialisation of a {config.model_type} has no {', '.join(sorted(unknown))}")
    values = {
        field.name: unnamed.get(field.name, field.default) if field.name in UNNAMED else getattr(config, field.name)
        for field in fields
    }
    return SimpleNamespace(model_type=config.model_type, **values)


def _check(settings: Any) -> None:
    """Raise for a setting that has no meaning."""
    low, high, floor = settings.time_step_min, settings.time_step_max, settings.time_step_floor
    scheme, spread, problem = getattr(settings, "time_step_init_scheme", "random"), settings.initializer_range, ""
    a_low, a_high = getattr(settings, "A_init_range", (1, 16))
    if not 0 < low <= high:
        problem = f"0 < time_step_min <= time_step_max is needed, found {low} and {high}"
    elif floor <= 0:
        problem = f"time_step_floor must be positive, found {floor}"
    elif scheme not in ("random", "constant"):
        problem = f"time_step_init_scheme must be 'random' or 'constant', found {scheme!r}"
    elif spread < 0:
        problem = f"initializer_range must not be negative, found {spread}"
    elif settings.n_residuals_per_layer < 1:
        problem = f"n_residuals_per_layer must be at least 1, found {settings.n_residuals_per_layer}"
    elif not 0 < a_low <= a_high:
        problem = f"A_init_range needs 0 < low <= high, found {a_low} and {a_high}"
    if problem:
        raise InitializationError(problem)


def _draw_for(name: str, parameter: nn.Parameter, draws: Mapping[str, Draw]) -> Draw:
    """The function that draws a parameter, by the end of its name."""
    if parameter.is_meta:
        raise InitializationError(f"{name} is on the meta device: call model.to_empty(device=...) first")
    for suffix, draw in draws.items():
        if name.endswith(suffix):
            return draw
    raise InitializationError(f"{name} is not a parameter of Mamba; those end in {', '.join(draws)}")


def _fan_in(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def _within(empty: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return nn.init.uniform_(empty, -bound, bound, generator=generator)


def _dt_weight(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    size = int(config.time_step_rank) ** -0.5 * config.time_step_scale
    constant = config.time_step_init_scheme == "constant"
    return empty.fill_(size) if constant else _within(empty, size, generator)


def _dt_bias(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = empty.uniform_(0, 1, generator=generator).mul_(high - low).add_(low).exp_()  # [E]
    dt = dt.clamp_(min=config.time_step_floor)
    return dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt


def _a_log(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    N = empty.shape[1]
    return torch.arange(1, N + 1, dtype=torch.float32, device=empty.device).log().expand_as(empty)  # [E,N]


def _a_log_by_head(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    return empty.uniform_(*config.A_init_range, generator=generator).log_()  # [H]


def _conv(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    bound = getattr(config, "conv_init", None)
    return _fan_in(empty, config, generator) if bound is None else _within(empty, bound, generator)


def _ones(empty: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    return empty.fill_(1)


DRAWS: dict[str, Draw] = {
    "embeddings.weight": lambda empty, config, g: empty.normal_(std=config.initializer_range, generator=g),
    "lm_head.weight": _fan_in,
    "norm.weight": _ones,
    "norm_f.weight": _ones,
    "mixer.A_log": _a_log,
    "mixer.D": _ones,
    "conv1d.weight": _conv,
    "conv1d.bias": lambda empty, config, g: _within(empty, 1 / math.sqrt(config.conv_kernel), g),
    "in_proj.weight": _fan_in,
    "in_proj.bias": lambda empty, config, g: empty.zero_(),
    "x_proj.weight": _fan_in,
    "dt_proj.weight": _dt_weight,
    "dt_proj.bias": _dt_bias,
    "out_proj.weight": _fan_in,
    "out_proj.bias": lambda empty, config, g: empty.zero_(),
}
DRAWS_OF: dict[str, dict[str, Draw]] = {
    "mamba": DRAWS,
    "falcon_mamba": DRAWS,
    "mamba2": {name: draw for name, draw in DRAWS.items() if "x_proj" not in name and "dt_proj" not in name}
    | {"mixer.A_log": _a_log_by_head, "mixer.dt_bias": _dt_bias},
}
