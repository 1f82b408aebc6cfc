"""One adapter for each architecture: which classes of Hugging Face's become hookable, and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..demand import rebind_forward
from ..errors import CheckpointError
from ..modeling import HookableMixer
from ..offers import SiteModule
from ..report import RunReport
from ..sites import Scope, offered
from . import mamba


@dataclass(frozen=True)
class Architecture:
    """How one model type of Hugging Face's is made hookable.

    Attributes:
        model_class: the causal language model class.
        hookable: class of a module -> (the hookable class it becomes, which sites it gets).
    """

    model_class: type[nn.Module]
    hookable: dict[type[nn.Module], tuple[type[nn.Module], Scope | None]]


ARCHITECTURES = (Architecture(mamba.MODEL, mamba.HOOKABLE),)


def architecture_of(model: nn.Module) -> Architecture:
    """The adapter of a loaded model.

    Raises:
        CheckpointError: if the model is not one of the supported architectures.
    """
    for architecture in ARCHITECTURES:
        # PEFT and the like wrap the model they adapt.
        if any(isinstance(module, architecture.model_class) for module in model.modules()):
            return architecture
    known = ", ".join(architecture.model_class.__name__ for architecture in ARCHITECTURES)
    raise CheckpointError(f"{type(model).__name__} is no language model this package knows; it knows {known}")


def make_hookable(model: nn.Module, kernels: str = "auto") -> nn.Module:
    """Give every block and mixer of a loaded model its sites, in place; calling it again changes nothing.

    Args:
        model: a causal language model of a supported architecture, adapted, quantised or dispatched or not.
        kernels: which scan its mixers run.

    Returns:
        ``model``.

    Raises:
        CheckpointError: if its architecture is not supported.
    """
    architecture = architecture_of(model)
    sizes, report = axis_sizes(model.config), RunReport()
    for module in model.modules():
        if isinstance(module, HookableMixer):
            module.kernels, module.report = kernels, report
        if type(module) not in architecture.hookable:
            continue
        hookable, scope = architecture.hookable[type(module)]
        module.__class__ = hookable
        if isinstance(module, HookableMixer):
            module.kernels, module.report = kernels, report
        rebind_forward(module)
        for site in offered(scope) if scope is not None else ():
            module.add_module(site.name, SiteModule(site, sizes))
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    no_split |= {cls.__name__ for cls, _ in architecture.hookable.values()}
    model.__dict__["_no_split_modules"] = sorted(no_split)
    return model


def axis_sizes(config: Any) -> dict[str, int]:
    """The size of each axis letter that the configuration fixes, e.g. ``{"D": 768, "E": 1536, ...}``."""
    return {
        "D": config.hidden_size,
        "E": config.intermediate_size,
        "N": config.state_size,
        "R": int(config.time_step_rank),
        "V": config.vocab_size,
    }
