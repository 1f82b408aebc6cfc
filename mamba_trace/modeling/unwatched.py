"""A mixer that nobody looks into: what its forward returns, in as few calls as that takes.

The calls of Python and PyTorch around the kernels cost time, most of all on a short prompt: the matmuls between them
have emptied the caches of the processor. So where no site, no inner module and no gradient is wanted, `unwatched` runs
a mixer on the CPU's kernels at once: it reads the weights of inner modules without calling them, and writes a cache
where it lies. What the parameters of the scan are made of still stands in the mixer alone, which is handed `Nobody` in
place of its `Offers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import SiLUActivation
from transformers.cache_utils import LinearAttentionLayer

from ..scan import cpu
from ..scan.dispatch import SUITABLE
from ..scan.linear import linear_into, takes
from ..scan.recompute import transformed
from ..scan.record import Call
from ..scan.room import Room
from ..tracing import Visit, forward_of, is_itself
from .offers import SITE_HOOKS, SITE_NAMES
from .past import PastStates, check_rows
from .run_report import LayerRun
from .starting import StartingRuns

#: The modules that stand for SiLU, which the kernels of the convolution apply.
SILU = (nn.SiLU, SiLUActivation)


class Nobody:
    """Stands for the `Offers` of a call in which nothing is wanted.

    Attributes:
        passed_by: the names of the modules whose forward was run without a call.
    """

    mask = None

    def __init__(self, mixer: nn.Module, room: Room | None) -> None:
        self.modules: Any = mixer._modules
        self.room = room
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
        forward = forward_of(module, type(module))
        if forward is None:
            returned: Tensor = module(value)
            return returned
        self.passed_by.append(name)
        room = self.room if type(module) is nn.Linear and name != "out_proj" else None
        if room is None or takes(value, module.weight, module.bias):
            run: Tensor = forward(module, value)
            return run
        out = room.take(name, (*value.shape[:-1], module.out_features), len(value))
        linear_into(out.flatten(0, 1), value.flatten(0, 1), module.weight, module.bias)
        return out


class Anew:
    """What came before a call that starts from nothing."""

    room: Room | None = None  # for the values that are made after it

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """SiLU of the convolution of ``columns`` [B,L,channels] behind those that came before."""
        return cpu.convolved(columns, weight, bias, None, activate=True)

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        """What `ScanFamily.gated_scan` returns for a mixer's ``inputs``, after what came before."""
        gated: Tensor = mixer.scans.gated_update(*inputs, None)[0]
        return gated


#: What a new layer of a cache is made with: no zeros to fill, since a kernel fills the memory that it is given then.
NO_NUMBERS = torch.empty(0, dtype=torch.float32, device="cpu")


class Begun(Anew):
    """A layer of a cache that holds nothing yet, which an unwatched mixer gives its memory, with the values in it."""

    columns: Tensor  # the last columns [B,channels,K]

    def __init__(self, layer: Any, kernel: int) -> None:
        self.layer, self.kernel = layer, kernel

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, _, channels = columns.shape
        self.columns = columns.new_empty(rows, channels, self.kernel)
        return cpu.convolved(columns, weight, bias, None, activate=True, columns=self.columns)

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        gated: Tensor
        gated, state = mixer.scans.gated_update(*inputs, None)
        layer, state = self.layer, mixer.to_cache(state)
        new = {"conv_states": NO_NUMBERS, "recurrent_states": NO_NUMBERS}
        try:
            layer.lazy_initialization(**new, conv_kernel_size=self.kernel)
            layer.conv_states[0], layer.recurrent_states[0] = self.columns, state
            layer.has_previous_state[0] = True
        except BaseException:  # an interrupt, too
            flags = (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state)
            for flag in flags:
                flag[0] = False
            raise
        return gated


class Lent(Anew):
    """The memory that a cache has for one layer, which an unwatched mixer reads and overwrites where it lies.

    Attributes:
        columns: the last columns [B,channels,K]; anything where no call came before.
        state: the last state, as the cache has it; zeros where no call came before.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.columns: Tensor = layer.conv_states[0]
        self.state: Tensor = layer.recurrent_states[0]

    @classmethod
    def of(cls, cache: Any, mixer: Any, value: Tensor) -> Anew | None:
        """That of a mixer's layer for its input ``value`` [B,L,D], or `Begun` where there is none yet.

        ``None`` if the cache does more than to store, in float32, what it is given.
        """
        if not isinstance(cache, Cache) or not same_methods(type(cache), Cache, OF_CACHE):
            return None
        layer: Any = cache.layers[mixer.layer_idx]
        theirs = type(layer).__module__ == LinearAttentionLayer.__module__  # they differ in how memory is made
        if not theirs or not same_methods(type(layer), LinearAttentionLayer, OF_LAYER) or layer.record_past:
            return None
        made = layer.is_conv_states_initialized[0], layer.is_recurrent_states_initialized[0]
        if not all(made):
            return None if any(made) else Begun(layer, mixer.conv_kernel_size)
        lent = cls(layer)
        check_rows(lent.columns, len(value))
        return lent if in_floats(lent.columns) and in_floats(lent.state) else None

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        changed(self.columns)
        begun = self.layer.has_previous_state
        if begun[0] and columns.shape[1] == 1:
            return cpu.conv_update(columns, weight, bias, self.columns)
        before = self.columns.clone() if begun[0] else None
        convolved = cpu.convolved(columns, weight, bias, before, activate=True, columns=self.columns)
        begun[0] = True
        return convolved

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        changed(self.state)
        gated: Tensor = mixer.scans.gated_update(*inputs, mixer.from_cache(self.state))[0]
        return gated


class InRuns(Anew):
    """Where the runs of a sweep start, which are the same in all rows.

    Args:
        cache: of the sweep.
        layer: the mixer's.
    """

    def __init__(self, cache: StartingRuns, layer: int) -> None:
        self.cache, self.layer, self.room = cache, layer, cache.room

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        before = self.cache.convolution(self.layer, len(columns))
        runs, room = self.cache.runs, self.room
        return cpu.causal_conv_runs(columns, weight, bias, before, runs, activate=True, room=room)

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        states = self.cache.state(self.layer, len(inputs[0]))
        runs, how = self.cache.runs, {"kernels": mixer.kernels, "room": self.room}
        gated: Tensor = mixer.scans.gated_runs(*inputs, states, runs, **how)
        return self.cache.columns_read(gated, self.layer)


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
        PromptError: if the mask is wrong (see `PastStates`), or the cache has other rows.
    """
    if torch.is_grad_enabled() or not suits(mixer, hidden_states):
        return None
    if visit.inside(mixer.__dict__[SITE_HOOKS]) or not is_plain(mixer):
        return None
    if attention_mask is not None and PastStates(mixer, cache, attention_mask, hidden_states).mask is not None:
        return None
    past = what_came_before(mixer, cache, hidden_states)
    if past is None:
        return None
    nobody = Nobody(mixer, past.room)
    out, length = output(mixer, nobody, hidden_states, past), hidden_states.shape[1]
    run.calls += (Call("conv_silu", "cpu", length), Call("gated_scan", "cpu", length))
    visit.pass_over((*nobody.passed_by, *mixer.__dict__[SITE_NAMES]))
    return out


def what_came_before(mixer: Any, cache: Any, value: Tensor) -> Anew | None:
    """What came before a call of a mixer with the input ``value``; ``None`` where a kernel cannot start from it."""
    if cache is None:
        return Anew()
    return InRuns(cache, mixer.layer_idx) if isinstance(cache, StartingRuns) else Lent.of(cache, mixer, value)


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


def output(mixer: Any, nobody: Any, hidden_states: Tensor, past: Anew) -> Tensor:
    """What an unwatched mixer returns [B,L,D], after what came before."""
    skip, columns, delta_1 = mixer.divided(nobody.through("in_proj", mixer.entered(hidden_states)))
    conv1d = nobody.modules["conv1d"]
    x, *others = mixer.split(past.convolved(columns, conv1d.weight.squeeze(1), conv1d.bias))
    parameters = mixer.discretisation(nobody, x, delta_1, others)
    steps, A, B, C = parameters.steps(), parameters.make_A(), parameters.B, parameters.C
    gated = past.gated(mixer, mixer.by_head(x), steps, A, B, C, mixer.D_of_scans(), mixer.by_head(skip))
    return nobody.through("out_proj", mixer.finished(nobody, mixer.by_channel(gated), skip))


def in_floats(tensor: Tensor) -> bool:
    """Whether a tensor is in float32 and lies in memory without gaps."""
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


def changed(tensor: Tensor) -> None:
    """Tell autograd that a kernel overwrites a tensor."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
