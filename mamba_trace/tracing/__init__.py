"""What the running trace wants next: the one place that knows nnsight's internals.

The forward of a Mamba can be fused into kernels exactly as far as nobody looks inside. nnsight 0.8 runs the
body of a trace in greenlets, each always parked on one location, so before computing anything a module can
ask what is wanted of it right now. `Visit` answers that for one call of one module, serves the state after
a position, and keeps nnsight's visit counts right for the locations that a fused pass never offers.
`worker` is the other side, code that runs where the user wrote it; `saving` keeps saved values from changing,
and `apart` the values of places that share memory; `forwards` keeps nnsight's place on modules that
accelerate wraps too; `tree` keeps the envoys in step with the modules, also in a copy; `one_run` lets one run
at a time have a model; `envoy_map` says which class an envoy has.

The facts about nnsight 0.8 this module rests on, each held by a test in tests/test_demand.py (those about
accelerate in tests/test_devices.py):

* ``interleaver.mediators[i].pending`` is what worker i is parked on: ``provider`` (a location such as
  ``"model.backbone.layers.3.mixer.conv.output"``), and which visit of it, ``iteration``;
* ``interleaver.observers`` maps the locations caches subscribe to;
* ``interleaver.handle(location, value)`` serves a location and returns the possibly replaced value;
* ``interleaver.counts[location]`` says how often a location was offered over the life of the tree, and
  ``mediator.counts_at_start`` what it was when the worker began;
* ``interleaver.batcher`` narrows every value whose first dimension equals the number of rows of the batch,
  and nothing when it is ``None``;
* ``mediator.iteration`` is the step of ``tracer.iter`` a worker is pinned to, 0 outside of one, and ``None``
  once it was served in that step; while a worker runs, ``mediator.pending`` is what it was last served;
* ``mediator.flush()`` is called before a worker asks for anything and at the end of its block;
* ``save`` returns what ``nnsight.tracing.tracer.mark`` returns;
* the route from a module to the running trace is `source.STATE` of its ``__dict__``: ``.active()``;
* the forward of a wrapped module is a `Controller`, whose ``state.body`` is the forward it stands for, run
  inside accelerate's hook if the module has one;
* ``interleaver.envoys`` has an envoy of every module of the tree;

Positions. ``h[p]`` has a location of its own, ``<h>.<p>.output``, but no module, and counting a visit of
each position in every pass would cost a loop over all tokens. So the count of a position is not kept: it
is the count of the site ``h`` itself, set at the moment when somebody asks (`expect_position`) or is
served (`Visit.next_position`).
"""

from .apart import keep_apart
from .forwards import is_itself, rebind_forward, reinstate_controllers
from .saving import GuardedTracer
from .tree import SiteInterleaver, follow, is_current, reconnect, remember
from .visit import Visit, listened_to, take_note_of_length, take_note_of_mask
from .worker import (
    SiteOrderError,
    ask_every_position,
    assigned,
    current_value,
    expect,
    expect_position,
    mask_of_call,
    need_a_trace,
    reading,
    skip_module,
)

__all__ = [
    "GuardedTracer",
    "SiteInterleaver",
    "SiteOrderError",
    "Visit",
    "ask_every_position",
    "assigned",
    "current_value",
    "expect",
    "expect_position",
    "follow",
    "is_current",
    "is_itself",
    "keep_apart",
    "listened_to",
    "mask_of_call",
    "need_a_trace",
    "reading",
    "rebind_forward",
    "reconnect",
    "reinstate_controllers",
    "remember",
    "skip_module",
    "take_note_of_length",
    "take_note_of_mask",
]
