"""How a `MambaTrace` loads: the methods of nnsight's model that find a checkpoint and read its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TextGenerationPipeline

from ..errors import ArgumentError, CheckpointError
from ..modeling.architectures import BY_TYPE, make_hookable
from ..names import nearest
from ..tracing.placement import full_device_map, one_device, usable_device_map
from ..tracing.remote import TASK
from .checkpoint_tokenizer import load_tokenizer
from .checkpoints import Checkpoint, find_checkpoint
from .load_options import check_place, dtype_of, given_config, take_config
from .loading import examine, load_model

#: Arguments of ``from_pretrained`` that say how files are found.
HUB_OPTIONS = ("cache_dir", "token", "local_files_only")


class Loading:
    """The half of a `MambaTrace` that loads: the configuration first, the weights when they are needed."""

    _kernels: str
    _tokenizer_settings: dict[str, Any]
    _configured = False
    _sought_tokenizer = False
    revision: str | None
    tokenizer: Any

    def _loaded_preprocessors(self) -> set[str]:
        return {"tokenizer"}

    def _find(self, repo_id: str, kwargs: dict[str, Any], *, fetch: bool = False) -> Checkpoint:
        """The checkpoint, with the configuration that ``kwargs`` ask for, whose entries are removed."""
        dtype_of(kwargs)
        if kwargs.pop("trust_remote_code", None):
            raise CheckpointError(
                "trust_remote_code=True asks for classes of the checkpoint's own, and this package knows those of "
                "transformers: load without trust_remote_code. A tokenizer that needs it can be given as tokenizer="
            )
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        given = given_config(kwargs.pop("config", None), **options)
        found = find_checkpoint(repo_id, config=given, revision=self.revision, **options)
        config = take_config(found.config, kwargs)
        given_layers = config.num_hidden_layers != found.config.num_hidden_layers
        checkpoint = replace(found, config=config, given=found.given or given_layers)
        examine(checkpoint, kwargs, fetch=fetch)
        return checkpoint

    def _configure_tokenizer(self) -> None:
        super()._configure_tokenizer()  # type: ignore[misc]
        if self.tokenizer is not None:
            for name, value in self._tokenizer_settings.items():
                if not hasattr(self.tokenizer, name):
                    known = [known for known in dir(self.tokenizer) if not known.startswith("_")]
                    raise ArgumentError(
                        f"tokenizer_kwargs= has {name!r}, which is no attribute of a "
                        f"{type(self.tokenizer).__name__}{nearest(name, known)}"
                    )
                setattr(self.tokenizer, name, value)
        self._configured = self.tokenizer is not None

    def _find_tokenizer(self, checkpoint: Checkpoint) -> None:
        # Only once, and not again when the weights are loaded: a search that fails warns.
        if self.tokenizer is None and not self._sought_tokenizer:
            self.tokenizer = load_tokenizer(checkpoint)
        self._sought_tokenizer = True

    def _load_meta(self, repo_id: str, *args: Any, **kwargs: Any) -> nn.Module:
        check_place(kwargs)
        checkpoint = self._find(repo_id, kwargs)
        module: Any = BY_TYPE[checkpoint.config.model_type].model_class(checkpoint.config)
        module.to(dtype_of(kwargs) or checkpoint.config.dtype or torch.float32)
        full_device_map(kwargs.get("device_map"), module)  # a wrong name is refused at once
        self._find_tokenizer(checkpoint)
        return self._wrap(module, device="meta")

    def _load(self, repo_id: str, *args: Any, **kwargs: Any) -> nn.Module:
        check_place(kwargs, here=True)
        checkpoint = self._find(repo_id, kwargs, fetch=True)
        self._find_tokenizer(checkpoint)
        device = kwargs.pop("device", None)
        config = checkpoint.config
        if "device_map" in kwargs:
            build = BY_TYPE[config.model_type].model_class
            kwargs["device_map"] = usable_device_map(kwargs["device_map"], lambda: build(config))
        # If this is set, transformers 5 rescales weights that it loads, too; it is meant for new weights.
        rescale = getattr(config, "rescale_prenorm_residual", False)
        if rescale:
            config.rescale_prenorm_residual = False
        module: Any = load_model(checkpoint, kwargs)
        if rescale:
            module.config.rescale_prenorm_residual = True
        module.name_or_path = repo_id
        return self._wrap(module, device=device, placed="device_map" in kwargs)

    def _wrap(self, module: nn.Module, *args: Any, device: Any = None, placed: bool = True, **kwargs: Any) -> nn.Module:
        make_hookable(module, self._kernels)
        module.eval()
        if self._configured and self.tokenizer is not None:
            # Keep what the user has set since then: the pipeline sets left padding.
            self._tokenizer_settings["padding_side"] = self.tokenizer.padding_side
        # A module that the user gave stays where it is; a module loaded here goes where nnsight puts others.
        with one_device(module):
            if placed and device is None and not getattr(module, "hf_device_map", None):
                device = module.device
            self.pipeline = TextGenerationPipeline(model=module, tokenizer=self.tokenizer, task=TASK, device=device)
        return self._finalize_pipeline()  # type: ignore[attr-defined]
