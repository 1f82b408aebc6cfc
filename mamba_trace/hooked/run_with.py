"""Running with hooks and caches under TransformerLens's names, on ordinary traces.

Analysis code for TransformerLens and MambaLens is made of two calls: run and keep the activations, run and
let functions edit them. `HookedRuns`, mixed into the model class, has both. Each is one `trace`, so a kernel
is given up only where a hook or the cache looks, and hooks end with the run, even if one raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments.prompts import prompt_of
from ..errors import PromptError
from ..tracing.frames import users_errors, warn_user
from ..tracing.one_run import refuse_inside_a_trace
from .cache import ActivationCache
from .extents import check_runnable
from .hooks import Extent, NameOrFilter, check_name, checked_hooks
from .losses import next_token_loss
from .residual import Directions
from .schedule import HookedRun

RETURN_TYPES = ("logits", "loss", "both", None)
#: Arguments of MambaLens that choose kernels.
KERNEL_FLAGS = ("fast_conv", "fast_ssm", "warn_disabled_hooks")

_warned = False


class Output(NamedTuple):
    """What a run returns for ``return_type="both"``."""

    logits: Tensor
    loss: Tensor


class HookedRuns(Directions):
    """`run_with_cache` and `run_with_hooks`; mixed into the model class."""

    @users_errors
    def run_with_hooks(
        self: Any,
        input: Any,
        fwd_hooks: Sequence[tuple[NameOrFilter, Any]] = (),
        bwd_hooks: Sequence[tuple[NameOrFilter, Any]] = (),
        return_type: str | None = "logits",
        *,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        only_use_these_layers: Sequence[int] | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        loss_per_token: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kernel_flags: Any,
    ) -> Any:
        """Run, and let functions see and edit values on the way.

        Args:
            input: a string, a list of strings, or token ids [B,L] or [L]; with ``start_at_layer`` a residual
                stream [B,L,D].
            fwd_hooks: pairs of a name and a function. The name is a hook name (``"blocks.3.hook_h.5"``), a
                path (``"layers[3].ssm.h[5]"``) or a predicate over hook names. ``fn(value, hook)`` returns a
                tensor that replaces the value, or ``None`` if it edited the value in place or not at all.
                They run in execution order, several on one name in the order given. TransformerLens 4's names
                work where they mean the same in this architecture; its ``mixer.hook_ssm_state`` and
                ``mixer.hook_ssm_write`` of a Mamba-1 are [B,E,L,N], and here [B,L,E,N].
            bwd_hooks: pairs of a name and ``fn(gradient, hook)``. The run itself only goes forward, so they
                fire whenever ``.backward()`` is called on what is returned. The gradient is that of the value
                after the forward hooks; a tensor that the function returns replaces it.
            return_type: ``"logits"`` [B,L,V], ``"loss"`` (the mean cross entropy of next tokens, padding left
                out), ``"both"``, or ``None``: then nothing is computed past the last hook.
            stop_at_layer: return the residual stream before this layer [B,L,D], whatever ``return_type``
                says, and compute no more; negative counts from the end, ``n_layers`` is after the last.
            start_at_layer: feed ``input`` to this layer as it is; nothing before it is computed. A layer with a
                shared transformer cannot run then, since it reads the embeddings as well.
            only_use_these_layers: compute only these layers, in the order given; a layer may occur several
                times, and hooks on it then run each time. Layers of the list that come before
                ``start_at_layer``, or from ``stop_at_layer`` on, are left out. In a hybrid the layers run in
                the model's own order, each at most once.
            prepend_bos: put the beginning-of-sequence token before each string; ``None`` for
                ``model.default_prepend_bos``, which is ``False``.
            attention_mask: [B,L], 0 on padding; strings bring their own.
            loss_per_token: return the losses [B,L-1] and not their mean.
            reset_hooks_end: must be true: hooks end with the run. `model.edit` makes lasting changes.
            clear_contexts: has no effect: ``hook.ctx`` is new in every run.
            **kernel_flags: ``fast_conv``, ``fast_ssm`` and ``warn_disabled_hooks`` of MambaLens, which have
                no effect: every run uses the kernels wherever nobody looks inside.

        Returns:
            As ``return_type`` and ``stop_at_layer`` say.

        Raises:
            UnknownSiteError: before anything runs, if no place of this architecture has such a name or a
                predicate accepts none.
            LayerError: before anything runs, if the model has no such layer, the run does not reach it, or
                these layers of a hybrid cannot run so.
            PositionError: before anything runs, if the prompt is too short for a position.
            SiteValueError: if a function returns a value that does not fit, naming its hook.
            PromptError: if the input is no prompt.
            TypeError: for an argument that does not exist.

        Example::

            def zero(h, hook):
                h[:] = 0

            model.run_with_hooks("Emma and Shelby had fun", fwd_hooks=[("blocks.1.hook_h.2", zero)])
        """
        output, _ = self.run_with_cache(
            input,
            (),
            return_type,
            stop_at_layer,
            fwd_hooks=fwd_hooks,
            bwd_hooks=bwd_hooks,
            start_at_layer=start_at_layer,
            only_use_these_layers=only_use_these_layers,
            prepend_bos=prepend_bos,
            attention_mask=attention_mask,
            loss_per_token=loss_per_token,
            reset_hooks_end=reset_hooks_end,
            **kernel_flags,
        )
        return output

    @users_errors
    def run_with_cache(
        self: Any,
        input: Any,
        names_filter: NameOrFilter | Sequence[NameOrFilter] | None = None,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        device: Any = None,
        *,
        fwd_hooks: Sequence[tuple[NameOrFilter, Any]] = (),
        bwd_hooks: Sequence[tuple[NameOrFilter, Any]] = (),
        incl_bwd: bool = False,
        start_at_layer: int | None = None,
        only_use_these_layers: Sequence[int] | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        loss_per_token: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kernel_flags: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run, and keep the values of hook names.

        Args:
            input: as in `run_with_hooks`, like every argument that is not listed here.
            names_filter: what to keep: a name (hook name or path; ``"blocks.3.hook_h"`` is the state after
                every position), a predicate over hook names, or a list of these. ``None`` keeps every hook
                name that the run reaches. A value that is not kept costs nothing.
            remove_batch_dim: keep the values of a single prompt without their batch axis.
            device: where the values go; by default they stay where they are.
            fwd_hooks: run first, so the cache holds the values that they leave.
            incl_bwd: call ``backward`` on the loss, which adds to the parameters' ``grad`` as well, and keep
                the gradient of each value under its name and ``"_grad"``. ``return_type`` must be ``"loss"``
                or ``"both"``.

        Returns:
            The output as in `run_with_hooks`, and the cache. Its values are detached, and no later edit of
            any tensor reaches them. If a layer runs several times, the cache holds its last values.

        Raises:
            UnknownSiteError, LayerError: as `run_with_hooks`.

        Example::

            logits, cache = model.run_with_cache("Emma and Shelby had fun")
            cache["blocks.1.hook_h.2"]  # [B,E,N], in Mamba-2 [B,H,P,N]
            cache["resid_post", -1]  # [B,L,D]
        """
        explain_away(kernel_flags)
        extent = Extent.of(len(self.layers), start_at_layer, stop_at_layer, only_use_these_layers)
        check_runnable(extent, self._layout)
        fwd = checked_hooks(self, fwd_hooks, extent, "fwd_hooks")
        bwd = checked_hooks(self, bwd_hooks, extent, "bwd_hooks")
        cached = _checked_names(self, names_filter, extent)
        run = HookedRun(self, extent, fwd, bwd, cached, device, incl_bwd, return_type is not None)
        _check(run, return_type, loss_per_token, reset_hooks_end)
        self._perform(run, input, prepend_bos, attention_mask)
        output = _returned(run, return_type, loss_per_token)
        if incl_bwd:
            (output.loss if isinstance(output, Output) else output).backward()
        cache = ActivationCache({**run.values, **run.gradients}, self, n_positions=run.length)
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, whatever the arguments: the hooks of a run end with it, also where it raises.

        Example::

            model.reset_hooks()
        """

    def _perform(self: Any, run: HookedRun, input: Any, prepend_bos: bool | None, mask: Tensor | None) -> None:
        inputs = {} if mask is None else {"attention_mask": mask}
        prompt: tuple[Any, ...] = ()
        if run.extent.start is None:
            prompt = (prompt_of(self, input, prepend_bos),)
        else:
            inputs["inputs_embeds"] = _residual_stream(input, self.config.hidden_size)
        refuse_inside_a_trace(self, "run_with_hooks or run_with_cache")
        self.dispatch()  # before the run looks for the modules of its layers
        try:
            with self.trace(*prompt, use_cache=False, **inputs) as tracer:
                run.perform(tracer)
        finally:
            run.close()
        if run.missed and not run.one_by_one:
            run.one_by_one = True
            self._perform(run, input, prepend_bos, mask)


def _checked_names(model: Any, names_filter: Any, extent: Extent) -> list[NameOrFilter] | None:
    """``names_filter`` as a list of checked names and predicates; ``None`` for every hook name."""
    if names_filter is None:
        return None
    if isinstance(names_filter, str) or callable(names_filter):
        names_filter = [names_filter]
    if not isinstance(names_filter, Iterable):
        raise TypeError(f"names_filter is a name, a predicate over hook names or a list, not {names_filter!r}")
    cached = list(names_filter)
    for name in cached:
        check_name(model, name, extent)
    return cached


def _check(run: HookedRun, return_type: str | None, loss_per_token: bool, reset_hooks_end: bool) -> None:
    """Refuse arguments that do not go together. Raises `ValueError`, or `PromptError` for want of tokens."""
    if return_type not in RETURN_TYPES:
        raise ValueError(f"return_type={return_type!r} is none of {', '.join(map(repr, RETURN_TYPES))}")
    if not reset_hooks_end:
        raise ValueError(
            "reset_hooks_end=False: hooks end with the run that they were given to. Backward hooks fire "
            "after it all the same; for lasting changes of a model use `with model.edit(inplace=True):`"
        )
    is_loss, stops = return_type in ("loss", "both"), run.extent.stop is not None
    if is_loss and not stops and run.extent.start is not None:
        raise PromptError(
            f"return_type={return_type!r} needs tokens, and with start_at_layer the input has none: take the "
            f"logits and give them to mamba_trace.hooked.losses.next_token_loss with the tokens"
        )
    if run.incl_bwd and (not is_loss or stops or loss_per_token):
        raise ValueError(
            'incl_bwd=True goes backward from the loss: it needs return_type="loss" or "both", and neither '
            "stop_at_layer nor loss_per_token"
        )
    off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if off and (run.bwd or run.incl_bwd):
        what = "bwd_hooks" if run.bwd else "incl_bwd=True"
        raise ValueError(f"{what}: gradients are turned off here; run under torch.enable_grad()")


def _returned(run: HookedRun, return_type: str | None, loss_per_token: bool) -> Any:
    if run.output is None or return_type == "logits" or run.extent.stop is not None:
        return run.output
    assert run.tokens is not None
    loss = next_token_loss(run.output, run.tokens, run.mask, loss_per_token)
    return loss if return_type == "loss" else Output(run.output, loss)


def _residual_stream(input: Any, size: int) -> Tensor:
    """``input`` if it is a residual stream [B,L,D]. Raises `PromptError` otherwise."""
    if not isinstance(input, Tensor) or not input.is_floating_point() or input.shape[2:] != (size,):
        got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise PromptError(
            f"with start_at_layer the input is a residual stream [B,L,{size}], as stop_at_layer returns it, not {got}"
        )
    return input


def explain_away(flags: dict[str, Any]) -> None:
    """Accept MambaLens's flags, and warn once in the life of the process. Raises `TypeError` for others."""
    global _warned
    unknown = sorted(set(flags) - set(KERNEL_FLAGS))
    if unknown:
        raise TypeError(f"run_with_cache and run_with_hooks have no argument {unknown[0]!r}")
    if flags and not _warned:
        _warned = True
        warn_user(
            f"{', '.join(sorted(flags))}: not needed and without effect. Every run uses the fast kernels "
            f"wherever no hook and no cache looks inside, and every hook works with them; model.last_run "
            f"says what ran",
            DeprecationWarning,
        )
