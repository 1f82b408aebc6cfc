"""The weights of a model under MambaLens's names, as views: editing a view edits the model.

MambaLens keeps each half of in_proj and each part of x_proj as a matrix of its own; in the model they are
rows of one fused parameter, which is what runs. A view is those rows, so nothing is copied and nothing has to
be kept in step:

    model.blocks[3].W_B.weight[:] = 0          # rows R to R+N of layers[3].ssm.x_proj.weight
    model.blocks[3].W_B = torch.randn(N, E)    # copied into them
    model.blocks[3].A_log += 0.1

Contract: which parameter and which rows a name stands for comes from the table that converts state dicts
(weight_pieces.py). A view shares the parameter's memory, device and dtype and is detached: it can be edited
without ``torch.no_grad()``, and its ``grad`` is those rows of the parameter's. Shapes are checked before
anything is written. Weights that are not there to be edited (not loaded yet, offloaded, quantised, made of a
weight and an adapter) raise `CheckpointError`; calling one applies all that the module does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LayerError, UnknownSiteError
from ..names import lacked, nearest, public_path
from ..sites import BY_HOOK
from ..tracing import is_itself
from .cfg import LensConfig
from .weight_pieces import OF_BLOCK, Owner, assign


class Weights:
    """A weight and its bias, where MambaLens has a module: ``model.blocks[3].W_B``.

    ``weight`` and ``bias`` are views of the model's parameters (``bias`` is ``None`` where there is none),
    and can be assigned to. Calling it applies it. Wherever a tensor is expected it stands for ``weight``:
    ``W_B[0] = 0``, ``W_B.shape``, ``x @ W_B.T``, ``W_B *= 2``.

    Example::

        model = MambaTrace.demo()
        model.blocks[0].W_C.weight[:] = 0  # the state of layer 0 is no longer read
    """

    __slots__ = ("_name", "_owner")

    _owner: Owner
    _name: str

    def __init__(self, owner: Owner, name: str) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_name", name)

    def __reduce__(self) -> tuple:
        return Weights, (self._owner, self._name)

    @property
    def weight(self) -> Tensor:
        """The weight, sharing memory with the model."""
        return self._owner.view(f"{self._name}.weight")

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
        value = value.weight if isinstance(value, Weights) else value
        self._owner.assign(f"{self._name}.{name}", value)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to ``x``, as MambaLens's module of this name would; parameters get their gradients."""
        name = f"{self._name}.weight"
        piece = self._owner.pieces[name]
        if not (piece.above or piece.below):
            return self._owner.envoy(name)(x)
        envoy = self._owner.envoy(name)
        if not is_itself(envoy._module, nn.Linear):  # adapted, quantised, hooked or offloaded
            return envoy(x)[..., self._owner.span(name)]
        whole, rows = self._owner.rows(name)
        name = f"{self._name}.bias"
        bias = self._owner.rows(name)[0][rows] if self._owner.has(name) else None
        return F.linear(x, whole[rows], bias)

    def __getitem__(self, key: Any) -> Tensor:
        return self.weight[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.weight[key] = value

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(self.weight, name)
        except AttributeError as error:
            path = public_path(self._owner.envoy(f"{self._name}.weight").path).removeprefix("model.")
            raise UnknownSiteError(
                f"{self._owner.place}{self._name} holds weights, and has no {name!r}. The values in a trace "
                f"are those of model.{path}"
            ) from error

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(plain, value))
            return value.weight if isinstance(value, cls) else value

        return function(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __repr__(self) -> str:
        names = [name for name in ("weight", "bias") if self._owner.has(f"{self._name}.{name}")]
        shapes = (f"{name} {self._owner.shape(f'{self._name}.{name}')}" for name in names)
        return f"{self._owner.place}{self._name}: {', '.join(shapes)}"


def _operator(name: str) -> Callable:
    def apply(self: Weights, *others: Any) -> Any:
        return getattr(self.weight, name)(*others)

    apply.__name__ = name
    return apply


ARITHMETIC = "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv matmul rmatmul pow neg abs"
for _name in f"{ARITHMETIC} eq ne lt le gt ge".split():
    setattr(Weights, f"__{_name}__", _operator(f"__{_name}__"))


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
        if name in OF_BLOCK:
            return self._owner.view(name)
        if f"{name}.weight" in OF_BLOCK:
            return Weights(self._owner, name)
        raise self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        full = name if name in OF_BLOCK else f"{name}.weight"
        if full not in OF_BLOCK:
            raise self._unknown(name)
        self._owner.assign(full, value.weight if isinstance(value, Weights) else value)

    def named_weights(self) -> dict[str, Tensor]:
        """Every parameter of the block by MambaLens's name (``"W_B.weight"``), as views."""
        return {name: self._owner.view(name) for name in OF_BLOCK if self._owner.has(name)}

    def _unknown(self, name: str) -> UnknownSiteError:
        known = list(dict.fromkeys(full.split(".")[0] for full in OF_BLOCK))
        hint = lacked(f"{name}.") or nearest(name, known)
        if name in BY_HOOK or name == "hook_h":
            hint = f": blocks holds weights. The hook is model.hook('blocks.{self._owner.layer}.{name}')"
        return UnknownSiteError(
            f"{self._owner.place.rstrip('.')} has no {name!r}{hint}. It has: {', '.join(known)}"
        )

    def __dir__(self) -> list[str]:
        return sorted({full.split(".")[0] for full in OF_BLOCK})

    def __repr__(self) -> str:
        lines = (f"  {name}: {self._owner.shape(name)}" for name in OF_BLOCK if self._owner.has(name))
        return "\n".join([f"{self._owner.place.rstrip('.')}, views of the weights:", *lines])


class Blocks:
    """``model.blocks``: a sequence of one `LensBlock` for each layer."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __len__(self) -> int:
        return len(self._model.layers)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[layer] for layer in range(len(self))[key]]
        if not -len(self) <= key < len(self):
            raise LayerError(f"blocks[{key}]: this model has layers 0 to {len(self) - 1}")
        return LensBlock(Owner(self._model, key % len(self)))

    def __iter__(self) -> Iterator[LensBlock]:
        return (self[layer] for layer in range(len(self)))

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
