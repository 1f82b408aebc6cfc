"""A mixer that nobody looks into, but for single states: what its forward returns, in as few calls as that takes.

The calls of Python and PyTorch around the kernels cost time, most of all on a short prompt: the matmuls between them
have emptied the caches of the processor. So where no site, no inner module and no gradient is wanted, `unwatched` runs
a mixer on the CPU's kernels at once: it reads the weights of inner modules without calling them, and writes a cache
where it lies. What the parameters of the scan are made of still stands in the mixer alone, which is handed `Nobody` in
place of its `Offers`.

A long prompt would fill so much memory with each value that the operating system gives it anew for each layer, which
takes time. So it is run in stretches of positions, each of which goes on from the columns and the state of the last one
(`carried`) and uses its memory again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..scan import cpu
from ..scan.dispatch import SUITABLE
from ..scan.linear import by_onednn, linear_into, most_noted, multiplier
from ..scan.recompute import transformed
from ..scan.record import Call, recording
from ..scan.room import Room
from ..sites import STATE
from ..tracing import Visit, forward_of, is_itself, take_note_of_mask
from .carried import Anew, InRuns, what_came_before
from .discretisation import Discretisation
from .offers import SITE_HOOKS, SITE_NAMES
from .past import PastStates
from .repeated import SILU, forward_known, noted, repeated, right_inside
from .run_report import LayerRun
from .starting import StartingRuns
from .stopped import MoreIsWanted, Stopped


class Nobody:
    """Stands for the `Offers` of a call in which nothing is wanted.

    Args:
        mixer: whose call it is.
        room: for the values of a sweep.

    Attributes:
        passed_by: the names of the modules whose forward was run without a call, each once.
    """

    mask = None

    def __init__(self, mixer: Any, room: Room | None) -> None:
        self.mixer, self.modules = mixer, mixer._modules
        self.room = room
        self.passed_by = dict.fromkeys(("conv1d", "act"))

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value

    def into(self, name: str, value: Tensor) -> Tensor:
        return value

    def first_wanted(self, *names: str) -> None:
        return None

    def before_scan(
        self, hidden_states: Tensor, past: Anew | Stopped
    ) -> tuple[Tensor, Tensor, Callable[[], Discretisation]]:
        """The gate and x [B,L,E] and what makes the parameters of the scan, of the mixer's input [B,L,D]."""
        mixer, conv1d = self.mixer, self.modules["conv1d"]
        skip, columns, delta_1 = mixer.divided(self.through("in_proj", mixer.entered(hidden_states)))
        x, *others = mixer.split(past.convolved(columns, conv1d.weight.squeeze(1), conv1d.bias))
        return skip, x, functools.partial(mixer.discretisation, self, x, delta_1, others)

    def through(self, name: str, value: Tensor) -> Tensor:
        """What the inner module ``name`` returns."""
        module = self.modules[name]
        forward = forward_of(module, type(module))
        if forward is None:
            returned: Tensor = module(value)
            return returned
        self.passed_by[name] = None
        room = self.room if type(module) is nn.Linear and name != "out_proj" else None
        if room is None or multiplier(value, module.weight, module.bias) is by_onednn:
            run: Tensor = forward(module, value)
            return run
        out = room.take(name, (*value.shape[:-1], module.out_features), len(value))
        linear_into(out.flatten(0, 1), value.flatten(0, 1), module.weight, module.bias)
        return out


def unwatched(
    mixer: Any,
    visit: Visit,
    run: LayerRun,
    hidden_states: Tensor,
    cache: Any,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """What the forward of ``mixer`` returns [B,L,D]; ``None`` where the mixer has to run it, and nothing was done.

    It has to where anybody looks into it, unless the prompt is long and single states alone are wanted (`stopped`).

    Args:
        mixer: the mixer.
        visit: of the running trace.
        run: takes note of the kernels.
        hidden_states: [B,L,D].
        cache, attention_mask: as the mixer was given them.

    Raises:
        PromptError: if the mask is wrong (see `PastStates`), or the cache has other rows.
    """
    watched = visit.inside(mixer.__dict__[SITE_HOOKS])
    if watched and not may_stop(mixer, visit, hidden_states, cache):
        return None
    if not is_plain(mixer) or (past := before_kernels(mixer, hidden_states, cache, attention_mask)) is None:
        return None
    nobody, length = Nobody(mixer, past.room), hidden_states.shape[1]
    if watched:
        run.calls.append(Call("conv_silu", "cpu", length))
        return stopped_output(mixer, nobody, hidden_states, Stopped(past, visit, nobody, length, run))
    out = output(mixer, nobody, hidden_states, past)
    ran_unwatched(mixer, visit, run, length, nobody.passed_by)
    return out


def of_block(
    visit: Visit,
    mixer: Any,
    hidden_states: Tensor,
    cache: Any,
    attention_mask: Tensor | None,
    run: Callable[[], Tensor],
) -> Tensor:
    """What ``run`` returns, which is what a block that nobody looks into returns [B,L,D].

    Args:
        visit: of the block.
        mixer: the mixer in it.
        hidden_states: its input.
        cache, attention_mask: as it was given them.
        run: runs it.
    """
    block, inside, length = visit.module, Visit(mixer), hidden_states.shape[1]
    if hidden_states.numel() > most_noted() * hidden_states.shape[-1] or inside.inside(mixer.__dict__[SITE_HOOKS]):
        return run()
    past = before_kernels(mixer, hidden_states, cache, attention_mask)
    if (out := repeated(block, hidden_states, past)) is None:
        return noted(block, hidden_states, past, run) if is_plain(mixer) else run()
    assert past is not None
    past.ended()
    passed_by: Iterable[str] = ()
    if visit.tracing:
        take_note_of_mask(visit.interleaver, attention_mask)
        visit.pass_over(right_inside(block))
        passed_by = right_inside(mixer)
    ran_unwatched(mixer, inside, mixer.begin(inside, length), length, passed_by)
    return out


def before_kernels(mixer: Any, hidden_states: Tensor, cache: Any, attention_mask: Tensor | None) -> Anew | None:
    """What came before a call of a mixer, as the kernels take it; ``None`` where the mixer has to run it."""
    if torch.is_grad_enabled() or not suits(mixer, hidden_states):
        return None
    if attention_mask is not None and PastStates(mixer, cache, attention_mask, hidden_states).mask is not None:
        return None
    return what_came_before(mixer, cache, hidden_states)


def ran_unwatched(mixer: Any, visit: Visit, run: LayerRun, length: int, passed_by: Iterable[str]) -> None:
    """Take note that a mixer ran, into which nobody looked, and that its modules ``passed_by`` were not called."""
    run.calls += (Call("conv_silu", "cpu", length), Call("gated_scan", "cpu", length))
    visit.pass_over((*passed_by, *mixer.__dict__[SITE_NAMES]))


def may_stop(mixer: Any, visit: Visit, hidden_states: Tensor, cache: Any) -> bool:
    """Whether a mixer goes through a prompt in stretches, and nothing in it is wanted but single states."""
    if isinstance(cache, StartingRuns) or per_stretch(mixer, hidden_states) == hidden_states.shape[1]:
        return False
    return visit.positions_alone(STATE, mixer.__dict__[SITE_HOOKS])


def stopped_output(mixer: Any, nobody: Nobody, hidden_states: Tensor, stopped: Stopped) -> Tensor:
    """`output` where some states are wanted."""
    stopped.run.reasons.append(f"{STATE} is wanted")
    with stopped.visit.positions(STATE), recording(stopped.run.calls, stopped.run.reasons):
        try:
            with contextlib.suppress(MoreIsWanted):
                return output(mixer, nobody, hidden_states, stopped)
            return stopped.whole(hidden_states)
        except BaseException:  # an interrupt, too
            stopped.past.undo()
            raise


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


#: About how many numbers in_proj returns in a stretch of a long call, and no more than half as many again. They are 12
#: MiB: of what malloc is asked for it keeps up to 32 MiB to be used again, and maps all else anew, page by page.
STRETCH = 3 << 20
#: How many positions a stretch has at least.
SHORTEST = 64


def output(mixer: Any, nobody: Nobody, hidden_states: Tensor, past: Anew | Stopped) -> Tensor:
    """What an unwatched mixer returns [B,L,D], after what came before."""
    positions = hidden_states.shape[1] if isinstance(past, InRuns) else per_stretch(mixer, hidden_states)
    if positions >= hidden_states.shape[1]:
        run = functools.partial(of_stretch, mixer, nobody, hidden_states, past)
        again = repeated(mixer, hidden_states, past)
        if again is None:
            out = noted(mixer, hidden_states, past, run)
        else:
            out, nobody.passed_by = again, dict.fromkeys(right_inside(mixer))
    else:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        for part, stretch in zip(out.split(positions, 1), hidden_states.split(positions, 1), strict=True):
            part.copy_(of_stretch(mixer, nobody, stretch, past))
    past.ended()
    return out


def per_stretch(mixer: Any, hidden_states: Tensor) -> int:
    """How many positions of [B,L,D] a mixer takes at once: all, or those of a stretch."""
    rows, length, _ = hidden_states.shape
    width = getattr(mixer._modules["in_proj"], "out_features", 0)  # an adapter need not say it
    stretches = min(rows * length * width // STRETCH, length // SHORTEST)
    if stretches < 2 or not all(map(forward_known, mixer._modules.values())):
        return length
    return -(-length // stretches)


def of_stretch(mixer: Any, nobody: Nobody, hidden_states: Tensor, past: Anew | Stopped) -> Tensor:
    """What an unwatched mixer returns for the positions of one stretch [B,l,D]."""
    skip, x, discretise = nobody.before_scan(hidden_states, past)
    gated = past.scanned(x, skip, discretise)
    return nobody.through("out_proj", mixer.finished(nobody, gated, skip))
