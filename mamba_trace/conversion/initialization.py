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

Contract: `initialize` draws in float32 on the CPU from a generator of its own, parameter by parameter in the
model's order, and casts. The result depends on the config and the seed only, whatever the model's dtype and
devices, and the global random state is neither read nor changed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from ..errors import InitializationError

Draw = Callable[[Tensor, MambaConfig, torch.Generator], Tensor]


def initialize(model: MambaForCausalLM, *, seed: int, n_residuals_per_layer: int = 1) -> None:
    """Initialise every parameter of a Mamba in place, as state-spaces/mamba does.

    Args:
        model: has parameters of any dtype on any device but meta; their values do not matter. Its config
            gives the settings initializer_range, rescale_prenorm_residual and time_step_*.
        seed: equal seeds give equal parameters.
        n_residuals_per_layer: how many times each layer adds to the residual stream; 2 if it had an MLP.

    Raises:
        InitializationError: parameters on the meta device, a setting out of its range, or a parameter that
            Mamba does not have. The model is left as it was.

    >>> model = MambaForCausalLM(MambaConfig(num_hidden_layers=2))    # doctest: +SKIP
    >>> initialize(model, seed=0)                                     # doctest: +SKIP
    """
    config = model.config
    _check(config, n_residuals_per_layer)
    parameters = list(model.named_parameters())  # a tied lm_head is listed once, as the embedding
    draws = [_draw_for(name, parameter) for name, parameter in parameters]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rescale = math.sqrt(n_residuals_per_layer * config.num_hidden_layers)
    with torch.no_grad():
        for (name, parameter), draw in zip(parameters, draws, strict=True):
            value = draw(torch.empty(parameter.shape, dtype=torch.float32, device="cpu"), config, generator)
            if name.endswith("out_proj.weight") and config.rescale_prenorm_residual:
                value /= rescale
            parameter.copy_(value)


def _check(config: MambaConfig, n_residuals_per_layer: int) -> None:
    """Raise for a setting that has no meaning."""
    low, high, floor = config.time_step_min, config.time_step_max, config.time_step_floor
    scheme, spread, problem = config.time_step_init_scheme, config.initializer_range, ""
    if not 0 < low <= high:
        problem = f"0 < time_step_min <= time_step_max is needed, found {low} and {high}"
    elif floor <= 0:
        problem = f"time_step_floor must be positive, found {floor}"
    elif scheme not in ("random", "constant"):
        problem = f"time_step_init_scheme must be 'random' or 'constant', found {scheme!r}"
    elif spread < 0:
        problem = f"initializer_range must not be negative, found {spread}"
    elif n_residuals_per_layer < 1:
        problem = f"n_residuals_per_layer must be at least 1, found {n_residuals_per_layer}"
    if problem:
        raise InitializationError(problem)


def _draw_for(name: str, parameter: nn.Parameter) -> Draw:
    """The function that draws a parameter, by the end of its name."""
    if parameter.is_meta:
        raise InitializationError(f"{name} is on the meta device: call model.to_empty(device=...) first")
    for suffix, draw in DRAWS.items():
        if name.endswith(suffix):
            return draw
    raise InitializationError(f"{name} is not a parameter of Mamba; those end in {', '.join(DRAWS)}")


def _fan_in(empty: Tensor, config: MambaConfig, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def _within(empty: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return nn.init.uniform_(empty, -bound, bound, generator=generator)


def _dt_weight(empty: Tensor, config: MambaConfig, generator: torch.Generator) -> Tensor:
    size = int(config.time_step_rank) ** -0.5 * config.time_step_scale
    constant = config.time_step_init_scheme == "constant"
    return empty.fill_(size) if constant else _within(empty, size, generator)


def _dt_bias(empty: Tensor, config: MambaConfig, generator: torch.Generator) -> Tensor:
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = empty.uniform_(0, 1, generator=generator).mul_(high - low).add_(low).exp_()  # [E]
    dt = dt.clamp_(min=config.time_step_floor)
    return dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt


def _a_log(empty: Tensor, config: MambaConfig, generator: torch.Generator) -> Tensor:
    N = empty.shape[1]
    return torch.arange(1, N + 1, dtype=torch.float32, device=empty.device).log().expand_as(empty)  # [E,N]


def _ones(empty: Tensor, config: MambaConfig, generator: torch.Generator) -> Tensor:
    return empty.fill_(1)


DRAWS: dict[str, Draw] = {
    "embeddings.weight": lambda empty, config, g: empty.normal_(std=config.initializer_range, generator=g),
    "lm_head.weight": _fan_in,
    "norm.weight": _ones,
    "norm_f.weight": _ones,
    "mixer.A_log": _a_log,
    "mixer.D": _ones,
    "conv1d.weight": _fan_in,
    "conv1d.bias": lambda empty, config, g: _within(empty, 1 / math.sqrt(config.conv_kernel), g),
    "in_proj.weight": _fan_in,
    "in_proj.bias": lambda empty, config, g: empty.zero_(),
    "x_proj.weight": _fan_in,
    "dt_proj.weight": _dt_weight,
    "dt_proj.bias": _dt_bias,
    "out_proj.weight": _fan_in,
    "out_proj.bias": lambda empty, config, g: empty.zero_(),
}
