"""Which rows of a value belong to which invoke of a batch.

nnsight counts the rows that each invoke brings. Two kinds of value have other rows. Beam search and
``num_return_sequences`` make several rows of each prompt (`ExpandedRows`). And A, of shape [E,N], has no rows
at all, so an edit by one invoke would reach all of them: every invoke gets a copy of its own, and if the
copies differ, the run continues with a value that has a batch axis (`PerInvoke`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nnsight.intervention.batching import Batcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import ModelOutput


class ExpandedRows(Batcher):
    """nnsight's batcher, which also knows how many rows generation makes of each prompt.

    The model runs on ``expansion`` rows of each prompt, one after the other, and returns ``returned`` of
    them. Both are read from the arguments of the call before the model runs, and each invoke's group of rows
    grows with them.
    """

    def __init__(self, envoy: Any, kwargs: dict | None = None) -> None:
        super().__init__(envoy, kwargs)
        self.groups: list[list[int]] = []
        self.expansion = self.returned = 1

    def add(self, *inputs: Any, **kwargs: Any) -> list[int] | None:
        """Add the inputs of an invoke; the group of rows that is returned changes when rows are expanded."""
        group = super().add(*inputs, **kwargs)
        if group is not None:
            self.groups.append(group)
        return group

    def assemble(self, fn: Any) -> tuple:
        """The arguments of the call; from here on, rows are the rows that the model runs on.

        Raises:
            PromptError: for an argument that the call does not have.
        """
        for inputs, kwargs in (*self.invokes, ((), self.extra_kwargs)):
            self.envoy._check_arguments(fn, inputs, kwargs)
        args, kwargs = super().assemble(fn)
        self.expansion, self.returned = rows_of_a_prompt(self.envoy, fn, kwargs)
        self.total *= self.expansion
        for group in self.groups:
            group[:] = [count * self.expansion for count in group]
        return args, kwargs

    # nnsight copies an output of transformers before it fills it in; an output class that needs a field
    # refuses that.

    def narrow(self, value: Any, group: list[int] | None) -> Any:
        """The rows of an invoke of every tensor in ``value``."""
        if not isinstance(value, ModelOutput) or not self.batching or group is None:
            return super().narrow(value, group)
        return type(value)(**{name: self.narrow(part, group) for name, part in value.items()})

    def widen(self, full: Any, group: list[int] | None, edited: Any) -> Any:
        """``full`` with the rows of an invoke as the invoke edited them."""
        if not isinstance(full, ModelOutput) or not self.batching or group is None:
            return super().widen(full, group, edited)
        return type(full)(**{name: self.widen(part, group, edited[name]) for name, part in full.items()})

    def _narrow_tensor(self, tensor: Tensor, group: list[int]) -> Tensor:
        if not tensor.dim():
            return tensor
        rows = self._returned_rows(tensor, group)
        return super()._narrow_tensor(tensor, group) if rows is None else tensor.narrow(0, *rows)

    def _widen_tensor(self, full: Tensor, group: list[int], edited: Tensor) -> Tensor:
        rows = self._returned_rows(full, group) if full.dim() else None
        if rows is None:
            return super()._widen_tensor(full, group, edited) if full.dim() else edited
        first, size = rows
        return torch.cat([full[:first], edited, full[first + size :]])

    def _returned_rows(self, tensor: Tensor, group: list[int]) -> tuple[int, int] | None:
        # The rows of an invoke, if the tensor has other rows than the model ran on: those that are returned.
        if self.returned == self.expansion or len(tensor) != self.total // self.expansion * self.returned:
            return None
        first, size = (count // self.expansion * self.returned for count in group)
        return first, size


def rows_of_a_prompt(model: Any, fn: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows a call makes of each prompt, and how many of them it returns.

    Args:
        model: the envoy of the model.
        fn: what is called.
        kwargs: its arguments.
    """
    name = getattr(fn, "__name__", None)
    if name not in ("generate", "pipe"):
        return 1, 1
    configs = [kwargs.get("generation_config")]
    if name == "pipe":
        configs.append(getattr(model.pipeline, "generation_config", None))
    configs.append(getattr(model._module, "generation_config", None))

    def setting(argument: str) -> int:
        # As transformers looks for it: the argument, or else the first configuration that has it.
        values = [kwargs.get(argument), *(getattr(config, argument, None) for config in configs)]
        return next((int(value) for value in values if value is not None), 1)

    returned = setting("num_return_sequences")
    return max(setting("num_beams"), returned), returned


class PerInvoke:
    """Stands in for nnsight's batcher while a value without rows is served.

    Args:
        value: the value, the same for every invoke.
        interleaver: the running interleaver, whose workers know which rows belong to which invoke.
    """

    batching = True

    def __init__(self, value: Tensor, interleaver: Any) -> None:
        self.shared = value
        groups = (mediator.batch_group for mediator in interleaver.mediators)
        self.groups = sorted({tuple(group) for group in groups if group is not None})
        self.own: dict[int, Tensor] = {}

    def narrow(self, value: Any, group: list[int] | None) -> Any:
        """The copy of the invoke with rows ``group``; a worker on the whole batch sees the shared value."""
        if not isinstance(value, Tensor):
            return value
        if group is None:
            return self.shared
        if group[0] not in self.own:
            self.own[group[0]] = self.shared.clone()
        return self.own[group[0]]

    def widen(self, value: Any, group: list[int] | None, edited: Any) -> Any:
        """Keep what an invoke assigned as its own."""
        if group is None:
            self.shared = edited
        else:
            self.own[group[0]] = edited
        return value

    def gather_skip(self, value: Any, group: list[int] | None, replacement: Any) -> Any:
        """Keep the replacement of a skipped site as the invoke's own; the module's output is the shared value."""
        self.widen(value, group, replacement)
        return self.shared

    def assemble_skip(self, value: Any) -> Any:
        """Nothing was gathered."""
        return value

    def merged(self) -> Tensor:
        """The value with which the run continues: the shared one, or [B,...] if an invoke edited its copy."""
        if not self.edited:
            return self.shared
        rows = [self.own[start] if self._edited(start) else self.shared for start, _ in self.groups]
        sizes = [size for _, size in self.groups]
        return torch.cat([row.expand(size, *row.shape) for row, size in zip(rows, sizes, strict=True)])

    @property
    def edited(self) -> bool:
        """Whether an invoke has edited its copy."""
        return any(self._edited(start) for start, _ in self.groups)

    def _edited(self, start: int) -> bool:
        own = self.own.get(start)
        if own is None:
            return False
        return isinstance(own, FakeTensor) or own.requires_grad or not torch.equal(own, self.shared)
