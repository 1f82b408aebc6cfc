"""Where a model runs whose weights accelerate has spread over devices, main memory and disk.

The device of a parameter does not tell. Offloaded weights are on the meta device, without numbers, until a
hook of accelerate brings them to the device that their module runs on, for as long as the module runs. Code
that asks a parameter for its device, as nnsight does to place inputs and transformers does for its pipelines,
would then send everything to the meta device.

`full_device_map` and `usable_device_map` refuse a device map before anything is loaded; `input_device` is
where the inputs of a run go; `check_weights` refuses weights that nothing loads; `one_device` and
`ShapeTracer` set accelerate's hooks aside where they cannot run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import align_module_device
from nnsight.intervention.tracer import ScanningTracer
from torch import Tensor, nn

from ..errors import CheckpointError
from ..names import nearest
from ..names.modules import BASES, OF_BASE, OF_LAYER
from .saving import GuardedTracer

#: What tells the parts of a layer apart that Hugging Face may call by one name: the name of something in it.
HOLDS = {"ssm": "A_log", "attn": "q_proj", "moe": "experts"}
DISK = "disk"
#: What a scan of shapes replaces in a module.
REPLACED = ("_parameters", "_buffers", "_hf_hook")


def full_device_map(device_map: Any, model: Any) -> Any:
    """A device map under Hugging Face's names, which gives every weight of ``model`` a place.

    Args:
        device_map: as ``from_pretrained`` takes it; anything but a mapping is returned as it is.
        model: a model of the same configuration, on any device.

    Raises:
        CheckpointError: for a name that the model does not have, a weight without a place, or tied weights of
            which only one is on disk.
    """
    if not isinstance(device_map, Mapping):
        return device_map
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = {}
    for given, place in device_map.items():
        name = next(spelled(given, names), None)
        if name is None:
            first, layers, last = (next(spelled(part, names)) for part in ("embeddings", "layers.0", "norm_f"))
            raise CheckpointError(
                f"device_map places {given!r}, which is not a part of the model. It has {first}, "
                f"{layers} and so on, {last} and lm_head{nearest(given, sorted(names))}"
            )
        places[name] = place
    _tie(places, model)
    full = dict(_apart(model, "", places))
    left_out = [name for name, place in full.items() if place is None]
    if left_out:
        raise CheckpointError(
            f"device_map has no place for {', '.join(left_out[:4])}{', ...' * (len(left_out) > 4)}. A "
            f'place for all that is not named: device_map={{"": "cpu", ...}}'
        )
    return full


def spelled(given: str, names: set[str]) -> Iterator[str]:
    """Hugging Face's paths of what a name of a device map means, this package's or its own.

    Args:
        given: the name.
        names: of all modules and parameters of the model.
    """
    if given in names:
        yield given
        return
    base = next((base for base in BASES if base in names), "")
    first, _, rest = given.removeprefix(f"{base}.").partition(".")
    number, _, below = rest.partition(".")
    part, _, inner = below.partition(".")
    for theirs in OF_BASE.get(first, ()):
        path = f"{base}.{theirs}"
        yield from {_joined(path, rest)} & names
        for step in OF_LAYER.get(part, ()):
            place = f"{path}.{number}.{step}"
            held = [name for name, what in HOLDS.items() if f"{place}.{what}" in names]
            if part not in ("ssm", "attn", "mlp", "moe") or held == [part] * (part != "mlp"):
                yield from {_joined(place, inner)} & names


def _joined(path: str, rest: str) -> str:
    return f"{path}.{rest}" if rest else path


def _tie(places: dict[str, Any], model: Any) -> None:
    # A tied weight without a place, such as that of lm_head, gets the place of the one that it is.
    for tied, weight in model.all_tied_weights_keys.items():
        (first, second), where = (weight.rpartition(".")[0], tied.rpartition(".")[0]), place_of(weight, places)
        place = place_of(tied, places)
        if place is None and where is not None:
            places[second] = where
        elif DISK in (place, where) and place != where:
            raise CheckpointError(
                f"device_map places {first} on {where} and {second} on {place}, which are one "
                f"weight in this model: place both on disk, or neither"
            )


def _apart(module: nn.Module, name: str, places: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # Entries that do not overlap, as accelerate needs them; None as the place of what the map leaves out.
    prefix = f"{name}." if name else ""
    if not any(place.startswith(prefix) for place in places if place not in ("", name)):
        yield name, place_of(name, places)
        return
    for parameter in module._parameters:
        yield f"{prefix}{parameter}", place_of(f"{prefix}{parameter}", places)
    for child_name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield from _apart(child, f"{prefix}{child_name}", places)


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Where a device map puts the weight ``name``: the entry of the nearest module above it, or ``None``."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def usable_device_map(device_map: Any, build: Callable[[], nn.Module]) -> Any:
    """`full_device_map` for a model that is about to be loaded here, of which ``build`` makes one without weights.

    Raises:
        CheckpointError: as there, and for a device that this machine does not have.
    """
    if not isinstance(device_map, Mapping):
        return device_map
    with torch.device("meta"):
        full = full_device_map(device_map, build())
    for name, place in full.items():
        try:
            if place != DISK:
                torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:  # the latter without CUDA in PyTorch
            here = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            raise CheckpointError(
                f"device_map places {name or 'the model'} on {place}, which cannot be used here. There are "
                f"{', '.join([*here, 'cpu'])} and disk"
            ) from error
    return full


def input_device(model: nn.Module) -> torch.device:
    """The device that a run of ``model`` starts on: where its first parameter is while it is used.

    This is the meta device if no weights are loaded.
    """
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            hooks = [*hooks_of(module), *hooks_of(model)] if parameter.is_meta else []
            devices = [hook.execution_device for hook in hooks if hook.execution_device is not None]
            return torch.device(devices[0]) if devices else parameter.device
    return torch.device("cpu")


def check_weights(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
    """Refuse to run with weights on the meta device that no hook loads.

    Args:
        model: that will run.
        modules: those of its modules that may have weights; all of them by default.

    Raises:
        CheckpointError: with the name of a weight.
    """
    if not _on_meta(model.modules() if modules is None else modules):
        return
    if absent := list(_absent(model, "", False)):
        raise CheckpointError(
            f"{len(absent)} weights are on the meta device, which holds no numbers, and nothing loads them "
            f"when their layer runs: {absent[0]}, ... Load the model again if accelerate's hooks were taken "
            f"off one that was loaded with a device_map; let a device_map place modules, not parameters; "
            f"and give a module that was made on the meta device its weights first"
        )


def _on_meta(modules: Iterable[nn.Module]) -> bool:
    # Called in every trace, so it is written without generators.
    for module in modules:
        if parameters := module.__dict__["_parameters"]:
            for tensor in parameters.values():
                if tensor is not None and tensor.is_meta:
                    return True
    return False


def _absent(module: nn.Module, path: str, brought: bool) -> Iterator[str]:
    # The names of parameters on the meta device that no hook of their module or of one above it loads.
    offloading = [hook for hook in hooks_of(module) if hook.offload]
    if not (brought or offloading):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                yield f"{path}{name}"
    brought = brought or any(hook.place_submodules for hook in offloading)
    for name, child in module._modules.items():
        if child is not None:
            yield from _absent(child, f"{path}{name}.", brought)


def hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks on a module that bring weights or inputs to a device, outermost first."""
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


@contextlib.contextmanager
def one_device(model: Any) -> Iterator[None]:
    """Let a pipeline of transformers be built around a model with accelerate's hooks without moving it.

    A pipeline sends inputs to the first entry of the device map, which may be "disk", and moves a model that
    has hooks and no map. Here it sees a map with a single entry.
    """
    if getattr(model, "hf_device_map", None) is None and not any(map(hooks_of, model.modules())):
        yield
        return
    own = model.__dict__
    before = {name: own[name] for name in ("hf_device_map",) if name in own}
    own["hf_device_map"] = {"": input_device(model)}
    try:
        yield
    finally:
        del own["hf_device_map"]
        own.update(before)


class ShapeTracer(GuardedTracer, ScanningTracer):
    """nnsight's tracer of ``scan``, for models whose weights may be offloaded."""

    def execute(self, code: CodeType) -> None:
        """Run the body of the ``with`` beside a run of shapes alone."""
        self.envoy._follow()
        with as_shapes(self.envoy._module):
            super().execute(code)


@contextlib.contextmanager
def as_shapes(model: nn.Module) -> Iterator[None]:
    """Move all weights of an offloaded model to the meta device and set its hooks aside, for a scan.

    accelerate cannot load weights under fake tensors, and a scan needs no numbers.
    """
    if not _on_meta(model.modules()):
        yield
        return
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a module's __dict__, and what it had there
    try:
        for module in list(model.modules()):
            own = module.__dict__
            before.append((own, {name: own[name] for name in REPLACED if name in own}))
            own.pop("_hf_hook", None)
            own["_parameters"] = {
                name: nn.Parameter(tensor.to("meta"), tensor.requires_grad) if tensor is not None else None
                for name, tensor in module._parameters.items()
            }
            own["_buffers"] = {
                name: tensor.to("meta") if tensor is not None else None for name, tensor in module._buffers.items()
            }
        yield
    finally:
        for own, kept in before:
            own.update(kept)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, detached; accelerate fetches it if it is offloaded."""
    parameter = getattr(module, name).detach()
    # While the module runs its parameters are at hand, and fetching them would take them away from it.
    if parameter.is_meta:
        with align_module_device(module):
            parameter = getattr(module, name).detach()
    return parameter
