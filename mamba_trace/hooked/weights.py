"""The weights of a model under MambaLens's names, as views: editing a view edits the model.

MambaLens keeps each half of in_proj and each part of x_proj as a matrix of its own; in the model they are
rows of one fused parameter, which is what runs. A view is those rows, so nothing is copied and nothing has to
be kept in step:

    model.blocks[3].W_B.weight[:] = 0          # rows R to R+N of layers[3].ssm.x_proj.weight
    model.blocks[3].W_B = torch.randn(N, E)    # copied into them
    model.blocks[3].A_log += 0.1

In Mamba-2 the same names are rows of in_proj alone, and conv1d is cut along its channels: `LensBlock` lists both.

Contract: which parameter and which rows a name stands for comes from the architecture's table, which converts
state dicts too (weight_pieces.py). A view shares the parameter's memory, device and dtype and is detached: it
can be edited without ``torch.no_grad()``, and its ``grad`` is the same rows of the parameter's gradient. Shapes
are checked before anything is written. Weights that cannot be edited (not loaded yet, offloaded, quantised, put
together from a weight and an adapter) raise `CheckpointError`; calling one still applies the whole module.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F

from ..errors import CheckpointError, UnknownSiteError
from ..names import lacked, layer_index, nearest, public_path
from ..sites import BY_HOOK
from ..tracing import is_itself
from .cfg import LensConfig
from .weight_pieces import ORDER, Owner, assign


class Weights(Tensor):
    """A weight and its bias, where MambaLens has a module: ``model.blocks[3].W_B``.

    ``weight`` and ``bias`` are views of the model's parameters (``bias`` is ``None`` where there is none),
    and can be assigned to. Calling it applies it. As a tensor it is ``weight``, which every operation on it
    is given in its place: ``W_B[0] = 0``, ``W_B.shape``, ``x @ W_B.T``, ``W_B *= 2``.

    Example::

        model = MambaTrace.demo()
        model.blocks[0].W_C.weight[:] = 0  # the state of layer 0 is no longer read
    """

    _owner: Owner
    _name: str

    @staticmethod
    def __new__(cls, owner: Owner, name: str) -> Weights:
        # The view itself, for what never asks `__torch_function__`, such as ``torch.tensor`` and ``vmap``. If no
        # view of numbers can be made, or there is no weight, the tensor is empty, so that it can still be printed
        # and called.
        view: Tensor | None = None
        if (weight := f"{name}.weight") in owner.pieces:
            with contextlib.suppress(CheckpointError):
                view = owner.view(weight)
        if view is None or isinstance(view, FakeTensor):  # the latter in `model.scan`
            with unset_fake_temporarily():
                view = torch.empty(0, device="meta")
        self = view.as_subclass(cls)
        self.__dict__.update(_owner=owner, _name=name)
        return self

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [*map(plain, value)] if isinstance(value, list) else tuple(map(plain, value))
            return value.weight if isinstance(value, cls) else value

        return function(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return Weights, (self._owner, self._name)

    def __deepcopy__(self, memo: Any) -> Weights:
        return Weights(copy.deepcopy(self._owner, memo), self._name)

    @property
    def weight(self) -> Tensor:
        """The weight, sharing memory with the model."""
        name = f"{self._name}.weight"
        if name not in self._owner.pieces:
            raise _weightless(self._owner, self._name)
        return self._owner.view(name)

    @property
    def bias(self) -> Tensor | None:
        """The bias, sharing memory with the model; ``None`` where the model has none."""
        name = f"{self._name}.bias"
        return self._owner.view(name) if self._owner.has(name) else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias") or not self._owner.has(f"{self._name}.{name}"):
            place = f"{self._owner.place}{self._name}"
            whole = place if self._owner.layer is not None else f"{place}.weight"
            hint = f": write {whole} = value, which copies it into the model" if name == "data" else ""
            raise UnknownSiteError(f"{place} has no {name!r} that could be assigned to{hint}")
        self._owner.assign(f"{self._name}.{name}", value)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to ``x``, as MambaLens's module of this name would; parameters get their gradients."""
        owner, name, bias = self._owner, f"{self._name}.weight", f"{self._name}.bias"
        if name not in owner.pieces:  # W_delta_2 of Mamba-2
            return x + owner.rows(bias)
        envoy = owner.envoy(name)
        if len(owner.pieces[name].rows) == 1:
            return envoy(x)
        if isinstance(envoy._module, nn.Conv1d):  # each channel by itself: [B,channels,L] -> [B,channels,L+K-1]
            weight = owner.rows(name)
            padding = weight.shape[-1] - 1
            added = owner.rows(bias) if owner.has(bias) else None
            return F.conv1d(x, weight, added, padding=padding, groups=weight.shape[0])
        if not is_itself(envoy._module, nn.Linear):  # adapted, quantised, hooked or offloaded
            return owner.cut(name, envoy(x), dim=-1)
        return F.linear(x, owner.rows(name), owner.rows(bias) if owner.has(bias) else None)

    def __getattr__(self, name: str) -> Any:
        # Python asks here where the property of that name has raised: weight, or what a tensor takes from it.
        if f"{self._name}.weight" not in self._owner.pieces:
            raise _weightless(self._owner, self._name)
        held = next(full for full in self._owner.pieces if full.startswith(f"{self._name}."))
        path = public_path(self._owner.envoy(held).path).removeprefix("model.")
        raise UnknownSiteError(
            f"{self._owner.place}{self._name} holds weights, and has no {name!r}. The values in a trace are "
            f"those of model.{path}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        names = [name for name in ("weight", "bias") if self._owner.has(f"{self._name}.{name}")]
        shapes = (f"{name} {self._owner.shape(f'{self._name}.{name}')}" for name in names)
        return f"{self._owner.place}{self._name}: {', '.join(shapes)}"


def _weightless(owner: Owner, name: str) -> UnknownSiteError:
    return UnknownSiteError(
        f"{owner.place}{name} has no weight in {owner.model.architecture.name}: it adds its bias, and nothing "
        f"else. Write {owner.place}{name}.bias"
    )


class LensBlock:
    """``model.blocks[l]``: the weights of one layer under MambaLens's names, as views.

    ==============  ==========================  ==========================================================
    name            shape                       rows of
    ==============  ==========================  ==========================================================
    ``norm``        weight [D]                  ``layers[l].norm``
    ``in_proj``     weight [E,D] (bias [E])     the upper half of ``ssm.in_proj``
    ``skip_proj``   weight [E,D] (bias [E])     the lower half of ``ssm.in_proj``
    ``conv1d``      weight [E,1,K] (bias [E])   ``ssm.conv1d``, K = d_conv
    ``W_delta_1``   weight [R,E]                ``ssm.x_proj``
    ``W_B``         weight [N,E]                ``ssm.x_proj``
    ``W_C``         weight [N,E]                ``ssm.x_proj``
    ``W_delta_2``   weight [E,R], bias [E]      ``ssm.dt_proj``
    ``A_log``       [E,N]                       ``ssm.A_log``
    ``W_D``         [E]                         ``ssm.D``
    ``out_proj``    weight [D,E] (bias [D])     ``ssm.out_proj``
    ==============  ==========================  ==========================================================

    and in Mamba-2, with H heads and G groups of N:

    ================  ===========================  =======================================================
    ``norm``          weight [D]                   ``layers[l].norm``
    ``skip_proj``     weight [E,D] (bias [E])      the first rows of ``ssm.in_proj``, then come those of
    ``in_proj``       weight [E,D] (bias [E])      ``ssm.in_proj``
    ``W_B``           weight [GN,D] (bias [GN])    ``ssm.in_proj``
    ``W_C``           weight [GN,D] (bias [GN])    ``ssm.in_proj``
    ``W_delta_1``     weight [H,D] (bias [H])      ``ssm.in_proj``
    ``conv1d``        weight [E,1,K] (bias [E])    ``ssm.conv1d``: of the channels of x
    ``B_conv1d``      weight [GN,1,K] (bias [GN])  ``ssm.conv1d``: of those of B
    ``C_conv1d``      weight [GN,1,K] (bias [GN])  ``ssm.conv1d``: of those of C
    ``W_delta_2``     bias [H], no weight          ``ssm.dt_bias``
    ``A_log``         [H]                          ``ssm.A_log``
    ``W_D``           [H]                          ``ssm.D``
    ``inner_norm``    weight [E]                   ``ssm.norm``
    ``out_proj``      weight [D,E] (bias [D])      ``ssm.out_proj``
    ================  ===========================  =======================================================

    A layer of a hybrid has the names of its SSM, as they are in Mamba-1 or Mamba-2, and of the norm before it; those of
    attention, MLPs and experts are in ``layers[l]._module``.

    Reading gives a tensor (``A_log``, ``W_D``) or a `Weights`; assigning copies into the parameter.

    Raises:
        UnknownSiteError: (an AttributeError) for any other name, naming the nearest.
        CheckpointError: if the weights are not loaded, offloaded, quantised or adapted.
        SiteValueError: if an assigned value has another shape, or is no floating tensor.

    Example::

        block = MambaTrace.demo().blocks[2]
        block.W_D *= 0.5
        block.W_delta_2.bias[:] = 0
    """

    __slots__ = ("_owner",)

    _owner: Owner

    def __init__(self, owner: Owner) -> None:
        object.__setattr__(self, "_owner", owner)

    def __reduce__(self) -> tuple:
        return LensBlock, (self._owner,)

    def __getattr__(self, name: str) -> Any:
        pieces = self._owner.pieces
        if name in pieces:
            return self._owner.view(name)
        if f"{name}.weight" in pieces or f"{name}.bias" in pieces:
            return Weights(self._owner, name)
        raise self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        pieces = self._owner.pieces
        full = name if name in pieces else f"{name}.weight"
        if f"{name}.bias" in pieces and full not in pieces:
            raise _weightless(self._owner, name)
        if full not in pieces:
            raise self._unknown(name)
        self._owner.assign(full, value)

    def named_weights(self) -> dict[str, Tensor]:
        """Every parameter of the block by MambaLens's name (``"W_B.weight"``), as views."""
        return {name: self._owner.view(name) for name in self._owner.pieces if self._owner.has(name)}

    def _unknown(self, name: str) -> UnknownSiteError:
        known = list(dict.fromkeys(full.split(".")[0] for full in self._owner.pieces))
        hint = lacked(f"{name}.") or nearest(name, known)
        if name in ORDER:
            hint = f": a {self._owner.model.architecture.name} has none"
            if (kind := self._owner.kind) is not None and kind.family is None:
                hint = f": what stands in this layer is {kind.name}. model.ssm_layers has the layers with an SSM"
        if name in BY_HOOK or name == "hook_h":
            hint = f": blocks holds weights. The hook is model.hook('blocks.{self._owner.layer}.{name}')"
        return UnknownSiteError(f"{self._owner.place.rstrip('.')} has no {name!r}{hint}. It has: {', '.join(known)}")

    def __dir__(self) -> list[str]:
        return sorted({full.split(".")[0] for full in self._owner.pieces})

    def __repr__(self) -> str:
        lines = (f"  {name}: {self._owner.shape(name)}" for name in self._owner.pieces if self._owner.has(name))
        return "\n".join([f"{self._owner.place.rstrip('.')}, views of the weights:", *lines])


class Blocks(Sequence[LensBlock]):
    """``model.blocks``: a sequence of one `LensBlock` for each layer."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __len__(self) -> int:
        return len(self._model.layers)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[layer] for layer in range(len(self))[key]]
        return LensBlock(Owner(self._model, layer_index(key, len(self), f"blocks[{key!r}]")))

    def __repr__(self) -> str:
        return f"{len(self)} blocks; model.blocks[0] lists the weights of one"


class LensViews:
    """``cfg`` and the weights as MambaLens names them; mixed into the model class."""

    @property
    def cfg(self) -> LensConfig:
        """The configuration under MambaLens's names: a read-only view. See `LensConfig`.

        Example::

            MambaTrace.demo().cfg.d_inner  # 128
        """
        return LensConfig(self)

    @property
    def blocks(self) -> Blocks:
        """The weights of each layer under MambaLens's names, as views that edit the model. See `LensBlock`.

        The places inside a trace are ``model.layers[l]``.

        Example::

            model = MambaTrace.demo()
            model.blocks[1].W_B.weight[:] = 0
        """
        return Blocks(self)

    @property
    def embedding(self) -> Weights:
        """MambaLens's ``embedding``: ``embedding.weight`` [V,D] is a view; calling it embeds tokens [B,L].

        Example::

            model = MambaTrace.demo()
            model.embedding(model.to_tokens("Emma gave"))  # [1,L,D]
        """
        return Weights(Owner(self), "embedding")

    @property
    def norm(self) -> Weights:
        """MambaLens's final ``norm``: ``norm.weight`` [D] views ``norm_f``'s; calling it applies it.

        Example::

            MambaTrace.demo().norm.weight *= 2
        """
        return Weights(Owner(self), "norm")

    @property
    def W_E(self) -> Tensor:
        """The embedding [V,D], a view: editing it edits the model, and `W_U` where the two are tied.

        Example::

            model = MambaTrace.demo()
            model.W_E[model.to_single_token(" Emma")] = 0
        """
        return Owner(self).view("embedding.weight")

    @W_E.setter
    def W_E(self, value: Any) -> None:
        assign("model.W_E", "VD", self.W_E, value)

    @property
    def W_U(self) -> Tensor:
        """The unembedding as TransformerLens lays it out, [D,V]: a view of ``lm_head.weight`` transposed.

        Example::

            model = MambaTrace.demo()
            model.W_U[:, model.to_single_token(" Emma")]  # [D]
        """
        return Owner(self).view("lm_head.weight").T

    @W_U.setter
    def W_U(self, value: Any) -> None:
        assign("model.W_U", "DV", self.W_U, value)
