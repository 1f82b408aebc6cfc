"""Tiny seeded models that the tests share, with weights that make every part of a Mamba matter.

A freshly initialised Mamba has norm weights and D of one, no biases and states close to zero, so a test on
it passes with half of the model missing. `lively` draws weights under which each parameter, the state and
the convolution visibly change the logits, and decay is slow enough that the first token reaches the last.

B=3, L=9, D=12, E=24, N=5, R=4 and V=31 all differ, so that no axis passes for another; N is no power of two.
In Mamba-2 H=6, P=4 and G=2.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

# For the processes that tests start: two threads that find another process on their core wait for each other for whole
# time slices.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which reads it then

import cuda_stand_ins
import dual_stand_ins
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
)

from mamba_trace import MambaTrace, names
from mamba_trace.conversion.checkpoints import save_original
from mamba_trace.modeling.run_report import LayerRun
from mamba_trace.sites import BY_NAME, SITES, Site

BATCH, LENGTH, N_LAYERS = 3, 9, 3
SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "state_size": 5,
    "num_hidden_layers": N_LAYERS,
    "expand": 2,
    "conv_kernel": 3,
    "time_step_rank": 4,
}
#: The model types that the package serves: the class and the fields of the tiny configuration of each.
TINY: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mamba": (MambaConfig, SIZES),
    "falcon_mamba": (FalconMambaConfig, {**SIZES, "mixer_rms_eps": 1e-3}),
    "mamba2": (
        Mamba2Config,
        {**SIZES, "num_heads": 6, "head_dim": 4, "n_groups": 2, "chunk_size": 4, "tie_word_embeddings": True},
    ),
}
#: One model type of each family. `test_reference` has Falcon-Mamba, whose sites are Mamba-1's.
MODEL_TYPES = ["mamba", "mamba2"]
#: Changes of the tiny configuration that take other paths through the code or change which axes are equal.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_bias": True},
    {"use_conv_bias": False, "conv_kernel": 2},
    {"conv_kernel": 4, "time_step_rank": 1, "state_size": 16},
    {"time_step_rank": "auto", "state_size": 3, "expand": 3, "tie_word_embeddings": False},
    {"residual_in_fp32": False, "layer_norm_epsilon": 1e-2, "use_bias": True, "conv_kernel": 1},
]
#: The same for the other architectures.
OTHERS: list[dict[str, Any]] = [
    {"model_type": "falcon_mamba"},
    {"model_type": "falcon_mamba", "use_bias": True, "tie_word_embeddings": False, "time_step_rank": 1},
    {"model_type": "mamba2"},
    {"model_type": "mamba2", "use_bias": True, "time_step_limit": (0.1, 0.3), "n_groups": 1},
    {"model_type": "mamba2", "use_conv_bias": False, "num_heads": 2, "head_dim": 12, "conv_kernel": 1},
    {"model_type": "mamba2", "n_groups": 6, "state_size": 1, "tie_word_embeddings": False},
]


def has(model_type: str, path: str) -> bool:
    """Whether the models of this type have the site or the inner module at the end of a path."""
    family, name = "dual" if model_type == "mamba2" else "selective", re.sub(r"\[.*", "", path.rsplit(".", 1)[-1])
    return family in names.families_of(name) and not (name in BY_NAME and BY_NAME[name].part)


#: For a test with `tiny` or `hf` that holds in both families.
both_families = pytest.mark.parametrize("model_type", MODEL_TYPES)
#: The sites of Mamba-1.
MAMBA_SITES = [site for site in SITES if has("mamba", site.name) and not site.part]


def module_path(site: Site, layer: int | None = None) -> str:
    """Where a site is in the module tree of a Mamba, e.g. ``backbone.layers.3.mixer.conv``."""
    owner = {"block": f"backbone.layers.{layer}.", "mixer": f"backbone.layers.{layer}.mixer."}
    in_base = site.scope == "model" and site.name != "lm_head"
    return owner.get(site.scope, "backbone." * in_base) + site.module_name


class ModuleFactory(Protocol):
    """Makes a new seeded ``MambaForCausalLM`` at each call."""

    def __call__(
        self,
        config: MambaConfig | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> MambaForCausalLM: ...


def make_config(model_type: str = "mamba", **changes: Any) -> Any:
    """The tiny configuration, with fields changed. No token ends a sequence: generate never stops early."""
    config_class, fields = TINY[model_type]
    return config_class(**{**fields, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **changes})


def make_hf(
    config: PreTrainedConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> MambaForCausalLM:
    """A new Hugging Face model in evaluation mode with `lively` weights; equal arguments, equal weights.

    Args:
        config: its configuration; `make_config` with ``changes`` if ``None``.
        seed: of the weights; torch's global generator is not touched.
        dtype: of the parameters, which are drawn in float64 and rounded.
        **changes: the ``model_type`` if it is not ``"mamba"``, and fields of the tiny configuration to change.
    """
    with torch.random.fork_rng(devices=[]):
        module = AutoModelForCausalLM.from_config(config if config is not None else make_config(**changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(lively(name, parameter, generator))
    return module.to(dtype).eval()


def lively(name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """A random weight of the shape of ``old``; its name in Hugging Face's state dict decides the scale."""
    noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(old.shape, generator=generator, dtype=torch.float64)
    if name.endswith("A_log"):  # about log(1..N)
        return torch.log(torch.arange(1, old.shape[-1] + 1, dtype=torch.float64)) + 0.2 * noise
    if name.endswith(("dt_proj.bias", "dt_bias")):  # softplus of it is log-uniform in [0.02, 0.5]
        dt = 0.02 * torch.exp(uniform * math.log(0.5 / 0.02))
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith(("norm.weight", "norm_f.weight")):
        return 0.5 + uniform
    if name.endswith(("mixer.D", "embeddings.weight")):
        return noise
    if name.endswith("bias"):
        return 0.2 * noise
    return 1.1 * noise / math.sqrt(math.prod(old.shape[1:]))


def pair(tiny_hf: ModuleFactory, **changes: Any) -> tuple[MambaForCausalLM, MambaTrace]:
    """A plain module, and a MambaTrace over another with the same weights."""
    module = tiny_hf(**changes)
    return copy.deepcopy(module), MambaTrace(module)


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "the value") -> None:
    """Equal in shape, dtype and, within ``tolerance`` of the largest value, in numbers."""
    assert actual.dtype == expected.dtype, what
    near(actual, expected, tolerance, what)


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "the value", smallest: float = 0.0) -> None:
    """`agree` for an ``expected`` value in float64, which is the exact value of ``actual`` in any dtype.

    An error of ``smallest`` is none: the least that a half-precision dtype tells from 0.
    """
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach().double(), expected.detach().double()
    error, largest = (float(t.abs().max()) if t.numel() else 0.0 for t in (actual - expected, expected))
    assert error <= tolerance * largest + smallest, f"{what}: off by {error:.1e}, the largest value being {largest:.1e}"


@contextlib.contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """A block in which PyTorch is told in what to multiply tensors in float32 on a CPU."""
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    onednn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        onednn.matmul.fp32_precision = before


#: The kernels of a layer in which nothing is wanted that they do not hand out.
FUSED = ["conv_silu", "gated_scan"]


def functions(run: LayerRun) -> list[str]:
    """The kernel calls of a layer by their names, in order."""
    return [call.function for call in run.calls]


def layers_that_ran(model: MambaTrace) -> list[int]:
    """The layers that ran in the last forward call."""
    return [run.layer for run in model.last_run]


def pytest_collection_finish() -> None:
    """What has been imported stays to the end: tests that collect garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it go at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and one order of summation makes runs repeat."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> MambaConfig:
    """The tiny configuration: D=12, E=24, N=5, R=4, V=31, 3 layers, no end-of-sequence token."""
    return make_config()


@pytest.fixture(scope="session")
def tiny_hf() -> ModuleFactory:
    """`make_hf`: ``tiny_hf()`` is a new module each time, ``tiny_hf(use_bias=True, dtype=...)`` a variant."""
    return make_hf


@pytest.fixture
def model_type() -> str:
    """The model type of `tiny` and `hf`: Mamba-1, unless a test or a file says otherwise."""
    return "mamba"


@pytest.fixture
def tiny(tiny_hf: ModuleFactory, model_type: str) -> MambaTrace:
    """A new MambaTrace over ``tiny_hf()``."""
    return MambaTrace(tiny_hf(model_type=model_type))


@pytest.fixture
def hf(tiny_hf: ModuleFactory, model_type: str) -> MambaForCausalLM:
    """The weights of ``tiny`` in Hugging Face's own module, in float64."""
    return tiny_hf(model_type=model_type).double()


@pytest.fixture
def exact(tiny_hf: ModuleFactory) -> MambaTrace:
    """A new MambaTrace over ``tiny_hf()`` in float64, to compare with a reference in float64."""
    return MambaTrace(tiny_hf(dtype=torch.float64))


@pytest.fixture(scope="module")
def exact_once(tiny_hf: ModuleFactory) -> MambaTrace:
    """The same, made once for all tests of a file, none of which may change it."""
    return MambaTrace(tiny_hf(dtype=torch.float64))


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Token ids [3,9], none of them the padding token 0."""
    return torch.randint(1, SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["reference", "cpu", "cuda", "triton"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every choice of ``kernels``: those for GPUs as stand-ins (cuda) or interpreted (triton) on the CPU."""
    if request.param == "cuda":
        cuda_stand_ins.install(monkeypatch)
        dual_stand_ins.install(monkeypatch)
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton interprets its kernels on a CPU only where there is no GPU; see test_gpu")
    return request.param


@pytest.fixture(params=["original", "huggingface"])
def folder(tiny_hf: ModuleFactory, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a good checkpoint, in either format."""
    if request.param == "original":
        save_original(tiny_hf(), tmp_path / "checkpoint", safe_serialization=True)
    else:
        tiny_hf().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
