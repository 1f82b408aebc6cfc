"""Which rows of which parameter a name of MambaLens's stands for, and how they are read and written.

weight_formats.py converts whole state dicts; here a name is found in a living model, wherever its parameters
are, by the same table.

Contract: `Owner.view` shares the parameter's memory, device and dtype, and is detached. `assign` checks
before it writes. Weights that are not there to be edited (not loaded yet, offloaded, quantised, adapted)
raise `CheckpointError`.
"""

from __future__ import annotations

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
    """Rows of a parameter: the path of its module, its name there, the rows' axes, and those of all rows."""

    module: str
    name: str
    axes: str
    above: str = ""  # an axis for each piece further up
    below: str = ""


def _piece(parameter: str, axes: str, above: str = "", below: str = "") -> Piece:
    module, _, name = parameter.rpartition(".")
    return Piece(module, name, axes, above, below)


def _pieces_of_a_block() -> dict[str, Piece]:
    pieces = {name: _piece(parameter, AXES[name]) for parameter, name in RENAMED.items()}
    for parameter, names in SPLIT.items():
        rows = "".join(AXES[name][0] for name in names)
        for i, name in enumerate(names):
            pieces[name] = _piece(parameter, AXES[name], rows[:i], rows[i + 1 :])
    return {name: pieces[name] for name in AXES}


OF_BLOCK = _pieces_of_a_block()
OF_MODEL = {
    "embedding.weight": Piece("embeddings", "weight", "VD"),
    "norm.weight": Piece("norm_f", "weight", "D"),
    "lm_head.weight": Piece("lm_head", "weight", "VD"),
}


class Owner:
    """The model or one of its blocks: what a name is looked up in.

    Attributes:
        model: the `MambaTrace`.
        place: what goes before a name in messages, ``"model.blocks[3]."``.
        pieces: what the names stand for.
    """

    def __init__(self, model: Any, layer: int | None = None) -> None:
        model._follow()
        self.model, self.layer = model, layer
        self.place = "model." if layer is None else f"model.blocks[{layer}]."
        self.pieces = OF_MODEL if layer is None else OF_BLOCK

    def envoy(self, name: str) -> Any:
        """The envoy of the module that holds a parameter."""
        inside = self.model if self.layer is None else self.model.layers[self.layer]
        return inside.get(self.pieces[name].module)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter."""
        return axis_sizes(self.model.config) | {"K": self.model.config.conv_kernel, "1": 1}

    def shape(self, name: str) -> list[int]:
        """The shape that the configuration gives a name, whether the weights are there or not."""
        return [self.sizes[axis] for axis in self.pieces[name].axes]

    def has(self, name: str) -> bool:
        """Whether this model has the parameter: biases are optional."""
        piece = self.pieces.get(name)
        return piece is not None and getattr(self.envoy(name)._module, piece.name, None) is not None

    def rows(self, name: str) -> tuple[Tensor, slice]:
        """The parameter, and which of its rows go by this name.

        Raises:
            CheckpointError: if the parameter holds no numbers that could be edited.
        """
        piece, rows = self.pieces[name], self.span(name)
        module = self.envoy(name)._module
        whole: Any = getattr(module, piece.name, None)
        below = sum(self.sizes[axis] for axis in piece.below)
        self._check(name, module, whole, (rows.stop + below, *self.shape(name)[1:]))
        return whole, rows

    def span(self, name: str) -> slice:
        """Which rows of the parameter go by this name."""
        piece = self.pieces[name]
        start = sum(self.sizes[axis] for axis in piece.above)
        return slice(start, start + self.shape(name)[0])

    def _check(self, name: str, module: Any, whole: Any, expected: tuple[int, ...]) -> None:
        where = f"{self.place}{name}"
        if not isinstance(whole, Tensor):
            raise CheckpointError(
                f"{where}: a {type(module).__name__} stands where it is kept, and has no such parameter"
            )
        if module._parameters.get(self.pieces[name].name) is not whole:
            raise CheckpointError(
                f"{where} is not one parameter: a {type(module).__name__} stands where it is kept, and makes "
                f"it of others, such as a weight and an adapter's. Merge them to edit it (PEFT's "
                f"merge_and_unload()); {public_path(self.envoy(name).path)} runs with all of them"
            )
        if whole.is_meta and not self.model.dispatched:
            raise CheckpointError(
                f"{where} is not loaded yet. Call model.dispatch(), or load with dispatch=True"
            )
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

    def view(self, name: str) -> Tensor:
        """The rows, sharing the parameter's memory, and its gradient's where it has one."""
        whole, rows = self.rows(name)
        view = whole.detach()[rows]
        if whole.grad is not None:
            view.grad = whole.grad.detach()[rows]
        return view

    def assign(self, name: str, value: Any) -> None:
        """Copy ``value`` into the rows. Raises `SiteValueError` where it does not fit."""
        assign(f"{self.place}{name}", self.pieces[name].axes, self.view(name), value)


def assign(where: str, axes: str, view: Tensor, value: Any) -> None:
    """Copy ``value`` into a view, cast to its dtype and device.

    Args:
        where: what the view is called, for messages.
        axes: its axis letters.
        view: of a parameter.
        value: what the user assigned.

    Raises:
        SiteValueError: if ``value`` is no floating tensor of the view's shape. Nothing is written.
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
