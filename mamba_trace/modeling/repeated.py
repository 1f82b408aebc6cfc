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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..scan.cpu.captured import Capture, Replay
from ..scan.linear import most_noted, precision
from ..scan.noting import notes, under_a_mode
from ..scan.recompute import in_memory
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
KINDS = 64
#: How many kinds of calls are remembered at most, to tell which come again.
SEEN = 256
#: How often notes of a module may have been of no use.
IN_VAIN = 3
#: Under this name a module keeps its notes.
NOTES = "_mamba_trace_notes"


class Notes(threading.local):
    """What a thread knows of one module. Copies of the module begin without.

    Args:
        module: a reference to a mixer or a block, which keeps the notes.

    Attributes:
        module: the reference.
        seen: how it was called.
        again: how it was called -> what it did; ``None`` if that cannot be done again.
        state: what it was when that was noted.
        in_vain: how often the notes were of no use, because it was changed before it was called again.
    """

    state: State | None = None
    in_vain = 0

    def __init__(self, module: weakref.ref[nn.Module]) -> None:
        self.module = module
        self.seen: set[Any] = set()
        self.again: dict[Any, Repeated | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()

    @classmethod
    def of(cls, module: nn.Module) -> Notes:
        """Those of a module, which may be new."""
        kept = vars(module).get(NOTES)
        if type(kept) is not cls or kept.module() is not module:
            kept = vars(module)[NOTES] = cls(weakref.ref(module))
        return kept

    def begin(self, module: nn.Module) -> bool:
        """Begin to take notes of one more call, unless they would be of no use."""
        if self.state is None or not self.state.holds():
            self.in_vain += bool(self.again) and not any(again and again.used for again in self.again.values())
            self.again.clear()
            use = self.in_vain < IN_VAIN and can_be_repeated(module)
            self.state = State(module) if use else None
        return self.state is not None and len(self.again) < KINDS


def how_called(value: Tensor, past: Any) -> tuple[Any, ...] | None:
    """What of a call decides what a module does for an input [B,L,D]; ``None`` for a call that is not noted."""
    if type(past) not in (Anew, Begun, Lent) or value.numel() > most_noted() * value.shape[-1]:
        return None
    if under_a_mode() or notes.listener is not None or not (value.is_contiguous() and in_memory(value)):
        return None
    shapes = [each.shape for each in past.memory()] if type(past) is Lent else []
    others = torch.get_num_threads(), torch.is_inference_mode_enabled(), precision()
    return type(past), past.begun, value.shape, *shapes, *others, os.getpid()  # no thread survives a fork


def repeated(module: nn.Module, value: Tensor, past: Any) -> Tensor | None:
    """What a module that nobody looks into returns [B,L,D]; ``None`` if it has to run for that.

    Args:
        module: a mixer or a block.
        value: its input [B,L,D].
        past: what came before.
    """
    kept = vars(module).get(NOTES)
    if type(kept) is not Notes or kept.module() is not module:
        return None
    again = kept.again.get(how_called(value, past))
    return None if again is None or kept.state is None or not kept.state.holds() else again.run(value, past)


def noted(module: nn.Module, value: Tensor, past: Any, run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` returns, which is what a module returns that cannot be `repeated`.

    A token after others is noted at once, since others will follow; a prompt once another one has been as long.
    """
    called = how_called(value, past)
    if called is None:
        return run()
    kept = Notes.of(module)
    if called not in kept.seen and not (past.begun and value.shape[1] == 1):
        if len(kept.seen) >= SEEN:
            kept.seen.clear()
        kept.seen.add(called)
        return run()
    if not kept.begin(module) or called in kept.again:
        return run()
    with Capture() as capture:
        out = run()
    fixed = [*module.parameters(), *module.buffers()]
    again = Repeated(capture, value, past, out, fixed)
    kept.again[called] = None if again.replay.refused else again
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


class Before(NamedTuple):
    """What a module was, itself and without those inside.

    Attributes:
        module: a reference to it.
        kind, forward: its class, and what calling it runs.
        names, settings, lists: of its own attributes all names, those that say how it computes, and lists with copies.
        inner: its modules by name, as references.
        tensors: its parameters and buffers: group, name, reference, address, shape and dtype.
        lacking: groups and names of those that are ``None``, such as the bias of a linear layer without any.
    """

    module: Any
    kind: Any
    forward: Any
    names: list[str]
    settings: list[tuple[str, Any]]
    lists: list[tuple[str, list[Any], list[Any]]]
    inner: list[tuple[str, Any]]
    tensors: list[tuple[str, str, Any, int, Any, Any]]
    lacking: list[tuple[str, str]]


class State:
    """What a module is: all that decides what it computes. It keeps no module and no tensor alive.

    Args:
        module: a mixer or a block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = [part_of(each) for each in (module, *all_inside(module))]

    def holds(self) -> bool:
        """Whether the module still is that."""
        for reference, kind, forward, names, settings, lists, inner, tensors, lacking in self.parts:
            module = reference()
            if module is None or type(module) is not kind or [*(own := vars(module))] != names:
                return False
            if forward is not None and forward_of(module, kind) is not forward:
                return False
            for name, value in settings:
                if own.get(name) is not value:
                    return False
            if any(own.get(name) is not value or value != copy for name, value, copy in lists):
                return False
            for name, each in inner:
                if own["_modules"].get(name) is not each():
                    return False
            for group, name, each, address, shape, dtype in tensors:
                tensor = each()
                if tensor is None or tensor is not own[group].get(name) or tensor.data_ptr() != address:
                    return False
                if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
                    return False
            if any(own[group].get(name) is not None for group, name in lacking):
                return False
        return True


def part_of(module: nn.Module) -> Before:
    """What a module is, itself."""
    own, kind, found = vars(module), type(module), [*tensors_of(module)]
    return Before(
        weakref.ref(module),
        kind,
        forward_of(module, kind),  # hooks on a block itself are run by whoever calls it
        [*own],
        [(name, value) for name, value in own.items() if isinstance(value, SETTINGS)],
        [(name, value, value[:]) for name, value in own.items() if isinstance(value, list)],
        [(name, weakref.ref(inner)) for name, inner in right_inside(module).items()],
        [(*at, weakref.ref(t), t.data_ptr(), t.shape, t.dtype) for *at, t in found if t is not None],
        [(group, name) for group, name, tensor in found if tensor is None],
    )


def right_inside(module: nn.Module) -> dict[str, nn.Module]:
    """The modules right inside of one that compute something, by name."""
    found = module._modules.items()
    return {name: inner for name, inner in found if inner is not None and type(inner) is not SiteModule}


def all_inside(module: nn.Module) -> Iterator[nn.Module]:
    """Those, and the ones inside of them."""
    for inner in right_inside(module).values():
        yield inner
        yield from all_inside(inner)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """The parameters and buffers of a module, by group and name; ``None`` for one that there might be."""
    for group in ("_parameters", "_buffers"):
        yield from ((group, name, tensor) for name, tensor in vars(module)[group].items())


def can_be_repeated(module: nn.Module) -> bool:
    """Whether it is known what a mixer or a block does: nobody has replaced or hooked anything in it."""
    inner = [*all_inside(module)]
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
