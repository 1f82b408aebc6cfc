"""What the checks of arguments need to know of a model. `MambaTrace` itself imports this room."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..sites import Layout


class ArgumentModel(Protocol):
    """The part of a `MambaTrace` that says which layers, channels, tokens and arguments it has."""

    layers: Any
    tokenizer: Any
    pipeline: Any
    default_prepend_bos: bool
    _module: Any

    @property
    def config(self) -> Any: ...

    @property
    def _layout(self) -> Layout: ...

    @property
    def tokenizer_prepends_bos(self) -> bool: ...

    def dispatch(self) -> Any: ...

    def trace(self, *inputs: Any, **kwargs: Any) -> Any: ...

    def to_tokens(self, text: Any) -> Tensor: ...

    def to_single_token(self, text: str) -> int: ...

    def to_str_tokens(self, text: Any) -> Any: ...

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int: ...
