"""Who stands between a caller and a module's own ``forward``: PyTorch's hooks, accelerate and nnsight.

A ``forward`` in a module's ``__dict__`` takes precedence over the method of its class, and two libraries put
one there: accelerate, whose hooks bring weights and inputs to their device, and nnsight, whose `Controller`
hands the module's input and output to the running trace. Each wraps what it found, so whichever came last is
outermost, and taking accelerate's hooks off can take nnsight's controller off as well.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from nnsight.intervention.source import STATE as CONTROLLER_STATE
from nnsight.intervention.source import Controller
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ..scan.linear import linear


def listened_to(module: nn.Module | None) -> bool:
    """Whether PyTorch hooks are registered on a module, or on all modules, so that it must be called."""
    return module is not None and (has_hooks_of_its_own(module) or has_global_hooks())


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether PyTorch hooks are registered on this very module."""
    return any(hooks_of(module))


#: Under these names a module has the dictionaries of its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: These dictionaries of a module.
hooks_of: Callable[[nn.Module], tuple[Mapping[int, Any], ...]] = operator.attrgetter(*HOOKS)


#: The compiler that looks at each function before it runs; ``None`` if none does. A release that cannot tell has one.
_compiler_at_work = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that ``torch.compile`` runs as it is, with all that it calls.

    What a hookable module runs depends on who looks, which a compiled graph would not ask again; and a compiler that
    follows the question takes minutes for it. This is ``torch.compiler.disable``, which loads the compiler, as soon as
    somebody else has loaded it.
    """
    disabled = functools.cache(functools.partial(torch.compiler.disable, function))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules and (torch.compiler.is_compiling() or _compiler_at_work() is not None):
            return disabled()(*args, **kwargs)
        return function(*args, **kwargs)

    vars(run).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="sites are asked for in each call")
    return run


class _Block:
    """One block of `as_written`."""


class _Compiler:
    """What blocks of `as_written` share in all threads: PyTorch has one stance for the process.

    Attributes:
        blocks: those under way. The references are weak, so that one whose end was interrupted does not stay.
        stance: what gives PyTorch its own stance back; ``None`` outside of all blocks.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks: weakref.WeakSet[_Block] = weakref.WeakSet()
        self.stance: Any = None


_compiler = _Compiler()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """A block in which what ``torch.compile`` has compiled runs as it was written: it cannot follow a trace."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    block = _Block()
    try:
        with _compiler.lock:
            _compiler.blocks.add(block)
            if _compiler.stance is None:
                _compiler.stance = torch.compiler.set_stance("force_eager")
        yield
    finally:
        with _compiler.lock:
            _compiler.blocks.discard(block)
            if not _compiler.blocks and _compiler.stance is not None:
                _compiler.stance.__exit__(None, None, None)
                _compiler.stance = None


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of ``nn.Linear``, multiplied as `scan.linear.linear` does it."""
    return linear(input, self.weight, self.bias)


#: The forward of a class -> one that does the same in less time.
QUICKER: dict[Callable[..., Any], Callable[..., Any]] = {nn.Linear.forward: linear_forward}


def quicken(modules: Iterable[nn.Module]) -> None:
    """Let nnsight's controllers run what is `QUICKER` than the forward of a module's class.

    A module that is looked into by ``.source`` runs as it was written, and a copy does until it is wrapped.
    """
    for module in modules:
        state = module.__dict__.get(CONTROLLER_STATE)
        if state is not None and state.body is type(module).forward:
            state.body = QUICKER.get(state.body, state.body)


def is_itself(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class ``plain`` does with its weights, and nothing else.

    It does not if the module is of a subclass or was replaced (an adapter, a quantised layer), if it has
    hooks or another forward, or if accelerate keeps its weights elsewhere until the call.
    """
    return forward_of(module, plain) is not None


def forward_of(module: nn.Module, plain: type[nn.Module]) -> Callable[..., Any] | None:
    """What calling ``module`` runs, a function of the module and its arguments; ``None`` if not `is_itself`."""
    own, forward = module.__dict__, plain.forward
    quicker = QUICKER.get(forward, forward)
    runs = own.get("forward", forward)
    if isinstance(runs, Controller):
        runs = runs.state.body
    if type(module) is not plain or not (runs is forward or runs is quicker):
        return None
    if any(hooks_of(module)) or has_global_hooks() or plain.__call__ is not nn.Module.__call__:
        return None
    hook = own.get("_hf_hook")
    return quicker if hook is None or (isinstance(hook, AlignDevicesHook) and not hook.offload) else None


def runs_its_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs the forward of its class, inside what accelerate and nnsight put around it."""
    forward = _inside_accelerate(module)
    if isinstance(forward, Controller):
        forward = forward.state.original
    return forward is None or type(module).forward in (forward, getattr(forward, "__func__", None))


def rebind_forward(module: nn.Module) -> None:
    """Tell accelerate and nnsight, which keep the forward they wrapped, that a module's class has changed."""
    state = module.__dict__.get(CONTROLLER_STATE)
    if state is not None and not state.sourced:
        state.body = state.original = type(module).forward
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)


def reinstate_controllers(modules: Iterable[nn.Module]) -> None:
    """Put nnsight's controller back on every module of a tree where accelerate has taken its place.

    A module that was wrapped first and dispatched later would run accelerate's hook twice: around the
    controller and inside it. If a module was dispatched first and its hooks are then removed, it gets back
    its own forward without a controller, and the trace sees nothing of it. A forward that somebody else put
    there is left alone.

    Args:
        modules: of the tree; those that no envoy stands for are passed over.
    """
    for module in modules:
        own = module.__dict__
        if isinstance(own.get("forward"), Controller) or (state := own.get(CONTROLLER_STATE)) is None:
            continue
        forward = _inside_accelerate(module)
        if isinstance(forward, Controller):
            own["forward"] = forward
        elif forward is None or getattr(forward, "__func__", None) is type(module).forward:
            own["forward"] = Controller(module, state)


def _inside_accelerate(module: nn.Module) -> Any:
    # The forward in the module's __dict__, or the one that accelerate's wrapper there calls; None if none.
    forward = module.__dict__.get("forward")
    if "_hf_hook" in module.__dict__ and isinstance(forward, functools.partial):
        return module.__dict__.get("_old_forward")
    return forward
