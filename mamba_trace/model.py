"""`MambaTrace`: a Mamba as an nnsight model, with every intermediate value a named site.

It is an `nnsight.TransformersModel` over Hugging Face's own module, so everything nnsight does (trace,
invoke, generate, iter, edit, cache, scan, session, barrier, backward, source) works as documented there.
What this class adds is loading (either checkpoint format, a loaded module, a state dict, a configuration),
the sites, and their other names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase, TextGenerationPipeline

from . import names
from .arguments import padding
from .arguments.prompt_forms import check_arguments, check_lengths, check_prompt
from .arguments.run_arguments import check_token_lists, check_tokens
from .conversion.checkpoints import Checkpoint, find_checkpoint, load_tokenizer, read_state_dict
from .conversion.config_names import check_names
from .conversion.formats import check_state_dict, convert_config, convert_state_dict, residuals_per_layer
from .conversion.initialization import initialize
from .conversion.load_options import (
    check_loaded,
    check_place,
    dtype_of,
    examine,
    given_config,
    take_config,
    why_not,
)
from .conversion.weight_sizes import check_memory
from .errors import CheckpointError, MambaTraceError, PromptError, UnknownSiteError
from .hooked.hooks import KEEPING_HOOKS, none_kept
from .hooked.run_with import HookedRuns
from .hooked.tokens import Tokens
from .hooked.weights import LensViews
from .modeling.architectures import architecture_of, axis_sizes, kernels_of, make_hookable
from .modeling.offers import SiteModule
from .modeling.run_report import RunReport
from .scan import check
from .sites import rows
from .tracing import (
    SiteInterleaver,
    follow,
    is_current,
    keep_apart,
    placement,
    reconnect,
    reinstate_controllers,
    remember,
    take_note_of_length,
    take_note_of_mask,
)
from .tracing.attributes import Guarded, unknown
from .tracing.envoy_map import EnvoyMap
from .tracing.envoys import envoy_classes
from .tracing.invokes import ExpandedRows
from .tracing.one_run import only_run, run_method
from .tracing.remote import TASK, Remote, check_task
from .tracing.tracer import ScanTracer, SiteTracer

#: Names of this package for modules of Hugging Face's.
RENAME = {
    "backbone.embeddings": "embeddings",
    "backbone.layers": "layers",
    "backbone.norm_f": "norm_f",
    "mixer": "ssm",
}
DEMO = Path(__file__).parent / "demo_model"


class MambaTrace(HookedRuns, LensViews, Tokens, Remote, Guarded, TransformersModel):
    """A Mamba whose every intermediate value can be read and edited inside a trace.

    Args:
        repo_id: a hub id or a local folder, in Hugging Face's or the original state-spaces format, or a
            loaded ``MambaForCausalLM``, which is made hookable in place.
        tokenizer: the tokenizer; found with the checkpoint where it is not given. The model uses a copy, in
            which a missing padding token becomes the end-of-sequence token.
        kernels: which scan runs: ``"auto"``, the fastest for each call, or one of ``"reference"``, ``"cpu"``,
            ``"cuda"`` and ``"triton"``.
        padding_side: on which side the shorter prompts of a batch are padded: ``"left"`` where it is not
            given, so that position -1 is the last token of each, or ``"right"``. Results do not depend on it.
        tokenizer_kwargs: attributes that the model's tokenizer is to have, such as ``padding_side``.
        **kwargs: ``revision``, ``dtype``, ``device``, ``device_map``, ``quantization_config`` and whatever
            else ``from_pretrained`` takes; ``dispatch=True`` loads the weights now, not at the first run.
            ``config``, in any format, or the name of a folder or hub id that has it, takes the place of the
            checkpoint's: with fewer layers, the first ones are loaded. ``num_hidden_layers=2`` and the like
            replace one field of it.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is no Mamba.
        PromptError: if ``padding_side`` is neither side.
        BackendError: if ``kernels`` names no backend, or one that cannot run here.

    Example::

        model = MambaTrace("state-spaces/mamba-370m")
        with model.trace("Hello World"):
            model.layers[3].ssm.h[0].output[:] = 0
            logits = model.lm_head.output.save()  # [B,L,V]
    """

    def __init__(
        self,
        repo_id: Any,
        *args: Any,
        kernels: str = "auto",
        padding_side: str | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._kernels = check(kernels)
        self._tokenizer_settings = self._settings(padding_side, tokenizer_kwargs)
        self._configured = False
        # Its padding token and side are set below, and the user's own must stay as it is.
        kwargs["tokenizer"] = copy.deepcopy(kwargs.get("tokenizer"))
        self._sought_tokenizer = False
        if isinstance(repo_id, Path):
            repo_id = str(repo_id)
        if isinstance(repo_id, nn.Module):
            architecture_of(repo_id)
        super().__init__(
            repo_id,
            *args,
            task=check_task(kwargs.pop("task", TASK)),
            rename=names_besides(RENAME, kwargs.pop("rename", None), type(self)),
            envoys=EnvoyMap(envoy_classes(), kwargs.pop("envoys", None)),
            interleaver=SiteInterleaver(),
            **kwargs,
        )
        # The tree is printed once, not again under each of its other names.
        for alias in RENAME.values():
            self._aliases.pop(alias, None)
        remember(self, (SiteModule,))

    @property
    def kernels(self) -> str:
        """Which scan runs; a property of the module, so the last wrapper around one module decides.

        Assigning another name changes it for the runs that follow.

        Raises:
            BackendError: if what is assigned names no backend, or one that cannot run here.

        Example::

            model.kernels  # "auto"
        """
        self._follow()
        return self.layers[0].ssm._module.kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        self._kernels = check(kernels)
        self._follow()
        for layer in self.layers:
            layer.ssm._module.kernels = kernels

    @property
    def device(self) -> torch.device:
        """Where the inputs of a run go: the device that the embedding runs on, also where it is offloaded.

        Inputs are moved there, and tensors assigned to a site to that of its layer.

        Example::

            model.device  # device(type="cpu")
        """
        return placement.input_device(self._module)

    @property
    def last_run(self) -> RunReport:
        """What each layer ran in the last forward call of the module: kernels, stretches and reasons.

        Example::

            with model.trace(prompt):
                model.layers[1].ssm.h[5].output.save()
            print(model.last_run)
        """
        report = self.layers[0].ssm._module.report
        return RunReport(list(report.layers), report.trace)

    # -- other ways to make one ------------------------------------------------------------------------

    @classmethod
    def demo(cls, **kwargs: Any) -> MambaTrace:
        """The small trained model that ships with the package: who was given the apple?

        Returns:
            A model with its weights loaded, from disk alone.

        Example::

            model = MambaTrace.demo()
        """
        return cls(str(DEMO), **{"dispatch": True, **kwargs})

    @classmethod
    def from_config(
        cls,
        config: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> MambaTrace:
        """A model from scratch, initialised as the Mamba authors do.

        Args:
            config: a ``MambaConfig``, or a configuration in the original or MambaLens's format.
            tokenizer: needed for prompts that are strings.
            seed: of a generator of its own; torch's global one is not touched.
            dtype: of the parameters.
            **kwargs: as for `MambaTrace`.

        Raises:
            CheckpointError: for a field that the configuration's format does not have, a value that does not
                fit, or a model that this machine has no memory for.

        Example::

            model = MambaTrace.from_config({"d_model": 64, "n_layer": 2, "vocab_size": 100}, seed=1)
        """
        check_names(config)
        dtype = dtype_of({"dtype": dtype}) or torch.float32
        module = _empty(convert_config(config, "huggingface"), dtype)
        initialize(module, seed=seed, n_residuals_per_layer=residuals_per_layer(config))
        return cls(module, tokenizer=tokenizer, **kwargs)

    @classmethod
    def from_state_dict(
        cls,
        config: Any,
        state_dict: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> MambaTrace:
        """A model from a configuration and a state dict, each in any of the three formats.

        Args:
            config: original, MambaLens's or Hugging Face's.
            state_dict: original, MambaLens's or Hugging Face's; values are taken bit for bit.
            tokenizer: needed for prompts that are strings.
            **kwargs: as for `MambaTrace`.

        Raises:
            CheckpointError: if keys or shapes do not fit the configuration.

        Example::

            same = MambaTrace.from_state_dict(model.config, model._module.state_dict())
        """
        check_names(config)
        hf_config = convert_config(config, "huggingface", trained=True)
        weights = convert_state_dict(state_dict, "huggingface")
        check_state_dict(weights, hf_config)
        module = _empty(hf_config, next(iter(weights.values())).dtype)
        module.load_state_dict(
            weights, strict=False
        )  # strict but for a tied lm_head; keys were checked above
        return cls(module, tokenizer=tokenizer, **kwargs)

    # -- the sites -------------------------------------------------------------------------------------

    def hook(self, name: str) -> Envoy:
        """The place a hook name or path names, e.g. ``model.hook("blocks.3.hook_h.5").output``.

        Args:
            name: MambaLens's name, TransformerLens 4's where it means the same place, or a path.

        Raises:
            UnknownSiteError: if no place of this model has that name.

        Example::

            with model.trace("Emma gave an apple to"):
                state = model.hook("blocks.1.hook_h.2").output.save()  # [B,E,N]
        """
        place = names.parse(name)
        n_layers = len(self.layers)
        if place.layer is not None and place.layer >= n_layers:
            raise UnknownSiteError(f"{name!r}: this model has layers 0 to {n_layers - 1}")
        if place.site is not None and place.site.scope == "model":
            return getattr(self, place.site.name)
        block = self.layers[place.layer]
        if place.site is not None and place.site.scope == "block":
            return getattr(block, place.site.name)
        envoy = getattr(block.ssm, place.site.name if place.site is not None else str(place.native))
        return envoy if place.position is None else envoy[place.position]

    def hook_names(self, n_positions: int) -> list[str]:
        """Every MambaLens hook name for a prompt of ``n_positions`` tokens, in execution order.

        Example::

            model.hook_names(n_positions=5)[0]  # "hook_embed"
        """
        return names.hook_names(len(self.layers), n_positions)

    @eproperty
    def output(self, value: Any) -> Any:
        """What the forward returns: a ``MambaCausalLMOutput``, whose ``logits`` are float32 [B,L,V]."""
        return keep_apart(f"{self.path}.output", value)

    def __repr__(self) -> str:
        sizes = axis_sizes(self.config)
        lines = []
        for row in rows():
            shape = f"[{', '.join(str(sizes.get(axis, axis)) for axis in row.axes)}]"
            lines.append(f"  {row.path:26} {shape:22} {row.hook or ''}".rstrip())
        return "\n".join([super().__repr__(), "Sites, in the order to ask for them:", *lines])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in KEEPING_HOOKS:
                raise none_kept(name) from error
            if name.startswith("_"):
                raise
            raise unknown(self, name) from error

    _batcher_class = ExpandedRows
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call Hugging Face's module, which takes token ids [B,L] and returns its own output.

        Raises:
            PromptError: for text, which `run_with_hooks` takes and returns the logits of.
        """
        if args and _holds_text(args[0]):
            raise PromptError(
                "model(...) calls Hugging Face's module, which takes token ids: for the logits of text write "
                "model.run_with_hooks(prompt), with return_type='loss' for its loss"
            )
        return super().__call__(*args, **kwargs)

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's ``trace``, with a `SiteTracer`.

        Raises:
            PromptError: for what is no prompt, or an argument that the forward does not have.
            TraceError: inside another trace of this model. One in another thread is waited for.

        Example::

            with model.trace("Emma gave an apple to"):
                logits = model.lm_head.output.save()  # [B,L,V]
        """
        if kwargs.get("trace", True):
            kwargs.setdefault("tracer_cls", SiteTracer)
            return super().trace(*inputs, **kwargs)
        with only_run(self, "model.trace(..., trace=False) was called"):
            return super().trace(*inputs, **kwargs)

    def scan(self, *inputs: Any, fn: Any = "__call__", backend: Any = None, **kwargs: Any) -> Any:
        """nnsight's ``scan``: the shapes of a run, without its numbers; also where weights are offloaded.

        Example::

            with model.scan("Emma gave an apple to"):
                shape = model.layers[1].ssm.h[2].output.shape  # [B,E,N]
        """
        return ScanTracer(self, fn, *inputs, backend=backend, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        check_prompt(self.config.hidden_size, inputs, kwargs)
        return super()._batch_size(*inputs, **kwargs)

    def _check_arguments(self, fn: Any, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
        if getattr(fn, "__name__", None) == "_call":
            check_arguments(self, inputs, kwargs)

    # -- loading ---------------------------------------------------------------------------------------

    def _loaded_preprocessors(self) -> set[str]:
        return {"tokenizer"}

    def _find(self, repo_id: str, kwargs: dict[str, Any], *, fetch: bool = False) -> Checkpoint:
        """The checkpoint, with the configuration that is asked for, which is taken out of ``kwargs``."""
        dtype_of(kwargs)
        options = {
            name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs
        }
        given = given_config(kwargs.pop("config", None), **options)
        found = find_checkpoint(repo_id, config=given, revision=self.revision, **options)
        config = take_config(found.config, kwargs)
        given_layers = config.num_hidden_layers != found.config.num_hidden_layers
        checkpoint = replace(found, config=config, given=found.given or given_layers)
        examine(checkpoint, kwargs, fetch=fetch)
        return checkpoint

    def _settings(self, side: str | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        # Attributes of the tokenizer.
        settings = {"padding_side": self.default_padding_side, **(settings or {})}
        if side is not None:
            settings["padding_side"] = side
        padding.checked_side(settings["padding_side"])
        return settings

    def _configure_tokenizer(self) -> None:
        super()._configure_tokenizer()
        if self.tokenizer is not None:
            for name, value in self._tokenizer_settings.items():
                setattr(self.tokenizer, name, value)
        self._configured = self.tokenizer is not None

    def _find_tokenizer(self, checkpoint: Checkpoint) -> None:
        # Once, and not again when the weights are loaded: a search that fails warns.
        if self.tokenizer is None and not self._sought_tokenizer:
            self.tokenizer = load_tokenizer(checkpoint)
        self._sought_tokenizer = True

    def _load_meta(self, repo_id: str, *args: Any, **kwargs: Any) -> nn.Module:
        check_place(kwargs)
        checkpoint = self._find(repo_id, kwargs)
        module: Any = MambaForCausalLM(checkpoint.config)
        module.to(dtype_of(kwargs) or checkpoint.config.dtype or torch.float32)
        placement.full_device_map(kwargs.get("device_map"), module)  # a name that is wrong is told at once
        self._find_tokenizer(checkpoint)
        return self._wrap(module, device="meta")

    def _load(self, repo_id: str, *args: Any, **kwargs: Any) -> nn.Module:
        check_place(kwargs, here=True)
        checkpoint = self._find(repo_id, kwargs, fetch=True)
        self._find_tokenizer(checkpoint)
        device = kwargs.pop("device", None)
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        config = checkpoint.config
        if "device_map" in kwargs:
            kwargs["device_map"] = placement.usable_device_map(kwargs["device_map"], config)
        # transformers 5 rescales *loaded* weights too where this is set; it concerns new ones alone.
        rescale, config.rescale_prenorm_residual = config.rescale_prenorm_residual, False
        module = self._read(checkpoint, config, kwargs)
        module.config.rescale_prenorm_residual = rescale
        module.name_or_path = repo_id
        return self._wrap(module, device=device, placed="device_map" in kwargs)

    def _read(self, checkpoint: Checkpoint, config: MambaConfig, kwargs: dict[str, Any]) -> Any:
        name: str | None = checkpoint.name
        if checkpoint.format == "original":
            name, kwargs["state_dict"] = None, read_state_dict(checkpoint)
            kwargs.setdefault("dtype", next(iter(kwargs["state_dict"].values())).dtype)
        else:
            kwargs["revision"] = self.revision or "main"
        try:
            loaded: Any = MambaForCausalLM.from_pretrained(
                name, config=config, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True}
            )
        except (MambaTraceError, ImportError):
            raise
        except Exception as error:  # files that are broken where `examine` does not look break it in any way
            raise CheckpointError(why_not(checkpoint.name, error)) from error
        module, found = loaded
        # Quantised weights go by names of their own, which their quantiser checks.
        if getattr(module, "hf_quantizer", None) is None and not kwargs.get("ignore_mismatched_sizes"):
            check_loaded(checkpoint, found)
        return module

    def _wrap(
        self, module: nn.Module, *args: Any, device: Any = None, placed: bool = True, **kwargs: Any
    ) -> nn.Module:
        make_hookable(module, self._kernels)
        module.eval()
        if self._configured and self.tokenizer is not None:
            # What the user has set since then; the pipeline pads on the left.
            self._tokenizer_settings["padding_side"] = self.tokenizer.padding_side
        # A module on its way in stays where its owner put it; one loaded here goes where nnsight's others go.
        with placement.one_device(module):
            if placed and device is None and not getattr(module, "hf_device_map", None):
                device = module.device
            self.pipeline = TextGenerationPipeline(
                model=module, tokenizer=self.tokenizer, task=TASK, device=device
            )
        return self._finalize_pipeline()

    def _follow(self) -> None:
        """Bring the tree of envoys up to date with the module, parts of which may have been replaced since.

        Raises:
            CheckpointError: if a block or mixer was replaced by something that has no sites.
        """
        reinstate_controllers(self.interleaver)
        if not is_current(self):
            make_hookable(self._module, kernels_of(self._module) or self._kernels)
            follow(self)

    def _update(self, module: nn.Module) -> None:
        super()._update(module)
        remember(self, (SiteModule,))

    # -- copies ----------------------------------------------------------------------------------------

    def __copy__(self) -> MambaTrace:
        return self._shallow_copy()  # of the same module, with edits of its own, as `edit` makes them

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # On a server nnsight puts the server's own module and interleaver here, which need nothing.
        if self.interleaver.copied:
            self.dispatched = state["dispatched"]
            reconnect(self)
            remember(self, (SiteModule,))

    def _batch(self, invokes: list, fn: Any) -> tuple:
        if self.tokenizer is None and any(_holds_text(inputs) for inputs, _ in invokes):
            raise PromptError(
                "this model has no tokenizer, so a prompt must be a tensor of token ids [B,L]; "
                "or give it one: MambaTrace(..., tokenizer=...)"
            )
        check_token_lists(invokes)
        check_lengths(self, invokes)
        self._follow()
        if self.dispatched and detect_fake_mode() is None:
            placement.check_weights(self._module)
        extra = getattr(self.interleaver.batcher, "extra_kwargs", {})
        batch = padding.Batch(self.tokenizer, invokes, extra, fn)
        with batch.padded(), torch.device("cpu"):  # whatever the default device, the prompts start there
            args, kwargs = super()._batch(batch.invokes, fn)
        kwargs = batch.masked(kwargs)
        check_tokens(self, invokes, kwargs)
        take_note_of_mask(self.interleaver, kwargs.get("attention_mask"))
        prompt = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        known = isinstance(prompt, Tensor) and prompt.dim() > 1
        take_note_of_length(self.interleaver, prompt.shape[1] if known else None)  # type: ignore[union-attr]
        return args, kwargs


def _empty(config: MambaConfig, dtype: torch.dtype) -> MambaForCausalLM:
    """A module with uninitialised parameters, drawing no random numbers."""
    check_memory(config, dtype)
    with torch.device("meta"):
        module: Any = MambaForCausalLM(config)
    module.to(dtype).to_empty(device="cpu")
    module.tie_weights()
    return module


def names_besides(ours: Mapping[str, str], users: Any, served: type) -> dict[Any, list[str]]:
    """nnsight's ``rename=``: this package's names of modules, and those that a user gives beside them.

    Raises:
        UnknownSiteError: if a user's name is one that the model has for something else.
    """
    if users is not None and not isinstance(users, Mapping):
        raise UnknownSiteError(
            f"rename= takes a dictionary of a module's path and its further name, such as "
            f"{{'backbone.layers': 'stack'}}, not {users!r}"
        )
    merged: dict[Any, list[str]] = {path: [alias] for path, alias in ours.items()}
    for path, aliases in (users or {}).items():
        for alias in aliases if isinstance(aliases, (list, tuple)) else [aliases]:
            if not isinstance(alias, str) or not all(part.isidentifier() for part in alias.split(".")):
                raise UnknownSiteError(
                    f"rename={{{path!r}: {alias!r}}}: a name is a string that can stand after a dot"
                )
            owner = next((path for path, name in ours.items() if name == alias), None)
            if hasattr(served, alias) or owner not in (None, path):
                what = f"of {owner}" if owner is not None else f"of {served.__name__}.{alias}"
                raise UnknownSiteError(
                    f"rename={{{path!r}: {alias!r}}}: {alias!r} is the name {what} already; choose another "
                    f"one. Sites keep their own names, and a rename adds one beside it"
                )
            merged.setdefault(path, []).append(alias)
    return {path: list(dict.fromkeys(aliases)) for path, aliases in merged.items()}


def _holds_text(inputs: Any) -> bool:
    if isinstance(inputs, str):
        return True
    return isinstance(inputs, (list, tuple)) and any(_holds_text(item) for item in inputs)
