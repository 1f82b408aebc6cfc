"""Small random models of every architecture in float64 or float32, each with its independent reference.

A `Subject` knows the reference's values by name and in execution order, and the place of each in a trace.
`draw_subject` draws one: architecture, sizes, numbers of layers and heads, biases, norms, limits, what is tied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any

import reference
import reference_hybrid
import torch
from conftest import TINY, make_hf
from hybrid_models import HYBRIDS, A, M, make_hybrid
from reference import EditValue
from torch import Tensor
from transformers import PreTrainedModel

from mamba_trace import MambaTrace
from mamba_trace.errors import UnknownSiteError
from mamba_trace.names.layouts import SAME_AS
from mamba_trace.sites import STATE

L = 6
VOCABULARY = 31


def draw_tokens(batch: int, seed: int, length: int = L) -> Tensor:
    """[B,L], without token 0, which is padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max())


class Subject:
    """A model and its reference in float64.

    Attributes:
        tolerance, gradient_tolerance: of a value, as a share of its largest entry. In float32 a gradient is rounded on
            the way there and back: the plain PyTorch of ``kernels="reference"`` is as far from the exact one.
        module: Hugging Face's module, of which `model` is the tracing view.
        hooks: the reference's names for its values on L tokens, in execution order: hook names of a pure Mamba, paths
            of a hybrid. The name of a trajectory comes after those of its states.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module, self.config = module, module.config
        self.hybrid = module.config.model_type not in TINY
        self.weights = module.state_dict(keep_vars=True)  # tied weights are one parameter under several names
        self.model = MambaTrace(module)
        self.tolerance, self.gradient_tolerance = (1e-11, 1e-11) if module.dtype == torch.float64 else (1e-4, 1e-3)
        self.hooks = self.hooks_on(L)

    def hooks_on(self, length: int) -> list[str]:
        """`hooks` on another number of tokens."""
        names = [name for name, _ in self.values(draw_tokens(1, 0, length))]
        return [name for name in names if self._own(name)]

    def _own(self, name: str) -> bool:
        """Whether a value of the reference has a place of its own in this model, and not a second name of another."""
        last = name.rpartition(".")[2]
        return last not in SAME_AS or self.model.hook(name).path.endswith(last)

    def forward(self, tokens: Tensor, edit: EditValue | None = None) -> Tensor:
        """The reference's logits [B,L,V]."""
        evaluate = reference_hybrid.forward if self.hybrid else reference.forward
        return evaluate(self.weights, self.config, tokens, edit)

    @contextlib.contextmanager
    def rounded(self, seed: int) -> Iterator[None]:
        """The reference's weights moved by about a rounding of float32, each by its own."""
        weights, generator = self.weights, torch.Generator().manual_seed(seed)
        step = torch.finfo(torch.float32).eps
        self.weights = {
            name: value.double() * (1 + step * torch.randn(value.shape, generator=generator, dtype=torch.float64))
            for name, value in weights.items()
        }
        try:
            yield
        finally:
            self.weights = weights

    def values(self, tokens: Tensor) -> list[tuple[str, Tensor]]:
        """(name, value) of the reference in execution order."""
        seen: list[tuple[str, Tensor]] = []

        def keep(hook: str, value: Tensor) -> Tensor:
            seen.append((hook, value))
            return value

        with torch.no_grad():
            self.forward(tokens, keep)
        return seen

    def place(self, hook: str, length: int | None = None) -> Any:
        """The envoy of a value; with ``length``, a state's position is counted from the end of that many tokens."""
        stem, position = split_state(hook)
        if position is None or length is None:
            return self.model.hook(hook)
        return self.model.hook(state(stem, position - length))

    def path(self, hook: str) -> str:
        """The public path of a value."""
        return self.model._place(hook).path

    def same(self, actual: Tensor, expected: Tensor, what: str, least: float = 1e-3) -> None:
        """Hold a value to the reference's, up to rounding. Of values below ``least`` the difference counts itself."""
        self._near(actual, expected, what, self.tolerance, least)

    def same_gradient(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """The same for a gradient."""
        self._near(actual, expected, f"gradient of {what}", self.gradient_tolerance, 1.0)

    def _near(self, actual: Tensor, expected: Tensor, what: str, tolerance: float, least: float) -> None:
        assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
        distance = float((actual - expected).detach().abs().max())
        largest = float(expected.detach().abs().max())
        assert distance <= tolerance * max(largest, least), f"{what}: {distance:.1e} apart, of {largest:.1e}"

    def hook_name(self, hook: str) -> str | None:
        """The hook name of a value; ``None`` for an inner module, which has none."""
        with contextlib.suppress(UnknownSiteError):
            return self.model._place(hook).hook_name
        return None

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())


def split_state(hook: str) -> tuple[str, int | None]:
    """``("layers[0].ssm.h", 5)`` of ``"layers[0].ssm.h[5]"`` or of its hook name; any other name and ``None``."""
    stem, bracket, position = hook.partition(f".{STATE}[")
    if bracket:
        return f"{stem}.{STATE}", int(position[:-1])
    stem, _, position = hook.rpartition(".")
    return (stem, int(position)) if stem.endswith("hook_h") else (hook, None)


def state(trajectory: str, position: int) -> str:
    """The name of a state, from that of its trajectory."""
    return f"{trajectory}.{position}" if trajectory.endswith("hook_h") else f"{trajectory}[{position}]"


#: What a random configuration chooses from, by architecture. A tuple is chosen as a whole.
COMMON: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 2, 3, 4],
    "conv_kernel": [1, 2, 3, 4],
    "use_bias": [False, True],
    "use_conv_bias": [False, True],
    "state_size": [1, 2, 5, 8],
    "residual_in_fp32": [False, True],
    "tie_word_embeddings": [False, True],
    "layer_norm_epsilon": [1e-5, 1e-2],
}
LIMITS = [(0.0, float("inf")), (0.05, 0.4)]
SELECTIVE = {**COMMON, "hidden_size": [8, 24], "expand": [1, 2, 3], "time_step_rank": [1, 3, "auto"]}
HYBRID_MAMBA: dict[str, list[Any]] = {
    "mamba_d_state": [1, 3, 5],
    "mamba_d_conv": [2, 3, 4],
    "mamba_conv_bias": [False, True],
    "mamba_proj_bias": [False, True],
}
HEADED: dict[str, list[Any]] = {**HYBRID_MAMBA, "mamba_n_groups": [1, 3], "time_step_limit": LIMITS}
CHOICES: dict[str, dict[str, list[Any]]] = {
    "mamba": SELECTIVE,
    "falcon_mamba": SELECTIVE,
    "mamba2": {**COMMON, "n_groups": [1, 2, 6], "num_heads": [6], "head_dim": [4, 8], "time_step_limit": LIMITS},
    "nemotron_h": {
        "layers_block_type": [[M, "moe", A], [M], [M, M, "mlp"], [A, M, "moe", M], ["mlp", A, M], [M, A]],
        "num_key_value_heads": [1, 2, 4],
        "ssm_state_size": [1, 3, 5],
        "conv_kernel": [2, 3, 4],
        "n_groups": [1, 3],
        "use_bias": [False, True],
        "use_conv_bias": [False, True],
        "norm_topk_prob": [False, True],
    },
    "falcon_h1": {**HEADED, "num_hidden_layers": [1, 2, 3], "num_key_value_heads": [1, 2, 4]},
    "granitemoehybrid": {
        **HEADED,
        "layer_types": [[M, A, M], [A, M], [M, M], [M, A, A, M]],
        "num_key_value_heads": [1, 2, 4],
        "num_local_experts": [0, 5],
        "position_embedding_type": ["rope", "nope"],
        "tie_word_embeddings": [False, True],
    },
    "jamba": {
        **HYBRID_MAMBA,
        "mamba_dt_rank": [1, 4],
        "num_hidden_layers": [2, 3, 4],
        "attn_layer_offset": [0, 1],
        "num_experts": [1, 5],
        "tie_word_embeddings": [False, True],
    },
    "bamba": {
        **HEADED,
        "attn_layer_indices": [[0], [1], [0, 2]],
        "num_hidden_layers": [3, 4],
        "tie_word_embeddings": [False, True],
    },
    "zamba2": {"mamba_d_state": [1, 3, 5], "mamba_d_conv": [2, 3, 4], "mamba_ngroups": [1, 3]},
    "zamba": {**HYBRID_MAMBA, "n_mamba_heads": [3, 4], "mamba_dt_rank": [1, 4]},
}
ARCHITECTURES = tuple(CHOICES)


def draw_config(architecture: str, random: Random) -> dict[str, Any]:
    """A kind of `HYBRIDS` or a model type, under ``"kind"``, and the fields to change in it."""
    kinds = [kind for kind in HYBRIDS if kind.partition(",")[0] == architecture] or [architecture]
    changes: dict[str, Any] = {"kind": random.choice(kinds)}
    for field, values in CHOICES[architecture].items():
        if architecture not in TINY and random.random() < 0.5:
            continue  # as in the variant
        changes[field] = random.choice(values)
    if architecture == "mamba2":
        changes["hidden_size"], changes["expand"] = random.choice(
            [(size // expand, expand) for expand in (1, 2) for size in [changes["num_heads"] * changes["head_dim"]]]
        )
    if architecture == "granitemoehybrid" and "layer_types" in changes:
        changes["num_hidden_layers"] = len(changes["layer_types"])
    return changes


def draw_subject(architecture: str, seed: int) -> Subject:
    """The same one for the same arguments."""
    random = Random(f"{architecture} {seed}")
    changes = draw_config(architecture, random)
    kind, dtype = changes.pop("kind"), random.choice([torch.float64, torch.float64, torch.float32])
    if kind in HYBRIDS:
        return Subject(make_hybrid(kind, seed=seed, dtype=dtype, **changes))
    return Subject(make_hf(seed=seed, dtype=dtype, model_type=kind, **changes))
