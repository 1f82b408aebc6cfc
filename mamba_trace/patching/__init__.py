"""Activation patching: a run on one prompt, patched at every layer and position from a run on another.

A cell of a grid is the model's answer with a site's value at one (layer, position) taken from elsewhere. A
patch changes nothing in the layers before it and nothing at the positions before it, so a cell needs neither:
it starts at its layer and its position, from the residual stream, the convolution's columns and the scan's
state that the unpatched run left there. `plan` says which cells run together, `unpatched` makes what they
start from, `patched` runs them, as rows of a batch that grows from layer to layer, and `kept` keeps what is
done.

All that holds of a plain model. Where something that was done to a model may look at a run (`changes`), each
cell is a run of its own (`whole`).
"""

from .grid import attribution_grid, patch_grid
from .metrics import Metric, log_prob, logit, logit_diff, prob
from .result import PatchGrid

__all__ = ["Metric", "PatchGrid", "attribution_grid", "log_prob", "logit", "logit_diff", "patch_grid", "prob"]
