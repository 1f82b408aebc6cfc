"""The activations of one run, which can be looked up under any of their names.

`ActivationCache` is a mapping from hook names to tensors that also understands paths
(``cache["layers[3].ssm.h[5]"]``) and TransformerLens's shorthand (``cache["resid_post", -1]``). It stacks the
states of all positions (``cache["h", 3]`` is [B,L,E,N], in Mamba-2 [B,L,H,P,N]). For a missing value the error
says whether there is no such place or whether the run left it out. The analyses of the residual stream are in
`residual`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..arguments.selection import layers_with
from ..errors import LayerError, PromptError, UnknownSiteError
from ..names import Place, layer_index
from ..sites import BY_HOOK, BY_NAME, SITES, STATE, Site
from .hooks import key_of
from .residual import ResidualAnalyses

#: The suffix that makes the name of a gradient from the name of its value.
GRADIENT = "_grad"


class ActivationCache(ResidualAnalyses):
    """Tensors by hook name, in execution order; `run_with_cache` returns one.

    A key is a hook name, a path, or a pair of a site and a layer: ``("resid_post", -1)``, ``("hook_h", 3)``;
    a site of the whole model has its name alone as key, ``"embed"``. Names of gradients end in ``"_grad"``.

    Args:
        values: tensors by hook name, or by path where there is no hook name.
        model: the model that ran.
        has_batch_dim: whether the values have their batch axis.
        n_positions: the length of the prompt, if it is known, from which negative positions are counted.

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
            LayerError: also a ``KeyError``; if the model has no such layer.
        """
        kept_as = self._names(key)
        if isinstance(kept_as, str):
            return self.cache_dict[kept_as]
        states = [self.cache_dict[name] for name in kept_as]  # [B,E,N], in Mamba-2 [B,H,P,N], or without B
        return torch.stack(states, dim=int(self.has_batch_dim))

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
        """The name of a key's value, or the names of the states that make up a trajectory; all are here."""
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
        site, family = shorthand(name, "model" if layer is None else "layer"), self.model.architecture.family
        if layer is None:
            place = names.parse(name, family, self.model._layout.hybrid) if site is None else Place(site)
        elif site is None or (position is not None and site.name != STATE):
            layout = self.model._layout
            known = sorted(site.name for site in SITES if site.scope != "model" and layout.has(site))
            hint = names.lacked(f"hook_{name.removeprefix('hook_')}") or names.nearest(name, known)
            positions = "" if site is None else " has positions of its own"
            hint = hint or f"; there are {', '.join(known)}"
            raise UnknownSiteError(f"no site {name!r} of a layer{positions}{hint}")
        else:
            place = Place(site, layer, position)
        if place.layer is not None:
            place = replace(place, layer=layer_index(place.layer, len(self.model.layers), repr(key)))
        names.check_family(place, family, str(key) if layer is None else name)
        place = names.in_layout(place, self.model._layout, name)
        if place.position is not None and place.position < 0 and self.n_positions is not None:
            place = replace(place, position=place.position + self.n_positions)
        return place, suffix

    def _positions(self, place: Place, suffix: str) -> list[str]:
        """The names of the states of a layer. Raises `UnknownSiteError` unless every position is there."""
        length = self.n_positions
        prefix = f"{BY_NAME[STATE].hook_name(place.layer)}."
        there = [name for name in self.cache_dict if name.startswith(prefix)]
        if length is None:
            length = len({name.removesuffix(GRADIENT) for name in there})
        states = [f"{prefix}{position}{suffix}" for position in range(length)]
        missing = [name for name in states if name not in self.cache_dict]
        if missing or not states:
            raise UnknownSiteError(
                f"{place.path} is the states of all {length} positions, and this cache is without "
                f"{missing[0] if missing else 'any'}: names_filter={prefix[:-1]!r} keeps them all"
            )
        return states

    def _left_out(self, kept_as: str, place: Place, suffix: str) -> UnknownSiteError:
        name = kept_as + suffix
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
            PromptError: if the cache holds more than one prompt.

        Example::

            cache.remove_batch_dim()["blocks.1.hook_y"]  # [L,E]
        """
        if not self.has_batch_dim:
            return self
        batched = {name: value for name, value in self.cache_dict.items() if has_rows(name)}
        sizes = {value.shape[0] for value in batched.values()}
        if sizes - {1}:
            raise PromptError(f"the batch axis of {max(sizes)} prompts cannot be removed: index it, cache[name][row]")
        self.cache_dict.update({name: value[0] for name, value in batched.items()})
        self.has_batch_dim = False
        return self

    def stack_activation(self, activation_name: str, layer: int | None = -1) -> Tensor:
        """A site of every layer that has it, stacked.

        Args:
            activation_name: a site of the layers, e.g. ``"resid_post"``, ``"h"`` or ``"hook_y"``.
            layer: stack the layers before this one; -1 or ``None`` stacks all.

        Returns:
            [n_layers, ...], e.g. [n_layers,B,L,D]. In a hybrid row i is of the i-th layer that has the site: for a
            site of the SSM ``model.ssm_layers[i]``, of attention ``model.attention_layers[i]``.

        Raises:
            UnknownSiteError: if no layer before this one has the site, saying which layers have it; or if the value
                of one of those that do is not in this cache.
            LayerError: if there is no such layer.

        Example::

            cache.stack_activation("h")  # [n_layers,B,L,E,N], in Mamba-2 [n_layers,B,L,H,P,N]
        """
        stop = self._layer(layer)
        if not stop:
            raise LayerError("layer=0: there are no layers before layer 0 to stack")
        if not isinstance(activation_name, str):
            raise UnknownSiteError(
                f"stack_activation takes the name of a site, 'h' or 'hook_y', not {activation_name!r}"
            )
        site = shorthand(activation_name.removesuffix(GRADIENT), "layer")
        numbers = range(stop) if site is None else layers_with(self.model._layout, site)
        # Where no layer has it, the first says why.
        values = [self[activation_name, number] for number in numbers if number < stop] or [self[activation_name, 0]]
        return torch.stack([value.to(values[-1].device) for value in values])  # layers may be on several


def shorthand(name: str, scope: str) -> Site | None:
    """The site of a short name: its own name, or its hook's name with or without ``hook_``.

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
