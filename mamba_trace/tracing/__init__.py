"""Everything that touches nnsight's internals, and accelerate's hooks: what the running trace wants, and how
it gets it. No other part of the package imports a submodule of nnsight.

The forward of a Mamba can run fused into kernels as long as nobody looks inside. nnsight 0.8 runs the body of
a trace in greenlets, and each greenlet waits for one location at a time. So before a module computes anything
it can ask which locations are wanted of it right now. The map of this room:

* Both sides of a running trace: `visit`, the model's side, answers what is wanted in one call of one module;
  `worker`, the user's side, is what happens between two requests; `positions` are the places ``h[p]``;
  `mask` says which columns are padding, and `frames` finds the user's line for a warning or an error.
* Values: `saving` and `served` keep saved values from changing; `apart` separates places that share memory;
  `views` compares tensors as parts of memory; `fitting` checks the values that users assign; `caches` keep values
  without a worker that asks for them.
* The tree of envoys: `envoys` has a class for each kind of place; `attributes` refuses names that it does not
  have; `envoy_map` combines these classes and names with the user's own; `tree` keeps the envoys in step with
  the modules, and copies them; `root` is the model's own envoy.
* Runs: `tracer` is what a ``with`` binds; `one_run` gives a model to one run at a time; `edits` ends lasting
  edits that a run does not reach; `invokes` says which rows belong to which invoke; `remote` sends a trace to
  a server.
* Other wrappers: `forwards` keeps nnsight's controller in its place beside accelerate's hooks; `placement`
  says where inputs go if accelerate has spread the weights; `prompts` names how nnsight reads a prompt.

The facts about nnsight 0.8 that this room rests on, each held by a test in tests/test_nnsight.py (facts about
accelerate in tests/test_devices.py, about copies in tests/test_copies.py and tests/test_adapters.py):

* ``interleaver.mediators[i].pending`` is what worker i waits for: ``provider``, a location such as
  ``"model.backbone.layers.3.mixer.conv.output"``, and ``iteration``, which visit of it;
* ``interleaver.observers`` maps the locations that caches record to those who do, ``(worker, cache, what)``:
  ``cache.observe_selected(what, value)`` is called after all workers were served, also if it came during the run;
* ``interleaver.handle(location, value)`` serves a location and returns the value or its replacement;
* ``interleaver.counts[location]`` says how often a location was offered since the tree was built, and
  ``mediator.counts_at_start`` what that count was when the worker began;
* ``interleaver.batcher`` narrows every value whose first dimension is the number of rows of the batch; if it
  is ``None``, nothing is narrowed;
* ``mediator.iteration`` is the step of ``tracer.iter`` to which a worker is pinned: 0 outside of such a loop,
  and ``None`` once the worker was served in that step; while a worker runs, ``mediator.pending`` is what it
  was last served;
* ``mediator.flush()`` is called before a worker asks for anything and at the end of its block, nowhere else;
* ``save`` returns what ``nnsight.tracing.tracer.mark`` returns;
* the way from a module to the running trace is `source.STATE` in its ``__dict__``: ``.active()``;
* the forward of a wrapped module is a `Controller`; it runs the forward that it stands for, ``state.body``,
  inside accelerate's hook if the module has one; ``.source`` and copies begin from ``state.original``;
* ``interleaver.envoys`` has the envoy of every module of the tree, by the module's ``id``;
* ``Envoy._update(module)`` points the envoys below at the modules of the same names, drops and adds envoys
  where the modules differ, and registers all of them; an envoy whose module is in the tree twice has one
  path, and its other name is an alias; ``rename=`` binds its aliases only when an envoy is made.
"""

from .forwards import HOOKS as HOOKS
from .forwards import forward_of as forward_of
from .forwards import hooks_of as hooks_of
from .forwards import is_itself as is_itself
from .forwards import listened_to as listened_to
from .forwards import rebind_forward as rebind_forward
from .forwards import uncompiled as uncompiled
from .visit import Visit as Visit
from .visit import take_note_of_mask as take_note_of_mask
from .worker import ask_every_position as ask_every_position
from .worker import expect as expect
from .worker import mask_of_call as mask_of_call
from .worker import need_a_trace as need_a_trace
from .worker import reading as reading
