"""One place, three spellings: the path users write, MambaLens's hook name, the Hugging Face module path.

Analysis code brings names from elsewhere: ``blocks.3.hook_h.5`` (MambaLens), ``blocks.3.mixer.hook_out``
(TransformerLens 4's bridge), ``model.backbone.layers.3.mixer.h.5`` (the keys of nnsight's caches). This
module translates all of them, from the site table alone, and never maps a name to a place that means
something else.

    >>> to_path("blocks.3.hook_h.5")
    'layers[3].ssm.h[5]'
    >>> to_hook_name("layers[3].ssm.h[5]")
    'blocks.3.hook_h.5'
"""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import LayerError, PositionError, UnknownSiteError
from .sites import (
    BY_HOOK,
    BY_MODULE,
    BY_NAME,
    FAMILY_NAMES,
    LACKED_MODULES,
    MODULE_PREFIX,
    NATIVE_MODULES,
    STATE,
    Family,
    Site,
    walk,
)

#: TransformerLens 4's bridge names that mean the same place, by path: those of the model ...
_BRIDGE_MODEL = {
    "embeddings": "embed.hook_out",
    "norm_f": "ln_final.hook_out unembed.hook_in",
    "lm_head": "unembed.hook_out",
}
#: ... and of a block, relative to ``blocks.l.`` and ``layers[l].``. The first of several is preferred.
_BRIDGE_BLOCK = {
    "resid_pre": "hook_in",
    "layer_input": "norm.hook_in",
    "norm": "norm.hook_out hook_mixer_in mixer.hook_in mixer.in_proj.hook_in",
    "ssm.in_proj": "mixer.in_proj.hook_out mixer.hook_in_proj",
    "ssm.conv1d": "mixer.conv1d.hook_out mixer.hook_conv",
    "ssm.ssm_input": "mixer.x_proj.hook_in",
    "ssm.x_proj": "mixer.x_proj.hook_out mixer.hook_x_proj",
    "ssm.delta_1": "mixer.dt_proj.hook_in",
    "ssm.delta_2": "mixer.dt_proj.hook_out mixer.hook_dt_proj mixer.hook_ssm_dt",
    "ssm.after_skip": "mixer.out_proj.hook_in",
    "ssm.out_proj": "mixer.out_proj.hook_out mixer.hook_out mixer.hook_ssm_out hook_mixer_out",
    "resid_post": "hook_out",
}
#: Bridge name -> path, for both.
BRIDGE_MODEL = {name: path for path, names in _BRIDGE_MODEL.items() for name in names.split()}
BRIDGE_BLOCK = {name: path for path, names in _BRIDGE_BLOCK.items() for name in names.split()}
#: Parts of the names of a transformer's places that no name of a Mamba's place has.
OF_A_TRANSFORMER = re.compile(
    r"(^|\.)(attn|mlp|ln1|ln2)\.|hook_(attn|mlp|pattern|result|resid_mid|rot_|[qkvz](_|$))|hook_pos_embed"
)

_IN_LAYER = re.compile(r"layers(?:\[(\d+)\]|\.(\d+))\.((?:ssm|mixer)\.)?(.+)")
_CONTAINER = re.compile(r"backbone\.layers\.(?P<layer>\d+)(?P<mixer>\.mixer)?(\.output)?")
_POSITION = re.compile(rf"{STATE}(?:\[(-?\d+)\]|\.(-?\d+))")
_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_STATE_HOOK = re.compile(r"hook_h\.(-?\d+)")


#: A run asks for the same names again at each of its sites; this many are kept.
NAMES_KEPT = 2**12


@dataclass(frozen=True)
class Place:
    """A site of a particular layer, and for the state of a particular position.

    Attributes:
        site: the row of the table, or ``None`` for one of `sites.NATIVE_MODULES`.
        layer: the layer, or ``None`` for the model's own sites.
        position: the position for ``h[p]``, or ``None``.
        native: the inner module's name where ``site`` is ``None``.
    """

    site: Site | None
    layer: int | None = None
    position: int | None = None
    native: str | None = None

    @property
    def whole_trajectory(self) -> bool:
        """Whether this is ``h`` itself, all positions at once, which has no hook name."""
        return self.site is not None and self.site.name == STATE and self.position is None

    @property
    def index(self) -> float:
        """Where the place comes in its layer or its model: the order of execution, positions aside.

        An inner module comes half a step before the site that follows it, ``h[p]`` before the whole ``h``.
        """
        if self.site is None:
            return BY_NAME[NATIVE_MODULES[str(self.native)]].index - 0.5
        return self.site.index - (0.0 if self.position is None else 0.5)

    @property
    def path(self) -> str:
        """The path users write."""
        if self.site is None:
            return f"layers[{self.layer}].ssm.{self.native}"
        return self.site.path(self.layer) + ("" if self.position is None else f"[{self.position}]")

    @property
    def module_path(self) -> str:
        """The path in the Hugging Face module tree, the name that nnsight's locations and caches use."""
        if self.site is None:
            return f"{MODULE_PREFIX['mixer'].format(layer=self.layer)}{self.native}"
        return self.site.module_path(self.layer) + ("" if self.position is None else f".{self.position}")

    @property
    def hook_name(self) -> str:
        """The MambaLens name, or TransformerLens 4's. Raises `UnknownSiteError` where neither has one."""
        if self.site is None:
            raise UnknownSiteError(f"{self.path} has no MambaLens hook: {self.native} is a module, not a site")
        if self.whole_trajectory:
            raise UnknownSiteError(
                f"{self.path} (the whole trajectory) has no hook name: MambaLens has one hook for each "
                f"position, blocks.{self.layer}.hook_h.p, which is {self.path}[p] here"
            )
        return self.site.hook_name(self.layer) + ("" if self.position is None else f".{self.position}")


def hook_names(n_layers: int, n_positions: int, family: Family = "selective") -> list[str]:
    """Every MambaLens hook name of a model, in execution order.

    >>> hook_names(1, 2)[:2]
    ['hook_embed', 'blocks.0.hook_resid_pre']

    Raises:
        PositionError: if ``n_positions`` is not an integer of at least one.
    """
    if isinstance(n_positions, bool) or not isinstance(n_positions, int) or n_positions < 1:
        raise PositionError(
            f"hook names are those of a prompt of so many tokens, an integer of at least one position, not "
            f"{n_positions!r}"
        )
    return [place.hook_name for place in hook_places(n_layers, n_positions, family)]


def hook_places(n_layers: int, n_positions: int, family: Family = "selective") -> Iterator[Place]:
    """The places of `hook_names`, in the same order.

    >>> [place.path for place in hook_places(1, 2)][:2]
    ['embeddings', 'layers[0].resid_pre']
    """
    for site, layer in walk(n_layers, family):
        if site.in_mamba_lens:
            for position in range(n_positions) if site.name == STATE else (None,):
                yield Place(site, layer, position)


def to_path(name: str) -> str:
    """The path of a hook name: MambaLens's, TransformerLens 4's where it means the same place, or a path.

    Args:
        name: e.g. ``"blocks.3.hook_h.5"``, ``"blocks.3.mixer.hook_out"``, ``"layers.3.ssm.h.5"``.

    Returns:
        The path under the model, e.g. ``"layers[3].ssm.h[5]"``.

    Raises:
        UnknownSiteError: if no place has this name.

    >>> to_path("blocks.3.hook_h.5")
    'layers[3].ssm.h[5]'
    """
    return parse(name).path


def to_hook_name(path: str) -> str:
    """The hook name of a path, MambaLens's if it has one; the inverse of `to_path`.

    Args:
        path: e.g. ``"layers[3].ssm.h[5]"``, also as ``"model.layers.3.ssm.h.5.output"``.

    Returns:
        The hook name, e.g. ``"blocks.3.hook_h.5"``.

    Raises:
        UnknownSiteError: if there is no such site, or neither MambaLens nor TransformerLens has a hook there.

    >>> to_hook_name("layers[3].ssm.h[5]")
    'blocks.3.hook_h.5'
    """
    return parse(path).hook_name


def to_bridge_name(path: str) -> str:
    """TransformerLens 4's name of a place, where its Mamba bridge has one that means the same.

    Args:
        path: a path or a hook name, e.g. ``"layers[3].ssm.delta_2"``.

    Returns:
        The bridge's name; where it has several, the name of a module's output. `to_path` maps it back.

    Raises:
        UnknownSiteError: if there is no such place, or the bridge has none that means the same.

    >>> to_bridge_name("layers[3].ssm.delta_2")
    'blocks.3.mixer.dt_proj.hook_out'
    """
    place = parse(path)
    if place.site is not None and not place.site.in_mamba_lens:
        return place.hook_name
    bridge = _BRIDGE_MODEL if place.layer is None else _BRIDGE_BLOCK
    same = bridge.get(place.path.removeprefix(f"layers[{place.layer}]."))
    if same is None:
        raise UnknownSiteError(f"{place.path} has no name in TransformerLens 4's Mamba bridge")
    return ("" if place.layer is None else f"blocks.{place.layer}.") + same.split()[0]


def parse(name: str) -> Place:
    """The place that a hook name or a path names. Raises `UnknownSiteError`."""
    if not isinstance(name, str):
        raise UnknownSiteError(
            f"a place is named by a string, 'blocks.3.hook_h.5' or 'layers[3].ssm.h[5]', not by the "
            f"{type(name).__name__} {name!r}"
        )
    return _parsed(name)


@functools.lru_cache(maxsize=NAMES_KEPT)
def _parsed(name: str) -> Place:
    stripped = name.removeprefix("model.").removesuffix(".output")
    if stripped == "ln_final.hook_in":
        raise UnknownSiteError(
            "ln_final.hook_in is the residual stream out of the last layer: use its blocks.l.hook_resid_post"
        )
    place = _of_path(_path_of_hook(stripped) or stripped.removeprefix("backbone."))
    if place is None:
        raise UnknownSiteError(f"no site is called {name!r}{_suggest(stripped)}")
    return place


def _path_of_hook(name: str) -> str | None:
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
    return f"layers[{layer}].{BRIDGE_BLOCK[rest]}" if rest in BRIDGE_BLOCK else None


def _of_path(path: str) -> Place | None:
    in_layer = _IN_LAYER.fullmatch(path)
    if in_layer is None:
        site = BY_NAME.get(path)
        return Place(site) if site is not None and site.scope == "model" else None
    layer, rest = int(in_layer[1] or in_layer[2]), in_layer[4]
    scope = "mixer" if in_layer[3] else "block"
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

    >>> public_path("model.backbone.layers.3.mixer.h.5.output")
    'layers[3].ssm.h[5]'
    """
    inner = location[location.find("backbone.") :] if "backbone." in location else location
    if container := _CONTAINER.fullmatch(inner):
        return f"layers[{container['layer']}]" + (".ssm" if container["mixer"] else "")
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


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean a or b"`` for the known names closest to ``name``, or nothing.

    It has no mark of its own at the end, since what follows it in a message begins with one.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}" if close else ""


def lacked(name: str) -> str:
    """``": ..."``, why a Mamba lacks a place whose name only a transformer has, or nothing.

    >>> lacked("blocks.0.attn.hook_pattern")
    ': a Mamba has no attention, no MLP and one norm in each block'
    """
    if OF_A_TRANSFORMER.search(name) is None:
        return ""
    return ": a Mamba has no attention, no MLP and one norm in each block"


def families_of(name: str) -> tuple[Family, ...]:
    """The families whose mixers have the site or the inner module of this name; all for any other name."""
    site = BY_NAME.get(name)
    return tuple(f for f in FAMILY_NAMES if name not in LACKED_MODULES[f] and (site is None or f in site.families))


def of_another_family(name: str) -> str:
    """``": ..."``, which models have a site or an inner module that others lack, or nothing.

    >>> of_another_family("B_conv")
    ': it is a site of Mamba-2'
    """
    families = families_of(name)
    if len(families) == len(FAMILY_NAMES):
        return ""
    what = "a site" if name in BY_NAME else "a module"
    return f": it is {what} of {' and '.join(FAMILY_NAMES[family] for family in families)}"


def check_family(place: Place, family: Family, name: str) -> Place:
    """Return ``place`` if the mixers of a family have it.

    Raises:
        UnknownSiteError: if they do not, with ``name``, as which the user asked for it.
    """
    own = place.native if place.site is None else place.site.name
    if family in families_of(str(own)):
        return place
    raise UnknownSiteError(
        f"{name!r} is not a place of this model, a {FAMILY_NAMES[family]}{of_another_family(str(own))}; "
        f"`mamba-trace sites` lists them all"
    )


def _suggest(name: str) -> str:
    in_layer, last = re.match(r"(?:blocks\.|layers[.\[])(\d+)", name), re.search(r"\d+$", name)
    layer, position = (int(number[number.lastindex or 0]) if number else 0 for number in (in_layer, last))
    known = [site.path(layer) for site in BY_NAME.values()]
    if "hook" in name:  # there is a hook of each position and none of the whole h, so one of them is suggested
        places = (Place(site, layer, position if site.name == STATE else None) for site in BY_NAME.values())
        known = [place.hook_name for place in places]
    close = nearest(name, known)
    return lacked(name) or (f"{close}?" if close else "; `mamba-trace sites` lists them all")
