"""A tiny model of every architecture beside Hugging Face's own with the same weights, for the tests of topics.

`Both` holds the two. What Hugging Face's says is the reference: of a forward, of `generate`, and of edits that PyTorch
hooks make in it. Weights are float64, in which Hugging Face rounds scans and norms to float32, and no more differs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TINY, make_hf, near
from hybrid_models import HYBRID, A, M, make_hybrid
from subjects import ARCHITECTURES, Subject, draw_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from mamba_trace import MambaTrace

#: The fields of each model that are not those of the other tests: two layers, or three where experts need one.
FIELDS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": [M, A, "moe"]},
    "falcon_h1": {"num_hidden_layers": 2},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": [M, A]},
    "jamba": {"num_hidden_layers": 2},
    "bamba": {"num_hidden_layers": 2},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": [HYBRID, HYBRID]},
    "zamba": {"num_hidden_layers": 2, "layers_block_type": [HYBRID, HYBRID]},
}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Both:
    """One architecture.

    Attributes:
        plain: Hugging Face's model, which nothing of the package has touched.
        model: the tracing view of another with the same weights; `module` is what is under it.
        subject: the same with its float64 reference.
        tokens: [2,6].
        values: the reference's on these tokens, by public path.
    """

    def __init__(self, architecture: str) -> None:
        self.architecture, self.plain = architecture, make(architecture)
        self.subject = Subject(copy.deepcopy(self.plain))
        self.model, self.module, self.tokens = self.subject.model, self.subject.module, draw_tokens(2, seed=7)
        self.values = {self.subject.path(name): value for name, value in self.subject.values(self.tokens)}


def fresh(architecture: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, MambaTrace]:
    """Hugging Face's model and ours, which a test may change."""
    plain = make(architecture, dtype)
    return plain, MambaTrace(copy.deepcopy(plain))


def make(architecture: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Hugging Face's tiny model."""
    if architecture in TINY:
        return make_hf(dtype=dtype, model_type=architecture, num_hidden_layers=2)
    return make_hybrid(architecture, dtype=dtype, **FIELDS[architecture])


def refusal(call: Callable[[], Any]) -> str | None:
    """What a call that transformers refuses says, which is a `ValueError`; ``None`` where it is not refused."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


#: The same `Both` for all tests, none of which may change it.
both_of = functools.cache(Both)


def base_of(plain: PreTrainedModel) -> nn.Module:
    """The module of the embedding, the layers and the final norm."""
    return getattr(plain, plain.base_model_prefix)


@contextlib.contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let the output of a module pass through ``change``, by a PyTorch hook; what returns ``None`` only looks."""

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = change(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def double(value: Tensor) -> Tensor:
    """The edit of most tests."""
    return 2 * value


def same(actual: Tensor, expected: Tensor, what: str = "the value") -> None:
    """As near as Hugging Face computes in a float64 model."""
    near(actual, expected, 1e-5, what)


def mixer_of(block: nn.Module) -> nn.Module:
    """The SSM of one of Hugging Face's blocks."""
    names = {name: module for name, module in block.named_modules() if name.rpartition(".")[2] in ("mixer", "mamba")}
    return next(module for module in names.values() if hasattr(module, "A_log"))


def seen(plain: PreTrainedModel, tokens: Tensor, *modules: nn.Module, **asked: Any) -> list[Tensor]:
    """The outputs of Hugging Face's modules in one run, and the logits last."""
    found: list[Tensor] = []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.enter_context(changed(module, found.append))
        logits = plain(tokens, **asked).logits
    return [*found, logits]


def run_with(plain: PreTrainedModel, tokens: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """Hugging Face's logits where the outputs of modules are changed."""
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module, change in changes.items():
            hooks.enter_context(changed(module, change))
        return plain(tokens).logits
