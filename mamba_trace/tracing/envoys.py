"""The envoys: what ``model.layers[3].ssm.h[5]`` is, and what reading and assigning there does.

nnsight mirrors every module with an `Envoy`. The envoys of this package add three things: a request for a
site that the run has already gone past fails at the user's line, an assigned value is checked against the
value it replaces (and cast where that is harmless), and a later in-place edit never changes a saved value.
`StateEnvoy` is the site with a place for each position; ``h[p]`` is a `PositionEnvoy`. `SkipEnvoy` makes
``ssm.skip`` both the gate site and the method of the mixer which that site hides.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator
from typing import Any

from nnsight.intervention.envoy import Envoy
from torch import nn

from ..errors import LayerError, PositionError, SiteValueError, UnknownSiteError
from ..names import NATIVE_MODULES, layer_index, parse, public_path
from ..names.layouts import SAME_AS, absent, part_of
from ..names.modules import BASES, OF_BASE, OF_LAYER, SCOPE_OF
from ..sites import BY_MODULE, BY_NAME, SITES, STATE, Site, in_scope
from .attributes import Guarded, NotAValue, no_such_value, not_a_value
from .fitting import skip
from .located import FirstOfTuple, Located, Part
from .worker import expect_position, length_of_call


def absent_attribute(name: str) -> property:
    """An attribute of every `Envoy` that some envoy lacks, as no module is called at its place."""

    def refuse(self: Guarded, *values: Any) -> Any:
        raise self._lacks(name)

    return property(refuse, refuse)


class SiteEnvoy(NotAValue, Located):
    """The envoy of a site."""

    @property
    def site(self) -> Site:
        """The row of the site table."""
        known: Any = getattr(self._module, "site", None) or parse(public_path(self.path)).site
        return known

    @property
    def _axes(self) -> str:  # type: ignore[override]
        return getattr(self._module, "axes", self.site.axes)

    def __getattr__(self, name: str) -> Any:
        if name == "shape":  # the module has an attribute of this name: the sizes of the axes in words
            raise no_such_value(self, name)
        return super().__getattr__(name)


class StateEnvoy(SiteEnvoy):
    """The site with positions: ``h`` is the whole trajectory, ``h[p]`` the state carried after token p."""

    names_below = True  # its positions

    def __getitem__(self, position: Any) -> PositionEnvoy:
        """The place of the state after token ``position`` of this forward call; negative counts from the end.

        Args:
            position: an integer.

        Example::

            with model.trace(prompt):
                model.layers[3].ssm.h[5].output[:] = 0
        """
        path = self._public_path
        if isinstance(position, (slice, tuple, list)):
            raise PositionError(
                f"{path}[{position!r}]: one position at a time, h[5] or h[-1]; "
                f"for several write a loop in ascending order, for all of them use "
                f"{path}.output [{','.join(self._axes)}]"
            )
        try:
            return PositionEnvoy(self, operator.index(_no_bool(position)))
        except TypeError:
            raise PositionError(
                f"{path}[{position!r}]: a position is an integer, {path}[5], or {path}[-1] from the end, "
                f"not a {type(position).__name__}"
            ) from None

    def __len__(self) -> int:
        """The number of positions of this forward call, inside a trace.

        In a later step of ``tracer.iter`` the block waits for the first state of that step to find out.

        Raises:
            SiteOrderError: if the run has gone past that state.
            SiteValueError: if the run is in another process.
        """
        return length_of_call(self)

    def __iter__(self) -> Iterator[PositionEnvoy]:
        """The places of all states of this forward call, in order: ``for h in model.layers[3].ssm.h:``."""
        return (PositionEnvoy(self, position) for position in range(len(self)))

    def __setitem__(self, position: Any, value: Any) -> None:
        raise not_a_value(f"{self._public_path}[{position!r}]")

    def __getattr__(self, name: str) -> Any:
        if re.fullmatch(r"-?\d+", name):  # model.get("layers.3.ssm.h.5")
            return self[int(name)]
        return super().__getattr__(name)


class PositionEnvoy(NotAValue):
    """``h[p]``: the state carried after token p, [B,E,N] or in Mamba-2 [B,H,P,N].

    An edit changes y there and everything after it. The place has a location of its own and no module. Only
    `output` is served.
    """

    output = Located.output
    source, trace, edit = map(absent_attribute, ("source", "trace", "edit"))

    def __init__(self, state: StateEnvoy, position: int) -> None:
        # Not Envoy.__init__, which would install a controller and register this as the envoy of the module; and not
        # by assignment, which asks of each name what it may mean.
        self.__dict__.update(
            _parent=None, _site=state, position=position, _edits=[], _children=[], _child_map={}, _aliases={}
        )

    @property
    def _axes(self) -> str:
        return self._site._axes.replace("L", "")

    @property
    def path(self) -> str:
        return f"{self._site.path}.{self.position}"

    @property
    def interleaver(self) -> Any:
        return self._site.interleaver

    @property
    def _module(self) -> Any:
        return self._site._module

    def _expect(self) -> None:
        expect_position(self._site, self.position)

    @property
    def input(self) -> Any:
        """Not served: the state before token p is ``h[p - 1].output``, or ``h_start.output``."""
        raise SiteValueError(f"{self._public_path} has no input; read h[p - 1].output, or h_start.output")

    inputs = input

    def skip(self, replacement: Any) -> None:
        """Not offered: assign to ``output``."""
        raise SiteValueError(f"{self._public_path} cannot be skipped; assign to its output")

    def __getattr__(self, name: str) -> Any:
        raise self._lacks(name)

    def _lacks(self, name: str) -> Exception:
        return UnknownSiteError(f"{self._public_path} has no {name!r}; it has .output")

    def _meant(self, name: str) -> bool:
        return name != "position"

    def __reduce__(self) -> Any:
        return operator.getitem, (self._site, self.position)

    def __repr__(self) -> str:
        return f"{self._public_path}: state [{','.join(self._axes)}] after token {self.position}"


class PartEnvoy(Located):
    """The envoy of a part of a model that has sites or other names below it: of a block, a mixer, attention, an MLP."""

    _axes = _shared_axes = "BLD"
    _lacks = Guarded._lacks  # which suggests a site below


class AttentionEnvoy(PartEnvoy):
    """The envoy of attention. Its module returns its output and the pattern in a tuple, of which this is the first."""

    output, skip, _first_of_tuple = FirstOfTuple.output, FirstOfTuple.skip, True


class BlockEnvoy(PartEnvoy):
    """The envoy of a block, which has each part of its layer under the package's name of it."""

    output, skip, _first_of_tuple = FirstOfTuple.output, FirstOfTuple.skip, True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._name_parts()

    def _update(self, module: nn.Module) -> None:
        super()._update(module)
        self._name_parts()

    def _name_parts(self) -> None:
        """Bind the names of the parts, which follow what stands in the layer: a ``mixer`` may be attention."""
        for name, path in getattr(self._module, "parts_named", {}).items():
            if self._aliases.pop(name, None) is not None:
                self.__dict__.pop(name, None)
            there = self._module.part(name) is not None
            if there and name != path:
                object.__setattr__(self, name, functools.reduce(getattr, path.split("."), self))
                self._aliases[name] = path

    def _lacks(self, name: str) -> Exception:
        site = BY_NAME.get(name)
        part = name if name in SCOPE_OF else part_of(site) if site is not None else ""
        kind = getattr(self._module, "kind", None)
        if not part or kind is None or (part in SCOPE_OF and self._module.part(part) is not None):
            return super()._lacks(name)
        layout, layer = getattr(self.root, "_layout", None), int(self.path.rsplit(".", 1)[1])
        of_part = next(site for site in SITES if part_of(site) == part)
        if layout is None or not (layout.hybrid or of_part.part):
            return super()._lacks(name)
        return absent(layout, of_part, layer, f"layers[{layer}].{name}")

    def __getattr__(self, name: str) -> Any:
        same = SAME_AS.get(name)  # `ssm_out` in a layer that adds the mixer's output as it is
        if same is not None and "ssm" in self._aliases:
            return getattr(self.ssm, same)
        return super().__getattr__(name)


class MixerEnvoy(PartEnvoy):
    """The envoy of a mixer. Its method ``skip`` is hidden by the site of that name, a `SkipEnvoy`."""

    def __getattr__(self, name: str) -> Any:
        site = BY_NAME.get(name)
        if site is not None and site.module in BY_MODULE and site.module in self.__dict__.get("_child_map", ()):
            return self._child_map[site.module]  # ``inner_norm``, which Hugging Face calls ``norm``
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(site.name for module, site in BY_MODULE.items() if module in self._child_map)]

    def _wrap_envoy(self, name: str, module: nn.Module) -> Envoy:
        envoy = super()._wrap_envoy(name, module)
        if name in BY_MODULE:
            self._aliases[BY_MODULE[name].name] = name  # so that both names are printed
        return envoy


class RouterEnvoy(Located):
    """The envoy of a router: its ``output`` is the site of the router's logits, from which the experts are chosen."""

    _axes = BY_NAME["router"].axes

    @property
    def _logits(self) -> Any:
        return self.parent._child_map[BY_NAME["router"].place]

    @property
    def output(self) -> Any:
        """The logits [B,L,X]. Hugging Face's router returns them flat, in a tuple with what it chose."""
        return self._logits.output

    @output.setter
    def output(self, value: Any) -> None:
        self._logits.output = value


class ExpertsEnvoy(PartEnvoy):
    """The envoy of a mixture of experts, which has its router under this name whatever Hugging Face calls it."""

    def __getattr__(self, name: str) -> Any:
        if name == "router" and "gate" in self.__dict__.get("_child_map", ()):
            return self._child_map["gate"]
        return super().__getattr__(name)


class SkipEnvoy(SiteEnvoy):
    """``ssm.skip``: the gate site, and when called, the method of the mixer that it hides."""

    def __call__(self, replacement: Any, **kwargs: Any) -> None:
        """Skip the mixer, with ``replacement`` [B,L,D] as its output: nnsight's ``Envoy.skip``.

        Raises:
            SiteOrderError: if the run has gone past it.
            SiteValueError: if ``replacement`` is not a floating tensor of the mixer's shape.
        """
        skip(self.parent, replacement, "BLD")


class SomeLayers(list[BlockEnvoy]):
    """The blocks that a slice of the layers names: a list, which says what to do where it is taken for one block."""

    def _lacks(self, name: str) -> Exception:
        return UnknownSiteError(
            f"layers[...:...] is a list of {len(self)} blocks, which has no {name!r}: write a loop over it, "
            f"`for layer in model.layers[...:...]: layer.{name}`"
        )

    def __getattr__(self, name: str) -> Any:
        raise self._lacks(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._lacks(name)


class LayersEnvoy(Part):
    """The envoy of the list of blocks."""

    output, input, inputs, skip, source = map(absent_attribute, ("output", "input", "inputs", "skip", "source"))

    def _lacks(self, name: str) -> Exception:
        hint = f"; name one, layers[0].{name}" if hasattr(BlockEnvoy, name) else ""
        return UnknownSiteError(f"layers has no {name!r}: it has the layers [0] to [{len(self) - 1}]{hint}")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            try:
                ends = [
                    None if end is None else operator.index(_no_bool(end)) for end in (key.start, key.stop, key.step)
                ]
                return SomeLayers(super().__getitem__(slice(*ends)))
            except (TypeError, ValueError):  # no integer, or a step of 0
                raise LayerError(
                    f"layers[{key.start!r}:{key.stop!r}:{key.step!r}]: a slice of the layers 0 to {len(self) - 1} has "
                    f"integers, and a step that is not 0: layers[2:5], layers[::2]"
                ) from None
        index = layer_index(key, len(self), f"layers[{key!r}]", named_by="an integer, -1 for the last, or a slice")
        return super().__getitem__(index)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise not_a_value(f"layers[{key}]")


def _no_bool(key: Any) -> Any:
    # `key`, or something that is no index if it is true or false, which Python takes for 1 and 0.
    return None if isinstance(key, bool) or str(getattr(key, "dtype", "")).endswith("bool") else key


#: The class of the envoy of a module that has sites, by their scope.
BY_SCOPE: dict[str, type[Envoy]] = {
    "block": BlockEnvoy,
    "mixer": MixerEnvoy,
    "attn": AttentionEnvoy,
    "moe": ExpertsEnvoy,
    "mlp": PartEnvoy,
}


def envoy_classes() -> dict[str, type[Envoy]]:
    """nnsight's ``envoys=`` map, derived from the site table: path suffix -> envoy class."""
    special = {STATE: StateEnvoy, "skip": SkipEnvoy}
    classes: dict[str, type[Envoy]] = {}
    for part, scope in SCOPE_OF.items():
        for path in OF_LAYER[part]:
            last = path.rsplit(".", 1)[-1]
            classes |= {f"{last}.{site.module_name}": special.get(site.name, SiteEnvoy) for site in in_scope(scope)}
    for last in ("mixer", "mamba"):
        classes |= {f"{last}.{name}": Located for name in NATIVE_MODULES}
    classes |= {f"{path}.{name}": RouterEnvoy for path in OF_LAYER["moe"] for name in ("router", "gate")}
    classes |= {f"layers.*.{site.module_name}": SiteEnvoy for site in in_scope("block")}
    classes |= {f"layers.*.{path}": SiteEnvoy for name in ("norm", "norm_2") for path in OF_LAYER[name]}
    inner = {path.partition(".")[0] for several in OF_LAYER.values() for path in several if "." in path}
    classes |= {f"layers.*.{path}": Located for path in inner}
    for base in BASES:
        classes |= {base: Located, f"{base}.layers": LayersEnvoy}
        classes |= {f"{base}.{name}": SiteEnvoy for name in (*OF_BASE["embeddings"], *OF_BASE["norm_f"])}
    return classes | {site.name: SiteEnvoy for site in in_scope("model") if site.name not in OF_BASE}
