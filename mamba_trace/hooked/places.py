"""What stands in each layer of a model, and its places by any of their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .. import names
from ..modeling.architectures import Architecture, architecture_of, layout_of
from ..sites import BY_NAME, PUBLIC_PART, Layout


class Places:
    """Mixed into the model class."""

    _module: nn.Module
    layers: Any

    @property
    def architecture(self) -> Architecture:
        """Which architecture this is: its ``name``, and the ``family`` that decides which sites it has.

        Example::

            model.architecture.name  # "Mamba-1"
        """
        return architecture_of(self._module)

    @property
    def ssm_layers(self) -> list[int]:
        """The numbers of the layers that have an SSM: in a Mamba all, in a hybrid some, all or none.

        Example::

            with model.trace("Emma gave an apple to"):
                for layer in model.ssm_layers:
                    model.layers[layer].ssm.y.output[:, -1] = 0
        """
        return self._layout.with_site(BY_NAME["h"])

    @property
    def attention_layers(self) -> list[int]:
        """The numbers of the layers that have attention: in a Mamba none.

        Example::

            model.attention_layers  # []
        """
        return self._layout.with_site(BY_NAME["z"])

    @property
    def layer_kinds(self) -> list[str]:
        """What stands in each layer: ``"SSM"``, ``"attention"``, ``"MLP"``, ``"MoE"``, ``"SSM and attention"`` ...

        Example::

            model.layer_kinds[0]  # "SSM"
        """
        return [kind.name for kind in self._layout.layers]

    @property
    def _layout(self) -> Layout:
        return layout_of(self._module)

    def hook(self, name: str) -> Any:
        """The place with a given hook name or path, e.g. ``model.hook("blocks.3.hook_h.5").output``.

        Args:
            name: a path, MambaLens's hook name, or TransformerLens 4's if it means the same place.

        Raises:
            UnknownSiteError: if no place of this model has that name.
            LayerError: if the model has no such layer.

        Example::

            with model.trace("Emma gave an apple to"):
                state = model.hook("blocks.1.hook_h.2").output.save()  # [B,E,N]
        """
        return self._envoy(self._place(name))

    def _envoy(self, place: names.Place) -> Any:
        """The place itself, of a model that has it."""
        if place.site is None:
            return getattr(self.layers[place.layer].ssm, str(place.native))
        part = PUBLIC_PART.get(place.site.scope)
        holder = self if place.layer is None else self.layers[place.layer]
        envoy = getattr(holder if part is None else getattr(holder, part), place.site.name)
        return envoy if place.position is None else envoy[place.position]

    def _place(self, name: str) -> names.Place:
        """The place of this model that a name means. Raises as `hook`."""
        place = names.parse(name, self.architecture.family, self._layout.hybrid)
        if place.layer is not None:
            place = replace(place, layer=names.layer_index(place.layer, len(self.layers), repr(name)))
        return names.in_layout(place, self._layout, name)

    def hook_names(self, n_positions: int) -> list[str]:
        """Every MambaLens hook name for a prompt of ``n_positions`` tokens, in execution order.

        Example::

            model.hook_names(n_positions=5)[0]  # "hook_embed"
        """
        return names.hook_names(self._layout, n_positions)
