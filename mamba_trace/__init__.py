"""Trace and edit every intermediate value of a Mamba language model.

from mamba_trace import MambaTrace

model = MambaTrace.demo()
with model.trace("Lately, Emma and Shelby had fun at school. Shelby gave an apple to"):
    model.layers[3].ssm.h[5].output[:] = 0
    logits = model.lm_head.output.save()
"""

from . import names
from ._version import __version__
from .model import MambaTrace

__all__ = ["MambaTrace", "__version__", "names"]
