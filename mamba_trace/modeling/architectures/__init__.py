"""The architectures, one file for each, and how a loaded model of any of them is made hookable.

`make_hookable` changes the class of a model's blocks, mixers and norms in place, and gives them one
parameterless `SiteModule` for each site that no module of Hugging Face's produces. Nothing else changes: the
parameters keep their names, and `from_pretrained`, `generate`, caches, quantised or adapted inner layers and
`device_map` go on working.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ...errors import CheckpointError
from ...sites import Layout, Site, in_scope
from ...tracing import rebind_forward
from ..attention import HookableAttention
from ..block import Block
from ..language_model import HookableCausalLM
from ..mixer import HookableMixer
from ..offers import add_sites
from ..run_report import RunReport
from .architecture import Architecture
from .bamba import BAMBA
from .falcon_h1 import FALCON_H1
from .falcon_mamba import FALCON_MAMBA
from .granite import GRANITE
from .jamba import JAMBA
from .mamba import MAMBA
from .mamba2 import MAMBA2
from .nemotron_h import NEMOTRON_H
from .zamba import ZAMBA
from .zamba2 import ZAMBA2

ARCHITECTURES = (MAMBA, FALCON_MAMBA, MAMBA2, NEMOTRON_H, FALCON_H1, GRANITE, JAMBA, BAMBA, ZAMBA2, ZAMBA)
BY_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}


# transformers puts a function of its own around the forward of each block class, under the mixin's name:
# pickle finds a function by its name, and nnsight keeps a module's forward beside the module.
for _hookable in (cls for architecture in ARCHITECTURES for cls in architecture.hookable.values()):
    if (_forward := _hookable.__dict__.get("forward")) is not None:
        _forward.__module__, _forward.__qualname__ = _hookable.__module__, f"{_hookable.__qualname__}.forward"
# What transformers looks up or writes by the class of a model is for its own: `architectures` in a config.json, the
# pipelines that take it, the names of weights in a checkpoint, which outputs it can record (hidden states, attention,
# routers), and, from the source of the class, what can be set later. Pickle goes by the qualified name.
for _theirs, _hookable in (pair for each in ARCHITECTURES for pair in each.hookable.items()):
    if issubclass(_theirs, PreTrainedModel):
        _hookable.__name__ = _theirs.__name__
        for _name in ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation"):
            setattr(_hookable, _name, getattr(_theirs, _name))
        _CAN_RECORD_REGISTRY[cast(PreTrainedModel, object.__new__(_hookable))] = _theirs._can_record_outputs


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a loaded model.

    Raises:
        CheckpointError: if it is not one of the supported ones.
    """
    for module in model.modules():  # PEFT and the like wrap the model they adapt
        for architecture in ARCHITECTURES:
            if isinstance(module, architecture.model_class):
                return architecture
    known = ", ".join(architecture.model_class.__name__ for architecture in ARCHITECTURES)
    remote = ". It is code from the hub: load it without trust_remote_code" * (
        "transformers_modules" in repr(type(model))
    )
    raise CheckpointError(
        f"{type(model).__name__} is not a language model that this package knows; it knows {known}{remote}"
    )


def axis_sizes(model: nn.Module) -> dict[str, int]:
    """The size of each axis letter that a hookable model fixes, e.g. ``{"D": 768, "E": 1536, ...}``."""
    config: Any = model.config
    sizes = {"D": config.hidden_size, "V": config.vocab_size}
    for part in ("mixer", "attn", "moe"):
        first: Any = next((module for module in model.modules() if getattr(module, "scope", None) == part), None)
        sizes |= first.sizes if first is not None else {}
    return sizes


#: Under this name a hookable model keeps its `Layout`.
LAYOUT = "_mamba_trace_layout"


def layout_of(model: nn.Module) -> Layout:
    """What stands in each layer of a hookable model."""
    return language_model(model).__dict__[LAYOUT]


def language_model(model: nn.Module, architecture: Architecture | None = None) -> Any:
    """The module of Hugging Face's model class in ``model``, which may be wrapped by PEFT and the like."""
    model_class = (architecture or architecture_of(model)).model_class
    return next(module for module in model.modules() if isinstance(module, model_class))


def layers_of(model: nn.Module) -> Any:
    """The list of a model's layers."""
    architecture = architecture_of(model)
    return getattr(language_model(model, architecture), architecture.base).layers


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
    report, new = RunReport(), []
    for module in list(model.modules()):
        if type(module) in architecture.hookable:
            module.__class__ = architecture.hookable[type(module)]
            rebind_forward(module)
            if (prepare := getattr(module, "made_hookable", None)) is not None:
                prepare()
            new.append(module)
        if isinstance(module, HookableMixer):
            module.kernels, module.report = kernels, report
    whole = language_model(model, architecture)
    blocks = [block for block in layers_of(model) if isinstance(block, Block)]
    layout = Layout(tuple(block.kind for block in blocks), logits=isinstance(whole, HookableCausalLM))
    whole.__dict__[LAYOUT] = layout
    sizes = axis_sizes(model) if new else {}
    for module in new:
        if getattr(module, "scope", None) in SITED:
            add_sites(module, sites_of(module, layout), sizes)
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    no_split |= {cls.__name__ for cls in architecture.hookable.values() if issubclass(cls, Block)}
    model.__dict__["_no_split_modules"] = sorted(no_split)
    return model


#: The scopes whose modules have sites.
SITED = ("model", "block", "mixer", "attn", "moe")


def sites_of(module: Any, layout: Layout) -> list[Site]:
    """The sites of a hookable module, in execution order."""
    if module.scope == "model":
        return [site for site in in_scope("model") if layout.has(site)]
    if module.scope == "block":
        return [site for site in module.kind.sites() if site.scope == "block"]
    return list(in_scope(module.scope, getattr(module, "family", None)))


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
    known = (*architecture.hookable, *architecture.hookable.values())
    for layer, block in enumerate(layers_of(model)):
        hookable: Any = architecture.hookable.get(type(block), type(block))
        parts = {part: name for part, name in getattr(hookable, "parts_named", {}).items() if part in FIXED}
        places = [(f"layers[{layer}]", block)]
        places += [(f"layers[{layer}].{part}", getattr(block, name, None)) for part, name in parts.items()]
        for path, module in places:
            if not (module is None or type(module) in known or isinstance(module, WITH_SITES)):
                raise CheckpointError(
                    f"{path} is a {type(module).__name__}, which has none of the sites of a "
                    f"{' or '.join(cls.__name__ for cls in known[:2])}. Adapt or replace the modules inside "
                    f"of it (in_proj, x_proj, ...), or edit {path}.output in a trace"
                )


#: The parts of a block that must have their sites.
FIXED = ("ssm", "attn")
#: What such a part is once it has them. A wrapper that adapts one passes its attributes on, and is none of these.
WITH_SITES = (Block, HookableMixer, HookableAttention)


def kernels_of(model: nn.Module) -> str | None:
    """The scan that most mixers of a hookable model run; ``None`` if no mixer is hookable yet."""
    chosen = [module.kernels for module in model.modules() if isinstance(module, HookableMixer)]
    return max(set(chosen), key=chosen.count, default=None)
