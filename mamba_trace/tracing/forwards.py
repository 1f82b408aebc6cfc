"""Who has taken the place of a module's ``forward``.

An attribute of that name on the module itself stands before the method of its class, and two libraries put
one there: accelerate, whose hooks bring weights and inputs to their device, and nnsight, whose `Controller`
hands the module's input and output to the running trace. Each keeps what it found, so which of them is on
top depends on who came last, and taking accelerate's hooks off can take nnsight's controller with them.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate.hooks import AlignDevicesHook
from nnsight.intervention.source import STATE as CONTROLLER_STATE
from nnsight.intervention.source import Controller
from torch import nn

from .visit import listened_to


def is_itself(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class ``plain`` does with its weights, and nothing else.

    Not so for a subclass or what replaced it (an adapter, a quantised layer), nor where somebody has hooks
    on it, another forward in place of its own, or its weights elsewhere until it is called (accelerate).
    """
    forward = module.__dict__.get("forward", plain.forward)
    if isinstance(forward, Controller):
        forward = forward.state.body
    if type(module) is not plain or forward is not plain.forward or listened_to(module):
        return False
    hook = module.__dict__.get("_hf_hook")
    return hook is None or (isinstance(hook, AlignDevicesHook) and not hook.offload)


def runs_its_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs the forward of its class, below what accelerate and nnsight put around it."""
    own = module.__dict__
    forward = own.get("forward")
    if "_hf_hook" in own and isinstance(forward, functools.partial):  # accelerate's wrapper
        forward = own.get("_old_forward")
    if isinstance(forward, Controller):
        forward = forward.state.original
    plain = type(module).forward
    return forward is None or forward is plain or getattr(forward, "__func__", None) is plain


def rebind_forward(module: nn.Module) -> None:
    """Make every wrapper around ``module.forward`` run the forward of its present class.

    accelerate and nnsight keep the forward they wrapped. When the class of a module changes under them,
    they must be told.
    """
    state = module.__dict__.get(CONTROLLER_STATE)
    if state is not None and not state.sourced:
        state.body = state.original = type(module).forward
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)


def reinstate_controllers(interleaver: Any) -> None:
    """Put nnsight's controller back on every module of a tree whose place accelerate has taken.

    A wrapped module that is dispatched runs accelerate's hook twice: once around the controller, and once in
    it. One that was dispatched before it was wrapped, and whose hooks are removed, has its own forward back
    and no controller, so that nothing of it is served. Another forward that somebody put there is left alone.

    Args:
        interleaver: of the tree, which knows the envoy of every module.
    """
    for envoy in list(interleaver.envoys.values()):
        module = envoy._module
        own = module.__dict__
        forward, state = own.get("forward"), own.get(CONTROLLER_STATE)
        if isinstance(forward, Controller) or state is None:
            continue
        if "_hf_hook" in own and isinstance(forward, functools.partial):  # accelerate's wrapper
            forward = own.get("_old_forward")
        if isinstance(forward, Controller):
            own["forward"] = forward
        elif forward is None or getattr(forward, "__func__", None) is type(module).forward:
            own["forward"] = Controller(module, state)
