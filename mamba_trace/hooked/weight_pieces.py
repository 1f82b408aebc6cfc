"""Which rows of which parameter a name of MambaLens's stands for, and how they are read and written.

weight_formats.py converts whole state dicts; here a name is found in a loaded model, wherever its parameters
are, by the same table.

Contract: `Owner.view` shares the parameter's memory, device and dtype, and is detached. `assign` checks
before it writes. Weights that cannot be edited (not loaded yet, offloaded, quantised, adapted) raise
`CheckpointError`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from ..conversion.weight_formats import RENAMED, SPLIT
from ..errors import CheckpointError, SiteValueError
from ..modeling.architectures import axis_sizes
from ..names import public_path

#: The axes of every parameter of a block, by MambaLens's name: K is d_conv.
AXES = {
    "norm.weight": "D",
    "skip_proj.weight": "ED",
    "skip_proj.bias": "E",
    "in_proj.weight": "ED",
    "in_proj.bias": "E",
    "conv1d.weight": "E1K",
    "conv1d.bias": "E",
    "W_delta_1.weight": "RE",
    "W_B.weight": "NE",
    "W_C.weight": "NE",
    "W_delta_2.weight": "ER",
    "W_delta_2.bias": "E",
    "A_log": "EN",
    "W_D": "E",
    "out_proj.weight": "DE",
    "out_proj.bias": "D",
}


class Piece(NamedTuple):
    """The rows of a parameter that go by one name.

    Attributes:
        parameter: the parameter, under its block or under the model.
        axes: the axes of these rows.
        rows: the first axis of each piece of the parameter, from the top.
        number: which of those pieces this is, counted from 0.
    """

    parameter: str
    axes: str
    rows: str
    number: int = 0


def _pieces_of_a_block() -> dict[str, Piece]:
    pieces = {name: Piece(parameter, AXES[name], AXES[name][0]) for parameter, name in RENAMED.items()}
    for parameter, names in SPLIT.items():
        rows = "".join(AXES[name][0] for name in names)
        pieces |= {name: Piece(parameter, AXES[name], rows, number) for number, name in enumerate(names)}
    return {name: pieces[name] for name in AXES}


OF_BLOCK = _pieces_of_a_block()
OF_MODEL = {
    "embedding.weight": Piece("embeddings.weight", "VD", "V"),
    "norm.weight": Piece("norm_f.weight", "D", "D"),
    "lm_head.weight": Piece("lm_head.weight", "VD", "V"),
}


class Owner:
    """The model or one of its blocks, in which a name is looked up.

    Attributes:
        model: the `MambaTrace`.
        layer: the layer of the block, or ``None`` for the model.
        place: what goes before a name in messages, ``"model.blocks[3]."``.
        pieces: the rows that each name stands for.
    """

    def __init__(self, model: Any, layer: int | None = None) -> None:
        model._follow()
        self.model, self.layer = model, layer
        self.place = "model." if layer is None else f"model.blocks[{layer}]."
        self.pieces = OF_MODEL if layer is None else OF_BLOCK

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter."""
        return axis_sizes(self.model._module) | {"1": 1}

    def shape(self, name: str) -> list[int]:
        """The shape that the configuration gives a name, whether the weights are there or not."""
        return [self.sizes[axis] for axis in self.pieces[name].axes]

    def envoy(self, name: str) -> Any:
        """The envoy of the module that holds a parameter."""
        inside = self.model if self.layer is None else self.model.layers[self.layer]
        return inside.get(self.pieces[name].parameter.rpartition(".")[0])

    def has(self, name: str) -> bool:
        """Whether this model has the parameter: biases are optional."""
        return name in self.pieces and self._parameter(name)[1] is not None

    def cut(self, name: str, whole: Tensor, dim: int = 0) -> Tensor:
        """The rows that go by this name: of a parameter, or along ``dim`` of what its module returns."""
        piece = self.pieces[name]
        heights = [self.sizes[axis] for axis in piece.rows]
        return whole.narrow(dim, sum(heights[: piece.number]), heights[piece.number])

    def rows(self, name: str) -> Tensor:
        """The rows of the parameter itself, through which gradients reach it. Raises `CheckpointError`."""
        return self.cut(name, self._checked(name))

    def view(self, name: str) -> Tensor:
        """The rows, detached: they share the parameter's memory, and their ``grad`` that of its gradient."""
        whole = self._checked(name)
        view = self.cut(name, whole.detach())
        if whole.grad is not None:
            view.grad = self.cut(name, whole.grad.detach())
        return view

    def assign(self, name: str, value: Any) -> None:
        """Copy ``value`` into the rows. Raises `SiteValueError` where it does not fit."""
        assign(f"{self.place}{name}", self.pieces[name].axes, self.view(name), value)

    def _parameter(self, name: str) -> tuple[Any, Any]:
        """The module that has the parameter, and the parameter, or what stands in their place."""
        module = self.envoy(name)._module
        return module, getattr(module, self.pieces[name].parameter.rpartition(".")[2], None)

    def _checked(self, name: str) -> Tensor:
        """The whole parameter. Raises `CheckpointError` if it holds no numbers that could be edited."""
        module, whole = self._parameter(name)
        where, piece = f"{self.place}{name}", self.pieces[name]
        expected = (sum(self.sizes[axis] for axis in piece.rows), *self.shape(name)[1:])
        if not isinstance(whole, Tensor):
            raise CheckpointError(
                f"{where}: a {type(module).__name__} stands where it is kept, and has no such parameter"
            )
        if not any(parameter is whole for parameter in module._parameters.values()):
            raise CheckpointError(
                f"{where} is not one parameter: a {type(module).__name__} stands where it is kept, and makes "
                f"it of others, such as a weight and an adapter's. Merge them to edit it (PEFT's "
                f"merge_and_unload()); {public_path(self.envoy(name).path)} runs with all of them"
            )
        if whole.is_meta and not self.model.dispatched:
            raise CheckpointError(f"{where} is not loaded yet. Call model.dispatch(), or load with dispatch=True")
        if whole.is_meta:
            raise CheckpointError(
                f"{where} is offloaded, and in memory only while its layer runs. To edit weights, load the "
                f"model without disk or CPU offload"
            )
        if tuple(whole.shape) != expected or not whole.is_floating_point() or whole.itemsize < 2:
            raise CheckpointError(
                f"{where} is quantised ({whole.dtype} of shape {list(whole.shape)}), so no rows of it can be "
                f"edited. Load the model without quantization_config"
            )
        return whole


def assign(where: str, axes: str, view: Tensor, value: Any) -> None:
    """Copy ``value`` into a view of a parameter, cast to its dtype and device.

    Args:
        where: the name of the view, for messages.
        axes: its axis letters.
        view: the view.
        value: what the user assigned.

    Raises:
        SiteValueError: if ``value`` is not a floating tensor of the view's shape. Nothing is written then.
    """
    shape = f"{list(view.shape)} ({' '.join(axes)})"
    if not isinstance(value, Tensor):
        raise SiteValueError(
            f"{where} takes a tensor of shape {shape}, not a {type(value).__name__}. To fill it with a "
            f"number, write {where}[:] = ..."
        )
    if value.shape != view.shape:
        raise SiteValueError(
            f"{where} takes shape {shape}, not {list(value.shape)}. To replace a part of it, assign to a "
            f"slice: {where}[...] = ..."
        )
    if not value.is_floating_point() or value.is_meta:
        kind = "on the meta device, which holds no numbers" if value.is_meta else f"of {value.dtype}"
        raise SiteValueError(f"{where} takes a floating tensor such as {view.dtype}, not one {kind}")
    view.copy_(value.detach())
