"""A checkpoint that is broken or does not fit its configuration is refused before anything is built.

transformers would fill missing weights with random numbers, follow names out of the folder, or fail in
riddles after reading gigabytes.

Contract: `examine` compares the configuration with the names and shapes in the files of weights; `load_model`
loads either format with transformers' from_pretrained, so that shards, device_map and quantisation work for
both, and refuses what transformers would load only in part. Pickles are read under weights_only, so no code
is run. Each fault is a `CheckpointError` in one sentence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME, is_peft_available

from ..errors import CheckpointError, MambaTraceError
from ..modeling.architectures import BY_TYPE
from ..names import nearest
from .checkpoint_files import BOTH_FORMATS, first_file, listing, weight_files, weight_names
from .checkpoint_index import read_json
from .checkpoints import Checkpoint
from .hybrid_weights import Misfits, misfits_of
from .load_options import DTYPES, replaceable
from .tensor_files import shapes_of
from .weight_sizes import (
    EMBEDDING,
    LAYER,
    LM_HEAD,
    Shapes,
    check_buildable,
    check_weights,
    expected_shapes,
    layers_in,
    misfits,
)

#: How transformers is to rename the only parameter whose name differs in the original format.
KEY_MAPPING = {r"^backbone\.embedding\.": "backbone.embeddings."}
#: Arguments of from_pretrained that its signature does not name, to suggest.
MORE = ("device", "device_map", "max_memory", "offload_folder", "quantization_config", "variant", "subfolder")


def examine(checkpoint: Checkpoint, kwargs: Mapping[str, Any], *, fetch: bool = False) -> None:
    """Refuse a checkpoint whose files are broken, are not its own, or do not fit the configuration.

    Args:
        checkpoint: with the configuration that is to be built.
        kwargs: the arguments of from_pretrained.
        fetch: fetch what is not in the hub's cache; otherwise only what is on this machine is examined.

    Raises:
        CheckpointError: as `weight_files`, `shapes_of` and `check_weights`; as `check_buildable` if there are
            no weights on this machine that tell the sizes of the model.
    """
    _check_beside(checkpoint)
    config, name, what = checkpoint.config, checkpoint.name, _what(checkpoint)
    if kwargs.get("gguf_file") is not None:
        return check_buildable(f"{name}: {what}", config)
    files = _files(checkpoint, kwargs, fetch)
    # Quantised weights have shapes of their own and key_mapping gives other names, so only their files are
    # checked.
    quantised = getattr(config, "quantization_config", None) is not None
    shapes = None if files is None or quantised else shapes_of(files)
    if shapes is None or kwargs.get("key_mapping") is not None or kwargs.get("ignore_mismatched_sizes"):
        there = "has no weights here" if files is None else "has weights that are not compared"
        return check_buildable(f"{name} {there}, and {what}", config)
    if BY_TYPE[config.model_type].hybrid:
        return _check_found(checkpoint, *_hybrid_misfits(checkpoint, shapes))
    check_weights(name, config, shapes, what, fewer_layers=checkpoint.given)
    if not any(key.startswith("backbone.") for key in shapes):
        return  # the weights of a model without its lm_head, whose names transformers completes
    expected = expected_shapes(config)
    if checkpoint.format == "original":
        expected[EMBEDDING["original"]] = expected.pop(EMBEDDING["huggingface"])
    optional = {LM_HEAD} if config.tie_word_embeddings else set()
    wrong = [(key, shapes[key], right) for key, right in expected.items() if shapes.get(key, right) != right]
    missing, extra = expected.keys() - shapes.keys() - optional, shapes.keys() - expected.keys()
    _check_found(checkpoint, missing, extra, wrong)


def _hybrid_misfits(checkpoint: Checkpoint, shapes: Shapes) -> Misfits:
    """As `misfits_of`, with the checkpoint's name in its error."""
    layers, declared = layers_in(shapes), checkpoint.config.num_hidden_layers
    if layers < declared or (layers > declared and not checkpoint.given):
        raise CheckpointError(
            f"the weights of {checkpoint.name} do not fit {_what(checkpoint)}: it declares {declared} layers and the "
            f"weights have {layers}. Use the config that belongs to the weights"
        )
    try:
        return misfits_of(checkpoint.config, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"the weights of {checkpoint.name} do not fit {_what(checkpoint)}: {error}") from error


def load_model(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint with its weights, loaded by transformers, bit for bit.

    Args:
        checkpoint: with the configuration that is to be built, as `examine` has accepted it.
        kwargs: the arguments of from_pretrained.

    Raises:
        CheckpointError: if transformers fails, would leave weights random or leave some out, or if a tied
            lm_head of the original format is not the embedding.
    """
    original = checkpoint.format == "original"
    source, options = str(checkpoint.path or checkpoint.name), dict(kwargs)
    options |= {"revision": checkpoint.hub.get("revision") or "main", "weights_only": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if original:
        source = _prepare_original(checkpoint, options)
    try:
        loaded: Any = BY_TYPE[checkpoint.config.model_type].model_class.from_pretrained(
            source, config=checkpoint.config, **options
        )
    except (MambaTraceError, ImportError):
        raise
    except Exception as error:  # files that are broken where `examine` does not look break it in any way
        raise CheckpointError(_why_not(checkpoint, error)) from error
    model, report = loaded
    # Quantised weights have other names, which their quantiser checks.
    if getattr(model, "hf_quantizer", None) is None and not kwargs.get("ignore_mismatched_sizes"):
        keys = [report.get(f"{kind}_keys") or () for kind in ("missing", "unexpected", "mismatched")]
        _check_found(checkpoint, *keys)
    if original:
        _complete_original(checkpoint, model)
    return model


def _prepare_original(checkpoint: Checkpoint, options: dict[str, Any]) -> str:
    """Complete the options of from_pretrained for the original format, and give what to load from."""
    options["key_mapping"] = KEY_MAPPING | (options.get("key_mapping") or {})
    folder = checkpoint.path
    if folder is None:
        # The folder of the fetched files: given a hub id that has pickles only, transformers would ask a
        # service on the hub to convert it.
        file = first_file(checkpoint, _names(checkpoint, options), fetch=False)
        folder = file.parent if file else None
        options.pop("subfolder", None)
    below = options.get("subfolder") or ""
    if folder is not None and not (folder / below / GENERATION_CONFIG_NAME).exists():
        # transformers would look for settings of generation in config.json, which has none in this format.
        options.setdefault("generation_config", GenerationConfig.from_model_config(checkpoint.config))
    return str(folder or checkpoint.name)


def _complete_original(checkpoint: Checkpoint, model: Any) -> None:
    """Check the lm_head of a model loaded from the original format, and let it be saved as Hugging Face's."""
    if checkpoint.config.tie_word_embeddings and not model.all_tied_weights_keys:
        raise CheckpointError(
            f"the config of {checkpoint.name} ties lm_head.weight to the embedding, but its weights have "
            "another lm_head.weight; set tie_word_embeddings=False (tie_embeddings=False in the original "
            "format)"
        )
    # save_pretrained would otherwise write the original names, beside a configuration of Hugging Face's.
    renames = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [rename for rename in renames if rename.source_patterns != list(KEY_MAPPING)]


def _check_found(checkpoint: Checkpoint, missing: Any, extra: Any, wrong: Any) -> None:
    """Raise if a checkpoint's weights are not exactly those of the model.

    ``missing`` and ``extra`` are names; ``wrong`` has triples of a name, its shape and the right one, as
    from_pretrained reports them.
    """
    if checkpoint.given:  # the configuration may leave out the last layers
        layers, built = ((key, LAYER.search(key)) for key in extra), checkpoint.config.num_hidden_layers
        extra = [key for key, layer in layers if not layer or int(layer[1]) < built]
    problems = misfits(sorted(missing), sorted(extra), {key: (shape, right) for key, shape, right in wrong})
    if problems:
        raise CheckpointError(f"the weights of {checkpoint.name} do not fit {_what(checkpoint)}. {problems}")


def _what(checkpoint: Checkpoint) -> str:
    """What the configuration of a checkpoint is called in messages."""
    return "config=" if checkpoint.given else "its config.json"


def _why_not(checkpoint: Checkpoint, error: Exception) -> str:
    """What transformers says about a checkpoint that it does not load, in one sentence."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and isinstance(error, TypeError):
        known = [*DTYPES, *inspect.signature(PreTrainedModel.from_pretrained).parameters, *MORE]
        known += replaceable(checkpoint.config)
        hint = nearest(unknown[1], sorted(known))
        return f"MambaTrace and from_pretrained take no argument {unknown[1]}{hint}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"cannot load the weights of {checkpoint.name}: {reason[:300]}"


def _names(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the files that transformers would load the weights from, best first."""
    named = getattr(checkpoint.config, "transformers_weights", None)
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"transformers_weights in the config of {checkpoint.name} must name a file, found {named!r}"
        )
    return weight_names(kwargs, named)


def _files(checkpoint: Checkpoint, kwargs: Mapping[str, Any], fetch: bool) -> list[Path] | None:
    """The files that the weights are loaded from; None if they must be fetched first."""
    names, folder = _names(checkpoint, kwargs), checkpoint.path
    files = weight_files(checkpoint, names, kwargs.get("subfolder") or "", fetch=fetch)
    if files is None and folder is not None and getattr(checkpoint.config, "transformers_weights", None):
        raise CheckpointError(
            f"{folder} has no {names[0]}, which its config names as transformers_weights; it has {listing(folder)}"
        )
    if files is None and fetch:
        there = f"; it has {listing(folder)}" if folder else " on the hub"
        raise CheckpointError(f"{checkpoint.name} has no weights{there}. {BOTH_FORMATS}")
    return files


def _check_beside(checkpoint: Checkpoint) -> None:
    """Refuse broken files beside the weights, on which transformers would fail only after loading these."""
    if checkpoint.path is None:
        return
    if is_peft_available() and (checkpoint.path / ADAPTER_CONFIG_NAME).exists():
        read_json(checkpoint.path / ADAPTER_CONFIG_NAME)
    file = checkpoint.path / GENERATION_CONFIG_NAME
    if not file.exists():
        return
    content = read_json(file)
    try:
        GenerationConfig.from_dict(content).validate()
    except Exception as error:  # transformers uses the values before it checks them
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} holds no settings of generation: {reason}. Correct it, or delete it") from error
