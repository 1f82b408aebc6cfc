"""The activations of one run, found under any of their names.

`ActivationCache` is a mapping from hook names to tensors that also understands paths
(``cache["layers[3].ssm.h[5]"]``) and TransformerLens's shorthand (``cache["resid_post", -1]``), puts the
states of all positions together (``cache["h", 3]`` is [B,L,E,N]), and says of what it does not have whether
there is no such place or it was left out. Its analyses of the residual stream are in `residual`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import PromptError, UnknownSiteError
from ..names import Place
from ..sites import BY_HOOK, BY_NAME, STATE, Site
from .hooks import key_of
from .residual import ResidualAnalyses

#: What a cache adds to the name of a value for that of its gradient.
GRADIENT = "_grad"


class ActivationCache(ResidualAnalyses, Mapping[str, Tensor]):
    """Tensors by hook name, in execution order; `run_with_cache` returns one.

    A key is a hook name, a path, or a pair of a site and a layer: ``("resid_post", -1)``, ``("hook_h", 3)``;
    a site of the whole model goes by its name alone, ``"embed"``. The names of gradients end in ``"_grad"``.

    Args:
        values: tensors by hook name, or by path where there is no hook name.
        model: the model they are of.
        has_batch_dim: whether they have their batch axis.
        n_positions: the length of the prompt, if it is known, for negative positions.

    Example::

        logits, cache = model.run_with_cache("Emma and Shelby had fun")
        cache["blocks.1.hook_y"].shape  # [B,L,E]
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        n_positions: int | None = None,
    ) -> None:
        self.cache_dict = dict(values)
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.n_positions = n_positions

    # -- a mapping -------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        """The value of a key.

        Raises:
            UnknownSiteError: also a ``KeyError``; if there is no such place, or it is not in this cache.
        """
        found = self._names(key)
        if isinstance(found, str):
            return self.cache_dict[found]
        return torch.stack([self.cache_dict[name] for name in found], dim=-3)  # [B,L,E,N]

    def __contains__(self, key: object) -> bool:
        try:
            return bool(self._names(key))
        except UnknownSiteError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        batch = "" if self.has_batch_dim else ", without batch axis"
        shown = ", ".join(list(self.cache_dict)[:4])
        return f"ActivationCache of {len(self)} values{batch}: {shown}{', ...' if len(self) > 4 else ''}"

    # -- keys ------------------------------------------------------------------------------------------

    def _names(self, key: Any) -> str | list[str]:
        """The name of a key's value, or those of the states that make up a trajectory; they are there."""
        if isinstance(key, str) and key in self.cache_dict:
            return key
        place, suffix = self._place(key)
        if place.site is not None and place.site.name == STATE and place.position is None:
            return self._positions(place, suffix)
        name = key_of(place) + suffix
        if name not in self.cache_dict:
            raise self._left_out(key_of(place), place, suffix)
        return name

    def _place(self, key: Any) -> tuple[Place, str]:
        """The place of a key, positions and layers counted from the start, and the suffix of a gradient."""
        name, layer, position = parts_of(key)
        suffix = GRADIENT if name.endswith(GRADIENT) else ""
        name = name.removesuffix(GRADIENT)
        if layer is not None:
            place = self._of_layer(name, layer, position)
        else:
            site = shorthand(name, "model")
            place = names.parse(name) if site is None else Place(site)
        if place.position is not None and place.position < 0 and self.n_positions is not None:
            place = Place(place.site, place.layer, place.position + self.n_positions)
        return place, suffix

    def _of_layer(self, name: str, layer: int, position: int | None) -> Place:
        site = shorthand(name, "layer")
        if site is None or (position is not None and site.name != STATE):
            known = sorted(one.name for one in BY_NAME.values() if one.scope != "model")
            raise UnknownSiteError(
                f"no site {name!r} of a layer"
                + ("" if site is None else " has positions of its own")
                + (
                    names.lacked(f"hook_{name.removeprefix('hook_')}")
                    or names.nearest(name, known)
                    or f"; there are {', '.join(known)}"
                )
            )
        n_layers = len(self.model.layers)
        if not -n_layers <= layer < n_layers:
            raise UnknownSiteError(f"({name!r}, {layer}): this model has layers 0 to {n_layers - 1}")
        return Place(site, layer % n_layers, position)

    def _positions(self, place: Place, suffix: str) -> list[str]:
        """The names of the states of a layer. Raises `UnknownSiteError` unless every position is there."""
        length = self.n_positions
        prefix = f"{BY_NAME[STATE].hook_name(place.layer)}."
        there = [name for name in self.cache_dict if name.startswith(prefix)]
        if length is None:
            length = len({name.removesuffix(GRADIENT) for name in there})
        wanted = [f"{prefix}{position}{suffix}" for position in range(length)]
        missing = [name for name in wanted if name not in self.cache_dict]
        if missing or not wanted:
            raise UnknownSiteError(
                f"{place.path} is the states of all {length} positions, and this cache is without "
                f"{missing[0] if missing else 'any'}: names_filter={prefix[:-1]!r} keeps them all"
            )
        return wanted

    def _left_out(self, kept_as: str, place: Place, suffix: str) -> UnknownSiteError:
        name = kept_as + suffix
        n_layers = len(self.model.layers)
        if place.layer is not None and place.layer >= n_layers:
            return UnknownSiteError(f"{name!r}: this model has layers 0 to {n_layers - 1}")
        length = self.n_positions
        if place.position is not None and length is not None and not 0 <= place.position < length:
            return UnknownSiteError(f"{name!r}: the prompt of this run has {length} positions")
        if place.site is None or not place.site.in_mamba_lens:
            gradient = ", with incl_bwd=True" if suffix else ""
            return UnknownSiteError(
                f"{name!r} is not in this cache: MambaLens has no hook there, and by default only its hook "
                f"names are kept. names_filter={kept_as!r} keeps it{gradient}, and "
                f"names_filter=[lambda name: True, {kept_as!r}] all the others as well"
            )
        return UnknownSiteError(
            f"{name!r} is not in this cache: names_filter left it out, or the run did not come to it "
            f"(stop_at_layer, start_at_layer, only_use_these_layers)"
            + (names.nearest(name, list(self.cache_dict)) or f". It has {len(self)} values")
        )

    # -- what TransformerLens's has --------------------------------------------------------------------

    def to(self, device: Any, move_model: bool = False) -> ActivationCache:
        """Move every value to a device, in this cache itself, and the model as well if asked to.

        Returns:
            This cache.

        Example::

            cache.to("cpu")
        """
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        if move_model:
            self.model.to(device)
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Take the batch axis off every value that has one, in this cache itself.

        Returns:
            This cache.

        Raises:
            PromptError: if it is of more than one prompt.

        Example::

            cache.remove_batch_dim()["blocks.1.hook_y"]  # [L,E]
        """
        if not self.has_batch_dim:
            return self
        batched = {name: value for name, value in self.cache_dict.items() if has_rows(name)}
        sizes = {value.shape[0] for value in batched.values()}
        if sizes - {1}:
            raise PromptError(
                f"the batch axis of {max(sizes)} prompts cannot be removed: index it, cache[name][row]"
            )
        self.cache_dict.update({name: value[0] for name, value in batched.items()})
        self.has_batch_dim = False
        return self

    def stack_activation(self, activation_name: str, layer: int | None = -1) -> Tensor:
        """A site of every layer, stacked.

        Args:
            activation_name: a site of the layers, e.g. ``"resid_post"``, ``"h"`` or ``"hook_y"``.
            layer: stack the layers before this one; -1 or ``None`` for all.

        Returns:
            [n_layers, ...], e.g. [n_layers,B,L,D].

        Raises:
            UnknownSiteError: if one of them is not in this cache.

        Example::

            cache.stack_activation("h")  # [n_layers,B,L,E,N]
        """
        n_layers = len(self.model.layers)
        last = n_layers if layer in (None, -1) else layer
        if not 0 < last <= n_layers:
            raise UnknownSiteError(f"layer={layer}: this model has 1 to {n_layers} layers to stack")
        values = [self[activation_name, one] for one in range(last)]
        return torch.stack([value.to(values[-1].device) for value in values])  # layers may be on several


def shorthand(name: str, scope: str) -> Site | None:
    """The site of a short name: its own, or its hook's with or without ``hook_``.

    >>> shorthand("embed", "model").name, shorthand("norm", "layer").name, shorthand("norm", "model").name
    ('embeddings', 'norm', 'norm_f')
    """
    for site in (BY_NAME.get(name), BY_HOOK.get(name), BY_HOOK.get(f"hook_{name}")):
        if site is not None and (site.scope == "model") == (scope == "model"):
            return site
    return None


def parts_of(key: Any) -> tuple[str, int | None, int | None]:
    """The name, layer and position of a key. Raises `UnknownSiteError`."""
    match key:
        case str(name):
            return name, None, None
        case (str(name), int(layer)):
            return name, layer, None
        case (str(name), int(layer), int(position)):
            return name, layer, position
    raise UnknownSiteError(
        f"a key is a hook name, a path, or a site, its layer and, of h, a position, such as ('h', 3) or "
        f"('h', 3, 5), not {key!r}"
    )


def has_rows(name: str) -> bool:
    """Whether the value of a name has a batch axis; A has none."""
    site = names.parse(name.removesuffix(GRADIENT)).site
    return site is None or site.axes.startswith("B")
