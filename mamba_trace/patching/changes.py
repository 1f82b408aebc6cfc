"""What a user has done to a model that may look at a whole run, so that its cells must run whole.

A cell usually starts at its layer and its position, in a batch with others. Nothing in a plain model notices:
no position depends on a later one, and no row on another. What a user adds may notice. A lasting edit of
position 3 means the prompt's token 3, a hook may take the mean over positions or rows, and a norm of the
user's own may mix them. None of this can be seen from outside, so wherever there is a change, cells run whole
(see `whole`).

Some modules are known to work position by position and do not count: this package's own, Hugging Face's, LoRA
adapters of linear, convolution and embedding layers, 4-bit linear layers, and the hooks of accelerate that
move weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import nn
from transformers.activations import ACT2FN

from ..modeling.architectures import architecture_of, axis_sizes
from ..modeling.offers import SiteModule
from ..sites import Layout, Site
from ..tracing.forwards import runs_its_own_forward
from ..tracing.visit import has_global_hooks
from .marks import mark_of_code, qualified

if TYPE_CHECKING:
    from ..model import MambaTrace

#: Containers and layers of PyTorch that treat every position alike.
PLAIN = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
    nn.ParameterDict,
    nn.Identity,
    nn.Linear,
    nn.Embedding,
    SiteModule,
)
#: Layers of other packages that do the same, by module and class.
KNOWN = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.layer", "Embedding"),
    ("peft.tuners.lora.layer", "Conv1d"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.model", "LoraModel"),
    ("peft.peft_model", "PeftModelForCausalLM"),
    ("bitsandbytes.nn.modules", "Linear4bit"),
}

#: The fields of configurations that name an activation.
ACTIVATIONS = ("hidden_act", "mlp_hidden_act", "mamba_hidden_act", "hidden_mamba_act")


@dataclass(frozen=True)
class Change:
    """One thing that a user has done to a model.

    Attributes:
        what: in words, e.g. ``"a PyTorch hook on backbone.layers.3"``.
        mark: what tells it from another change with the same words; equal in every process that makes it.
    """

    what: str
    mark: str = ""


def changes(model: MambaTrace) -> list[Change]:
    """The changes to a loaded model that may look at more of a run than one position of one row.

    An edit of a part of the tree (``model.layers[3].edit()``) does not count: nnsight runs it only in traces
    of that envoy.
    """
    words = "a lasting edit (model.edit)"
    changed = [Change(words, mark_of_code(edit.code, edit.lcls)) for edit in model._edits]
    if has_global_hooks():
        changed.append(Change("a PyTorch hook on all modules"))
    plain, conv_kernel = plain_types(model), axis_sizes(model._module).get("K", 1)
    for name, module in model._module.named_modules():
        changed += changes_of(module, name or "the model", plain, conv_kernel)
    if any(numbers_of(envoy._module) - {number} for number, envoy in enumerate(model.layers)):
        changed.append(Change("another order of the layers"))
    return changed


def uncut(layout: Layout, site: Site) -> list[Change]:
    """Why the cells of a site cannot start in the middle of a plain model of some layout.

    Where a shared transformer reads the embeddings in many layers, a patch of them changes all these layers.
    """
    shared = any("shared_out" in kind.parts for kind in layout.layers)
    if not (shared and site.name == "embeddings"):
        return []
    return [Change("shared transformers, to which each layer gives the embeddings that are patched")]


def numbers_of(block: Any) -> set[int]:
    """The numbers of its layer that a block and what it has for itself were given, of which there may be none."""
    parts = [block, block.part("ssm"), *([] if "shared_out" in block.kind.parts else [block.part("attn")])]
    return {part.layer_idx for part in parts if isinstance(getattr(part, "layer_idx", None), int)}


def plain_types(model: MambaTrace) -> Callable[[type], bool]:
    """A function that says whether a plain model contains modules of a class."""
    architecture = architecture_of(model._module)
    ours = {*PLAIN, *architecture.hookable.values()}
    acts = {getattr(model.config, field, None) for field in ACTIVATIONS} - {None}
    ours |= {nn.SiLU, *(type(ACT2FN[act]) for act in acts)}  # Zamba2 names none for its SSM
    theirs = architecture.model_class.__module__
    return lambda cls: cls in ours or cls.__module__ == theirs


def changes_of(module: Any, name: str, plain: Callable[[type], bool], conv_kernel: int) -> Iterator[Change]:
    """The changes to one module of the model."""
    cls = type(module)
    if hooks := [hook for hook in hooks_on(module) if not only_keeps(hook)]:
        yield Change(f"a PyTorch hook on {name}", " ".join(map(qualified, hooks)))
    known = (cls.__module__, cls.__qualname__) in KNOWN and not getattr(module, "lora_variant", None)
    alike = plain(cls) or known or treats_positions_alike(module, conv_kernel)
    if not alike:
        yield Change(f"a {cls.__name__} as {name}", qualified(cls))
    elif not runs_its_own_forward(module):
        yield Change(f"another forward of {name}", qualified(module.__dict__.get("forward")))
    if not moves_alone(module.__dict__.get("_hf_hook")):
        yield Change(f"a hook of accelerate's on {name}", qualified(type(module._hf_hook)))
    if not known:
        for weight in module._parameters.values():
            if weight is not None and type(weight) is not nn.Parameter:
                yield Change(f"a {type(weight).__name__} as a weight of {name}")


def treats_positions_alike(module: Any, conv_kernel: int) -> bool:
    """Whether a convolution looks at no other positions than the model's own, or a dropout drops nothing."""
    if type(module) is nn.Conv1d:
        window = (module.kernel_size, module.padding, module.dilation, module.stride)
        plain = ((conv_kernel,), (conv_kernel - 1,), (1,), (1,))
        return window in (plain, ((1,), (0,), (1,), (1,)))
    return type(module) is nn.Dropout and (not module.training or module.p == 0)


def moves_alone(hook: Any) -> bool:
    """Whether a hook of accelerate's, if there is one, only moves weights and inputs between devices."""
    if type(hook) is SequentialHook:
        return all(map(moves_alone, hook.hooks))
    return hook is None or type(hook) in (AlignDevicesHook, CpuOffload)


def hooks_on(module: Any) -> list[Any]:
    """The functions of the PyTorch hooks on a module."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [hook for kind in kinds for hook in getattr(module, kind).values()]


def only_keeps(hook: Any) -> bool:
    """Whether a hook is one of those with which transformers collects hidden states and the like, and leaves behind."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
