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
        passed_by: the names of the modules whose forward was run without a call, each once.
    """

    mask = None

    def __init__(self, mixer: nn.Module, room: Room | None) -> None:
        self.modules: Any = mixer._modules
        self.room = room
        self.passed_by = dict.fromkeys(("conv1d", "act"))

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
        self.passed_by[name] = None
        room = self.room if type(module) is nn.Linear and name != "out_proj" else None
        if room is None or takes(value, module.weight, module.bias):
            run: Tensor = forward(module, value)
            return run
        out = room.take(name, (*value.shape[:-1], module.out_features), len(value))
        linear_into(out.flatten(0, 1), value.flatten(0, 1), module.weight, module.bias)
        return out


class Anew:
    """What came before a call that starts from nothing, and what each of its stretches hands on to the next.

    Args:
        kernel: how many columns it hands on: K.

    Attributes:
        columns: memory for the last columns [B,channels,K].
        state: the last state [B,...,N] as the scans have it; ``None`` for zeros.
        begun: whether ``columns`` has those that came before.
    """

    room: Room | None = None  # for the values that are made after it

    def __init__(self, kernel: int) -> None:
        self.kernel = kernel
        self.columns: Tensor | None = None
        self.state: Tensor | None = None
        self.begun = False

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """SiLU of the convolution of ``columns`` [B,L,channels] behind those that came before."""
        if self.columns is None:
            self.columns = columns.new_empty(len(columns), columns.shape[-1], self.kernel)
        if self.begun and columns.shape[1] == 1:
            return cpu.conv_update(columns, weight, bias, self.columns)
        before = self.columns.clone() if self.begun else None
        self.begun = True
        return cpu.convolved(columns, weight, bias, before, activate=True, columns=self.columns)

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        """What `ScanFamily.gated_scan` returns for a mixer's ``inputs``, after what came before."""
        gated: Tensor
        gated, self.state = mixer.scans.gated_update(*inputs, self.state)
        return gated

    def ended(self, mixer: Any) -> None:
        """Take note that a mixer's call has ended."""


#: What a new layer of a cache is made with: no zeros to fill, since a kernel fills the memory that it is given then.
NO_NUMBERS = torch.empty(0, dtype=torch.float32, device="cpu")


class Begun(Anew):
    """A layer of a cache that holds nothing yet, which an unwatched mixer gives its memory, with the values in it."""

    def __init__(self, layer: Any, kernel: int) -> None:
        super().__init__(kernel)
        self.layer = layer

    def ended(self, mixer: Any) -> None:
        layer, state = self.layer, mixer.to_cache(self.state)
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


class Lent(Anew):
    """The memory that a cache has for one layer, which an unwatched mixer reads and overwrites where it lies."""

    def __init__(self, layer: Any, mixer: Any) -> None:
        super().__init__(mixer.conv_kernel_size)
        self.layer = layer
        self.columns, self.state = layer.conv_states[0], mixer.from_cache(layer.recurrent_states[0])
        self.begun = layer.has_previous_state[0]

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
        columns: Tensor = layer.conv_states[0]
        check_rows(columns, len(value))
        return cls(layer, mixer) if in_floats(columns) and in_floats(layer.recurrent_states[0]) else None

    def convolved(self, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        changed(self.layer.conv_states[0])
        convolved = super().convolved(columns, weight, bias)
        self.layer.has_previous_state[0] = True
        return convolved

    def gated(self, mixer: Any, *inputs: Tensor) -> Tensor:
        changed(self.layer.recurrent_states[0])
        return super().gated(mixer, *inputs)


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
        return Anew(mixer.conv_kernel_size)
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


#: About how many numbers in_proj returns in a stretch of a long call. They are 16 MiB: of what malloc is asked for it
#: keeps up to 32 MiB to be used again, and maps all that is larger anew each time, page by page.
STRETCH = 1 << 22
#: How many positions a stretch has at least.
SHORTEST = 64
#: The package, whose own modules can be cut.
PACKAGE = __name__.split(".")[0]


def output(mixer: Any, nobody: Nobody, hidden_states: Tensor, past: Anew) -> Tensor:
    """What an unwatched mixer returns [B,L,D], after what came before."""
    positions = per_stretch(mixer, hidden_states, past)
    if positions >= hidden_states.shape[1]:
        out = of_stretch(mixer, nobody, hidden_states, past)
    else:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        for part, stretch in zip(out.split(positions, 1), hidden_states.split(positions, 1), strict=True):
            part.copy_(of_stretch(mixer, nobody, stretch, past))
    past.ended(mixer)
    return out


def per_stretch(mixer: Any, hidden_states: Tensor, past: Anew) -> int:
    """How many positions of [B,L,D] a mixer takes at once: all, or those of a stretch."""
    rows, length, _ = hidden_states.shape
    stretches = min(rows * length * mixer.in_proj.out_features // STRETCH, length // SHORTEST)
    if stretches < 2 or isinstance(past, InRuns) or not all(map(cuts, mixer._modules.values())):
        return length
    return -(-length // stretches)


def cuts(module: nn.Module) -> bool:
    """Whether an inner module does the same to each position, however many it is given, and nobody hears of its calls."""
    kind = type(module)
    known = kind in (nn.Linear, nn.Conv1d, nn.Identity, *SILU) or kind.__module__.split(".")[0] == PACKAGE
    return known and forward_of(module, kind) is not None


def of_stretch(mixer: Any, nobody: Nobody, hidden_states: Tensor, past: Anew) -> Tensor:
    """What an unwatched mixer returns for the positions of one stretch [B,l,D]."""
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
