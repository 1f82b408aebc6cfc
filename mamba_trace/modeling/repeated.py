"""What a layer does that nobody looks into, noted once and done again without the code that did it.

For one token, and for a short prompt, the kernels of a layer take less time than the calls around them. A layer does
the same with each input of one shape, so what it does is noted (`scan.cpu.captured`) and repeated, as long as the layer
is what it was. Each thread has notes of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..scan.cpu.captured import Capture, Replay
from ..scan.linear import most_vectors
from ..scan.noting import notes, under_a_mode
from ..tracing import forward_of
from .carried import Anew, Begun, Lent
from .offers import SiteModule

#: The modules that stand for SiLU, which the kernels of the convolution apply.
SILU = (nn.SiLU, SiLUActivation)
#: The package, which knows what its own modules do.
PACKAGE = __name__.split(".")[0]
#: The kinds of values among a module's own that say how it computes.
SETTINGS = (bool, int, float, str, tuple, type(None))
#: Of how many kinds of calls notes of a module are kept.
KINDS = 8
#: How often notes of a module may have been of no use.
IN_VAIN = 3


class _Kept(threading.local):
    """The notes of this thread, by module."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[nn.Module, Notes] = weakref.WeakKeyDictionary()


_kept = _Kept()
if hasattr(os, "register_at_fork"):  # the threads that the notes speak of do not survive it
    os.register_at_fork(after_in_child=lambda: _kept.of.clear())


class Notes:
    """What is known of one module.

    Attributes:
        seen: how it was called.
        again: how it was called -> what it did.
        state: what it was when that was noted.
        in_vain: how often the notes were of no use, because it was changed before it was called again.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.again: dict[Any, Repeated] = {}
        self.state: State | None = None
        self.in_vain = 0

    def begin(self, module: nn.Module) -> bool:
        """Begin to take notes of one more call, unless they would be of no use."""
        if self.state is None or not self.state.holds() or len(self.again) >= KINDS:
            self.in_vain += bool(self.again) and not any(again.used for again in self.again.values())
            self.again.clear()
            self.state = State(module) if can_be_repeated(module) else None
        return self.state is not None


def how_called(value: Tensor, past: Any) -> tuple[Any, ...] | None:
    """What of a call decides what a module does for an input [B,L,D]; ``None`` for a call that is not noted."""
    if type(past) not in (Anew, Begun, Lent) or value.numel() > most_vectors() * value.shape[-1]:
        return None
    if under_a_mode() or notes.listener is not None or not value.is_contiguous():
        return None
    shapes = [each.shape for each in past.memory()] if type(past) is Lent else []
    return type(past), past.begun, value.shape, *shapes, torch.get_num_threads(), torch.is_inference_mode_enabled()


def repeated(module: nn.Module, value: Tensor, past: Any) -> Tensor | None:
    """What a module that nobody looks into returns [B,L,D]; ``None`` if it has to run for that.

    Args:
        module: a mixer or a block.
        value: its input [B,L,D].
        past: what came before.
    """
    kept = _kept.of.get(module)
    if kept is None or (again := kept.again.get(how_called(value, past))) is None:
        return None
    assert kept.state is not None
    return again.run(value, past) if kept.state.holds() else None


def noted(module: nn.Module, value: Tensor, past: Any, run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` returns, which is what a module returns that cannot be `repeated`.

    A token after others is noted at once, since others will follow; a prompt once another one has been as long.
    """
    called = how_called(value, past)
    if called is None:
        return run()
    kept = _kept.of.setdefault(module, Notes())
    first = called not in kept.seen
    kept.seen.add(called)
    if kept.in_vain >= IN_VAIN or (first and not (past.begun and value.shape[1] == 1)) or not kept.begin(module):
        return run()
    with Capture() as capture:
        out = run()
    again = Repeated(capture, value, past, out, [tensor for _, _, tensor in tensors_of(module)])
    if again.replay.refused:
        kept.in_vain = IN_VAIN
    else:
        kept.again[called] = again
    return out


class Repeated:
    """What a module did in one call.

    Args:
        capture: notes of it.
        value: its input [B,L,D].
        past: what came before, as it was left.
        out: what it returned [B,L,D].
        fixed: its parameters and buffers.
    """

    def __init__(self, capture: Capture, value: Tensor, past: Anew, out: Tensor, fixed: list[Tensor]) -> None:
        self.used, self.shape = False, out.shape
        self.shapes = [each.shape for each in past.memory()]
        self.replay = Replay(capture, (value, out, *past.memory()), fixed)

    def run(self, value: Tensor, past: Anew) -> Tensor:
        """What the module returns [B,L,D]."""
        self.used = True
        out = value.new_empty(self.shape)
        self.replay.run(value, out, *past.to_be_written(self.shapes))
        return out


class State:
    """What a module is: all that decides what it computes.

    Args:
        module: a mixer or a block.
    """

    def __init__(self, module: nn.Module) -> None:
        inner = [*inner_modules(module)]
        self.modules = [(*each, forward_of(each[2], type(each[2]))) for each in inner]
        owners = [module, *(each for _, _, each in inner if made_here(type(each)))]
        self.settings = [(vars(owner), len(vars(owner)), settings_of(owner)) for owner in owners]
        self.tensors = [(*each, each[2].data_ptr(), each[2].shape, each[2].dtype) for each in tensors_of(module)]

    def holds(self) -> bool:
        """Whether the module still is that."""
        for group, name, module, forward in self.modules:
            if group.get(name) is not module or forward_of(module, type(module)) is not forward:
                return False
        for own, count, settings in self.settings:
            if len(own) != count or any(own.get(name) is not value for name, value in settings):
                return False
        for group, name, tensor, address, shape, dtype in self.tensors:
            if group.get(name) is not tensor or tensor.data_ptr() != address or tensor.shape != shape:
                return False
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                return False
        return True


def inner_modules(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """The modules inside of one that compute something, each with the dictionary that has it by name."""
    for name, inner in module._modules.items():
        if inner is not None and type(inner) is not SiteModule:
            yield module._modules, name, inner
            yield from inner_modules(inner)


def tensors_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The parameters and buffers of a module and those inside, each with the dictionary that has it by name."""
    for owner in (module, *(inner for _, _, inner in inner_modules(module))):
        for group in (owner._parameters, owner._buffers):
            yield from ((group, name, tensor) for name, tensor in group.items() if tensor is not None)


def settings_of(module: nn.Module) -> list[tuple[str, Any]]:
    """The numbers and words among a module's own attributes."""
    return [(name, value) for name, value in vars(module).items() if isinstance(value, SETTINGS)]


def can_be_repeated(module: nn.Module) -> bool:
    """Whether it is known what a mixer or a block does: nobody has replaced or hooked anything in it."""
    inner = [inner for _, _, inner in inner_modules(module)]
    if not made_here(type(module)) or not all(map(forward_known, inner)):
        return False
    return not any(has_ways_of_its_own(owner) for owner in (module, *inner))


def has_ways_of_its_own(module: nn.Module) -> bool:
    """Whether a function stands in a module in place of one of its class. Its forward is asked for elsewhere."""
    kind = type(module)
    return any(callable(value) and hasattr(kind, name) for name, value in vars(module).items() if name != "forward")


def forward_known(module: nn.Module | None) -> bool:
    """Whether it is known what calling an inner module does: nobody has replaced or hooked it."""
    if module is None:
        return True
    kind = type(module)
    known = kind in (nn.Linear, nn.Conv1d, nn.Identity, *SILU) or made_here(kind)
    return known and forward_of(module, kind) is not None


def made_here(kind: type) -> bool:
    """Whether a class is of this package."""
    return kind.__module__.split(".")[0] == PACKAGE
