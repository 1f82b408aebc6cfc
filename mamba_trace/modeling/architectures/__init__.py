"""One adapter for each architecture: which classes of Hugging Face's become hookable, and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import CheckpointError
from ...sites import Scope, offered
from ...tracing import rebind_forward
from ..mixer import HookableBlock, HookableMixer
from ..offers import SiteModule
from ..run_report import RunReport
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


def _name_forwards() -> None:
    # transformers puts a function of its own around the forward of each block class, under the name of the
    # mixin's: pickle finds a function by its name, and nnsight keeps a module's forward beside the module.
    for architecture in ARCHITECTURES:
        for hookable, _ in architecture.hookable.values():
            forward: Any = hookable.__dict__.get("forward")
            if forward is not None:
                forward.__module__ = hookable.__module__
                forward.__qualname__ = f"{hookable.__qualname__}.forward"


_name_forwards()


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
        CheckpointError: if its architecture is not supported, a block or mixer of it was replaced by
            something that has no sites, or its prompts are tuned (PEFT). Nothing is changed then.
    """
    architecture = architecture_of(model)
    refuse_learned_prompts(model)
    check_layers(model, architecture)
    sizes, report = axis_sizes(model.config), RunReport()
    for module in list(model.modules()):
        if type(module) in architecture.hookable:
            hookable, scope = architecture.hookable[type(module)]
            module.__class__ = hookable
            rebind_forward(module)
            for site in offered(scope) if scope is not None else ():
                module.add_module(site.name, SiteModule(site, sizes))
        if isinstance(module, HookableMixer):
            module.kernels, module.report = kernels, report
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    no_split |= {cls.__name__ for cls, _ in architecture.hookable.values()}
    model.__dict__["_no_split_modules"] = sorted(no_split)
    return model


def refuse_learned_prompts(model: Any) -> None:
    """Refuse PEFT's model of tuned prompts: it has other positions than the tokens that it is given.

    Raises:
        CheckpointError: saying how such a model is traced.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise CheckpointError(
            f"{type(config).__name__} puts tokens of its own in front of every prompt: positions would not "
            f"be those of the prompt. Wrap the model inside, peft_model.get_base_model(), and give it both: "
            f"trace(inputs_embeds=torch.cat((peft_model.get_prompt(B), embeddings), dim=1)), where the first "
            f"positions are those of the learned tokens"
        )


def check_layers(model: nn.Module, architecture: Architecture) -> None:
    """Refuse a model in which something without sites has the place of a block or a mixer.

    Raises:
        CheckpointError: naming the first such place, and what is there.
    """
    known = tuple(architecture.hookable)
    for inner in model.modules():
        if not isinstance(inner, architecture.model_class):
            continue
        backbone: Any = inner.backbone
        for layer, block in enumerate(backbone.layers):
            for path, module in ((f"layers[{layer}]", block), (f"layers[{layer}].ssm", _mixer_of(block))):
                if not (type(module) in known or isinstance(module, (HookableBlock, HookableMixer))):
                    raise CheckpointError(
                        f"{path} is a {type(module).__name__}, which has none of the sites of a "
                        f"{' or '.join(cls.__name__ for cls in known[:2])}. Adapt or replace the modules "
                        f"inside of a mixer (in_proj, x_proj, ...), or edit {path}.output in a trace"
                    )


def _mixer_of(block: Any) -> Any:
    return getattr(block, "mixer", None)


def kernels_of(model: nn.Module) -> str | None:
    """Which scan the mixers of a model run that are hookable already; ``None`` if none is."""
    chosen = [module.kernels for module in model.modules() if isinstance(module, HookableMixer)]
    return max(set(chosen), key=chosen.count, default=None)


def axis_sizes(config: Any) -> dict[str, int]:
    """The size of each axis letter that the configuration fixes, e.g. ``{"D": 768, "E": 1536, ...}``."""
    return {
        "D": config.hidden_size,
        "E": config.intermediate_size,
        "N": config.state_size,
        "R": int(config.time_step_rank),
        "V": config.vocab_size,
    }
