"""The original checkpoints come without a tokenizer, though all were trained with the same one.

Contract: `load_tokenizer` gives the tokenizer that belongs to a checkpoint. A broken one in a folder is a
`CheckpointError`; if there is none at all the result is None, with a warning that says what to do.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..modeling.architectures import BY_TYPE
from .checkpoint_files import check_file, offline
from .checkpoint_index import read_json
from .checkpoints import Checkpoint

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # what the state-spaces checkpoints were trained with
DEFAULT_TOKENIZER_SIZE = 50277
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(checkpoint: Checkpoint, **options: Any) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own tokenizer, or else gpt-neox-20b's, that of the state-spaces models.

    A missing padding token becomes the end-of-sequence token. If neither tokenizer can be had, or the default
    one has more tokens than the model, the result is None, with a warning that says what to do.

    Args:
        options: for `AutoTokenizer.from_pretrained`.

    >>> load_tokenizer(find_checkpoint("state-spaces/mamba-130m")).decode([510])    # doctest: +SKIP
    'The'
    """
    options = checkpoint.hub | options
    tokenizer, problem = _own_tokenizer(checkpoint, options), ""
    if tokenizer is None:
        tokenizer, problem = _default_tokenizer(checkpoint, options)
    if tokenizer is None:
        warnings.warn(
            f"no tokenizer: {checkpoint.name} has none, and {problem}. Strings cannot be used until "
            f"tokenizer= is given; token tensors work.",
            stacklevel=2,
        )
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _own_tokenizer(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own tokenizer; None if it has none."""
    folder = checkpoint.path
    if folder is not None:
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            return None
        for name in TOKENIZER_FILES:
            check_file(folder / name)
    try:
        # Unless told not to trust it, transformers asks at the terminal whether a tokenizer's code may be
        # run.
        options = {"trust_remote_code": False, **options}
        return AutoTokenizer.from_pretrained(str(folder or checkpoint.name), **options)
    except Exception as error:  # a broken file breaks a tokenizer in any way: KeyError, AttributeError, Exception
        if folder is not None:
            raise CheckpointError(_no_tokenizer(folder, error)) from error
        if checkpoint.format == "huggingface":
            reason = str(error).partition("\n")[0]
            message = f"the tokenizer of {checkpoint.name} cannot be loaded ({reason}); trying {DEFAULT_TOKENIZER}"
            warnings.warn(message, stacklevel=3)
    return None


def _no_tokenizer(folder: Path, error: Exception) -> str:
    """What is wrong with the tokenizer in a folder: the file that is no JSON, or what transformers says."""
    for name in (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json"):
        if name.endswith(".json") and (folder / name).exists():
            try:
                read_json(folder / name)
            except CheckpointError as broken:
                return f"the tokenizer in {folder} cannot be loaded: {broken}, or give tokenizer="
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"the tokenizer in {folder} cannot be loaded: {reason}. Mend its files, or give tokenizer="


def _default_tokenizer(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase | None, str]:
    """DEFAULT_TOKENIZER, or None and why; first from the cache, since an unreachable hub takes a minute."""
    vocab_size, architecture = checkpoint.config.vocab_size, BY_TYPE[checkpoint.config.model_type]
    if "original" not in architecture.formats:
        return None, f"a {architecture.name} was not trained with {DEFAULT_TOKENIZER}"
    if vocab_size < DEFAULT_TOKENIZER_SIZE:
        return None, f"{DEFAULT_TOKENIZER} has {DEFAULT_TOKENIZER_SIZE} tokens, the model {vocab_size}"
    options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    for local_only in (True,) if offline(options) else (True, False):
        with contextlib.suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER, **options | {"local_files_only": local_only}), ""
    return None, f"{DEFAULT_TOKENIZER} is neither cached nor within reach"
