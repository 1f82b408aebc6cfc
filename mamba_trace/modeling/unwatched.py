"""A mixer that nobody looks into: what its forward returns, in as few calls as that takes.

Around the kernels of a short prompt, the calls of Python and PyTorch take longer than the kernels: the matmuls between
them have emptied the caches of the processor, and each operation of PyTorch costs ten microseconds. So where no site,
no inner module and no gradient is wanted, `unwatched` runs a mixer on the CPU's kernels at once: it reads the weights
of inner modules without calling them, and writes a cache where it lies. What the parameters of the scan are made of
still stands in the mixer alone, which is handed `Nobody` in place of its `Offers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import SiLUActivation
from transformers.cache_utils import LinearAttentionLayer

from ..scan import cpu
from ..scan.dispatch import SUITABLE
from ..scan.recompute import transformed
from ..scan.record import Call
from ..tracing import Visit, is_itself
from .offers import SITE_HOOKS, SITE_NAMES
from .past import PastStates
from .run_report import LayerRun

#: The modules that stand for SiLU, which the kernels of the convolution apply.
SILU = (nn.SiLU, SiLUActivation)


class Nobody:
    """Stands for the `Offers` of a call in which nothing is wanted.

    Attributes:
        passed_by: the names of the modules whose forward was run without a call.
    """

    mask = None

    def __init__(self, mixer: nn.Module) -> None:
        self.modules: Any = mixer._modules
        self.passed_by = ["conv1d", "act"]

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value

    def into(self, name: str, value: Tensor) -> Tensor:
        return value

    def first_wanted(self, *names: str) -> None:
        return None

    def through(self, name: str, value: Tensor) -> Tensor:
        """What the inner module ``name`` returns."""
        module = self.modules[name]
        if not is_itself(module, type(module)):
            returned: Tensor = module(value)
            return returned
        self.passed_by.append(name)
        return type(module).forward(module, value)


class Lent:
    """The memory that a cache has for one layer, which an unwatched mixer reads and overwrites where it lies."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @classmethod
    def of(cls, cache: Any, index: int) -> Lent | None:
        """That of a layer, if the cache does no more than to store, in float32, what it is given; else ``None``."""
        if not isinstance(cache, Cache) or not same_methods(type(cache), Cache, OF_CACHE):
            return None
        layer: Any = cache.layers[index]
        theirs = type(layer).__module__ == LinearAttentionLayer.__module__  # they differ in how memory is made
        if not theirs or not same_methods(type(layer), LinearAttentionLayer, OF_LAYER) or layer.record_past:
            return None
        states = (layer.conv_states[0], layer.recurrent_states[0])
        return cls(layer) if all(state is None or in_floats(state) for state in states) else None

    def state(self, make: Callable[[], Tensor]) -> Tensor:
        """The last state, which the caller overwrites with the next; before all tokens, zeros.

        Args:
            make: makes a tensor of its shape and dtype.
        """
        if not self.layer.is_recurrent_states_initialized[0]:
            self.layer.lazy_initialization(recurrent_states=make())
        state: Tensor = self.layer.recurrent_states[0]
        changed(state)
        return state

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """SiLU of the convolution of ``columns`` [B,L,channels] behind the last ones, which become the last ones."""
        layer = self.layer
        if not layer.is_conv_states_initialized[0]:
            layer.lazy_initialization(conv_states=columns.transpose(1, 2), conv_kernel_size=weight.shape[1])
        own: Tensor = layer.conv_states[0]  # [B,channels,K]
        changed(own)
        if not layer.has_previous_state[0]:
            convolved = cpu.convolved(columns, weight, bias, None, activate=True, columns=own)
            layer.has_previous_state[0] = True
            return convolved
        if columns.shape[1] == 1:
            return cpu.conv_update(columns, weight, bias, own)
        return cpu.convolved(columns, weight, bias, own.clone(), activate=True, columns=own)


#: What a cache and its layer must not do in ways of their own.
OF_CACHE = ("get_conv_state", "update_conv_state", "update_recurrent_state")
OF_LAYER = ("update_conv_state", "update_recurrent_state")


def same_methods(one: type, other: type, names: tuple[str, ...]) -> bool:
    """Whether two classes have the same methods of these names."""
    return all(getattr(one, name, None) is getattr(other, name) for name in names)


def unwatched(
    mixer: Any,
    visit: Visit,
    run: LayerRun,
    hidden_states: Tensor,
    cache: Any,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """What the forward of ``mixer`` returns [B,L,D], if nobody looks into it; else ``None``, and nothing was done.

    Args:
        mixer: the mixer.
        visit: of the running trace.
        run: takes note of the kernels.
        hidden_states: [B,L,D].
        cache, attention_mask: as the mixer was given them.

    Raises:
        PromptError: if the mask is wrong: see `PastStates`.
    """
    if torch.is_grad_enabled() or not suits(mixer, hidden_states):
        return None
    if visit.inside(mixer.__dict__[SITE_HOOKS]) or not is_plain(mixer):
        return None
    lent = None if cache is None else Lent.of(cache, mixer.layer_idx)
    if cache is not None and lent is None:
        return None
    if attention_mask is not None and PastStates(mixer, cache, attention_mask, hidden_states).mask is not None:
        return None
    nobody = Nobody(mixer)
    out = output(mixer, nobody, hidden_states, lent)
    length = hidden_states.shape[1]
    run.calls += (Call("conv_silu", "cpu", length), Call("gated_scan", "cpu", length))
    visit.pass_over((*nobody.passed_by, *mixer.__dict__[SITE_NAMES]))
    return out


def suits(mixer: Any, value: Tensor) -> bool:
    """Whether the CPU's kernels take the input of a mixer, and are asked for."""
    if type(value) is not Tensor or value.dtype is not torch.float32 or not value.is_cpu or not value.numel():
        return False
    if mixer.scans.gated_update is None or mixer.norm_first:
        return False
    if (SUITABLE["cpu"][0] if mixer.kernels == "auto" else mixer.kernels) != "cpu":
        return False
    return not (transformed() or torch.is_autocast_enabled("cpu")) and cpu.unavailable() is None


def is_plain(mixer: Any) -> bool:
    """Whether the kernel of a mixer's convolution may pass conv1d and the activation by: see `is_itself`."""
    act: Any = mixer._modules["act"]
    return type(act) in SILU and is_itself(act, type(act)) and mixer.has_plain_conv1d()


def output(mixer: Any, nobody: Any, hidden_states: Tensor, lent: Lent | None) -> Tensor:
    """What an unwatched mixer returns [B,L,D]. The cache that lends its memory is brought up to date."""
    skip, columns, delta_1 = mixer.divided(nobody.through("in_proj", mixer.entered(hidden_states)))
    conv1d = nobody.modules["conv1d"]
    weight, bias = conv1d.weight.squeeze(1), conv1d.bias  # [channels,K], [channels] or None
    h: Tensor | None = None
    if lent is None:
        conv = cpu.convolved(columns, weight, bias, None, activate=True)
    else:
        conv = lent.convolved(columns, weight, bias)
        h = mixer.from_cache(lent.state(lambda: mixer.to_cache(conv.new_empty(len(conv), *mixer.state_shape))))
    x, *others = mixer.split(conv)
    parameters = mixer.discretisation(nobody, x, delta_1, others)
    steps, A, B, C = parameters.steps(), parameters.make_A(), parameters.B, parameters.C
    gated = mixer.scans.gated_update(mixer.by_head(x), steps, A, B, C, mixer.D_of_scans(), mixer.by_head(skip), h)
    return nobody.through("out_proj", mixer.finished(nobody, mixer.by_channel(gated), skip))


def in_floats(tensor: Tensor) -> bool:
    """Whether a tensor is in float32 and lies in memory without gaps."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


def changed(tensor: Tensor) -> None:
    """Tell autograd that a kernel overwrites a tensor."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
