"""`MambaTrace`: a Mamba as an nnsight model, with every intermediate value a named site.

It is an `nnsight.TransformersModel` over Hugging Face's own module, so everything nnsight does (trace,
invoke, generate, iter, edit, cache, scan, session, barrier, backward, source) works as documented there.
What this class adds is loading (either checkpoint format, a loaded module, a state dict, a configuration),
the sites, and their other names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers import PreTrainedTokenizerBase

from .arguments import padding
from .arguments.prompt_forms import (
    check_arguments,
    check_counts,
    check_lengths,
    check_prompt,
    check_token_lists,
    check_tokens,
)
from .conversion.building import from_scratch, from_weights
from .conversion.config_names import check_names
from .conversion.load_options import check_module_arguments, check_seed, check_tokenizer, dtype_of, parameters_of
from .conversion.model_loading import Loading
from .errors import CheckpointError, PromptError
from .hooked.hooks import KEEPING_HOOKS, none_kept
from .hooked.places import Places
from .hooked.run_with import HookedRuns
from .hooked.tokens import Tokens
from .hooked.weights import LensViews
from .modeling.architectures import architecture_of, axis_sizes, kernels_of, make_hookable
from .modeling.offers import SiteModule
from .modeling.run_report import RunReport
from .names import spans
from .names.modules import BASES, OF_BASE
from .scan import check
from .sites import rows, site_of
from .tables import html_table
from .tracing import placement
from .tracing.forwards import reinstate_controllers
from .tracing.root import RootEnvoy
from .tracing.tree import branches_of, follow, is_current
from .tracing.visit import take_note_of_prompt

#: This package's names for modules of Hugging Face's, by path.
RENAME = {f"{base}.{theirs}": ours for base in BASES for ours, several in OF_BASE.items() for theirs in several}
RENAME |= {"mixer": "ssm", "mamba": "ssm"}
DEMO = Path(__file__).parent / "demo_model"
#: The models that ship, by the architecture that `MambaTrace.demo` takes.
DEMOS = {"mamba": DEMO} | {name: DEMO.with_name(f"demo_model_{name}") for name in ("mamba2", "hybrid")}


class MambaTrace(Places, HookedRuns, LensViews, Tokens, Loading, RootEnvoy):
    """A Mamba whose every intermediate value can be read and edited inside a trace.

    Args:
        repo_id: a hub id or a local folder, in Hugging Face's or the original state-spaces format; or a loaded
            model of transformers, which is made hookable in place: a Mamba (``MambaForCausalLM``,
            ``FalconMambaForCausalLM``, ``Mamba2ForCausalLM``) or a hybrid (Nemotron-H, Falcon-H1, Granite 4,
            Jamba, Bamba, Zamba, Zamba2).
        tokenizer: the tokenizer; if not given, the checkpoint's. The model uses a copy, in which a missing
            padding token becomes the end-of-sequence token.
        kernels: which scan runs: ``"auto"``, the fastest for each call, or one of ``"reference"``, ``"cpu"``,
            ``"cuda"`` and ``"triton"``.
        padding_side: on which side the shorter prompts of a batch are padded: ``"left"`` if not given, so
            that position -1 is the last token of each prompt, or ``"right"``. It does not change results.
        tokenizer_kwargs: attributes to set on the model's tokenizer, such as ``padding_side``.
        **kwargs: ``revision``, ``dtype``, ``device``, ``device_map``, ``quantization_config`` and whatever
            else ``from_pretrained`` takes; ``dispatch=True`` loads the weights now, not at the first run.
            ``config`` replaces the checkpoint's configuration; it may have any format, or name a folder or
            hub id. If it has fewer layers, only the first layers are loaded. An argument such as
            ``num_hidden_layers=2`` replaces a single field of the configuration.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is not a Mamba.
        PromptError: if ``padding_side`` is neither side.
        BackendError: if there is no backend of the name ``kernels``, or it cannot run here.

    Example::

        model = MambaTrace("state-spaces/mamba-370m")
        with model.trace("Hello World"):
            model.layers[3].ssm.h[0].output[:] = 0
            logits = model.lm_head.output.save()  # [B,L,V]
    """

    _leaves = (SiteModule,)

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
        check_tokenizer(kwargs.get("tokenizer"), tokenizer_kwargs)
        self._tokenizer_settings = self._settings(padding_side, tokenizer_kwargs)
        # A copy, since its padding token and side are set below and the user's own must stay as it is.
        kwargs["tokenizer"] = copy.deepcopy(kwargs.get("tokenizer"))
        if isinstance(repo_id, Path):
            repo_id = str(repo_id)
        if isinstance(repo_id, nn.Module):
            check(kernels, architecture_of(repo_id).family)
            inits = (vars(kind)["__init__"] for kind in type(self).__mro__ if "__init__" in vars(kind))
            check_module_arguments(kwargs, {name for init in inits for name in parameters_of(init)})
        super().__init__(repo_id, *args, ours=RENAME, **kwargs)
        check(kernels, self.architecture.family)  # known only now where a checkpoint was named

    @property
    def kernels(self) -> str:
        """Which scan runs. Assign another name to change it for later runs.

        The module keeps this setting, so if several wrappers share a module the last one decides.

        Raises:
            BackendError: if there is no backend of the assigned name, or it cannot run here.

        Example::

            model.kernels  # "auto"
        """
        self._follow()
        return kernels_of(self._module) or self._kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        self._kernels = check(kernels, self.architecture.family)
        self._follow()
        for layer in self.ssm_layers:
            self.layers[layer].ssm._module.kernels = kernels

    @property
    def device(self) -> torch.device:
        """The device to which inputs are moved: where the embedding runs, even if it is offloaded.

        A tensor that is assigned to a site is moved to the device of the site's layer.

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
        if not self.ssm_layers:
            return RunReport()
        report = self.layers[self.ssm_layers[0]].ssm._module.report
        return RunReport(list(report.layers), report.trace)

    # -- other ways to make one ------------------------------------------------------------------------

    @classmethod
    def demo(cls, architecture: str = "mamba", **kwargs: Any) -> MambaTrace:
        """A small trained model that ships with the package: who was given the apple?

        Args:
            architecture: ``"mamba"``, ``"mamba2"`` or ``"hybrid"``, a Nemotron-H of Mamba-2 and attention layers:
                all were trained on the same sentences.
            **kwargs: as for `MambaTrace`.

        Returns:
            A model whose weights are loaded, without a download.

        Raises:
            CheckpointError: if no model of this architecture ships.

        Example::

            model = MambaTrace.demo("mamba2")
        """
        if not isinstance(architecture, str) or architecture not in DEMOS:
            raise CheckpointError(f"no demo of {architecture!r} ships; there are {', '.join(map(repr, DEMOS))}")
        return cls(str(DEMOS[architecture]), **{"dispatch": True, **kwargs})

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
        """A model from scratch, initialised as the Mamba authors do; a hybrid is initialised as transformers does.

        Args:
            config: a ``MambaConfig``, ``FalconMambaConfig``, ``Mamba2Config`` or that of a hybrid, or a
                configuration in the original or MambaLens's format.
            tokenizer: needed for prompts that are strings.
            seed: the seed of a generator of its own; torch's global generator is not used.
            dtype: the dtype of the parameters.
            **kwargs: as for `MambaTrace`.

        Raises:
            CheckpointError: for a field that the configuration's format does not have, a value that does not
                fit, or a model too large for this machine's memory.
            ArgumentError: for a seed that is no integer.

        Example::

            model = MambaTrace.from_config({"d_model": 64, "n_layer": 2, "vocab_size": 100}, seed=1)
        """
        check_names(config)
        module = from_scratch(config, dtype_of({"dtype": dtype}) or torch.float32, check_seed(seed))
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

        The parameters of a Falcon-Mamba have the names and shapes of a Mamba-1's: the configuration must be the
        one that belongs to them.

        Args:
            config: original, MambaLens's or Hugging Face's.
            state_dict: original, MambaLens's or Hugging Face's; values are taken bit for bit.
            tokenizer: needed for prompts that are strings.
            **kwargs: as for `MambaTrace`.

        Raises:
            CheckpointError: if keys, shapes or the format do not fit the configuration.

        Example::

            same = MambaTrace.from_state_dict(model.config, model._module.state_dict())
        """
        return cls(from_weights(config, state_dict), tokenizer=tokenizer, **kwargs)

    # -- the sites -------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [f"  {path:26} {shape:22} {hook}".rstrip() for path, shape, _, hook, _ in self._site_rows()]
        return "\n".join([super().__repr__(), "Sites, in the order to ask for them:", *lines])

    def _repr_html_(self) -> str:
        kind = f"{self.architecture.name}, {len(self.layers)} layers. Its sites, in the order to ask for them:"
        return html_table(kind, ["path", "shape", "layers", "hook name", "meaning"], self._site_rows())

    def _site_rows(self) -> list[tuple[str, str, str, str, str]]:
        # The path, the shape with this model's sizes, the layers, the hook name and the meaning of each site.
        family, sizes = self.architecture.family, axis_sizes(self._module)
        found = []
        for row in rows(family, self._layout):
            site = site_of(row)
            shape = f"[{', '.join(str(sizes.get(axis, axis)) for axis in row.axes[family])}]"
            layers = "" if site.scope == "model" else spans(self._layout.with_site(site))
            found.append((row.path, shape, layers, row.hook or "", row.meaning))
        return found

    def _lacks(self, name: str) -> Exception:
        return none_kept(name) if name in KEEPING_HOOKS else super()._lacks(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call Hugging Face's module, which takes token ids [B,L] and returns its own output.

        Raises:
            PromptError: for text; `run_with_hooks` takes text and returns its logits.
        """
        if args and _holds_text(args[0]):
            raise PromptError(
                "model(...) calls Hugging Face's module, which takes token ids: for the logits of text write "
                "model.run_with_hooks(prompt), with return_type='loss' for its loss"
            )
        return super().__call__(*args, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        check_prompt(self.config.hidden_size, inputs, kwargs)
        return super()._batch_size(*inputs, **kwargs)

    def _check_arguments(self, fn: Any, inputs: tuple, kwargs: Mapping[str, Any]) -> None:
        name = getattr(fn, "__name__", None)
        if name == "_call":
            check_arguments(self, inputs, kwargs)
        if name in ("generate", "pipe"):
            check_counts(kwargs)

    def _settings(self, side: str | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        # The attributes to set on the tokenizer.
        settings = {"padding_side": self.default_padding_side, **(settings or {})}
        if side is not None:
            settings["padding_side"] = side
        padding.checked_side(settings["padding_side"])
        return settings

    # -- running ---------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Bring the tree of envoys up to date with the module, parts of which may have been replaced since.

        Raises:
            CheckpointError: if a block or mixer was replaced by something that has no sites.
        """
        reinstate_controllers(branches_of(self))
        if not is_current(self):
            make_hookable(self._module, kernels_of(self._module) or self._kernels)
            follow(self)

    def _batch(self, invokes: list, fn: Any) -> tuple:
        if not invokes:
            raise PromptError(
                "no invoke of this trace has a prompt, so nothing can run: give one, `with tracer.invoke(prompt):`; "
                "an invoke without a prompt sees the rows of all others"
            )
        if self.tokenizer is None and any(_holds_text(inputs) for inputs, _ in invokes):
            raise PromptError(
                "this model has no tokenizer, so a prompt must be a tensor of token ids [B,L]; "
                "or give it one: MambaTrace(..., tokenizer=...)"
            )
        check_token_lists(invokes)
        check_lengths(self, invokes)
        self._follow()
        if self.dispatched and detect_fake_mode() is None:
            placement.check_weights(self._module, branches_of(self))
        extra = getattr(self.interleaver.batcher, "extra_kwargs", {})
        batch = padding.Batch(self.tokenizer, invokes, extra, fn)
        with batch.padded(), torch.device("cpu"):  # prompts start on the CPU whatever the default device
            args, kwargs = super()._batch(batch.invokes, fn)
        kwargs = batch.masked(kwargs)
        check_tokens(self, invokes, kwargs)
        take_note_of_prompt(self.interleaver, kwargs)
        return args, kwargs


def _holds_text(inputs: Any) -> bool:
    if isinstance(inputs, str):
        return True
    return isinstance(inputs, (list, tuple)) and any(_holds_text(item) for item in inputs)
