"""One place, three spellings: the path users write, MambaLens's hook name, the Hugging Face module path.

Analysis code brings names from elsewhere: ``blocks.3.hook_h.5`` (MambaLens), ``blocks.3.mixer.hook_out``
(TransformerLens 4's bridge), ``model.backbone.layers.3.mixer.h.5`` (the keys of nnsight's caches). This
module translates all of them, from the site table and the bridge's names (`bridge`) alone, and never maps a
name to a place that means something else.

What a bridge name means depends on the architecture, and a family lacks sites that another has. So functions
take the ``family`` of the model that is meant, and whoever has a model gives it. Without one, names of all
families are understood; where one means different places, as ``mixer.out_proj.hook_in`` alone does, it is that
of the first of `sites.FAMILIES` which has it: Mamba-1's.

    >>> to_path("blocks.3.hook_h.5")
    'layers[3].ssm.h[5]'
    >>> to_hook_name("layers[3].ssm.h[5]")
    'blocks.3.hook_h.5'
"""

from __future__ import annotations

import functools
import operator
import re
from dataclasses import replace
from typing import Any

from ..errors import LayerError, UnknownSiteError
from ..sites import (
    BY_HOOK,
    BY_MODULE,
    BY_NAME,
    FAMILY_MODELS,
    NATIVE_MODULES,
    SITES,
    STATE,
    Family,
    Layout,
)
from .bridge import BRIDGE_BLOCK, BRIDGE_MODEL, families_of_name, name_of, paths_in_block
from .hints import families_of, lacked, models_of, nearest, nowhere, of_another_family
from .layouts import absent, check_meaning, site_in, spans
from .modules import OF_LAYER, SCOPE_OF, below_the_layer, below_the_model
from .place import Place, hook_names, hook_places

_IN_LAYER = re.compile(r"layers(?:\[(\d+)\]|\.(\d+))(?:\.(.+))?")
_POSITION = re.compile(rf"{STATE}(?:\[(-?\d+)\]|\.(-?\d+))")
_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_STATE_HOOK = re.compile(r"hook_h\.(-?\d+)")


__all__ = [
    "BRIDGE_BLOCK",
    "BRIDGE_MODEL",
    "NATIVE_MODULES",
    "Place",
    "check_family",
    "families_of",
    "hook_names",
    "hook_places",
    "lacked",
    "layer_index",
    "nearest",
    "of_another_family",
    "parse",
    "public_path",
    "spans",
    "to_bridge_name",
    "to_hook_name",
    "to_path",
]

#: A run asks for the same names again at each of its sites; this many are kept.
NAMES_KEPT = 2**12


def to_path(name: str, family: Family | None = None) -> str:
    """The path of a hook name: MambaLens's, TransformerLens 4's where it means the same place, or a path.

    Args:
        name: e.g. ``"blocks.3.hook_h.5"``, ``"blocks.3.mixer.hook_out"``, ``"layers.3.ssm.h.5"``.
        family: of the model that is meant, ``model.architecture.family``; ``None`` where that is not known.

    Returns:
        The path under the model, e.g. ``"layers[3].ssm.h[5]"``.

    Raises:
        UnknownSiteError: if no place has this name, or models of this family lack it.

    >>> to_path("blocks.3.hook_h.5")
    'layers[3].ssm.h[5]'
    >>> to_path("blocks.3.mixer.out_proj.hook_in", "dual")
    'layers[3].ssm.inner_norm'
    """
    return parse(name, family).path


def to_hook_name(path: str, family: Family | None = None) -> str:
    """The hook name of a path, MambaLens's if it has one; the inverse of `to_path`.

    Args:
        path: e.g. ``"layers[3].ssm.h[5]"``, also as ``"model.layers.3.ssm.h.5.output"``.
        family: as in `to_path`.

    Returns:
        The hook name, e.g. ``"blocks.3.hook_h.5"``.

    Raises:
        UnknownSiteError: if there is no such site, or neither MambaLens nor TransformerLens has a hook there.

    >>> to_hook_name("layers[3].ssm.h[5]")
    'blocks.3.hook_h.5'
    """
    return parse(path, family).hook_name


def to_bridge_name(path: str, family: Family | None = None) -> str:
    """TransformerLens 4's name of a place, where its Mamba bridge has one that means the same.

    The values of ``mixer.hook_ssm_write`` and ``mixer.hook_ssm_state`` are [B,E,L,N] in its Mamba-1, and
    [B,L,E,N] here; in Mamba-2 both have [B,L,H,P,N].

    Args:
        path: a path or a hook name, e.g. ``"layers[3].ssm.delta_2"``.
        family: as in `to_path`.

    Returns:
        The bridge's name; where it has several, the name of a module's output. `to_path` maps it back.

    Raises:
        UnknownSiteError: if there is no such place, or the bridge has none that means the same.

    >>> to_bridge_name("layers[3].ssm.delta_2")
    'blocks.3.mixer.dt_proj.hook_out'
    """
    place = parse(path, family)
    if place.site is not None and not place.site.in_mamba_lens:
        return place.hook_name
    in_layer = place.layer is not None
    same = name_of(place.path.removeprefix(f"layers[{place.layer}]."), in_layer, family)
    if same is None:
        of_model = "" if family is None else f" of {models_of([family])}"
        raise UnknownSiteError(f"{place.path} has no name in TransformerLens 4's Mamba bridge{of_model}")
    return (f"blocks.{place.layer}." if in_layer else "") + same


def parse(name: str, family: Family | None = None, hybrid: bool | None = None) -> Place:
    """The place that a hook name or a path names, in a model of a family if it is given.

    Args:
        name: the name.
        family: as in `to_path`.
        hybrid: whether the model is a hybrid, if that is known: an error suggests names that it has.

    Raises:
        UnknownSiteError: if there is none, or models of this family lack it.
    """
    if not isinstance(name, str):
        raise UnknownSiteError(
            f"a place is named by a string, 'blocks.3.hook_h.5' or 'layers[3].ssm.h[5]', not by the "
            f"{type(name).__name__} {name!r}"
        )
    return _parsed(name, family, hybrid)


@functools.lru_cache(maxsize=NAMES_KEPT)
def _parsed(name: str, family: Family | None, hybrid: bool | None) -> Place:
    stripped = name.removeprefix("model.").removesuffix(".output")
    if stripped == "ln_final.hook_in":
        raise UnknownSiteError(
            "ln_final.hook_in is the residual stream out of the last layer: use its blocks.l.hook_resid_post"
        )
    place = _of_path(_path_of_hook(stripped, family) or below_the_model(stripped))
    if place is None:
        in_block = _BLOCK_HOOK.fullmatch(stripped)
        others = families_of_name(in_block[2]) if in_block else ()
        if family is not None and others:
            raise _not_of(family, name, f": in TransformerLens 4 it is one of {models_of(others)}")
        raise UnknownSiteError(f"no site is called {name!r}{_suggest(stripped, family, hybrid)}")
    return place if family is None else check_family(place, family, name)


def _path_of_hook(name: str, family: Family | None) -> str | None:
    in_block = _BLOCK_HOOK.fullmatch(name)
    if in_block is None:
        site = BY_HOOK.get(name)
        return BRIDGE_MODEL.get(name) if site is None or site.scope != "model" else site.name
    layer, rest = in_block.groups()
    if state := _STATE_HOOK.fullmatch(rest):
        return f"layers[{layer}].ssm.{STATE}[{state[1]}]"
    site = BY_HOOK.get(rest)
    if site is not None and site.scope != "model":
        return site.path(int(layer))
    return next((f"layers[{layer}].{path}" for path in paths_in_block(rest, family)), None)


def _of_path(path: str) -> Place | None:
    in_layer = _IN_LAYER.fullmatch(path)
    if in_layer is None:
        site = BY_NAME.get(path)
        return Place(site) if site is not None and site.scope == "model" else None
    layer, below = int(in_layer[1] or in_layer[2]), below_the_layer(in_layer[3] or "")
    part, _, rest = below.partition(".")
    scope = SCOPE_OF.get(part)
    if scope is None:
        site = BY_NAME.get(below)
        return Place(site, layer) if site is not None and site.scope == "block" else None
    if scope == "mixer" and rest in NATIVE_MODULES:
        return Place(None, layer, native=rest)
    if scope == "mixer" and (position := _POSITION.fullmatch(rest)):
        return Place(BY_NAME[STATE], layer, int(position[1] or position[2]))
    site = BY_NAME.get(rest)
    if scope == "mixer" and (site is None or site.scope == "block"):
        site = BY_MODULE.get(rest)  # inner_norm by its name in Hugging Face's mixer
    return Place(site, layer) if site is not None and site.scope == scope else None


@functools.lru_cache(maxsize=NAMES_KEPT)
def public_path(location: str) -> str:
    """The path users write for one of nnsight's locations; a location outside of all sites stays as it is.

    >>> public_path("model.backbone.layers.3.mixer.h.5.output"), public_path("model.model.layers.3.self_attn")
    ('layers[3].ssm.h[5]', 'layers[3].attn')
    """
    inner = below_the_model(location)
    container = _IN_LAYER.fullmatch(inner.removesuffix(".output"))
    if container is not None and inner != location:
        part = below_the_layer(container[3] or "")
        if not part or part in OF_LAYER:
            return f"layers[{container[2]}]" + (f".{part}" if part else "")
    try:
        return parse(inner).path
    except UnknownSiteError:
        return location


def layer_index(
    layer: Any,
    n_layers: int,
    asked: str,
    allowed: range | None = None,
    named_by: str = "an integer, -1 for the last",
) -> int:
    """The number of a layer that a user named, counted from 0. Every layer in the package is checked here.

    Args:
        layer: what the user gave.
        n_layers: how many layers the model has.
        asked: what the user wrote, quoted by the message, such as ``"layers[7]"`` or ``"stop_at_layer=7"``.
        allowed: the integers that are accepted; by default those of the layers, counted from either end.
        named_by: what the message says to give where ``layer`` is no integer.

    Raises:
        LayerError: if ``layer`` is not an integer, or not an allowed one.

    >>> layer_index(-1, 3, "layers[-1]")
    2
    """
    there = f"{asked}: this model has layers 0 to {n_layers - 1}"
    try:
        if isinstance(layer, bool) or str(getattr(layer, "dtype", "")).endswith("bool"):
            raise TypeError("True and False are no layers, though Python counts with them")
        number = operator.index(layer)
    except TypeError:
        raise LayerError(f"{there}, named by {named_by}") from None
    if number not in (range(-n_layers, n_layers) if allowed is None else allowed):
        raise LayerError(f"{there}, and no {number}")
    return number + n_layers if number < 0 else number


def check_family(place: Place, family: Family, name: str) -> Place:
    """Return ``place`` if the mixers of a family have it.

    Raises:
        UnknownSiteError: if they do not, with ``name``, as which the user asked for it.

    >>> check_family(parse("blocks.0.hook_B_in"), "dual", "blocks.0.hook_B_in").path
    'layers[0].ssm.B_in'
    """
    own = place.native if place.site is None else place.site.name
    if family in families_of(str(own)):
        return place
    raise _not_of(family, name, of_another_family(str(own)))


def in_layout(place: Place, layout: Layout, name: str) -> Place:
    """The place of a model that a name means, where ``place`` is what the name means in any model.

    Args:
        place: with a layer of the model, counted from 0.
        layout: of the model.
        name: what the user asked for.

    Raises:
        UnknownSiteError: if the layer has no such site, saying which layers have it.
    """
    if place.site is None:
        if layout.layers[place.layer or 0].family is None:
            raise absent(layout, None, place.layer, repr(name))
        return place
    check_meaning(layout, place.layer, name)
    of_logits = place.site.name == "lm_head" and name.endswith(BY_NAME["lm_head"].hook)  # MambaLens's name of these
    site = site_in(layout, BY_NAME["logits"] if of_logits else place.site, place.layer)
    if site is None:
        raise absent(layout, place.site, place.layer, repr(name))
    return place if site is place.site else replace(place, site=site)


def _not_of(family: Family, name: str, why: str) -> UnknownSiteError:
    model = " or ".join(FAMILY_MODELS[family])
    return UnknownSiteError(
        f"{name!r} is not a place of this model, a {model}{why}; `mamba-trace sites` lists them all"
    )


def _suggest(name: str, family: Family | None, hybrid: bool | None) -> str:
    in_layer, last = re.match(r"(?:blocks\.|layers[.\[])(\d+)", name), re.search(r"\d+$", name)
    layer, position = (int(number[number.lastindex or 0]) if number else 0 for number in (in_layer, last))
    there = [site for site in SITES if family is None or family in site.families]
    there = [site for site in there if hybrid or not site.part]
    known = [site.path(layer) for site in there]
    if "hook" in name:  # there is a hook of each position and none of the whole h, so one of them is suggested
        places = (Place(site, layer, position if site.name == STATE else None) for site in there)
        known = [place.hook_name for place in places]
    close = nearest(name, known)
    if hybrid is None and (why := nowhere(name)):
        return why
    return ("" if hybrid else lacked(name)) or (f"{close}?" if close else "; `mamba-trace sites` lists them all")
