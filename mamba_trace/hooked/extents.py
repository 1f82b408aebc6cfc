"""What a model's forward is to call as its layers where a run goes through a part of them.

The base of a Mamba calls whatever list of blocks it finds. That of a hybrid makes a mask for each layer by its
number, and may multiply the input of the first by a factor. So there every layer keeps its place: something stands
for the layers that do not run, and gives the first that does the residual stream as it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import LayerError
from ..names import spans
from ..sites import BY_NAME, Layout
from .hooks import Extent


@dataclass(eq=False)
class Stand:
    """Stands in the place of a layer of a hybrid.

    Attributes:
        block: the layer.
        runs: whether it runs; otherwise the residual stream goes on as it is.
        stream: what the residual stream [B,L,D] is there, whatever the model's forward has made of its input;
            ``None`` for what the layer before returned.
    """

    block: Any
    runs: bool
    stream: Tensor | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stream = hidden_states if self.stream is None else self.stream
        if self.runs:
            return self.block(stream, *args, **kwargs)
        return (stream, *[None] * (self.block.returned - 1)) if self.block.returned else stream


def run_layers(blocks: list[Any], extent: Extent, stream: Tensor | None, layout: Layout) -> list[Any]:
    """What the base's forward is to call as its layers, of an extent that `check_runnable` accepts.

    Args:
        blocks: all layers of the model.
        extent: which of them the run goes through.
        stream: the residual stream [B,L,D] into the first of them, where the run is given one.
        layout: of the model. The base of a hybrid makes a mask for each layer by its number.
    """
    layers = extent.layers
    if not layout.hybrid:
        return [blocks[layer] for layer in layers]
    first = min(layers, default=len(blocks) - 1)
    given = stream if extent.start is not None else None
    return [Stand(block, number in layers, given if number <= first else None) for number, block in enumerate(blocks)]


def check_runnable(extent: Extent, layout: Layout) -> None:
    """Refuse a part of a hybrid that cannot run by itself.

    Raises:
        LayerError: for layers in another order than the model's, or for a layer that reads the embeddings of
            tokens where the run is given a residual stream.
    """
    layers = extent.layers
    if layout.hybrid and layers != sorted(set(layers)):
        raise LayerError(
            f"only_use_these_layers={list(extent.only or ())}: the layers of this model differ, and run in the "
            f"model's own order, each at most once"
        )
    shared = [layer for layer in layers if layout.layers[layer].has(BY_NAME["shared_out"])]
    if extent.start is not None and shared:
        raise LayerError(
            f"start_at_layer={extent.start}: the shared transformer of layers {spans(shared)} reads the embeddings "
            f"of the tokens, which a residual stream does not hold. Run the prompt, with a hook on "
            f"layers[{extent.start}].resid_pre that puts the stream there"
        )
