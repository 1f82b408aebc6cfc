"""Trace and edit every intermediate value of a Mamba language model.

from mamba_trace import MambaTrace

model = MambaTrace.demo()
with model.trace("Lately, Emma and Shelby had fun at school. Shelby gave an apple to"):
    model.layers[3].ssm.h[5].output[:] = 0
    logits = model.lm_head.output.save()
"""

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if "IPython" in sys.modules:
    # In a notebook without ipywidgets, whatever imports tqdm.auto first warns, and its bars are text. That is no
    # mistake of the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("tqdm.auto")

from . import names
from ._version import __version__

if TYPE_CHECKING:
    from .model import MambaTrace

__all__ = ["MambaTrace", "__version__", "names"]


def __getattr__(name: str) -> Any:
    """Import the model class, and torch with it, only when asked for: `mamba-trace --help` is not."""
    if name == "MambaTrace":
        from .model import MambaTrace

        return MambaTrace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
