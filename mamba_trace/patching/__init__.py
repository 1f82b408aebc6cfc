"""Activation patching: a run on one prompt, patched at every layer and position from a run on another.

A cell of a grid is the model's answer when a site's value at one layer and position comes from the other run.
A patch changes nothing in the layers below and at the positions before it, so a cell starts at its own layer
and position, from the residual stream, the convolution's columns and the scan's state of the unpatched run.

`grid` takes what users ask and makes a `question` of it; `run` computes the answers. `plan` says which cells
run together, `unpatched` makes what they start from, `phases` runs them as rows of a batch, and `kept` keeps
what is done. All this holds for a plain model. Where something that was done to a model may look at a run
(`changes`), each cell is a run of its own (`whole`).
"""

from .grid import attribution_grid, patch_grid
from .metrics import Metric, log_prob, logit, logit_diff, prob
from .result import PatchGrid

__all__ = ["Metric", "PatchGrid", "attribution_grid", "log_prob", "logit", "logit_diff", "patch_grid", "prob"]
