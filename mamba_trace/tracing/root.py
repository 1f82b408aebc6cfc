"""The model's own envoy: how nnsight runs, traces, copies and saves the model as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnsight import TransformersModel
from nnsight.intervention.eproperty import eproperty
from torch import nn

from .apart import keep_apart
from .envoy_map import EnvoyMap, names_besides
from .envoys import BY_SCOPE, envoy_classes
from .invokes import ExpandedRows
from .located import Traced
from .one_run import run_method
from .remote import TASK, Remote, check_task
from .tracer import ScanTracer, SiteTracer
from .tree import SiteInterleaver, reconnect, remember


class RootEnvoy(Remote, Traced, TransformersModel):
    """nnsight's model with this package's envoys, tracers, batches and runs.

    Args:
        repo_id, *args, **kwargs: as for nnsight's ``TransformersModel``.
        ours: this package's names of modules, by path.
    """

    #: Classes of modules that have no submodules.
    _leaves: tuple[type[nn.Module], ...] = ()
    _tracer = SiteTracer
    _batcher_class = ExpandedRows

    def __init__(self, repo_id: Any, *args: Any, ours: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(
            repo_id,
            *args,
            task=check_task(kwargs.pop("task", TASK)),
            rename=names_besides(ours, kwargs.pop("rename", None), type(self)),
            envoys=EnvoyMap(envoy_classes(), BY_SCOPE, kwargs.pop("envoys", None)),
            interleaver=SiteInterleaver(),
            **kwargs,
        )
        # The tree is printed once, and not again under each of its other names.
        for alias in ours.values():
            self._aliases.pop(alias, None)
        remember(self, self._leaves)

    @eproperty
    def output(self, value: Any) -> Any:
        """What the forward returns: a ``MambaCausalLMOutput``, whose ``logits`` are float32 [B,L,V]."""
        return keep_apart(f"{self.path}.output", value)

    def __getattr__(self, name: str) -> Any:
        if name == "logits" and not hasattr(self._module, name):  # in a model that returns lm_head's output
            return self.lm_head
        return super().__getattr__(name)

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's ``trace``, with a `SiteTracer`.

        Raises:
            PromptError: for what is no prompt, or an argument that the forward does not have.
            TraceError: inside another trace of this model. A trace in another thread is waited for.

        Example::

            with model.trace("Emma gave an apple to"):
                logits = model.lm_head.output.save()  # [B,L,V]
        """
        return super().trace(*inputs, **kwargs)

    def scan(self, *inputs: Any, fn: Any = "__call__", backend: Any = None, **kwargs: Any) -> Any:
        """nnsight's ``scan``: the shapes of a run, without its numbers; weights may be offloaded.

        Example::

            with model.scan("Emma gave an apple to"):
                shape = model.layers[1].ssm.h[2].output.shape  # [B,E,N]
        """
        return ScanTracer(self, fn, *inputs, backend=backend, **kwargs)

    generate = run_method(
        TransformersModel.generate.__wrapped__,
        """Generate with Hugging Face's ``generate``; in a ``with``, traced step by step (``tracer.iter``).

        Args:
            *args, **kwargs: a prompt as a trace takes it, and the arguments of Hugging Face's ``generate``.

        Returns:
            What Hugging Face's does, token ids [B,L] by default; ``tracer.result`` in a ``with``.

        Raises:
            TraceError: inside a trace of this model.

        Example::

            with model.generate(prompt, max_new_tokens=2, do_sample=False) as tracer:
                for step in tracer.iter[:2]:
                    model.layers[1].ssm.h[-1].output[:] *= 0.5
                ids = tracer.result.save()  # [B,L]
        """,
    )
    pipe = run_method(
        TransformersModel.pipe.__wrapped__,
        """Run Hugging Face's text-generation pipeline on a prompt; in a ``with``, traced.

        Args:
            *args, **kwargs: as the pipeline takes them.

        Raises:
            TraceError: inside a trace of this model.

        Example::

            model.pipe(prompt, max_new_tokens=2, do_sample=False)
        """,
    )

    def _update(self, module: nn.Module) -> None:
        super()._update(module)
        remember(self, self._leaves)

    def __copy__(self) -> RootEnvoy:
        return self._shallow_copy()  # of the same module, with edits of its own, as `edit` makes it

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A server puts its own module and interleaver here, which need nothing; the sandbox's is another class's.
        if isinstance(self.interleaver, SiteInterleaver) and self.interleaver.copied:
            self.dispatched = state["dispatched"]
            reconnect(self)
            remember(self, self._leaves)
