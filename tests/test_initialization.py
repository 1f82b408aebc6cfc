"""From-scratch initialisation: its distributions, bounds and constants; nothing else is disturbed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from mamba_trace import MambaTrace
from mamba_trace.conversion.initialization import initialize
from mamba_trace.errors import InitializationError

E, D, N, R, K = 2048, 1024, 8, 64, 4  # many channels: these are tests of distributions


def model_of(**changes: Any) -> MambaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": D, "state_size": N, "conv_kernel": K, "num_hidden_layers": 1}
    return MambaForCausalLM(MambaConfig(**{"vocab_size": 160, **sizes, **changes}))


def small(**changes: Any) -> MambaForCausalLM:
    return model_of(**{"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 3, **changes})


def initialized(model: MambaForCausalLM, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """The parameters after initialisation, which must not have depended on what they were before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    initialize(model, seed=seed, **options)
    return model.state_dict()


def mixer(weights: dict[str, Tensor], name: str, layer: int = 0) -> Tensor:
    return weights[f"backbone.layers.{layer}.mixer.{name}"]


def ks_distance(sample: Tensor, cdf: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of a sample from a distribution whose cdf at the sample is given."""
    order = cdf.double().sort().values
    steps = torch.arange(1, sample.numel() + 1, dtype=torch.float64) / sample.numel()
    return float((order - steps).abs().max())


def assert_uniform(tensor: Tensor, bound: float) -> None:
    """Uniform in [-bound, bound]: within it, close to both ends, and KS distance below the 0.1% level."""
    values = tensor.flatten().double()
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert min(values.max(), -values.min()) > bound * (1 - 20 / values.numel())
    assert ks_distance(values, (values / bound + 1) / 2) < 1.95 / math.sqrt(values.numel())


@pytest.fixture(scope="module")
def large() -> dict[str, Tensor]:
    return initialized(model_of(use_bias=True, tie_word_embeddings=False, initializer_range=0.05))


def test_constants_are_those_of_transformers(large: dict[str, Tensor]) -> None:
    reference = model_of(use_bias=True, tie_word_embeddings=False).state_dict()
    names = ["backbone.norm_f.weight", "backbone.layers.0.norm.weight"]
    names += [f"backbone.layers.0.mixer.{name}" for name in ("A_log", "D", "in_proj.bias", "out_proj.bias")]
    for name in names:
        assert torch.equal(large[name], reference[name]), name
    assert torch.equal(mixer(large, "A_log")[7], torch.arange(1.0, N + 1).log())


def test_linear_and_conv_parameters_are_uniform_within_one_over_sqrt_fan_in(large: dict[str, Tensor]) -> None:
    assert_uniform(mixer(large, "in_proj.weight"), D**-0.5)
    assert_uniform(mixer(large, "x_proj.weight"), E**-0.5)
    assert_uniform(mixer(large, "out_proj.weight"), E**-0.5)
    assert_uniform(large["lm_head.weight"], D**-0.5)
    assert_uniform(mixer(large, "conv1d.weight"), K**-0.5)
    assert_uniform(mixer(large, "conv1d.bias"), K**-0.5)
    assert_uniform(mixer(large, "dt_proj.weight"), R**-0.5)


def test_conv_matches_what_torch_gives_a_fresh_conv1d(large: dict[str, Tensor]) -> None:
    fresh = torch.nn.Conv1d(E, E, K, groups=E)
    for name in ("weight", "bias"):
        found, expected = mixer(large, f"conv1d.{name}"), getattr(fresh, name).detach()
        assert abs(float(found.std() / expected.std()) - 1) < 0.05


def test_embeddings_are_normal(large: dict[str, Tensor]) -> None:
    values = large["backbone.embeddings.weight"].flatten().double()
    n = values.numel()
    assert abs(float(values.mean())) < 4 * 0.05 / math.sqrt(n)
    assert abs(float(values.std()) / 0.05 - 1) < 4 / math.sqrt(2 * n)
    cdf = 0.5 * (1 + torch.erf(values / (0.05 * math.sqrt(2))))
    assert ks_distance(values, cdf) < 1.95 / math.sqrt(n)


def test_dt_is_log_uniform() -> None:
    weights = initialized(model_of(time_step_min=0.002, time_step_max=0.3))
    dt = F.softplus(mixer(weights, "dt_proj.bias").double())  # [E]
    assert 0.002 * (1 - 1e-5) <= dt.min() < 0.00205
    assert 0.295 < dt.max() <= 0.3 * (1 + 1e-5)
    cdf = (dt.log() - math.log(0.002)) / math.log(0.3 / 0.002)
    assert ks_distance(dt, cdf) < 1.95 / math.sqrt(E)


def test_dt_has_a_floor() -> None:
    weights = initialized(model_of(time_step_floor=0.01))  # of dt in [0.001, 0.1]: half of the log-range
    dt = F.softplus(mixer(weights, "dt_proj.bias").double())
    assert dt.min() >= 0.01 * (1 - 1e-5)
    at_floor = float(((dt - 0.01).abs() < 1e-7).double().mean())
    assert abs(at_floor - 0.5) < 4 * 0.5 / math.sqrt(E)


def test_dt_weight_scales_and_can_be_constant() -> None:
    assert_uniform(mixer(initialized(model_of(time_step_scale=0.5)), "dt_proj.weight"), 0.5 * R**-0.5)
    constant = small(time_step_init_scheme="constant", time_step_scale=3.0, time_step_rank=4)
    assert torch.equal(mixer(initialized(constant), "dt_proj.weight"), torch.full((64, 4), 1.5))


@pytest.mark.parametrize("n_residuals", [1, 2])
def test_rescaling_divides_out_proj_only(n_residuals: int) -> None:
    plain = initialized(small(), n_residuals_per_layer=n_residuals)
    rescaled = initialized(small(rescale_prenorm_residual=True), n_residuals_per_layer=n_residuals)
    for name, tensor in plain.items():
        divisor = math.sqrt(n_residuals * 3) if "out_proj" in name else 1.0
        assert torch.equal(rescaled[name], tensor / divisor), name


def test_seed_decides() -> None:
    first, again, other = (initialized(small(), seed) for seed in (3, 3, 4))
    drawn = {"embeddings", "lm_head", "conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"}
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (not any(part in name for part in drawn)), name
    assert not torch.equal(mixer(first, "in_proj.weight", 0), mixer(first, "in_proj.weight", 1))


def test_global_random_state_is_neither_read_nor_changed() -> None:
    model = small()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = {name: tensor.clone() for name, tensor in initialized(model).items()}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = initialized(model)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_cast_of_float32(dtype: torch.dtype) -> None:
    expected, found = initialized(small()), initialized(torch.nn.Module.to(small(), dtype))
    for name, tensor in expected.items():
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_tied_embeddings_stay_tied() -> None:
    model = small(initializer_range=0.02)
    initialize(model, seed=0)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert abs(float(model.lm_head.weight.detach().std()) / 0.02 - 1) < 0.2


def test_a_fresh_model_is_close_to_uniform_and_finite() -> None:
    model = small(initializer_range=0.02).eval()
    initialize(model, seed=0)
    with torch.no_grad():
        loss = model(tokens := torch.arange(24)[None], labels=tokens).loss
    assert abs(float(loss) - math.log(24)) < 0.2


def test_what_cannot_be_initialized_is_said() -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(InitializationError, match=r"embeddings.weight is on the meta device: call model.to_empty"):
        initialize(model, seed=0)
    model = small()
    model.extra = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InitializationError, match=r"extra.weight is not a parameter of Mamba"):
        initialize(model, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for change, words in (
        ({"time_step_min": 0.2}, "0 < time_step_min <= time_step_max is needed, found 0.2 and 0.1"),
        ({"time_step_floor": 0.0}, "time_step_floor must be positive, found 0.0"),
        ({"initializer_range": -1.0}, "initializer_range must not be negative, found -1.0"),
    ):
        model = small()
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(InitializationError, match=words):
            initialize(model, seed=0)
    model = small()
    model.config.time_step_init_scheme = "zeros"
    with pytest.raises(InitializationError, match="must be 'random' or 'constant', found 'zeros'"):
        initialize(model, seed=0)
    with pytest.raises(InitializationError, match="n_residuals_per_layer must be at least 1, found 0"):
        initialize(small(), seed=0, n_residuals_per_layer=0)


# ---------------------------------------------------------------- the other architectures

H = 2048


def mamba2_of(**changes: Any) -> Mamba2ForCausalLM:
    """Many heads of one channel each, for the distributions of what there is one of in each head."""
    sizes = {"hidden_size": D, "num_heads": H, "head_dim": 1, "n_groups": 8, "state_size": N, "vocab_size": 160}
    return Mamba2ForCausalLM(Mamba2Config(**{**sizes, "num_hidden_layers": 1, **changes}))


@pytest.fixture(scope="module")
def large2() -> dict[str, Tensor]:
    return initialized(mamba2_of(use_bias=True, tie_word_embeddings=False, initializer_range=0.05))


def test_mamba2_has_uniform_projections_and_torch_convolutions(large2: dict[str, Tensor]) -> None:
    assert_uniform(mixer(large2, "in_proj.weight"), D**-0.5)
    assert_uniform(mixer(large2, "out_proj.weight"), E**-0.5)
    assert_uniform(mixer(large2, "conv1d.weight"), K**-0.5)
    assert_uniform(mixer(large2, "conv1d.bias"), K**-0.5)
    assert_uniform(large2["lm_head.weight"], D**-0.5)
    for name, value in (("in_proj.bias", 0), ("out_proj.bias", 0), ("D", 1), ("norm.weight", 1)):
        assert (mixer(large2, name) == value).all(), name
    assert (large2["backbone.layers.0.norm.weight"] == 1).all()
    assert (large2["backbone.norm_f.weight"] == 1).all()
    assert abs(float(large2["backbone.embeddings.weight"].std()) / 0.05 - 1) < 0.02


def test_a_of_mamba2_is_uniform_and_not_the_number_of_the_head(large2: dict[str, Tensor]) -> None:
    A = mixer(large2, "A_log").double().exp()  # [H]
    assert 1 - 1e-5 <= A.min() < 1.05
    assert 15.95 < A.max() <= 16 * (1 + 1e-5)
    assert ks_distance(A, (A - 1) / 15) < 1.95 / math.sqrt(H)
    other = mixer(initialized(mamba2_of(), A_init_range=(2.0, 4.0)), "A_log").double().exp()
    assert 2 - 1e-5 <= other.min() < other.max() <= 4 * (1 + 1e-5)


def test_dt_of_mamba2_is_log_uniform_with_a_floor() -> None:
    dt = F.softplus(mixer(initialized(mamba2_of(time_step_min=0.002, time_step_max=0.3)), "dt_bias").double())
    assert 0.002 * (1 - 1e-5) <= dt.min() < 0.0021
    assert ks_distance(dt, (dt.log() - math.log(0.002)) / math.log(0.3 / 0.002)) < 1.95 / math.sqrt(H)
    dt = F.softplus(mixer(initialized(mamba2_of(time_step_floor=0.01)), "dt_bias").double())
    assert dt.min() >= 0.01 * (1 - 1e-5)
    assert abs(float(((dt - 0.01).abs() < 1e-7).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(H)


def test_convolutions_of_mamba2_may_have_a_bound_of_their_own() -> None:
    assert_uniform(mixer(initialized(mamba2_of(), conv_init=0.125), "conv1d.weight"), 0.125)


@pytest.mark.parametrize("n_residuals", [1, 2])
def test_rescaling_of_mamba2(n_residuals: int) -> None:
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "num_hidden_layers": 3, "vocab_size": 24}
    plain, rescaled = (
        initialized(mamba2_of(**sizes, rescale_prenorm_residual=on), n_residuals_per_layer=n_residuals)
        for on in (False, True)
    )
    for name, tensor in plain.items():
        divisor = math.sqrt(n_residuals * 3) if "out_proj" in name else 1.0
        assert torch.equal(rescaled[name], tensor / divisor), name


def test_falcon_mamba_starts_as_mamba_does() -> None:
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 3, "conv_kernel": K, "state_size": N}
    falcon = FalconMambaForCausalLM(FalconMambaConfig(**sizes))
    expected, found = initialized(small()), initialized(falcon)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_original_format_says_how_a_mamba2_starts() -> None:
    ssm = {"layer": "Mamba2", "headdim": 2, "d_state": N, "A_init_range": [3, 4], "conv_init": 0.01}
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 24, "ssm_cfg": ssm, "pad_vocab_size_multiple": 16}
    config["initializer_cfg"] = {"n_residuals_per_layer": 2, "initializer_range": 0.5}
    model = MambaTrace.from_config(config, seed=1)
    weights = model._module.state_dict()
    assert (model.architecture.name, model.config.vocab_size, model.config.num_heads) == ("Mamba-2", 32, 32)
    A = mixer(weights, "A_log").exp()
    assert 3 - 1e-5 < A.min() < A.max() < 4 + 1e-5
    assert 0.009 < mixer(weights, "conv1d.weight").abs().max() <= 0.01
    assert 0.4 < weights["backbone.embeddings.weight"].std() < 0.6
    assert mixer(weights, "out_proj.weight").abs().max() <= 64**-0.5 / math.sqrt(4) * (1 + 1e-6)
    again = MambaTrace.from_config(model.config, seed=1)._module.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_settings_without_meaning_in_an_architecture() -> None:
    with pytest.raises(InitializationError, match=r"A_init_range needs 0 < low <= high, found 0.0 and 1.0"):
        initialize(mamba2_of(), seed=0, A_init_range=(0.0, 1.0))
    with pytest.raises(InitializationError, match="the initialisation of a mamba has no A_init_range"):
        initialize(small(), seed=0, A_init_range=(1.0, 2.0))
