"""Which rows of which parameter a name of MambaLens's stands for, and how they are read and written.

weight_formats.py converts whole state dicts; here a name is found in a loaded model, wherever its parameters
are, by the same table, which the architecture has. Mamba-2, which MambaLens does not have, has names in its style:
what is a matrix of its own in Mamba-1 is rows of in_proj there.

Contract: `Owner.view` shares the parameter's memory, device and dtype, and is detached. `assign` checks
before it writes. Weights that cannot be edited (not loaded yet, offloaded, quantised, adapted) raise
`CheckpointError`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError, SiteValueError
from ..modeling.architectures import BY_TYPE, axis_sizes
from ..modeling.architectures.architecture import size_of
from ..names import public_path
from ..sites import Kind

#: The names of a block's weights, in the order in which they are listed.
ORDER = (
    "norm", "skip_proj", "in_proj", "conv1d", "B_conv1d", "C_conv1d", "W_delta_1", "W_B", "W_C", "W_delta_2",
    "A_log", "W_D", "inner_norm", "out_proj",
)  # fmt: skip


class Piece(NamedTuple):
    """The rows of a parameter that go by one name.

    Attributes:
        parameter: the parameter, under its block or under the model.
        axes: the axes of these rows; an axis ``"GN"`` has G times N numbers.
        rows: the first axis of each piece of the parameter, from the top.
        number: which of those pieces this is, counted from 0.
    """

    parameter: str
    axes: tuple[str, ...]
    rows: tuple[str, ...]
    number: int = 0


@functools.cache
def pieces_of_block(model_type: str) -> dict[str, Piece]:
    """The rows that each name stands for in a block of this architecture."""
    pieces = {
        name: Piece(path, (parameter.rows[number], *parameter.others), parameter.rows, number)
        for path, parameter in BY_TYPE[model_type].parameters.items()
        for number, name in enumerate(parameter.pieces)
    }
    # The weight before the bias.
    return dict(sorted(pieces.items(), key=lambda item: (ORDER.index(item[0].split(".")[0]), item[0].endswith("bias"))))


#: Whose names the mixers of a family have in a hybrid.
NAMED_AS = {"selective": "mamba", "dual": "mamba2"}


def pieces_of_layer(model: Any, layer: int) -> dict[str, Piece]:
    """The rows that each name stands for in a layer of a model.

    In a hybrid's they are those of a Mamba of the same family, if its mixer is laid out as that one's: a Zamba's is
    not. A layer without an SSM has its norm alone.
    """
    architecture = model.architecture
    if not architecture.hybrid:
        return pieces_of_block(architecture.model_type)
    block, sizes = model.layers[layer]._module, axis_sizes(model._module) | {"1": 1}
    named_as = NAMED_AS[architecture.family]
    ssm, laid_out = block.part("ssm"), BY_TYPE[named_as].parameters["mixer.A_log"]
    there = ["norm"] if block.part("norm") is not None else []
    if ssm is not None and tuple(ssm.A_log.shape) == laid_out.shape(sizes):
        there.append("mixer")
    return {
        name: piece._replace(parameter=re.sub("^mixer", "ssm", piece.parameter))
        for name, piece in pieces_of_block(named_as).items()
        if piece.parameter.partition(".")[0] in there
    }


OF_MODEL = {
    "embedding.weight": Piece("embeddings.weight", ("V", "D"), ("V",)),
    "norm.weight": Piece("norm_f.weight", ("D",), ("D",)),
    "lm_head.weight": Piece("lm_head.weight", ("V", "D"), ("V",)),
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
        self.pieces = OF_MODEL if layer is None else pieces_of_layer(model, layer)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter."""
        return axis_sizes(self.model._module) | {"1": 1}

    @property
    def kind(self) -> Kind | None:
        """What stands in the layer; ``None`` for the model."""
        return None if self.layer is None else self.model._layout.layers[self.layer]

    def shape(self, name: str) -> list[int]:
        """The shape that the configuration gives a name, whether the weights are there or not."""
        return [size_of(axis, self.sizes) for axis in self.pieces[name].axes]

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
        heights = [size_of(axis, self.sizes) for axis in piece.rows]
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
        expected = (sum(size_of(axis, self.sizes) for axis in piece.rows), *self.shape(name)[1:])
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


def assign(where: str, axes: Sequence[str], view: Tensor, value: Any) -> None:
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
