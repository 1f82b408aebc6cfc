"""Running with hooks and caches under TransformerLens's names, on ordinary traces.

Analysis code for TransformerLens and MambaLens is made of two calls: run and keep the activations, run and
let functions edit them. `HookedRuns`, mixed into the model class, has both. Each is one `trace`, so a
kernel is given up only where a hook or the cache looks, and what is done to a run is over when it is: no hook
stays behind, also where one raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments.run_arguments import (
    explain_away,
    need_gradients,
    prompt_of,
    refuse_inside_a_trace,
    residual_of,
)
from ..errors import PromptError
from ..modeling.effective import n_outputs, token_directions
from .cache import ActivationCache
from .hooks import Extent, NameOrFilter, check_name, checked_hooks
from .losses import next_token_loss
from .schedule import HookedRun, Wanted

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What a run returns for ``return_type="both"``."""

    logits: Tensor
    loss: Tensor


class HookedRuns:
    """`run_with_cache`, `run_with_hooks`, and the directions that tokens have in the residual stream."""

    def run_with_hooks(
        self,
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
                path (``"layers[3].ssm.h[5]"``) or a predicate over hook names. ``fn(value, hook)`` returns
                a tensor to take the value's place, or ``None`` if it edited the value in place or not at
                all. They run in execution order, several on one name in the order given.
            bwd_hooks: likewise, with ``fn(gradient, hook)``. The run itself goes forward alone, so they fire
                when ``.backward()`` is called on what is returned, each time that it is. The gradient is
                that of the value as it went on after the forward hooks; a tensor returned takes its place.
            return_type: ``"logits"`` [B,L,V], ``"loss"`` (the mean cross entropy of next tokens, padding
                left out), ``"both"``, or ``None``: then nothing is computed past the last hook.
            stop_at_layer: return the residual stream before this layer [B,L,D], whatever ``return_type``
                says, and compute no more; negative counts from the end, ``n_layers`` is after the last.
            start_at_layer: feed ``input`` to this layer; nothing before it is computed.
            only_use_these_layers: compute these layers and no others, in the order given; a layer may be
                there several times. Hooks run each time that the run comes to their layer. Of these layers,
                those before ``start_at_layer`` and from ``stop_at_layer`` on are left out.
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
            UnknownSiteError: before anything runs, if no place has such a name or a predicate finds none.
            LayerError: likewise, if the model has no such layer or the run does not reach it.
            PositionError: likewise, if the prompt is shorter than that.
            SiteValueError: if a function returns what does not fit, naming its hook.
            PromptError: if the input is no prompt.
            TypeError: for an argument that does not exist.

        Example::

            def zero(h, hook):
                h[:] = 0

            model.run_with_hooks("Emma and Shelby had fun", fwd_hooks=[("blocks.1.hook_h.2", zero)])
        """
        self._check(kernel_flags, return_type, reset_hooks_end)
        extent = self._extent(start_at_layer, stop_at_layer, only_use_these_layers)
        wanted = self._wanted(extent, fwd_hooks, bwd_hooks, return_type)
        run = self._hooked_run(input, extent, wanted, prepend_bos, attention_mask)
        return _returned(run, return_type, loss_per_token)

    def run_with_cache(
        self,
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
            input: as in `run_with_hooks`, and so is whatever is not listed here.
            names_filter: what to keep: a name (hook name or path; ``"blocks.3.hook_h"`` is the state after
                every position), a predicate over hook names, or a list of these. ``None`` keeps every hook
                name that the run reaches. What is not kept is not computed for its own sake.
            remove_batch_dim: keep the values of a single prompt without their batch axis.
            device: where the values go; where they are by default.
            fwd_hooks: run first, so the values kept are those that went on.
            incl_bwd: call ``backward`` on the loss, which adds to the parameters' ``grad`` as well, and keep
                the gradient of each value under its name and ``"_grad"``. ``return_type`` must be ``"loss"``
                or ``"both"``.

        Returns:
            The output as in `run_with_hooks`, and the cache. Its values are detached, and later edits of any
            tensor do not reach them. Of a layer that runs several times it has the last.

        Raises:
            As `run_with_hooks`.

        Example::

            logits, cache = model.run_with_cache("Emma and Shelby had fun")
            cache["blocks.1.hook_h.2"]  # [B,E,N]
            cache["resid_post", -1]  # [B,L,D]
        """
        self._check(kernel_flags, return_type, reset_hooks_end)
        extent = self._extent(start_at_layer, stop_at_layer, only_use_these_layers)
        wanted = self._wanted(extent, fwd_hooks, bwd_hooks, return_type)
        if names_filter is None:
            wanted.cached = None
        else:
            single = isinstance(names_filter, str) or callable(names_filter)
            if not single and not isinstance(names_filter, Iterable):
                raise TypeError(
                    f"names_filter is a name, a predicate over hook names or a list, not {names_filter!r}"
                )
            wanted.cached = [names_filter] if single else list(names_filter)  # type: ignore[arg-type,list-item]
            for name in wanted.cached:
                check_name(self, name, extent)
        wanted.gradients, wanted.device = incl_bwd, device
        if incl_bwd and (return_type not in ("loss", "both") or extent.stop is not None or loss_per_token):
            raise ValueError(
                'incl_bwd=True goes backward from the loss: it needs return_type="loss" or "both", and '
                "neither stop_at_layer nor loss_per_token"
            )
        if incl_bwd:
            need_gradients("incl_bwd=True")
        run = self._hooked_run(input, extent, wanted, prepend_bos, attention_mask)
        output = _returned(run, return_type, loss_per_token)
        if incl_bwd:
            (output.loss if isinstance(output, Output) else output).backward()
        cache = ActivationCache({**run.values, **run.gradients}, self, n_positions=run.length)
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def tokens_to_residual_directions(self: Any, tokens: Any) -> Tensor:
        """The direction in the residual stream, after the final norm, that raises each token's logit.

        Args:
            tokens: token ids of any shape, one id, or a string that is one token.

        Returns:
            Rows of ``lm_head``'s weight, that of an adapter on it included: the shape of ``tokens`` and [D]
            behind it.

        Raises:
            PromptError: if a string is not one token, an id is not in the vocabulary, or these are no ids.

        Example::

            model.tokens_to_residual_directions(" Emma")  # [D]
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        try:
            ids = torch.as_tensor(tokens, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise PromptError(
                f"tokens are ids of any shape, or a string that is one token, not {tokens!r}; of several "
                f"strings give the ids, [model.to_single_token(string) for string in strings]"
            ) from None
        self.dispatch()
        self._follow()
        head, width = self.lm_head._module, self.config.hidden_size
        size = n_outputs(head, width)
        known = ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < size
        if ids.is_floating_point() or not known:
            raise PromptError(f"token ids are integers from 0 to {size - 1}, not {tokens!r}")
        return token_directions(head, ids, width)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, whatever the arguments: the hooks of a run end with it, also where it raises.

        Example::

            model.reset_hooks()
        """

    # -- what was asked for ----------------------------------------------------------------------------

    def _check(self, kernel_flags: dict[str, Any], return_type: str | None, reset_hooks_end: bool) -> None:
        explain_away(kernel_flags)
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} is none of {', '.join(map(repr, RETURN_TYPES))}")
        if not reset_hooks_end:
            raise ValueError(
                "reset_hooks_end=False: hooks end with the run that they were given to. Backward hooks fire "
                "after it all the same; for lasting changes of a model use `with model.edit(inplace=True):`"
            )

    def _extent(self: Any, start: int | None, stop: int | None, only: Sequence[int] | None) -> Extent:
        return Extent.of(len(self.layers), start, stop, only)

    def _wanted(self, extent: Extent, fwd: Any, bwd: Any, return_type: str | None) -> Wanted:
        wanted = Wanted(
            fwd=checked_hooks(self, fwd, extent, "fwd_hooks"),
            bwd=checked_hooks(self, bwd, extent, "bwd_hooks"),
            logits=return_type is not None,
        )
        if wanted.bwd:
            need_gradients("bwd_hooks")
        if return_type in ("loss", "both") and extent.stop is None and extent.start is not None:
            raise PromptError(
                f"return_type={return_type!r} needs tokens, and with start_at_layer the input has none: take "
                f"the logits and give them to mamba_trace.hooked.losses.next_token_loss with the tokens"
            )
        return wanted

    def _hooked_run(
        self: Any, input: Any, extent: Extent, wanted: Wanted, prepend_bos: bool | None, mask: Tensor | None
    ) -> HookedRun:
        inputs = {} if mask is None else {"attention_mask": mask}
        prompt: tuple[Any, ...] = ()
        if extent.start is None:
            prompt = (prompt_of(self, input, prepend_bos),)
        else:
            inputs["inputs_embeds"] = residual_of(self, input)
        refuse_inside_a_trace(self, "run_with_hooks or run_with_cache")
        run = HookedRun(self, extent, wanted)
        self.dispatch()  # before the run looks for the modules of its layers
        try:
            with self.trace(*prompt, use_cache=False, **inputs) as tracer:
                run.perform(tracer)
        finally:
            run.close()
        return run


def _returned(run: HookedRun, return_type: str | None, loss_per_token: bool) -> Any:
    if run.output is None or return_type == "logits" or run.extent.stop is not None:
        return run.output
    assert run.tokens is not None
    loss = next_token_loss(run.output, run.tokens, run.mask, loss_per_token)
    return loss if return_type == "loss" else Output(run.output, loss)
